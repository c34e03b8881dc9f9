"""What commands know of places: costs of stages, and who decides about seats (`--placement`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, ValidationError

from m2mkd_ray.errors import UsageError
from m2mkd_ray.yaml_files import read_mapping

if TYPE_CHECKING:
    from m2mkd_ray.execution import Stage, Store
    from m2mkd_ray.execution.feasibility import Node
    from m2mkd_ray.execution.placement import Placer
    from m2mkd_ray.execution.planning.planner import ByHand
    from m2mkd_ray.execution.planning.works import Work
    from m2mkd_ray.recipe import Recipe
    from m2mkd_ray.stages.incubate import IncubateConfig
    from m2mkd_ray.stages.profile import Profile

POLICIES = {
    "auto": "cohorts, fractions and several GPUs where they pay, longest first; the training of a module on several "
    "GPUs is equal but for rounding and the draws of stochastic depth",
    "given": "as the recipe's placement says",
    "alone": "every stage on a device of its own, longest first",
    "cohort": "as many stages together as fit a device",
}
"""What `--placement` takes, besides a file."""
UNKNOWN_ROWS = 1_281_167
"""Images an epoch of a data set that is not imported: ImageNet-1k's."""

_LEAST_LEFT = 0.01
"""Of a training whose newest checkpoint is its last step's: models and data are still to be loaded, and the artifact
written."""


class SeatByHand(BaseModel, frozen=True, extra="forbid"):
    """A stage's seat as a placement file says it."""

    devices: int | None = Field(None, ge=1)
    """Data parallel over so many."""
    cohort: str = ""
    """Together with all stages that say the same name."""
    gpus: float | None = Field(None, gt=0, le=1)
    """A share of a GPU."""
    node_type: str = ""
    """Only on devices of this type: of GPU or, for a stage without any, of node group."""


def placer(
    name: str,
    stages: "Sequence[Stage]",
    works: "Mapping[str, Work]",
    *,
    nodes: "Sequence[Node]" = (),
    grows: bool = False,
    store: "Store | None" = None,
) -> "Placer":
    """Who decides about seats.

    Args:
        name: one of `POLICIES`, or a YAML file of seats by stage name.
        stages: the plan, to check the file with.
        works: costs of stages, by address (`works_of`).
        nodes: what is there, to check node types with; empty: not known.
        grows: whether an autoscaler may add nodes.
        store: where checkpoints are, so that only what they leave to do counts; None: all of every stage counts.

    Raises:
        UsageError: there is no such policy, or the file does not fit the plan; lists all problems.
    """
    from m2mkd_ray.execution.given import AsGiven
    from m2mkd_ray.execution.planning.planner import Planner

    if Path(name).suffix in (".yaml", ".yml"):
        return Planner(works, grows=grows, by_hand=read_seats(Path(name), stages, nodes), left=left_in(store))
    match name:
        case "given":
            return AsGiven()
        case "auto" | "alone" | "cohort":
            return Planner(works, policy=name, grows=grows, left=left_in(store))
    raise UsageError(f"There is no placement {name!r}. Known: {', '.join(POLICIES)}, or a file that ends in .yaml.")


def read_seats(file: Path, stages: "Sequence[Stage]", nodes: "Sequence[Node]" = ()) -> "dict[str, ByHand]":
    """Seats by stage name, checked against the plan, as the planner takes them (`planner.ByHand`).

    Raises:
        UsageError: the file is missing or no YAML, or does not fit; lists all problems.
    """
    from m2mkd_ray.execution.planning.planner import ByHand

    seats, problems = {}, []
    for name, value in read_mapping(file, "placement file", "seats by stage name").items():
        try:
            seats[str(name)] = SeatByHand.model_validate(value or {})
        except ValidationError as error:
            problems += [
                f"{name}.{'.'.join(str(part) for part in each['loc'])}: {each['msg']} (found {each['input']!r})"
                for each in error.errors()
            ]
    problems += _misfits(seats, {stage.name: stage for stage in stages}, nodes)
    if problems:
        raise UsageError(
            f"The placement file {file} does not fit the plan:\n" + "\n".join(f"  - {text}" for text in problems)
        )
    return {name: ByHand(**seat.model_dump()) for name, seat in seats.items()}


