"""Stage `data`: the data set is there, whole, and the one that the plan was made with."""

import json
import logging

from pydantic import BaseModel

from m2mkd_ray.data import find
from m2mkd_ray.errors import DataError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics

logger = logging.getLogger(__name__)


class DataPlacement(BaseModel, frozen=True, extra="forbid"):
    """Where imported data sets lie."""

    data_root: str | None = None
    """Folder with imported data sets; None: only what ships with the package."""


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """A data set and the splits that a recipe reads."""

    dataset: str
    fingerprint: str | None
    """`Index.fingerprint` when the plan was made, so that other images make another result; None: not imported."""
    splits: tuple[str, ...]


def run(config: DataConfig, context: StageContext) -> Metrics:
    """Checks every shard of the splits against its hash; writes `data.json`: classes, rows, licence, source."""
    assert isinstance(context.placement, DataPlacement)
    folder = find(config.dataset, context.placement.data_root)
    if folder.index.fingerprint != config.fingerprint:
        raise DataError(
            f"Data set {config.dataset!r} changed after the plan was made: its fingerprint is "
            f"{folder.index.fingerprint}, expected {config.fingerprint}. Run the same command again to plan anew."
        )
    for number, split in enumerate(config.splits, start=1):
        folder.verify(split)
        context.report(number, len(config.splits), {})
    summary = {
        "dataset": config.dataset,
        "fingerprint": config.fingerprint,
        "licence": folder.index.licence,
        "source": folder.index.source,
        "classes": [{"id": entry.id, "name": entry.name} for entry in folder.index.classes],
        "rows": {split: folder.index.splits[split].rows for split in config.splits},
    }
    (context.out / "data.json").write_text(json.dumps(summary, indent=1))
    return {"num_classes": len(folder.index.classes), "rows": summary["rows"]}
