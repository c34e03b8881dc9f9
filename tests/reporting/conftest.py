"""Two reports to draw: one with everything a run can leave, one with next to nothing.

The numbers are made up, in the ranges that small runs give; the images are real.
"""

import base64
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import m2mkd_ray
from m2mkd_ray.reporting import (
    CounterRow,
    Curve,
    DataCard,
    ExpertUse,
    Report,
    RoutingExample,
    Span,
    StageRow,
    Subject,
    SuiteResult,
)

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
SHIPPED = Path(m2mkd_ray.__file__).parent / "data" / "shipped" / "fashion-mnist-small"
T0 = 1_760_000_000.0


def _experts(random: np.random.Generator, evenness: float) -> dict[str, ExpertUse]:
    return {
        f"block {i}": ExpertUse(
            load=tuple(random.dirichlet([evenness / (1 + i)] * 4).tolist()),
            entropy=math.log(4) * (0.95 - 0.13 * i),
        )
        for i in range(8)
    }


def _results(random: np.random.Generator, in_domain: float, evenness: float | None = None) -> tuple[SuiteResult, ...]:
    suites = (
        ("test", "test set", 0.0), ("noise", "Gaussian noise", 0.07), ("blur", "Gaussian blur", 0.04),
        ("contrast", "low contrast", 0.16), ("pixelate", "pixelated", 0.09), ("rotate", "rotated", 0.21),
    )  # fmt: skip
    return tuple(
        SuiteResult(
            suite=suite,
            title=title,
            shifted=suite != "test",
            num_images=2000,
            top1=round(max(0.1, in_domain - drop + random.normal(0, 0.01)), 4),
            top5=round(min(0.99, in_domain + 0.25 - drop / 4), 4),
            nll=round(1.4 * (1.05 - in_domain) + drop, 4),
            ece=round(0.03 + drop / 3, 4),
            per_class={name: float(np.clip(in_domain + random.normal(0, 0.13), 0, 1)) for name in CLASSES},
            experts=_experts(random, evenness) if evenness else {},
        )
        for suite, title, drop in suites
    )


def _curve(
    name: str, title: str, kind: str, recipe: str, *, epochs: int, start: float, end: float, teacher: bool = False
) -> Curve:
    random = np.random.default_rng(len(name) + epochs)
    points = [{"step": 0.0, "epoch": 0.0, "val_top1": start}]
    for step in range(1, epochs * 60 + 1):
        epoch = step / 60
        way = 1 - math.exp(-3.5 * epoch / epochs)
        loss = 2.3 - 1.7 * way * end + random.normal(0, 0.06)
        point = {"step": float(step), "epoch": epoch, "loss": loss, "lr": 1e-3, "images_per_s": 900.0}
        if teacher:
            index = int(name[-1])
            share = 0.35 * math.exp(-1.5 * way) * (1 - 0.15 * index) + random.normal(0, 0.004)
            point |= {"ce": loss, "kd": 0.4 * loss, "teacher_share": max(0.0, share)}
        points.append(point)
        if step % 30 == 0:
            points.append({"step": float(step), "epoch": epoch, "val_top1": start + (end - start) * way / 0.9698})
    return Curve(name=name, title=title, kind=kind, recipe=recipe, points=tuple(points))


def _spans() -> tuple[Span, ...]:
    def span(stage: str, pid: int, start: float, end: float, recipe: str = "demo", **rest: object) -> Span:
        return Span.model_validate(
            {"stage": stage, "recipe": recipe, "worker": f"pid {pid}", "node": "node-a" if pid < 5000 else "node-b",
             "start": T0 + start, "end": T0 + end, **rest}
        )  # fmt: skip

    later = 9000.0
    return (
        span("data-train", 4101, 0, 3, reused=True),
        span("teacher", 4102, 3, 95, reused=True),
        span("meta", 5201, 3, 58, reused=True),
        span("split", 4103, 95, 96.5),
        span("pair-0", 4104, 97, 150),
        span("incubate-0", 5204, 97, 130),
        span("incubate-1", 5204, 97, 141),
        span("incubate-2", 5204, 97, 118, outcome="RAISED"),
        span("pair-1", 4105, 97, 128, outcome="PREEMPTED"),
        span("pair-1", 5202, later, later + 52),
        span("pair-2", 5203, 97, 149),
        span("pair-3", 5204, later, later + 49),
        span("finetune", 4110, later, later + 88, recipe="demo/pure"),
        span("assemble", 4111, later + 53, later + 54),
        span("finetune", 4112, later + 54, later + 142),
        span("evaluate-student", 4113, later + 142, later + 147),
        span("evaluate-student", 5210, later + 88, later + 93, recipe="demo/pure"),
        span("report", 4114, later + 148, later + 151),
    )


def _counters() -> tuple[CounterRow, ...]:
    cohort = tuple(f"incubate-{i}-0123456789ab" for i in range(3))
    return (
        CounterRow(stage="meta", recipe="demo", images_per_s=3912.0, data_wait=0.02),
        *(
            CounterRow(stage=f"pair-{i}", recipe="demo", images_per_s=912.4 + i, data_wait=0.04, train_s=50.0,
                       prefix_s=2.0 * i, teacher_s=14.0, student_s=20.0, suffix_s=6.0 - i, decodes=48_000,
                       teacher_calls=30_000, cache_hits=18_000, flops=4.16e15, mfu=0.41, peak_memory_gb=11.2)
            for i in range(4)
        ),
        *(
            CounterRow(stage=f"incubate-{i}", recipe="demo", images_per_s=1490.0, data_wait=0.31, train_s=30.0,
                       prefix_s=1.0 * i, student_s=14.0, suffix_s=2.0, decodes=48_000, flops=2e15,
                       peak_memory_gb=0.43, cohort=cohort)
            for i in range(2)
        ),
        CounterRow(stage="finetune", recipe="demo", images_per_s=412.0, data_wait=0.11, train_s=88.0, student_s=70.0),
        CounterRow(stage="finetune", recipe="demo/pure", images_per_s=409.0, data_wait=0.0),
    )  # fmt: skip


