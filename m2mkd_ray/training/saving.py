"""Checkpoints that are written while the training goes on.

The state is copied at once and written by a thread, so a slow disk costs the
training a copy. At most one checkpoint is on its way: the next one waits for it.
What a write raises is raised by the next `save` or `wait`, and what it had written goes.
A process that is killed in mid-write leaves no harm, because sessions keep checkpoints
whole or not at all.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from m2mkd_ray.training.seams import Checkpoints, Point

HISTORY = "history.json"


class Saver:
    """Writes the checkpoints of one training."""

    def __init__(self, checkpoints: Checkpoints, *, beside: bool) -> None:
        """`beside`: in a thread; else `save` comes back when it is done (ranks save together, behind a barrier)."""
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if beside else None
        self._writing: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None], history: list[Point] | None) -> None:
        """Keep what `write` puts into a folder, and the history as it is now; None: another rank keeps it."""
        told = None if history is None else json.dumps(history)
        self.wait()
        if self._thread is None:
            return self._write(step, write, told)
        self._writing = self._thread.submit(self._write, step, write, told)

    def wait(self) -> None:
        """Come back when nothing is being written.

        Raises:
            Exception: what the write that was on its way raised.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @staticmethod
    def history_in(folder: Path) -> list[Point]:
        """The history of a checkpoint."""
        history: list[Point] = json.loads((folder / HISTORY).read_text())
        return history

    def close(self) -> None:
        """Let a write that is on its way end, and the thread with it; tells of no error."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, write: Callable[[Path], None], history: str | None) -> None:
        folder = self._checkpoints.scratch()
        try:
            write(folder)
            if history is not None:
                (folder / HISTORY).write_text(history)
            self._checkpoints.save(step, folder)
        except BaseException:  # a full disk, say, which must not become fuller with every try
            shutil.rmtree(folder, ignore_errors=True)  # what is raised is why there is no checkpoint
            raise
