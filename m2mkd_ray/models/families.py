"""The student families.

A family is one file (or folder) with the functions of `Family`; a new one is that file and one line in `FAMILIES`.
The contract tests find it there.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models import nac, vmoe
from m2mkd_ray.models.fill import Rules


class Family(Protocol):
    """What the pipeline asks of a student."""

    def model(self, blueprint: Blueprint, drop_path: float = 0.0, *, keep_stitches: bool = False) -> nn.Module:
        """Build the whole student: images (B, 3, H, W) to logits (B, K)."""

    def modules(self, blueprint: Blueprint, drop_path: float = 0.0) -> Sequence[nn.Module]:
        """Build its modules, each of which fits in the place of a module of the meta model."""

    def rules(self, blueprint: Blueprint, *, keep_stitches: bool = False) -> Sequence[Rules]:
        """Where the tensors of every module go in the whole student."""

    def fresh(self, blueprint: Blueprint) -> Sequence[str]:
        """Regular expressions for tensors of the whole student that no module trains."""

    def macs(self, blueprint: Blueprint) -> float:
        """Forward multiply-accumulates of the whole student, per image."""

    def module_macs(self, blueprint: Blueprint, index: int, *, short: bool = False) -> float:
        """Forward multiply-accumulates of a module in the meta model, per image; `short`: with its last block
        computed for the class token alone, where that is done."""

    def num_tokens(self, blueprint: Blueprint, index: int) -> int:
        """Tokens that a module but the last hands on in the meta model."""

    def for_modules(self, blueprint: Blueprint) -> Blueprint:
        """The blueprint of which `modules` makes the same, with all that decides nothing of them at its default.

        Keys of modules' trainings are made from it, so what is left in for nothing trains all modules again, and what
        is left out but matters gives one address to two results.
        """

    def for_training(self, blueprint: Blueprint) -> Blueprint:
        """Likewise for assembling and training the whole student: without what modules or evaluations alone go by."""


FAMILIES: dict[str, Family] = {"nac": nac, "vmoe": vmoe}


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FAMILIES:
        raise UsageError(f"There is no student family {name!r}. Known families: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def student_with(
    blueprint: Blueprint, weights: Mapping[str, Tensor], *, drop_path: float = 0.0, keep_stitches: bool
) -> nn.Module:
    """The whole student with copies of these weights: what is read from a file may be mapped on it.

    Raises:
        RuntimeError: they are not those of this student.
    """
    with torch.device("meta"):  # nothing is drawn or fitted that the weights replace
        model = family(blueprint.student.family).model(blueprint, drop_path, keep_stitches=keep_stitches)
    model.load_state_dict({name: each.clone() for name, each in weights.items()}, assign=True)
    return model
