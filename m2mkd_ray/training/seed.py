"""Randomness as a function of named parts, never of what ran before.

A step's dropout and drop path follow from (seed, step, number of the micro-batch over
all ranks) alone, so a run that was killed and resumed draws what one that was not would
have drawn.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed that stands for the parts; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch from the parts inside the block and put its old random state back after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive(*parts))
        yield
