"""Folders on a node's own disk for what is only on its way: parts to be uploaded next, checkpoints that were fetched.

A process makes them in a folder of its own, which it keeps locked (`flock`) as long as it lives. However it ends, the
lock goes with it, so whoever needs such a folder next on that node, for any stage, can tell what the dead left, and
removes it. Turned down: a folder a stage, which its next attempt removes (that may run on another node, and what the
first one had left stays); pids (containers that share a disk have the same ones).
"""

import atexit
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from m2mkd_ray.errors import StoreError

logger = logging.getLogger(__name__)

_LOCKED = "process-"
"""What the names of folders begin with whose process is dead if their lock can be had."""


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
def own_folder(name: str) -> Iterator[Path]:
    """An empty folder on this node's disk, which is removed at the end; its name begins with `name`.

    Raises:
        StoreError: the folder that holds all of them is not this user's alone (`private_folder`).
    """
    parent = process_folder(private_folder("m2mkd-scratch"))
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def process_folder(parent: Path) -> Path:
    """This process's own folder below `parent`, on the node's own disk; those of dead processes there are removed."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_what_the_dead_left(parent)
    folder = _locked_folder(parent, os.getpid())
    if not folder.is_dir():  # somebody cleaned up, and took it for old
        _locked_folder.cache_clear()
        folder = _locked_folder(parent, os.getpid())
    return folder


@cache
def _locked_folder(parent: Path, pid: int) -> Path:
    """Made once a process; `pid` tells a forked one from its parent."""
    hidden = Path(tempfile.mkdtemp(prefix=".", dir=parent))
    descriptor = os.open(hidden, os.O_RDONLY)  # stays open: the lock goes with it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        logger.warning("%s cannot be locked (%s); if this process is killed, what it has there stays", hidden, error)
        folder = hidden
    else:
        folder = hidden.rename(parent / f"{_LOCKED}{pid}-{hidden.name[1:]}")
    atexit.register(_remove_own, folder, pid)
    return folder


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked process does at its end what its parent meant for its own
        shutil.rmtree(folder, ignore_errors=True)  # what is left, the next process removes


def _remove_what_the_dead_left(parent: Path) -> None:
    for folder in parent.glob(f"{_LOCKED}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # someone else was faster
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now, the next one tries
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(descriptor)
