"""Toy stages: small and real, with results that can be computed by hand; and a store that is not local."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from pyarrow import fs
from pydantic import BaseModel

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution import Left, Member, Metrics, Resources, Stage, StageContext, Store, Together, Withdrawn


class Number(BaseModel, frozen=True, extra="forbid"):
    """A number to add."""

    value: int = 1


class Chain(BaseModel, frozen=True, extra="forbid"):
    """A chain of hashes to compute, step by step."""

    seed: int = 0
    steps: int = 10
    unlucky_at: int | None = None
    """The step at which it raises."""


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


def note_node(arguments: dict[str, str]) -> None:
    """On a rank of Ray Train: write down which node it is on."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    Path(arguments["job"], f"rank-{rank}").write_text(ray.get_runtime_context().get_node_id())


def chain(config: Chain, context: StageContext) -> Metrics:
    """Hashes of hashes, with a checkpoint at every step."""
    steps = link(config, context)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        if isinstance(context.placement, Pace):
            time.sleep(context.placement.sleep_s)


def link(config: Chain, context: StageContext) -> Generator[int, None, Metrics]:
    """A chain, step by step; returns what the stage returns."""
    step, state = 0, str(config.seed)
    if found := context.checkpoints.latest():
        step, state = found[0], (found[1] / "state").read_text()
    while step < config.steps:
        if step == config.unlucky_at:
            raise ValueError(f"step {step} is unlucky")
        note(context, f"step {step}")
        state = hashlib.sha256(state.encode()).hexdigest()
        step += 1
        files = context.checkpoints.scratch()
        (files / "state").write_text(state)
        context.checkpoints.save(step, files)
        context.report(step, config.steps, {"loss": 1 / step}, [{"step": float(done + 1)} for done in range(step)])
        yield step
    (context.out / "state").write_text(state)
    return {"state": state}


def chains(members: Sequence[Member]) -> Iterator[Left]:
    """Chains side by side: a step of each in turn, and they leave one by one."""
    inside = {place: link(member.config, member.context) for place, member in enumerate(members)}
    while inside:
        for place, steps in list(inside.items()):
            try:
                next(steps)
            except StopIteration as end:
                del inside[place]
                yield Left(place, end.value)
            except (ValueError, Withdrawn) as error:
                del inside[place]
                yield Left(place, error=error)
        pace = members[0].context.placement
        if isinstance(pace, Pace):
            time.sleep(pace.sleep_s)


def chains_with_little_memory(members: Sequence[Member]) -> Iterator[Left]:
    """Chains, of which the last has no room beside others."""
    if len(members) > 1:
        yield Left(len(members) - 1, error=MemoryError())
        for place, member in enumerate(members[:-1]):
            yield Left(place, chain(member.config, member.context))
    else:
        yield from chains(members)


def chains_that_break(members: Sequence[Member]) -> Iterator[Left]:
    """The first leaves, then all comes to grief."""
    yield Left(0, chain(members[0].config, members[0].context))
    raise RuntimeError("the shared loader broke")


def chains_that_forget(members: Sequence[Member]) -> Iterator[Left]:
    """Only the first is ever heard of."""
    yield Left(0, chain(members[0].config, members[0].context))


def one_hangs(members: Sequence[Member]) -> Iterator[Left]:
    """All report a step; then nothing moves while there are several."""
    for member in members:
        member.context.report(1, 9, {})
    if len(members) > 1:
        time.sleep(600)
    yield from chains(members)


def cohort(
    steps: Sequence[int],
    together: Together = chains,
    unlucky: Sequence[int] = (),
    size: int = 9,
    placement: BaseModel | None = None,
) -> list[Stage]:
    """Chains of so many steps that may run together; the unlucky ones raise at their third step."""
    return [
        Stage(
            f"chain-{seed}",
            chain,
            Chain(seed=seed, steps=count, unlucky_at=2 if seed in unlucky else None),
            placement=placement or Pace(),
            together=together,
            mates="chains",
            cohort=size,
        )
        for seed, count in enumerate(steps)
    ]


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


def say_modules(config: Number, context: StageContext) -> Metrics:
    """What the worker has imported."""
    return {"modules": sorted(sys.modules)}


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


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that ended and waits for its parent does not)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def wait_until_gone(pid: int) -> None:
    """Wait for the end of a process."""
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)