def _misfits(seats: Mapping[str, SeatByHand], stages: "Mapping[str, Stage]", nodes: "Sequence[Node]") -> list[str]:
    known = {name: seat for name, seat in seats.items() if name in stages}
    problems = [f"the plan has no stage {name!r}; it has {', '.join(stages)}" for name in seats if name not in stages]
    for name, seat in known.items():
        problems += _misfits_of(name, seat, stages[name], nodes)
    for cohort in sorted({seat.cohort for seat in known.values() if seat.cohort}):
        members = [name for name, seat in known.items() if seat.cohort == cohort]
        mates = {(stages[name].mates, stages[name].together) for name in members}
        if len(members) > 1 and (len(mates) > 1 or any(not each or how is None for each, how in mates)):
            problems.append(f"{', '.join(members)} are no mates, so they cannot be the cohort {cohort!r}")
    return problems


def _misfits_of(name: str, seat: SeatByHand, stage: "Stage", nodes: "Sequence[Node]") -> list[str]:
    from m2mkd_ray.execution.planning.devices import device_type, same_type

    problems = []
    allowed = sorted({1, *stage.spread})
    if seat.devices is not None and seat.devices not in allowed:
        problems.append(
            f"{name} cannot run on {seat.devices} devices, but on {' or '.join(map(str, allowed))}"
            + ("" if stage.spread else " only; its lanes or its kind do not let it be shared")
        )
    if sum((bool(seat.cohort), (seat.devices or 1) > 1, seat.gpus is not None)) > 1:
        problems.append(f"{name} has more than one of devices, cohort and gpus; choose one")
    if seat.gpus is not None and not stage.resources.gpus:
        problems.append(f"{name} uses no GPU, so it cannot have {seat.gpus:g} of one")
    types = dict.fromkeys(device_type(node, stage.resources) for node in nodes)
    if seat.node_type and types and not any(same_type(seat.node_type, each) for each in types):
        problems.append(f"{name} is to be on {seat.node_type}, but the nodes are of {', '.join(types)}")
    return problems


# Costs


def works_of(
    stages: "Sequence[Stage]", recipe: "Recipe", nodes: "Sequence[Node]", store: "Store | None" = None
) -> "dict[str, Work]":
    """Costs of stages that train a module or write teacher logits for it, by address: measured, else by FLOPs.

    Measured are those whose profile is complete (`profiled_by`); logits are written at the speed of their pair's step.

    Args:
        stages: the plan; others than pairs, incubations and what writes logits for these are left out.
        recipe: says where data lie.
        nodes: whose devices the costs are to be known on.
        store: where profiles are; None: FLOPs alone.
    """
    profiles: dict[str, Profile | None] = {}

    def measured(stage: "Stage", type_name: str) -> "Profile | None":
        wanted = profiling(stage, type_name)
        if wanted.address not in profiles:
            profiles[wanted.address] = _read_profile(wanted, store)
        return profiles[wanted.address]

    return {
        stage.address: _work(stage, of, recipe, {name: measured(of, name) for name in types_for(stage, nodes)})
        for stage, of in profiled_by(stages)
    }


def profiled_by(stages: "Sequence[Stage]") -> "list[tuple[Stage, Stage]]":
    """What trains a module or writes logits for it, each with the stage whose profile tells its cost.

    For a training that is the training itself, for logits the first pair that reads them.
    """
    from m2mkd_ray.stages.incubate import IncubateConfig
    from m2mkd_ray.stages.logits import LogitsConfig

    trainings = [stage for stage in stages if isinstance(stage.config, IncubateConfig)]
    readers = {read.address: stage for stage in reversed(trainings) for read in stage.reads.values()}
    found = []
    for stage in stages:
        if isinstance(stage.config, IncubateConfig):
            found.append((stage, stage))
        elif isinstance(stage.config, LogitsConfig) and stage.address in readers:
            found.append((stage, readers[stage.address]))
    return found


