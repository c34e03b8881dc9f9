"""What to do when a stage did not come back: a policy, which decides and does nothing.

Kinds are counted apart: a spot machine that goes takes nothing from the budget
for crashes, and an exception is never tried again, because the same input raises
the same exception.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a stage failed."""

    PREEMPTED = "PREEMPTED"
    """The cluster took its machine away, with notice."""
    LOST = "LOST"
    """Its process or machine died without a word."""
    STALLED = "STALLED"
    """It had reported, then reported nothing for too long, and was killed."""
    RAISED = "RAISED"
    """It raised an exception."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """Its process or GPU had no memory left."""
    CROWDED = "CROWDED"
    """Its process or GPU had no memory left while other members of a cohort were there; it may do alone."""
    UNPLACED = "UNPLACED"
    """No node could hold it, for longer than it was to wait."""


@dataclass(frozen=True)
class Retry:
    """Try again after a while."""

    delay_s: float


@dataclass(frozen=True)
class GiveUp:
    """Leave it; the reason is a sentence for people."""

    reason: str


RETRIES: dict[Kind, int | None] = {
    Kind.PREEMPTED: None,
    Kind.LOST: 3,
    Kind.STALLED: 2,
    Kind.RAISED: 0,
    Kind.OUT_OF_MEMORY: 0,
    Kind.CROWDED: 1,
    Kind.UNPLACED: 0,
}
"""How often a stage is tried again, by kind; None: without limit."""

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0

_ADVICE = {
    Kind.LOST: "look for the reason in the logs of the machine (out of memory? a crash in a library?)",
    Kind.STALLED: "look at what it waits for (`py-spy dump --pid`), or raise the limit "
    "(`m2mkd run --stall-timeout SECONDS`, 0: none) if it is that slow",
    Kind.RAISED: "the same input raises again, so it was not retried",
    Kind.OUT_OF_MEMORY: "lower `micro_batch` (the batch, and so the result, stays the same), "
    "or give the stage a larger device",
    Kind.CROWDED: "have fewer stages in one cohort, or lower `micro_batch`",
    Kind.UNPLACED: "add a node that has what it asks for, lower its resources, or have it wait longer "
    "(`m2mkd run --wait-timeout SECONDS`, 0: for ever)",
}


def decide(kind: Kind, history: Sequence[Kind]) -> Retry | GiveUp:
    """What to do about a failure of `kind`, after the failures in `history` of the same stage in this run."""
    limit = RETRIES[kind]
    before = history.count(kind)
    if limit is None or before < limit:
        return Retry(delay_s=min(_FIRST_DELAY_S * 2 ** min(before, 16), _LONGEST_DELAY_S))
    times = f"{kind} {before + 1} times" if before else str(kind)
    return GiveUp(f"{times}: {_ADVICE[kind]}")
