"""The store: every result at an address made from what decided it.

    <root>/<name>-<key>/             a complete artifact: its files and `manifest.json`
    <root>/.partial/<name>-<key>/    work that goes on: `progress.json`, `attempts.json`, `waits.json`,
                                     `withdrawn.json`, `checkpoint/<step>/`, and the files being written
    <root>/.events/                  what happened in each run (`event_log.py`)
    <root>/.locks/                   which driver is at work on what
    <root>/.quarantine/              artifacts that failed their hashes

An artifact is complete exactly when it has a manifest. On a local disk a prepared
folder, manifest included, gets the artifact's name in one rename; elsewhere files
are uploaded first and the manifest last. Unfinished work has a folder of its own,
because the one rename would not be possible onto a folder that already holds a
checkpoint, and two renames could be interrupted between. Whoever comes second
with the same artifact leaves the first in place.

Turned down: a database of what is done (it can disagree with the files), and
hidden state in actors (they die). Nothing here is a pickle.
"""

import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs

from m2mkd_ray.errors import ArtifactError, StoreError
from m2mkd_ray.execution.checkpoints import StoreCheckpoints
from m2mkd_ray.execution.digests import digests, from_json, wrong_contents, wrong_sizes
from m2mkd_ray.execution.folders import Folders, open_folders, why
from m2mkd_ray.execution.stage import Metrics

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_WITHDRAWN = "withdrawn.json"
_ADDRESS = re.compile(r"(?P<name>.+)-(?P<key>[0-9a-f]{12})")
_MINIMUM_FREE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Progress:
    """How far a stage is, as its worker last said."""

    step: int
    total_steps: int
    metrics: Mapping[str, float]
    time: float
    """When it was said, in seconds since 1970."""
    pid: int
    host: str
    landmarks: Sequence[Mapping[str, float]] = ()
    """See `StageContext.report`."""


@dataclass(frozen=True)
class Status:
    """What the store holds at an address."""

    state: Literal["complete", "spoilt", "partial", "absent"]
    """spoilt: there is a manifest, but it cannot be read, or files are missing or changed. partial: an unfinished
    run can go on."""
    manifest: Mapping[str, Any] | None = None
    progress: Progress | None = None
    problems: tuple[str, ...] = ()
    """What is wrong with a spoilt artifact, a sentence for each file."""


