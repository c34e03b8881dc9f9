"""Seats are given on the nodes that are there, and planned anew when these change."""

import pytest
import toy
from doubles import Desk

from m2mkd_ray.execution import AsGiven, Store
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.runs import Run
from m2mkd_ray.execution.seating import Seating


class Changing(Desk):
    """A launcher whose nodes have these names, one list after the other; the last one stays."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = list(names)

    def nodes(self) -> list[Node]:
        """See `Launcher`."""
        names = self._names.pop(0) if len(self._names) > 1 else self._names[0]
        return [Node(name, {"CPU": 1.0}, id=name) for name in names]


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (("a", "", "a", "a"), [False, True, True, False]),
        (("", "a"), [False, True]),
        (("a", "b", "ab"), [False, True, True]),
    ],
    ids=["all go and return", "the first comes", "others come"],
)
def test_nodes_that_come_or_go_are_noticed_also_where_there_were_none(
    store: Store, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], changes: list[bool]
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.seating._NODES_EVERY_S", 0.0)
    seating = Seating({}, store, Changing(*names), AsGiven())
    assert [seating.look_at_nodes() for _ in changes] == changes


def test_asking_for_seats_while_there_are_no_nodes_hides_none_that_come(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.seating._NODES_EVERY_S", 0.0)
    first, second = Run(toy.number("first")), Run(toy.number("second"))
    runs = {run.stage.address: run for run in (first, second)}
    seating = Seating(runs, store, Changing("a", "", "a"), AsGiven())
    seating.fill([first])
    assert seating.look_at_nodes()
    seating.fill([second])
    assert seating.look_at_nodes()
