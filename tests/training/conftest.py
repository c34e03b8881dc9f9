"""A small training on real images: everything `fit` needs, made anew for each call."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.data import Augmentation, Batches, FeedConfig, find
from m2mkd_ray.execution import Checkpoints, Store
from m2mkd_ray.models import create_vit
from m2mkd_ray.training import Classification, seeded

# What tests of this folder share is a file of its own, which they import by name.
sys.path.insert(0, str(Path(__file__).parent))

SMALL = Vit(
    name="vit_tiny_patch16_224",
    img_size=28,
    patch_size=14,
    num_classes=10,
    width=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
)


@dataclass
class Keeper:
    """A session whose checkpoints are in a real store; it notes down what it is told."""

    checkpoints: Checkpoints
    reports: list[tuple[int, int, Mapping[str, float]]] = field(default_factory=list)

    landmarks: Sequence[Mapping[str, float]] = ()
    notice_from: int | None = None
    """Asked so often, it has been told that its machine goes."""
    asked: int = 0

    def has_notice(self) -> bool:
        """See `Session`."""
        self.asked += 1
        return self.notice_from is not None and self.asked >= self.notice_from

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """See `Session`."""
        self.reports.append((step, total_steps, metrics))
        self.landmarks = tuple(landmarks)


@pytest.fixture
def keeper(tmp_path: Path) -> Callable[..., Keeper]:
    """A new session; sessions of one name share their checkpoints, as a worker and its successor do."""
    return lambda name="training": Keeper(Store(str(tmp_path / name)).checkpoints("training-000000000000"))


@pytest.fixture
def feed() -> Batches:
    """Six steps an epoch of 16 images of Fashion-MNIST."""
    augmentation = Augmentation(kind="light", shift=2, label_smoothing=0.1)
    config = FeedConfig(
        dataset="fashion-mnist-small", max_rows=96, batch_size=16, img_size=28, augmentation=augmentation, seed=3
    )
    return Batches(config, find("fashion-mnist-small"))


@pytest.fixture
def classification() -> Callable[..., Classification]:
    """A small ViT to be trained; with dropout and drop path unless told otherwise."""

    def make(seed: int = 0, *, dropout: float = 0.1, drop_path: float = 0.3) -> Classification:
        with seeded(seed, "test"):
            return Classification(nn.Sequential(nn.Dropout(dropout), create_vit(SMALL, drop_path=drop_path)))

    return make


@pytest.fixture
def copy_of() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """A module's tensors as they are now."""
    return lambda module: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
