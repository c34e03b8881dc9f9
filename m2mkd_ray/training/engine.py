"""Engines: who takes an optimizer step, on which device, over how many ranks.

An engine gets an objective and a batch that is this rank's part of the global one;
micro-batches bound memory and leave the effective batch alone. Model code stays
plain single-device PyTorch: precision, accumulation, clipping and sharding are
put on here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field
from torch import Tensor, nn

from m2mkd_ray.training.objective import Objective
from m2mkd_ray.training.optim import TrainConfig, adamw


class TrainPlacement(BaseModel, frozen=True, extra="forbid"):
    """How a training is carried out; decides speed and memory, not what is learnt.

    Results are equal bit for bit, but for `micro_batch`, the number of ranks and `compile`, with which they are equal
    but for rounding; and, with stochastic depth or dropout, for the draws, which are made for a micro-batch. These
    are the same with any number of ranks only where a micro-batch is exactly one of the feed's lanes.
    """

    micro_batch: int | None = Field(None, gt=0)
    """Most images at a time on a device; None: this rank's whole part of the batch. Other parts, other draws."""
    data_workers: int = Field(0, ge=0)
    """Processes that decode images for a rank; 0 decodes in the training process."""
    augment_on_device: bool = False
    """Do what follows a training image's resize (flip, colours, shifts, erasing, mixing) on the device that trains,
    for a whole batch at once; it is handed 8-bit pixels, under a third of the bytes. On a CPU Pillow is faster."""
    checkpoint_every_s: float = Field(60, ge=0)
    """Seconds between checkpoints, which are kept only at points of the history; 0 keeps one at each."""
    log_every_steps: int = Field(20, gt=0)
    """Steps between points of the history, at which losses are fetched from the device."""
    compile: bool = False
    """Compile the models' blocks with `torch.compile`, once a process: a minute at first, then faster steps."""
    share_feed: bool | None = None
    """Make each batch once a node, in a process of its own, for all pairs there that train on the same ones. None:
    where images are decoded anew for each batch, which costs more than the handing over."""
    data_root: str | None = None
    """Folder with imported data sets; None: only what ships with the package."""


class Engine(Protocol):
    """Takes optimizer steps and keeps their state. A step is `begin`, `accumulate` for every micro-batch, `update`."""

    rank: int
    world: int
    device: torch.device
    objective: Objective
    copies: bool
    """Whether a snapshot is a copy, which may be written while the training goes on."""

    def begin(self, lr: float, *, is_logged: bool) -> None:
        """Begin a step. Of one that is not logged the objective leaves out what costs something to log."""

    def accumulate(
        self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, *, weight: float, is_last: bool
    ) -> None:
        """Add the gradient of a micro-batch, which is `weight` of this rank's images, and the step's last or not."""

    def update(self) -> Mapping[str, Tensor]:
        """Move the weights; returns what the objective logs, averaged over this rank's micro-batches."""

    def snapshot(self) -> Callable[[Path], None]:
        """What writes weights and optimizer state, as they are now, below a folder. Ranks that keep nothing there
        write nothing. Unless the engine `copies`, or with several ranks, it is called before the next step."""

    def load(self, folder: Path) -> None:
        """Take up the state that a snapshot wrote."""

    def agree(self, yes: bool) -> bool:
        """What rank 0 says, told to all ranks."""

    def gather(self, number: int) -> list[int]:
        """The number that each rank has, told to all ranks."""

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """Scalars of every rank, averaged over the ranks. Waits for the device."""

    def end(self) -> None:
        """Leave the trained weights in the objective's module, in float32."""

    def release(self) -> None:
        """Give back the memory of gradients and optimizer state; there will be no further step or snapshot."""


def local_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def micro_batches(images: Tensor, targets: Tensor, most: int | None) -> list[tuple[Tensor, Tensor]]:
    """The batch in equal parts of at most `most` images (as near to equal as its size allows)."""
    parts = -(-len(images) // (most or len(images)))
    return list(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True))


def agree_on_all_ranks(yes: bool, device: torch.device) -> bool:
    """What rank 0 of the process group says."""
    answer = torch.tensor([int(yes)], device=device)
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def numbers_of_all_ranks(number: int, device: torch.device, world: int) -> list[int]:
    """The number of each rank of the process group, by rank (there is none where `world` is 1)."""
    if world == 1:
        return [number]
    own = torch.tensor([number], device=device)
    found = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(found, own)
    return torch.cat(found).tolist()


def mean_of_all_ranks(values: Sequence[Tensor], world: int) -> list[float]:
    """Scalars, averaged over the ranks of the process group (there is none where `world` is 1)."""
    together = torch.stack([value.float() for value in values])
    if world > 1:
        dist.all_reduce(together)
        together /= world
    means: list[float] = together.tolist()
    return means


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
        ValueError: `rows` is not a multiple of the micro-batch, which DeepSpeed's accumulation needs; or the
            precision is one that DeepSpeed does not run here.
    """
    if config.precision == "bf16_pure":
        raise ValueError(
            "DeepSpeed trains in fp32 or bf16 here. Set precision to bf16, or train with the torch engine."
        )
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

    copies = False

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

        if not torch.cuda.is_available():
            # On CPUs DeepSpeed would compile a shared-memory all-reduce: a minute at first use, and a C++ compiler
            # on every node. gloo, which is there, does the same.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.objective = local_device(), objective
        objective.set_precision(config.precision)
        module = cast(nn.Module, objective).to(self.device)
        settings = deepspeed_config(config, choice, rows=rows, world=self.world, micro_batch=micro_batch)
        self.num_parts = settings["gradient_accumulation_steps"]
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(objective.trainable, config), config=settings
        )
        self._logs: dict[str, Tensor] = {}

    def begin(self, lr: float, *, is_logged: bool) -> None:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.objective.is_logged, self._logs = is_logged, {}

    def accumulate(
        self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, *, weight: float, is_last: bool
    ) -> None:
        """See `Engine`; DeepSpeed counts micro-batches itself, and moves the weights at the last one."""
        self.objective.stopwatch.start()
        loss, logs = self.engine(images, targets, teacher_logits)
        self.engine.backward(loss)
        self.engine.step()
        self.objective.stopwatch.lap("student")
        for name, value in logs.items():
            self._logs[name] = self._logs.get(name, 0) + value / self.num_parts

    def update(self) -> Mapping[str, Tensor]:
        """See `Engine`."""
        return self._logs

    def snapshot(self) -> Callable[[Path], None]:
        """See `Engine`; every rank writes its part."""
        return lambda folder: self.engine.save_checkpoint(str(folder), tag="state")

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
        return agree_on_all_ranks(yes, self.device)

    def gather(self, number: int) -> list[int]:
        """See `Engine`."""
        return numbers_of_all_ranks(number, self.device, self.world)

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """See `Engine`."""
        return mean_of_all_ranks(values, self.world)

    def end(self) -> None:
        """See `Engine`: they are there."""

    def release(self) -> None:
        """See `Engine`; DeepSpeed keeps its buffers until it is dropped itself."""
        self.engine.optimizer.zero_grad()
