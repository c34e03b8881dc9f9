"""Folders on a node's own disk that a killed process leaves to its successor to remove.

For what is only on its way: parts that are uploaded next, checkpoints that were fetched.
A folder of the system's with a random name would stay for ever when its process is killed.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_folder(durable: str, name: str) -> Iterator[Path]:
    """An empty folder on this node's disk for a process of a stage; it is removed at the end.

    What a killed process left is removed by the next one of the same stage and name on the node, so at most one may
    run at a time.

    Args:
        durable: the stage's place in the store (`StageContext.durable`), which tells it from all others.
        name: which process of the stage it is for: `rank-0`.
    """
    stage = hashlib.sha256(durable.encode()).hexdigest()[:12]
    parent = Path(tempfile.gettempdir()) / f"m2mkd-scratch-{os.getuid()}"
    for left in parent.glob(f"{stage}-{name}.*"):
        shutil.rmtree(left, ignore_errors=True)  # one that was thought to be dead may remove it too
    folder = parent / f"{stage}-{name}.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
