"""What stages share: models put together from artifacts, and one way to train.

This is no stage. It is where models, data, training and evaluation meet, so that
every stage file is left with what only it does.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from pyarrow import fs
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Vit
from m2mkd_ray.data import (
    Augmentation,
    Batches,
    DatasetFolder,
    Drafts,
    EvalBatches,
    FeedConfig,
    OnDevice,
    SharedBatches,
    SharedDrafts,
    find,
)
from m2mkd_ray.evaluation import predict, top_k_accuracy
from m2mkd_ray.evaluation.exported import WEIGHTS as WEIGHTS
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.models import create_vit, family, num_parameters, split, student_with
from m2mkd_ray.training import Member as Learner
from m2mkd_ray.training import Point, StepFlops, TorchEngine, TrainConfig, TrainPlacement, fit_together, seeded
from m2mkd_ray.training.engine import local_device
from m2mkd_ray.training.objective import Objective
from m2mkd_ray.training.saving import Saver
from m2mkd_ray.training.seams import Session

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
    return student_with(blueprint, load_file(folder / WEIGHTS), keep_stitches=keep_stitches).eval()


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


def files_of(durable: str) -> tuple[fs.FileSystem, str]:
    """The file system of a stage's durable folder, and its path there."""
    return fs.FileSystem.from_uri(durable) if "://" in durable else (fs.LocalFileSystem(), durable)


def validator(
    model: nn.Module, training: Training, placement: TrainPlacement, device: torch.device
) -> Callable[[], Mapping[str, float]]:
    """A function that measures top-1 of the model on the validation rows."""
    folder = find(training.feed.dataset, placement.data_root)
    feed = training.feed
    batches = _rows(folder.path, folder.index.fingerprint, training.validation, feed.img_size, feed.augmentation)

    def validate() -> Mapping[str, float]:
        rows = batches.loader(num_workers=placement.data_workers, pin_memory=device.type == "cuda")
        logits, labels = predict(model, rows, device=device, precision=training.train.evaluation_precision)
        return {"val_top1": top_k_accuracy(logits, labels, 1)}

    return validate


@dataclass(frozen=True)
class Trainee:
    """A training, ready to be begun or taken up in this process."""

    objective: Objective
    training: Training
    context: StageContext
    validated: nn.Module
    """The model whose top-1 is followed: the whole one, or the hybrid."""
    flops_per_image: StepFlops | None = None
    """Floating-point operations of a training step, for what is counted; None: not known."""
    teacher_logits: Callable[[int], Tensor | None] | None = None
    """The teacher's logits (B, K) of a step's batch, if they are at hand."""
    session: Session | None = None
    """Where its checkpoints and reports go; None: to `context`."""

    @property
    def placement(self) -> TrainPlacement:
        """How it is carried out."""
        return cast(TrainPlacement, self.context.placement)


Feed = Batches | SharedBatches | OnDevice
"""Batches, wherever they are made and finished."""


def feed_of(config: FeedConfig, context: StageContext, rank: int = 0, world: int = 1) -> Feed:
    """A rank's batches: made once a node for all that train on the same ones, where there may be several."""
    placement = cast(TrainPlacement, context.placement)
    folder = find(config.dataset, placement.data_root)
    batches = Batches(config, folder, rank, world)
    wants = batches.decodes_anew if placement.share_feed is None else placement.share_feed
    if not (wants and context.is_shared):
        return own_feed(batches, placement)
    if placement.augment_on_device:
        return OnDevice(SharedDrafts(config, folder, context.stream, rank, world), local_device())
    return SharedBatches(config, folder, context.stream, rank, world)


def own_feed(batches: Batches, placement: TrainPlacement) -> Batches | OnDevice:
    """Batches that this process makes for itself, finished where the placement says."""
    return OnDevice(Drafts(batches), local_device()) if placement.augment_on_device else batches


@lru_cache(maxsize=1)
def _rows(
    path: Path, fingerprint: str, validation: Validation, img_size: int, augmentation: Augmentation
) -> EvalBatches:
    """The rows that trainings are looked at with; kept, as members of a cohort and the next stage of this process read
    the same ones, and those of a small split are decoded only once. `fingerprint` tells contents apart."""
    return EvalBatches(
        DatasetFolder.open(path),
        validation.split,
        img_size=img_size,
        batch_size=validation.batch_size,
        augmentation=augmentation,
        max_rows=validation.max_rows,
    )


def train_here(
    objective: Objective, training: Training, context: StageContext, *, validated: nn.Module
) -> dict[str, Any]:
    """Train an objective in this process on its device; writes `history.json`. Returns metrics of the training."""
    ((_, trained),) = train_together([Trainee(objective, training, context, validated)])
    if isinstance(trained, Exception):
        raise trained
    return trained


