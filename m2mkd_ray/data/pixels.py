"""Encoded rows as arrays of pixels; those of a small split are decoded once and kept."""

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor

from m2mkd_ray.data.shards import Rows
from m2mkd_ray.errors import DataError

UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot read."""
SMALL = 256 * 2**20
"""Splits of up to this many bytes are kept in memory."""


def decode(image: bytes, name: str = "an image") -> Image.Image:
    """The image in mode L (grey) or RGB; what is transparent becomes white.

    Raises:
        DataError: Pillow cannot decode it; `name` says which it is.
    """
    try:
        decoded = Image.open(io.BytesIO(image))
        decoded.load()
    except UNDECODABLE as error:
        raise DataError(f"{name} cannot be decoded ({len(image)} bytes): {error}") from error
    if decoded.mode in ("L", "RGB"):
        return decoded
    if decoded.mode in ("LA", "PA", "RGBA") or "transparency" in decoded.info:
        rgba = decoded.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return decoded.convert("L" if decoded.mode == "1" else "RGB")


class Pixels:
    """Rows of a split as uint8 (n, H, W, C) after `transform`; C is 1 only if all of them are grey."""

    def __init__(
        self,
        rows: Rows,
        img_size: int,
        transform: Callable[[Image.Image], Tensor],
        used: np.ndarray,
        *,
        name: str,
        small: int = SMALL,
    ) -> None:
        """
        Args:
            transform: an image in mode L or RGB to uint8 (C, H, W).
            used: numbers of the rows that will be asked for, ascending.
            name: of the split, for messages.
            small: keep them in memory if they take up to this many bytes.
        """
        self._rows, self._transform, self._used = rows, transform, used
        self._name = name
        self._fits = len(used) * img_size * img_size * 3 <= small
        self._kept: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (len(indices), H, W, C)."""
        if not self._fits:
            return self._decoded(indices)
        if self._kept is None:
            self._kept = self._decoded(self._used)
        return self._kept[np.searchsorted(self._used, indices)]

    def _decoded(self, indices: np.ndarray) -> np.ndarray:
        images = [
            self._transform(decode(image, f"Row {index} of split {self._name}")).permute(1, 2, 0).numpy()
            for index, image in zip(indices, self._rows.read(indices))
        ]
        if self._fits and all(image.shape[-1] == 1 for image in images):
            return np.stack(images)
        return np.stack([np.broadcast_to(image, (*image.shape[:2], 3)) for image in images])
