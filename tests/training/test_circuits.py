"""Circuits and their modules in the loop: noise follows from seed and step, so a resumed training is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuts import Cut, Killed
from torch import nn

from m2mkd_ray.blueprint import Blueprint, Nac, Prior, Student, Vit
from m2mkd_ray.data import Augmentation, Batches, FeedConfig, find
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.training import (
    Classification,
    ModuleDistillation,
    TorchEngine,
    TrainConfig,
    TrainPlacement,
    fit,
    seeded,
)
from m2mkd_ray.training.precision import Precision

VIT = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 16, "num_classes": 10, "num_heads": 2}
SIZES = {"num_classes": 10, "img_size": 32, "width": 16, "num_heads": 2, "head_width": 8, "signature_width": 8}
LATENTS = {"num_inputs": 4, "num_mediators": 8, "num_outputs": 4, "grid_width": 8, "prior": Prior(steps=5)}
BLUEPRINT = Blueprint(
    teacher=Vit(width=16, depth=4, **VIT),
    teacher_depths=(1, 2, 1),
    student=Student(family="nac", nac=Nac(**SIZES, **LATENTS)),
    student_depths=(1, 1, 1),
)
ONE_EPOCH = TrainConfig(epochs=1, lr=1e-2, drop_path=0.3, decayed="all")
EVERY_STEP = TrainPlacement(checkpoint_every_s=0, log_every_steps=1)


@pytest.fixture
def feed() -> Batches:
    """Six steps of 8 images of Fashion-MNIST."""
    augmentation = Augmentation(kind="light", shift=2, mixup=0.8)
    config = FeedConfig(
        dataset="fashion-mnist-small", max_rows=48, batch_size=8, img_size=32, augmentation=augmentation, seed=3
    )
    return Batches(config, find("fashion-mnist-small"))


def circuit(seed: int) -> nn.Module:
    """The whole student, trained with labels and its own term."""
    with seeded(seed, "circuit"):
        return Classification(family("nac").model(BLUEPRINT, drop_path=0.3))


def pair(index: int) -> Callable[[int], nn.Module]:
    """A student's module against its teacher's."""

    def make(seed: int) -> nn.Module:
        with seeded(0, "frozen"):
            meta = split(create_vit(BLUEPRINT.meta), (1,) * 3)
            teacher = split(create_vit(BLUEPRINT.teacher), BLUEPRINT.teacher_depths)[index]
        with seeded(seed, "module"):
            return ModuleDistillation(meta, index, family("nac").modules(BLUEPRINT, drop_path=0.3)[index], teacher)

    return make


@pytest.mark.parametrize(
    ("make", "precision"),
    [(circuit, "fp32"), (circuit, "bf16"), (pair(0), "bf16"), (pair(1), "bf16_pure"), (pair(2), "fp32")],
    ids=["circuit", "circuit-bf16", "read-in-bf16", "propagator-bf16_pure", "read-out"],
)
def test_steps_on_one_batch_make_its_loss_less(
    make: Callable[[int], nn.Module], precision: Precision, feed: Batches
) -> None:
    config = TrainConfig(epochs=1, lr=3e-3, precision=precision)
    engine, batch = TorchEngine(make(0), config), feed[0]
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        engine.begin(config.lr, is_logged=True)
        engine.accumulate(batch.images, batch.targets, weight=1.0, is_last=True)
        losses.append(engine.update()["loss"].item())
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("make", [circuit, pair(0), pair(1)], ids=["circuit", "read-in", "propagator"])
def test_a_training_killed_and_resumed_ends_bit_equal(
    make: Callable[[int], nn.Module], feed: Batches, keeper: Callable
) -> None:
    def run(seed: int, feed: Any, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        engine = TorchEngine(make(seed), ONE_EPOCH)
        history = fit(feed, engine, ONE_EPOCH, EVERY_STEP, keeper(name), seed=0)
        return [point["loss"] for point in history], engine.objective.trainable.state_dict()

    losses, weights = run(0, feed, "undisturbed")
    with pytest.raises(Killed):
        run(0, Cut(feed, 3), "killed")
    again, resumed = run(9, feed, "killed")  # its own start must not matter, its codes neither
    assert again == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
