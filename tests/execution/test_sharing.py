"""Streams on a real Ray: made once a node whoever reads, and the same whatever dies or falls behind."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from streamed import FLOATS, Maker, Read, Reader, digest
from toy import is_alive

from m2mkd_ray.execution.sharing import Hub, Sharing, shared_stream, start_hub

STEP_BYTES = 4 * FLOATS + 8
SMALL = {"window_bytes": 1, "gather_s": 1.5}
"""A window of two steps, the fewest."""
WITHIN_S = 120
"""After which what is waited for will not come: other tests may have the machine too."""


@pytest.fixture(scope="module")
def connection(short_folder: str) -> Iterator[Any]:
    """One local Ray for all tests of this file but the last."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 200_000_000}
    yield ray.init(address="local", num_cpus=2, _temp_dir=short_folder, **settings)
    WARM.clear()
    ray.shutdown()
    patch.undo()


@pytest.fixture
def hub_of(connection: Any) -> Iterator[Callable[..., Hub]]:
    """Start hubs that end with the test."""
    hubs = []

    def start(**settings: Any) -> Hub:
        hubs.append(start_hub(Sharing(**settings)))
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.end()


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


WARM: list[Any] = []
"""Readers of earlier tests, since a process takes longer to start than what most tests read."""


def readers(count: int) -> list[Any]:
    """Actors of their own processes, started; those of earlier tests that still live."""
    WARM[:] = [one for one in WARM if is_there(one)]
    WARM.extend(new_readers(count - len(WARM)))
    return WARM[:count]


def new_readers(count: int, node_id: str | None = None) -> list[Any]:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    actor = ray.remote(Reader).options(num_cpus=0, max_concurrency=2, scheduling_strategy=where)
    some = [actor.remote() for _ in range(count)]
    ray.get([one.start_anew.remote() for one in some])
    return some


def is_there(reader: Any) -> bool:
    """Whether a reader lives; it has read nothing then."""
    try:
        ray.get(reader.start_anew.remote())
    except ray.exceptions.ActorDiedError:
        return False
    return True


def read(some: list[Any], hub: Hub, maker: Maker, stop: int, sleeps: Mapping[int, float] = {}) -> list[list[Read]]:
    return ray.get([one.read.remote(hub, maker, 0, stop, sleeps) for one in some], timeout=WITHIN_S)


def is_as_alone(seen: list[Read], maker: Maker, start: int, stop: int) -> bool:
    """Whether the steps have the bytes that the maker gives without any of this."""
    rng = np.random.default_rng
    expected = [digest((rng(step).random(FLOATS, dtype=np.float32), np.array([step]))) for step in range(start, stop)]
    return [one.digest for one in seen] == expected


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def streams(hub: Hub) -> list[Any]:
    return [stream for _, stream in ray.get(hub.actor.streams.remote())]


@pytest.mark.ray
@pytest.mark.parametrize("count", [1, 4])
def test_every_step_is_made_once_whatever_the_number_of_readers(
    count: int, hub_of: Callable[..., Hub], maker: Maker
) -> None:
    hub = hub_of(window_bytes=6 * STEP_BYTES)
    for seen in read(readers(count), hub, maker, 40):
        assert is_as_alone(seen, maker, 0, 40)
        assert not any(one.is_own or one.is_copy or one.is_writeable for one in seen)
    assert [len(maker.calls(step)) for step in range(40)] == [1] * 40
    assert len(maker.calls()) == 40
    counts = hub.counts()
    assert (counts.made, counts.handed, counts.let_go) == (40, 40 * count, 0)
    assert 4 * STEP_BYTES <= counts.peak_bytes <= 6 * STEP_BYTES


