"""The only training loop.

It knows no model, no data set and no cluster: an objective gives the loss, a feed
gives the batch of a step, an engine takes the step, a session keeps checkpoints.
Because a batch and the randomness of a step follow from (seed, step), a training
that was killed and taken up from a checkpoint ends with the same weights, bit for
bit, as one that was not.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.training.engine import Engine, TrainPlacement
from m2mkd_ray.training.optim import TrainConfig, learning_rate
from m2mkd_ray.training.seed import derive

logger = logging.getLogger(__name__)

Point = dict[str, float]
"""One row of a history: step, epoch, lr, images_per_s, and what the objective logs."""


class Feed(Protocol):
    """The batches of a training, as a function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> Iterable["Batch"]:
        """The batches of steps `start` to `stop`, in order."""


class Batch(Protocol):
    """This rank's part of a batch: images (B, 3, H, W) and soft targets (B, K)."""

    images: Tensor
    targets: Tensor


class Checkpoints(Protocol):
    """Where a training keeps its state; a folder a checkpoint."""

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint as (step, folder), or None."""

    def save(self, step: int, files: Path) -> None:
        """Keep `files` as the checkpoint of `step`."""


class Session(Protocol):
    """What the loop needs of the place that it runs in."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Where state is kept."""

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """How far the training is."""


@dataclass
class Meter:
    """Counts images and seconds since the last point of the history."""

    images: int = 0
    data_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def rates(self) -> Point:
        """Images a second and the share of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return {"images_per_s": self.images / seconds, "data_wait": self.data_s / seconds}

    def pause(self, seconds: float) -> None:
        """Leave out seconds in which nothing was trained."""
        self.since += seconds


def fit(
    feed: Feed,
    engine: Engine,
    config: TrainConfig,
    placement: TrainPlacement,
    session: Session,
    *,
    seed: int,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> list[Point]:
    """Train to the end, from the newest checkpoint if there is one; returns the history.

    Args:
        feed: this rank's batches.
        engine: holds the objective; at the end its weights are the trained ones.
        config: the recipe of the training.
        placement: how to carry it out.
        session: checkpoints and progress.
        seed: of dropout and drop path (with step and rank).
        validate: measured every `validate_every_epochs`, at step 0 and at the end.

    Raises:
        TrainingError: the loss is not finite. The newest checkpoint stays.
    """
    total = config.total_steps(feed.steps_per_epoch)
    validations = _validation_steps(config, feed.steps_per_epoch, total) if validate else set()
    start, history = _resume(engine, session)
    first_step_s = 0.0
    saved_at, meter = time.monotonic(), Meter()
    pinned = engine.device.type == "cuda"
    batches = iter(feed.loader(start, total, num_workers=placement.data_workers, pin_memory=pinned))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for step in range(start, total):
            if validate and step in validations and not any(p["step"] == step and "val_top1" in p for p in history):
                began = time.perf_counter()
                history.append({"step": step, "epoch": step / feed.steps_per_epoch, **validate()})
                meter.pause(time.perf_counter() - began)
            asked = time.perf_counter()
            batch = next(batches)
            meter.data_s += time.perf_counter() - asked
            torch.manual_seed(derive(seed, "step", step, engine.rank))
            lr = learning_rate(config, step, feed.steps_per_epoch)
            images, targets = (part.to(engine.device, non_blocking=True) for part in (batch.images, batch.targets))
            logs = engine.step(images, targets, lr)
            meter.images += len(batch.images) * engine.world
            first_step_s = first_step_s or time.time()
            done = step + 1
            if done % placement.log_every_steps and done != total:
                continue
            values = {name: float(value) for name, value in logs.items()}
            _require_finite(values, step, session)
            history.append({"step": done, "epoch": done / feed.steps_per_epoch, "lr": lr, **values, **meter.rates()})
            session.report(done, total, history[-1])
            meter = Meter()
            if done != total and engine.agree(time.monotonic() - saved_at >= placement.checkpoint_every_s):
                _save(engine, session, done, history)
                saved_at, meter = time.monotonic(), Meter()
    if validate:
        history.append({"step": total, "epoch": total / feed.steps_per_epoch, **validate()})
    if first_step_s and history:
        history[0].setdefault("first_step_at", first_step_s)
    return history


def _validation_steps(config: TrainConfig, steps_per_epoch: int, total: int) -> set[int]:
    if config.validate_every_epochs is None:
        return set()
    every = max(1, round(config.validate_every_epochs * steps_per_epoch))
    return set(range(0, total, every))


def _resume(engine: Engine, session: Session) -> tuple[int, list[Point]]:
    checkpoint = session.checkpoints.latest()
    if checkpoint is None:
        return 0, []
    step, folder = checkpoint
    engine.load(folder)
    logger.info("Resuming from the checkpoint of step %d", step)
    return step, json.loads((folder / "history.json").read_text())


def _save(engine: Engine, session: Session, step: int, history: list[Point]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    engine.save(folder)
    if engine.rank == 0:  # ranks' folders are merged where there are several
        (folder / "history.json").write_text(json.dumps(history))
    session.checkpoints.save(step, folder)


def _require_finite(values: Mapping[str, float], step: int, session: Session) -> None:
    if all(torch.isfinite(torch.tensor(value)) for value in values.values()):
        return
    kept = session.checkpoints.latest()
    raise TrainingError(
        f"The loss is not finite at step {step}: {dict(values)}. "
        f"{f'The checkpoint of step {kept[0]} is kept' if kept else 'No checkpoint was written yet'}. "
        f"Lower the learning rate, set clip_norm to 1.0 or precision to fp32; a changed setting starts anew."
    )
