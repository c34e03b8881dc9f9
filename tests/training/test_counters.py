"""What a training says about its own costs."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.data import Batches
from m2mkd_ray.training import (
    Classification,
    ModuleDistillation,
    Point,
    StepFlops,
    TorchEngine,
    TrainConfig,
    TrainPlacement,
    fit,
)
from m2mkd_ray.training.counters import Stopwatch, peak_flops

CONFIG = TrainConfig(epochs=1, lr=1e-3)


class Naps(nn.Module):
    """Linear, with a nap forward and one backward."""

    def __init__(self, width: int, out: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear, self.forward_s, self.backward_s = nn.Linear(width, out), forward_s, backward_s

    def forward(self, tokens: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        out: Tensor = self.linear(tokens)
        if out.requires_grad:
            out.register_hook(lambda gradient: time.sleep(self.backward_s))
        return out * 1  # the nap is taken after the gradient has come to what goes out


class Counted:
    """A feed that decodes 16 images a step."""

    def __init__(self, feed: Batches) -> None:
        self.feed, self.steps_per_epoch, self.counts = feed, feed.steps_per_epoch, {"decodes": 0}

    def loader(self, start: int, stop: int, **settings: Any) -> Iterator[Any]:
        for batch in self.feed.loader(start, stop, **settings):
            self.counts["decodes"] += 16
            yield batch


def napping() -> ModuleDistillation:
    meta = [nn.Sequential(nn.Flatten(), Naps(2352, 8, 0.02, 9)), Naps(8, 8, 9, 9), Naps(8, 10, 0.01, 0.03)]
    return ModuleDistillation(meta, 1, Naps(8, 8, 0.05, 0.04), Naps(8, 8, 0.07, 9))


@pytest.fixture
def history(keeper: Callable, feed: Batches) -> Callable[..., list[Point]]:
    """The history of a training that is logged every third step."""

    def train(objective: Any, source: Any = feed, **settings: Any) -> list[Point]:
        placement = TrainPlacement(log_every_steps=3, checkpoint_every_s=1e9)
        return fit(source, TorchEngine(objective, CONFIG), CONFIG, placement, keeper(), seed=0, **settings)

    return train


def test_seconds_go_to_the_part_that_took_them(history: Callable[..., list[Point]]) -> None:
    """A nap of the suffix is taken twice forward, by teacher and student."""
    points = history(napping())
    assert [point["step"] for point in points] == [3, 6]
    for point in points:
        found = {part: point[f"{part}_s"] for part in ("prefix", "teacher", "student", "suffix")}
        expected = {"prefix": 3 * 0.02, "teacher": 3 * 0.08, "student": 3 * 0.09, "suffix": 3 * 0.04}
        assert all(found[part] >= seconds for part, seconds in expected.items()), "a nap is missing from its part"
        assert sum(found.values()) <= point["train_s"]


def test_calls_hits_and_decodes_are_counted_between_points(history: Callable[..., list[Point]], feed: Batches) -> None:
    points = history(napping(), Counted(feed))
    assert [(p["teacher_calls"], p["prefix_calls"], p["decodes"]) for p in points] == [(48, 48, 48)] * 2
    assert not any("cache_hits" in point for point in points)


def test_cached_logits_are_asked_for_by_step_and_spare_the_teacher(history: Callable[..., list[Point]]) -> None:
    """Where there are none the teacher is run."""
    asked = []

    def cached(step: int) -> Tensor | None:
        asked.append(step)
        return torch.zeros(16, 10) if step % 2 else None

    points = history(napping(), teacher_logits=cached)
    assert asked == list(range(6))
    assert sum(point["cache_hits"] for point in points) == 3 * 16
    assert sum(point["teacher_calls"] for point in points) == 3 * 16


def test_a_classifications_time_is_its_own(
    history: Callable[..., list[Point]], classification: Callable[..., Classification]
) -> None:
    for point in history(classification(), flops_per_image=StepFlops(own=1e6)):
        assert "teacher_s" not in point
        assert 0 < point["student_s"] <= point["train_s"]
        assert point["flops"] == 1e6 * 3 * 16
        assert "mfu" not in point, "the peak of a CPU is not known"
        assert 0.1 < point["peak_memory_gb"] < 100


def test_the_stopwatch_starts_anew_when_it_is_read() -> None:
    watch = Stopwatch(on_gpu=False)
    watch.start()
    time.sleep(0.02)
    watch.lap("teacher")
    watch.counts["cache_hits"] += 2
    seconds, counts = watch.take()
    assert 0.02 <= seconds["teacher"] < 10
    assert counts == {"cache_hits": 2}
    assert watch.take() == ({}, {})


def test_measuring_costs_less_than_a_percent_of_a_short_step() -> None:
    """The laps of one micro-batch against 10 ms, the demo's smallest step being 30."""
    watch = Stopwatch(on_gpu=False)
    began = time.process_time()
    for _ in range(1000):
        watch.start()
        for part in ("prefix", "teacher", "student", "suffix", "suffix", "student", "student"):
            watch.lap(part)
    assert time.process_time() - began < 0.01 * 1000 * 0.010


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
    ],
)
def test_peaks_are_found_by_the_longest_name_that_fits(name: str, bf16: float) -> None:
    assert peak_flops(name, "bf16") == peak_flops(name, "bf16_pure") == bf16
    assert (peak_flops(name, "fp32") or 0) < bf16


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L400", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "AMD EPYC", ""])
def test_a_device_that_is_not_in_the_table_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_flops_that_are_not_known_are_not_told(history: Callable[..., list[Point]]) -> None:
    assert not any("flops" in point for point in history(napping()))


def test_flops_of_the_frozen_parts_follow_from_their_calls(history: Callable[..., list[Point]]) -> None:
    """An image costs 100 of its own, 10 in the prefix, and 1 of the teacher, which half of the steps spare."""
    points = history(
        napping(),
        teacher_logits=lambda step: torch.zeros(16, 10) if step % 2 else None,
        flops_per_image=StepFlops(own=100, prefix=10, teacher=1),
    )
    assert sum(point["flops"] for point in points) == 16 * (6 * 110 + 3)


def test_flops_of_ranks_are_those_of_all() -> None:
    flops = StepFlops(own=100, prefix=10, teacher=1)
    assert flops.of(32, {"prefix_calls": 16.0, "teacher_calls": 16.0}, world=2) == 32 * 111


def test_the_time_that_logits_take_to_be_read_is_a_wait_for_data(history: Callable[..., list[Point]]) -> None:
    def slowly(step: int) -> Tensor:
        time.sleep(0.05)
        return torch.zeros(16, 10)

    assert all(
        point["data_wait"] * point["train_s"] >= 3 * 0.05 for point in history(napping(), teacher_logits=slowly)
    )