def now() -> str:
    """The time in UTC, as manifests say it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store:
    """Artifacts by address. Cheap to make, picklable; keeps no state but a cache of verified files.

    Args:
        root: a path or a URI that pyarrow knows (`s3://bucket/runs`).
        filesystem: a pyarrow file system in which `root` is a path, instead of one found by URI.
        cache: where artifacts of a remote store are kept on this node; None: in the temporary folder.
    """

    def __init__(self, root: str, filesystem: fs.FileSystem | None = None, cache: str | None = None) -> None:
        self.root = root if filesystem is not None or "://" in root else str(Path(root).expanduser().absolute())
        self._filesystem = filesystem
        self._cache = cache

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_filesystem": self._filesystem, "_cache": self._cache}

    @cached_property
    def folders(self) -> Folders:
        """The file system underneath."""
        return open_folders(self.root, self._filesystem, Path(self._cache) if self._cache else None)

    @property
    def filesystem(self) -> fs.FileSystem | None:
        """The file system that it was given; None: the one that `root` names."""
        return self._filesystem

    @property
    def is_local(self) -> bool:
        """Whether artifacts are read in place."""
        return self.folders.is_local

    # Reading

    def status(self, address: str, verify: bool = False) -> Status:
        """What there is at an address. Sizes are always compared; with `verify`, contents too."""
        manifest = self._read_json(f"{address}/{MANIFEST}")
        if manifest is None and MANIFEST in self.folders.names(address):
            return Status("spoilt", problems=(f"{MANIFEST} cannot be read",))
        if manifest is None:
            progress = self.progress(address)
            begun = progress is not None or bool(self.folders.names(f"{partial(address)}/checkpoint"))
            return Status("partial" if begun else "absent", progress=progress)
        problems = wrong_sizes(from_json(manifest["files"]), self.folders.sizes(address))
        if verify and not problems:
            problems = self._wrong_contents_now(address, manifest)
        return Status("spoilt" if problems else "complete", manifest, problems=tuple(problems))

    def manifest(self, address: str) -> Mapping[str, Any]:
        """The manifest of a complete artifact.

        Raises:
            ArtifactError: there is none.
        """
        manifest = self._read_json(f"{address}/{MANIFEST}")
        if manifest is None:
            raise ArtifactError(
                f"Artifact `{address}` is not complete in the store `{self.root}`: it has no manifest, or "
                f"its manifest cannot be read. Run its recipe again."
            )
        return manifest

    def open(self, address: str) -> Path:
        """A local folder with a complete artifact whose files were all compared with their hashes; read only.

        Raises:
            ArtifactError: it is not complete, or a file is missing or changed.
        """
        manifest = self.manifest(address)
        files = from_json(manifest["files"])
        if problems := wrong_sizes(files, self.folders.sizes(address)):
            raise self._spoilt(address, problems)  # before anything is copied that is not there
        folder = self._fetch(address, manifest)
        problems = wrong_contents(files, folder)
        if problems and not self.is_local:
            shutil.rmtree(folder)  # perhaps only the copy on this node is spoilt
            folder = self._fetch(address, manifest)
            problems = wrong_contents(files, folder)
        if problems:
            raise self._spoilt(address, problems)
        return folder

    def progress(self, address: str) -> Progress | None:
        """What the worker of an unfinished stage last reported."""
        found = self._read_json(f"{partial(address)}/progress.json")
        return None if found is None else Progress(**found)

    def waits(self, address: str) -> str:
        """Why an unfinished stage waits for a node; empty if it does not."""
        found = self._read_json(f"{partial(address)}/waits.json")
        return "" if found is None else found["reason"]

    def is_withdrawn(self, address: str) -> bool:
        """Whether an unfinished stage is not wanted any more."""
        return self.folders.read(f"{partial(address)}/{_WITHDRAWN}") is not None

    def attempts(self, address: str) -> list[dict[str, Any]]:
        """Every try so far at an unfinished stage: started, ended, outcome, where."""
        found = self._read_json(f"{partial(address)}/attempts.json")
        return [] if found is None else found["attempts"]

    def lost_steps(self, address: str, started: str) -> int:
        """Steps that the attempt that began then had reported, and that no checkpoint holds: to be done again.

        At least so many: reports come about a second apart. 0 where a library keeps the checkpoints (`durable`).
        """
        progress = self.progress(address)
        if progress is None or progress.time < datetime.fromisoformat(started).timestamp():
            return 0  # it reported nothing; what is there is another one's
        kept = self.checkpoints(address).newest_step()
        if kept is None and self.folders.names(f"{partial(address)}/durable"):
            return 0
        return max(0, progress.step - (kept or 0))

    def addresses(self) -> dict[str, list[str]]:
        """The addresses of all artifacts, by stage name."""
        by_name: dict[str, list[str]] = {}
        for entry in self.folders.names(""):
            if match := _ADDRESS.fullmatch(entry):
                by_name.setdefault(match["name"], []).append(entry)
        return by_name

    def unfinished(self) -> list[str]:
        """The addresses at which unfinished work lies."""
        return self.folders.names(_PARTIAL)

    def seconds(self, names: Iterable[str]) -> dict[str, float]:
        """How long stages of these names took, the longest artifact of each counting; unknown ones left out."""
        known = self.addresses()
        took: dict[str, float] = {}
        for name in set(names) & known.keys():
            manifests = [self._read_json(f"{address}/{MANIFEST}") for address in known[name]]
            times = [float(manifest["seconds"]) for manifest in manifests if manifest is not None]
            if times:
                took[name] = max(times)
        return took

    def checkpoints(self, address: str) -> StoreCheckpoints:
        """The checkpoints of an unfinished stage."""
        return StoreCheckpoints(self.folders, f"{partial(address)}/checkpoint", address)

    # Writing

    def durable(self, address: str) -> str:
        """Path or URI below which a library may keep checkpoints of an unfinished stage; it goes with `commit`."""
        path = f"{partial(address)}/durable"
        return self.folders.where(path)

    def scratch(self, address: str) -> Path:
        """A new empty local folder, in which an artifact is prepared before `commit`."""
        return self.folders.scratch(partial(address))

    def say_progress(self, address: str, progress: Progress) -> None:
        """Write `progress.json`, whole."""
        self._write_json(f"{partial(address)}/progress.json", asdict(progress))

    def say_waits(self, address: str, reason: str) -> None:
        """Say why a stage waits for a node; empty: it waits no longer."""
        if reason:
            self._write_json(f"{partial(address)}/waits.json", {"reason": reason, "since": now()})
        else:
            self.folders.delete(f"{partial(address)}/waits.json")

    def say_withdrawn(self, address: str, is_withdrawn: bool) -> None:
        """Say that an unfinished stage is not wanted any more, or that it is; its worker looks now and then."""
        if is_withdrawn:
            self._write_json(f"{partial(address)}/{_WITHDRAWN}", {"since": now()})
        else:
            self.folders.delete(f"{partial(address)}/{_WITHDRAWN}")

    def say_attempts(self, address: str, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Write `attempts.json`, whole."""
        self._write_json(f"{partial(address)}/attempts.json", {"attempts": list(attempts)})

    def end_attempt(self, address: str, outcome: str, message: str = "") -> int:
        """Say how the attempt that is still open ended, if one is; gives the steps that it lost (`lost_steps`)."""
        attempts = self.attempts(address)
        if not attempts or attempts[-1]["ended"] is not None:
            return 0
        lost = self.lost_steps(address, attempts[-1]["started"])
        attempts[-1].update(ended=now(), outcome=outcome, message=message, lost_steps=lost)
        self.say_attempts(address, attempts)
        return lost

    def commit(self, address: str, prepared: Path, manifest: Mapping[str, Any]) -> Metrics:
        """Make a prepared folder the artifact at an address, and forget the unfinished work.

        `files` is added to the manifest. If the artifact became complete meanwhile, that one stays.

        Returns:
            The metrics of the artifact that is now there.

        Raises:
            StoreError: the store cannot be written, or the manifest holds a NaN or an infinity, which JSON has not;
                the prepared folder is left.
            ArtifactError: the manifest that is now there cannot be read; the unfinished work is left.
        """
        # A result that is no number is no result: null would only fail later, where it is read.
        if problems := _not_finite(manifest):
            raise StoreError(
                f"Artifact `{address}` was not committed, as what it measured is not finite: {'; '.join(problems)}. "
                f"Look for what its stage divides by or takes the mean of; its checkpoints are kept."
            )
        try:
            if self._read_json(f"{address}/{MANIFEST}") is None:
                files = {name: digest.as_json() for name, digest in digests(prepared, skip=[MANIFEST]).items()}
                (prepared / MANIFEST).write_bytes(_as_json({**manifest, "files": files}))
                self.folders.put(prepared, address, last=MANIFEST)  # unless another one came in between
            else:
                logger.warning("Artifact %s was complete before this worker was done; the first one stays", address)
            metrics = self.manifest(address)["metrics"]  # read back, before checkpoints go
            self.folders.delete(partial(address))
        except OSError as error:
            raise StoreError(f"{why(error, self.root)} Artifact `{address}` was not committed.") from error
        return metrics

    def quarantine(self, address: str, reason: str) -> None:
        """Move an artifact out of the way, so that it is made anew."""
        target = f".quarantine/{address}.{datetime.now(UTC):%Y%m%dT%H%M%S}.{uuid.uuid4().hex[:6]}"
        self.folders.move(address, target)
        logger.warning("Artifact %s is spoilt (%s); moved to %s/%s and made anew", address, reason, self.root, target)

    def forget_scratch(self, address: str) -> None:
        """Delete what dead workers left half-prepared, as far as this node sees it; checkpoints stay."""
        self.folders.forget_scratch(partial(address))

    def forget_unfinished(self, address: str) -> None:
        """Delete the unfinished work of a complete artifact, left by a kill between the last two lines of a commit."""
        self.folders.delete(partial(address))

    def drop(self, address: str) -> None:
        """Delete an artifact and its unfinished work."""
        self.folders.delete(address)
        self.folders.delete(partial(address))

    def probe(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StoreError: that did not work, or there is next to no space.
        """
        path, data = f".probe-{uuid.uuid4().hex[:8]}", os.urandom(4096)
        try:
            self.folders.write(path, data)
            found = self.folders.read(path)
            self.folders.delete(path)
            free = self.folders.free_bytes()
        except OSError as error:
            raise StoreError(why(error, self.root)) from error
        if found != data:
            raise StoreError(f"The store `{self.root}` did not give back what was just written to it.")
        if free is not None and free < _MINIMUM_FREE_BYTES:
            raise StoreError(
                f"The store `{self.root}` has {free / 1e6:.0f} MB of space left, "
                f"at least {_MINIMUM_FREE_BYTES / 1e6:.0f} MB are needed. Free some or choose another folder."
            )

    def _fetch(self, address: str, manifest: Mapping[str, Any]) -> Path:
        return self.folders.fetch(address, manifest["files"], version=str(manifest["ended"]).replace(":", ""))

    def _wrong_contents_now(self, address: str, manifest: Mapping[str, Any]) -> list[str]:
        """What is wrong with the files that the store has, whatever copy of them this node has."""
        files = from_json(manifest["files"])
        if self.is_local:
            return wrong_contents(files, self._fetch(address, manifest))
        copy = self.folders.fetch(address, files, version=f"verified-{uuid.uuid4().hex[:8]}")
        try:
            return wrong_contents(files, copy)
        finally:
            shutil.rmtree(copy)

    def _spoilt(self, address: str, problems: Sequence[str]) -> ArtifactError:
        return ArtifactError(
            f"Artifact `{address}` in the store `{self.root}` is spoilt: {'; '.join(problems)}. "
            f"Run its recipe again: the artifact will be put in quarantine and made anew."
        )

    def _read_json(self, path: str) -> dict[str, Any] | None:
        data = self.folders.read(path)
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            logger.warning("%s/%s is not JSON; taken for absent", self.root, path)
            return None

    def _write_json(self, path: str, value: Mapping[str, Any]) -> None:
        try:
            self.folders.write(path, _as_json(value))
        except OSError as error:
            raise StoreError(why(error, self.root)) from error


def partial(address: str) -> str:
    """Where the unfinished work of an address is."""
    return f"{_PARTIAL}/{address}"


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _not_finite(value: Any, at: str = "") -> list[str]:
    """A phrase for each NaN or infinity in a JSON value."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"{at} is {value}"]
    if isinstance(value, Mapping):
        entries = list(value.items())
    else:
        entries = list(enumerate(value)) if isinstance(value, list | tuple) else []
    return [found for key, entry in entries for found in _not_finite(entry, f"{at}.{key}" if at else str(key))]
