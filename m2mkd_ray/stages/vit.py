"""Stages `meta` and `teacher`: train a ViT with labels.

The meta model and a teacher trained end to end differ only in depth, so they are
one function. A pretrained teacher starts from a file or a timm name, and then only
its head is fitted, or all of it, or nothing.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator
from safetensors.torch import load_file
from torch import nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.data.shards import sha256
from m2mkd_ray.errors import DataError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import create_vit, num_parameters, pretrained_vit
from m2mkd_ray.stages.parts import WEIGHTS, Training, save_weights, train_here
from m2mkd_ray.training import Classification, seeded


class VitConfig(BaseModel, frozen=True, extra="forbid"):
    """A ViT, where its weights come from, and how it is trained."""

    vit: Vit
    training: Training
    weights: str | None = Field(None, exclude=True)
    """`timm` for the entry point's own weights, a local file, or None: random. With a need called `assembled`
    the weights are that artifact's. Not in the key, so that a file may move; what stands for it is below."""
    weights_are: str | None = None
    """`timm`, or the sha256 of a local file, so that other weights make another result."""
    tune: Literal["all", "head"] = "all"
    """What learns: everything, or only the classifier."""

    @model_validator(mode="after")
    def _a_head_needs_features(self) -> "VitConfig":
        if self.tune == "head" and self.weights is None:
            raise ValueError("tune=head fits a classifier on pretrained features: it needs `weights`")
        return self


def run(config: VitConfig, context: StageContext) -> Metrics:
    """Reads `data`, and `assembled` if there is one; writes `model.safetensors` and `history.json`."""
    with seeded(config.training.seed, "vit"):
        model = _initial(config, context)
    if config.tune == "head":
        model.requires_grad_(False)
        model.get_submodule("head").requires_grad_(True)
    metrics = train_here(Classification(model), config.training, context, validated=model)
    save_weights(model, context.out / WEIGHTS)
    return metrics | {"num_parameters": num_parameters(model)}


def _initial(config: VitConfig, context: StageContext) -> nn.Module:
    drop_path = config.training.train.drop_path
    if "assembled" in context.inputs:
        model = create_vit(config.vit, drop_path=drop_path)
        model.load_state_dict(load_file(context.inputs["assembled"] / WEIGHTS))
        return model
    if config.weights is None:
        return create_vit(config.vit, drop_path=drop_path)
    file = Path(config.weights)
    if config.weights != "timm" and file.is_file() and (found := sha256(file)) != config.weights_are:
        raise DataError(
            f"The weights in {file} are not those that the plan was made with: found sha256 {found}, "
            f"expected {config.weights_are}. Run the same command again to plan anew."
        )
    return pretrained_vit(config.vit, config.weights, drop_path=drop_path)
