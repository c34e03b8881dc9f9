"""The small circuit that these tests build."""

import pytest
import torch
from torch import Tensor

from m2mkd_ray.blueprint import Blueprint, Nac, Prior, Student, Vit

SMALL = Nac(
    img_size=16,
    num_classes=5,
    width=16,
    num_heads=2,
    head_width=8,
    signature_width=8,
    num_inputs=3,
    num_mediators=12,
    num_outputs=4,
    grid_width=6,
    prior=Prior(steps=20),
)


@pytest.fixture
def nac() -> Nac:
    """Four tokens of width 14, 3 + 12 + 4 latents of width 16."""
    return SMALL


@pytest.fixture
def blueprint() -> Blueprint:
    """A teacher of width 24 and 17 tokens in four modules, and a circuit with two propagators."""
    sizes = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "num_classes": 5, "num_heads": 2}
    return Blueprint(
        teacher=Vit(width=24, depth=6, **sizes),
        teacher_depths=(1, 2, 2, 1),
        student=Student(family="nac", nac=SMALL),
        student_depths=(1, 1, 1, 1),
    )


@pytest.fixture
def images() -> Tensor:
    """(B, 3, H, W)"""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
