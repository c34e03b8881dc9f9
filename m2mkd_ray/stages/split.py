"""Stage `split`: cut the teacher into its modules, a file each."""

from pydantic import BaseModel

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import num_parameters, split
from m2mkd_ray.stages.parts import load_vit, save_weights


class SplitConfig(BaseModel, frozen=True, extra="forbid"):
    """A ViT and where it is cut."""

    vit: Vit
    depths: tuple[int, ...]


def run(config: SplitConfig, context: StageContext) -> Metrics:
    """Reads `teacher`; writes `module-0.safetensors`, `module-1.safetensors`, …"""
    modules = split(load_vit(config.vit, context.inputs["teacher"]), config.depths)
    for index, module in enumerate(modules):
        save_weights(module, context.out / f"module-{index}.safetensors")
    return {"num_modules": len(modules), "num_parameters": [num_parameters(module) for module in modules]}
