"""`m2mkd run`: carry a plan out, from where the store is."""

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.log import log_file
from m2mkd_ray.commands.output import print_json
from m2mkd_ray.commands.session import (
    AsJson,
    PlacementName,
    RecipeName,
    Session,
    Settings,
    StoreRoot,
    Verbose,
    planned,
    session,
)

if TYPE_CHECKING:
    from m2mkd_ray.execution import Event, Launcher, Outcome, Stage, Store
    from m2mkd_ray.execution.ahead import Ahead
    from m2mkd_ray.execution.ray_launcher import RayLauncher
    from m2mkd_ray.recipe import Recipe

logger = logging.getLogger(__name__)

Until = Annotated[
    list[str] | None,
    typer.Option("--until", metavar="STAGE", help="End with the stages of this name (split, pair-0); repeatable."),
]
NumCpus = Annotated[
    int | None, typer.Option("--num-cpus", min=1, help="Cores of a Ray of our own; default: those of this machine.")
]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster (auto, host:port, ray://host:port); default: a Ray of our own on this machine."),
]

StallTimeout = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        metavar="SECONDS",
        min=0,
        help="End and retry a stage that has reported progress, and then none for so long; 0: never.",
    ),
]
WaitTimeout = Annotated[
    float,
    typer.Option(
        "--wait-timeout",
        metavar="SECONDS",
        min=0,
        help="Give a stage up that no node has been able to hold for so long; 0: never.",
    ),
]


LeadTime = Annotated[
    float,
    typer.Option(
        "--ahead",
        metavar="SECONDS",
        min=0,
        help="Ask an autoscaler for a stage's nodes so long before it is expected to become ready; 0: when it is.",
    ),
]


class LauncherName(StrEnum):
    """Who runs the stages."""

    RAY = "ray"
    LOCAL = "local"


LauncherOption = Annotated[
    LauncherName,
    typer.Option("--launcher", help="ray: actors in parallel. local: one after another in this process."),
]


