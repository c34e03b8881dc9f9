"""What a job would upload, measured before anything is sent.

Ray zips `working_dir` and sends it to the dashboard, which takes 100 MiB and answers
with "Maximum request body size exceeded" (ray #55877, #45602). By then a folder of
images has been zipped for minutes. The walk here is Ray's own, with its rules for
`.gitignore`, `.rayignore` and `excludes`, but only adds sizes up.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_ray.errors import UsageError

logger = logging.getLogger(__name__)

LIMIT_BYTES = 100 * 1024**2
"""Largest upload that the dashboard takes (ray/_private/ray_constants.py, DASHBOARD_CLIENT_MAX_SIZE)."""
_ENTRY_BYTES, _END_BYTES = 30 + 46, 22
"""A zip's headers: local and central of each entry, which both have its name; and the end (APPNOTE 4.3)."""
_MIB = 1024**2
_NAMED = 5
"""How many of the largest folders a message names."""


@dataclass(frozen=True)
class Package:
    """A folder as it would be uploaded."""

    folder: Path
    size: int = 0
    """Bytes of the zip; Ray stores files in it as they are."""
    num_files: int = 0
    by_top: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each file and folder directly in it."""


def measure(environment: Mapping[str, Any]) -> Package | None:
    """What of `working_dir` would be uploaded; None where nothing is (no `working_dir`, or a URI, or a zip).

    Raises:
        UsageError: it is no folder.
    """
    working_dir = environment.get("working_dir")
    if working_dir is None or "://" in str(working_dir) or str(working_dir).endswith(".zip"):
        return None
    folder = Path(working_dir).absolute()
    if not folder.is_dir():
        raise UsageError(f"Measuring what the job uploads: its working_dir {folder} is no folder.")
    return _measured(folder, list(environment.get("excludes") or ()))


def _measured(folder: Path, excludes: Sequence[str]) -> Package:
    # Private in Ray 2.60, to which the requirements pin it: a walk of our own would differ from what is sent.
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: Counter[str] = Counter()
    num_files = 0

    def add(path: Path) -> None:
        nonlocal num_files
        if path.is_file() or (path.is_dir() and not any(path.iterdir())):
            relative = path.relative_to(folder)
            name = relative.as_posix() + ("" if path.is_file() else "/")
            top = relative.parts[0] if relative.parts else "."
            sizes[top] += _ENTRY_BYTES + 2 * len(name.encode()) + (path.stat().st_size if path.is_file() else 0)
            num_files += path.is_file()

    ignored = _get_excludes(folder, [*get_runtime_env_default_excludes(), *excludes])
    heeds_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(folder, [ignored], add, include_gitignore=heeds_gitignore, logger=logger)
    return Package(folder, sizes.total() + _END_BYTES, num_files, dict(sizes.most_common()))


def check_size(package: Package) -> None:
    """Refuse what the dashboard would not take.

    Raises:
        UsageError: it is too large; names what takes most of the room.
    """
    if package.size < LIMIT_BYTES:
        return
    named = list(package.by_top.items())[:_NAMED]
    largest = ", ".join(f"{name} ({size / _MIB:.1f} MiB)" for name, size in named)
    raise UsageError(
        f"Uploading {package.folder} as the job's working_dir: its {package.num_files:,} files have "
        f"{package.size / _MIB:.1f} MiB, but a cluster's dashboard takes less than {LIMIT_BYTES / _MIB:.0f} MiB. "
        f"Most of it is {largest}. Data and stores belong on storage that all nodes reach; name folders that the job "
        f"does not read in `excludes` of its runtime_env or in a .rayignore, or submit from another folder."
    )
