"""Importers: from the form in which images are got to the form in which they are stored.

To add a form, add a file with its options, `is_...` and `open_...`, and a line in `IMPORTERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from m2mkd_ray.data.catalog import DATASETS
from m2mkd_ray.data.importers import cifar, digits, hub_parquet, icons, idx, image_folder, npz
from m2mkd_ray.data.importers.source import Source
from m2mkd_ray.data.importers.write import OnBad, OnProgress, WriteConfig, write
from m2mkd_ray.data.index import Index
from m2mkd_ray.errors import UsageError


@dataclass(frozen=True)
class Importer:
    """A form of data set that can be imported."""

    help: str
    options: type[BaseModel]
    open: Callable[..., Source]
    """The source at a path, by options of that type; raises DataError if the path holds something else."""
    fits: Callable[[Path], bool]
    """Whether the path looks like this form."""


IMPORTERS = {
    "image-folder": Importer(
        "folders of image files by split and class: ImageNet, Tiny-ImageNet, your own",
        image_folder.ImageFolderOptions,
        image_folder.open_image_folder,
        image_folder.is_image_folder,
    ),
    "idx": Importer("the MNIST family's files, plain or gzip", idx.IdxOptions, idx.open_idx, idx.is_idx),
    "cifar": Importer(
        "CIFAR-10 or CIFAR-100, python or binary version, .tar.gz or unpacked",
        cifar.CifarOptions,
        cifar.open_cifar,
        cifar.is_cifar,
    ),
    "icons": Importer("the icon domains' .npz file", icons.IconsOptions, icons.open_icons, icons.is_icons),
    "npz": Importer("NumPy arrays of images and labels in a .npz file", npz.NpzOptions, npz.open_npz, npz.is_npz),
    "hub-parquet": Importer(
        "Parquet files as on the Hugging Face Hub",
        hub_parquet.HubParquetOptions,
        hub_parquet.open_hub_parquet,
        hub_parquet.is_hub_parquet,
    ),
    "digits": Importer(
        "scikit-learn's digits, from the installed package (source: sklearn)",
        digits.DigitsOptions,
        digits.open_digits,
        digits.is_digits,
    ),
}


def import_data(
    kind: str,
    source: Path,
    name: str,
    out: Path,
    options: Mapping[str, str] | None = None,
    *,
    on_bad: OnBad = "fail",
    rows_per_group: int = 256,
    seed: int = 0,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> Index:
    """Import the data set at `source` to `out/<name>`; an import that was interrupted goes on.

    Args:
        kind: a name in `IMPORTERS`.
        options: the importer's, by name.
        on_bad: fail at the first image, label or class with a problem, or skip, log and count them.
        rows_per_group: images that are read at once.
        seed: of the order in which images are stored.
        limit: at most this many images a split; None: all.

    Raises:
        UsageError: the kind or an option is unknown; the message lists the known ones.
        DataError: the source cannot be read, or has a problem.
    """
    if kind not in IMPORTERS:
        raise UsageError(f"Unknown kind of data set {kind!r}. Known: {', '.join(IMPORTERS)}.")
    importer = IMPORTERS[kind]
    chosen = _as_the_catalogue_says(name, importer) | dict(options or {})
    try:
        parsed = importer.options.model_validate(chosen)
    except ValidationError as error:
        known = ", ".join(importer.options.model_fields) or "none"
        raise UsageError(f"Options {chosen} do not suit the importer {kind} (options: {known}). {error}") from error
    config = WriteConfig(
        name=name,
        rows_per_group=rows_per_group,
        seed=seed,
        limit=limit,
        imported={"kind": kind, "source": source.name, **{k: str(v) for k, v in parsed.model_dump().items()}},
    )
    return write(importer.open(source, parsed), out, config, on_bad=on_bad, on_progress=on_progress)


def _as_the_catalogue_says(name: str, importer: Importer) -> dict[str, str]:
    """The licence of a known data set, for importers whose files don't state one."""
    known = DATASETS.get(name)
    return {"licence": known.licence} if known and "licence" in importer.options.model_fields else {}


def guess_importer(source: Path) -> str:
    """The kind of data set at a path, by its layout.

    Raises:
        UsageError: it is none that is known.
    """
    for kind, importer in IMPORTERS.items():
        if importer.fits(source):
            return kind
    forms = "\n  ".join(f"{kind}: {importer.help}" for kind, importer in IMPORTERS.items())
    raise UsageError(f"{source} is in no form that can be imported. Known forms:\n  {forms}")
