"""`m2mkd run --placement auto`: measure first what the modules cost on each type of device that is there."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from m2mkd_ray.commands.placing import placer, profiles, works_of
from m2mkd_ray.commands.seats import seat_problems
from m2mkd_ray.errors import LockedError, PlanError, UsageError
from m2mkd_ray.execution import Event, Launcher, Outcome, Requests, Stage, StageWaits, Store, execute
from m2mkd_ray.execution.feasibility import Node, lack
from m2mkd_ray.execution.given import AsGiven
from m2mkd_ray.execution.placement import Placer, Seat, View
from m2mkd_ray.execution.planning.devices import device_type
from m2mkd_ray.execution.planning.fleet import node_id
from m2mkd_ray.execution.planning.planner import Planner
from m2mkd_ray.stages.incubate import IncubateConfig
from m2mkd_ray.stages.profile import ProfileConfig

if TYPE_CHECKING:
    from m2mkd_ray.recipe import Recipe

logger = logging.getLogger(__name__)


class OnItsType:
    """A placer that has every profile run on a node of the type that it is about."""

    replans = False

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """See `Placer`. What is no profile may run anywhere; a profile waits for a node that can hold it."""
        seats = []
        for stage in ready:
            if not isinstance(stage.config, ProfileConfig):
                seats.append(Seat((stage,), stage.resources))
            elif (node := next(iter(_for_profile(stage, view.nodes)), None)) is not None:
                seats.append(Seat((stage,), stage.resources, node_id(node)))
        return seats

    def lacks(self, stage: Stage, view: View) -> str | None:
        """See `Placer`."""
        if (text := lack(stage.resources, view.nodes)) is not None:
            return text
        if not isinstance(stage.config, ProfileConfig) or _for_profile(stage, view.nodes):
            return None
        types = dict.fromkeys(device_type(node, stage.resources) for node in view.nodes)
        return (
            f"room on a node with devices of type {stage.config.device}, but those with room have {', '.join(types)}"
        )


def _for_profile(stage: Stage, nodes: Sequence[Node]) -> list[Node]:
    """The nodes of a profile's type that can hold it."""
    return [
        node
        for node in nodes
        if device_type(node, stage.resources) == stage.config.device and lack(stage.resources, [node]) is None  # type: ignore[attr-defined]  # a profile's
    ]


def placer_of(
    name: str,
    recipe: "Recipe",
    stages: Sequence[Stage],
    store: Store,
    launcher: Launcher,
    *,
    verify: bool = False,
    stall_timeout_s: float | None = None,
    wait_timeout_s: float | None = None,
) -> Placer:
    """Who decides about seats. Where that is the planner, modules that are not complete are measured first.

    Args:
        name: of the placement, see `placing.placer`.
        recipe: the stages are of.
        stages: the plan.
        store: where artifacts are, profiles among them.
        launcher: runs the profiles.
        verify: see `execute`, as the two timeouts, which hold for the profiles too.

    Raises:
        UsageError: there is no such placement, it does not fit the plan, or stages run in this process.
        PlanError: stages that no node can hold, neither of those that are there nor of those that are known to be
            able to come, with what is missing.
    """
    todo = [stage for stage in stages if store.status(stage.address, verify=verify).state != "complete"]
    if name == "given" or not todo:
        return AsGiven()
    if launcher.runs_in_process:
        raise UsageError(f"--placement {name} plans workers on nodes, which --launcher local has not. Leave it out.")
    nodes, grows = launcher.nodes(), launcher.may_grow()
    modules = [stage for stage in todo if isinstance(stage.config, IncubateConfig)]

    def planned() -> Placer:
        works = works_of(todo, recipe, nodes, store)
        place = placer(name, stages, works, nodes=nodes, grows=grows, store=store)
        if isinstance(place, Planner) and (everywhere := _all_nodes(nodes, launcher)) is not None:
            _refuse_what_fits_nowhere(modules, everywhere, place)
        return place

    place = planned()  # a mistake in a file, and what fits nowhere by what is known, are told before anything starts
    if not modules:
        return place
    measure_costs(profiles(modules, nodes), store, launcher, stall_timeout_s, wait_timeout_s)
    return planned()


def _all_nodes(nodes: Sequence[Node], launcher: Launcher) -> list[Node] | None:
    """The nodes that are there and all that may come; None where it is not known which may."""
    if not launcher.may_grow():
        return list(nodes)
    types = [node for node in launcher.most_nodes() if not node.id]  # those that are there have one
    return [*nodes, *types] if types else None


def _refuse_what_fits_nowhere(stages: Sequence[Stage], nodes: Sequence[Node], planner: Planner) -> None:
    """Look for stages that none of these nodes can hold, by what is known of their costs.

    Raises:
        PlanError: there are some, with what is missing.
    """
    if problems := seat_problems(stages, nodes, planner.works(stages, nodes, {})):
        raise PlanError("\n".join(["These stages can never be placed:", *(f"- {text}" for text in problems)]))


def measure_costs(
    wanted: Sequence[Stage],
    store: Store,
    launcher: Launcher,
    stall_timeout_s: float | None = None,
    wait_timeout_s: float | None = None,
) -> None:
    """Run the profiles that are not complete. What cannot be measured costs the plan its measure, not the run its
    start: a profile is given up as soon as no node of its type is there that could hold it."""
    requests, lacks = Requests(), dict[str, str]()
    requests.close()

    def give_up(event: Event) -> None:
        if isinstance(event, StageWaits) and isinstance(event.stage.config, ProfileConfig):
            lacks[event.stage.address] = event.reason
            requests.withdraw([event.stage.address])

    try:
        outcome = execute(
            wanted,
            store,
            launcher,
            place=OnItsType(),
            on_event=give_up,
            stall_timeout_s=stall_timeout_s,
            wait_timeout_s=wait_timeout_s,
            requests=requests,
        )
    except LockedError as error:
        logger.warning("Costs are not measured, and FLOPs stand for them: another run does it now: %s", error)
        return
    _say_what_is_not_measured(outcome, lacks)


def _say_what_is_not_measured(outcome: Outcome, lacks: Mapping[str, str]) -> None:
    """Say what of the profiles there is none of, and why; `lacks`: what those that were given up waited for."""
    for failure in outcome.failed:
        if isinstance(failure.stage.config, ProfileConfig):
            logger.warning("%s failed, so FLOPs stand for its measure: %s", failure.stage.name, failure.message)
        else:
            logger.error("%s failed: %s", failure.stage.name, failure.message)
    for skip in outcome.skipped:
        causes = ", ".join(stage.name for stage in skip.because)
        logger.warning("%s was not measured, because of %s: FLOPs stand for it", skip.stage.name, causes)
    for gone in outcome.withdrawn:
        reason = lacks[gone.stage.address]
        logger.warning("%s was not measured: it asks for %s. FLOPs stand for it", gone.stage.name, reason.rstrip("."))
