"""Where Ray Tune's trials and the executor's stages meet, in the driver.

Tune decides which points are tried and which trials are stopped; an open run of the
executor does the work. The desk adds a trial's stages to the run, tells Tune what they
measured, and withdraws those that no trial wants any more. It is told of the executor's
events through a queue, and acts only in Tune's own thread, between Tune's steps.

What Tune decides depends on the order in which it hears of values: the first at a rung
always goes on. So values are told one at a time, by epoch and then by trial, and one of
a cohort's member not before its mates have come as far; they train in step, so this
takes no time. Within a worker, who runs how fast decides nothing; of several workers
the faster one is heard first.

Turned down: Tune's trials as the workers (no cohorts, and every process would load its
own teacher), and values through the trials' own polling of the store (nobody would
order them).
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.errors import RunError, UsageError
from m2mkd_ray.execution import Event, Gathering, Launcher, Requests, Stage, StageProgress, Store, execute, in_order
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.sweeps import points, results
from m2mkd_ray.sweeps.points import Point
from m2mkd_ray.sweeps.results import SweepResults
from m2mkd_ray.sweeps.room import Room
from m2mkd_ray.sweeps.sweep import Sweep
from m2mkd_ray.sweeps.trials import Board, Grief, Message, Over, Value, board_of
from m2mkd_ray.sweeps.trying import Score, Trying
from m2mkd_ray.sweeps.watched import GpuTime, Watched, ranks_held

logger = logging.getLogger(__name__)

_GATHER_S = 10.0
"""How long stages of trials that begin are held for those that are about to begin."""
_WRITE_EVERY_S = 1.0
_LOOK_EVERY_S = 5.0
_TICK_S = 0.1


class Interrupted(Exception):
    """The driver is to end; an exception of its own, as Tune tidies up after those alone."""


class Desk:
    """A sweep under way; a context whose end is the end of the run.

    Args:
        known: results of an earlier run of the sweep, or fresh ones.
        tried: the points, in the order in which trials are numbered; None: as they begin.
        room: how many trials there is room for, looked up now and then, as nodes come and go.
        interrupted: set when the driver is to end.
    """

    def __init__(
        self,
        sweep: Sweep,
        base: Recipe,
        store: Store,
        launcher: Launcher,
        *,
        known: SweepResults,
        tried: Sequence[Point] | None,
        room: Callable[[], Room],
        interrupted: threading.Event,
        on_event: Callable[[Event], None],
        on_change: Callable[[SweepResults], None],
        stall_timeout_s: float | None,
        wait_timeout_s: float | None,
    ) -> None:
        self.sweep, self.over = sweep, ""
        """`over`: why no trial goes on any more; empty while they do."""
        self._base, self._store, self._known = base, store, known
        self._tried, self._interrupted = [dict(point) for point in tried or ()], interrupted
        self._look_for_room, self.room, self._next_look = room, room(), time.monotonic() + _LOOK_EVERY_S
        self._on_event, self._on_change = on_event, on_change
        self._metric, self._epochs = points.metric_of(sweep), points.epochs_of(sweep, base)
        self._requests, self._events = Requests(), queue.SimpleQueue[Event]()
        self._stages: dict[str, Watched] = {}
        self._trials: dict[str, Trying] = {}
        self._held: list[Trying] = []
        self._held_since = 0.0
        self._in_flight: tuple[str, Value] | None = None
        self._is_told_over = False
        self._gpus, self._began, self._next_write = GpuTime(), time.monotonic(), 0.0
        self._error: BaseException | None = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board: Any = ray.remote(Board)
        # On this node, as it has to live as long as this driver, and so that it holds no other.
        self._board = board.options(num_cpus=0, name=board_of(name_of(sweep)), scheduling_strategy=here).remote()
        self._thread = threading.Thread(
            target=self._run, args=(launcher, stall_timeout_s, wait_timeout_s), name="sweep", daemon=True
        )
        for record in known.trials:
            self._trials[record.name] = Trying.from_record(sweep, base, record, self._order(record.point))

    def __enter__(self) -> "Desk":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._requests.close()
        else:
            self._requests.cancel()
        self._thread.join()
        self._take_events()
        ray.kill(self._board)
        self.write()

    def _run(self, launcher: Launcher, stall_timeout_s: float | None, wait_timeout_s: float | None) -> None:
        try:
            execute(
                (),
                self._store,
                launcher,
                on_event=self._events.put,
                stall_timeout_s=stall_timeout_s,
                wait_timeout_s=wait_timeout_s,
                # Where nodes may come for them, ranks that wait are what an autoscaler sees.
                place=Gathering(asks=True) if launcher.may_grow() else Gathering(ranks_held),
                requests=self._requests,
            )
        except BaseException as error:  # it is raised again in Tune's thread
            self._error = error

    # What Tune's side asks and tells

    def prepare(self, stages: Sequence[Stage]) -> None:
        """Bring to completion what all trials read, before any begins.

        Raises:
            RunError: one of them failed.
            Interrupted: the driver is to end.
        """
        watched = [self._watch(stage) for stage in in_order(stages)]
        self._requests.add(stages)
        while not all(stage.is_complete for stage in watched):
            time.sleep(_TICK_S)
            self.tick()
            if failed := [stage for stage in watched if stage.grief]:
                lines = "\n".join(f"- {stage.stage.address}: {stage.grief}" for stage in failed)
                raise RunError(
                    f"The sweep {self.sweep.name!r} cannot go on: what all its trials read failed.\n{lines}\n"
                    f"Run the same command again when the cause is gone."
                )

    def history(self, name: str, point: Point) -> list[tuple[float, float]]:
        """What a trial of an earlier run had reported, as (epoch, value)."""
        trial = self._known_trial(name, point)
        return [] if trial is None else list(trial.history)

    def begin(self, name: str, point: Point) -> None:
        """An actor of Tune's waits for a trial's values: for the first time, or once more."""
        trial = self._known_trial(name, point)
        if trial is None:
            trial = self._trials[name] = Trying(self.sweep, self._base, name, point, self._order(point))
        trial.is_live, trial.started = True, trial.started or time.time()
        if self._in_flight is not None and self._in_flight[0] == name:
            self._in_flight = None  # whoever had it is gone
        if trial.was_ended:
            return
        if trial.grief:
            return self._tell(trial, Grief(trial.grief))
        trial.state, trial.why = "running", ""
        if not trial.targets:
            try:
                self._plan(trial)
            except UsageError as error:  # two settings that each fit alone
                trial.grief = str(error)
                return self._tell(trial, Grief(trial.grief))
            self._held_since = self._held_since if self._held else time.monotonic()
            self._held.append(trial)
        self.write()

    def reported(self, name: str, *, is_done: bool) -> None:
        """Tune has heard of the value that was told last, and decided whether the trial goes on."""
        if self._in_flight is None or self._in_flight[0] != name:
            return
        trial, value = self._trials[name], self._in_flight[1]
        self._in_flight = None
        if trial.was_ended:
            trial.is_live = trial.was_ended = False
            return
        trial.heard(value.epoch, value.value)
        if not is_done:
            self.write()
        elif value.is_last or value.epoch >= self._epochs - 1e-9:
            self.end(name, "complete")
        else:
            self.end(name, "stopped", f"{self.sweep.scheduler.kind} at {value.epoch:g} epochs")

    def end(self, name: str, state: Literal["complete", "stopped", "failed"], why: str = "") -> None:
        """A trial is over: what no other one wants is withdrawn."""
        if (trial := self._trials.get(name)) is None:
            return  # it never began
        if trial.is_live:
            trial.is_live, trial.state, trial.ended, trial.why = False, state, time.time(), trial.grief or why
            wanted = {address for other in self._trials.values() if other.is_live for address in other.wants}
            self._held = [other for other in self._held if other is not trial]
            self._requests.withdraw(
                address for address in trial.wants - wanted if not self._stages[address].is_complete
            )
        if self._in_flight is not None and self._in_flight[0] == name:
            self._in_flight = None
        self.write()

    def tick(self) -> None:
        """Pass on what happened; often, and in the thread that asks and tells.

        Raises:
            Interrupted: the driver is to end.
            M2mkdError: the executor came to grief.
        """
        self._take_events()
        if self._interrupted.is_set():
            self._requests.cancel()  # stages end while Tune tidies up, which may take it seconds
            self._tell_over()
            raise Interrupted
        if self._error is not None:
            self._tell_over()
            raise self._error
        if self.over and not self._is_told_over:
            self._tell_over()
        self.over = self.over or self._budget()
        if self._held and not self._is_gathering():
            self._requests.add([target.stage for trial in self._held for target in trial.watched])
            self._held = []
        if self._in_flight is None and not self.over and not self._held:
            self._tell_next()
        if time.monotonic() >= self._next_write:
            self.write()
        if time.monotonic() >= self._next_look:
            self.room, self._next_look = self._look_for_room(), time.monotonic() + _LOOK_EVERY_S

    # Values

    def _tell_next(self) -> None:
        """Tell the first of the values that can be told, by epoch and then by trial."""
        found: list[tuple[float, int, Trying, Score | None]] = []
        for trial in self._trials.values():
            if not trial.is_live:
                continue
            if trial.was_ended:
                found.append((0.0, trial.order, trial, None))
            elif (score := trial.next) is not None and self._have_mates_come(trial, score[0]):
                found.append((score[0], trial.order, trial, score))
        if not found:
            return
        _, _, trial, score = min(found, key=lambda entry: entry[:2])
        if score is None:
            epoch, value = trial.history[-1]
            return self._tell(trial, Value(self.sweep.measured, value, epoch, is_last=True))
        trial.by_seed = score[2]
        is_last = trial.is_complete and score == trial.scores()[-1]
        self._tell(trial, Value(self.sweep.measured, score[1], score[0], is_last))

    def _tell(self, trial: Trying, message: Message) -> None:
        if isinstance(message, Value):
            self._in_flight = (trial.name, message)
        self._board.put.remote(trial.name, message)

    def _have_mates_come(self, trial: Trying, epoch: float) -> bool:
        """Whether all trials that run, or will run, in the same workers have a value at an epoch too."""
        others = (other for other in self._trials.values() if other is not trial and other.is_at_work)
        return all(other.has_come_to(epoch) for other in others if trial.is_mate_of(other))

    # Stages

    def _plan(self, trial: Trying) -> None:
        recipes = points.recipes(self.sweep, trial.point, self._base)
        targets = {seed: points.targets(self.sweep, recipe) for seed, recipe in recipes.items()}
        wanted = {address for other in self._trials.values() for address in other.wants}
        trial.targets = {seed: [self._watch(stage) for stage in stages] for seed, stages in targets.items()}
        everything = in_order(stage for stages in targets.values() for stage in stages)
        for stage in everything:
            self._watch(stage)
        trial.wants = frozenset(stage.address for stage in everything)
        before = {stage.address: stage.reused for stage in trial.recorded_before if stage.started is not None}
        trial.recorded = [
            (seed, watched, before.get(stage.address, stage.address in wanted or watched.is_complete))
            for seed, recipe in recipes.items()
            for stage in points.recorded(self.sweep, recipe)
            for watched in (self._watch(stage),)
        ]

    def _watch(self, stage: Stage) -> Watched:
        if stage.address not in self._stages:
            self._stages[stage.address] = Watched(stage)
            self._stages[stage.address].look(self._store)
        return self._stages[stage.address]

    def _is_gathering(self) -> bool:
        """Whether more trials are about to begin, whose stages had better come with those that are held."""
        live = sum(trial.is_at_work for trial in self._trials.values())
        return live < self.room.fills and time.monotonic() - self._held_since < _GATHER_S

    def _take_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            watched = self._watch(event.stage)
            self._gpus.hear(event)
            watched.hear(event, self._store)
            self._on_event(event)
            if watched.grief and not isinstance(event, StageProgress):
                for trial in self._trials.values():
                    if trial.is_at_work and event.stage.address in trial.wants:
                        trial.grief = watched.grief
                        self._tell(trial, Grief(watched.grief))

    # The end, and what is written down

    def _budget(self) -> str:
        """Which limit is reached; empty: none."""
        budget, (seconds, gpu_seconds) = self.sweep.budget, self._spent()
        if budget.hours is not None and seconds >= budget.hours * 3600:
            return f"budget.hours {budget.hours:g} are over"
        if budget.gpu_hours is not None and gpu_seconds >= budget.gpu_hours * 3600:
            return f"budget.gpu_hours {budget.gpu_hours:g} are used up"
        return ""

    def _spent(self) -> tuple[float, float]:
        return self._known.seconds + time.monotonic() - self._began, self._known.gpu_seconds + self._gpus.seconds

    def _tell_over(self) -> None:
        """Let the actors of all trials go."""
        self._is_told_over = True
        for trial in self._trials.values():
            if trial.is_live:
                self._tell(trial, Over())

    def finish(self) -> None:
        """Tune has ended: trials that it let go of were stopped by the budget."""
        for trial in list(self._trials.values()):
            if trial.is_live:
                self.end(trial.name, "stopped", self.over)

    def results(self, state: Literal["running", "complete", "failed"] = "running", why: str = "") -> SweepResults:
        """All of it, as it is now."""
        of_trials = {watched.stage.address for trial in self._trials.values() for _, watched, _ in trial.recorded}
        shared = [watched for address, watched in self._stages.items() if address not in of_trials]
        seconds, gpu_seconds = self._spent()
        return self._known.model_copy(
            update={
                "state": state,
                "why": why or self.over,
                "updated": time.time(),
                "seconds": seconds,
                "gpu_seconds": gpu_seconds,
                "trials": tuple(
                    trial.record() for trial in sorted(self._trials.values(), key=lambda trial: trial.order)
                ),
                "shared": tuple(watched.record(watched.seed, self._metric, 0.0, reused=False) for watched in shared),
            }
        )

    def write(self, state: Literal["running", "complete", "failed"] = "running", why: str = "") -> SweepResults:
        """Write the results down, and tell of them."""
        self._next_write = time.monotonic() + _WRITE_EVERY_S
        now = self.results(state, why)
        results.write(self._store, now)
        self._on_change(now)
        return now

    def _order(self, point: Point) -> int:
        return self._tried.index(dict(point)) if dict(point) in self._tried else len(self._trials)

    def _known_trial(self, name: str, point: Point) -> Trying | None:
        """A trial by its name; or one of an earlier run that Tune does not know by its name any more, by its point."""
        if name in self._trials:
            return self._trials[name]
        mine = {record.name for record in self._known.trials}
        for old, trial in self._trials.items():
            if old in mine and not trial.is_live and dict(trial.point) == dict(point):
                del self._trials[old]
                trial.name = name
                self._trials[name] = trial
                return trial
        return None


def name_of(sweep: Sweep) -> str:
    """What a sweep is called among others."""
    return f"{sweep.name}-{sweep.key}"
