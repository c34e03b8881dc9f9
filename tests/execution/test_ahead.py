"""What an autoscaler is asked for ahead: what will be held at once, when something comes soon, and else nothing."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from toy import number

from m2mkd_ray.execution import LocalLauncher, Resources, Stage, Store, execute
from m2mkd_ray.execution.ahead import Ahead, of_worker, wanted_ahead
from m2mkd_ray.execution.runs import Run, State

SMALL, GPU, LARGE = Resources(cpus=1), Resources(cpus=1, gpus=1), Resources(cpus=8, gpus=8)
NEVER = float("inf")


def flow() -> dict[str, Stage]:
    """meta ── pair-0, pair-1 ── assemble ── finetune."""
    meta = replace(number("meta", 1), resources=SMALL)
    pairs = [replace(number(f"pair-{i}", i, meta=meta), resources=GPU) for i in range(2)]
    assembled = replace(number("assemble", 5, one=pairs[0], other=pairs[1]), resources=SMALL)
    return {stage.name: stage for stage in (meta, *pairs, assembled, number_on(LARGE, "finetune", assembled))}


def number_on(resources: Resources, name: str, need: Stage) -> Stage:
    return replace(number(name, 9, of=need), resources=resources)


def wanted(states: dict[str, State], ends: dict[str, float], lead_s: float = 300) -> list[Resources]:
    stages = flow()
    runs = {stage.address: Run(stage, states[name]) for name, stage in stages.items()}
    return wanted_ahead(runs, {stages[name].address: end for name, end in ends.items()}, lead_s, of_worker)


W, R, C = State.WAITING, State.RUNNING, State.COMPLETE


@pytest.mark.parametrize(
    ("states", "ends", "expected"),
    [
        # The meta model is about to end: room for both pairs, not for itself any more.
        ((R, W, W, W, W), (100, NEVER, NEVER, NEVER, NEVER), [GPU, GPU]),
        # It is not, or nobody knows: nothing.
        ((R, W, W, W, W), (301, NEVER, NEVER, NEVER, NEVER), []),
        ((R, W, W, W, W), (NEVER, NEVER, NEVER, NEVER, NEVER), []),
        # Pairs are under way, and the end is far: nothing is held back.
        ((C, R, R, W, W), (0, 200, 900, 901, NEVER), []),
        # They end soon: assembling takes a second, and the fine-tuning's nodes are to be there.
        ((C, R, R, W, W), (0, 20, 30, 31, NEVER), [SMALL, LARGE]),
        # What is ready itself is asked for by its worker.
        ((C, W, W, W, W), (0, NEVER, NEVER, NEVER, NEVER), []),
        # The fine-tuning runs: nothing comes after it.
        ((C, C, C, C, R), (0, 0, 0, 0, 100), []),
    ],
)
def test_what_is_wanted(states: Sequence[State], ends: Sequence[float], expected: list[Resources]) -> None:
    names = list(flow())
    assert wanted(dict(zip(names, states)), dict(zip(names, ends))) == expected


def test_ranks_count_beside_their_driver() -> None:
    stages = flow()
    runs = {stage.address: Run(stage, W if name == "finetune" else R) for name, stage in stages.items()}
    ends = {stage.address: 10.0 for stage in stages.values()}
    found = wanted_ahead(
        runs, ends, 300, lambda stage: (stage.resources, GPU, GPU) if stage.name == "finetune" else ()
    )
    assert found == [GPU, GPU, LARGE]


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_run_nothing_is_asked_for_however_it_ended(store: Store, fails: bool) -> None:
    asked: list[Sequence[Resources]] = []
    ahead = Ahead(asked.append, 300)
    first = number("first", 1)
    plan = [first, number_on(GPU, "second", first)]

    def stop(event: object) -> None:
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            execute(plan, store, LocalLauncher(), ahead=ahead, on_event=stop)
    else:
        execute(plan, store, LocalLauncher(), ahead=ahead).raise_for_failures()
    assert asked[-1] == ()
