"""The stages `meta` and `teacher`: from scratch, assembled, pretrained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2mkd_ray.data import EvalBatches, find
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.models import create_vit
from m2mkd_ray.recipe import Phase, Teacher
from m2mkd_ray.stages.parts import load_vit


def equal(one: dict, other: dict) -> set[str]:
    """Names of the tensors that are the same bit for bit."""
    assert one.keys() == other.keys()
    return {name for name in one if torch.equal(one[name], other[name])}


def test_the_meta_model_is_trained_and_measured(chain, data_root: Path) -> None:
    folder, metrics, recipe = chain.folder("meta"), chain.metrics("meta"), chain.recipe
    model = load_vit(recipe.blueprint.meta, folder)
    batches = EvalBatches(
        find("fashion-mnist-small", str(data_root)),
        "test",
        img_size=28,
        batch_size=7,
        augmentation=recipe.data.augmentation,
        max_rows=30,
    )
    logits, labels = predict(model, batches, device=torch.device("cpu"))
    assert metrics["val_top1"] == top_k_accuracy(logits, labels, 1)
    assert metrics["steps"] == 3  # 0.6 epochs of 160 rows in batches of 32
    assert metrics["num_parameters"] == sum(p.numel() for p in model.parameters())
    history = json.loads((folder / "history.json").read_text())
    assert [(p["step"], "val_top1" in p) for p in history] == [(0, True), (2, True), (3, False), (3, True)]
    assert history[-1]["val_top1"] == metrics["val_top1"]


def test_the_same_stage_gives_the_same_weights_whatever_ran_before(chain, anew) -> None:
    first = load_file(chain.folder("meta") / "model.safetensors")
    torch.manual_seed(77)
    state = torch.get_rng_state()
    second = load_file(anew(chain.stage("meta")) / "model.safetensors")
    assert equal(first, second) == set(first)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_incubated_teacher_starts_from_its_modules(chain) -> None:
    frozen = chain.with_settings(
        "teacher.phase={epochs: 0.2, lr: 1.0e-12, min_lr: 0, weight_decay: 0, batch_size: 32}"
    )
    trained = load_file(frozen.folder("teacher") / "model.safetensors")
    (assembled,) = (stage for stage in frozen.stage("teacher").needs.values() if stage.name == "assemble-teacher")
    start = load_file(frozen.run(assembled) / "model.safetensors")
    torch.testing.assert_close(trained, start, rtol=0, atol=1e-10)
    tuned = load_file(chain.folder("teacher") / "model.safetensors")
    assert equal(tuned, start) == set()


@pytest.fixture
def weights(chain, tmp_path: Path) -> Path:
    """Weights of the teacher's sizes, from elsewhere."""
    file = tmp_path / "elsewhere.safetensors"
    save_file(create_vit(chain.recipe.blueprint.teacher).state_dict(), file)
    return file


def pretrained(chain, weights: Path, tune: str):
    phase = Phase(epochs=0.4, lr=1e-3, batch_size=32)
    teacher = Teacher(source="pretrained", weights=str(weights), tune=tune, phase=phase)
    return chain.of(chain.recipe.model_copy(update={"teacher": teacher}))


def test_with_tune_head_only_the_head_learns(chain, weights: Path) -> None:
    tuned = load_file(pretrained(chain, weights, "head").folder("teacher") / "model.safetensors")
    assert set(tuned) - equal(tuned, load_file(weights)) == {"head.weight", "head.bias"}


def test_with_tune_all_everything_learns(chain, weights: Path) -> None:
    tuned = load_file(pretrained(chain, weights, "all").folder("teacher") / "model.safetensors")
    assert equal(tuned, load_file(weights)) == set()


def test_a_teacher_trained_end_to_end_starts_from_random_weights(chain) -> None:
    teacher = Teacher(source="trained", phase=Phase(epochs=0.2, lr=1e-3, batch_size=32))
    trained = chain.of(chain.recipe.model_copy(update={"teacher": teacher}))
    assert set(trained.stage("teacher").needs) == {"data"}
    assert trained.metrics("teacher")["steps"] == 1
