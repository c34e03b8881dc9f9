"""B2: what a cohort costs, against the same trainings in actors of their own.

    python -m benchmarks.cohorts --json cohorts.json

CPU seconds of the workers' processes, from the manifests: `*_ratio` from when a process took
up a training, `*_with_start_ratio` with its start and imports, of which a cohort has one. Both
ways in turns, one worker at a time with one thread, each worker's process for one seat only; that
the weights at the end are the same bits is checked. Nobody shares batches across processes here
(`placement.pairs.share_feed=false`); what that saves is in `benchmarks/decodes.py`. Kinds of work:

    pairs    the four pairs of a V-MoE an eighth as wide as the paper's (DeiT-L to V-MoE-B at 224 pixels), on JPEGs of
             500 x 375 with the paper's augmentation
    compute  eight trials of one pair of it, on images that are decoded once: temperature, alpha, learning rate vary
    loader   eight trials of a pair of tiny models, on those JPEGs: reading and augmenting is nearly all
    tiny_imagenet  the same on Tiny-ImageNet's own JPEGs of 64 x 64, at 64 pixels; four times as many images. Only with
             --tiny-imagenet FOLDER: its unpacked archive, or Parquet files of it as on the Hugging Face Hub

`--only` chooses; `--index` is the pair of the trials.
"""

import hashlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._run import parser, write
from benchmarks.decodes import jpegs
from m2mkd_ray.data import DATASETS, IMAGENET, guess_importer, import_data
from m2mkd_ray.errors import M2mkdError, UsageError
from m2mkd_ray.execution.executor import execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

SIZE = "img_size: 224, num_classes: 10"
EIGHTH = (
    f"blueprint.teacher={{name: vit_large_patch16_224, {SIZE}, patch_size: 16, width: 128, depth: 24, num_heads: 2}}",
    "blueprint.teacher_depths=[6, 6, 6, 6]",
    "blueprint.student={vit: {name: vit_base_patch16_224, img_size: 224, num_classes: 10, patch_size: 16, width: 96,"
    " depth: 12, num_heads: 2}, moe: {num_experts: 8, top_k: 2}}",
    "blueprint.student_depths=[3, 3, 3, 3]",
)
TINY = (
    f"blueprint.teacher={{name: vit_tiny_patch16_224, {SIZE}, patch_size: 56, width: 64, depth: 12, num_heads: 4}}",
    "blueprint.student.vit={name: vit_tiny_patch16_224, img_size: 224, num_classes: 10, patch_size: 56, width: 48,"
    " depth: 8, num_heads: 4}",
)
TINY_IMAGENET = (
    # Images of 64 x 64 are read ten times as fast, so models are as much smaller, that reading is nearly all again.
    "blueprint.teacher={name: vit_tiny_patch16_224, img_size: 64, num_classes: 200, patch_size: 32, width: 32,"
    " depth: 4, num_heads: 2}",
    "blueprint.teacher_depths=[1, 1, 1, 1]",
    "blueprint.student.vit={name: vit_tiny_patch16_224, img_size: 64, num_classes: 200, patch_size: 32, width: 24,"
    " depth: 4, num_heads: 2}",
    "blueprint.student_depths=[1, 1, 1, 1]",
)
SHORT = (
    "data.lanes=1",
    "placement.finetune.engine=torch",
    "data.validation={split: train, max_rows: 16}",
    "data.shuffle_window=4",
    "meta={epochs: 0.1, batch_size: 16, lr: 0.001}",
    "teacher={source: trained, phase: {epochs: 0.1, batch_size: 16, lr: 0.001}}",
    "baselines=[]",
    "placement.pairs.share_feed=false",
)
PAPERS = f"data.augmentation={IMAGENET.model_dump_json()}"
LIGHT = "data.augmentation={kind: light, hflip: 0.5, shift: 8}"
TRIALS = [(temperature, alpha, lr) for temperature in (1, 4) for alpha in (0.3, 0.9) for lr in (5e-4, 1e-3)]


