"""One driver per artifact: who computes it says so in the store.

A lock is the file `.locks/<address>` with the driver's id, host, pid and start of
its process, and a heartbeat. A lock outlives a driver that was killed, so it is
stale, and may be taken over, when its process is gone (seen only on the same
machine; the process's start tells a reused pid apart) or its last heartbeat is
older than two minutes. On file systems without exclusive creation (object stores)
two drivers that start in the same instant may both believe to hold a lock; they
then compute the same thing twice, and the store keeps the first.
"""

import getpass
import json
import logging
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from m2mkd_ray.errors import LockedError
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
STALE_S = 120.0
_TRIES = 50
_TRY_EVERY_S = 0.1
_TAKEOVER = ".takeover"


@dataclass(frozen=True)
class Owner:
    """A driver, as its locks name it."""

    driver: str
    """Random id of the driver."""
    user: str
    host: str
    machine: str
    """Tells machines (and process namespaces) of the same host name apart."""
    pid: int
    process_start: str | None
    """Start of the driver's process, which tells a reused pid apart."""
    since: float
    """When the lock was taken, in seconds since 1970."""
    heartbeat: float
    """When the driver last said that it lives."""


def is_stale(owner: Owner) -> bool:
    """Whether a lock's driver is gone for certain, or has been silent for two minutes."""
    if owner.machine == _machine() and _process_start(owner.pid) != owner.process_start:
        return True
    return time.time() - owner.heartbeat > STALE_S


def owner_of(store: Store, address: str) -> Owner | None:
    """The living driver that computes an address, or None."""
    owner = _read(store, address)
    return None if owner is None or is_stale(owner) else owner


class Locks:
    """The locks that this driver holds; a context that releases them all at its end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._driver = uuid.uuid4().hex[:12]
        self._held: dict[str, Owner] = {}
        self._lost: list[str] = []
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="m2mkd-locks", daemon=True)

    def __enter__(self) -> "Locks":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.release(list(self._held))
        except OSError as problem:  # it must not hide what ended the block
            logger.warning("Locks could not be given back (%s); they are stale once this process is gone", problem)

    def acquire(self, addresses: Iterable[str]) -> None:
        """Take the locks of all addresses, or of none.

        Raises:
            LockedError: another living driver has one of them.
        """
        taken: list[str] = []
        try:
            for address in sorted(set(addresses) - self._held.keys()):
                self._take(address)
                taken.append(address)
        except BaseException:
            self.release(taken)
            raise

    def release(self, addresses: Iterable[str]) -> None:
        """Give back locks, as far as they are still ours."""
        with self._guard:
            for address in addresses:
                owner = _read(self._store, address)
                if self._held.pop(address, None) is not None and owner is not None and owner.driver == self._driver:
                    self._store.folders.delete(_path(address))

    def holds(self, address: str) -> bool:
        """Whether a lock is this driver's, as the store says now: a heartbeat may not have noticed yet."""
        with self._guard:
            owner = _read(self._store, address)
            return address in self._held and owner is not None and owner.driver == self._driver

    def check(self) -> None:
        """Make sure that nobody took a lock over while this driver could not say that it lives.

        Raises:
            LockedError: somebody did.
        """
        if self._lost:
            raise LockedError(
                f"This driver was silent for more than {STALE_S:.0f} s (was it paused?) and another one took over "
                f"{', '.join(sorted(self._lost))}. Nothing is lost: wait for the other, or run again afterwards."
            )

    def _take(self, address: str) -> None:
        mine = self._as_owner(since=time.time())
        for _ in range(_TRIES):  # another driver may come between a stale lock and ours
            if self._store.folders.create(_path(address), _as_json(mine)):
                with self._guard:
                    self._held[address] = mine
                return
            theirs = _read(self._store, address)
            if theirs is not None and not is_stale(theirs):
                raise LockedError(_refusal(address, theirs))
            self._clear(address, mine)
        raise LockedError(
            f"The stale lock of `{address}` cannot be taken over, as another driver seems to be doing so. If no other "
            f"driver runs, delete `{self._store.root}/{_path(address)}` and `{_path(address)}{_TAKEOVER}`."
        )

    def _clear(self, address: str, mine: Owner) -> None:
        """Delete a stale lock. Only who holds the takeover's own lock may, so that nobody deletes a fresh one."""
        folders, takeover = self._store.folders, f"{_path(address)}{_TAKEOVER}"
        if not folders.create(takeover, _as_json(mine)):
            other = _parse(folders.read(takeover))
            if other is not None and is_stale(other):
                folders.delete(takeover)
            time.sleep(_TRY_EVERY_S)
            return
        try:
            stale = _read(self._store, address)
            if stale is None:
                time.sleep(_TRY_EVERY_S)  # released, or made but not filled yet
                stale = _read(self._store, address)
            if stale is None or is_stale(stale):
                folders.delete(_path(address))
            if stale is not None and is_stale(stale):
                seen = f"pid {stale.pid} on {stale.host}, last seen {_clock(stale.heartbeat)}"
                logger.warning("Took over the lock of %s from a driver that is gone: %s", address, seen)
        finally:
            folders.delete(takeover)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with self._guard:
                for address, mine in list(self._held.items()):
                    try:
                        self._renew(address, mine)
                    except OSError as error:
                        logger.warning("The heartbeat of the lock of %s was not written: %s", address, error)

    def _renew(self, address: str, mine: Owner) -> None:
        owner = _read(self._store, address)
        if owner is not None and owner.driver != self._driver:
            self._lost.append(address)
            del self._held[address]
            return
        self._store.folders.write(_path(address), _as_json(self._as_owner(since=mine.since)))

    def _as_owner(self, since: float) -> Owner:
        return Owner(
            driver=self._driver,
            user=_user(),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            since=since,
            heartbeat=time.time(),
        )


def _read(store: Store, address: str) -> Owner | None:
    return _parse(store.folders.read(_path(address)))


def _parse(data: bytes | None) -> Owner | None:
    """A lock's owner; None if there is none, or a driver died between making the file and filling it."""
    try:
        return None if data is None else Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _path(address: str) -> str:
    return f".locks/{address}"


def _as_json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _refusal(address: str, owner: Owner) -> str:
    return (
        f"Another driver is computing `{address}`: pid {owner.pid} of {owner.user} on {owner.host}, since "
        f"{_clock(owner.since)}, last heard of {time.time() - owner.heartbeat:.0f} s ago. Wait until it is done and "
        f"run again, or stop it (`kill {owner.pid}` on {owner.host}); its checkpoints are kept."
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"  # a container's user without an entry in the password file


def _machine() -> str:
    """Equal for two processes exactly when each can see the other's pid (on Linux)."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists():
        parts.append(boot.read_text(encoding="ascii").strip())
    if namespace.exists():
        parts.append(str(namespace.stat().st_ino))
    return "/".join(parts)


def _process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same pid; None if it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): after the name come state (field 3) and, as field 22, the start in ticks since boot.
        return None if state in "ZX" else fields[18]
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
