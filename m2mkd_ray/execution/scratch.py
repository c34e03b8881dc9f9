"""Folders on a node's own disk that a killed process leaves to its successor to remove.

For what is only on its way: parts that are uploaded next, checkpoints that were fetched.
A folder of the system's with a random name would stay for ever when its process is killed.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m2mkd_ray.errors import StoreError


def private_folder(name: str) -> Path:
    """The folder `<name>-<uid>` below the temporary folder, to which only this user may write; made if need be.

    Everybody may make folders there, so it may be another user's, who could read and change what we put into it.

    Raises:
        StoreError: what has the name is a link, no folder, another user's, or one that others may write to.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):  # then it is looked at, as one that was made just now is
        folder.mkdir(mode=0o700)
    if (found := _what_others_may_change(folder)) is not None:
        raise StoreError(
            f"The folder {folder} is to hold files of this user (uid {os.getuid()}), but {found}. Expected: a folder "
            f"of uid {os.getuid()} to which nobody else may write (`drwx------`), or nothing, as it is made then. "
            f"Have it removed, or set TMPDIR to a folder of your own."
        )
    return folder


def _what_others_may_change(folder: Path) -> str | None:
    about = folder.lstat()
    if stat.S_ISLNK(about.st_mode):
        return f"it is a symbolic link to {os.readlink(folder)}"
    if not stat.S_ISDIR(about.st_mode):
        return "it is no folder"
    if about.st_uid != os.getuid():
        return f"it is uid {about.st_uid}'s"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (`{stat.filemode(about.st_mode)}`)"
    return None


@contextmanager
def own_folder(durable: str, name: str) -> Iterator[Path]:
    """An empty folder on this node's disk for a process of a stage; it is removed at the end.

    What a killed process left is removed by the next one of the same stage and name on the node, so at most one may
    run at a time.

    Args:
        durable: the stage's place in the store (`StageContext.durable`), which tells it from all others.
        name: which process of the stage it is for: `rank-0`.

    Raises:
        StoreError: the folder that holds all of them is not this user's alone (`private_folder`).
    """
    stage = hashlib.sha256(durable.encode()).hexdigest()[:12]
    parent = private_folder("m2mkd-scratch")
    for left in parent.glob(f"{stage}-{name}.*"):
        shutil.rmtree(left, ignore_errors=True)  # one that was thought to be dead may remove it too
    folder = parent / f"{stage}-{name}.{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
