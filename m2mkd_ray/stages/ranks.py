"""What runs on each rank of a fine-tuning: the one loop, with DeepSpeed's steps, inside Ray Train.

This is no stage; `finetune` starts it. Checkpoints go through Ray Train, which merges
the folders of all ranks. Ours carry what Ray's do not: the step, who wrote them, and
the hash of every file, checked before DeepSpeed reads one. DeepSpeed keeps its state
as pickles, so whoever may write the store may run code on the ranks (docs/design.md).
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field
from safetensors.torch import load

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Batches, find
from m2mkd_ray.errors import ArtifactError, UsageError
from m2mkd_ray.execution.digests import digests, from_json, wrong_contents
from m2mkd_ray.execution.scratch import own_folder
from m2mkd_ray.models import student_with
from m2mkd_ray.stages.group import Group, has_notice, tell_errors
from m2mkd_ray.stages.parts import (
    HISTORY,
    WEIGHTS,
    Training,
    final_top1,
    own_feed,
    save_weights,
    training_metrics,
    validator,
)
from m2mkd_ray.training import Classification, DeepSpeedConfig, DeepSpeedEngine, TrainPlacement, fit

if TYPE_CHECKING:
    from ray.actor import ActorHandle

METRICS = "metrics.json"
STATE = "ranks.json"


class FinetunePlacement(TrainPlacement, frozen=True, extra="forbid"):
    """Where and how the whole student is trained."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed: ranks of a Ray Train job. torch: this process alone."""
    num_workers: int = Field(2, gt=0)
    """Ranks; divides the feed's `lanes`."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    """DeepSpeed gives each rank a device of its own, so neither fractions nor several."""
    node_group: str = ""
    """Only on nodes of this group, as in `Resources`."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    max_failures: int = Field(3, ge=0)
    """How often Ray Train starts the ranks again from the last checkpoint."""
    start_timeout_s: float = Field(1800, gt=0)
    """How long to wait for the ranks' resources before trying again (a cluster may have to grow)."""

    @property
    def group(self) -> Group | None:
        """The ranks; None: there are none."""
        if self.engine == "torch":
            return None
        return Group(
            self.num_workers,
            self.cpus_per_worker,
            self.gpus_per_worker,
            self.max_failures,
            self.start_timeout_s,
            self.node_group,
        )


class FinetuneConfig(BaseModel, frozen=True, extra="forbid"):
    """The student, and how it is trained."""

    blueprint: Blueprint
    keep_stitches: bool
    start: Literal["assembled", "scratch"]
    """assembled: the distilled modules. scratch: random weights, the `pure` baseline."""
    training: Training


@dataclass(frozen=True)
class RankJob:
    """What every rank is given."""

    config: FinetuneConfig
    placement: FinetunePlacement
    weights: Any
    """Reference to the student's first weights, as safetensors, in Ray's object store."""
    relay: "ActorHandle"
    durable: str
    """Where the checkpoints lie, for messages."""


@dataclass(frozen=True)
class Ranks:
    """Who writes a checkpoint; ZeRO's shards fit only the same again."""

    num_workers: int
    zero_stage: int
    began_at: float
    """When the first attempt began, in seconds since 1970."""


def train_on_this_rank(arguments: dict[str, RankJob]) -> None:
    """Train to the end; rank 0 reports the weights. An expected error reaches the stage through the relay."""
    job = arguments["job"]
    tell_errors(job.relay, lambda: _train(job))


def _train(job: RankJob) -> None:
    import ray
    import ray.train.torch
    import torch

    placement = job.placement
    torch.set_num_threads(max(1, round(placement.cpus_per_worker)))
    if placement.gpus_per_worker:
        # Before anything is put on a device: ranks see all GPUs of their node, and the first is the current one.
        torch.cuda.set_device(ray.train.torch.get_device())
    of_train = ray.train.get_context()
    rank, world = of_train.get_world_rank(), of_train.get_world_size()
    ranks = Ranks(world, placement.deepspeed.zero_stage, time.time())
    with own_folder(f"rank-{rank}") as folder:
        _train_with(RankSession(job, rank, ranks, folder))


