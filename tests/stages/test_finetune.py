"""The stage `finetune`: in this process, and on ranks that Ray Train starts."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ray.models import num_active_parameters
from m2mkd_ray.recipes import baseline
from m2mkd_ray.stages.parts import fresh_student, load_student


def test_the_student_is_trained_whole(chain) -> None:
    metrics, folder = chain.metrics("finetune"), chain.folder("finetune")
    student = load_student(chain.recipe.blueprint, folder, keep_stitches=False)
    assert metrics["num_parameters"] == sum(p.numel() for p in student.parameters())
    assert metrics["num_active_parameters"] == num_active_parameters(student) < metrics["num_parameters"]
    start = load_file(chain.folder("assemble") / "model.safetensors")
    assert not [name for name, tensor in student.state_dict().items() if torch.equal(tensor, start[name])]
    history = json.loads((folder / "history.json").read_text())
    assert history[0]["step"] == 0
    assert history[-1]["val_top1"] == metrics["val_top1"]


def test_pure_starts_from_random_weights_of_the_seed(chain) -> None:
    recipe = baseline(chain.recipe, "pure")
    still = recipe.finetune.model_copy(update={"epochs": 0.2, "lr": 1e-12, "min_lr": 0, "weight_decay": 0})
    pure = chain.of(recipe.model_copy(update={"finetune": still}))
    trained = load_file(pure.folder("finetune") / "model.safetensors")
    start = fresh_student(recipe.blueprint, recipe.seed, drop_path=0, keep_stitches=False).state_dict()
    torch.testing.assert_close(trained, start, rtol=0, atol=1e-10)


def test_pure_sees_the_batches_that_the_student_sees(chain) -> None:
    own, pures = (each.stage("finetune").config.training for each in (chain, chain.of(baseline(chain.recipe, "pure"))))
    assert own == pures


@pytest.fixture
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this test's own."""
    import ray

    place = str(tmp_path_factory.mktemp("ray"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=place)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray warns of settings of its own
def test_two_ranks_end_with_the_weights_of_one_process(chain, anew) -> None:
    # No stochastic depth, which each rank draws for itself; eps as in test_engine.py.
    same = chain.with_settings("finetune.drop_path=0", "finetune.eps=1.0e-3", "finetune.clip_norm=0.5")
    ranks = same.with_settings("placement.finetune.engine=deepspeed", "placement.finetune.cpus_per_worker=0.5")
    assert ranks.stage("finetune").address == same.stage("finetune").address
    ours, theirs = anew(ranks.stage("finetune")), same.folder("finetune")
    weights = [load_file(folder / "model.safetensors") for folder in (ours, theirs)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    metrics = json.loads((ours / "manifest.json").read_text())["metrics"]
    assert metrics["num_ranks"] == 2
    assert metrics["val_top1"] == same.metrics("finetune")["val_top1"]
    histories = [json.loads((folder / "history.json").read_text()) for folder in (ours, theirs)]
    assert [[p["step"] for p in history] for history in histories] == [[0, 2, 3, 3]] * 2
