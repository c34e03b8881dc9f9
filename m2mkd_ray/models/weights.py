"""Pretrained weights for a monolithic ViT, from timm's hub or a file."""

import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.errors import FillError, UsageError
from m2mkd_ray.models.vit import create_vit

logger = logging.getLogger(__name__)

HEAD = ("head.weight", "head.bias")
"""The classifier: the only tensors that pretrained weights may lack."""

DAMAGED_PICKLE = (UnpicklingError, EOFError, AttributeError, LookupError, ValueError, struct.error)
"""What unpickling a file raises that is cut off or no pickle at all (`pickle.UnpicklingError`'s documentation)."""


def pretrained_vit(vit: Vit, weights: str, drop_path: float = 0.0) -> VisionTransformer:
    """Build a timm ViT and give it pretrained weights.

    Args:
        vit: the entry point, and what differs from it.
        weights: "timm" for those that timm's hub holds for `vit.name` (with its tag, as in
            "vit_base_patch16_224.augreg_in21k"), or a local .safetensors, .pth or .pt file.
        drop_path: as in `create_vit`.

    Raises:
        UsageError: there is no such ViT, or no such weights.
        FillError: the weights don't fit; the message lists all that does not.
    """
    model = create_vit(vit, drop_path)
    if weights == "timm":
        _load(model, _hub_weights(vit.name), source=f"timm's weights of {vit.name}")
    else:
        load_weights(model, weights)
    return model


def load_weights(vit: VisionTransformer, path: str | Path) -> tuple[str, ...]:
    """Load a file of weights into a timm ViT, all or nothing.

    Reads .safetensors, and .pth or .pt without running any code in them; the tensors may lie under "model" or
    "state_dict". Position embeddings and patch kernels of another size are resampled as timm does it.

    Returns:
        The tensors that keep their random start: those of the classifier, if the file has none for `num_classes`.

    Raises:
        UsageError: the file cannot be read as weights.
        FillError: the weights don't fit; the message lists all that does not.
    """
    return _load(vit, _read_weights(Path(path)), source=str(path))


def _hub_weights(name: str) -> dict[str, Tensor]:
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm's hub has no weights for {name!r}. Give a file, or a name with a tag.")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:
        raise UsageError(
            f"Cannot fetch timm's weights of {name!r}: {error}. Without a network, give a local file of weights."
        ) from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UsageError(f"Cannot load weights from {path}: expected .safetensors, .pth or .pt.")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, SafetensorError, RuntimeError, *DAMAGED_PICKLE) as error:
        raise UsageError(f"Cannot load weights from {path}: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict):
            state = state.get(key, state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"Cannot load weights from {path}: expected tensors by name, found {type(state).__name__}.")
    return state


def _load(vit: VisionTransformer, state: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    try:
        state = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True)
    except (RuntimeError, AssertionError) as error:
        raise FillError(f"Cannot load {source}: timm cannot resample its embeddings: {error}") from error
    target = vit.state_dict()
    fresh = () if _has_head(state, target) else HEAD
    state = {name: tensor for name, tensor in state.items() if name not in fresh}
    misfits = list(_misfits(state, {name: tensor for name, tensor in target.items() if name not in fresh}))
    if misfits:
        raise FillError(f"{source} does not fit the ViT, nothing was loaded:\n  " + "\n  ".join(misfits))
    vit.load_state_dict({**target, **state})
    if fresh:
        logger.info("%s has no classifier for %d classes: it starts from random weights", source, vit.num_classes)
    return fresh


def _has_head(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold a classifier of our number of classes."""
    return "head.weight" in state and len(state["head.weight"]) == len(target["head.weight"])


def _misfits(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted({*state, *target}):
        if name not in target:
            yield f"{name} {tuple(state[name].shape)}: the ViT has no such tensor"
        elif name not in state:
            yield f"{name} {tuple(target[name].shape)}: missing"
        elif state[name].shape != target[name].shape:
            yield f"{name}: found {tuple(state[name].shape)}, expected {tuple(target[name].shape)}"
