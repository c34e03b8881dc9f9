"""Stores to test against, and toy stages that drivers, workers and tests import by name."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Toy stages are a module of their own, because Ray's workers and drivers in other processes import it too.
sys.path.insert(0, str(Path(__file__).parent))

from toy import remote_store

from m2mkd_ray.execution import Store


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
