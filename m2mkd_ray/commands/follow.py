"""What a person sees while a plan is carried out: a live table on a terminal, else a line for each event.

Both are told the executor's events and write to stderr; the result of the run is
printed afterwards, to stdout.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m2mkd_ray.commands.output import mates, place, said
from m2mkd_ray.execution import (
    Event,
    Stage,
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
    Store,
)
from m2mkd_ray.reporting.counters import joined
from m2mkd_ray.reporting.units import duration

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0
"""Seconds between two lines on the progress of one stage."""
_WITH_BARS = 120
"""Columns from which on there is room for bars of progress beside the words."""
_STYLES = {"running": "cyan", "complete": "green", "reused": "green", "failed": "bold red", "retry": "yellow"}


class Follower(Protocol):
    """Shows the events of a run."""

    def __enter__(self) -> "Follower":
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""

    def __call__(self, event: Event) -> None:
        """Take an event in."""


@dataclass
class Row:
    """What is known of a stage."""

    stage: Stage
    state: str = "waiting"
    step: int | None = None
    total_steps: int | None = None
    words: str = ""
    where: str = ""
    mates: Sequence[str] = ()
    """Addresses of the other stages that its worker runs; none where it is alone."""
    seconds: float | None = None
    started: float | None = None
    """Monotonic time at which a worker took it up."""

    def take(self, event: Event) -> None:
        """What the event says of the stage."""
        match event:
            case StageReused(seconds=seconds, metrics=metrics):
                self.state, self.seconds, self.words = "reused", seconds, said(metrics)
            case StageStarted(where=where, from_step=from_step):
                self.state, self.where, self.started, self.step = "running", place(where), time.monotonic(), from_step
                self.mates = mates(where, self.stage.address)
            case StageProgress(progress=progress):
                self.step, self.total_steps, self.words = progress.step, progress.total_steps, said(progress.metrics)
            case StageEnded(seconds=seconds, metrics=metrics):
                self.state, self.seconds, self.words, self.step = "complete", seconds, said(metrics), None
            case StageRetried(kind=kind, attempt=attempt):
                self.state, self.words, self.step = "retry", f"{kind} in attempt {attempt}", None
            case StageInterrupted(message=message):
                self.state, self.words, self.step = "waiting", message, None
            case StageWaits(reason=reason):
                self.words = f"no node has room: it asks for {reason}"
            case StageFailed(message=message):
                self.state, self.words = "failed", message.partition("\n")[0]
            case StageSkipped(because=because):
                self.state, self.words = "skipped", f"needs {', '.join(stage.name for stage in because)}"
            case StageWithdrawn():
                self.state, self.words, self.step = "withdrawn", "not wanted any more", None


class LiveTable:
    """A table of all stages that changes in place."""

    def __init__(self, stages: Sequence[Stage], store: Store, console: Console, *, polls_store: bool) -> None:
        """
        Args:
            polls_store: read the progress of running stages from the store, because the executor cannot
                tell of it while it runs a stage in its own process.
        """
        self.rows = {stage.address: Row(stage) for stage in stages}
        self._store, self._polls_store, self._console = store, polls_store, console
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self.table, console=console, refresh_per_second=1 / _REFRESH_S, vertical_overflow="visible"
        )

    def __enter__(self) -> "LiveTable":
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        self.rows[event.stage.address].take(event)

    def table(self) -> Table:
        """The table as it is now; stages of several recipes say which."""
        rows = list(self.rows.values())
        if self._polls_store:
            for row in rows:
                self._poll(row)
        several = len({row.stage.of for row in rows}) > 1
        done = sum(row.state in ("complete", "reused") for row in rows)
        title = f"{done} of {len(rows)} stages complete, {duration(time.monotonic() - self._began)}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage", no_wrap=True)
        if several:
            table.add_column("of", no_wrap=True)
        for name in ("state", "progress", "time"):
            table.add_column(name, no_wrap=True)
        for name in ("metrics", "where"):
            table.add_column(name, overflow="fold")  # these give way on a narrow terminal
        for row in rows:
            seconds = row.seconds
            if row.state == "running" and row.started is not None:
                seconds = time.monotonic() - row.started
            table.add_row(
                row.stage.name,
                *((row.stage.of,) if several else ()),
                Text(row.state, style=_STYLES.get(row.state, "dim")),
                _progress(row, with_bar=self._console.width >= _WITH_BARS),
                duration(seconds) if seconds is not None else "",
                row.words,
                self._where(row),
            )
        return table

    def _where(self, row: Row) -> str:
        """The worker, once for all the stages that share it; the others say with whom they are."""
        together = (row.stage.address, *row.mates)
        first = next(r for r in self.rows.values() if r.stage.address in together and r.where == row.where)
        return row.where if first is row else f"with {first.stage.name}"

    def _poll(self, row: Row) -> None:
        progress = self._store.progress(row.stage.address) if row.state == "running" else None
        if progress is not None:
            row.take(StageProgress(row.stage, progress))


class Lines:
    """A line for each event, for logs and pipes."""

    def __init__(self, stages: Sequence[Stage], stream: TextIO | None = None) -> None:
        self.rows = {stage.address: Row(stage) for stage in stages}
        self._stream = stream or sys.stderr
        self._said_at: dict[str, float] = {}
        self._several = len({stage.of for stage in stages}) > 1

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        address = event.stage.address
        row = self.rows[address]
        row.take(event)
        if isinstance(event, StageProgress):
            if time.monotonic() - self._said_at.get(address, -_LINE_EVERY_S) < _LINE_EVERY_S:
                return
            self._said_at[address] = time.monotonic()
        clock = time.strftime("%H:%M:%S")
        of = f" ({event.stage.of})" if self._several else ""
        print(f"{clock} {event.stage.name}{of}: {_sentence(row, event)}", file=self._stream, flush=True)


def follower(stages: Sequence[Stage], store: Store, console: Console, *, polls_store: bool) -> Follower:
    """The live table on a terminal, else lines."""
    if console.is_terminal:
        return LiveTable(stages, store, console, polls_store=polls_store and store.is_local)
    return Lines(stages)


def _progress(row: Row, *, with_bar: bool) -> Table | str:
    if row.step is None or not row.total_steps:
        return ""
    if not with_bar:
        return f"{row.step}/{row.total_steps}"
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(row.total_steps, row.step, width=12), f"{row.step}/{row.total_steps}")
    return grid


def _sentence(row: Row, event: Event) -> str:
    words = f": {row.words}" if row.words else ""
    match event:
        case StageReused():
            return f"complete from before{words}"
        case StageStarted(from_step=from_step):
            together = f" with {joined(row.mates)}" if row.mates else ""
            goes_on = f", goes on from step {from_step}" if from_step is not None else ""
            return f"started on {row.where}{together}{goes_on}"
        case StageProgress():
            return f"step {row.step}/{row.total_steps}{words}"
        case StageEnded(seconds=seconds):
            return f"complete after {duration(seconds)}{words}"
        case StageRetried(delay_s=delay_s):
            return f"tried again in {delay_s:.1f} s, {row.words}"
        case StageInterrupted():
            return f"waits for another worker, {row.words}"
        case StageWaits():
            return f"waits, {row.words}"
        case StageFailed():
            return f"failed{words}"
        case StageSkipped():
            return f"not run, {row.words}"
        case StageWithdrawn(step=step):
            return "withdrawn" if step is None else f"withdrawn; its checkpoint of step {step} is kept"
