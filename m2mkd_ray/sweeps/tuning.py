"""Runs a sweep: Ray Tune decides what is tried and what is stopped, an open run of the executor does the work.

Everything lies below the store's root: stages where they always lie, Tune's own folder
(TensorBoard, CSV and JSON of every trial) in `<sweep's folder>/tune`. The same call goes
on after whatever ended the last one: Tune restores its trials, complete stages are
found, and the scheduler is told again what it knew.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from m2mkd_ray.errors import ArtifactError, ClusterError, PlanError, RunError
from m2mkd_ray.execution import Event, Stage, Store, in_order
from m2mkd_ray.execution.feasibility import misfits
from m2mkd_ray.execution.interrupts import interrupts
from m2mkd_ray.execution.launcher import Launcher
from m2mkd_ray.execution.worker import versions
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.sweeps import points, results
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import Point
from m2mkd_ray.sweeps.results import SweepResults
from m2mkd_ray.sweeps.room import Room, max_concurrent, of_a_worker
from m2mkd_ray.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner

    from m2mkd_ray.sweeps.desk import Desk

logger = logging.getLogger(__name__)

FOLDER = "tune"
"""Tune's, in the sweep's."""
_RETRIES = 10
"""How often Tune starts a trial's actor again whose node was lost without notice (a drained one does not count). What
trains has the executor's own retries."""


def run(
    sweep: Sweep,
    store: Store,
    launcher: Launcher,
    *,
    recipe: Recipe | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_change: Callable[[SweepResults], None] = lambda results: None,
    stall_timeout_s: float | None = None,
    wait_timeout_s: float | None = None,
) -> SweepResults:
    """Run a sweep to its end, or go on with it.

    Args:
        launcher: of Ray, which has been started.
        recipe: the sweep's, with another placement; None: as it is (`points.base`).
        on_event: called for whatever the executor tells of stages.
        on_change: called with the results whenever they were written down.
        stall_timeout_s: see `execute`; so for `wait_timeout_s`.

    Raises:
        UsageError: there is no such recipe or setting.
        PlanError: something is wrong with the sweep, or no node can hold its stages; lists every problem.
        ClusterError: this process is not part of the cluster.
        RunError: what all trials read failed, or no trial has a value.
        LockedError: another driver is at work on one of the stages.
        TrainingError: a target measured no such metric.
        KeyboardInterrupt: SIGINT or SIGTERM. The same call goes on.
    """
    checked = points.check(sweep)
    base = checked if recipe is None else recipe
    if (whole := ended(sweep, store)) is not None:
        on_change(whole)
        return whole
    known = _known(sweep, store)
    tried = drawn(sweep)
    stages = _stages(sweep, base, (tried or points.corners(sweep.space))[:1])
    _check_cluster(stages, launcher)
    # A searcher that looks at values had better propose a point when its seat is there.
    waiting = 0 if tried is None else of_a_worker(stages)
    number = sweep.budget.trials if tried is None else len(tried)

    def room() -> Room:
        seats = max(max_concurrent(stages, nodes) for nodes in (launcher.nodes(), launcher.most_nodes()))
        return Room(min(seats, number), min(seats + waiting, number))

    return _run(
        sweep, base, store, launcher, known, tried, room=room,
        on_event=on_event, on_change=on_change, stall_timeout_s=stall_timeout_s, wait_timeout_s=wait_timeout_s,
    )  # fmt: skip


def _run(
    sweep: Sweep,
    base: Recipe,
    store: Store,
    launcher: Launcher,
    known: SweepResults,
    tried: Sequence[Point] | None,
    **options: Any,
) -> SweepResults:
    from m2mkd_ray.sweeps.bell import close_desk, open_desk
    from m2mkd_ray.sweeps.desk import Desk, Interrupted

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupt is ours: it ends the stages too
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables would go to stdout, silent as it is asked to be
    with interrupts(raise_at_once=False) as interrupted:
        desk = Desk(
            sweep,
            base,
            store,
            launcher,
            known=known,
            tried=tried,
            interrupted=interrupted,
            **options,
        )
        open_desk(sweep, desk)
        try:
            with desk:
                desk.prepare(shared(sweep, base, tried))
                _tuner(sweep, base, store, tried).fit()
                desk.finish()
        except Interrupted as interrupt:
            raise KeyboardInterrupt from interrupt
        finally:
            close_desk(sweep)
    return _ended(sweep, desk)


def _ended(sweep: Sweep, desk: "Desk") -> SweepResults:
    if desk.results().best is not None:
        return desk.write("complete")
    why = next((trial.why for trial in desk.results().trials if trial.why), desk.over or "no trial has begun")
    desk.write("failed", why)
    raise RunError(f"No trial of the sweep {sweep.name!r} has a value: {why}. Run the same command when that is gone.")


def ended(sweep: Sweep, store: Store) -> SweepResults | None:
    """The results of a sweep of which nothing is left to run; None: something is."""
    known = _known(sweep, store)
    has_failed = any(trial.state == "failed" for trial in known.trials)
    return known if known.state == "complete" and known.trials and not has_failed else None


