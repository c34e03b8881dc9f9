"""Event files for TensorBoard, from the points of trainings.

A folder is a run in TensorBoard, here one training. `Board.add` takes whatever points
are known by then and appends the values that are newer than the newest of their tag, so
a step is there once, however often its training was tried, and whichever process wrote
before. Values that come to be known late cannot be appended: TensorBoard takes a step
that goes back for a restart, and drops what it had after it. `Board.complete` then
writes all of them into another file, which says that what came before is to be dropped
(files that went away would stop TensorBoard's older loader). Only one process at a time
may write to a folder.

`tensorboardX.SummaryWriter` is turned down: a thread and a queue for each of hundreds
of trainings, to write a few lines a second.
"""

import math
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2mkd_ray.reporting.counters import COUNTERS

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

Point = Mapping[str, float]
"""A row of a history: `step`, and values by name."""

_EVENTS = "events.out.tfevents.*"
_NO_VALUES = ("step", "epoch", "first_step_at")
_LENGTH = struct.Struct("<Q")
_CRC_BYTES = 4


class Board:
    """The event files of one training; close it when nothing more is to be written.

    Args:
        folder: made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: dict[str, set[int]] = {}
        """Steps that are there, by tag."""
        self._writer: EventsWriter | None = None
        for tag, step, _ in read(folder):
            self._steps.setdefault(tag, set()).add(step)

    def add(self, points: Sequence[Point]) -> int:
        """Append the values that are newer than all of their tag; how many these are."""
        newest = {tag: max(steps) for tag, steps in self._steps.items()}
        newer = [value for value in _values(points) if value[1] > newest.get(value[0], -1)]
        self._write(newer)
        return len(newer)

    def complete(self, points: Sequence[Point]) -> int:
        """See that the values of all points are there; how many were not."""
        values = list(_values(points))
        missing = [(tag, step) for tag, step, _ in values if step not in self._steps.get(tag, ())]
        if any(step < max(self._steps.get(tag, {-1})) for tag, step in missing):
            self._rewrite(values)
        else:
            self.add(points)
        return len(missing)

    def close(self) -> None:
        """Close the file that is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _rewrite(self, values: "Sequence[Value]") -> None:
        self.close()
        self._steps = {}
        self._open(is_start=True)
        self._write(values)

    def _write(self, values: "Sequence[Value]") -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if not values:
            return
        writer = self._open()
        for tag, step, value in values:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._steps.setdefault(tag, set()).add(step)
        writer.flush()

    def _open(self, *, is_start: bool = False) -> "EventsWriter":
        """The file that is written; a start drops what other files have, but for the folder's first."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._writer is None:
            is_start = is_start or not any(self.folder.glob(_EVENTS))
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files are named after the second, and read in the order of their names.
            self._writer = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            if is_start:
                log = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=time.time(), step=0, session_log=log))
        return self._writer


Value = tuple[str, int, float]
"""Tag, step, value."""


def read(folder: Path) -> list[Value]:
    """The scalars that TensorBoard shows of the event files of a folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: list[Value] = []
    for file in sorted(folder.glob(_EVENTS)):
        for record in _records(file.read_bytes()):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                found = []
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def _values(points: Sequence[Point]) -> Iterator[Value]:
    for point in sorted(points, key=lambda point: point["step"]):
        for name, value in point.items():
            if name not in _NO_VALUES and math.isfinite(value):
                yield _tag(name), int(point["step"]), value


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    return f"{'counters' if name in COUNTERS else 'training'}/{name}"


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum. One that was cut is left out.

    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    at = 0
    while at + _LENGTH.size + _CRC_BYTES <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        begin = at + _LENGTH.size + _CRC_BYTES
        at = begin + length + _CRC_BYTES
        if at <= len(data):
            yield data[begin : begin + length]
