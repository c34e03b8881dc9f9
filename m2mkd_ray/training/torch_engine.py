"""The engine of PyTorch alone: one process, or one rank of a process group that is there already.

With several ranks gradients are averaged by `DistributedDataParallel`, while the
backward pass goes on. Names in a checkpoint are those of the objective's module, so
one process or any number of ranks can go on from it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2mkd_ray.training.engine import agree_on_all_ranks, local_device, mean_of_all_ranks, numbers_of_all_ranks
from m2mkd_ray.training.objective import Objective
from m2mkd_ray.training.optim import TrainConfig, adamw
from m2mkd_ray.training.precision import Masters


class TorchEngine:
    """Takes the steps of one objective, on this process's device."""

    copies = True

    def __init__(self, objective: Objective, config: TrainConfig, *, compile: bool = False) -> None:
        is_alone = not (dist.is_available() and dist.is_initialized())
        self.rank, self.world = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self.device, self.objective, self.config = local_device(), objective, config
        module = cast(nn.Module, objective)
        module.to(self.device)
        objective.set_precision(config.precision)
        self.optimizer = adamw(objective.trainable, config)
        self.masters = Masters(objective.trainable, self.optimizer) if config.precision == "bf16_pure" else None
        if compile:
            compile_blocks(module)
        self.ranks = (
            DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
            if self.world > 1
            else None
        )
        self._logs: dict[str, Tensor] = {}

    def begin(self, lr: float, *, is_logged: bool) -> None:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.is_logged, self._logs = is_logged, {}

    def accumulate(
        self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, *, weight: float, is_last: bool
    ) -> None:
        """See `Engine`."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        watch = self.objective.stopwatch
        watch.start()
        with self._averaged(is_last):
            with autocast:
                loss, logs = (self.ranks or self.objective)(images, targets, teacher_logits)
            (loss * weight).backward()
        if self.masters is not None:
            self.masters.take_gradients()
        watch.lap("student")
        if self.objective.is_logged:
            for name, value in logs.items():
                self._logs[name] = self._logs.get(name, 0) + value * weight

    def update(self) -> Mapping[str, Tensor]:
        """See `Engine`."""
        watch = self.objective.stopwatch
        watch.start()
        if self.config.clip_norm is not None:
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            nn.utils.clip_grad_norm_(weights, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.give_weights()
        watch.lap("student")
        return self._logs

    def snapshot(self) -> Callable[[Path], None]:
        """See `Engine`; rank 0 writes, and later steps change nothing of it."""
        if self.rank != 0:
            return lambda folder: None
        state: dict[str, Any] = {
            "module": self.objective.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.masters is not None:
            state["masters"] = self.masters.state()
        copied = _copied(state)
        return lambda folder: torch.save(copied, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.objective.trainable.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.masters is not None:
            self.masters.load(state["masters"])

    def agree(self, yes: bool) -> bool:
        """See `Engine`."""
        return yes if self.world == 1 else agree_on_all_ranks(yes, self.device)

    def gather(self, number: int) -> list[int]:
        """See `Engine`."""
        return numbers_of_all_ranks(number, self.device, self.world)

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """See `Engine`."""
        return mean_of_all_ranks(values, self.world)

    def end(self) -> None:
        """See `Engine`."""
        if self.masters is not None:
            self.masters.end()

    def release(self) -> None:
        """See `Engine`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.trainable.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        if self.masters is not None:
            self.masters.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _averaged(self, is_last: bool) -> Any:
        """Whether ranks average the gradient now: at the last micro-batch, for all. Masters sum in float32, which the
        buckets of the ranks do not, so theirs are averaged each time."""
        is_due = self.ranks is None or is_last or self.masters is not None
        return nullcontext() if is_due or self.ranks is None else self.ranks.no_sync()


def compile_blocks(module: nn.Module) -> None:
    """Compile every transformer block in place, unless it is; equal blocks share their code.

    Names of parameters stay. Blocks rather than whole models: one is compiled for all of its kind, in seconds.
    Stochastic depth draws what it would draw uncompiled: the compiler takes torch's generator, not one of its own.
    """
    from torch._inductor import config as inductor  # the import alone takes a second

    inductor.fallback_random = True
    for part in module.modules():
        if isinstance(part, Block) and part._compiled_call_impl is None:
            part.compile()


def _copied(value: Any) -> Any:
    """A copy on the CPU of nested dicts, lists and tuples of tensors."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
