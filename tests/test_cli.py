"""The command line: what goes to stdout and stderr, exit codes, and one run through to the export."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from m2mkd_ray import __version__
from m2mkd_ray.execution import Store


@pytest.fixture(scope="module")
def ran(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a whole run of tiny.yaml."""
    from m2mkd_ray.cli import main

    store = tmp_path_factory.mktemp("ran") / "runs"
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(tiny), "--launcher", "local", "--store", str(store)])
    return store


# Names and plans


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom m2mkd_ray.cli import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit: print(*sorted({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    for option, shown in (("--help", "doctor"), ("--version", __version__)):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert shown in done.stdout
        assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("what", ["recipes", "baselines", "datasets", "suites", "families", "corruptions"])
def test_what_has_a_name_is_listed(what, m2mkd):
    entries = json.loads(m2mkd("list", what, "--json").out)
    table = m2mkd("list", what).out
    assert entries
    assert all(entry["name"] in table for entry in entries)


def test_a_plan_of_full_size_needs_no_data_and_costs_as_published(m2mkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = m2mkd("plan", "vmoe_base", "--json")
    plan = json.loads(ended.out)
    assert ended.code == 0
    assert not list(tmp_path.iterdir())
    models = {model["model"]: model for model in plan["models"]}
    assert models["teacher"]["parameters"] == 304_326_632  # torchvision's vit_l_16 has as many
    assert sum(pair["gmac"] for pair in plan["pairs"]) == pytest.approx(209, rel=0.02)  # docs/method.md
    assert {stage["state"] for stage in plan["stages"]} == {"absent", "blocked"}
    assert any("m2mkd data import imagenet-1k" in problem for problem in plan["problems"])
    shown = m2mkd("plan", "vmoe_base")
    assert "data not imported" in shown.out
    assert "This plan cannot run here yet" in shown.err


def test_a_plan_tells_the_sizes_of_a_circuit(m2mkd):
    ended = m2mkd("plan", "nac_tiny", "--json")
    assert ended.code == 0
    models = {model["model"]: model for model in json.loads(ended.out)["models"]}
    assert (models["student"]["blocks"], models["student"]["width"]) == (10, 384)
    assert models["student"]["parameters"] == pytest.approx(26.70e6, rel=2e-4)  # docs/method.md


def test_a_plan_says_steps_and_needs(tiny, m2mkd, tmp_path):
    plan = json.loads(m2mkd("plan", tiny, "--store", tmp_path / "runs", "--json").out)
    stages = {stage["name"]: stage for stage in plan["stages"] if stage["recipe"] == "demo"}
    assert plan["problems"] == []
    assert stages["pair-0"]["training"] == {"epochs": 0.2, "batch_size": 32, "steps": 1}
    assert stages["pair-0"]["needs"]["split"] == stages["split"]["address"]
    assert not (tmp_path / "runs").exists()


def test_settings_change_a_recipe_file(tiny, m2mkd, tmp_path):
    plan = json.loads(m2mkd("plan", tiny, "--set", "pairs.epochs=2", "--set", "pairs.distill.alpha=0", "--json").out)
    names = {stage["name"] for stage in plan["stages"]}
    assert "split" not in names  # without the teacher's term there is no teacher
    assert {s["training"]["steps"] for s in plan["stages"] if s["name"].startswith("pair-")} == {10}


# A run and what it leaves


def test_a_run_leaves_report_and_export(ran, tiny, m2mkd):
    page = Path(m2mkd("report", tiny, "--store", ran).out.strip())
    assert page.name == "report.html"
    assert page.is_file()
    numbers = json.loads(m2mkd("report", tiny, "--store", ran, "--json").out)
    assert {"student", "teacher", "meta", "pure"} <= set(numbers["accuracy"])
    states = json.loads(m2mkd("status", tiny, "--store", ran, "--json").out)["stages"]
    assert {stage["state"] for stage in states} == {"complete"}
    assert "pair-1" in m2mkd("status", tiny, "--store", ran).out


def test_the_status_has_the_counters_of_every_training(ran, tiny, m2mkd):
    shown = m2mkd("status", tiny, "--store", ran, "--counters").out
    rows = {line.split()[0] for line in shown.splitlines() if line}
    assert {"meta", "teacher", "pair-0", "pair-1", "finetune"} <= rows
    assert not {"data", "split", "assemble", "report"} & rows
    assert "data wait" in shown
    state = json.loads(m2mkd("status", tiny, "--store", ran, "--json").out)
    metrics = {(stage["name"], stage["of"]): stage["metrics"] for stage in state["stages"]}
    assert len(state["counters"]) == 6
    for row in state["counters"]:
        told = metrics[row["stage"], row["recipe"]]
        assert (row["images_per_s"], row["data_wait"]) == (told["images_per_s"], told["data_wait"])
        assert sum(row["shares"].values()) == pytest.approx(1)


def test_counters_of_nothing_are_said_to_be_none(tiny, m2mkd, tmp_path):
    said = m2mkd("status", tiny, "--store", tmp_path / "runs", "--counters").out
    assert said == "No training has counted anything yet.\n"


def test_the_counters_of_a_running_cohort_show_while_it_runs(tiny, m2mkd, tmp_path):
    from m2mkd_ray.commands.session import chosen, planned
    from m2mkd_ray.execution.store import Progress

    store = Store(str(tmp_path / "runs"))
    pairs = [stage.address for stage in planned(chosen(str(tiny), [])) if stage.name.startswith("pair-")]
    where = {"host": "node7", "pid": 42, "node_id": None, "actor_id": None, "cohort": pairs}
    counted = {
        "loss": 2.25, "images_per_s": 800.0, "data_wait": 0.25, "teacher_s": 1.0, "train_s": 4.0,
        "teacher_calls": 1600.0, "cache_hits": 1600.0, "flops": 8e12, "mfu": 0.4, "peak_memory_gb": 12.5,
    }  # fmt: skip
    for address in pairs:
        store.say_attempts(address, [{"started": "2026-03-01T12:00:00+00:00", "ended": None, "outcome": None,
                                      "message": "", "where": where}])  # fmt: skip
        store.say_progress(address, Progress(5, 20, counted, 0.0, 42, "node7"))
    shown = m2mkd("status", tiny, "--store", store.root, "--counters").out
    times, counts = (line.split() for line in shown.splitlines() if line.startswith("pair-0"))
    assert times == ["pair-0", "pair-0,1", "800", "25", "%", "25", "%", "50", "%"]
    assert counts == ["pair-0", "1,600", "50", "%", "8", "T", "2", "T", "40", "%", "12.5", "GB"]
    assert max(map(len, shown.splitlines())) < 100
    assert "data wait 25 %" in m2mkd("status", tiny, "--store", store.root).out
    assert "node7:42, with pair-1" in m2mkd("status", tiny, "--store", store.root).out


def test_a_second_run_runs_nothing_and_tells_the_same(ran, tiny, m2mkd):
    before = {file: file.stat().st_mtime_ns for file in ran.glob("*-*/manifest.json")}
    began = time.monotonic()
    ended = m2mkd("run", tiny, "--store", ran, "--json")  # no launcher named: Ray is not started all the same
    assert time.monotonic() - began < 5
    result = json.loads(ended.out)
    assert {stage["outcome"] for stage in result["stages"]} == {"reused"}
    assert {file: file.stat().st_mtime_ns for file in ran.glob("*-*/manifest.json")} == before
    assert "complete from before" in ended.err
    table = m2mkd("run", tiny, "--store", ran).out
    assert "m2mKD" in table
    assert f"Report: {result['report']}" in table
    assert f"Export: {result['export']}" in table
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_planned_run_that_is_complete_is_told_again(ran, tiny, m2mkd):
    ended = m2mkd("run", tiny, "--store", ran, "--placement", "auto", "--json")
    assert ended.code == 0
    assert {stage["outcome"] for stage in json.loads(ended.out)["stages"]} == {"reused"}


def run_in_its_own_process(*words, cwd=None):
    """`m2mkd run`; the last line of its standard error says whether it imported Ray."""
    code = (
        "import sys\nfrom m2mkd_ray.cli import main\n"
        "try: main(['run', *sys.argv[1:]])\n"
        "finally: print('ray' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True)


def test_a_run_that_is_complete_does_not_import_ray(ran, tiny):
    assert run_in_its_own_process(tiny, "--store", ran).stderr.splitlines()[-1] == "False"


def test_a_local_run_has_a_stream_for_results_and_one_for_the_log_and_does_not_import_ray(tiny, tmp_path):
    done = run_in_its_own_process(tiny, "--until", "data", "--launcher", "local", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["stages"][0]["name"] == "data"
    assert "data: complete after" in done.stderr
    assert done.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("options", "expected"), [([], 1800), (["--stall-timeout", "90"], 90), (["--stall-timeout", "0"], None)]
)
def test_the_stall_timeout_reaches_the_executor(options, expected, ran, tiny, m2mkd, monkeypatch):
    from m2mkd_ray import execution

    given = []

    def execute(*arguments, **options):
        given.append(options["stall_timeout_s"])
        return really_execute(*arguments, **options)

    really_execute = execution.execute
    monkeypatch.setattr(execution, "execute", execute)
    assert m2mkd("run", tiny, "--store", ran, *options).code == 0
    assert given == [expected]


def test_an_export_predicts(ran, tiny, m2mkd, tmp_path):
    from m2mkd_ray.data import find

    assert m2mkd("export", tiny, "--store", ran, "--to", tmp_path / "student").code == 0
    assert sorted(f.name for f in (tmp_path / "student").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    image = tmp_path / "image.png"
    image.write_bytes(find("fashion-mnist-small").rows("test").read([0])[0])
    (found,) = json.loads(m2mkd("predict", tmp_path / "student", image, "--top", 3, "--json").out)
    assert len(found["classes"]) == 3
    best = found["classes"][0]["name"]
    assert best in m2mkd("predict", tmp_path / "student", image, "--top", 1).out


def test_until_ends_with_that_stage(ran, tiny, m2mkd, tmp_path):
    ended = m2mkd("run", tiny, "--until", "split", "--launcher", "local", "--store", tmp_path / "runs")
    assert ended.code == 0
    assert set(Store(str(tmp_path / "runs")).addresses()) == {"data", "meta", "teacher", "split"} - {"meta"}
    assert "the last is" in ended.out


def test_a_changed_finetuning_reuses_the_pairs(ran, tiny, m2mkd, tmp_path):
    shutil.copytree(ran, tmp_path / "runs")
    arguments = ("--launcher", "local", "--until", "finetune", "--set", "finetune.lr=0.0001", "--json")
    result = json.loads(m2mkd("run", tiny, "--store", tmp_path / "runs", *arguments).out)
    outcomes = {(stage["name"], stage["recipe"]): stage["outcome"] for stage in result["stages"]}
    assert outcomes["pair-0", "demo"] == outcomes["assemble", "demo"] == "reused"
    assert outcomes["finetune", "demo"] == "complete"


# Ends


def test_a_failed_stage_is_named_and_its_traceback_is_kept(tiny, m2mkd, tmp_path):
    store = tmp_path / "runs"
    arguments = ("--launcher", "local", "--until", "split", "--set", "teacher.phase.lr=1e30", "--json")
    ended = m2mkd("run", tiny, "--store", store, *arguments, "--set", "teacher.phase.epochs=2")
    assert ended.code == 1
    outcomes = {stage["name"]: stage["outcome"] for stage in json.loads(ended.out)["stages"]}
    assert outcomes == {"data": "complete", "teacher": "failed", "split": "skipped"}
    assert "stages failed" in ended.err
    assert "Traceback" not in ended.err
    (log,) = (store / ".logs").glob("run-*.log")
    assert "Traceback" in log.read_text()
    assert str(log) in ended.err


def test_what_we_did_not_expect_is_our_defect_with_a_log(ran, tiny, m2mkd, tmp_path):
    shutil.copytree(ran, tmp_path / "runs")
    (manifest,) = (tmp_path / "runs").glob("split-*/manifest.json")
    manifest.write_text("[]")  # JSON, but of no form that any version has written
    ended = m2mkd("status", tiny, "--store", tmp_path / "runs")
    assert ended.code == 3
    assert ended.out == ""
    assert "Traceback" not in ended.err
    (log,) = (tmp_path / "runs" / ".logs").glob("defect-*.log")
    assert str(log) in ended.err
    text = log.read_text()
    assert all(part in text for part in ("command: m2mkd status", "Traceback", "torch: ", "teacher_depths"))


def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(tiny, m2mkd, tmp_path):
    store = tmp_path / "runs"
    arguments = ("run", tiny, "--launcher", "local", "--until", "meta", "--store", store)
    arguments += ("--set", "meta.epochs=400", "--set", "placement.models.checkpoint_every_s=0")

    def interrupt() -> None:
        while not list(store.glob(".partial/meta-*/checkpoint/*/manifest.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    ended = m2mkd(*arguments)
    assert (ended.code, ended.out) == (130, "")
    assert "run the same command to go on" in ended.err
    (stage,) = (
        s for s in json.loads(m2mkd("status", tiny, *arguments[6:], "--json").out)["stages"] if s["name"] == "meta"
    )
    assert stage["state"] == "partial"
    assert stage["step"] > 0


@pytest.mark.slow
def test_a_message_of_the_real_command_is_all_that_is_said(tmp_path):
    command = [sys.executable, "-m", "m2mkd_ray", "run", "demmo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: There is no recipe 'demmo'. Known recipes: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# Showing events


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines(tiny, tmp_path):
    from m2mkd_ray.commands.follow import Lines, LiveTable, follower
    from m2mkd_ray.commands.session import chosen, planned
    from m2mkd_ray.execution import StageEnded, StageFailed, StageProgress, StageSkipped, StageStarted
    from m2mkd_ray.execution.failures import Kind
    from m2mkd_ray.execution.store import Progress

    stages = planned(chosen(str(tiny), []))
    by_name = {stage.name: stage for stage in stages if stage.of == "demo"}
    meta, pair = by_name["meta"], by_name["pair-0"]
    events = [
        StageStarted(meta, {"host": "node7", "pid": 42}, 3),
        StageProgress(
            meta, Progress(5, 20, {"loss": 2.25, "val_top1": 0.5, "images_per_s": 1234.0}, 0.0, 42, "node7")
        ),
    ]
    ends = [
        StageEnded(meta, 65.0, {"val_top1": 0.625}, {"host": "node7", "pid": 42}),
        StageFailed(pair, Kind.RAISED, "not retried", "ValueError: no", "", None),
        StageSkipped(by_name["assemble"], (pair,)),
    ]
    store, stream = Store(str(tmp_path / "runs")), io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=160)
    with follower(stages, store, terminal, polls_store=False) as live:
        assert isinstance(live, LiveTable)
        for event in events:
            live(event)
        running = _text(live)
        for event in ends:
            live(event)
    assert all(part in running for part in ("5/20", "loss 2.250, top-1 50.0 %, 1,234 images/s", "node7:42", "waiting"))
    ended = _text(live)
    assert all(part in ended for part in ("1 min 05 s", "top-1 62.5 %", "failed", "ValueError: no", "needs pair-0"))
    lines = io.StringIO()
    with Lines(stages, lines) as follow:
        for event in events + events[1:] + ends:
            follow(event)
    words = [line.split(" ", 1)[1] for line in lines.getvalue().splitlines()]
    assert words == [
        "meta (demo): started on node7:42, goes on from step 3",
        "meta (demo): step 5/20: loss 2.250, top-1 50.0 %, 1,234 images/s",
        "meta (demo): complete after 1 min 05 s: top-1 62.5 %",
        "pair-0 (demo): failed: ValueError: no",
        "assemble (demo): not run, needs pair-0",
    ]
    assert isinstance(follower(stages, store, Console(file=lines), polls_store=True), Lines)


def test_who_shares_a_worker_is_shown_within_a_hundred_columns(tiny, tmp_path):
    from m2mkd_ray.commands.follow import Lines, LiveTable
    from m2mkd_ray.commands.session import chosen, planned
    from m2mkd_ray.execution import StageInterrupted, StageProgress, StageStarted
    from m2mkd_ray.execution.store import Progress

    stages = planned(chosen(str(tiny), ["baselines=[]"]))
    pairs = [stage for stage in stages if stage.name.startswith("pair-")]
    where = {"host": "ray-worker-gpu-7f9c4", "pid": 1042, "cohort": [pair.address for pair in pairs]}
    said = {"loss": 2.25, "val_top1": 0.5, "images_per_s": 1234.0, "data_wait": 0.125}
    lines, console = io.StringIO(), Console(file=io.StringIO(), force_terminal=True, width=100)
    table = LiveTable(stages, Store(str(tmp_path / "runs")), console, polls_store=False)
    with Lines(stages, lines) as follow:
        for pair in pairs:
            for event in (
                StageStarted(pair, where, None),
                StageProgress(pair, Progress(512, 20_000, said, 0.0, 1042, where["host"])),
            ):
                follow(event)
                table(event)
    text = _text(table, width=100)
    assert len(text.splitlines()) == len(stages) + 2 + 2 * len(pairs)
    first, second = (line for line in text.splitlines() if line.startswith("pair-"))
    assert all(part in first for part in ("running", "512/20000", "loss 2.250", "ray-worker-gpu-7f9c4:1042"))
    assert second.rstrip().endswith("with pair-0")
    assert "pair-0: started on ray-worker-gpu-7f9c4:1042 with pair-1" in lines.getvalue()
    assert "pair-1: step 512/20000: loss 2.250, top-1 50.0 %, 1,234 images/s, data wait 12 %" in lines.getvalue()
    with Lines(stages, lines) as follow:
        for take in (follow, table):
            take(StageInterrupted(pairs[1], "its worker was ended, because pair-0 stalled"))
    assert "pair-1: waits for another worker, its worker was ended, because pair-0 stalled" in lines.getvalue()
    (second,) = (line for line in _text(table).splitlines() if line.startswith("pair-1"))
    assert all(part in second for part in ("waiting", "its worker was ended"))


def _text(live, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.table())
    return console.file.getvalue()


# Data and machine


def test_data_is_imported_listed_and_verified(m2mkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imported = m2mkd("data", "import", "digits", "--source", "sklearn", "--limit", 300, "--json")
    assert json.loads(imported.out)["splits"]["train"] == {"rows": 300, "bad": {}}
    entries = {entry["name"]: entry for entry in json.loads(m2mkd("data", "list", "--json").out)}
    assert entries["digits"]["imported"] == "data/digits"
    assert entries["cifar10"]["imported"] is None
    assert "train" in m2mkd("data", "verify", "digits").out
    (shard,) = (tmp_path / "data" / "digits").glob("train-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    spoilt = m2mkd("data", "verify")
    assert spoilt.code == 1
    assert f"{shard.name}: expected" in spoilt.err


def test_the_doctor_says_what_is_there_and_what_to_do(m2mkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = m2mkd("doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(ended.out)["findings"]}
    assert ended.code == 0
    assert {"torch", "ray", "deepspeed", "CPU cores", "/dev/shm", "store", "data sets"} <= set(found)
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").write_text("")
    ended = m2mkd("doctor", "--store", "taken")
    assert ended.code == 1
    assert "FAIL  store" in ended.out
    assert "--store" in ended.out


# On Ray


@pytest.mark.ray
def test_the_whole_flow_on_ray_and_deepspeed_measured_and_planned(tiny, tmp_path):
    command = [sys.executable, "-m", "m2mkd_ray", "run", str(tiny), "--num-cpus", "2", "--json"]
    command += ["--placement", "auto", "--set", "baselines=[]"]
    command += ["--set", "placement.finetune.engine=deepspeed", "--set", "placement.finetune.num_workers=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    results = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    first, second = ({stage["outcome"] for stage in result["stages"]} for result in results)
    assert first <= {"complete", "reused"}  # the data set was looked at for the profile
    assert second == {"reused"}
    assert any(name.startswith("profile-cpu") for name in Store(str(tmp_path / "runs")).addresses())
    (tuned,) = (stage for stage in results[0]["stages"] if stage["name"] == "finetune")
    assert tuned["metrics"]["num_ranks"] == 2
    assert Path(results[0]["report"]).is_file()
    assert (Path(results[0]["export"]) / "model.safetensors").is_file()