def _train_with(session: "RankSession") -> None:
    import ray

    job, rank, world = session.job, session.rank, session.ranks.num_workers
    config, placement, training = job.config, job.placement, job.config.training
    ended = session.latest()
    if ended is not None and (ended[1] / WEIGHTS).exists():  # killed between the last report and its commit
        return session.save(*ended)
    weights, drop_path = load(ray.get(job.weights)), training.train.drop_path
    model = student_with(config.blueprint, weights, drop_path=drop_path, keep_stitches=config.keep_stitches)
    folder = find(training.feed.dataset, placement.data_root)
    feed = own_feed(Batches(training.feed, folder, rank, world), placement)
    engine = DeepSpeedEngine(
        Classification(model),
        training.train,
        placement.deepspeed,
        rows=training.feed.batch_size // world,
        micro_batch=placement.micro_batch,
    )
    validate = validator(model, training, placement, engine.device) if rank == 0 else None
    follow = validate if training.train.validate_every_epochs is not None else None
    history = fit(feed, engine, training.train, placement, session, seed=training.seed, validate=follow)
    files = session.scratch()
    if validate is not None:
        save_weights(model, files / WEIGHTS)
        (files / HISTORY).write_text(json.dumps(history))
        metrics = {
            **training_metrics(history, model),
            "num_ranks": world,
            "ranks_began_at": session.ranks.began_at,
            "val_top1": final_top1(history, validate),
        }
        (files / METRICS).write_text(json.dumps(metrics))
    session.save(training.train.total_steps(feed.steps_per_epoch), files)


class RankSession:
    """What `fit` needs, from Ray Train. What is on its way to or from Ray is in `folder`, on this node's disk."""

    def __init__(self, job: RankJob, rank: int, ranks: Ranks, folder: Path) -> None:
        self.job, self.rank, self.ranks, self.folder = job, rank, ranks, folder
        self.downloaded: Path | None = None

    @property
    def checkpoints(self) -> "RankSession":
        """This session keeps them itself."""
        return self

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint that Ray Train committed, whole, on this node.

        Raises:
            ArtifactError: files of it are missing or changed.
            UsageError: it was written by another number of ranks, or with another ZeRO stage.
        """
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        if self.downloaded is None:
            self.downloaded = Path(checkpoint.to_directory(self.scratch()))
            self._check(self.downloaded)
        return self._state(self.downloaded)["step"], self.downloaded

    def scratch(self) -> Path:
        """See `Checkpoints`."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def save(self, step: int, files: Path) -> None:
        """Hand this rank's files to Ray Train, which merges those of all ranks; a barrier."""
        import ray.train

        hashes = {name: asdict(digest) for name, digest in digests(files, skip=_ours(files)).items()}
        (files / f"hashes-{self.rank}.json").write_text(json.dumps(hashes))
        (files / STATE).write_text(json.dumps({"step": step, **asdict(self.ranks)}))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(files))
        shutil.rmtree(files)

    def has_notice(self) -> bool:
        """See `Session`."""
        return has_notice()

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Tell the stage, from rank 0 only."""
        if self.rank == 0:
            self.job.relay.put.remote(step, total_steps, dict(metrics), tuple(landmarks))

    def _check(self, folder: Path) -> None:
        written = self._state(folder)
        problems = [
            problem
            for rank in range(written["num_workers"])
            for problem in wrong_contents(from_json(json.loads((folder / f"hashes-{rank}.json").read_text())), folder)
        ]
        if problems:
            raise ArtifactError(
                f"The fine-tuning's checkpoint below {self.job.durable} is spoilt: {'; '.join(problems)}. "
                f"Remove that folder to fine-tune anew."
            )
        for name in ("num_workers", "zero_stage"):
            found, now = written[name], getattr(self.ranks, name)
            if found != now and not (folder / WEIGHTS).exists():
                raise UsageError(
                    f"The fine-tuning's checkpoint below {self.job.durable} was written with {name}={found}, but now "
                    f"it is {now}, and ZeRO's shards fit only the same again. Go on with {found}, or remove that "
                    f"folder to fine-tune anew."
                )
        self.ranks = Ranks(self.ranks.num_workers, self.ranks.zero_stage, written["began_at"])

    @staticmethod
    def _state(folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        return state


def _ours(files: Path) -> list[str]:
    """Files that are written when the rest is whole; `latest` is DeepSpeed's, the same from every rank."""
    return [STATE, "latest", *(file.name for file in files.glob("hashes-*.json"))]