def run(
    context: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    store: StoreRoot = "runs",
    until: Until = None,
    launcher: LauncherOption = LauncherName.RAY,
    address: Address = None,
    num_cpus: NumCpus = None,
    placement: PlacementName = "given",
    stall_timeout: StallTimeout = 1800.0,
    wait_timeout: WaitTimeout = 3600.0,
    ahead: LeadTime = 300.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare complete artifacts with their hashes.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Run what is not complete of a recipe; the same command resumes. Ends with the table and the report."""
    from m2mkd_ray.commands.follow import follower
    from m2mkd_ray.commands.measuring import placer_of
    from m2mkd_ray.execution import closure, execute
    from m2mkd_ray.execution.event_log import EventLog
    from m2mkd_ray.execution.events import each

    now = session(context)
    now.log.say_more(verbose)
    chosen = now.choose(recipe, settings)
    stages = closure(planned(chosen), until or None)
    opened = now.open_store(store)
    machine, placed = _launcher(now, chosen, stages, launcher, address, num_cpus, verify=verify)
    if placed is not chosen:
        chosen, stages = placed, closure(planned(placed), until or None)
    try:
        with (
            follower(stages, opened, now.log.console, polls_store=machine.runs_in_process) as shown,
            EventLog(opened) as log,
        ):
            follow = each(shown, log)
            place = placer_of(
                placement,
                chosen,
                stages,
                opened,
                machine,
                verify=verify,
                stall_timeout_s=stall_timeout or None,
                wait_timeout_s=wait_timeout or None,
            )
            outcome = execute(
                stages,
                opened,
                machine,
                place=place,
                ahead=_ahead(machine, ahead),
                on_event=follow if machine.runs_in_process else _also_to_prometheus(follow, stages),
                verify=verify,
                stall_timeout_s=stall_timeout or None,
                wait_timeout_s=wait_timeout or None,
            )
    finally:
        machine.close()
    result = result_of(chosen, opened, outcome)
    if as_json:
        print_json(result)
    if outcome.failed and now.log.file is not None:
        typer.echo(f"Log, with the tracebacks: {now.log.file}", err=True)
    outcome.raise_for_failures()
    if not as_json:
        _print_result(result, outcome, opened)


def _also_to_prometheus(follow: "Callable[[Event], None]", stages: "Sequence[Stage]") -> "Callable[[Event], None]":
    from m2mkd_ray.execution.events import each
    from m2mkd_ray.execution.metrics import ExecutorMetrics
    from m2mkd_ray.preflight import holds

    return each(follow, ExecutorMetrics(stages, holds))


def _ahead(machine: "Launcher", lead_s: float) -> "Ahead | None":
    """What asks an autoscaler for nodes ahead, ranks and all, where there is one to ask."""
    from m2mkd_ray import preflight

    if machine.runs_in_process or not lead_s:
        return None
    from m2mkd_ray.execution.ahead import Ahead
    from m2mkd_ray.execution.ray_launcher import RayLauncher

    if not (isinstance(machine, RayLauncher) and machine.may_request()):
        return None
    return Ahead(machine.request, lead_s, preflight.holds)


def _launcher(
    now: Session,
    recipe: "Recipe",
    stages: "Sequence[Stage]",
    name: LauncherName,
    address: str | None,
    num_cpus: int | None,
    *,
    verify: bool,
) -> "tuple[Launcher, Recipe]":
    """The launcher, after all checks, and the recipe as it is placed there. Where nothing is left to run there is
    nothing to check or to start."""
    from m2mkd_ray import preflight
    from m2mkd_ray.execution import LocalLauncher, check, in_order

    store = now.store
    assert store is not None
    todo = [stage for stage in stages if store.status(stage.address, verify=verify).state != "complete"]
    if not todo:
        return LocalLauncher(), recipe
    checks = [lambda: preflight.problems(recipe)]
    if name is LauncherName.LOCAL:
        checks.append(lambda: _not_without_ray(todo))
    elif address is None:  # known without starting Ray
        checks.append(lambda: preflight.capacity_problems(todo, [preflight.this_machine(num_cpus)]))
    check(todo, store, LocalLauncher(), extra=checks)
    for warning in preflight.warnings(recipe):
        logger.warning(warning)
    if (file := log_file(store, "run")) is not None:
        now.log.keep(file)
    if name is LauncherName.LOCAL:
        return LocalLauncher(), recipe
    addresses = {stage.address for stage in todo}

    def still_to_run(placed: "Recipe") -> "Sequence[Stage]":
        return [stage for stage in in_order(planned(placed)) if stage.address in addresses]

    return start_ray(recipe, still_to_run, store, address, num_cpus)


def _not_without_ray(stages: "Sequence[Stage]") -> list[str]:
    from m2mkd_ray.preflight import ranks_of

    instead = {ranks.none: stage.name for stage in stages if (ranks := ranks_of(stage)) is not None}
    return [
        f"{name} trains on ranks of Ray Train, which --launcher local has not. Use --launcher ray, or --set {setting}."
        for setting, name in instead.items()
    ]


def start_ray(
    recipe: "Recipe",
    stages_of: "Callable[[Recipe], Sequence[Stage]]",
    store: "Store",
    address: str | None,
    num_cpus: int | None,
) -> "tuple[RayLauncher, Recipe]":
    """A launcher on a Ray that can hold a recipe's stages, for which nothing else is wrong either.

    Returns:
        The launcher, and the recipe with the node groups of that Ray (`grouping.in_groups`); itself where it has none.

    Raises:
        ClusterError: no Ray answers.
        PlanError: something is wrong with the stages there; lists every problem.
    """
    from m2mkd_ray import preflight
    from m2mkd_ray.commands.grouping import in_groups
    from m2mkd_ray.execution import check
    from m2mkd_ray.execution.ray_launcher import RayLauncher

    cpus = (num_cpus or preflight.available_cpus()) if address is None else None
    launcher = RayLauncher(address, num_cpus=cpus, prewarm=["m2mkd_ray.stages.incubate"])
    try:
        nodes, grows = launcher.nodes(), launcher.autoscaler
        placed = in_groups(recipe, nodes, grows)
        stages = stages_of(placed)
        ranks = preflight.rank_problems(stages, nodes)
        warnings = ranks if grows.may_grow else []
        if grows.groups:  # all nodes that may come are known
            ranks = preflight.rank_problems(stages, [*nodes, *grows.most_nodes])
        for warning in preflight.cluster_warnings(recipe, nodes) + warnings:
            logger.warning(warning)
        check(stages, store, launcher, extra=[lambda: ranks if grows.groups or not grows.may_grow else []])
    except BaseException:
        launcher.close()
        raise
    return launcher, placed


def result_of(recipe: "Recipe", store: "Store", outcome: "Outcome") -> dict[str, Any]:
    """How a run ended, as JSON values; `report` and `export` are paths, null if they are not complete."""
    from m2mkd_ray.commands.results import numbers_of
    from m2mkd_ray.execution import StageReused

    complete = [
        {
            **_of(done.stage, "reused" if isinstance(done, StageReused) else "complete"),
            "seconds": done.seconds,
            "metrics": dict(done.metrics),
        }
        for done in outcome.complete
    ]
    failed = [
        {
            **_of(failure.stage, "failed"),
            "kind": str(failure.kind),
            "message": failure.message,
        }
        for failure in outcome.failed
    ]
    skipped = [
        {
            **_of(skip.stage, "skipped"),
            "because": [stage.address for stage in skip.because],
        }
        for skip in outcome.skipped
    ]
    folders = {done.stage.name: store.open(done.stage.address) for done in outcome.complete if _is_result(done.stage)}
    report, export = folders.get("report"), folders.get("export")
    return {
        "recipe": recipe.name,
        "store": store.root,
        "stages": [*complete, *failed, *skipped],
        "report": str(report / "report.html") if report else None,
        "export": str(export) if export else None,
        "summary": numbers_of(report)["summary"] if report else None,
    }


def _of(stage: "Stage", outcome: str) -> dict[str, str]:
    return {"name": stage.name, "recipe": stage.of, "address": stage.address, "outcome": outcome}


def _is_result(stage: "Stage") -> bool:
    return stage.name in ("report", "export")


def _print_result(result: dict[str, Any], outcome: "Outcome", store: "Store") -> None:
    from pathlib import Path

    from m2mkd_ray.commands.results import numbers_of
    from m2mkd_ray.reporting import Report, text_table

    if result["report"]:
        numbers = numbers_of(Path(result["report"]).parent)
        typer.echo(text_table(Report.model_validate(numbers["report"])) + "\n")
        typer.echo(f"Report: {result['report']}")
    else:
        last = outcome.complete[-1].stage
        typer.echo(f"{len(outcome.complete)} stages are complete; the last is {store.open(last.address)}")
    if result["export"]:
        typer.echo(f"Export: {result['export']}")
