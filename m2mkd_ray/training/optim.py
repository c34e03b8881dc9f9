"""AdamW and its schedule, as in DeiT, Deep Incubation and m2mKD."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from timm.optim import param_groups_weight_decay
from torch import nn

from m2mkd_ray.training.precision import Precision

NO_DECAY = ("pos_embed", "cls_token", "reg_token", "experts.b1", "experts.b2")
"""Not decayed beside biases and everything with one dimension (DeiT; docs/method.md). The experts' biases are
stacked, so they have two."""


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """How long and how fast a model or module is trained; all of it decides the result."""

    epochs: float = Field(gt=0)
    """Passes over the training rows; a fraction is a part of one."""
    lr: float = Field(gt=0)
    """Peak learning rate. The reference scales it: 5e-4 * global batch / 512."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs of linear warm-up from `warmup_lr`, part of `epochs`."""
    warmup_lr: float = Field(1e-6, ge=0)
    min_lr: float = Field(1e-5, ge=0)
    """Where the cosine ends."""
    schedule: Literal["step", "epoch"] = "step"
    """Whether the learning rate moves every step, or every epoch as in the reference."""
    weight_decay: float = Field(0.05, ge=0)
    decayed: Literal["matrices", "all"] = Field("matrices", exclude_if=lambda decayed: decayed == "matrices")
    """What decays: matrices, or biases, norms and everything else too (as the NAC authors train). Left out of dumps
    while it is the former, so that keys stay as they were before there was this field."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float | None = Field(None, gt=0)
    """Largest global gradient norm; None does not clip."""
    drop_path: float = Field(0, ge=0, lt=1)
    """Stochastic depth rate of the last block; linear from 0 over the blocks."""
    precision: Precision = "fp32"
    """bf16: autocast over float32 weights. bf16_pure: bfloat16 weights, with float32 masters in the optimizer."""
    validate_every_epochs: float | None = Field(None, gt=0)
    """How often top-1 on the validation rows goes into the history; None: never."""
    patience: int | None = Field(None, gt=0)
    """End early when top-1 has not risen for so many validations in a row; None: never."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        if self.patience is not None and self.validate_every_epochs is None:
            raise ValueError(f"patience {self.patience} counts validations: set validate_every_epochs")
        return self

    @property
    def evaluation_precision(self) -> Literal["fp32", "bf16"]:
        """What a network that was trained so is evaluated in: autocast, for both kinds of bf16."""
        return "fp32" if self.precision == "fp32" else "bf16"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training; at least one."""
        return max(1, round(self.epochs * steps_per_epoch))


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step (0-based): linear warm-up, then a cosine over all epochs to `min_lr`.

    As timm's `CosineLRScheduler` without warm-up prefix. With `schedule="epoch"` it stands still
    within an epoch, and epochs 0 and 1 share a value, because the reference steps its scheduler
    with the number of the epoch that ended (kamanphoebe/m2mKD `di/main.py`).
    """
    epoch = step / steps_per_epoch
    if config.schedule == "epoch":
        epoch = max(0, int(epoch) - 1)
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    progress = min(1.0, epoch / config.epochs)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient, with weight decay on matrices only, or on all (`decayed`).

    timm's `param_groups_weight_decay` leaves out biases and tensors of one dimension;
    position embedding and class token are left out by name.
    """
    if config.decayed == "all":
        learnt = [weight for weight in module.parameters() if weight.requires_grad]
        groups = [{"params": learnt, "weight_decay": config.weight_decay}]
    else:
        exempt = [name for name, _ in module.named_parameters() if name.endswith(NO_DECAY)]
        groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=exempt)
    # Fused on a CPU too: half the time of the loop over tensors, and the same weights within rounding.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
