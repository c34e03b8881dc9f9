"""Stage `finetune`: train the whole student with labels, through Ray Train and DeepSpeed.

The same loop as everywhere runs on every rank; DeepSpeed takes the steps. Ranks may
be on any node: weights travel through Ray's object store, checkpoints through Ray
Train to `context.durable`, the result comes back in the last checkpoint. With
`engine="torch"` the stage runs in this process instead, for laptops and tests.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field
from safetensors.torch import load, load_file, save
from torch import nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Batches, find
from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import num_active_parameters, num_parameters
from m2mkd_ray.stages.parts import (
    HISTORY,
    WEIGHTS,
    Training,
    fresh_student,
    save_weights,
    train_here,
    training_metrics,
    validator,
)
from m2mkd_ray.training import Classification, DeepSpeedConfig, DeepSpeedEngine, TrainPlacement, fit

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)


class FinetunePlacement(TrainPlacement, frozen=True, extra="forbid"):
    """Where and how the whole student is trained."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed: ranks of a Ray Train job. torch: this process alone."""
    num_workers: int = Field(2, gt=0)
    """Ranks; divides the feed's `lanes`."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    max_failures: int = Field(3, ge=0)
    """How often Ray Train starts the ranks again from the last checkpoint."""
    start_timeout_s: float = Field(1800, gt=0)
    """How long to wait for the ranks' resources before trying again (a cluster may have to grow)."""


class FinetuneConfig(BaseModel, frozen=True, extra="forbid"):
    """The student, and how it is trained."""

    blueprint: Blueprint
    keep_stitches: bool
    start: Literal["assembled", "scratch"]
    """assembled: the distilled modules. scratch: random weights, the `pure` baseline."""
    training: Training


def run(config: FinetuneConfig, context: StageContext) -> Metrics:
    """Reads `data` and, unless it starts from scratch, `assembled`; writes `model.safetensors`, `history.json`."""
    placement = context.placement
    assert isinstance(placement, FinetunePlacement)
    model = fresh_student(
        config.blueprint,
        config.training.seed,
        drop_path=config.training.train.drop_path,
        keep_stitches=config.keep_stitches,
    )
    if config.start == "assembled":
        model.load_state_dict(load_file(context.inputs["assembled"] / WEIGHTS))
    if placement.engine == "torch":
        metrics, _ = train_here(Classification(model), config.training, context, validated=model)
        save_weights(model, context.out / WEIGHTS)
    else:
        metrics = _train_on_ranks(config, model, placement, context)
    return {
        **metrics,
        "num_parameters": num_parameters(model),
        "num_active_parameters": num_active_parameters(model),
    }


def _train_on_ranks(
    config: FinetuneConfig, model: nn.Module, placement: FinetunePlacement, context: StageContext
) -> Metrics:
    import os

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from m2mkd_ray.execution.relay import relay

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placement.start_timeout_s)
    environment = {"OMP_NUM_THREADS": str(max(1, round(placement.cpus_per_worker)))}
    if not placement.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    resources: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    with relay(context) as to_stage:
        trainer = TorchTrainer(
            train_on_this_rank,
            train_loop_config={
                "config": config,
                "placement": placement,
                "weights": ray.put(save(model.state_dict())),
                "relay": to_stage,
            },
            torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=placement.num_workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name="ranks",
                storage_path=context.durable,
                failure_config=FailureConfig(max_failures=placement.max_failures),
                worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # Train V2's; the stubs are V1's
            ),
        )
        result = trainer.fit()
    if result.checkpoint is None:
        raise TrainingError("Ray Train ended without a checkpoint, so there is no trained student. See its log above.")
    with result.checkpoint.as_directory() as folder:
        for name in (WEIGHTS, HISTORY):
            shutil.copyfile(Path(folder) / name, context.out / name)
        metrics: Metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return metrics


class RankSession:
    """What `fit` needs, from Ray Train."""

    def __init__(self, relay: "ActorHandle", rank: int) -> None:
        self.relay, self.rank = relay, rank
        self.downloaded: Path | None = None

    @property
    def checkpoints(self) -> "RankSession":
        """This session keeps them itself."""
        return self

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint that Ray Train committed, whole, on this node."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        if self.downloaded is None:
            self.downloaded = Path(checkpoint.to_directory(tempfile.mkdtemp(prefix="ranks-")))
        return int((self.downloaded / "step").read_text()), self.downloaded

    def save(self, step: int, files: Path) -> None:
        """Hand this rank's files to Ray Train, which merges those of all ranks; a barrier."""
        import ray.train

        (files / "step").write_text(str(step))
        checkpoint = ray.train.Checkpoint.from_directory(files)
        ray.train.report({"step": step}, checkpoint=checkpoint)
        shutil.rmtree(files)

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Tell the stage, from rank 0 only."""
        if self.rank == 0:
            self.relay.put.remote(step, total_steps, dict(metrics))


def train_on_this_rank(job: dict[str, Any]) -> None:
    """Runs on every rank: the one loop, with DeepSpeed; rank 0 reports the trained weights at the end."""
    import ray
    import ray.train
    import torch

    began = time.time()
    config, placement = job["config"], job["placement"]
    torch.set_num_threads(max(1, round(placement.cpus_per_worker)))
    training: Training = config.training
    ranks = ray.train.get_context()
    rank, world = ranks.get_world_rank(), ranks.get_world_size()
    session = RankSession(job["relay"], rank)
    ended = session.latest()
    if ended is not None and (ended[1] / WEIGHTS).exists():  # killed between the last report and its commit
        return session.save(*ended)
    model = fresh_student(
        config.blueprint, training.seed, drop_path=training.train.drop_path, keep_stitches=config.keep_stitches
    )
    model.load_state_dict(load(ray.get(job["weights"])))
    feed = Batches(training.feed, find(training.feed.dataset, placement.data_root), rank, world)
    engine = DeepSpeedEngine(
        Classification(model),
        training.train,
        placement.deepspeed,
        rows=training.feed.batch_size // world,
        micro_batch=placement.micro_batch,
    )
    validate = validator(model, training, placement.data_root, engine.device) if rank == 0 else None
    follow = validate if training.train.validate_every_epochs is not None else None
    history = fit(feed, engine, training.train, placement, session, seed=training.seed, validate=follow)
    files = Path(tempfile.mkdtemp(prefix="trained-"))
    if validate is not None:
        save_weights(model, files / WEIGHTS)
        (files / HISTORY).write_text(json.dumps(history))
        metrics = training_metrics(history, model) | {"num_ranks": world, "ranks_began_at": began} | dict(validate())
        (files / "metrics.json").write_text(json.dumps(metrics))
    session.save(training.train.total_steps(feed.steps_per_epoch), files)
