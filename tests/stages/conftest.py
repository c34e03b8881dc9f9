"""One small run of the whole flow, stage by stage, on 240 real images.

Stages run in this process through `run_job`, as every launcher runs them, and only when a test asks for what they
leave; all tests share the store.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from m2mkd_ray.data import find
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.data.lanes import balanced
from m2mkd_ray.execution import Metrics, Stage, Store
from m2mkd_ray.execution.job import here, job
from m2mkd_ray.execution.worker import run_job
from m2mkd_ray.pipeline import plan, variant
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

SHIPPED = "fashion-mnist-small"
PHASE = "{epochs: 0.6, lr: 1.0e-3, batch_size: 32, drop_path: 0.2, validate_every_epochs: 0.4}"
SETTINGS = (
    "blueprint.teacher={name: vit_tiny_patch16_224, img_size: 28, patch_size: 7, num_classes: 10, width: 16,"
    " depth: 8, num_heads: 2}",
    "blueprint.teacher_depths=[2, 2, 2, 2]",
    "blueprint.student.vit={name: vit_tiny_patch16_224, img_size: 28, patch_size: 7, num_classes: 10, width: 12,"
    " depth: 4, num_heads: 2}",
    "blueprint.student.moe={num_experts: 3, top_k: 2}",
    "blueprint.student_depths=[1, 1, 1, 1]",
    "data.max_rows=160",
    "data.lanes=2",
    "data.validation={split: test, max_rows: 30}",
    f"meta={PHASE}",
    f"teacher={{source: incubated, incubation: {PHASE}, phase: {PHASE}}}",
    f"pairs={PHASE}",
    f"finetune={PHASE}",
    "suites=[fashion-small, fashion-small-corrupted]",
    "baselines=[pure]",
    "placement.finetune.engine=torch",
)


@dataclass
class Chain:
    """A recipe, and the store in which its stages are run when they are asked for."""

    recipe: Recipe
    store: Store

    def with_settings(self, *settings: str) -> "Chain":
        """The chain of a recipe that differs; what it shares is not run again."""
        return Chain(override(self.recipe, settings), self.store)

    def of(self, recipe: Recipe) -> "Chain":
        """The chain of another recipe in the same store."""
        return Chain(recipe, self.store)

    def stage(self, role: str) -> Stage:
        """A stage by its role in the report, or, if the report does not read it, by its name."""
        stages = {stage.name: stage for stage in plan(self.recipe)} | variant(self.recipe)
        return stages[role]

    def run(self, stage: Stage) -> Path:
        """The stage's artifact, after it was run with all that it needs."""
        for need in stage.needs.values():
            self.run(need)
        run_job(job(stage), self.store, here())
        return self.store.open(stage.address)

    def lend(self, store: Store, stages: Iterable[Stage]) -> None:
        """Copy what stages need to another store; what they only read to be faster is left out."""
        for stage in stages:
            for need in stage.needs.values():
                shutil.copytree(self.run(need), Path(store.root) / need.address, dirs_exist_ok=True)

    def folder(self, role: str) -> Path:
        """The artifact of a role."""
        return self.run(self.stage(role))

    def metrics(self, role: str) -> Metrics:
        """What the stage of a role returned."""
        self.folder(role)
        return self.store.manifest(self.stage(role).address)["metrics"]


def rows_of(split: str, count: int, classes: tuple[int, ...] | None = None) -> SplitSource:
    """Rows of the shipped data set; with classes, only theirs, labelled by place among them."""
    rows = find(SHIPPED).rows(split)
    chosen = balanced(rows.labels, count, seed=1).tolist()
    if classes is not None:
        chosen = [row for row in chosen if rows.labels[row] in classes]

    def sample(number: int) -> Sample:
        label = int(rows.labels[chosen[number]])
        label = label if classes is None else classes.index(label)
        return Sample(f"{split}-{number}", label, partial(read, chosen[number]))

    def read(row: int) -> bytes:
        return rows.read([row])[0]

    return SplitSource(len(chosen), sample)


def small_copy(out: Path) -> None:
    """The shipped data set, cut short."""
    index = find(SHIPPED).index
    splits = {split: rows_of(split, count) for split, count in (("train", 160), ("test", 40), ("corrupted", 40))}
    source = Source(classes=index.classes, splits=splits, licence=index.licence, origin="cut short for a test")
    write(source, out, WriteConfig(name=SHIPPED, rows_per_group=16))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a cut copy of the shipped data set stands before the shipped one."""
    root = tmp_path_factory.mktemp("data")
    small_copy(root)
    return root


@pytest.fixture(scope="session")
def chain(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The run that all tests share."""
    recipe = override(find_recipe("demo"), [*SETTINGS, f"placement.data_root={data_root}"])
    return Chain(recipe, Store(str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def some_rows() -> Callable[..., SplitSource]:
    """`rows_of`, for data sets of a test's own."""
    return rows_of


@pytest.fixture
def anew_store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(str(tmp_path / "anew"))


@pytest.fixture
def anew(chain: Chain, anew_store: Store) -> Callable[[Stage], Path]:
    """Run a stage again, in a store where only what it needs is there."""

    def run(stage: Stage) -> Path:
        chain.lend(anew_store, [stage])
        run_job(job(stage), anew_store, here())
        return anew_store.open(stage.address)

    return run