def left_in(store: "Store | None") -> "Callable[[str], float] | None":
    """What share of the stage at an address is left to do after its newest checkpoint; None without a store.

    Of one that keeps its work itself (parts of logits), after what it last said, as `Store.lost_steps` has it.
    """
    from m2mkd_ray.execution.store import partial

    if store is None:
        return None

    def left(address: str) -> float:
        kept, progress = store.checkpoints(address).newest_step(), store.progress(address)
        if progress is None or not progress.total_steps:
            return 1.0
        if kept is None and not store.folders.names(f"{partial(address)}/durable"):
            return 1.0
        kept = progress.step if kept is None else kept
        return max(_LEAST_LEFT, 1 - kept / progress.total_steps)

    return left


def types_for(stage: "Stage", nodes: "Sequence[Node]") -> list[str]:
    """Types of the devices that a stage may be on, each once: of GPUs if it asks for some, else of CPU cores."""
    from m2mkd_ray.execution.planning.fleet import devices_for, on_each

    return list(dict.fromkeys(device.type for device in devices_for(on_each(stage), nodes, [])))


def profiling(stage: "Stage", type_name: str) -> "Stage":
    """The stage that measures what a module's training and its siblings cost on a type of device."""
    from m2mkd_ray.execution import Stage
    from m2mkd_ray.stages import profile
    from m2mkd_ray.stages.incubate import IncubatePlacement

    of: IncubateConfig = stage.config  # type: ignore[assignment]  # only stages that train a module come here
    assert isinstance(stage.placement, IncubatePlacement)
    feed = of.training.feed
    config = profile.ProfileConfig(
        blueprint=of.blueprint,
        module=of.module,
        with_teacher=runs_teacher(stage),
        precision=of.training.train.precision,
        dataset=feed.dataset,
        split=feed.split,
        batch_size=feed.batch_size,
        lanes=feed.lanes,
        augmentation=feed.augmentation,
        micro_batch=stage.placement.micro_batch,
        compile=stage.placement.compile,
        cpus=stage.placement.resources.cpus,
        device=type_name,
    )
    needs = {"data": stage.needs["data"]} if "data" in stage.needs else {}
    name = "profile-" + type_name.replace(" ", "-")
    placed = stage.placement
    return Stage(name, profile.run, config, needs, placed.resources, placed, version=profile.VERSION, of=stage.of)


def runs_teacher(stage: "Stage") -> bool:
    """Whether the training of a module runs the teacher: not where its logits are read."""
    return stage.config.distill.alpha > 0 and "logits" not in stage.reads  # type: ignore[attr-defined]  # as above


def profiles(stages: "Sequence[Stage]", nodes: "Sequence[Node]") -> "list[Stage]":
    """The profiles that tell what stages cost on the nodes: one a kind of training and type of device, each once."""
    from m2mkd_ray.stages.incubate import IncubateConfig

    found: dict[str, Stage] = {}
    for stage in stages:
        if isinstance(stage.config, IncubateConfig):
            for name in types_for(stage, nodes):
                wanted = profiling(stage, name)
                found.setdefault(wanted.address, wanted)
    return list(found.values())


def _read_profile(stage: "Stage", store: "Store | None") -> "Profile | None":
    from m2mkd_ray.stages.profile import PROFILE, Profile

    if store is None or store.status(stage.address).state != "complete":
        return None
    return Profile.model_validate_json((store.open(stage.address) / PROFILE).read_text())


