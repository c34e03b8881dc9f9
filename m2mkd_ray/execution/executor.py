"""The executor: one controller that brings a plan to its end.

It skips what is complete, locks what it will compute, has everything run that is
ready, takes results in the order in which they come, and asks `failures.decide`
about each failure. A failed stage stops only the stages below it. It keeps no
state that matters: after a kill, the same call goes on from what the store holds.

Turned down: Ray Workflows (removed from Ray), an actor pool per kind of stage
(retry, resume and status would be written for each), restarts by Ray (kinds of
failure could not be counted apart, and the log would not tell of them).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from m2mkd_ray.errors import ArtifactError, LockedError, StoreError, UsageError
from m2mkd_ray.execution import failures
from m2mkd_ray.execution.admission import Admission
from m2mkd_ray.execution.ahead import Ahead
from m2mkd_ray.execution.book import Book
from m2mkd_ray.execution.changes import Changes
from m2mkd_ray.execution.events import (
    Event,
    Outcome,
    StageEnded,
    StageFailed,
    StageInterrupted,
    StageProgress,
    StageRetried,
    StageReused,
    StageSkipped,
    StageStarted,
    StageWaits,
    StageWithdrawn,
)
from m2mkd_ray.execution.failures import GiveUp, Kind, Retry
from m2mkd_ray.execution.given import AsGiven
from m2mkd_ray.execution.interrupts import interrupts
from m2mkd_ray.execution.launcher import Launcher
from m2mkd_ray.execution.locks import Locks
from m2mkd_ray.execution.placement import Placer
from m2mkd_ray.execution.reports import Failed, Finished, Gone, Report, Started
from m2mkd_ray.execution.requests import Requests
from m2mkd_ray.execution.runs import Run, State, in_state
from m2mkd_ray.execution.seating import Seating
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)

Decide = Callable[[Kind, Sequence[Kind]], Retry | GiveUp]

_POLL_S = 0.5
_WATCH_LOCAL_S = 1.0
_WATCH_REMOTE_S = 15.0
_UNHEARD = (
    "It has said nothing for {:.0f} s since it started: its ranks (Ray Train) may wait for devices that no "
    "node has free, or it hangs before its first report"
)


def execute(
    plan: Sequence[Stage],
    store: Store,
    launcher: Launcher,
    *,
    until: Iterable[str] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    verify: bool = False,
    stall_timeout_s: float | None = None,
    wait_timeout_s: float | None = None,
    decide: Decide = failures.decide,
    place: Placer | None = None,
    ahead: Ahead | None = None,
    requests: Requests | None = None,
) -> Outcome:
    """Run what is not complete of a plan.

    Args:
        plan: the stages; what they need is added.
        until: names of the stages to end with; None: all.
        on_event: called in this thread for whatever happens.
        verify: compare the contents of all complete artifacts with their hashes first, not only their sizes.
        stall_timeout_s: kill and retry a stage that has reported in this attempt, and then for so long no more;
            None: never. After its last step a stage has as long as it needs; before its first report see below.
        wait_timeout_s: give a stage up that no node has been able to hold for so long, and one whose worker has
            reported nothing for so long since it took it up, as ranks that find no place do; None: never.
        decide: what to do about a failure.
        place: which stages get a worker, where and in which order; None: all, as the plan has them (`AsGiven`).
        ahead: asks an autoscaler for nodes before stages become ready; None: nobody does.
        requests: stages to add and to withdraw while it runs, which it does until these are closed; None: the plan
            is all.

    Returns:
        How each stage ended; `raise_for_failures()` turns failures into one exception.

    Raises:
        UsageError: `until` names a stage that the plan does not have.
        LockedError: another living driver computes one of the stages.
        KeyboardInterrupt: SIGINT or SIGTERM, or `requests` were cancelled; workers are killed, locks released,
            checkpoints kept.
    """
    stages = closure(plan, until)
    if requests is None:
        requests = Requests()
        requests.close()
    with Locks(store) as locks, interrupts(raise_at_once=launcher.runs_in_process) as interrupted:
        runs = {stage.address: Run(stage) for stage in stages}
        seating = Seating(runs, store, launcher, place or AsGiven(), ahead)
        executor = _Executor(
            runs, store, launcher, locks, interrupted, on_event, stall_timeout_s, wait_timeout_s, decide, seating
        )
        try:
            executor.look(verify)
            executor.loop(requests)
        except BaseException:
            executor.abandon()
            raise
        finally:
            seating.ask_no_more()
        return executor.outcome()


def closure(plan: Sequence[Stage], until: Iterable[str] | None = None) -> list[Stage]:
    """The stages named in `until` (None: all of the plan) and what they need, in order.

    Raises:
        UsageError: a name is not in the plan.
    """
    ordered = in_order(plan)
    if until is None:
        return ordered
    wanted = set(until)
    known = {stage.name for stage in ordered}
    if unknown := sorted(wanted - known):
        raise UsageError(f"The plan has no stage {', '.join(unknown)}. It has: {', '.join(sorted(known))}.")
    return in_order(stage for stage in ordered if stage.name in wanted)


class _Executor:
    def __init__(
        self,
        runs: dict[str, Run],
        store: Store,
        launcher: Launcher,
        locks: Locks,
        interrupted: threading.Event,
        on_event: Callable[[Event], None],
        stall_timeout_s: float | None,
        wait_timeout_s: float | None,
        decide: Decide,
        seating: Seating,
    ) -> None:
        self._runs = runs
        self._store = store
        self._launcher = launcher
        self._locks = locks
        self._interrupted = interrupted
        self._stall_timeout_s = stall_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._decide = decide
        self._seating = seating
        self._book = Book(store, locks, on_event)
        self._admission = Admission(store, locks, self._book)
        self._changes = Changes(runs, store, launcher, locks, seating, self._admission, self._book)
        self._repaired: set[str] = set()
        self._next_watch = 0.0

    def look(self, verify: bool) -> None:
        """Find what is complete, and lock the rest."""
        self._admission.let_in(list(self._runs.values()), verify)
        self._seating.know(self._store.seconds(run.stage.name for run in in_state(self._runs, State.WAITING)))

    # The loop

    def loop(self, requests: Requests) -> None:
        """Run until nothing is left that could, and nothing more will be asked."""
        while True:
            if requests.is_cancelled:
                raise KeyboardInterrupt
            self._changes.carry_out(requests)
            self._seating.fill([run for run in in_state(self._runs, State.WAITING) if self._is_ready(run)])
            running = in_state(self._runs, State.RUNNING)
            waiting = in_state(self._runs, State.WAITING)
            if not running and not waiting and requests.is_over:
                return
            reports = self._launcher.poll(_POLL_S) if running else self._sleep(waiting)
            for report in reports:
                self._handle(report)
            self._watch()
            self._locks.check()
            if self._interrupted.is_set():
                raise KeyboardInterrupt

    def _sleep(self, waiting: Sequence[Run]) -> list[Report]:
        soonest = min((run.not_before for run in waiting), default=0.0) - time.monotonic()
        # What is ready and still waits has no seat: that changes with the nodes, if it does.
        self._interrupted.wait(min(_POLL_S, soonest) if soonest > 0 else _POLL_S)
        return []

    def _is_ready(self, run: Run) -> bool:
        needs = (self._runs[need.address] for need in run.stage.reads.values())
        return time.monotonic() >= run.not_before and all(need.state is State.COMPLETE for need in needs)

    def _handle(self, report: Report) -> None:
        run = self._runs[report.address]
        self._seating.change()
        if not isinstance(report, Started):
            run.leave()
        match report:
            case Started(where=where):
                self._book.wait_no_longer(run)
                self._seating.take_up(run, where)
                step = self._store.checkpoints(run.stage.address).newest_step()
                goes_on = "" if step is None else f", goes on from its checkpoint of step {step}"
                logger.info("%s started on %s (pid %s)%s", run.stage.address, where["host"], where["pid"], goes_on)
                self._book.tell(StageStarted(run.as_seated, where, step))
            case Finished(metrics=metrics):
                seconds = self._store.manifest(run.stage.address)["seconds"]
                logger.info("%s ended after %.1f s", run.stage.address, seconds)
                self._seating.know({run.stage.name: seconds})
                self._book.end(run, State.COMPLETE, StageEnded(run.stage, seconds, metrics, run.where))
                self._changes.forget(run)
                self._locks.release([run.stage.address])
            case Gone():
                self._changes.gone(run)
            case Failed():
                report = replace(report, kind=run.kind_of(report.kind))
                self._book.end_attempt(run, report.kind, report.message)
                if run.withdrawn_at is not None:
                    self._changes.leave(run)
                elif not (isinstance(report.error, ArtifactError) and self._repair(run)):
                    self._judge(run, report)

    def _repair(self, run: Run) -> bool:
        """Have spoilt needs made anew, each once a run; False if that is not what stopped the stage."""
        needs = [self._runs[need.address] for need in run.stage.reads.values()]
        complete = [need for need in needs if need.state is State.COMPLETE]
        spoilt = [need for need in complete if self._store.status(need.stage.address, verify=True).state != "complete"]
        addresses = {need.stage.address for need in spoilt}
        if addresses & self._repaired or (not spoilt and len(complete) == len(needs)):
            return False
        try:
            self._locks.acquire(addresses)
        except LockedError as error:
            logger.warning("%s cannot be made anew: %s", ", ".join(sorted(addresses)), error)
            return False
        self._repaired |= addresses
        for need in spoilt:
            self._admission.clear(need.stage)
            need.state, need.end = State.WAITING, None
        run.wait()
        return True

    def _judge(self, run: Run, failed: Failed) -> None:
        """Ask the policy about a failure, and do as it says."""
        decision = self._decide(failed.kind, tuple(run.history))
        run.history.append(failed.kind)
        name, kind, attempt, lost = run.stage.address, failed.kind, len(run.history), run.take_lost_steps()
        if isinstance(decision, Retry):
            logger.warning("%s is retried in %.1f s: attempt %d %s", name, decision.delay_s, attempt, failed.message)
            run.is_loner = run.is_loner or kind is Kind.CROWDED
            run.wait(until=time.monotonic() + decision.delay_s)
            self._book.tell(StageRetried(run.stage, kind, attempt, decision.delay_s, failed.message, lost))
            return
        logger.error("%s failed (%s): %s\n%s", name, decision.reason, failed.message, failed.traceback)
        end = StageFailed(run.stage, kind, decision.reason, failed.message, failed.traceback, failed.error, lost)
        self._book.end(run, State.FAILED, end)
        self._locks.release([name])
        self._skip_below()

    def _skip_below(self) -> None:
        for run in in_state(self._runs, State.WAITING):  # in order: a stage comes after its needs
            ends = [self._runs[need.address].end for need in run.stage.reads.values()]
            causes: dict[str, Stage] = {}
            for end in ends:
                if isinstance(end, StageFailed):
                    causes[end.stage.address] = end.stage
                elif isinstance(end, StageSkipped):
                    causes |= {stage.address: stage for stage in end.because}
            if causes:
                self._book.end(run, State.SKIPPED, StageSkipped(run.stage, tuple(causes.values())))
                self._locks.release([run.stage.address])

    def _watch(self) -> None:
        """Look at nodes, pass on what workers report, and end those that have been silent for too long."""
        if self._seating.look_at_nodes():
            self._seating.replan()
        self._seating.ask_ahead()
        if time.monotonic() < self._next_watch:
            return
        self._next_watch = time.monotonic() + (_WATCH_LOCAL_S if self._store.is_local else _WATCH_REMOTE_S)
        for run in in_state(self._runs, State.RUNNING):
            if run.state is State.RUNNING and run.started is not None:  # a mate's end may have changed it
                self._watch_progress(run)
        self._changes.watch()
        self._watch_waiting()

    def _watch_progress(self, run: Run) -> None:
        progress = self._store.progress(run.stage.address)
        if progress is not None and progress != run.progress:
            run.hear(progress)
            self._book.tell(StageProgress(run.stage, progress))
        elif self._stall_timeout_s is not None and self._seating.silence_s(run) > self._stall_timeout_s:
            self._kill(run, Kind.STALLED, f"STALLED: it reported nothing for {self._stall_timeout_s:.0f} s")
        elif self._wait_timeout_s is not None and run.unheard_s > self._wait_timeout_s:
            self._kill(run, Kind.UNPLACED, _UNHEARD.format(self._wait_timeout_s))

    def _kill(self, run: Run, kind: Kind, message: str) -> None:
        """End a stage's worker; the other members of its cohort wait for another one, at no cost."""
        for address in self._launcher.kill(run.stage.address):
            mate, why = self._runs[address], f"its worker was ended, because {run.stage.address} stalled"
            self._book.end_attempt(mate, "INTERRUPTED", why)
            if mate.withdrawn_at is not None:
                self._changes.leave(mate)
                continue
            mate.wait()
            self._book.tell(StageInterrupted(mate.stage, why, mate.take_lost_steps()))
        self._handle(Failed(run.stage.address, kind, message))

    def _watch_waiting(self) -> None:
        """Say which stages no node can hold, and give them up after a while."""
        waiting = [run for run in in_state(self._runs, State.WAITING) if self._is_ready(run)]
        waiting += [run for run in in_state(self._runs, State.RUNNING) if run.started is None]
        lacking, now = self._seating.lacking(waiting), time.monotonic()
        said = {lacking[run.stage.address] for run in waiting if run.lacks_since and run.stage.address in lacking}
        for run in waiting:
            reason = lacking.get(run.stage.address)
            if reason is None:
                self._book.wait_no_longer(run)
            elif run.lacks_since is None:
                run.lacks_since = now
                self._store.say_waits(run.stage.address, reason)
                if reason not in said:
                    said.add(reason)
                    logger.warning("%s waits for a node: it asks for %s", run.stage.address, reason)
                self._book.tell(StageWaits(run.stage, reason, time.time()))
            elif self._wait_timeout_s is not None and now - run.lacks_since > self._wait_timeout_s:
                self._give_up_waiting(run, reason)

    def _give_up_waiting(self, run: Run, reason: str) -> None:
        if run.state is State.RUNNING and run not in self._seating.recall([run]):
            return  # a worker has just taken it up
        self._book.wait_no_longer(run)
        message = f"No node could hold it for {self._wait_timeout_s:.0f} s: it asks for {reason}"
        self._judge(run, Failed(run.stage.address, Kind.UNPLACED, message))

    # The end

    def abandon(self) -> None:
        """End all workers; what they checkpointed stays."""
        running = in_state(self._runs, State.RUNNING)
        for run in running:
            self._launcher.kill(run.stage.address)
        for run in running:
            try:
                self._book.end_attempt(run, "INTERRUPTED")
            except (StoreError, OSError) as error:  # it must not hide what ended the run
                logger.warning("The end of %s was not written down: %s", run.stage.address, error)

    def outcome(self) -> Outcome:
        """How every stage ended."""
        ends = [run.end for run in self._runs.values()]
        return Outcome(
            complete=tuple(end for end in ends if isinstance(end, StageReused | StageEnded)),
            failed=tuple(end for end in ends if isinstance(end, StageFailed)),
            skipped=tuple(end for end in ends if isinstance(end, StageSkipped)),
            withdrawn=tuple(end for end in ends if isinstance(end, StageWithdrawn)),
        )