def _routing() -> tuple[RoutingExample, ...]:
    rows = pq.read_table(SHIPPED / "test-00000.parquet").slice(0, 6).to_pylist()
    random = np.random.default_rng(3)
    return tuple(
        RoutingExample(
            image=base64.b64encode(row["image"]["bytes"]).decode(),
            label=CLASSES[row["label"]],
            predicted=CLASSES[row["label"] if i != 4 else (row["label"] + 1) % 10],
            block=block,
            grid=tuple(tuple(int(e) for e in random.integers(0, 4, 4)) for _ in range(4)),
        )
        for i, row in enumerate(rows)
        for block in ("block 0", "block 7")
    )


@pytest.fixture(scope="session")
def full_report() -> Report:
    """A run with teacher, meta model, pairs, three baselines, shift, experts and a resumed timeline."""
    random = np.random.default_rng(0)
    hybrids = [(f"hybrid-{i}", f"hybrid {i}", score) for i, score in enumerate((0.684, 0.740, 0.745, 0.727))]
    subjects = [
        Subject(name="teacher", title="teacher", kind="teacher", recipe="demo", results=_results(random, 0.776),
                num_parameters=612_000),
        Subject(name="meta", title="meta model", kind="meta", recipe="demo", results=_results(random, 0.761),
                num_parameters=204_000),
        *(Subject(name=name, title=title, kind="hybrid", recipe="demo", results=_results(random, score, 3.0),
                  num_parameters=230_000, num_active_parameters=190_000) for name, title, score in hybrids),
        Subject(name="demo", title="m2mKD", kind="student", recipe="demo", results=_results(random, 0.742, 6.0),
                num_parameters=1_240_000, num_active_parameters=410_000),
        Subject(name="demo/pure", title="pure", kind="baseline", recipe="demo/pure",
                results=_results(random, 0.613, 3.0), num_parameters=1_240_000, num_active_parameters=410_000),
        Subject(name="demo/kd", title="whole-model KD", kind="baseline", recipe="demo/kd",
                results=_results(random, 0.651, 3.0), num_parameters=1_240_000, num_active_parameters=410_000),
        Subject(name="demo/pure-long", title="pure, longer", kind="baseline", recipe="demo/pure-long",
                results=_results(random, 0.749, 3.0), num_parameters=1_240_000, num_active_parameters=410_000,
                compute_matched=True),
    ]  # fmt: skip
    curves = (
        _curve("teacher", "teacher", "teacher", "demo", epochs=12, start=0.1, end=0.776),
        _curve("meta", "meta model", "meta", "demo", epochs=12, start=0.09, end=0.761),
        *(_curve(f"pair-{i}", f"pair {i}", "hybrid", "demo", epochs=6, start=0.12, end=score, teacher=True)
          for i, (_, _, score) in enumerate(hybrids)),
        _curve("demo", "m2mKD", "student", "demo", epochs=6, start=0.183, end=0.742),
        _curve("demo/pure", "pure", "baseline", "demo/pure", epochs=6, start=0.1, end=0.613),
        _curve("demo/kd", "whole-model KD", "baseline", "demo/kd", epochs=6, start=0.1, end=0.651),
        _curve("demo/pure-long", "pure, longer", "baseline", "demo/pure-long", epochs=14, start=0.1, end=0.749),
    )  # fmt: skip
    spans = _spans()
    return Report(
        title="m2mKD on Fashion-MNIST",
        created="2026-03-01T12:00:00+00:00",
        seed=0,
        recipe_yaml="name: demo\ntitle: m2mKD on Fashion-MNIST\nfinetune:\n  epochs: 6\n",
        data=DataCard(
            name="fashion-mnist-small", title="Fashion-MNIST, 8,000 images", licence="MIT", num_classes=10,
            source="Fashion-MNIST, Zalando SE", rows={"train": 8000, "test": 2000}, fingerprint="0123456789ab",
        ),
        subjects=tuple(subjects),
        curves=curves,
        routing=_routing(),
        spans=spans,
        stages=tuple(
            StageRow(
                stage=span.stage, recipe=span.recipe, seconds=span.end - span.start, reused=span.reused,
                images_per_s=912.5 if span.kind in ("teacher", "meta", "pair", "finetune") else None,
                parameters=204_000 if span.kind in ("teacher", "meta", "pair", "finetune") else None,
                attempts=2 if span.stage == "pair-1" else 1,
            )
            for span in spans
            if span.is_complete
        ),
        counters=_counters(),
        versions={"m2mkd_ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
        notes=("The teacher has three blocks a module, the student two.",),
    )  # fmt: skip


@pytest.fixture(scope="session")
def minimal_report() -> Report:
    """One network on one suite: nothing else is known."""
    result = SuiteResult(suite="test", title="test set", shifted=False, num_images=100, top1=0.5)
    return Report(
        title="one network",
        created="2026-03-01T12:00:00+00:00",
        seed=1,
        recipe_yaml="name: tiny\n",
        data=DataCard(name="digits", title="digits", licence="BSD-3-Clause", num_classes=10),
        subjects=(Subject(name="tiny", title="m2mKD", kind="student", recipe="tiny", results=(result,)),),
    )
