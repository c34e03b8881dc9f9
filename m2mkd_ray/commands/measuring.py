"""`m2mkd run --placement auto`: measure first what the modules cost on each type of device that is there."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from m2mkd_ray.commands.placing import placer, profiling, works_of
from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution import Launcher, Stage, Store, execute
from m2mkd_ray.execution.devices import device_type
from m2mkd_ray.execution.fleet import node_id
from m2mkd_ray.execution.placement import Placer, Seat, View
from m2mkd_ray.stages.incubate import IncubateConfig
from m2mkd_ray.stages.profile import ProfileConfig

if TYPE_CHECKING:
    from m2mkd_ray.execution.works import Work
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
    _measure(todo, types, store, launcher)
    works: Mapping[str, Work] = works_of(todo, recipe, types, store)
    return placer(name, stages, works, nodes=nodes, grows=grows)


def _measure(stages: Sequence[Stage], types: Sequence[str], store: Store, launcher: Launcher) -> None:
    """Run the profiles that are not complete. One that fails costs the plan its measure, not the run its start."""
    modules = [stage for stage in stages if isinstance(stage.config, IncubateConfig)]
    profiles = {stage.address: stage for each in modules for stage in (profiling(each, name) for name in types)}
    outcome = execute(list(profiles.values()), store, launcher, place=OnItsType())
    for failure in outcome.failed:
        logger.warning("%s failed, so FLOPs stand for its measure: %s", failure.stage.name, failure.message)
