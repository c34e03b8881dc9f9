"""The stages `pair-i` and `incubate-i`: one module in the frozen meta model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn

from m2mkd_ray.data import EvalBatches, find
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.models import create_vit, family, splice, split
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.slices import incubation
from m2mkd_ray.stages.incubate import fresh_module
from m2mkd_ray.stages.parts import load_meta, load_module


def top1(chain, data_root: Path, model: nn.Module) -> float:
    """Top-1 on the validation rows."""
    batches = EvalBatches(
        find("fashion-mnist-small", str(data_root)),
        "test",
        img_size=28,
        batch_size=30,
        augmentation=chain.recipe.data.augmentation,
        max_rows=30,
    )
    return top_k_accuracy(*predict(model, batches, device=torch.device("cpu")), 1)


@pytest.mark.parametrize("index", [0, 3])
def test_a_pair_leaves_a_module_that_works_in_the_meta_model(index: int, chain, data_root: Path) -> None:
    blueprint, metrics = chain.recipe.blueprint, chain.metrics(f"pair-{index}")
    meta = load_meta(blueprint, chain.folder("meta"))
    module = family("vmoe").modules(blueprint)[index]
    load_module(module, chain.folder(f"pair-{index}") / "module.safetensors")
    assert metrics["val_top1"] == top1(chain, data_root, splice(meta, index, module))
    assert metrics["num_parameters"] == sum(p.numel() for p in module.parameters())
    teacher = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[index]
    load_module(teacher, chain.folder("split") / f"module-{index}.safetensors")
    assert metrics["teacher_hybrid_top1"] == top1(chain, data_root, splice(meta, index, teacher))


def test_a_pairs_history_tells_labels_and_teacher_apart(chain) -> None:
    history = json.loads((chain.folder("pair-1") / "history.json").read_text())
    alpha = chain.recipe.pairs.distill.alpha
    (point,) = (point for point in history if "loss" in point)
    assert point["loss"] == pytest.approx((1 - alpha) * point["ce"] + alpha * point["kd"], rel=1e-5)
    assert 0 < point["teacher_share"] < 1
    assert chain.metrics("pair-1")["teacher_share"] == point["teacher_share"]


def test_training_changes_every_tensor_of_the_module(chain) -> None:
    start = fresh_module(chain.stage("pair-1").config).state_dict()
    end = load_file(chain.folder("pair-1") / "module.safetensors")
    assert start.keys() == end.keys()
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert not same


def test_each_module_starts_from_weights_of_its_own_that_follow_from_the_seed(chain) -> None:
    one, again, next_one = (
        nn.utils.parameters_to_vector(fresh_module(chain.stage(f"pair-{index}").config)[2].parameters())
        for index in (1, 1, 2)
    )
    other_seed = fresh_module(chain.with_settings("seed=1").stage("pair-1").config)[2]
    assert torch.equal(one, again)
    assert not torch.equal(one, next_one)
    assert not torch.equal(one, nn.utils.parameters_to_vector(other_seed.parameters()))


def test_without_alpha_a_pair_reads_no_teacher(chain) -> None:
    control = chain.with_settings("pairs.distill.alpha=0")
    assert set(control.stage("pair-2").needs) == {"data", "meta"}
    metrics = control.metrics("pair-2")
    assert "teacher_hybrid_top1" not in metrics
    assert "teacher_share" not in metrics


def test_a_teachers_module_is_trained_with_labels_alone(chain, data_root: Path) -> None:
    blueprint, index = chain.recipe.blueprint, 2
    folder, metrics = chain.folder(f"incubate-{index}"), chain.metrics(f"incubate-{index}")
    module = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[index]
    load_module(module, folder / "module.safetensors")
    meta = load_meta(blueprint, chain.folder("meta"))
    assert metrics["val_top1"] == top1(chain, data_root, splice(meta, index, module))
    assert not any("kd" in point for point in json.loads((folder / "history.json").read_text()))


def rates(module: nn.Module) -> list[float]:
    """Stochastic depth of each block of a module."""
    blocks = [layer for layer in module if hasattr(layer, "drop_path1")]
    assert all(type(block.drop_path1) is type(block.drop_path2) for block in blocks)
    return [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0 for block in blocks]


@pytest.mark.parametrize("index", [0, 1, 3])
def test_drop_path_of_a_students_module_grows_over_its_own_blocks(index: int) -> None:
    """docs/method.md: "V-MoE student module of 3 blocks: 0, 0.05, 0.1"."""
    paper = find_recipe("vmoe_base")
    with torch.device("meta"):
        module = fresh_module(incubation(paper, index, "student", paper.pairs, {}).config)
    assert rates(module) == pytest.approx([0, 0.05, 0.1])


@pytest.mark.parametrize("index", [0, 1, 3])
def test_drop_path_of_a_teachers_module_grows_over_the_hybrid(index: int) -> None:
    """docs/method.md: "linear over the hybrid's total depth": 3 meta blocks and 6 of the module."""
    paper = find_recipe("vmoe_base")
    with torch.device("meta"):
        module = fresh_module(incubation(paper, index, "teacher", paper.teacher.incubation, {}).config)
    assert rates(module) == pytest.approx([0.1 * place / 8 for place in range(index, index + 6)])
