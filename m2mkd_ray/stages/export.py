"""Stage `export`: the trained student as files that stand alone."""

import json
import shutil
from importlib.resources import files
from typing import Any

import jinja2
from pydantic import BaseModel

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Augmentation
from m2mkd_ray.evaluation.exported import CONFIG, ExportedConfig
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.stages.parts import WEIGHTS

CARD = "README.md"


class ExportConfig(BaseModel, frozen=True, extra="forbid"):
    """What is exported."""

    blueprint: Blueprint
    keep_stitches: bool
    augmentation: Augmentation
    """Of the training; its preprocessing is the export's."""
    recipe: dict[str, Any]
    """The recipe without its placement, for the model card."""


def run(config: ExportConfig, context: StageContext) -> Metrics:
    """Reads `data`, `model`, `evaluation`; writes `model.safetensors`, `config.json`, model card `README.md`."""
    data = json.loads((context.inputs["data"] / "data.json").read_text())
    (subject,) = json.loads((context.inputs["evaluation"] / "evaluation.json").read_text())
    manifest = context.input_manifests["model"]
    exported = ExportedConfig(
        blueprint=config.blueprint,
        keep_stitches=config.keep_stitches,
        augmentation=config.augmentation,
        classes=tuple(entry["name"] for entry in data["classes"]),
        recipe=config.recipe["name"],
        key=manifest["key"],
        versions={name: version for name, version in manifest["versions"].items() if version},
    )
    shutil.copyfile(context.inputs["model"] / WEIGHTS, context.out / WEIGHTS)
    (context.out / CONFIG).write_text(exported.model_dump_json(indent=1))
    card = _template().render(config=exported, recipe=config.recipe, data=data, subject=subject, manifest=manifest)
    (context.out / CARD).write_text(card)
    return {"num_parameters": subject["num_parameters"], "files": [WEIGHTS, CONFIG, CARD]}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("m2mkd_ray.stages") / "model_card.md.j2").read_text())
