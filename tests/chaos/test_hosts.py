"""A host that is cut off from the cluster while a pair trains on it: the pair goes on elsewhere, to the same bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import hashes, small_demo

from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.pipeline import plan

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

PAIRS = ("pair-0", "pair-1")
ALONE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""In namespaces of its own, where it may make networks; all that it starts ends with it."""
TRY = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1 && mount -t tmpfs tmpfs /run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two pairs of the small demo, trained one after another in this process."""
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    execute(plan(small_demo()), store, LocalLauncher(), until=PAIRS).raise_for_failures()
    return store


def why_not_alone() -> str:
    """Why this machine lets nobody make networks; empty if it does."""
    try:
        tried = subprocess.run([*ALONE, "sh", "-c", TRY], capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


@pytest.mark.parametrize("kind", ["networked", "stopped"])
def test_a_host_that_is_cut_off_costs_time_alone(kind: str, undisturbed: Store, tmp_path: Path) -> None:
    if kind == "networked" and (reason := why_not_alone()):
        pytest.skip(f"no network namespaces here: {reason}")
    recipe, result = small_demo(), tmp_path / "result.json"
    shutil.copytree(undisturbed.root, tmp_path / "store", ignore=shutil.ignore_patterns("pair-*", ".*"))
    store = Store(str(tmp_path / "store"))
    command = [sys.executable, str(Path(__file__).parent / "hosts.py"), kind, store.root, str(result)]
    command = [*(ALONE if kind == "networked" else ()), *command]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(result.read_text())
    first, again = found["where"]["pair-0"]
    assert found["lost"] == first != again
    assert found["retried"]["pair-0"] == "LOST"
    assert found["where"]["pair-1"][-1] != first or "pair-1" not in found["retried"]
    assert (found["again"], found["problems"]) == (1, [])  # it is back, as another node, and reaches the store
    assert hashes(store, recipe, set(PAIRS), "module.safetensors") == hashes(
        undisturbed, recipe, set(PAIRS), "module.safetensors"
    )
