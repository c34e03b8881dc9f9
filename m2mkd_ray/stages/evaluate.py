"""Stage `evaluate-*`: one model, or the hybrids of all pairs, on every suite."""

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Augmentation, EvalBatches, find
from m2mkd_ray.data.index import DatasetFolder, Index
from m2mkd_ray.evaluation import Suite, class_columns, measure, predict, remap
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import (
    family,
    num_active_parameters,
    num_parameters,
    record_routing,
    splice,
)
from m2mkd_ray.stages.parts import MODULE, load_meta, load_module, load_student, load_vit
from m2mkd_ray.training import TrainPlacement
from m2mkd_ray.training.engine import local_device

NUM_EXAMPLES = 6
"""Images whose routing is shown."""


class EvaluateConfig(BaseModel, frozen=True, extra="forbid"):
    """Which model, on which suites."""

    subject: Literal["teacher", "meta", "student", "hybrids"]
    blueprint: Blueprint
    keep_stitches: bool = False
    dataset: str
    """What the model was trained on; its class ids say what the model's outputs mean."""
    augmentation: Augmentation
    """Only its preprocessing counts here: size, crop, mean and deviation."""
    suites: tuple[Suite, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 256
    seed: int
    """Of the corruptions."""


def run(config: EvaluateConfig, context: StageContext) -> Metrics:
    """Reads `model` (of hybrids: `meta`, `pair-i`), `data`; writes `evaluation.json`, of a student `routing.json`."""
    placement = context.placement
    assert isinstance(placement, TrainPlacement)
    trained_on = find(config.dataset, placement.data_root).index
    device = local_device()
    subjects = []
    passes, done = sum(len(suite.corruptions) or 1 for suite in config.suites), itertools.count(1)
    total = passes * (config.blueprint.num_modules if config.subject == "hybrids" else 1)

    def tell() -> None:
        context.report(next(done), total, {})

    for name, model in _models(config, context):
        model.to(device).eval()
        results = [_evaluate(model, suite, config, trained_on, placement, device, tell) for suite in config.suites]
        subjects.append(
            {
                "name": name,
                "num_parameters": num_parameters(model),
                "num_active_parameters": num_active_parameters(model),
                "results": results,
            }
        )
        if config.subject == "student":
            examples = _routing_examples(model, config, trained_on, placement.data_root, device)
            (context.out / "routing.json").write_text(json.dumps(examples))
    (context.out / "evaluation.json").write_text(json.dumps(subjects, indent=1))
    return {
        f"{subject['name']}/{result['suite']}/top1": result["top1"]
        for subject in subjects
        for result in cast(list[dict[str, Any]], subject["results"])
    }


def _models(config: EvaluateConfig, context: StageContext) -> Iterator[tuple[str, nn.Module]]:
    blueprint = config.blueprint
    if config.subject == "hybrids":
        meta = load_meta(blueprint, context.inputs["meta"])
        modules = family(blueprint.student.family).modules(blueprint)
        for index, module in enumerate(modules):
            load_module(module, context.inputs[f"pair-{index}"] / MODULE)
            yield f"hybrid-{index}", splice(meta, index, module)
    elif config.subject == "student":
        yield "student", load_student(blueprint, context.inputs["model"], keep_stitches=config.keep_stitches)
    else:
        vit = blueprint.teacher if config.subject == "teacher" else blueprint.meta
        yield config.subject, load_vit(vit, context.inputs["model"])


def _evaluate(
    model: nn.Module,
    suite: Suite,
    config: EvaluateConfig,
    trained_on: Index,
    placement: TrainPlacement,
    device: torch.device,
    tell: Callable[[], None],
) -> dict[str, Any]:
    """What a model does on a suite; `tell` is called after each pass over its images."""
    folder = find(suite.dataset, placement.data_root)
    has_images = [rows > 0 for rows in folder.index.splits[suite.split].rows_per_class]
    columns = class_columns(
        suite.name,
        [entry.id for entry in trained_on.classes],
        [entry.id for entry in folder.index.classes],
        has_images,
    )
    names = [entry.name for entry, has in zip(folder.index.classes, has_images, strict=True) if has]
    logits, labels = [], []
    with record_routing(model) as routing:
        for batches in _batches(suite, config, folder):
            rows = batches.loader(num_workers=placement.data_workers, pin_memory=device.type == "cuda")
            part_logits, part_labels = predict(model, rows, device=device, precision=config.precision)
            logits.append(part_logits[:, columns])
            labels.append(remap(part_labels, has_images))
            tell()
    return {
        "suite": suite.name,
        "title": suite.title,
        "shifted": suite.shifted,
        **measure(torch.cat(logits), torch.cat(labels), names),
        "experts": {
            block: {"load": layer["load"], "entropy": layer["entropy"]} for block, layer in routing.summary().items()
        },
    }


def _batches(suite: Suite, config: EvaluateConfig, folder: DatasetFolder) -> Iterator[EvalBatches]:
    """The suite's images, once for each of its corruptions."""
    for corruption in suite.corruptions or (None,):
        yield EvalBatches(
            folder,
            suite.split,
            img_size=config.blueprint.teacher.img_size,
            batch_size=config.batch_size,
            augmentation=config.augmentation,
            corruption=None if corruption is None else (corruption, suite.severity, config.seed),
            max_rows=suite.max_rows,
        )


def _routing_examples(
    model: nn.Module, config: EvaluateConfig, trained_on: Index, data_root: str | None, device: torch.device
) -> list[dict[str, Any]]:
    """Images of the first suite, and the first-choice expert of each patch in the last sparse block."""
    suite = config.suites[0]
    folder = find(suite.dataset, data_root)
    batches = EvalBatches(
        folder,
        suite.split,
        img_size=config.blueprint.teacher.img_size,
        batch_size=NUM_EXAMPLES,
        augmentation=config.augmentation,
        max_rows=NUM_EXAMPLES,
    )
    with record_routing(model) as routing:
        logits, labels = predict(model, batches, device=device, precision=config.precision)
    if not routing.layers:
        return []
    block, layer = list(routing.layers.items())[-1]
    first_choice = layer.top1.cpu()  # (B, L)
    names = [entry.name for entry in trained_on.classes]
    suite_names = [entry.name for entry in folder.index.classes]
    return [
        {
            "image": _as_png(batches.picture(index)),
            "label": suite_names[int(label)],
            "predicted": names[int(logits[index].argmax())],
            "block": block,
            "grid": _patch_grid(first_choice[index]).tolist(),
        }
        for index, label in enumerate(labels)
    ]


def _patch_grid(experts: Tensor) -> Tensor:
    """The experts (L,) of all tokens as the square of the patch tokens, which come last."""
    side = int(len(experts) ** 0.5)
    return experts[-side * side :].reshape(side, side)


def _as_png(pixels: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
