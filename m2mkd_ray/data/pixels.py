"""Encoded rows as arrays of pixels; those of a small split are decoded once and kept."""

import io
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from m2mkd_ray.data.shards import Rows
from m2mkd_ray.errors import DataError

UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot read."""
SMALL = 256 * 2**20
"""Splits of up to this many bytes are kept in memory."""
_DEEP = {"I": 65535, "F": 1}
"""White of the modes of more than 8 bits: 16 bits in an integer, as Pillow reads PGM; a float as PFM has it."""


def decode(image: bytes, name: str = "an image") -> Image.Image:
    """The image in mode L (grey) or RGB; what is transparent becomes white, more than 8 bits become 8.

    Raises:
        DataError: Pillow cannot decode it, or it has pixels beyond white; `name` says which it is.
    """
    try:
        decoded = Image.open(io.BytesIO(image))
        decoded.load()
        return grey_or_rgb(decoded)
    except UNDECODABLE as error:
        raise DataError(f"{name} cannot be decoded ({len(image)} bytes): {error}") from error


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in mode L or RGB, see `decode`.

    Raises:
        ValueError: it has pixels beyond white.
    """
    if image.mode.startswith(tuple(_DEEP)):
        return _of_8_bits(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or more (modes I;16, I, F), which Pillow's own conversion would cut off at 255."""
    values, white = np.asarray(image), _DEEP[image.mode[0]]
    if not (values.min() >= 0 and values.max() <= white):  # NaN is neither
        raise ValueError(
            f"mode {image.mode} with values from {values.min()} to {values.max()}, expected 0 (black) to {white} "
            f"(white); store it with 8 bits a channel"
        )
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


class Pixels:
    """Rows of a split as uint8 (n, H, W, C) after `transform`; C is 1 if all of them are grey, and are kept."""

    def __init__(
        self,
        rows: Rows,
        img_size: int,
        transform: Callable[[Image.Image], Tensor],
        used: np.ndarray,
        *,
        name: str,
        on_demand: bool = False,
        small: int = SMALL,
    ) -> None:
        """
        Args:
            transform: an image in mode L or RGB to uint8 (C, H, W).
            used: numbers of the rows that will be asked for, ascending.
            name: of the split, for messages.
            on_demand: decode a row when it is first asked for, and have C of 1 if all rows of a call are grey. Else
                all rows are decoded when the first one is asked for, and C is 1 if all of them are grey.
            small: keep them in memory if they take up to this many bytes.
        """
        self._rows, self._transform, self._used = rows, transform, used
        self._name, self._on_demand = name, on_demand
        self.are_kept = len(used) * img_size * img_size * 3 <= small
        """Whether the split is small, so that rows are decoded once and kept."""
        self._kept: dict[int, np.ndarray] = {}
        self.decodes = 0
        """Images that were decoded in this process."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}, "decodes": 0}

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (len(indices), H, W, C)."""
        if not self.are_kept:
            return self.decoded(indices, self._rows.read(indices))
        if self._on_demand:
            missing = [row for row in np.unique(indices).tolist() if row not in self._kept]
            self._kept.update(zip(missing, self._each(missing, self._rows.read(missing))))
        elif not self._kept:
            self._kept.update(zip(self._used.tolist(), _alike(self._each(self._used, self._rows.read(self._used)))))
        return _alike([self._kept[row] for row in indices.tolist()])

    def decoded(self, indices: Sequence[int] | np.ndarray, images: Sequence[bytes]) -> np.ndarray:
        """Rows that were read already, as uint8 (len(indices), H, W, 3): `images` are theirs, encoded."""
        return _in_colour(self._each(indices, images))

    def of(self, indices: np.ndarray, images: np.ndarray | Sequence[bytes]) -> np.ndarray:
        """uint8 (len(indices), H, W, C) of rows that were read: `images` are pixels already, or encoded."""
        return images if isinstance(images, np.ndarray) else self.decoded(indices, images)

    def _each(self, indices: Sequence[int] | np.ndarray, images: Sequence[bytes]) -> list[np.ndarray]:
        arrays = [
            self._transform(decode(image, f"Row {index} of split {self._name}")).permute(1, 2, 0).numpy()
            for index, image in zip(indices, images, strict=True)
        ]
        self.decodes += len(arrays)
        return arrays


def _alike(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(arrays) if all(array.shape[-1] == 1 for array in arrays) else _in_colour(arrays)


def _in_colour(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays])