@dataclass(frozen=True)
class Kind:
    """A kind of work."""

    settings: tuple[str, ...]
    epochs: float
    batch_size: int
    trials: bool
    """Eight trials of one pair; else every pair once."""
    dataset: str = "fashion-jpeg"


KINDS = {
    "pairs": Kind((*EIGHTH, PAPERS), epochs=1, batch_size=16, trials=False),
    "compute": Kind((*EIGHTH, LIGHT), epochs=2, batch_size=16, trials=True),
    "loader": Kind((*TINY, PAPERS), epochs=3, batch_size=64, trials=True),
    "tiny_imagenet": Kind((*TINY_IMAGENET, PAPERS), epochs=3, batch_size=128, trials=True, dataset="tiny-imagenet"),
}


def main() -> None:
    """Run all kinds of work both ways, print the table, write the numbers."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=320, help="images (default: 320)")
    options.add_argument("--repeats", type=int, default=2, help="default: 2")
    options.add_argument("--only", nargs="+", choices=KINDS, help="default: all that there are images for")
    options.add_argument("--tiny-imagenet", type=Path, metavar="FOLDER", help="Tiny-ImageNet, as it is got")
    options.add_argument("--index", type=int, default=2, help="pair of which there are trials (default: 2)")
    arguments = options.parse_args()
    source: Path | None = arguments.tiny_imagenet
    chosen = arguments.only or [name for name in KINDS if name != "tiny_imagenet" or source is not None]
    if "tiny_imagenet" in chosen and source is None:
        options.error("--only tiny_imagenet reads Tiny-ImageNet's own images: say where they are by --tiny-imagenet")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="m2-") as folder:
        if source is not None:
            try:
                import_tiny_imagenet(source, Path(folder) / "data", images=4 * arguments.rows)
            except M2mkdError as error:
                options.error(f"--tiny-imagenet: {error}")
        jpegs(Path(folder), arguments.rows)
        for name in chosen:
            results[name] = measured(name, Path(folder), arguments.settings, arguments.repeats, arguments.index)
    table = Table("work", "apart, CPU s", "together, CPU s", "ratio", "of each repeat", "ratio with start")
    for name, found in results.items():
        ratios = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
        table.add_row(
            name,
            f"{statistics.median(found['apart_busy_s']):.1f}",
            f"{statistics.median(found['together_busy_s']):.1f}",
            f"{found['ratio']:.3f}",
            ratios,
            f"{found['ratio_with_start']:.3f}",
        )
    Console().print(table)
    fields = {f"{name}_ratio": found["ratio"] for name, found in results.items()}
    fields |= {f"{name}_with_start_ratio": found["ratio_with_start"] for name, found in results.items()}
    write(arguments.json, {**fields, "rows": arguments.rows, "index": arguments.index, "work": results})


def import_tiny_imagenet(source: Path, out: Path, images: int) -> None:
    """Import `images` of each split of Tiny-ImageNet to `out`.

    Raises:
        UsageError: `source` is not there, is in no form that can be imported, or holds another data set.
        DataError: its images cannot be read.
    """
    if not source.exists():
        raise UsageError(f"There is no {source}. Give the unpacked archive, or the folder of the Parquet files.")
    index = import_data(guess_importer(source), source, "tiny-imagenet", out, rows_per_group=64, limit=images)
    expected = DATASETS["tiny-imagenet"].classes
    if index.num_classes != expected or "train" not in index.splits:
        raise UsageError(
            f"{source} has {index.num_classes} classes and the splits {', '.join(index.splits)}. Tiny-ImageNet has "
            f"{expected} classes and a split train. Give the unpacked archive, or the folder of the Parquet files."
        )


def settings_of(kind: Kind, data_root: Path, epochs: float) -> list[str]:
    """What all trainings of a kind of work have."""
    pairs = f"{{epochs: {epochs}, batch_size: {kind.batch_size}, lr: 0.001, distill: {{reduction: batchmean}}}}"
    places = [f"data.dataset={kind.dataset}", f"placement.data_root={data_root}"]
    return [*SHORT, *kind.settings, *places, f"pairs={pairs}"]


def measured(name: str, folder: Path, settings: Sequence[str], repeats: int, index: int) -> dict[str, Any]:
    """Both ways, in turns."""
    kind = KINDS[name]
    apart: list[Ran] = []
    together: list[Ran] = []
    recipe = override(find_recipe("demo"), [*settings_of(kind, folder / "data", kind.epochs), *settings])
    prepared = Store(str(folder / name))
    once(plan(recipe), prepared, RayLauncher(num_cpus=2), ["data", "meta", "split"])
    for repeat in range(repeats):
        for cohort, found in ((1, apart), (8, together)):
            stages = members(recipe, kind, cohort, index)
            root = folder / f"{name}-{cohort}-{repeat}"
            lend(prepared, Store(str(root)), stages)
            found.append(run(stages, Store(str(root))))
    assert [ran.bits for ran in apart] == [ran.bits for ran in together], "a cohort gave other weights"
    ratios = [one.busy_s / other.busy_s for one, other in zip(together, apart, strict=True)]
    with_start = [one.cpu_s / other.cpu_s for one, other in zip(together, apart, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_with_start": statistics.median(with_start),
        "ratios": ratios,
        "members": len(members(recipe, kind, 1, index)),
        "apart_cpu_s": [ran.cpu_s for ran in apart],
        "together_cpu_s": [ran.cpu_s for ran in together],
        "apart_busy_s": [ran.busy_s for ran in apart],
        "together_busy_s": [ran.busy_s for ran in together],
    }


def members(recipe: Recipe, kind: Kind, cohort: int, index: int) -> list[Stage]:
    """The stages of a kind of work; all of them may be in one cohort."""
    recipes = [override(recipe, [f"placement.pairs.cohort={cohort}"])]
    names = [f"pair-{pair.index}" for pair in recipe.blueprint.pairs]
    if kind.trials:
        names = [f"pair-{index}"]
        recipes = [
            override(
                recipes[0],
                [f"pairs.distill.temperature={temperature}", f"pairs.distill.alpha={alpha}", f"pairs.lr={lr}"],
            )
            for temperature, alpha, lr in TRIALS
        ]
    return [stage for each in recipes for stage in plan(each) if stage.name in names]


def lend(source: Store, target: Store, stages: Sequence[Stage]) -> None:
    """Let a store have what stages need, by links."""
    for stage in stages:
        for need in stage.needs.values():
            link = Path(target.root) / need.address
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(Path(source.root) / need.address)


@dataclass(frozen=True)
class Ran:
    """What trainings cost and left."""

    cpu_s: float
    """Of all processes, from their start."""
    busy_s: float
    """Of all processes, from when they took up a training."""
    bits: list[str]


def run(stages: Sequence[Stage], store: Store) -> Ran:
    """Run trainings, one worker at a time, each worker's process for one seat only."""
    once(stages, store, RayLauncher(num_cpus=1, keep_idle_s=0), None)
    cpu_s, busy_s, _ = cpu_of([store.manifest(stage.address) for stage in stages])
    files = [store.open(stage.address) / "module.safetensors" for stage in stages]
    return Ran(cpu_s, busy_s, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def cpu_of(manifests: Sequence[Mapping[str, Any]]) -> tuple[float, float, int]:
    """CPU seconds of processes from their start, and from when they took up a training; how many there were."""
    by_process: dict[int, list[dict[str, float]]] = {}
    for manifest in manifests:
        by_process.setdefault(manifest["where"]["pid"], []).append(manifest["cpu_seconds"])
    # A member's seconds are those of its whole process until it left.
    cpu_s = sum(max(one["before"] + one["during"] for one in of_one) for of_one in by_process.values())
    busy_s = sum(max(one["during"] for one in of_one) for of_one in by_process.values())
    return cpu_s, busy_s, len(by_process)


def once(stages: Sequence[Stage], store: Store, launcher: RayLauncher, until: Sequence[str] | None) -> None:
    """Carry stages out, and end Ray."""
    try:
        execute(stages, store, launcher, until=until).raise_for_failures()
    finally:
        launcher.close()


if __name__ == "__main__":
    main()
