"""What a run held of a cluster, and what of it was lost: GPU-hours by node group, spot, steps done twice.

A worker runs one seat at a time, alone or as a cohort, so what a worker held is the time
in which any of its stages ran, times what it was given. Time in which a worker was warm
but idle is not counted, nor is that of a node on which nothing ran.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from m2mkd_ray.reporting.report import Span

UNNAMED = "no group"
"""Of nodes that have no label."""
SPOT_PRICE = (1 / 3, 1 / 2)
"""Of a spot machine, as a share of the same on demand: the order of magnitude. Prices themselves are nowhere here, as
they differ by region and hour."""


@dataclass(frozen=True)
class Cost:
    """What was held of the nodes of one group."""

    group: str
    gpu_hours: float
    cpu_hours: float
    spot_gpu_hours: float
    """Of these, on machines that may be taken away; so for CPUs."""
    spot_cpu_hours: float
    lost_steps: int
    """Optimizer steps that no checkpoint held when an attempt ended: done again."""
    lost_attempts: int
    """Attempts that did not leave an artifact."""


def costs(spans: Sequence[Span]) -> list[Cost]:
    """What was held, a node group each, in the order of their names."""
    by_group = groupby(sorted(spans, key=_group), key=_group)
    return [_cost(group, list(of_group)) for group, of_group in by_group]


def cost_line(found: Sequence[Cost]) -> str:
    """The costs in a sentence; empty where nothing ran."""
    if not found:
        return ""
    unit = "GPU" if any(cost.gpu_hours for cost in found) else "CPU"
    hours = [(cost, cost.gpu_hours, cost.spot_gpu_hours) for cost in found]
    if unit == "CPU":
        hours = [(cost, cost.cpu_hours, cost.spot_cpu_hours) for cost in found]
    total, on_spot = sum(held for _, held, _ in hours), sum(spot for _, _, spot in hours)
    of_groups = ", ".join(f"{cost.group} {_hours(held)}" for cost, held, _ in hours if held)
    steps, attempts = sum(cost.lost_steps for cost in found), sum(cost.lost_attempts for cost in found)
    lost = f"{steps:,} step{'s' if steps != 1 else ''} in {attempts} attempt{'s' if attempts != 1 else ''}"
    saved = ""
    if on_spot:
        most, least = (_hours(on_spot * (1 - price)) for price in SPOT_PRICE)
        saved = f", which at a third to a half of the price saved what {least} to {most} cost on demand"
    return (
        f"{_hours(total)} {unit}-hours ({of_groups or 'none'}), {_hours(on_spot)} of them on spot{saved}; "
        f"work that was lost: {lost}."
    )


def _cost(group: str, spans: Sequence[Span]) -> Cost:
    held = {spot: _held(span for span in spans if span.spot == spot) for spot in (False, True)}
    return Cost(
        group=group,
        gpu_hours=held[False][0] + held[True][0],
        cpu_hours=held[False][1] + held[True][1],
        spot_gpu_hours=held[True][0],
        spot_cpu_hours=held[True][1],
        lost_steps=sum(span.lost_steps for span in spans),
        lost_attempts=sum(not span.is_complete for span in spans),
    )


def _held(spans: Iterable[Span]) -> tuple[float, float]:
    """GPU-hours and CPU-hours of all workers."""
    in_order = sorted(spans, key=lambda span: (_worker(span), span.start))
    gpu_s = cpu_s = 0.0
    for _, of_worker in groupby(in_order, key=_worker):
        until = float("-inf")
        for span in of_worker:
            seconds = max(0.0, span.end - max(span.start, until))
            until = max(until, span.end)
            gpu_s, cpu_s = gpu_s + seconds * span.gpus, cpu_s + seconds * span.cpus
    return gpu_s / 3600, cpu_s / 3600


def _group(span: Span) -> str:
    return span.node_group or UNNAMED


def _worker(span: Span) -> tuple[str, str]:
    return span.node, span.worker


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 9.95 else f"{hours:.2g}"