def _work(stage: "Stage", of: "Stage", recipe: "Recipe", profiles: "Mapping[str, Profile | None]") -> "Work":
    """The cost of a stage, from profiles of the training `of` by type of device; None: there is no such profile."""
    from m2mkd_ray.execution.planning.planner import expected_s
    from m2mkd_ray.execution.planning.works import Work
    from m2mkd_ray.models.compute import prefix_flops
    from m2mkd_ray.training import TrainPlacement

    config: IncubateConfig = of.config  # type: ignore[assignment]  # as above
    assert isinstance(stage.placement, TrainPlacement)
    num_images, flops, share = images_of(stage, recipe), _flops_of(stage), _share_of(stage, of)
    prefix = prefix_flops(config.blueprint, config.index) / flops
    seconds, shared, memory, occupancy = {}, [], {}, []
    for name, profile in profiles.items():
        pair = None if profile is None else profile.pairs[config.index]
        if profile is not None and pair is None and stage is of:  # it ran out of memory there
            seconds[name] = math.inf
            continue
        if profile is None or pair is None:
            seconds[name] = expected_s(flops * num_images, name)
            shared.append(prefix)
            continue
        compute, of_prefix = pair.seconds, pair.prefix
        if stage is not of:
            compute, of_prefix = compute * share, compute * share * prefix
        each = step_s(compute, profile.decode, stage.placement.data_workers)
        seconds[name] = each * num_images
        shared.append(min(1.0, max(0.0, (each - (compute - of_prefix)) / each)))
        occupancy.append(pair.occupancy)
        if profile.name != "cpu":
            memory[name] = pair.memory_gb  # of logits, which keep no gradients, more than they need
    # One share for all types: the least, so that no cohort is thought cheaper than it is.
    return Work(
        stage.address, seconds, memory, shared=min(shared, default=0.0), occupancy=max(occupancy, default=1.0)
    )  # fmt: skip


def _flops_of(stage: "Stage") -> float:
    """Floating-point operations of an image."""
    from m2mkd_ray.models.compute import hybrid_flops, pair_flops
    from m2mkd_ray.stages.incubate import IncubateConfig

    config = stage.config
    if isinstance(config, IncubateConfig):
        return pair_flops(config.blueprint, config.index, module=config.module, with_teacher=runs_teacher(stage))
    return hybrid_flops(config.blueprint, config.index)  # type: ignore[attr-defined]  # what writes logits


def _share_of(stage: "Stage", of: "Stage") -> float:
    """The operations of an image of a stage in those of a step of the training that was measured, as carried out."""
    from m2mkd_ray.models.compute import step_cost

    if stage is of:
        return 1.0
    config: IncubateConfig = of.config  # type: ignore[assignment]  # as above
    cost = step_cost(config.blueprint, config.blueprint.pairs[config.index])
    return (cost.before + cost.teacher) / (cost.total - (0.0 if runs_teacher(of) else cost.teacher))


def step_s(compute: float, decode: float, workers: int) -> float:
    """Seconds an image: decoding comes on top in the same process, and goes on beside it in loader workers."""
    return compute + decode if workers == 0 else max(compute, decode / workers)


def images_of(stage: "Stage", recipe: "Recipe") -> float:
    """Images that a training sees, or whose logits are written; of a data set that is not imported, as if it were
    ImageNet-1k."""
    from m2mkd_ray.commands.plan import training_of
    from m2mkd_ray.data import rows_of_an_epoch
    from m2mkd_ray.stages.logits import LogitsConfig

    if isinstance(stage.config, LogitsConfig):
        feed, views = stage.config.feed, stage.config.feed.views
        assert views is not None
        rows = rows_of_an_epoch(feed.dataset, feed.split, feed.max_rows, recipe.placement.data_root)
        return views * ((rows or feed.max_rows or UNKNOWN_ROWS) // feed.batch_size * feed.batch_size)
    training = training_of(stage, recipe)
    assert training is not None
    if training["steps"] is not None:
        return training["steps"] * training["batch_size"]
    return training["epochs"] * (stage.config.training.feed.max_rows or UNKNOWN_ROWS)  # type: ignore[attr-defined]  # a training