@pytest.mark.ray
def test_a_stream_ends_with_its_last_reader_and_what_was_read_stays(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of()
    node = ray.get_runtime_context().get_node_id()
    kept = [made.arrays for made in shared_stream(hub, node, "key", maker, 3, 9, "here")]
    wait_for(lambda: not streams(hub))
    assert [digest(arrays) for arrays in kept] == [digest(maker.make(step)) for step in range(3, 9)]
    stops_early = shared_stream(hub, node, "key", maker, 0, 9, "here")
    next(stops_early)
    assert len(streams(hub)) == 1
    stops_early.close()
    wait_for(lambda: not streams(hub))


@pytest.mark.ray
def test_the_fastest_waits_for_the_slowest_at_the_windows_end(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(**SMALL, prefetch=1)
    slow, fast = readers(2)
    waits = slow.read.remote(hub, maker, 0, 30, {5: 5.0})
    goes = fast.read.remote(hub, maker, 0, 30, {})
    wait_for(lambda: ray.get(slow.at.remote()) == 5)
    time.sleep(1.0)
    assert ray.get(fast.at.remote()) <= 5 + 1 + 2
    assert len(maker.calls()) <= 5 + 2 + 2
    for seen in ray.get([waits, goes], timeout=WITHIN_S):
        assert is_as_alone(seen, maker, 0, 30)
        assert not any(one.is_own for one in seen)
    assert len(maker.calls()) == 30
    assert hub.counts().peak_bytes <= 3 * STEP_BYTES


@pytest.mark.ray
def test_a_reader_that_is_silent_too_long_is_let_go_and_makes_its_own(
    hub_of: Callable[..., Hub], maker: Maker
) -> None:
    hub = hub_of(**SMALL, patience_s=1.5)
    slow, fast = readers(2)
    silent = slow.read.remote(hub, maker, 0, 60, {5: 4.0})
    goes = fast.read.remote(hub, maker, 0, 60, {}, 0.15)
    seen_slow, seen_fast = ray.get([silent, goes], timeout=WITHIN_S)
    assert hub.counts().let_go >= 1
    own = [one.step for one in seen_slow if one.is_own]
    assert own
    assert own[0] > 5
    assert len(own) < 30  # it finds a stream again
    assert not any(one.is_own for one in seen_fast)
    assert is_as_alone(seen_slow, maker, 0, 60)
    assert is_as_alone(seen_fast, maker, 0, 60)


@pytest.mark.ray
def test_those_who_come_as_late_share_a_stream_of_their_own(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(window_bytes=1, gather_s=1.0)
    first, *late = readers(3)
    goes = first.read.remote(hub, maker, 0, 60, {}, 0.1)
    wait_for(lambda: ray.get(first.at.remote()) >= 12)
    for seen in [*read(late, hub, maker, 30), ray.get(goes)]:
        assert is_as_alone(seen, maker, 0, len(seen))
        assert not any(one.is_own for one in seen)
    assert [len(maker.calls(step)) for step in range(60)] == [2] * 30 + [1] * 30


@pytest.mark.ray
def test_those_who_start_a_little_apart_share_all_of_it(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(window_bytes=1, gather_s=2.0)
    first, second = readers(2)
    goes = first.read.remote(hub, maker, 0, 20, {})
    time.sleep(1.0)
    read([second], hub, maker, 20)
    ray.get(goes)
    assert len(maker.calls()) == 20


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_a_stream_that_dies_is_replaced_and_all_go_on_from_their_step(
    how: str, hub_of: Callable[..., Hub], maker: Maker
) -> None:
    hub = hub_of(**SMALL)
    some = readers(3)
    reading = [one.read.remote(hub, maker, 0, 40, {}, 0.05) for one in some]
    wait_for(lambda: ray.get(some[0].at.remote()) >= 10)
    (stream,) = streams(hub)
    if how == "ray.kill":
        ray.kill(stream)
    else:
        os.kill(ray.get(stream.pids.remote())[0], signal.SIGKILL)
    for seen in ray.get(reading, timeout=WITHIN_S):
        assert is_as_alone(seen, maker, 0, 40)
        assert not any(one.is_own for one in seen)
    # Made again: at most the window and what was in hand.
    assert len(maker.calls()) <= 40 + 4 + 4
    assert len(maker.calls(39)) == 1


@pytest.mark.ray
@pytest.mark.chaos
def test_a_hand_that_dies_is_replaced_and_no_step_is_lost(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(**SMALL)
    some = readers(2)
    reading = [one.read.remote(hub, maker, 0, 40, {}, 0.1) for one in some]
    wait_for(lambda: ray.get(some[0].at.remote()) >= 10)
    (hand,) = {call.name.split("-")[1] for call in maker.calls()}
    os.kill(int(hand), signal.SIGKILL)
    for seen in ray.get(reading, timeout=WITHIN_S):
        assert is_as_alone(seen, maker, 0, 40)
        assert not any(one.is_own for one in seen)
    assert hub.counts().made == 40
    assert 40 <= len(maker.calls()) <= 41  # what it was making is begun again


@pytest.mark.ray
def test_several_hands_make_steps_at_the_same_time(hub_of: Callable[..., Hub], tmp_path: Path) -> None:
    maker = Maker(tmp_path, sleep_s=0.3)
    hub = hub_of(hands=3)
    (seen,) = read(readers(1), hub, maker, 30)
    assert is_as_alone(seen, maker, 0, 30)
    assert not any(one.is_own for one in seen)
    assert len(maker.calls()) == 30
    assert len({call.name.split("-")[1] for call in maker.calls()}) == 3
    assert seen[-1].at - seen[8].at < 0.5 * 0.3 * 21


@pytest.mark.ray
def test_there_are_as_many_hands_as_any_reader_asks_for(hub_of: Callable[..., Hub], tmp_path: Path) -> None:
    maker = Maker(tmp_path, sleep_s=0.3)
    hub, node = hub_of(gather_s=0.1, window_bytes=1), ray.get_runtime_context().get_node_id()

    def hands() -> set[str]:
        return {call.name.split("-")[1] for call in maker.calls()}

    first = shared_stream(hub, node, "key", maker, 0, 60, "first", 2)
    steps = [digest(next(first).arrays) for _ in range(9)]
    assert len(hands()) == 2
    second = shared_stream(hub, node, "key", maker, 14, 60, "second", 4)  # who comes later asks for more
    assert not next(second).is_own
    steps += [digest(next(first).arrays) for _ in range(9, 15)]
    for step, pair in enumerate(zip(first, second), 15):
        assert digest(pair[0].arrays) == digest(pair[1].arrays)
        assert not any(one.is_own for one in pair)
        if step == 30:
            break
    assert len(hands()) == 4
    assert len(streams(hub)) == 1
    rng = np.random.default_rng
    assert steps == [digest((rng(step).random(FLOATS, dtype=np.float32), np.array([step]))) for step in range(15)]
    first.close()
    second.close()


@pytest.mark.ray
@pytest.mark.chaos
def test_a_stream_that_is_stuck_is_replaced_and_holds_up_nobody_who_joins(
    hub_of: Callable[..., Hub], maker: Maker
) -> None:
    hub, node = hub_of(deadline_s=4.0), ray.get_runtime_context().get_node_id()
    first = shared_stream(hub, node, "key", maker, 0, 300, "first")
    next(first)
    (stuck,) = streams(hub)
    pid = ray.get(stuck.pids.remote())[0]
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    joins = hub.actor.join.remote((node, "key"), ray.cloudpickle.dumps(maker), "second", 1, 9, 0)
    assert ray.get(joins, timeout=WITHIN_S)
    assert 3.0 < time.monotonic() - began < 15.0
    (stream,) = streams(hub)
    assert stream != stuck
    wait_for(lambda: not is_alive(pid))
    assert any(not made.is_own for made in first)  # it finds the other one


@pytest.mark.ray
@pytest.mark.chaos
def test_a_reader_that_dies_holds_up_nobody_for_long(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(**SMALL, patience_s=1.0)
    some = readers(3)
    reading = [one.read.remote(hub, maker, 0, 40, {}, 0.05) for one in some]
    wait_for(lambda: ray.get(some[0].at.remote()) >= 10)
    ray.kill(some[0])
    for seen in ray.get(reading[1:], timeout=WITHIN_S):
        assert is_as_alone(seen, maker, 0, 40)
        assert max(after.at - before.at for before, after in pairwise(seen)) < 3.0
        assert not any(one.is_own for one in seen)
    assert len(maker.calls()) == 40
    assert hub.counts().let_go == 1


@pytest.mark.ray
@pytest.mark.chaos
def test_without_a_hub_readers_make_their_own(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub = hub_of(**SMALL)
    some = readers(2)
    reading = [one.read.remote(hub, maker, 0, 40, {}, 0.05) for one in some]
    wait_for(lambda: ray.get(some[0].at.remote()) >= 10)
    hub.end()
    for seen in ray.get(reading, timeout=WITHIN_S):
        assert is_as_alone(seen, maker, 0, 40)
        assert seen[-1].is_own
    (seen,) = read(readers(1), hub, maker, 5)  # and those who come after its end
    assert all(one.is_own for one in seen)


@pytest.mark.ray
@pytest.mark.chaos
def test_all_processes_of_a_hub_end_with_it(hub_of: Callable[..., Hub], maker: Maker) -> None:
    hub, node = hub_of(hands=2), ray.get_runtime_context().get_node_id()
    stream = shared_stream(hub, node, "key", maker, 0, 10, "here")
    next(stream)
    wait_for(lambda: len(maker.calls()) == 10)
    (actor,) = streams(hub)
    pids = ray.get(actor.pids.remote())
    assert len(pids) == 3
    hub.end()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
    assert sum(1 for _ in stream) == 9


@pytest.mark.ray
def test_a_stream_that_gives_nothing_is_not_waited_for(hub_of: Callable[..., Hub], tmp_path: Path) -> None:
    maker = Maker(tmp_path, hangs_at=6)
    (seen,) = read(readers(1), hub_of(deadline_s=5.0), maker, 20)
    assert is_as_alone(seen, maker, 0, 20)
    assert [one.step for one in seen if one.is_own] == list(range(6, 20))
    assert seen[-1].at - seen[5].at < 8.0  # it waits once for 5 s, not at each of 14 steps


@pytest.mark.ray
def test_what_cannot_be_made_raises_in_the_reader(hub_of: Callable[..., Hub], tmp_path: Path) -> None:
    maker = Maker(tmp_path, raises_at=3)
    node = ray.get_runtime_context().get_node_id()
    stream = shared_stream(hub_of(), node, "key", maker, 0, 10, "here")
    assert [int(next(stream).arrays[1][0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="step 3 is unlucky"):
        next(stream)


@pytest.mark.ray
def test_streams_of_other_keys_are_others(hub_of: Callable[..., Hub], tmp_path: Path) -> None:
    hub, node = hub_of(), ray.get_runtime_context().get_node_id()
    makers = [Maker(tmp_path / name) for name in ("a", "b")]
    for one in makers:
        one.folder.mkdir()
    both = [shared_stream(hub, node, one.folder.name, one, 0, 5, "here") for one in makers]
    assert all(digest(a.arrays) == digest(b.arrays) for a, b in zip(*both))
    assert [len(one.calls()) for one in makers] == [5, 5]


# Two nodes. Last, as it needs the process's connection for itself.


@pytest.mark.ray
def test_each_node_makes_every_step_once(connection: Any, short_folder: str, tmp_path: Path) -> None:
    ray.shutdown()
    head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": f"{short_folder}/two"}
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # where Cluster notes its address, whatever `temp_dir`
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        hub, maker = start_hub(), Maker(tmp_path)
        nodes = [node["NodeID"] for node in ray.nodes()]
        assert len(nodes) == 2
        some = [one for node in nodes for one in new_readers(2, node)]
        for seen in read(some, hub, maker, 20):
            assert is_as_alone(seen, maker, 0, 20)
            assert not any(one.is_own or one.is_copy for one in seen)
        assert [len(maker.calls(step)) for step in range(20)] == [2] * 20
        assert len({call.name.split("-")[1] for call in maker.calls()}) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
