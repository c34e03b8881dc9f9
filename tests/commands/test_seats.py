"""`m2mkd plan --cluster`: seats on nodes, what they come to, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ray.commands.clusters import cluster_nodes
from m2mkd_ray.commands.measuring import measure_costs
from m2mkd_ray.commands.placing import left_in, profiles
from m2mkd_ray.commands.seats import seat_problems
from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.execution import LocalLauncher, Store
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.locks import Locks
from m2mkd_ray.execution.planning.planner import ByHand, Planner, expected_s
from m2mkd_ray.execution.planning.works import ANY, Work
from m2mkd_ray.execution.store import Progress
from m2mkd_ray.models.compute import hybrid_flops

NODES = """
nodes:
  - {type: big, count: 1, gpus: 2, gpu_type: H100, cpus: 32, memory_gb: 500}
  - {type: small, count: 2, gpus: 1, gpu_type: L4, gpu_memory_gb: 24, cpus: 16, memory_gb: 64, spot: true}
"""
ON_GPUS = ("--set", "placement.pairs.resources={cpus: 4, gpus: 1}")


def write(folder: Path, text: str, name: str = "nodes.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A cluster of two types of GPU."""
    return write(tmp_path, NODES)


def test_seats_and_what_they_come_to_are_shown(m2mkd, tiny, nodes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = m2mkd("plan", tiny, *ON_GPUS, "--cluster", nodes, "--placement", "alone", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert {seat["stage"] for seat in found["seats"]} == {"pair-0", "pair-1"}
    assert found["nodes"] == ["big-0", "small-0", "small-1"]
    assert found["makespan_s"] == max(seat["ends_s"] for seat in found["seats"])
    assert found["over_bound"] == pytest.approx(found["makespan_s"] / found["lower_bound_s"])
    assert found["over_bound"] >= 1
    busy = sum(seat["ends_s"] - seat["starts_s"] for seat in found["seats"])
    assert found["device_hours"] == pytest.approx(busy / 3600)
    assert found["utilisation"] == pytest.approx(busy / (4 * found["makespan_s"]))
    table = m2mkd("plan", tiny, *ON_GPUS, "--cluster", nodes).out
    assert "makespan / bound" in table
    assert all(seat["stage"] in table for seat in found["seats"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("placement", ["given", "auto"])
def test_what_writes_teacher_logits_has_a_seat_before_its_pair(placement, m2mkd, tiny, nodes) -> None:
    cached = ("pairs.views=2", "pairs.cache={kind: float16}")
    command = ("plan", tiny, *ON_GPUS, *(part for setting in cached for part in ("--set", setting)))
    found = json.loads(m2mkd(*command, "--cluster", nodes, "--placement", placement, "--json").out)
    seats = {seat["stage"]: seat for seat in found["seats"]}
    assert set(seats) == {"logits-0", "logits-1", "pair-0", "pair-1"}
    assert all(seats[f"logits-{i}"]["ends_s"] <= seats[f"pair-{i}"]["starts_s"] + 1e-9 for i in range(2))
    assert found["over_bound"] >= 1
    if placement == "given":  # each on a device of its own, and each on the one that is free first
        blueprint = chosen(str(tiny), []).blueprint
        for i in range(2):
            seat = seats[f"logits-{i}"]
            loss = 1.02 if seat["node"].startswith("small") else 1.0  # spot nodes do some of it twice
            of_views = expected_s(hybrid_flops(blueprint, i) * 2 * 160, seat["type"])
            assert seat["ends_s"] - seat["starts_s"] == pytest.approx(of_views * loss)


def test_what_is_left_follows_from_what_was_kept(tmp_path) -> None:
    store = Store(str(tmp_path))
    left = left_in(store)
    assert left is not None
    assert left("pair-0-0") == 1
    store.say_progress("pair-0-0", Progress(60, 100, {}, 0.0, 1, "host"))
    assert left("pair-0-0") == 1  # said, but no checkpoint holds it
    parts = Path(store.durable("pair-0-0"))
    parts.mkdir(parents=True)
    (parts / "part").touch()
    assert left("pair-0-0") == pytest.approx(0.4)
    files = tmp_path / "files"
    files.mkdir()
    store.checkpoints("pair-0-0").save(30, files)
    assert left("pair-0-0") == pytest.approx(0.7)


@pytest.mark.parametrize("placement", ["given", "alone"])
def test_of_a_pair_that_has_begun_what_its_checkpoint_leaves_is_planned(
    placement, m2mkd, tiny, nodes, tmp_path
) -> None:
    store = Store(str(tmp_path / "runs"))
    command = ("plan", tiny, *ON_GPUS, "--cluster", nodes, "--placement", placement, "--store", store.root, "--json")
    before = {seat["stage"]: seat for seat in json.loads(m2mkd(*command).out)["seats"]}
    (begun,) = (stage for stage in planned(chosen(str(tiny), [])) if stage.name == "pair-0")
    store.say_progress(begun.address, Progress(90, 100, {}, 0.0, 1, "host"))
    files = tmp_path / "files"
    files.mkdir()
    store.checkpoints(begun.address).save(80, files)
    after = {seat["stage"]: seat for seat in json.loads(m2mkd(*command).out)["seats"]}
    assert after["pair-0"]["type"] == before["pair-0"]["type"]
    took = before["pair-0"]["ends_s"] - before["pair-0"]["starts_s"]
    assert after["pair-0"]["ends_s"] - after["pair-0"]["starts_s"] == pytest.approx(0.2 * took)
    assert after["pair-1"] == before["pair-1"]


def test_the_plan_of_full_size_uses_the_fast_gpus(m2mkd, nodes) -> None:
    seats = json.loads(m2mkd("plan", "vmoe_base", "--cluster", nodes, "--json").out)["seats"]
    first = [seat for seat in seats if seat["starts_s"] == 0]
    assert {seat["type"] for seat in first} <= {"H100", "L4"}
    in_cohorts = [seat for seat in first if seat["type"] == "H100"]
    assert len({frozenset({seat["address"], *seat["seat"].split(", ")[1:]}) for seat in in_cohorts}) >= 2
    pairs = [seat for seat in seats if seat["stage"].startswith("pair") and seat["recipe"] == "vmoe_base"]
    incubated = [seat for seat in seats if seat["stage"].startswith("incubate")]
    assert min(seat["starts_s"] for seat in pairs) >= max(seat["ends_s"] for seat in incubated) - 1e-6


@pytest.mark.parametrize("placement", ["auto", "given", "alone", "cohort"])
def test_every_policy_can_be_forecast(placement, m2mkd, tiny) -> None:
    ended = m2mkd("plan", tiny, "--cluster", "local", "--placement", placement, "--json")
    found = json.loads(ended.out)
    assert found["placement"] == placement
    assert found["device"] == "CPU core"
    assert found["over_bound"] >= 1 - 1e-9


def test_the_yaml_of_a_ray_cluster_is_read(m2mkd, tiny, tmp_path) -> None:
    text = """
    cluster_name: x
    max_workers: 3
    head_node_type: head
    available_node_types:
      head: {resources: {CPU: 0}}
      gpu:
        max_workers: 2
        resources: {CPU: 16, GPU: 4, "accelerator_type:A100": 1}
        node_config: {InstanceMarketOptions: {MarketType: spot}}
    """
    found = json.loads(m2mkd("plan", tiny, *ON_GPUS, "--cluster", write(tmp_path, text), "--json").out)
    assert found["nodes"] == ["gpu-0", "gpu-1"]
    assert {seat["type"] for seat in found["seats"]} == {"A100"}


def test_a_chart_is_drawn(m2mkd, tiny, nodes, tmp_path) -> None:
    chart = tmp_path / "seats.png"
    assert m2mkd("plan", tiny, *ON_GPUS, "--cluster", nodes, "--plot", chart).code == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_seats_by_hand_are_kept(m2mkd, tiny, nodes, tmp_path) -> None:
    hand = write(tmp_path, "{pair-0: {gpus: 0.5, node_type: L4}, pair-1: {node_type: L4}}", "hand.yaml")
    found = json.loads(m2mkd("plan", tiny, *ON_GPUS, "--cluster", nodes, "--placement", hand, "--json").out)
    seats = {seat["stage"]: seat for seat in found["seats"]}
    assert (seats["pair-0"]["seat"], seats["pair-0"]["type"]) == ("0.5 GPU", "L4")
    assert (seats["pair-1"]["seat"], seats["pair-1"]["type"]) == ("1 GPU", "L4")


def test_all_mistakes_of_a_placement_file_are_told_at_once(m2mkd, tiny, nodes, tmp_path) -> None:
    hand = write(
        tmp_path,
        "{pair-9: {devices: 2}, pair-0: {devices: 3, gpu: 1}, pair-1: {cohort: a, gpus: 2}, split: {node_type: T4},"
        " finetune: {devices: 7}, meta: {cohort: b}, assemble: {cohort: b, gpus: 0.5}}",
        "hand.yaml",
    )
    ended = m2mkd("plan", tiny, *ON_GPUS, "--cluster", nodes, "--placement", hand)
    assert ended.code == 2
    for said in (
        "the plan has no stage 'pair-9'; it has data,",
        "pair-0.gpu: Extra inputs are not permitted",
        "pair-1.gpus: Input should be less than or equal to 1",
        "split is to be on T4, but the nodes are of cpu",
        "finetune cannot run on 7 devices, but on 1 only",
        "assemble has more than one of devices, cohort and gpus",
        "assemble uses no GPU, so it cannot have 0.5 of one",
        "meta, assemble are no mates, so they cannot be the cohort 'b'",
    ):
        assert said in ended.err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("placement.pairs.resources={cpus: 64, gpus: 1}", "ask for 64 CPUs and 1 GPU, but no node has so much"),
        ("placement.pairs.resources={cpus: 1, gpus: 4}", "ask for 1 CPU and 4 GPUs, but no node has so much"),
        ("placement.pairs.resources={cpus: 1, memory_gb: 900}", "900 GB of memory, but no node has so much"),
    ],
)
def test_what_no_node_can_hold_is_refused_with_what_is_missing(settings, says, m2mkd, tiny, nodes) -> None:
    ended = m2mkd("plan", tiny, "--set", settings, "--cluster", nodes)
    assert ended.code == 1
    assert "pair-0, pair-1" in ended.err
    assert says in ended.err


def test_pairs_on_ranks_are_counted_by_what_each_rank_holds(m2mkd, tiny, tmp_path) -> None:
    file = write(tmp_path, "nodes: [{type: a, count: 1, cpus: 2, memory_gb: 8}]")
    on_two = ("--set", "placement.pairs.ranks=2")
    found = json.loads(m2mkd("plan", tiny, *on_two, "--cluster", file, "--placement", "given", "--json").out)
    pairs = [stage for stage in planned(chosen(str(tiny), [])) if stage.name.startswith("pair")]
    seconds = [expected_s(stage.flops, "cpu") for stage in pairs]  # on one core
    assert found["lower_bound_s"] == pytest.approx(sum(seconds) / 2)
    assert [seat["seat"] for seat in found["seats"]] == ["2 CPUs"] * 2
    too_large = "placement.pairs={ranks: 2, resources: {gpus: 1}}"
    ended = m2mkd("plan", tiny, "--set", too_large, "--cluster", file, "--placement", "given")
    assert ended.code == 1
    assert "pair-0 asks for a device, but the nodes have none that it could use" in ended.err


def test_pairs_that_ask_for_nothing_are_refused(m2mkd, tiny, nodes) -> None:
    ended = m2mkd("plan", tiny, "--set", "placement.pairs.resources={cpus: 0}", "--cluster", nodes)
    assert ended.code == 1
    assert "ask for no CPU cores, GPUs or memory cannot be planned" in ended.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{node: []}", "has neither `nodes:`"),
        ("nodes: []", "does not describe nodes"),
        ("nodes: [{type: a, cpus: 0, gpu: 2}]", "nodes.0.gpu: Extra inputs"),
        ("available_node_types: {w: {max_workers: 2}}", "Node type 'w' of"),
        ("available_node_types: 3", "expected node types by name"),
    ],
)
def test_mistakes_of_a_cluster_file_are_told(text, says, m2mkd, tiny, tmp_path) -> None:
    ended = m2mkd("plan", tiny, "--cluster", write(tmp_path, text))
    assert ended.code == 2
    assert says in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cluster", "gone.yaml"), "Cannot read the cluster file gone.yaml"),
        (("--cluster", "local", "--placement", "best"), "no placement 'best'. Known: auto, given, alone, cohort"),
        (("--cluster", "local", "--placement", "gone.yaml"), "Cannot read the placement file gone.yaml"),
        (("--plot", "x.png"), "say which with --cluster"),
        (("--cluster", "local", "--plot", "gone/x.png"), "Cannot write the chart gone/x.png"),
    ],
)  # fmt: skip
def test_mistakes_of_options_are_told(arguments, says, m2mkd, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = m2mkd("plan", tiny, *arguments)
    assert ended.code == 2
    assert says in ended.err


def test_a_cohort_by_hand_that_fits_no_device_is_refused_before_the_run(m2mkd, tiny, tmp_path) -> None:
    stages = planned(chosen(str(tiny), ["placement.pairs.resources={cpus: 1, gpus: 1}"]))
    pairs = [stage for stage in stages if stage.name.startswith("pair")]
    nodes = [Node("a", {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1, "memory": 9e9})]
    by_hand = {stage.name: ByHand(cohort="x") for stage in pairs}
    planner = Planner({stage.address: Work("", {ANY: 9.0}, {ANY: 15.0}) for stage in pairs}, by_hand=by_hand)
    problems = seat_problems(pairs, nodes, planner.works(pairs, nodes, {}))
    assert len(problems) == len(pairs)
    assert all("cohort of 2 by hand, which needs 30 GB of GPU memory" in text for text in problems)


class OnNodes(LocalLauncher):
    """Runs in this process what is asked to be on a node."""

    def nodes(self) -> list[Node]:
        return [Node("a", {"CPU": 2.0, "memory": 9e9})]


def test_costs_that_another_run_measures_or_that_have_no_data_are_not_waited_for(tiny, tmp_path, caplog) -> None:
    launcher, store = OnNodes(), Store(str(tmp_path / "runs"))
    (wanted,) = profiles(planned(chosen(str(tiny), [])), launcher.nodes())
    with Locks(store) as other:
        other.acquire([wanted.address])
        measure_costs([wanted], store, launcher)
    assert "another run does it now" in caplog.text
    assert wanted.address in caplog.text
    assert store.status(wanted.address).state != "complete"

    data = wanted.needs["data"]
    gone = replace(data, config=data.config.model_copy(update={"dataset": "gone"}))
    measure_costs([replace(wanted, needs={"data": gone})], store, launcher)
    assert any(record.levelname == "ERROR" and "data failed" in record.message for record in caplog.records)
    assert f"{wanted.name} was not measured, because of data" in caplog.text


def test_a_plan_finds_what_was_measured_on_the_cores_of_a_gpu_node(m2mkd, tiny, tmp_path) -> None:
    nodes = cluster_nodes(str(write(tmp_path, NODES)))
    on_cores = planned(chosen(str(tiny), []))
    assert [stage.name for stage in profiles(on_cores, nodes)] == ["profile-cpu"]
    on_gpus = planned(chosen(str(tiny), ["placement.pairs.resources={cpus: 1, gpus: 1}"]))
    assert [stage.name for stage in profiles(on_gpus, nodes)] == ["profile-H100", "profile-L4"]
