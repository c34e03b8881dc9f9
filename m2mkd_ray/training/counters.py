"""What a training costs, measured while it runs: seconds by part of the step, calls, memory, use of the device.

Nothing here waits for a device between two points of the history, and nothing changes a result.

In a point of the history, since the point before:

    images_per_s   images of the global batch a second, validation and checkpoints left out
    train_s        that time, in seconds; data_wait: the share of it spent waiting for batches
    prefix_s       seconds in the meta modules before the module that learns, run for all members that share them
    teacher_s      seconds in the teacher's hybrid (likewise)
    student_s      seconds in what learns, forward and backward, and in moving its weights
    suffix_s       seconds in the meta modules after it and the loss, forward and backward
    teacher_calls  images that went through the teacher's hybrid; prefix_calls: through a meta module before, for each
                   such module. Of what several members needed, each has an equal share
    cache_hits     images whose teacher logits were given
    decodes        images that this process decoded, or its node's feed, if nobody had taken them before: those of all
                   trainings on a node add up to what was decoded there. own_batches: shared batches that it made
                   itself. Of each step, an equal share of every member that took it
    flops          floating-point operations where they are known (`StepFlops`), of all ranks: the member's own, and
                   those of its shares above; mfu: by the peak of the devices in train_s, so that the mfu of members
                   that train together add up to the device's
    peak_memory_gb the most memory in use, in 10^9 bytes: on a GPU, since the training began; else the process's, ever

Seconds and counts are those of the first rank, but for flops.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Part = Literal["prefix", "teacher", "student", "suffix"]

PEAK_FLOPS: dict[str, dict[str, float]] = {
    # NVIDIA's data sheets, dense, in FLOP/s: bf16 on tensor cores, fp32 without them (H200 has H100's chip)
    "NVIDIA H200": {"bf16": 989e12, "fp32": 67e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "NVIDIA H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "NVIDIA H100": {"bf16": 989e12, "fp32": 67e12},
    "NVIDIA A100": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "NVIDIA L4": {"bf16": 121e12, "fp32": 30.3e12},
    "NVIDIA A10": {"bf16": 125e12, "fp32": 31.2e12},
}
"""By the beginning of the device's name, in whole words; the longest that fits counts."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device can do at most; None for one that is not in the table, or for a part of one (MIG).

    `precision` is a `TrainConfig`'s: both kinds of bf16 have the same peak.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    fits = [name for name in PEAK_FLOPS if words[: len(name.split())] == name.split()]
    return PEAK_FLOPS[max(fits, key=len)]["fp32" if precision == "fp32" else "bf16"] if fits else None


class Stopwatch:
    """Seconds by part of the step, and counts. A lap goes from the lap before it, or `start`, to now.

    On a GPU laps are events in its stream, and their times are read by `take` only.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._laps: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._since: Any = None
        self.counts: defaultdict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Begin a lap."""
        self._since = self._now()

    def lap(self, part: Part) -> None:
        """End a lap, which belongs to `part`, and begin the next."""
        now = self._now()
        if self._on_gpu:
            self._laps.append((part, self._since, now))
        else:
            self._seconds[part] += now - self._since
        self._since = now

    def take(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Seconds by part, and counts, since this was called last. Waits for the GPU."""
        if self._laps:
            self._laps[-1][2].synchronize()
            for part, began, ended in self._laps:
                self._seconds[part] += began.elapsed_time(ended) / 1000
        taken = self._seconds, self.counts
        self._seconds, self.counts, self._laps = defaultdict(float), defaultdict(float), []
        return taken

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Meter:
    """Counts images and seconds since the last point of a history."""

    images: int = 0
    data_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Images a second, the share of the time spent waiting for data, and that time in seconds."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return {"images_per_s": self.images / seconds, "data_wait": self.data_s / seconds, "train_s": seconds}

    def pause(self, seconds: float) -> None:
        """Leave out seconds in which nothing was trained."""
        self.since += seconds


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of an image in a training step, by who needs them."""

    own: float
    """The module that learns and what is after it, forward and backward."""
    prefix: float = 0.0
    """One meta module before it."""
    teacher: float = 0.0
    """The teacher's hybrid without what is before the pair."""

    def of(self, images: int, counts: Mapping[str, float], world: int) -> float:
        """Of a member that took so many images of the global batch; the counts are one rank's."""
        shared = self.prefix * counts.get("prefix_calls", 0.0) + self.teacher * counts.get("teacher_calls", 0.0)
        return self.own * images + shared * world


def cost_of_flops(flops: float, seconds: float, device: torch.device, precision: str, world: int) -> dict[str, float]:
    """`flops`, and `mfu` of so many seconds where the device's peak is known, of `world` devices of a kind."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(name, precision)
    return {"flops": flops} | ({} if peak is None else {"mfu": flops / (seconds * peak * world)})


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in use, in 10^9 bytes: the GPU's since `forget_peak_memory`, or the process's own, ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak_memory(device: torch.device) -> None:
    """Begin to watch a GPU's memory anew; a process's own peak cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
