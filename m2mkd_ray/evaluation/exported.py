"""An exported student: load it, and ask it about images.

model = load_export("export")
model.predict(["shirt.png"])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data.augment import Augmentation, eval_transform, normalize
from m2mkd_ray.data.pixels import decode
from m2mkd_ray.errors import ArtifactError, DataError
from m2mkd_ray.models import student_with

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BATCH = 64
"""Images that the model gets at once."""


class ExportedConfig(BaseModel, frozen=True, extra="forbid"):
    """All that is needed to build an exported student again."""

    blueprint: Blueprint
    keep_stitches: bool
    augmentation: Augmentation
    """Only its preprocessing counts."""
    classes: tuple[str, ...]
    """Names in the order of the logits."""
    recipe: str
    key: str
    """Of the fine-tuning that made the weights."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image."""

    image: str
    classes: tuple[tuple[str, float], ...]
    """Class names with their probabilities, the most likely first."""


@dataclass(frozen=True)
class Exported:
    """A student in evaluation mode, with what it needs to read images."""

    model: nn.Module
    config: ExportedConfig

    def read(self, images: Sequence[str | Path]) -> Tensor:
        """Image files as the model takes them: float32 (B, 3, H, W).

        Raises:
            DataError: files that are missing or no images; lists all of them.
        """
        pixels, problems = self._read(images)
        _require_none(problems)
        return pixels

    def predict(self, images: Sequence[str | Path], top: int = 5) -> list[Prediction]:
        """The `top` most likely classes of each image file.

        Raises:
            DataError: files that are missing or no images; lists all of them.
        """
        predictions: list[Prediction] = []
        problems: list[str] = []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            pixels, found = self._read(batch)
            problems += found
            if not problems:
                predictions += self._predicted(batch, pixels, top)
        _require_none(problems)
        return predictions

    def _read(self, images: Sequence[str | Path]) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) of the files that can be read, and what is wrong with the others."""
        size = self.config.blueprint.student.sizes.img_size
        transform = eval_transform(size, self.config.augmentation)
        pixels, problems = [np.zeros((0, size, size, 3), np.uint8)], []
        for image in images:
            try:
                decoded = decode(Path(image).read_bytes(), str(image))
            except (OSError, DataError) as error:
                problems.append(str(error))
                continue
            pixels.append(np.broadcast_to(transform(decoded).permute(1, 2, 0).numpy(), (1, size, size, 3)))
        return normalize(np.concatenate(pixels), self.config.augmentation), problems

    def _predicted(self, images: Sequence[str | Path], pixels: Tensor, top: int) -> list[Prediction]:
        with torch.inference_mode():
            shares = self.model(pixels).float().softmax(dim=-1)  # (B, K)
        best = shares.topk(min(top, len(self.config.classes)), dim=-1)
        return [
            Prediction(
                image=str(image),
                classes=tuple(
                    (self.config.classes[index], share)
                    for index, share in zip(indices.tolist(), values.tolist(), strict=True)
                ),
            )
            for image, indices, values in zip(images, best.indices, best.values, strict=True)
        ]


def _require_none(problems: Sequence[str]) -> None:
    if problems:
        raise DataError("Cannot predict, not all files are images:\n" + "\n".join(f"  - {p}" for p in problems))


def load_export(folder: str | Path) -> Exported:
    """The student that `m2mkd export` wrote into a folder, with bit-equal weights.

    Raises:
        ArtifactError: the folder holds no whole export of this version.
    """
    folder = Path(folder)
    try:
        config = ExportedConfig.model_validate_json((folder / CONFIG).read_bytes())
        model = student_with(config.blueprint, load_file(folder / WEIGHTS), keep_stitches=config.keep_stitches)
    except (OSError, ValidationError, SafetensorError, RuntimeError) as error:  # RuntimeError: of load_state_dict
        raise ArtifactError(
            f"{folder} is no export of this version; write one with `m2mkd export RECIPE --to FOLDER`. Found: {error}"
        ) from error
    return Exported(model.eval(), config)
