"""Stage `assemble`: give a whole model the weights of its trained modules, and nothing less.

The student's go by its family's rules; a teacher that was incubated module by
module goes back the way it was cut.
"""

from typing import Literal

from pydantic import BaseModel
from safetensors.torch import load_file

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import create_vit, family, fill, num_parameters, split
from m2mkd_ray.stages.parts import MODULE, WEIGHTS, fresh_student, load_module, save_weights


class AssembleConfig(BaseModel, frozen=True, extra="forbid"):
    """Which model is put together."""

    blueprint: Blueprint
    model: Literal["student", "teacher"]
    keep_stitches: bool = False
    """Leave each pair's stitches between the student's modules (the reference's first version)."""
    seed: int
    """Of the tensors that no module trains, if the family has any."""


def run(config: AssembleConfig, context: StageContext) -> Metrics:
    """Reads `module-0` … `module-N`; writes `model.safetensors`."""
    files = [context.inputs[f"module-{index}"] / MODULE for index in range(config.blueprint.num_modules)]
    if config.model == "teacher":
        model = create_vit(config.blueprint.teacher)
        for module, file in zip(split(model, config.blueprint.teacher_depths), files, strict=True):
            load_module(module, file)
        save_weights(model, context.out / WEIGHTS)
        return {"num_parameters": num_parameters(model)}
    of_family = family(config.blueprint.student.family)
    student = fresh_student(config.blueprint, config.seed, drop_path=0, keep_stitches=config.keep_stitches)
    rules = of_family.rules(config.blueprint, keep_stitches=config.keep_stitches)
    filled = fill(student, [load_file(file) for file in files], rules, of_family.fresh(config.blueprint))
    save_weights(student, context.out / WEIGHTS)
    return {"num_parameters": num_parameters(student), "filled": filled.filled, "dropped": filled.dropped}
