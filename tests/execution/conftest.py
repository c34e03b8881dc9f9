"""Stores to test against, and toy stages that drivers, workers and tests import by name."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Toy stages are a module of their own, because Ray's workers and drivers in other processes import it too.
sys.path.insert(0, str(Path(__file__).parent))

from toy import remote_store

from m2mkd_ray.execution import Store
from m2mkd_ray.execution.ray_launcher import RayLauncher


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on the local disk."""
    return Store(str(tmp_path / "store"))


@pytest.fixture(params=["local", "remote"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on the local disk, then one behind a pyarrow file system that is not the local one."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return remote_store(tmp_path)


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[Store], Path]:
    """Where a store's files really lie, to spoil them."""
    return lambda store: Path(store.root) if store.is_local else tmp_path / "bucket" / "store"


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of a driver in a process of its own: it finds the toy stages, and Ray is quiet."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def short_folder() -> Iterator[str]:
    """A short path: sockets in it have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def launcher(short_folder: str) -> Iterator[RayLauncher]:
    """One local Ray of two cores for all tests of a file that need no more."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # its workers find the toy stages
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    launcher = RayLauncher(num_cpus=2, temp_dir=short_folder)
    yield launcher
    launcher.close()
    patch.undo()
