"""Refuse a plan whole, with every reason at once, before anything is launched."""

from collections.abc import Callable, Iterable, Sequence

from m2mkd_ray.errors import PlanError, StoreError
from m2mkd_ray.execution.launcher import Launcher
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.execution.store import Store

Check = Callable[[], list[str]]
"""A check of the domain, which this room knows nothing of: gives a sentence for each problem."""


def check(plan: Sequence[Stage], store: Store, launcher: Launcher, extra: Iterable[Check] = ()) -> None:
    """Make sure that a plan can be carried out: the store, the machines, and the checks in `extra`.

    Raises:
        PlanError: it cannot; lists every problem.
    """
    problems: list[str] = []
    try:
        store.probe()
    except StoreError as error:
        problems.append(str(error))
    else:
        problems += launcher.problems(in_order(plan), store)
    for one in extra:
        problems += one()
    if problems:
        found = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PlanError("\n".join([f"The plan cannot be carried out ({found}):", *(f"- {text}" for text in problems)]))
