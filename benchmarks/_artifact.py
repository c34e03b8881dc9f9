"""The artifact of a pair's teacher logits, as `pairs.cache` writes and reads it, for a benchmark's own batches.

B = images, K = classes
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2mkd_ray.data import FeedConfig, Logits, LogitsAbout, LogitsFormat, LogitsWriter

_BYTES = 32 * 2**20
"""Of an artifact, about: four of its row groups, so that reading it once through is as in a training."""
_TEACHER = "benchmark"


class _Rows(NamedTuple):
    """What of a batch an artifact keeps beside its logits."""

    rows: Tensor
    partners: Tensor
    lam: Tensor


class Artifact:
    """An artifact of float32 logits whose steps go through some batches in turns."""

    def __init__(self, file: Path, logits: Sequence[Tensor], *, img_size: int) -> None:
        """`logits` float32 (B, K) of every batch."""
        images, classes = logits[0].shape
        self._file, self._feed = file, FeedConfig(dataset="none", batch_size=images, img_size=img_size, views=1)
        self.steps = max(len(logits), _BYTES // (images * (4 * classes + 24)) // len(logits) * len(logits))
        about = LogitsAbout(
            feed=self._feed, num_classes=classes, format=LogitsFormat(), teacher=_TEACHER, steps=self.steps
        )
        writer, rows = LogitsWriter(file, about), torch.arange(images)
        for step, of_batch in zip(range(self.steps), itertools.cycle(logits)):
            writer.add(step, _Rows(rows, rows, torch.ones(images)), of_batch)
        writer.close()

    def reader(self) -> Logits:
        """What a pair's training reads it by."""
        return Logits(self._file, self._feed, teacher=_TEACHER)

    def read_s(self) -> float:
        """CPU seconds of a step's part of reading it once through, opening and waiting included."""
        began = time.process_time()
        reader = self.reader()
        for step in range(self.steps):
            reader(step)
        return (time.process_time() - began) / self.steps
