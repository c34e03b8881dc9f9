"""Precisions, from the first step to the validation at the end."""

import copy

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.evaluation import predict
from m2mkd_ray.models import create_vit, splice, split
from m2mkd_ray.training import ModuleDistillation, Prefix, TorchEngine, TrainConfig, seeded

VIT = Vit(
    name="vit_tiny_patch16_224",
    img_size=28,
    patch_size=14,
    num_classes=10,
    width=16,
    depth=3,
    num_heads=2,
    mlp_ratio=2,
)
PURE = TrainConfig(epochs=1, lr=1e-3, precision="bf16_pure")


def vit_modules(seed: int) -> list[nn.Module]:
    with seeded(seed, "test"):
        return list(split(create_vit(VIT), (1, 1, 1)))


def stepped(meta: list[nn.Module], index: int) -> tuple[TorchEngine, Tensor]:
    """An engine after a step, and the images that it took."""
    objective = ModuleDistillation(Prefix(meta), index, vit_modules(1)[index], vit_modules(2)[index])
    engine = TorchEngine(objective, PURE)
    with seeded(3):
        images, targets = torch.randn(8, 3, 28, 28), torch.randn(8, 10).softmax(dim=-1)
    engine.begin(1e-3, is_logged=True)
    engine.accumulate(images, targets, weight=1.0, is_last=True)
    engine.update()
    return engine, images


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_module_trained_in_pure_bf16_is_validated_in_its_hybrid_at_the_end(index: int) -> None:
    """The module is in float32 again, the meta model around it is not."""
    meta = vit_modules(0)
    plain = copy.deepcopy(meta)
    engine, images = stepped(meta, index)
    engine.end()
    student = engine.objective.trainable
    rows = [(images, torch.zeros(8, dtype=torch.int64))]
    found, _ = predict(splice(meta, index, student), rows, device=torch.device("cpu"), precision="bf16")
    expected, _ = predict(splice(plain, index, student), rows, device=torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_a_released_engine_keeps_no_masters_nor_moments() -> None:
    engine, _ = stepped(vit_modules(0), 1)
    assert engine.masters is not None
    engine.release()
    assert engine.masters.copies == engine.optimizer.param_groups == []
    assert len(engine.optimizer.state) == 0
