"""What stages share: models put together from artifacts, and one way to train.

This is no stage. It is where models, data, training and evaluation meet, so that
every stage file is left with what only it does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_ray.blueprint import Blueprint, Vit
from m2mkd_ray.data import Batches, EvalBatches, FeedConfig, find
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.evaluation.exported import WEIGHTS as WEIGHTS
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.models import create_vit, family, num_parameters, split
from m2mkd_ray.training import Point, TorchEngine, TrainConfig, TrainPlacement, fit, seeded
from m2mkd_ray.training.objective import Objective

MODULE = "module.safetensors"
HISTORY = "history.json"


class Validation(BaseModel, frozen=True, extra="forbid"):
    """The rows that a training is looked at with, from its own data set."""

    split: str
    max_rows: int | None = Field(None, gt=0)
    """Only so many rows, as many of every class; None takes all."""
    batch_size: int = Field(256, gt=0)


class Training(BaseModel, frozen=True, extra="forbid"):
    """All that decides a training but for what is trained."""

    feed: FeedConfig
    train: TrainConfig
    validation: Validation
    seed: int


def load_vit(vit: Vit, folder: Path) -> VisionTransformer:
    """The ViT whose weights an artifact holds, in evaluation mode."""
    model = create_vit(vit)
    model.load_state_dict(load_file(folder / WEIGHTS))
    model.eval()
    return model


def load_meta(blueprint: Blueprint, folder: Path) -> list[nn.Module]:
    """The modules of the meta model that an artifact holds: one block each."""
    return list(split(load_vit(blueprint.meta, folder), (1,) * blueprint.num_modules))


def load_student(blueprint: Blueprint, folder: Path, *, keep_stitches: bool) -> nn.Module:
    """The whole student whose weights an artifact holds, in evaluation mode."""
    model = family(blueprint.student.family).model(blueprint, keep_stitches=keep_stitches)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


def fresh_student(blueprint: Blueprint, seed: int, *, drop_path: float, keep_stitches: bool) -> nn.Module:
    """A whole student with random weights that follow from the seed."""
    with seeded(seed, "student"):
        return family(blueprint.student.family).model(blueprint, drop_path=drop_path, keep_stitches=keep_stitches)


def load_module(module: nn.Module, file: Path) -> nn.Module:
    """The module with the weights of a file, in evaluation mode."""
    module.load_state_dict(load_file(file))
    return module.eval()


def save_weights(module: nn.Module, file: Path) -> None:
    """Write a module's tensors as safetensors, from the CPU."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, file)


def validator(
    model: nn.Module, training: Training, placement: TrainPlacement, device: torch.device
) -> Callable[[], Mapping[str, float]]:
    """A function that measures top-1 of the model on the validation rows."""
    batches = EvalBatches(
        find(training.feed.dataset, placement.data_root),
        training.validation.split,
        img_size=training.feed.img_size,
        batch_size=training.validation.batch_size,
        augmentation=training.feed.augmentation,
        max_rows=training.validation.max_rows,
    )

    def validate() -> Mapping[str, float]:
        rows = batches.loader(num_workers=placement.data_workers, pin_memory=device.type == "cuda")
        logits, labels = predict(model, rows, device=device, precision=training.train.evaluation_precision)
        return {"val_top1": top_k_accuracy(logits, labels, 1)}

    return validate


def train_here(
    objective: Objective, training: Training, context: StageContext, *, validated: nn.Module
) -> dict[str, Any]:
    """Train an objective in this process on its device; writes `history.json`.

    `validated` is the model whose top-1 is followed: the whole one, or the hybrid.
    Returns metrics of the training.
    """
    placement = cast(TrainPlacement, context.placement)
    feed = Batches(training.feed, find(training.feed.dataset, placement.data_root))
    engine = TorchEngine(objective, training.train, compile=placement.compile)
    validate = validator(validated, training, placement, engine.device)
    history = fit(
        feed,
        engine,
        training.train,
        placement,
        context,
        seed=training.seed,
        validate=validate if training.train.validate_every_epochs is not None else None,
    )
    (context.out / HISTORY).write_text(json.dumps(history))
    return training_metrics(history, objective.trainable) | {"val_top1": final_top1(history, validate)}


def final_top1(history: Sequence[Point], validate: Callable[[], Mapping[str, float]]) -> float:
    """Top-1 of the trained model: what the history ends with, or measured now if it was not validated."""
    return history[-1]["val_top1"] if "val_top1" in history[-1] else validate()["val_top1"]


def training_metrics(history: Sequence[Point], trained: nn.Module) -> dict[str, Any]:
    """What the table of stages shows of a training: steps, median speed, loss at the end, first step's time."""
    losses = [point for point in history if "loss" in point]
    speeds = sorted(point["images_per_s"] for point in losses)
    return {
        "steps": int(losses[-1]["step"]),
        "loss": losses[-1]["loss"],
        "images_per_s": speeds[len(speeds) // 2],
        "data_wait": sum(point["data_wait"] for point in losses) / len(losses),
        "first_step_at": history[0].get("first_step_at"),
        "num_parameters": num_parameters(trained),
        **({"teacher_share": losses[-1]["teacher_share"]} if "teacher_share" in losses[-1] else {}),
    }
