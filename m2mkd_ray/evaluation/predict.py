"""Logits of a model, batch by batch."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn


def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,), both on the CPU, of batches (images, labels).

    The model is evaluated without gradients; it and each of its parts are left in the mode that they were in (a
    hybrid's frozen parts are in another than its student module).
    """
    were_training = {part: part.training for part in model.modules()}
    model.eval()
    logits, labels = [], []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for images, batch_labels in batches:
            logits.append(model(images.to(device, non_blocking=True)).float().cpu())
            labels.append(batch_labels)
    for part, was_training in were_training.items():
        part.training = was_training
    return torch.cat(logits), torch.cat(labels)
