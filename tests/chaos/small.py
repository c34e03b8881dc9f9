"""The demo, small: what the tests of this folder run, and the bits that it leaves."""

import hashlib
import os
import shutil
import signal
from pathlib import Path

from m2mkd_ray.execution import Event, StageProgress, StageRetried, Store
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

SMALL = (
    "data.max_rows=320",
    "data.validation.max_rows=100",
    "teacher={source: trained, phase: {epochs: 0.4, batch_size: 64, lr: 0.001}}",
    "meta.epochs=0.4",
    "meta.warmup_epochs=0",
    "pairs.epochs=24",
    "pairs.warmup_epochs=1",
    "pairs.drop_path=0.2",
    "finetune.epochs=24",
    "finetune.drop_path=0.2",
    "baselines=[]",
    "placement.pairs.checkpoint_every_s=0.2",
    "placement.pairs.log_every_steps=2",
    "placement.finetune.checkpoint_every_s=2",
    "placement.finetune.log_every_steps=2",
)

PAIRS = ("pair-0", "pair-1", "pair-2", "pair-3")


def small_demo(*settings: str) -> Recipe:
    return override(find_recipe("demo"), [*SMALL, *settings])


def hashes(store: Store, recipe: Recipe, names: set[str], file: str) -> dict[str, str]:
    """The contents of an artifact's file by the name of its stage."""
    return {
        stage.name: hashlib.sha256((store.open(stage.address) / file).read_bytes()).hexdigest()
        for stage in plan(recipe)
        if stage.name in names
    }


def beginning(of: Store, recipe: Recipe, folder: Path) -> Store:
    """A store with all that the pairs of a recipe read, as another store has it."""
    for address in {need.address for stage in plan(recipe) if stage.name in PAIRS for need in stage.needs.values()}:
        shutil.copytree(of.open(address), folder / address)
    return Store(str(folder))


class Killer:
    """Kills the worker of a stage once it has reported a step, and remembers what was tried again."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        self.killed_at: int | None = None
        self.retried: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageRetried):
            self.retried.append(event.stage.name)
        if not isinstance(event, StageProgress) or event.stage.name != self.stage or self.killed_at is not None:
            return
        if event.progress.step >= self.step:
            os.kill(event.progress.pid, signal.SIGKILL)
            self.killed_at = event.progress.step
