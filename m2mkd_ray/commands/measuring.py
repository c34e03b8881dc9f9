"""`m2mkd run --placement auto`: measure first what the modules cost on each type of device that is there."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from m2mkd_ray.commands.placing import placer, profiles, works_of
from m2mkd_ray.commands.seats import seat_problems
from m2mkd_ray.errors import PlanError, UsageError
from m2mkd_ray.execution import Launcher, Stage, Store, execute
from m2mkd_ray.execution.devices import device_type
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.fleet import node_id
from m2mkd_ray.execution.placement import Placer, Seat, View
from m2mkd_ray.execution.planner import Planner
from m2mkd_ray.stages.incubate import IncubateConfig
from m2mkd_ray.stages.profile import ProfileConfig

if TYPE_CHECKING:
    from m2mkd_ray.recipe import Recipe

logger = logging.getLogger(__name__)


class OnItsType:
    """A placer that has every profile run on a node of the type that it is about."""

    replans = False

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """See `Placer`. What is no profile may run anywhere."""
        nodes = {device_type(node): node_id(node) for node in view.nodes}
        return [
            Seat((stage,), stage.resources, nodes.get(stage.config.device))
            if isinstance(stage.config, ProfileConfig)
            else Seat((stage,), stage.resources)
            for stage in ready
        ]


def placer_of(
    name: str,
    recipe: "Recipe",
    stages: Sequence[Stage],
    store: Store,
    launcher: Launcher,
    *,
    grows: bool,
) -> Placer:
    """Who decides about seats. Where that is the planner, modules that are not complete are measured first.

    Raises:
        UsageError: there is no such placement, it does not fit the plan, or stages run in this process.
        PlanError: stages that no node can hold, with what is missing.
    """
    if name == "given":
        return placer(name, stages, {})
    if launcher.runs_in_process:
        raise UsageError(f"--placement {name} plans workers on nodes, which --launcher local has not. Leave it out.")
    nodes = launcher.nodes()
    todo = [stage for stage in stages if store.status(stage.address).state != "complete"]
    types = list(dict.fromkeys(device_type(node) for node in nodes))
    asked = placer(name, stages, {}, nodes=nodes, grows=grows)  # a mistake in a file is told before anything starts
    if not any(isinstance(stage.config, IncubateConfig) for stage in todo):
        return asked
    _measure(todo, nodes, store, launcher)
    place = placer(name, stages, works_of(todo, recipe, types, store), nodes=nodes, grows=grows)
    if isinstance(place, Planner) and not grows:
        modules = [stage for stage in todo if isinstance(stage.config, IncubateConfig)]
        if problems := seat_problems(modules, nodes, place.works(modules, nodes, {})):
            raise PlanError("\n".join(["These stages can never be placed:", *(f"- {text}" for text in problems)]))
    return place


def _measure(stages: Sequence[Stage], nodes: Sequence[Node], store: Store, launcher: Launcher) -> None:
    """Run the profiles that are not complete. One that fails costs the plan its measure, not the run its start."""
    outcome = execute(profiles(stages, nodes), store, launcher, place=OnItsType())
    for failure in outcome.failed:
        logger.warning("%s failed, so FLOPs stand for its measure: %s", failure.stage.name, failure.message)
