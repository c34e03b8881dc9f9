"""Stage `report`: gather what the other stages left, and render it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from m2mkd_ray.data import DATASETS
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import ANY_GROUP, Metrics
from m2mkd_ray.reporting import (
    CounterRow,
    Curve,
    DataCard,
    Report,
    RoutingExample,
    Span,
    StageRow,
    Subject,
    render,
    summary,
)
from m2mkd_ray.reporting.report import Kind
from m2mkd_ray.stages.parts import HISTORY

KINDS: dict[str, Kind] = {
    "teacher": "teacher",
    "meta": "meta",
    "pair": "hybrid",
    "incubate": "teacher",
    "finetune": "student",
}
"""Kind of the network that a stage trains, by what stands before its name's first hyphen."""
MATCHED = "pure_matched"


class ReportConfig(BaseModel, frozen=True, extra="forbid"):
    """What a report is about."""

    recipe: dict[str, Any]
    """The recipe without its placement."""
    titles: dict[str, str] = {}
    """Title of each baseline, by its name."""


def run(config: ReportConfig, context: StageContext) -> Metrics:
    """Reads trainings and evaluations by role; writes `report.html`, `report.json` and `figures/`."""
    report = gather(config, context)
    render(report, context.out)
    return summary(report)


def gather(config: ReportConfig, context: StageContext) -> Report:
    """The report as data."""
    recipe = config.recipe
    roles = list(context.inputs)
    return Report(
        title=f"{recipe['title']} · {recipe['name']}",
        created=max(manifest["ended"] for manifest in context.input_manifests.values()),
        seed=recipe["seed"],
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        data=_data_card(context.inputs["data"]),
        subjects=tuple(subject for role in _students_first(roles) for subject in _subjects(role, config, context)),
        curves=tuple(curve for role in roles for curve in _curves(role, config, context)),
        routing=tuple(_routing(context.inputs["evaluate-student"])),
        spans=tuple(span for manifest in _manifests(context) for span in spans_of(manifest)),
        stages=tuple(_row(manifest) for manifest in _manifests(context)),
        counters=tuple(row for manifest in _manifests(context) if (row := _counters(manifest)) is not None),
        versions={name: str(version) for name, version in _manifests(context)[-1]["versions"].items() if version},
    )


def _students_first(roles: Sequence[str]) -> list[str]:
    """Evaluations, the recipe's own before its baselines'."""
    evaluations = [role for role in roles if role.rpartition("/")[2].startswith("evaluate-")]
    return sorted(evaluations, key=lambda role: "/" in role)


def _subjects(role: str, config: ReportConfig, context: StageContext) -> Iterator[Subject]:
    variant, _, stage = role.rpartition("/")
    if variant and stage != "evaluate-student":
        return  # a baseline's teacher, meta model and hybrids are the recipe's, or beside the point
    for subject in json.loads((context.inputs[role] / "evaluation.json").read_text()):
        name, kind = subject["name"], "baseline" if variant else subject["name"].split("-")[0]
        title = {"student": config.recipe["title"], "meta": "meta model"}.get(name, name.replace("-", " "))
        yield Subject.model_validate(
            {
                **subject,
                "name": variant or name,
                "title": config.titles.get(variant, variant) if variant else title,
                "kind": kind,
                "recipe": f"{config.recipe['name']}/{variant}" if variant else config.recipe["name"],
                "compute_matched": variant == MATCHED,
                "results": [
                    {key: value for key, value in result.items() if key != "top5" or len(result["per_class"]) > 5}
                    for result in subject["results"]
                ],
            }
        )


def _curves(role: str, config: ReportConfig, context: StageContext) -> Iterator[Curve]:
    variant, _, stage = role.rpartition("/")
    file = context.inputs[role] / HISTORY
    if not file.exists() or (variant and stage != "finetune"):
        return
    student = config.titles.get(variant, variant) if variant else config.recipe["title"]
    yield Curve(
        name=variant or {"finetune": "student"}.get(stage, stage.replace("pair-", "hybrid-")),
        title=student if stage == "finetune" else stage.replace("-", " "),
        kind="baseline" if variant else KINDS[stage.split("-")[0]],
        recipe=f"{config.recipe['name']}/{variant}" if variant else config.recipe["name"],
        points=json.loads(file.read_text()),
    )


