"""What a stage sees, and what it leaves."""

import gc
import json
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import Number, add, cohort, number

from m2mkd_ray.errors import ArtifactError, StoreError
from m2mkd_ray.execution import LocalLauncher, Metrics, Resources, Stage, StageContext, Status, Store, execute
from m2mkd_ray.execution.job import here, job
from m2mkd_ray.execution.reports import Failed
from m2mkd_ray.execution.worker import WorkerContext, run_cohort, run_job

seen: dict[str, Any] = {}


def look(config: Number, context: StageContext) -> Metrics:
    seen.update(
        inputs={role: (folder / "number").read_text() for role, folder in context.inputs.items()},
        input_metrics=dict(context.input_metrics),
        input_names={role: manifest["name"] for role, manifest in context.input_manifests.items()},
        out=list(context.out.iterdir()),
        durable=context.durable,
        resources=context.resources,
        threads=torch.get_num_threads(),
    )
    return {"pair": (1, 2)}


def test_a_stage_sees_its_needs_by_role(any_store: Store) -> None:
    need = number("need", 4)
    stage = Stage("look", look, Number(), {"a": need}, resources=Resources(cpus=1.5), of="recipe")
    execute([stage], any_store, LocalLauncher()).raise_for_failures()
    assert seen["inputs"] == {"a": "4"}
    assert seen["input_metrics"] == {"a": {"total": 4}}
    assert seen["input_names"] == {"a": "need"}
    assert seen["out"] == []
    assert seen["resources"] == stage.resources
    assert seen["durable"].endswith(f".partial/{stage.address}/durable")
    assert seen["threads"] == 2  # one and a half, rounded up
    assert torch.get_num_threads() == 1


def test_the_manifest_says_what_when_where_and_how(store: Store) -> None:
    need = number("need", 4)
    stage = Stage("look", look, Number(), {"a": need}, of="recipe")
    execute([stage], store, LocalLauncher()).raise_for_failures()
    manifest = json.loads((Path(store.root) / stage.address / "manifest.json").read_text())
    assert (manifest["name"], manifest["key"], manifest["of"]) == ("look", stage.key, "recipe")
    assert manifest["config"] == {"value": 1}
    assert manifest["needs"] == {"a": need.address}
    assert manifest["metrics"] == {"pair": [1, 2]}
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert manifest["where"] == here()
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["COMPLETE"]
    assert manifest["started"] <= manifest["ended"]
    assert manifest["files"] == {}


def test_a_job_that_is_complete_does_nothing(store: Store) -> None:
    stage = number("a")
    execute([stage], store, LocalLauncher())
    before = store.manifest(stage.address)
    assert run_job(job(stage), store, here()) == {"total": 1}
    assert store.manifest(stage.address) == before
    assert store.attempts(stage.address) == []


def test_a_job_whose_artifact_another_worker_completes_gives_that_one(store: Store) -> None:
    def overtaken(config: Number, context: StageContext) -> Metrics:
        run_job(job(number("a")), store, here())
        return add(config, context)  # its folder is gone by now

    stage = Stage("a", overtaken, Number())
    assert run_job(job(stage), store, here()) == {"total": 1}
    assert len(store.manifest(stage.address)["attempts"]) == 2


class Unreadable(Store):
    """Can be read no more as soon as a stage has run."""

    has_run = False

    def status(self, address: str, verify: bool = False) -> Status:
        if self.has_run:
            raise OSError("the disk is gone")
        return super().status(address, verify)

    def commit(self, address: str, prepared: Path, manifest: Mapping[str, Any]) -> Metrics:
        self.has_run = True
        raise StoreError("the store cannot be written")


def test_the_first_error_is_told_if_the_store_cannot_be_read_after_it_either(tmp_path: Path) -> None:
    store, plan = Unreadable(str(tmp_path / "one")), [job(number("a"))]
    with pytest.raises(StoreError, match="cannot be written"):
        run_job(plan[0], store, here())
    ends = list(run_cohort(plan, Unreadable(str(tmp_path / "alone")), here()))
    ends += run_cohort([job(one) for one in cohort([2, 3])], Unreadable(str(tmp_path / "both")), here())
    assert [end.message for end in ends if isinstance(end, Failed)] == ["the store cannot be written"] * 3


def test_without_sharing_all_is_made_in_this_process(store: Store, tmp_path: Path) -> None:
    context = WorkerContext(job(number("a")), store, tmp_path)
    made = list(context.stream("key", lambda: lambda step: (np.array([step]),), 2, 6))
    assert [int(one.arrays[0][0]) for one in made] == [2, 3, 4, 5]
    assert all(one.is_own and not one.arrays[0].flags.writeable for one in made)


def test_the_folder_of_a_context_elsewhere_goes_with_it(store: Store, tmp_path: Path) -> None:
    make = WorkerContext(job(number("a")), store, tmp_path).elsewhere()
    context = pickle.loads(pickle.dumps(make))()
    out = context.out
    (out / "half").write_text("half")
    del context
    gc.collect()
    assert not out.exists()


def test_a_missing_need_is_an_error(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"`need-\w+` is not complete"):
        run_job(job(number("a", x=number("need"))), store, here())


def test_metrics_that_are_not_json_are_an_error(store: Store) -> None:
    (failure,) = execute([Stage("a", tensor_metrics, Number())], store, LocalLauncher()).failed
    assert failure.message == "TypeError: Object of type Tensor is not JSON serializable"
    assert store.folders.names(f".partial/{failure.stage.address}") == ["attempts.json"]


def tensor_metrics(config: Number, context: StageContext) -> Metrics:
    return {"loss": torch.zeros(())}


def test_progress_is_written_at_first_then_once_a_second_and_at_last(store: Store) -> None:
    written: list[int] = []

    def report(config: Number, context: StageContext) -> Metrics:
        for step in range(1, 101):
            context.report(step, 100, {"loss": 0.5})
            progress = store.progress(stage.address)
            assert progress is not None
            written.append(progress.step)
            if step == 50:
                time.sleep(1.01)
        return {}

    stage = Stage("a", report, Number())
    execute([stage], store, LocalLauncher()).raise_for_failures()
    assert sorted(set(written)) == [1, 51, 100]
    assert store.manifest(stage.address)["progress"]["step"] == 100


def test_progress_leaves_out_numbers_that_json_has_not(store: Store) -> None:
    def report(config: Number, context: StageContext) -> Metrics:
        context.report(1, 1, {"loss": 0.5, "top1": float("nan"), "ce": float("inf")})
        return {}

    stage = Stage("a", report, Number())
    execute([stage], store, LocalLauncher()).raise_for_failures()
    assert store.manifest(stage.address)["progress"]["metrics"] == {"loss": 0.5}
