"""`m2mkd plan --cluster`: who would run where and when, and how good that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from m2mkd_ray.commands.output import Column, print_table
from m2mkd_ray.commands.placing import left_in, placer, works_of
from m2mkd_ray.errors import PlanError, UsageError

if TYPE_CHECKING:
    from m2mkd_ray.execution import Stage, Store
    from m2mkd_ray.execution.feasibility import Node
    from m2mkd_ray.execution.planning.forecast import Visit
    from m2mkd_ray.execution.planning.works import Device, Work
    from m2mkd_ray.recipe import Recipe


@dataclass(frozen=True)
class SeatRow:
    """A stage's place and time."""

    stage: str
    recipe: str
    address: str
    node: str
    type: str
    seat: str
    """What it gets, in words."""
    starts_s: float
    ends_s: float


@dataclass(frozen=True)
class Expected:
    """Seats of the stages that train a module or write teacher logits for it, and what they come to."""

    placement: str
    seats: list[SeatRow]
    makespan_s: float
    device: str
    """What is counted: GPU, or CPU core."""
    devices: float
    """How many of them there are."""
    utilisation: float
    device_hours: float
    lower_bound_s: float
    over_bound: float
    """Makespan / lower bound."""
    measured: int
    """Stages whose costs were measured by a profile, for logits their pair's; of the others they are FLOPs at the peak
    of the type."""

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def expect(
    recipe: "Recipe",
    stages: "Sequence[Stage]",
    nodes: "Sequence[Node]",
    placement: str,
    store: "Store | None" = None,
) -> "tuple[Expected, list[Visit]]":
    """What a placement comes to on nodes, for the stages that train a module or write teacher logits for it.

    Those that are complete are left out; of those that have begun what the newest checkpoint leaves counts.

    Raises:
        UsageError: there is no such placement, or nothing to place.
        PlanError: stages that no node can take, with the resource that each lacks.
    """
    from m2mkd_ray.execution.placement import View
    from m2mkd_ray.execution.planning.devices import device_type
    from m2mkd_ray.execution.planning.fleet import held_by
    from m2mkd_ray.execution.planning.forecast import forecast
    from m2mkd_ray.execution.planning.planner import Planner
    from m2mkd_ray.execution.planning.schedule import SPOT_LOSS

    works = works_of(stages, recipe, nodes, store)
    todo = [stage for stage in stages if stage.address in works and not _is_complete(stage, store)]
    if not todo:
        raise UsageError("Nothing is left to place: no stage that trains a module, or all of them are complete.")
    decides = placer(placement, stages, works, nodes=nodes, store=store)
    costs = decides if isinstance(decides, Planner) else Planner(works, left=left_in(store))
    forms = costs.works(todo, nodes, {})
    if problems := seat_problems(todo, nodes, forms):
        raise PlanError("The nodes cannot hold the plan:\n" + "\n".join(f"- {text}" for text in problems))
    view = View(nodes)

    def duration(seat: Any, node: "Node") -> float:
        from m2mkd_ray.execution.planning.devices import is_spot

        seconds = costs.expected_s(seat, device_type(node, held_by(seat)[-1]), view)
        return seconds * (1 + SPOT_LOSS) if is_spot(node) else seconds

    visits = forecast(todo, decides, nodes, duration)
    return _summed(
        placement, visits, nodes, _bound(todo, nodes, forms), _num_measured(todo, stages, nodes, store)
    ), visits


def _is_complete(stage: "Stage", store: "Store | None") -> bool:
    return store is not None and store.status(stage.address).state == "complete"


def _num_measured(
    todo: "Sequence[Stage]", stages: "Sequence[Stage]", nodes: "Sequence[Node]", store: "Store | None"
) -> int:
    from m2mkd_ray.commands.placing import profiled_by, profiling, types_for

    if store is None:
        return 0
    wanted = {stage.address for stage in todo}
    return sum(
        all(_is_complete(profiling(of, name), store) for name in types_for(stage, nodes))
        for stage, of in profiled_by(stages)
        if stage.address in wanted
    )


