"""One driver per artifact: a living one is respected, a dead one is not waited for."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ray.errors import LockedError
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.locks import Locks, owner_of

ADDRESS = "stage-0123456789ab"
HOLD = """
import sys, time
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.locks import Locks
with Locks(Store(sys.argv[1])) as locks:
    locks.acquire(["stage-0123456789ab"])
    print("held", flush=True)
    time.sleep(60)
"""


def other_driver(store: Store) -> subprocess.Popen[str]:
    """A living driver in a process of its own, which holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def rewrite(store: Store, **changes: Any) -> None:
    """Change what a lock's file says."""
    file = Path(store.root) / ".locks" / ADDRESS
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_living_driver_is_respected_and_a_killed_one_is_not(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with other_driver(store) as process, Locks(store) as locks:
        owner = owner_of(store, ADDRESS)
        assert owner is not None
        assert owner.pid == process.pid
        with pytest.raises(LockedError, match=rf"computing `{ADDRESS}`: pid {process.pid} of .*`kill {process.pid}`"):
            locks.acquire(["another-0123456789ab", ADDRESS])
        assert owner_of(store, "another-0123456789ab") is None  # all or none
        process.kill()
        process.wait()
        locks.acquire([ADDRESS])
        taken = owner_of(store, ADDRESS)
        assert taken is not None
        assert taken.pid == os.getpid()
        assert f"gone: pid {process.pid}" in caplog.text
    assert owner_of(store, ADDRESS) is None


def test_a_reused_pid_is_not_the_driver(any_store: Store) -> None:
    with Locks(any_store) as dead, Locks(any_store) as locks:
        dead.acquire([ADDRESS])
        with pytest.raises(LockedError):
            locks.acquire([ADDRESS])
        path = f".locks/{ADDRESS}"
        owner = json.loads(any_store.folders.read(path) or b"")
        any_store.folders.write(path, json.dumps({**owner, "process_start": "1"}).encode())
        locks.acquire([ADDRESS])


@pytest.mark.parametrize(("age_s", "is_free"), [(60, False), (121, True)])
def test_a_driver_elsewhere_is_gone_after_two_silent_minutes(store: Store, age_s: float, is_free: bool) -> None:
    with Locks(store) as elsewhere, Locks(store) as locks:
        elsewhere.acquire([ADDRESS])
        rewrite(store, machine="another", pid=1, heartbeat=time.time() - age_s)
        if is_free:
            locks.acquire([ADDRESS])
        else:
            with pytest.raises(LockedError, match="last heard of 60 s ago"):
                locks.acquire([ADDRESS])


def test_a_lock_that_was_never_filled_is_taken_over(store: Store) -> None:
    store.folders.write(f".locks/{ADDRESS}", b"")
    with Locks(store) as locks:
        locks.acquire([ADDRESS])


def test_of_many_who_want_a_stale_lock_one_gets_it(store: Store) -> None:
    for _ in range(8):
        with Locks(store) as dead:
            dead.acquire([ADDRESS])
            rewrite(store, process_start="1")
            drivers = [Locks(store) for _ in range(8)]

            def gets_it(locks: Locks) -> bool:
                try:
                    locks.acquire([ADDRESS])
                except LockedError:
                    return False
                return True

            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(gets_it, drivers)) == 1
            store.folders.delete(f".locks/{ADDRESS}")


def test_a_driver_that_was_paused_learns_that_it_lost_its_locks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.locks.HEARTBEAT_S", 0.01)
    with Locks(store) as paused:
        paused.acquire([ADDRESS])
        paused.check()
        with paused._guard:  # its heartbeat stands still
            rewrite(store, heartbeat=0)
            other = Locks(store)
            other.acquire([ADDRESS])
        deadline = time.monotonic() + 5
        while not paused._lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LockedError, match="another one took over stage-0123456789ab"):
            paused.check()
    assert owner_of(store, ADDRESS) is not None  # the other's lock is left alone


def test_a_lock_that_was_lost_is_not_held_even_before_the_next_heartbeat(store: Store) -> None:
    with Locks(store) as paused, Locks(store) as other:
        paused.acquire([ADDRESS])
        assert paused.holds(ADDRESS)
        rewrite(store, heartbeat=0)
        other.acquire([ADDRESS])
        assert not paused.holds(ADDRESS)
        assert other.holds(ADDRESS)


def test_locks_that_cannot_be_given_back_hide_no_error(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    file = Path(store.root) / ".locks" / ADDRESS

    def fail() -> None:
        with Locks(store) as locks:
            locks.acquire([ADDRESS])
            file.unlink()
            file.mkdir()  # reading it is an error of the system from now on
            raise ValueError("the real one")

    with pytest.raises(ValueError, match="the real one"):
        fail()
    assert "could not be given back" in caplog.text


def test_heartbeats_are_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.locks.HEARTBEAT_S", 0.01)
    with Locks(store) as locks:
        locks.acquire([ADDRESS])
        first = owner_of(store, ADDRESS)
        time.sleep(0.1)
        second = owner_of(store, ADDRESS)
    assert first is not None
    assert second is not None
    assert second.heartbeat > first.heartbeat
    assert second.since == first.since
