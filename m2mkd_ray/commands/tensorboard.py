"""`m2mkd tensorboard`: event files for TensorBoard, from the progress and the histories in any store.

Turned down: workers that write event files. A bucket has no files to append to, a
cohort's worker would keep one for each member, and a disk that is full of curves
must not end a training. What the store has anyway is enough, for old runs too.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2mkd_ray.commands.session import RecipeName, Settings, StoreRoot, planned, session
from m2mkd_ray.errors import StoreError

if TYPE_CHECKING:
    from m2mkd_ray.execution import Stage, Store

_HISTORY = "history.json"
"""What trainings keep in their checkpoints and in their artifact (`stages/parts.py`, whose import takes seconds)."""
_LOCAL_S = 1.0
_REMOTE_S = 15.0
"""Seconds between two looks at a store."""

Point = dict[str, float]


def tensorboard(
    context: typer.Context,
    recipe: RecipeName,
    to: Annotated[Path, typer.Option("--to", help="Folder for the event files; what it has is added to.")],
    settings: Settings = None,
    store: StoreRoot = "runs",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until every stage is complete, or Ctrl-C.")] = False,
) -> None:
    """Write the curves of all trainings for TensorBoard; with --follow, while they run."""
    now = session(context)
    chosen = now.choose(recipe, settings)
    opened = now.open_store(store)
    with ExitStack() as open_files:
        curves = [open_files.enter_context(closing(Curves(stage, to))) for stage in planned(chosen)]
        num_values = _update(curves, opened)
        while follow and not all(one.is_complete for one in curves):
            time.sleep(_LOCAL_S if opened.is_local else _REMOTE_S)
            num_values += _update(curves, opened)
    written = sum(one.board.folder.is_dir() for one in curves)
    typer.echo(f"{written} trainings, {num_values} new values. Look at them with: tensorboard --logdir {to}")


def _update(curves: "Iterable[Curves]", store: "Store") -> int:
    return sum(one.update(store) for one in curves if not one.is_complete)


class Curves:
    """What a store has of one stage, and the event files that it goes to; a stage that is no training has none.

    Args:
        stage: the stage.
        to: the folder below which it has a folder of its own.
    """

    def __init__(self, stage: "Stage", to: Path) -> None:
        from m2mkd_ray.reporting.scalars import Board

        self.address = stage.address
        with _writing():
            self.board = Board(to / stage.of / stage.address)
        self.is_complete = False
        """Whether the stage is complete, and all of its values are written."""
        self._checkpoint: int | None = None
        """Step of the checkpoint whose history was read."""

    def update(self, store: "Store") -> int:
        """Write what the store has and the event files have not; how many values these are."""
        if store.status(self.address).state != "complete":
            known = (self._checkpointed(store), self._said(store))
            with _writing():
                return sum(self.board.add(points) for points in known)
        history = _history(store, self.address) or []
        with _writing():
            missing = self.board.complete(history)
            self.close()
        self.is_complete = True
        return missing

    def close(self) -> None:
        """Close the files that are open."""
        self.board.close()

    def _checkpointed(self, store: "Store") -> list[Point]:
        """The history of the newest checkpoint, where it is a new one."""
        from m2mkd_ray.execution.store import partial

        step = store.checkpoints(self.address).newest_step()
        if step is None or step == self._checkpoint:
            return []
        history = _history(store, f"{partial(self.address)}/checkpoint/{step:012d}")
        if history is not None:
            self._checkpoint = step
        return history or []

    def _said(self, store: "Store") -> list[Point]:
        """What the worker said last, if it trains."""
        progress = store.progress(self.address)
        if progress is None or "images_per_s" not in progress.metrics:
            return []
        return [{**progress.metrics, "step": float(progress.step)}]


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"Event files cannot be written: {error}. Name another folder with --to.") from error


def _history(store: "Store", folder: str) -> list[Point] | None:
    """The history in a folder; None if there is none, or not all of it yet."""
    data = store.folders.read(f"{folder}/{_HISTORY}")
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None
