"""What happened in a run, line by line: every event as JSON, with its time, in the store.

    <root>/.events/<run>.jsonl           on a local disk: appended to, so that it can be followed
    <root>/.events/<run>/000001.jsonl    elsewhere, where files cannot be appended to: a file every half minute

A run has files of its own, named by its time and a random part, so several drivers may
use one store. A line says `time`, `run`, `event` (the name of its class; `RunStarted` and
`RunEnded` are the first and the last), the stage's `stage`, `recipe` and `address`, and
what the event says. It is a record for people and dashboards: nothing reads it to decide.
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from m2mkd_ray.execution.events import Event, StageProgress
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Store, now

logger = logging.getLogger(__name__)

_FOLDER = ".events"
_PROGRESS_EVERY_S = 10.0
"""Seconds between two lines on the progress of one stage; its history is in its artifact."""
_UPLOAD_EVERY_S = 30.0


class EventLog:
    """Writes the events of one run; give it to `execute` as `on_event`, inside a `with`.

    A log that cannot be written is said once and given up: it is not worth a run.
    """

    def __init__(self, store: Store) -> None:
        self.run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self._store = store
        self._file: TextIO | None = None
        self._lines: list[str] = []
        self._uploads, self._next_upload = 0, time.monotonic() + _UPLOAD_EVERY_S
        self._said_at: dict[str, float] = {}
        self._is_given_up = False

    def __enter__(self) -> "EventLog":
        self._write({"event": "RunStarted", "host": socket.gethostname(), "pid": os.getpid()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write({"event": "RunEnded", "because": "" if kind is None else kind.__name__})
        self._upload()
        if self._file is not None:
            self._file.close()

    def __call__(self, event: Event) -> None:
        """Write an event down."""
        address = event.stage.address
        if isinstance(event, StageProgress):
            if time.monotonic() - self._said_at.get(address, -_PROGRESS_EVERY_S) < _PROGRESS_EVERY_S:
                return
            self._said_at[address] = time.monotonic()
        self._write(as_json(event))

    def _write(self, content: Mapping[str, Any]) -> None:
        line = json.dumps({"time": now(), "run": self.run, **content}, default=str) + "\n"
        if self._is_given_up:
            return
        try:
            if self._store.is_local:
                self._append(line)
            else:
                self._lines.append(line)
                if time.monotonic() >= self._next_upload:
                    self._upload()
        except OSError as error:
            self._give_up(error)

    def _append(self, line: str) -> None:
        if self._file is None:
            path = Path(self._store.folders.where(f"{_FOLDER}/{self.run}.jsonl"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        self._file.write(line)
        self._file.flush()

    def _upload(self) -> None:
        if not self._lines or self._is_given_up:
            return
        self._uploads += 1
        self._next_upload = time.monotonic() + _UPLOAD_EVERY_S
        data, self._lines = "".join(self._lines).encode(), []
        try:
            self._store.folders.write(f"{_FOLDER}/{self.run}/{self._uploads:06d}.jsonl", data)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_given_up = True
        logger.warning(
            "The log of events in %s/%s ends here, it cannot be written: %s", self._store.root, _FOLDER, error
        )


def as_json(event: Event) -> dict[str, Any]:
    """An event as JSON values; of an exception its message, of a stage its names."""
    stage = event.stage
    said = {"event": type(event).__name__, "stage": stage.name, "recipe": stage.of, "address": stage.address}
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return said | {name: _plain(value) for name, value in values.items() if name not in ("stage", "error")}


def _plain(value: Any) -> Any:
    if isinstance(value, Stage):
        return value.address
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    return (
        value
        if not hasattr(value, "__dataclass_fields__")
        else {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    )


def read_events(store: Store, addresses: Collection[str] | None = None) -> list[dict[str, Any]]:
    """What was written down of all runs, or of these stages alone, in order of time.

    A line that a kill cut off is left out, and said in the log.
    """
    found: list[dict[str, Any]] = []
    for path in _files(store):
        for line in (store.folders.read(path) or b"").decode(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                logger.warning("A line of %s is cut off, and left out: %.60s", path, line)
    if addresses is not None:
        found = [event for event in found if event.get("address") in addresses]
    return sorted(found, key=lambda event: str(event["time"]))


def _files(store: Store) -> list[str]:
    files = []
    for name in store.folders.names(_FOLDER):
        path = f"{_FOLDER}/{name}"
        files += [path] if name.endswith(".jsonl") else [f"{path}/{part}" for part in store.folders.names(path)]
    return files
