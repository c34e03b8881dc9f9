"""B3: how often an image is decoded in an epoch, and for how many CPU seconds, by N trainings on one node.

    python -m benchmarks.decodes --json decodes.json

N readers, each an actor of its own, read one epoch of the same batches (timm's
ImageNet augmentation, cropped to 224): once each for itself, once from the node's
feed (`execution/sharing.py`). Decodes are counted where they happen, by the makers'
own counters; CPU seconds are those of the processes that decode. Images are the
shipped Fashion-MNIST's, enlarged to 500 × 375 with noise and encoded as JPEG for the
purpose, or those of an imported data set (--dataset, --data-root).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks._run import write
from m2mkd_ray.data import IMAGENET, Batches, BatchMaker, DatasetFolder, FeedConfig, SharedBatches, find, import_data
from m2mkd_ray.data.pixels import decode
from m2mkd_ray.execution.context import Arrays, Made
from m2mkd_ray.execution.sharing import Hub, Sharing, shared_stream, start_hub

READERS = (1, 2, 4)
WIDTH, HEIGHT, QUALITY = 500, 375, 90
"""About the mean size of ImageNet's images."""
CROP = 224


@dataclass(frozen=True)
class Counting:
    """A maker that keeps its process's counters in a file, after every step."""

    maker: BatchMaker
    folder: Path

    def __call__(self) -> Callable[[int], Arrays]:
        batches = Batches(self.maker.config, DatasetFolder.open(self.maker.folder))
        began = time.process_time()

        def make(step: int) -> Arrays:
            arrays = batches.arrays(step)
            counters = {"decodes": batches.decodes, "cpu_s": time.process_time() - began}
            (self.folder / f"{os.getpid()}.json").write_text(json.dumps(counters))
            return arrays

        return make


class Reader:
    """An actor that reads an epoch as a training would."""

    def __init__(self, config: FeedConfig, folder: DatasetFolder) -> None:
        import torch

        torch.set_num_threads(1)
        self.config, self.folder = config, folder

    def ready(self) -> bool:
        return True

    def alone(self) -> dict[str, float]:
        feed = Batches(self.config, self.folder)
        return self._read(feed)

    def shared(self, hub: Hub, counters: Path) -> dict[str, float]:
        node = ray.get_runtime_context().get_node_id()

        def stream(key: str, maker: BatchMaker, start: int, stop: int, workers: int) -> Iterator[Made]:
            return shared_stream(hub, node, key, Counting(maker, counters), start, stop, "reader", workers)

        return self._read(SharedBatches(self.config, self.folder, stream))

    def _read(self, feed: Batches | SharedBatches) -> dict[str, float]:
        cpu_s, began, images = time.process_time(), time.perf_counter(), 0
        for batch in feed.loader(0, feed.steps_per_epoch):
            images += len(batch.images)
        return {
            "images": images,
            "decodes": feed.decodes,
            "cpu_s": time.process_time() - cpu_s,
            "seconds": time.perf_counter() - began,
        }


def main() -> None:
    """Import, read with and without the feed, print the table, write the numbers."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="m2-") as scratch:
        folder = (
            find(arguments.dataset, arguments.data_root) if arguments.dataset else jpegs(Path(scratch), arguments.rows)
        )
        config = FeedConfig(
            dataset=folder.index.name,
            split=arguments.split,
            max_rows=arguments.rows,
            batch_size=arguments.batch_size,
            img_size=CROP,
            augmentation=IMAGENET,
        )
        settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address="local", _temp_dir=f"{scratch}/ray", object_store_memory=1_000_000_000, **settings)
        try:
            rows = [row for count in READERS for row in measured(count, config, folder, Path(scratch))]
        finally:
            ray.shutdown()
        jpeg_bytes = folder.rows(config.split).encoded_bytes / folder.split(config.split).rows
    table = Table(*rows[0], title=f"One epoch of {rows[0]['images']} images of {folder.index.name}")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    write(
        arguments.json, {"dataset": folder.index.name, "mean_image_bytes": jpeg_bytes, **_fields(rows), "rows": rows}
    )


def measured(count: int, config: FeedConfig, folder: DatasetFolder, scratch: Path) -> list[dict[str, Any]]:
    """A row without the feed and one with it."""
    found = []
    for feed in ("without", "with"):
        actor: Any = ray.remote(Reader).options(num_cpus=0)
        readers = [actor.remote(config, folder) for _ in range(count)]
        ray.get([reader.ready.remote() for reader in readers])
        began = time.perf_counter()
        if feed == "without":
            epochs = ray.get([reader.alone.remote() for reader in readers])
            makers = epochs
        else:
            counters = scratch / f"counters-{count}"
            counters.mkdir()
            hub = start_hub(Sharing())
            epochs = ray.get([reader.shared.remote(hub, counters) for reader in readers])
            makers = [json.loads(file.read_text()) for file in counters.iterdir()]
            hub.end()
        seconds = time.perf_counter() - began
        images = int(epochs[0]["images"])
        decodes = int(sum(maker["decodes"] for maker in makers))
        row = {"feed": feed, "readers": count, "images": images, "decodes": decodes, "per_image": decodes / images}
        cpu_s = sum(maker["cpu_s"] for maker in makers)
        reading = 0.0 if feed == "without" else sum(epoch["cpu_s"] for epoch in epochs)
        found.append({**row, "decode_cpu_s": cpu_s, "reader_cpu_s": reading, "seconds": seconds})
        for reader in readers:
            ray.kill(reader)
    return found


def jpegs(scratch: Path, rows: int) -> DatasetFolder:
    """Shipped images, enlarged, with the noise that photographs have, as JPEG in a data root of their own."""
    shipped, rng = find("fashion-mnist-small"), np.random.default_rng(0)
    images = shipped.rows("train")
    for row, (image, label) in enumerate(zip(images.read(range(rows)), images.labels.tolist())):
        large = decode(image).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noisy = np.asarray(large) + rng.normal(0, 16, (HEIGHT, WIDTH, 3))
        file = scratch / "images" / "train" / shipped.index.classes[label].id / f"{row:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=QUALITY)
    import_data("image-folder", scratch / "images", "fashion-jpeg", scratch / "data", rows_per_group=64)
    return find("fashion-jpeg", str(scratch / "data"))


def _fields(rows: list[dict[str, Any]]) -> dict[str, float]:
    fields = {}
    for row in rows:
        of = f"{row['feed']}_feed_{row['readers']}"
        fields[f"decodes_per_image_{of}"] = row["per_image"]
        fields[f"decode_cpu_s_{of}"] = row["decode_cpu_s"]
        fields[f"seconds_{of}"] = row["seconds"]
    return fields


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dataset", help="an imported data set of JPEGs (default: made for the purpose)")
    options.add_argument("--data-root", help="where it was imported to")
    options.add_argument("--split", default="train", help="default: train")
    options.add_argument("--rows", type=int, default=512, help="images (default: 512)")
    options.add_argument("--batch-size", type=int, default=32, help="default: 32")
    options.add_argument("--store", help="without effect: for `make bench`")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    return options.parse_args()


if __name__ == "__main__":
    main()
