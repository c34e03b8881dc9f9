"""timm's operations on images (`timm/data/auto_augment.py`) for batches of tensors, on any device.

Written from what Pillow does to pixels of 8 bits, rounding included, so that on a CPU they give Pillow's own pixels;
tensor versions elsewhere (torchvision's) round in other places and sample by another kernel. Every image of a batch
has an argument of its own, and nothing waits for the device.

n = images, S = side
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
_GREY = (19595, 38470, 7471)
"""Red, green and blue in grey, of 65,536: Pillow `Convert.c`, L24 (ITU-R 601-2)."""


def apply(name: str, pixels: Tensor, arguments: Tensor, *, fill: Tensor, interpolation: Interpolation) -> Tensor:
    """Operation `name` of `OPERATIONS` on uint8 (n, 3, S, S), with an argument each.

    Args:
        arguments: float64 (n,), on the CPU, whose sines and cosines are the same everywhere.
        fill: uint8 (3,), on the same device: of what comes in from outside of the image.
        interpolation: of what is moved.
    """
    if name in MATRICES:
        matrices = MATRICES[name](arguments, pixels.shape[-1]).to(pixels.device, non_blocking=True)
        return moved(pixels, matrices, fill, interpolation)
    return COLOURS[name](pixels, arguments.to(pixels.device, non_blocking=True))


# Colours


def _invert(pixels: Tensor, _: Tensor) -> Tensor:
    return 255 - pixels


def _solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pixels < _each(threshold), pixels, 255 - pixels)


def _solarize_add(pixels: Tensor, added: Tensor) -> Tensor:
    brighter = (pixels.int() + _each(added).int()).clamp(max=255).to(torch.uint8)
    return torch.where(pixels < 128, brighter, pixels)


def _posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    mask = 256 - 2 ** (8 - bits.clamp(0, 8).int())  # 0 bits: black
    return (pixels.int() & _each(mask)).to(torch.uint8)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(pixels), pixels, factor)


def _color(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(pixels), pixels, factor)


def _desaturate(pixels: Tensor, amount: Tensor) -> Tensor:
    return _color(pixels, 1 - amount.clamp(0, 1))


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = (_grey(pixels).double().mean(dim=(1, 2, 3), keepdim=True) + 0.5).to(torch.uint8)  # (n, 1, 1, 1)
    return _blend(mean, pixels, factor)


def _sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Against Pillow's SMOOTH, which leaves the outermost pixels alone (`ImageFilter.py`, `Filter.c`)."""
    channels = pixels.flatten(0, 1).unsqueeze(1).float()  # (n * 3, 1, S, S)
    kernel = torch.ones(1, 1, 3, 3, device=pixels.device)
    kernel[..., 1, 1] = 5
    smooth = pixels.clone()
    inner = (F.conv2d(channels, kernel) / 13 + 0.5).to(torch.uint8)  # (n * 3, 1, S - 2, S - 2)
    smooth[..., 1:-1, 1:-1] = inner.view_as(smooth[..., 1:-1, 1:-1])
    return _blend(smooth, pixels, factor)


