"""Where a training's time went, and what it did in it: the counters of one stage, with what follows from them.

A stage reports them since its last point, and returns them in all, under the same names; both are read here.
Everything is optional: not every training has a teacher, and old ones counted less.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, FiniteFloat

PARTS: Mapping[str, str] = {
    "prefix_s": "prefix",
    "teacher_s": "teacher",
    "student_s": "student",
    "suffix_s": "suffix",
}
"""The parts of a step that are timed, in their order, and their names for people."""


class CounterRow(BaseModel, frozen=True, extra="forbid"):
    """The counters of one training; None: not counted. Times are in seconds, counts are of images."""

    stage: str
    recipe: str
    images_per_s: FiniteFloat | None = None
    data_wait: FiniteFloat | None = None
    """Share of the time spent waiting for data."""
    train_s: FiniteFloat | None = None
    """Time in training, without validations and checkpoints."""
    prefix_s: FiniteFloat | None = None
    """Time in the frozen meta modules before the pair."""
    teacher_s: FiniteFloat | None = None
    """Time in the teacher hybrid."""
    student_s: FiniteFloat | None = None
    """Time in the student module, forward and backward."""
    suffix_s: FiniteFloat | None = None
    """Time in the frozen modules after the student, forward and backward."""
    decodes: FiniteFloat | None = None
    """Images that this process decoded, or its node's feed for it first."""
    own_batches: FiniteFloat | None = None
    """Batches that it made itself, beside its node's feed; None: it reads no feed."""
    teacher_calls: FiniteFloat | None = None
    """Images that went through the teacher."""
    cache_hits: FiniteFloat | None = None
    """Images whose teacher logits were read from the cache."""
    cache_bytes: FiniteFloat | None = None
    """Size of the file with the teacher's logits; None: it read none."""
    cache_kl_mean: FiniteFloat | None = None
    """What their form loses: KL of the softmax from that of what is read back, in nats, mean over images."""
    flops: FiniteFloat | None = None
    """Floating-point operations of the models."""
    mfu: FiniteFloat | None = None
    """Model FLOPs utilisation; None also where the device's peak is not known."""
    peak_memory_gb: FiniteFloat | None = None
    cohort: tuple[str, ...] = ()
    """Addresses of the stages that ran in the same worker, this one among them; empty: it was alone."""

    @classmethod
    def of(
        cls, stage: str, recipe: str, metrics: Mapping[str, Any], cohort: Sequence[str] = ()
    ) -> "CounterRow | None":
        """The counters among what a stage reported or returned; None if it is no training."""
        if metrics.get("images_per_s") is None:
            return None
        counted = {name: metrics[name] for name in COUNTERS if metrics.get(name) is not None}
        return cls(stage=stage, recipe=recipe, cohort=tuple(cohort), **counted)

    @property
    def seconds(self) -> float | None:
        """Time in training; where it was not counted, from images and speed; None: neither is known."""
        images = (self.teacher_calls or 0.0) + (self.cache_hits or 0.0)
        if self.train_s is not None or not images or not self.images_per_s:
            return self.train_s
        return images / self.images_per_s

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the time in training, by name for people, with "data wait" first and "rest" last; they add up to 1.

        Parts that were not timed are in the rest. Empty: nothing is known of them.
        """
        shares = {} if self.data_wait is None else {"data wait": min(max(self.data_wait, 0.0), 1.0)}
        timed = {name: value for part, name in PARTS.items() if (value := getattr(self, part)) is not None}
        seconds = self.seconds
        if seconds:
            shares |= {name: value / seconds for name, value in timed.items()}
        if not shares:
            return {}
        total = sum(shares.values())
        most = max(1.0, total)  # clocks of several streams may overlap a little
        return {name: share / most for name, share in shares.items()} | {"rest": max(0.0, 1 - total / most)}

    @property
    def hit_rate(self) -> float | None:
        """Share of the teacher logits that came from the cache; None: there was no cache, or no teacher."""
        if self.cache_hits is None:
            return None
        asked = self.cache_hits + (self.teacher_calls or 0.0)
        return self.cache_hits / asked if asked else None

    @property
    def flops_per_s(self) -> float | None:
        """Floating-point operations a second of training."""
        return self.flops / self.seconds if self.flops is not None and self.seconds else None

    @property
    def numbers(self) -> dict[str, Any]:
        """All of it as JSON values, with what follows from it."""
        derived = {"shares": self.shares, "hit_rate": self.hit_rate, "flops_per_s": self.flops_per_s}
        return {**self.model_dump(mode="json"), **derived}


COUNTERS = tuple(name for name in CounterRow.model_fields if name not in ("stage", "recipe", "cohort"))
"""What a training counts, by its name in what stages report and return."""


def joined(addresses: Sequence[str]) -> str:
    """Stages that share a worker, in short: "pair-0,1,2", or "trial ×3" where names are equal."""
    names = [re.sub("-[0-9a-f]{12}$", "", address) for address in addresses]
    words = []
    for name in dict.fromkeys(names):
        stem, _, number = name.rpartition("-")
        is_one_of_many = bool(stem) and number.isdigit() and names.count(name) == 1
        words.append((stem, number) if is_one_of_many else (name, f"×{names.count(name)}"))
    groups = [(stem, [number for _, number in group]) for stem, group in groupby(words, key=lambda word: word[0])]
    return ", ".join(_group(stem, numbers) for stem, numbers in groups)


def _group(stem: str, numbers: Sequence[str]) -> str:
    if numbers == ["×1"]:
        return stem
    return f"{stem} {numbers[0]}" if numbers[0].startswith("×") else f"{stem}-{','.join(numbers)}"
