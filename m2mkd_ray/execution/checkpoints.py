"""Checkpoints of a stage: whole or not there, checked before they are given back.

A checkpoint is the folder `<step>/`, zero-padded so that names sort, with a
`manifest.json` of hashes that is written last. Two are kept: if the newer was
spoilt (a full disk, a bad network), the older still is there. Elsewhere partly
uploaded checkpoints were loaded after a restart (ray-project/ray#41700).
"""

import json
import logging
import os
import shutil
import uuid
from pathlib import Path

from m2mkd_ray.execution.digests import digests, from_json, wrong_contents
from m2mkd_ray.execution.folders import Folders

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_KEPT = 2


class StoreCheckpoints:
    """The `Checkpoints` of a stage, in a folder of the store."""

    def __init__(self, folders: Folders, path: str, address: str) -> None:
        self._folders = folders
        self._path = path
        self._address = address

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint by its name alone, unchecked; None if there is none."""
        names = self._names()
        return int(names[-1]) if names else None

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint as (step, local folder to read), or None.

        Ones that are not whole are passed over, with a warning.
        """
        for name in reversed(self._names()):
            folder, problems = self._checked(name)
            if folder is not None and not problems:
                logger.info("%s resumes from step %d", self._address, int(name))
                return int(name), folder
            logger.warning(
                "Checkpoint %s of %s is not whole (%s); an older one is looked for",
                name,
                self._address,
                "; ".join(problems),
            )
        return None

    def scratch(self) -> Path:
        """See `Checkpoints`."""
        return self._folders.scratch(os.path.dirname(self._path))

    def save(self, step: int, files: Path) -> None:
        """Keep the folder `files` (it is moved) as the checkpoint of `step`; all but two go."""
        prepared = self.scratch()
        try:
            self._put(step, files, prepared, f"{self._path}/{step:012d}")
        finally:
            shutil.rmtree(prepared, ignore_errors=True)  # where putting copies, or failed
        for old in self._names()[:-_KEPT]:
            self._folders.delete(f"{self._path}/{old}")

    def _put(self, step: int, files: Path, prepared: Path, path: str) -> None:
        shutil.copytree(files, prepared, dirs_exist_ok=True, copy_function=shutil.move)
        shutil.rmtree(files)  # its folders, empty by now
        listing = {file: digest.as_json() for file, digest in digests(prepared, skip=[_MANIFEST]).items()}
        content = {"step": step, "id": uuid.uuid4().hex, "files": listing}
        (prepared / _MANIFEST).write_text(json.dumps(content), encoding="utf-8")
        if not self._folders.put(prepared, path, last=_MANIFEST):
            self._folders.delete(path)
            self._folders.put(prepared, path, last=_MANIFEST)

    def _names(self) -> list[str]:
        return [name for name in self._folders.names(self._path) if name.isdigit()]

    def _checked(self, name: str) -> tuple[Path | None, list[str]]:
        """The checkpoint's local folder, and what is wrong with it."""
        path = f"{self._path}/{name}"
        data = self._folders.read(f"{path}/{_MANIFEST}")
        if data is None:
            return None, [f"{_MANIFEST} is missing"]
        try:
            content = json.loads(data)
            files = from_json(content["files"])
        except (ValueError, KeyError, TypeError) as error:
            return None, [f"{_MANIFEST} cannot be read: {error}"]
        missing = sorted(set(files) - set(self._folders.sizes(path)))
        if missing:
            return None, [f"{name} is missing" for name in missing]
        folder = self._folders.fetch(path, files, version=content["id"])
        return folder, wrong_contents(files, folder)
