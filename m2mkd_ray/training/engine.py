"""Engines: who takes an optimizer step, on which device, over how many ranks.

An engine gets an objective and a batch that is this rank's part of the global one;
micro-batches bound memory and leave the effective batch alone. Model code stays
plain single-device PyTorch: precision, accumulation, clipping and sharding are
put on here.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from m2mkd_ray.training.objective import Objective
from m2mkd_ray.training.optim import TrainConfig, adamw

logger = logging.getLogger(__name__)


class TrainPlacement(BaseModel, frozen=True, extra="forbid"):
    """How a training is carried out; decides speed and memory, never the result (but for rounding)."""

    micro_batch: int | None = Field(None, gt=0)
    """Most images at a time on a device; None: this rank's whole part of the batch."""
    data_workers: int = Field(0, ge=0)
    """Processes that decode images for a rank; 0 decodes in the training process."""
    checkpoint_every_s: float = Field(60, ge=0)
    """Seconds between checkpoints, which are kept only at points of the history; 0 keeps one at each."""
    log_every_steps: int = Field(20, gt=0)
    """Steps between points of the history, at which losses are fetched from the device."""
    data_root: str | None = None
    """Folder with imported data sets; None: only what ships with the package."""


class Engine(Protocol):
    """Takes optimizer steps and keeps their state."""

    rank: int
    world: int
    device: torch.device

    def step(self, images: Tensor, targets: Tensor, lr: float) -> Mapping[str, Tensor]:
        """One optimizer step on this rank's images; returns what the objective logs, averaged over micro-batches."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state below `folder`."""

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote."""

    def agree(self, yes: bool) -> bool:
        """What rank 0 says, told to all ranks."""


def local_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def micro_batches(images: Tensor, targets: Tensor, most: int | None) -> list[tuple[Tensor, Tensor]]:
    """The batch in equal parts of at most `most` images (as near to equal as its size allows)."""
    parts = -(-len(images) // (most or len(images)))
    return list(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True))


class TorchEngine:
    """One process, one device."""

    rank, world = 0, 1

    def __init__(self, objective: Objective, config: TrainConfig, micro_batch: int | None = None) -> None:
        self.device = local_device()
        self.objective = objective
        cast(nn.Module, objective).to(self.device)
        self.config, self.micro_batch = config, micro_batch
        self.optimizer = adamw(objective.trainable, config)

    def step(self, images: Tensor, targets: Tensor, lr: float) -> Mapping[str, Tensor]:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logs: dict[str, Tensor] = {}
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        for part_images, part_targets in micro_batches(images, targets, self.micro_batch):
            weight = len(part_images) / len(images)
            with bf16:
                loss, part_logs = self.objective(part_images, part_targets)
            (loss * weight).backward()
            for name, value in part_logs.items():
                logs[name] = logs.get(name, 0) + value * weight
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.objective.trainable.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logs

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        state = {"module": self.objective.trainable.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.objective.trainable.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def agree(self, yes: bool) -> bool:
        """See `Engine`."""
        return yes


class DeepSpeedConfig(BaseModel, frozen=True, extra="forbid"):
    """What of DeepSpeed may be chosen."""

    zero_stage: Literal[0, 1, 2] = 1
    """ZeRO: 0 replicates, 1 shards optimizer state, 2 gradients too. Stage 3 refuses mixtures of experts."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (ZeRO 1 and 2)."""


def deepspeed_config(
    config: TrainConfig, choice: DeepSpeedConfig, *, rows: int, world: int, micro_batch: int | None
) -> dict[str, Any]:
    """DeepSpeed's JSON for a rank that gets `rows` images a step.

    Raises:
        ValueError: `rows` is not a multiple of the micro-batch, which DeepSpeed's accumulation needs.
    """
    micro = min(micro_batch or rows, rows)
    if rows % micro:
        raise ValueError(
            f"DeepSpeed accumulates whole micro-batches: a rank's {rows} images are not a multiple of "
            f"micro_batch {micro}. Choose a divisor of {rows}."
        )
    zero: dict[str, Any] = {"stage": choice.zero_stage}
    if choice.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": rows * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        "gradient_clipping": config.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """One rank of a DeepSpeed job; the process group is already there (Ray Train makes it).

    The objective is the module that DeepSpeed wraps, so its forward gives the loss.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        choice: DeepSpeedConfig,
        *,
        rows: int,
        micro_batch: int | None = None,
    ) -> None:
        import deepspeed  # the import alone takes seconds and looks for a device
        import torch.distributed as dist

        if not torch.cuda.is_available():
            # On CPUs DeepSpeed would compile a shared-memory all-reduce: a minute at first use, and a C++ compiler
            # on every node. gloo, which is there, does the same.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = local_device()
        module = cast(nn.Module, objective).to(self.device)
        settings = deepspeed_config(config, choice, rows=rows, world=self.world, micro_batch=micro_batch)
        self.micro_batch = settings["train_micro_batch_size_per_gpu"]
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(objective.trainable, config), config=settings
        )

    def step(self, images: Tensor, targets: Tensor, lr: float) -> Mapping[str, Tensor]:
        """See `Engine`; what is logged is this rank's."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        logs: dict[str, Tensor] = {}
        parts = micro_batches(images, targets, self.micro_batch)
        for part_images, part_targets in parts:
            loss, part_logs = self.engine(part_images, part_targets)
            self.engine.backward(loss)
            self.engine.step()  # DeepSpeed counts micro-batches and moves the weights at the last one
            for name, value in part_logs.items():
                logs[name] = logs.get(name, 0) + value / len(parts)
        return logs

    def save(self, folder: Path) -> None:
        """See `Engine`; every rank writes its part."""
        self.engine.save_checkpoint(str(folder), tag="state")

    def load(self, folder: Path) -> None:
        """See `Engine`.

        Raises:
            ValueError: the state was written by another number of ranks.
        """
        shards = len(list((folder / "state").glob("*optim_states.pt")))
        if shards not in (0, self.world):
            raise ValueError(
                f"The checkpoint in {folder} was written by {shards} ranks, but there are {self.world} now; ZeRO's "
                f"optimizer shards fit only as many. Go on with num_workers={shards}, or drop the checkpoint."
            )
        self.engine.load_checkpoint(str(folder), tag="state")

    def agree(self, yes: bool) -> bool:
        """See `Engine`."""
        import torch.distributed as dist

        answer = torch.tensor([int(yes)], device=self.device)
        dist.broadcast(answer, src=0)
        return bool(answer.item())