def grid(sweep: Sweep, store: Store) -> "ResultGrid":
    """Ray Tune's own view of a sweep that was run: a result and a folder a trial.

    Raises:
        ArtifactError: it was never run with this store.
    """
    from ray.tune import Tuner

    from m2mkd_ray.sweeps.trials import Trial

    where = _tune_folder(sweep, store)
    if not _can_restore(sweep, store):
        raise ArtifactError(f"The sweep {sweep.name!r} has no trials at {where}. Run it first, with the same --store.")
    return Tuner.restore(where, trainable=Trial, storage_filesystem=store.filesystem).get_results()


def shared(sweep: Sweep, base: Recipe, tried: Sequence[Point] | None) -> list[Stage]:
    """What every trial reads and none accounts for, so far as that is known: data, meta models, teachers."""
    common: dict[str, Stage] | None = None
    for point in tried or points.corners(sweep.space):
        found = {}
        for recipe in points.recipes(sweep, point, base).values():
            own = {stage.address for stage in points.recorded(sweep, recipe)}
            for stage in in_order(points.targets(sweep, recipe)):
                if stage.address in own or any(read.address in own for read in stage.reads.values()):
                    own.add(stage.address)  # what reads a trial's stage is its own
                else:
                    found[stage.address] = stage
        common = found if common is None else {at: stage for at, stage in common.items() if at in found}
    return list((common or {}).values())


def _stages(sweep: Sweep, base: Recipe, tried: Sequence[Point]) -> list[Stage]:
    """A trial's own stages."""
    own = [
        stage
        for point in tried
        for recipe in points.recipes(sweep, point, base).values()
        for stage in points.recorded(sweep, recipe)
    ]
    return list({stage.address: stage for stage in own}.values())


def _check_cluster(stages: Sequence[Stage], launcher: Launcher) -> None:
    import ray.util.client

    if ray.util.client.ray.is_connected():
        raise ClusterError(
            "A sweep's driver has to run on the cluster, as Ray Tune's trials call it. Instead of `ray://`, submit it "
            "as a job (`m2mkd submit`), or run it on the head node with `--address auto`."
        )
    if not launcher.may_grow() and (problems := misfits(in_order(stages), launcher.nodes())):
        raise PlanError("The sweep cannot start:\n" + "\n".join(f"- {problem}" for problem in problems))


def _known(sweep: Sweep, store: Store) -> SweepResults:
    """What an earlier run left, or nothing yet."""
    now = time.time()
    if store.folders.read(f"{sweep.folder}/{results.FILE}") is not None:
        return results.read(store, sweep)
    named = {name: str(version) for name, version in versions().items() if version is not None}
    return SweepResults(sweep=sweep, created=now, updated=now, versions=named)


def _tuner(sweep: Sweep, base: Recipe, store: Store, tried: Sequence[Point] | None) -> "Tuner":
    from ray import tune

    from m2mkd_ray.sweeps.asking import search_of
    from m2mkd_ray.sweeps.bell import Bell, Ending
    from m2mkd_ray.sweeps.desk import name_of
    from m2mkd_ray.sweeps.rungs import scheduler_of
    from m2mkd_ray.sweeps.trials import POINT, SWEEP, Trial

    if _can_restore(sweep, store):
        logger.info("The sweep %s goes on", sweep.name)
        return tune.Tuner.restore(
            _tune_folder(sweep, store),
            trainable=Trial,
            resume_unfinished=True,
            resume_errored=True,
            storage_filesystem=store.filesystem,
        )
    space: Any = (
        {path: of.parsed.to_tune() for path, of in sweep.space.items()}
        if tried is None
        else tune.grid_search([dict(point) for point in tried])
    )
    return tune.Tuner(
        Trial,
        param_space={SWEEP: name_of(sweep), POINT: space},
        tune_config=tune.TuneConfig(
            metric=sweep.measured,
            mode=sweep.mode,
            search_alg=search_of(sweep, in_order=tried is not None),
            scheduler=scheduler_of(sweep, points.epochs_of(sweep, base)),
            num_samples=sweep.budget.trials if tried is None else 1,
            reuse_actors=True,
            trial_dirname_creator=_folder_of,
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=store.folders.where(sweep.folder),
            storage_filesystem=store.filesystem,
            callbacks=[Bell(sweep)],
            stop=Ending(sweep),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's actor has nothing to keep
            verbose=0,
        ),
    )


def _folder_of(trial: Any) -> str:
    """Tune's own name would have all settings in it."""
    return f"trial-{trial.trial_id}"


def _tune_folder(sweep: Sweep, store: Store) -> str:
    return f"{store.folders.where(sweep.folder)}/{FOLDER}"


def _can_restore(sweep: Sweep, store: Store) -> bool:
    """Whether Tune has written down what it needs; it does so some seconds after its start."""
    names = store.folders.names(f"{sweep.folder}/{FOLDER}")
    return "tuner.pkl" in names and any(name.startswith("experiment_state") for name in names)
