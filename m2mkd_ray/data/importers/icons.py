"""Icon domains: monochrome icons for training, unseen artists, colour icons and emoji as shifts.

The .npz file has `alpha` uint8 (m, S, S), the masks of the monochrome icons, `rgba`
uint8 (c, S, S, 4), the colour icons, and for both in a row `y`, `domain`, `family`
(the artist), `name` (set:icon), and `classes`. A mask is stored as dark ink on white
paper, without loss, so that it is seen as people see it and `Augmentation.recolor`
can draw both colours; colour icons are laid on white.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from m2mkd_ray.data.importers.npz import load_npz
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.index import ClassName
from m2mkd_ray.errors import DataError

ARRAYS = ["alpha", "rgba", "y", "domain", "family", "name", "classes"]
SPLITS = ("train", "test", "uicolor", "emoji", "emojimono")
PERMISSIVE = frozenset(
    {
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC0-1.0",
        "ISC",
        "MIT",
        "OFL-1.1",
        "Unlicense",
    }
)
"""SPDX names; what asks for the same licence of derived works (CC-BY-SA, MPL) is not among them."""


class IconsOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the import."""

    licences: str = Field("all", pattern="^(all|permissive)$")
    """permissive: leave out the icon sets under a share-alike licence."""
    sets: str = "icon_domains_sets.json"
    """File beside the .npz file with each icon set's author and licence."""


def is_icons(path: Path) -> bool:
    """Whether it is a .npz file of icons."""
    if not (path.is_file() and path.suffix == ".npz"):
        return False
    with np.load(path, allow_pickle=False) as file:
        return set(ARRAYS) <= set(file)


def open_icons(path: Path, options: IconsOptions) -> Source:
    """The icons; an artist's are either all in train or all in test."""
    arrays = load_npz(path, ARRAYS)
    licences = _licences(path.parent / options.sets)
    split = np.where(arrays["domain"] == "mono", _held_out(arrays["family"]), arrays["domain"])
    if options.licences == "permissive":
        of_icon = np.array([licences.get(name.partition(":")[0], "unknown") for name in arrays["name"].tolist()])
        split = np.where(np.isin(of_icon, list(PERMISSIVE)), split, "")
        licences = {name: licence for name, licence in licences.items() if licence in PERMISSIVE}
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    return Source(
        classes=tuple(ClassName(id=name, name=name.replace("-", " ")) for name in arrays["classes"].tolist()),
        splits={
            name: SplitSource(len(of_split), partial(_sample, arrays, of_split), needs_every_class=name == "train")
            for name, of_split in rows.items()
            if len(of_split)
        },
        licence=", ".join(sorted(set(licences.values()))),
        origin=f"{path.name}, drawn from the icon sets of @iconify/json; authors and licences in {options.sets}",
    )


def _licences(file: Path) -> dict[str, str]:
    if not file.exists():
        raise DataError(f"{file} is missing: it names the author and licence of every icon set.")
    return {name: entry["license"] for name, entry in json.loads(file.read_text()).items()}


def _held_out(families: np.ndarray) -> np.ndarray:
    """train or test for each icon: a fifth of the artists, by a hash, so that new ones do not move the others."""
    is_test = {
        family: int(hashlib.md5(family.encode(), usedforsecurity=False).hexdigest(), 16) % 10 < 2
        for family in np.unique(families).tolist()
    }
    return np.array(["test" if is_test[family] else "train" for family in families.tolist()])


def _sample(arrays: dict[str, np.ndarray], rows: np.ndarray, number: int) -> Sample:
    row = int(rows[number])
    return Sample(f"{arrays['name'][row]}.png", int(arrays["y"][row]), partial(_picture, arrays, row))


def _picture(arrays: dict[str, np.ndarray], row: int) -> bytes:
    num_masks = len(arrays["alpha"])
    if row < num_masks:
        return png(255 - arrays["alpha"][row])
    rgba = arrays["rgba"][row - num_masks].astype(np.float32)
    weight = rgba[..., 3:] / 255
    return png(np.rint(rgba[..., :3] * weight + 255 * (1 - weight)).astype(np.uint8))
