"""The policy: which failures are tried again, how often and how soon."""

import pytest

from m2mkd_ray.execution import GiveUp, Kind, Retry, decide


def retries(kind: Kind, limit: int = 100) -> int:
    """How often the policy tries again when it is always the same kind."""
    history: list[Kind] = []
    while len(history) < limit and isinstance(decide(kind, history), Retry):
        history.append(kind)
    return len(history)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Kind.PREEMPTED, 100), (Kind.LOST, 3), (Kind.STALLED, 2), (Kind.RAISED, 0), (Kind.OUT_OF_MEMORY, 0)],
)
def test_each_kind_has_its_own_budget(kind: Kind, expected: int) -> None:
    assert retries(kind) == expected


def test_preemptions_take_nothing_from_the_budget_for_losses() -> None:
    assert isinstance(decide(Kind.LOST, [Kind.PREEMPTED] * 50 + [Kind.LOST] * 2), Retry)


def test_delays_double_from_half_a_second_to_half_a_minute() -> None:
    delays = [decide(Kind.PREEMPTED, [Kind.PREEMPTED] * n) for n in (0, 1, 2, 5, 6, 50)]
    assert delays == [Retry(0.5), Retry(1.0), Retry(2.0), Retry(16.0), Retry(30.0), Retry(30.0)]


def test_a_long_history_of_preemptions_does_not_overflow() -> None:
    assert decide(Kind.PREEMPTED, [Kind.PREEMPTED] * 5000) == Retry(30.0)


def test_out_of_memory_says_what_to_lower() -> None:
    decision = decide(Kind.OUT_OF_MEMORY, [])
    assert isinstance(decision, GiveUp)
    assert "lower `micro_batch`" in decision.reason


def test_giving_up_on_losses_says_how_many_there_were() -> None:
    decision = decide(Kind.LOST, [Kind.LOST] * 3)
    assert isinstance(decision, GiveUp)
    assert decision.reason.startswith("LOST 4 times:")


def test_giving_up_on_a_stall_names_the_option() -> None:
    decision = decide(Kind.STALLED, [Kind.STALLED] * 2)
    assert isinstance(decision, GiveUp)
    assert "--stall-timeout" in decision.reason
