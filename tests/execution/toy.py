"""Toy stages: small and real, with results that can be computed by hand; and a store that is not local."""

import hashlib
import os
import signal
import tempfile
import time
from pathlib import Path

from pyarrow import fs
from pydantic import BaseModel

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution import Metrics, Resources, Stage, StageContext, Store


class Number(BaseModel, frozen=True, extra="forbid"):
    """A number to add."""

    value: int = 1


class Chain(BaseModel, frozen=True, extra="forbid"):
    """A chain of hashes to compute, step by step."""

    seed: int = 0
    steps: int = 10


class Pace(BaseModel, frozen=True, extra="forbid"):
    """How slowly, and where it is noted down what was really run."""

    journal: str = ""
    sleep_s: float = 0.0


def note(context: StageContext, text: str) -> None:
    """Write a line to the journal, if there is one."""
    if isinstance(context.placement, Pace) and context.placement.journal:
        with Path(context.placement.journal).open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")


def add(config: Number, context: StageContext) -> Metrics:
    """The number plus those of all needs."""
    total = config.value + sum(int((folder / "number").read_text()) for folder in context.inputs.values())
    note(context, f"add {config.value}")
    if isinstance(context.placement, Pace):
        time.sleep(context.placement.sleep_s)
    (context.out / "number").write_text(str(total))
    return {"total": total}


def chain(config: Chain, context: StageContext) -> Metrics:
    """Hashes of hashes, with a checkpoint at every step."""
    step, state = 0, str(config.seed)
    if found := context.checkpoints.latest():
        step, state = found[0], (found[1] / "state").read_text()
    while step < config.steps:
        note(context, f"step {step}")
        state = hashlib.sha256(state.encode()).hexdigest()
        step += 1
        files = Path(tempfile.mkdtemp())
        (files / "state").write_text(state)
        context.checkpoints.save(step, files)
        context.report(step, config.steps, {"loss": 1 / step})
        if isinstance(context.placement, Pace):
            time.sleep(context.placement.sleep_s)
    (context.out / "state").write_text(state)
    return {"state": state}


def expected_state(config: Chain) -> str:
    """What `chain` gives, without checkpoints."""
    state = str(config.seed)
    for _ in range(config.steps):
        state = hashlib.sha256(state.encode()).hexdigest()
    return state


def raise_value_error(config: Number, context: StageContext) -> Metrics:
    """A defect."""
    raise ValueError(f"the number {config.value} is unlucky")


def raise_training_error(config: Number, context: StageContext) -> Metrics:
    """An expected error."""
    raise TrainingError("The loss is not finite at step 3. Lower the learning rate.")


def run_out_of_memory(config: Number, context: StageContext) -> Metrics:
    """No memory left."""
    raise MemoryError


def die(config: Number, context: StageContext) -> Metrics:
    """A crash after some files were written."""
    (context.out / "half").write_text("half")
    note(context, "die")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hang(config: Number, context: StageContext) -> Metrics:
    """No second step ever ends."""
    note(context, "hang")
    context.report(1, 9, {})
    time.sleep(600)
    return {}


def say_where(config: Number, context: StageContext) -> Metrics:
    """The worker's process and what it has been told."""
    time.sleep(1)
    return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def number(name: str, value: int = 1, placement: BaseModel | None = None, **needs: Stage) -> Stage:
    """A stage that adds."""
    return Stage(name, add, Number(value=value), needs, placement=placement or Pace())


def diamond(value: int = 1) -> list[Stage]:
    """top → left, right → bottom; the bottom is 3 * value + 6."""
    top = number("top", value)
    left, right = number("left", value + 1, a=top), number("right", 2, a=top)
    return [top, left, right, number("bottom", 3, a=left, b=right)]


def slow_chain(journal: Path, sleep_s: float = 0.05, seed: int = 0, steps: int = 20) -> Stage:
    """A chain that takes about `steps * sleep_s`."""
    placement = Pace(journal=str(journal), sleep_s=sleep_s)
    return Stage(f"chain-{seed}", chain, Chain(seed=seed, steps=steps), placement=placement, resources=Resources())


def remote_store(tmp_path: Path) -> Store:
    """A store that is reached only through pyarrow, as an object store is: copied to a cache before it is read."""
    (tmp_path / "bucket").mkdir(exist_ok=True)
    filesystem = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    return Store("store", filesystem=filesystem, cache=str(tmp_path / "cache"))
