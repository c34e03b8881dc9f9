"""The small blueprint that most of these tests build."""

import pytest
import torch
from torch import Tensor

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit


@pytest.fixture
def blueprint() -> Blueprint:
    """A teacher of width 24 and a student of width 16, in three modules of unequal depths."""
    sizes = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "num_classes": 5, "num_heads": 2}
    return Blueprint(
        teacher=Vit(width=24, depth=6, **sizes),
        teacher_depths=(1, 3, 2),
        student=Student(vit=Vit(width=16, depth=4, **sizes), moe=Moe(num_experts=4)),
        student_depths=(1, 2, 1),
    )


@pytest.fixture
def images() -> Tensor:
    """(B, 3, H, W)"""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
