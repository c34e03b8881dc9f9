"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator
from itertools import starmap

import torch
from torch import Tensor

from m2mkd_ray.training.seams import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and targets of every batch, on the device.

    To a GPU they are copied from pinned memory in a stream of their own. Nothing waits for the GPU, so the process
    asks for the next batch while the GPU is at work on the one before, and both copies and decoding are hidden.
    """
    pairs = ((batch.images, batch.targets) for batch in batches)
    if device.type != "cuda":
        return iter(pairs)
    stream = torch.cuda.Stream(device)

    def copied(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(stream):
            images, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        now = torch.cuda.current_stream(device)
        now.wait_stream(stream)
        for tensor in (images, targets):
            tensor.record_stream(now)  # else the memory is given away while the step still reads it
        return images, targets

    return starmap(copied, pairs)