def train_together(trainees: Sequence[Trainee]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
    """Train on the same batches in this process, on one device; writes each one's `history.json`.

    Gives each one's place with the metrics of its training as it ends, or with what it failed by.
    """
    if not trainees:
        return
    first = trainees[0]
    feed = feed_of(first.training.feed, first.context)
    members, places = [], []
    for place, trainee in enumerate(trainees):
        try:
            members.append(member_of(trainee))
            places.append(place)
        except Exception as error:  # no memory for one more, say: the others have theirs
            yield place, error
    for ended in fit_together(feed, members, first.placement):
        place = places[ended.place]
        one = trainees[place]
        if ended.history is None:
            assert ended.error is not None
            yield place, ended.error
            continue
        try:
            (one.context.out / HISTORY).write_text(json.dumps(ended.history))
            top1 = final_top1(ended.history, validator_of(one, members[ended.place].engine.device))
            yield place, training_metrics(ended.history, one.objective.trainable) | {"val_top1": top1}
        except Exception as error:
            yield place, error


def train_rank(one: Trainee, feed: Feed, measured: Mapping[str, float]) -> None:
    """Train as one of several ranks. What it comes to is the newest checkpoint, from which the stage goes on.

    The first rank adds to the history what it has `measured`, and the accuracy at the end: the stage's own process may
    have no device for that.
    """
    member = member_of(one)
    ended = next(fit_together(feed, [member], one.placement))  # goes no further: the state is kept below
    if ended.error is not None:
        raise ended.error
    assert ended.history is not None
    if member.engine.rank == 0:
        last = ended.history[-1]
        top1 = {"val_top1": final_top1(ended.history, validator_of(one, member.engine.device))}
        ended.history.append({"step": last["step"], "epoch": last["epoch"], **top1, **measured})
        saver = Saver(one.context.checkpoints, beside=False)  # as one process would leave it
        saver.save(int(ended.history[-1]["step"]), member.engine.snapshot(), ended.history)


def member_of(one: Trainee) -> Learner:
    """What the loop trains; of several ranks the first alone validates."""
    train = one.training.train
    engine = TorchEngine(one.objective, train, compile=one.placement.compile)
    follows = train.validate_every_epochs is not None and engine.rank == 0
    return Learner(
        engine=engine,
        config=train,
        session=one.session or one.context,
        seed=one.training.seed,
        validate=validator_of(one, engine.device) if follows else None,
        teacher_logits=one.teacher_logits,
        flops_per_image=one.flops_per_image,
    )


def validator_of(one: Trainee, device: torch.device) -> Callable[[], Mapping[str, float]]:
    """A function that measures top-1 of what is followed of a training."""
    return validator(one.validated, one.training, one.placement, device)


def final_top1(history: Sequence[Point], validate: Callable[[], Mapping[str, float]]) -> float:
    """Top-1 of the trained model: what the history ends with, or measured now if it was not validated."""
    return history[-1]["val_top1"] if "val_top1" in history[-1] else validate()["val_top1"]


SUMMED = (
    "train_s", "prefix_s", "teacher_s", "student_s", "suffix_s",
    "teacher_calls", "cache_hits", "decodes", "own_batches", "flops",
)  # fmt: skip
"""Counters of a history that add up (`m2mkd_ray.training.counters`)."""


TOLD_BY_RANKS = ("teacher_hybrid_top1",)
"""What a history ends with, beside the accuracy of what was trained, if ranks trained it."""


def training_metrics(history: Sequence[Point], trained: nn.Module) -> dict[str, Any]:
    """What the tables of stages and counters show of a training: median speed, loss at the end, what it took."""
    points = [point for point in history if "loss" in point]
    speeds = sorted(point["images_per_s"] for point in points)
    summed = {name: sum(point.get(name, 0.0) for point in points) for name in SUMMED}
    mfu = [(point["mfu"], point["train_s"]) for point in points if "mfu" in point]
    return {
        **{name: history[-1][name] for name in TOLD_BY_RANKS if name in history[-1]},
        "steps": int(points[-1]["step"]),
        "loss": points[-1]["loss"],
        "images_per_s": speeds[len(speeds) // 2],
        "data_wait": sum(point["data_wait"] for point in points) / len(points),
        "first_step_at": history[0].get("first_step_at"),
        "num_parameters": num_parameters(trained),
        **({"teacher_share": points[-1]["teacher_share"]} if "teacher_share" in points[-1] else {}),
        **{name: value for name, value in summed.items() if any(name in point for point in points)},
        **({"mfu": sum(share * s for share, s in mfu) / sum(s for _, s in mfu)} if mfu else {}),
        "peak_memory_gb": max(point.get("peak_memory_gb", 0.0) for point in points),
    }