def _routing(evaluation: Path) -> Iterator[RoutingExample]:
    for example in json.loads((evaluation / "routing.json").read_text()):
        yield RoutingExample.model_validate(example)


def _manifests(context: StageContext) -> list[Mapping[str, Any]]:
    """Of every stage that is read, each once, in the order in which they ended."""
    by_address = {(manifest["name"], manifest["key"]): manifest for manifest in context.input_manifests.values()}
    return sorted(by_address.values(), key=lambda manifest: str(manifest["ended"]))


def spans_of(manifest: Mapping[str, Any]) -> Iterator[Span]:
    """The attempts at a stage, of its manifest; or of what there is of one (`name`, `of`, `attempts`) before it is
    complete, of which an attempt that is under way is left out. What ranks held is known when it is complete."""
    ended = [attempt for attempt in manifest["attempts"] if attempt["ended"] is not None]
    placement = manifest.get("placement", {})
    for attempt in ended:
        where, given = attempt["where"], attempt.get("resources", {})
        waited = _waited(manifest) if attempt is ended[-1] else 0.0
        yield Span(
            stage=manifest["name"],
            recipe=manifest["of"],
            worker=f"{where['host']}:{where['pid']}",
            node=where["node_id"] or where["host"],
            start=_unix(attempt["started"]) + waited,
            end=max(_unix(attempt["ended"]), _unix(attempt["started"]) + waited),
            outcome=attempt["outcome"],
            node_group=_group_of_ranks(placement) or where.get("node_group", ""),
            spot=where.get("spot", False),
            gpus=given.get("gpus", 0.0) + _of_ranks(placement, "gpus"),
            cpus=given.get("cpus", 0.0) + _of_ranks(placement, "cpus"),
            lost_steps=attempt.get("lost_steps", 0),
        )


def _of_ranks(placement: Mapping[str, Any], what: str) -> float:
    """What all ranks of a stage were given (`FinetunePlacement`, `IncubatePlacement`); 0: it has none."""
    if placement.get("engine") == "deepspeed":
        return float(placement["num_workers"] * placement[f"{what}_per_worker"])
    if placement.get("ranks", 1) > 1:
        return float(placement["ranks"] * placement["resources"][what])
    return 0.0


def _group_of_ranks(placement: Mapping[str, Any]) -> str:
    """The node group that a stage's ranks asked for; empty: none, or it has no ranks. Its own worker only drives."""
    if placement.get("engine") == "deepspeed":
        group = placement.get("node_group", "")
    else:
        group = placement["resources"].get("node_group", "") if placement.get("ranks", 1) > 1 else ""
    return "" if group == ANY_GROUP else group


def _waited(manifest: Mapping[str, Any]) -> float:
    """Seconds that a fine-tuning waited for its ranks' resources before they began; of other stages 0."""
    began = manifest.get("metrics", {}).get("ranks_began_at")
    return 0.0 if began is None else max(0.0, began - _unix(manifest["started"]))


def _row(manifest: Mapping[str, Any]) -> StageRow:
    metrics = manifest["metrics"]
    trained = metrics.get("num_parameters") if "steps" in metrics else None
    return StageRow(
        stage=manifest["name"],
        recipe=manifest["of"],
        seconds=manifest["seconds"] - _waited(manifest),
        images_per_s=metrics.get("images_per_s"),
        attempts=len(manifest["attempts"]),
        parameters=trained,
    )


def _counters(manifest: Mapping[str, Any]) -> CounterRow | None:
    cohort = manifest["attempts"][-1]["where"].get("cohort") or ()
    return CounterRow.of(manifest["name"], manifest["of"], manifest["metrics"], cohort if len(cohort) > 1 else ())


def _data_card(folder: Path) -> DataCard:
    data = json.loads((folder / "data.json").read_text())
    known = DATASETS.get(data["dataset"])
    return DataCard(
        name=data["dataset"],
        title=known.title if known else data["dataset"],
        licence=data["licence"],
        num_classes=len(data["classes"]),
        source=data["source"],
        rows=data["rows"],
        fingerprint=data["fingerprint"],
    )


def _unix(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