def _auto_contrast(pixels: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.autocontrast`: from the darkest to the brightest value of a channel; one of a single value stays."""
    low, high = (of(dim=(2, 3), keepdim=True).double() for of in (pixels.amin, pixels.amax))  # (n, 3, 1, 1)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # a number / a tensor is not rounded as a division
    values = torch.arange(256, device=pixels.device, dtype=torch.float64)
    table = (values * scale - low * scale).clamp(0, 255).to(torch.uint8).squeeze(2)  # (n, 3, 256)
    return torch.where(high > low, _looked_up(pixels, table), pixels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.equalize`: a channel's values spread by how many pixels are darker."""
    flat = pixels.flatten(2).long()  # (n, 3, S * S)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    of_brightest = counts.gather(2, flat.amax(dim=2, keepdim=True))  # (n, 3, 1)
    step = (flat.shape[2] - of_brightest) // 255
    darker = counts.cumsum(dim=2) - counts
    table = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255).to(torch.uint8)  # (n, 3, 256)
    return torch.where(step.unsqueeze(3) > 0, _looked_up(pixels, table), pixels)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _grey(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.int().split(1, dim=1)  # each (n, 1, S, S)
    return ((red * _GREY[0] + green * _GREY[1] + blue * _GREY[2] + 2**15) >> 16).to(torch.uint8)


def _blend(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`Image.blend`: one + share * (other - one), cut off at black and white and rounded down (`Blend.c`)."""
    base = one.float()
    return (base + _each(share).float() * (other.float() - base)).clamp(0, 255).to(torch.uint8)


def _looked_up(pixels: Tensor, table: Tensor) -> Tensor:
    return table.gather(2, pixels.flatten(2).long()).view_as(pixels)


COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "desaturate": _desaturate,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "sharpness": _sharpness,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
}

# Places


def moved(pixels: Tensor, matrices: Tensor, fill: Tensor, interpolation: Interpolation) -> Tensor:
    """`Image.transform` by affine maps float64 (n, 2, 3) from a pixel's place to where it is taken from.

    Places are those of pixels' centres, (x + 1/2, y + 1/2). Those from outside are `fill` (`Geometry.c`).
    """
    side = pixels.shape[-1]
    centres = torch.arange(side, device=pixels.device, dtype=torch.float64) + 0.5
    x, y = (_each(a) * centres + _each(b) * centres.unsqueeze(1) + _each(c) for a, b, c in matrices.permute(1, 2, 0))
    x, y = x.squeeze(1), y.squeeze(1)  # each (n, S, S)
    is_inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    between = _cubic if interpolation == "bicubic" else _linear
    columns, right = _neighbours(x, side, interpolation)
    rows, below = _neighbours(y, side, interpolation)
    flat, shape = pixels.flatten(2).double(), (len(pixels), 3, side, side)

    def taken(row: Tensor, column: Tensor) -> Tensor:
        at = (row * side + column).flatten(1).unsqueeze(1).expand(-1, 3, -1)  # (n, 3, S * S)
        return flat.gather(2, at).view(shape)

    found = between([between([taken(row, column) for column in columns], right) for row in rows], below)
    return torch.where(is_inside.unsqueeze(1), found.clamp(0, 255).to(torch.uint8), fill.view(1, 3, 1, 1))


def _neighbours(places: Tensor, side: int, interpolation: Interpolation) -> tuple[list[Tensor], Tensor]:
    """The pixels (n, S, S) around each place, those outside moved to the edge; how far it is from the second or first
    of them, (n, 1, S, S)."""
    low = (places - 0.5).floor()
    offsets = (-1, 0, 1, 2) if interpolation == "bicubic" else (0, 1)
    around = [(low.long() + offset).clamp(0, side - 1) for offset in offsets]
    return around, (places - 0.5 - low).unsqueeze(1)


def _linear(values: list[Tensor], d: Tensor) -> Tensor:
    return values[0] + d * (values[1] - values[0])


def _cubic(values: list[Tensor], d: Tensor) -> Tensor:
    """The cubic of a = -1, in the order in which Pillow computes it (`Geometry.c`, BICUBIC)."""
    one, two, three, four = values
    return two + d * (three - one + d * (2 * (one - two) + three - four + d * (two - one + four - three)))


def _matrices(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)  # (n, 2, 3)


def _affine(
    arguments: Tensor,
    *,
    xy: Tensor | None = None,
    x: Tensor | None = None,
    yx: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    zero, one = torch.zeros_like(arguments), torch.ones_like(arguments)
    given = [zero if value is None else value for value in (xy, x, yx, y)]
    return _matrices([[one, given[0], given[1]], [given[2], one, given[3]]])


def _rotation(degrees: Tensor, side: int) -> Tensor:
    """`Image.rotate` around the centre; it rounds sine and cosine to 15 digits."""
    angle = -degrees * (math.pi / 180)
    cos, sin = (torch.round(of(angle), decimals=15) for of in (torch.cos, torch.sin))
    half = side / 2
    return _matrices([[cos, sin, half - cos * half - sin * half], [-sin, cos, half + sin * half - cos * half]])


MATRICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rotate": _rotation,
    "shear_x": lambda factor, side: _affine(factor, xy=factor),
    "shear_y": lambda factor, side: _affine(factor, yx=factor),
    "translate_x_abs": lambda pixels, side: _affine(pixels, x=pixels),
    "translate_x_rel": lambda share, side: _affine(share, x=share * side),
    "translate_y_abs": lambda pixels, side: _affine(pixels, y=pixels),
    "translate_y_rel": lambda share, side: _affine(share, y=share * side),
}

OPERATIONS = tuple(sorted([*COLOURS, *MATRICES]))
"""Names of timm's functions that there is a version for here."""