def seat_problems(stages: "Sequence[Stage]", nodes: "Sequence[Node]", works: "Mapping[str, Work]") -> list[str]:
    """A sentence for each stage that no node can hold: cores, GPUs, memory, GPU memory or type that is missing.

    Args:
        stages: what is to be placed.
        nodes: all that there are or may come.
        works: costs and forms by address, of the planner that places (`Planner.works`).
    """
    from m2mkd_ray.execution.feasibility import misfits
    from m2mkd_ray.execution.planning.bounds import lacking

    if problems := misfits(stages, nodes):
        return problems
    names = {stage.address: stage.name for stage in stages}
    for group in _by_device(stages):  # together, because a cohort by hand has to fit as one
        found = lacking([works[stage.address] for stage in group], _devices(group[0], nodes))
        problems += [f"{names[address]} asks for {text}" for address, text in found.items()]
    return problems


def _by_device(stages: "Sequence[Stage]") -> "list[list[Stage]]":
    """Stages that ask for the same of each of their devices."""
    from m2mkd_ray.execution.planning.fleet import on_each

    groups: dict[Any, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(on_each(stage), []).append(stage)
    return list(groups.values())


def _devices(stage: "Stage", nodes: "Sequence[Node]") -> "list[Device]":
    """The devices that a stage may run on, or its ranks where it is spread: its own worker then only drives."""
    from m2mkd_ray.execution.planning.fleet import devices_for, on_each

    request = on_each(stage)
    return devices_for(request.model_copy(update={"gpus": 1.0 if request.gpus else 0.0}), nodes, [])


def _bound(stages: "Sequence[Stage]", nodes: "Sequence[Node]", works: "dict[str, Work]") -> float:
    """No placement ends earlier: the bound of all stages, and that of what comes before a stage and then itself.

    Bounds are taken of the stages of each request apart, as if each had all nodes for itself. Stages that the recipe
    spreads over several devices have these, whatever the placement.
    """
    from m2mkd_ray.execution.planning.bounds import fastest_s, lower_bound
    from m2mkd_ray.execution.planning.forecast import ancestors

    known = {stage.address: stage for stage in stages}
    works = {stage.address: _as_spread(works[stage.address], stage) for stage in stages}

    def of(some: "Sequence[Stage]") -> float:
        bounds = [
            lower_bound([works[s.address] for s in group], _devices(group[0], nodes)) for group in _by_device(some)
        ]
        return max(bounds, default=0.0)

    last = [
        of([known[address] for address in ancestors(stage, known)])
        + fastest_s(works[stage.address], {device.type for device in _devices(stage, nodes)})
        for stage in stages
    ]
    by_depth: dict[tuple[str, ...], list[Stage]] = {}
    for stage in stages:
        by_depth.setdefault(tuple(ancestors(stage, known)), []).append(stage)
    waves = [of([known[address] for address in before]) + of(wave) for before, wave in by_depth.items()]
    return max([of(stages), *last, *waves])


def _as_spread(work: "Work", stage: "Stage") -> "Work":
    """The cost of a stage with the number of devices that its recipe spreads it over, if it does."""
    from m2mkd_ray.execution.planning.fleet import width_of
    from m2mkd_ray.execution.planning.planner import PER_DOUBLING

    width = width_of(stage)
    return work if width == 1 else replace(work, widths={width: PER_DOUBLING ** math.log2(width)})


def _summed(
    placement: str, visits: "Sequence[Visit]", nodes: "Sequence[Node]", bound_s: float, measured: int
) -> Expected:
    is_gpu = any(visit.gpus for visit in visits)
    devices = sum(node.resources.get("GPU" if is_gpu else "CPU", 0.0) for node in nodes)
    used = sum((visit.gpus if is_gpu else visit.cpus) * (visit.end_s - visit.start_s) for visit in visits)
    makespan = max(visit.end_s for visit in visits)
    return Expected(
        placement=placement,
        seats=[row for visit in visits for row in _rows(visit)],
        makespan_s=makespan,
        device="GPU" if is_gpu else "CPU core",
        devices=devices,
        utilisation=used / (makespan * devices),
        device_hours=used / 3600,
        lower_bound_s=bound_s,
        over_bound=makespan / bound_s,
        measured=measured,
    )


def _rows(visit: "Visit") -> list[SeatRow]:
    from m2mkd_ray.execution.planning.devices import device_type
    from m2mkd_ray.execution.planning.fleet import held_by

    names = [stage.name for stage in visit.seat.stages]
    rows = []
    for stage in visit.seat.stages:
        others = [name for name in names if name != stage.name]
        with_others = f", cohort with {', '.join(others)}" if others else ""
        rows.append(
            SeatRow(
                stage.name, stage.of, stage.address, visit.node.name,
                device_type(visit.node, held_by(visit.seat)[-1]),
                seat_words(visit) + with_others, visit.start_s, visit.end_s,
            )
        )  # fmt: skip
    return rows


def seat_words(visit: "Visit") -> str:
    """What a seat holds: `1 GPU`, `0.5 GPU`, `2 GPUs`, `4 CPUs`."""
    amount, unit = (visit.gpus, "GPU") if visit.gpus else (visit.cpus, "CPU")
    return f"{amount:.3g} {unit}{'s' if amount > 1 else ''}"


def print_expected(expected: Expected) -> None:
    """Print the seats and what they come to."""
    from m2mkd_ray.reporting.units import duration, percent

    columns = [Column("stage"), Column("of"), Column("node"), Column("type"), Column("seat", wraps=True)]
    print_table(
        [*columns, Column("starts", True), Column("ends", True)],
        [
            (row.stage, row.recipe, row.node, row.type, row.seat, duration(row.starts_s), duration(row.ends_s))
            for row in expected.seats
        ],
    )
    total, hours = len(expected.seats), f"{expected.device_hours:,.3g} {expected.device}-hours"
    typer.echo(
        f"\nPlacement {expected.placement}: {duration(expected.makespan_s)} in all, "
        f"{percent(expected.utilisation)} of {expected.devices:g} {expected.device}s used, {hours}.\n"
        f"Lower bound: {duration(expected.lower_bound_s)}; makespan / bound: {expected.over_bound:.3f}.\n"
        f"Costs of {expected.measured} of {total} stages are measured"
        + ("." if expected.measured == total else "; the others follow from FLOPs and the peaks of the devices.")
    )


def draw(visits: "Sequence[Visit]", nodes: "Sequence[Node]", expected: Expected, file: Path) -> None:
    """Write the chart of the seats as a PNG file.

    Raises:
        UsageError: the file cannot be written.
    """
    from m2mkd_ray.execution.planning.devices import device_type
    from m2mkd_ray.execution.stage import Resources
    from m2mkd_ray.reporting.plots.placement import Bar, Lane, placement_png

    is_gpu = expected.device == "GPU"
    lanes: list[Lane] = []
    bars: list[Bar] = []
    for node in nodes:
        of_node = sorted((v for v in visits if v.node is node), key=lambda visit: visit.start_s)
        rows: list[list[tuple[float, float, float]]] = []  # of each device: (from share, to share, until)
        for visit in of_node:
            amount = visit.gpus if is_gpu else 1.0
            share = min(1.0, amount)
            for _ in range(max(1, round(amount))):
                row, low = _free_row(rows, share, visit.start_s)
                rows[row].append((low, low + share, visit.end_s))
                label = " + ".join(stage.name for stage in visit.seat.stages)
                bars.append(Bar(label, len(lanes) + row, low, share, visit.start_s, visit.end_s, _kind(visit)))
        count = int(node.resources.get("GPU", 0)) if is_gpu else len(rows)
        lanes += [Lane(node.name, device_type(node, Resources(gpus=is_gpu))) for _ in range(max(count, len(rows)))]
    try:
        file.write_bytes(placement_png(lanes, bars, expected.lower_bound_s))
    except OSError as error:
        raise UsageError(f"Cannot write the chart {file}: {error.strerror}.") from error


def _kind(visit: "Visit") -> str:
    if len(visit.seat.stages) > 1:
        return "cohort"
    if visit.devices > 1:
        return "several devices"
    return "fraction" if 0 < visit.gpus < 1 else "alone"


def _free_row(rows: list[list[tuple[float, float, float]]], share: float, start: float) -> tuple[int, float]:
    """The first device with so much of it free from `start` on, and where on it that lies; a new one if none has."""
    for number, row in enumerate(rows):
        held = sorted((low, high) for low, high, until in row if until > start + 1e-9)
        low = 0.0
        for begin, end in held:
            if begin - low >= share - 1e-3:
                break
            low = max(low, end)
        if low + share <= 1 + 1e-3:
            return number, low
    rows.append([])
    return len(rows) - 1, 0.0
