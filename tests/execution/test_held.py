"""What workers held, by hand; the report counts the same from the histories."""

from collections import defaultdict
from dataclasses import replace

import pytest
from toy import number

from m2mkd_ray.execution import Resources, Stage
from m2mkd_ray.execution.held import Held

SPOT = {"host": "a", "node_id": "a", "node_group": "incubate", "spot": True}
PLAIN = {"host": "b", "node_id": "b", "node_group": "", "spot": False}


class Book:
    """Adds up what was held; an hour passes with each call."""

    def __init__(self, ranks: tuple[Resources, ...] = ()) -> None:
        self.now, self.sums = 0.0, defaultdict(float)
        self.held = Held(lambda: self.now * 3600, lambda stage: (stage.resources, *ranks))

    def hour(self) -> None:
        self.now += 1
        for name, (group, spot), hours in self.held.look():
            self.sums[name, group, spot] += hours

    def total(self) -> dict[tuple[str, str, str], float]:
        return {key: round(hours, 9) for key, hours in self.sums.items() if hours}


def on_gpu(name: str) -> Stage:
    return replace(number(name, len(name)), resources=Resources(cpus=4, gpus=0.5))


def test_a_cohort_holds_its_worker_once_and_a_node_counts_once() -> None:
    book, (first, second, other) = Book(), (on_gpu("first"), on_gpu("second"), on_gpu("other"))
    for stage in (first, second):
        book.held.start(stage, {**SPOT, "pid": 1})
    book.held.start(other, {**SPOT, "pid": 2})
    book.hour()
    assert book.held.leave(first) == ("incubate", "true")
    book.hour()
    for stage in (second, other):
        book.held.leave(stage)
    book.hour()
    assert book.held.leave(other) is None
    at = ("incubate", "true")
    assert book.total() == {("node_hours", *at): 2, ("gpu_hours", *at): 2, ("cpu_hours", *at): 16}


@pytest.mark.parametrize("group", ["finetune", ""])
def test_ranks_count_from_the_first_report_and_in_their_group(group: str) -> None:
    rank = Resources(cpus=2, gpus=1, node_group=group)
    book, stage = Book((rank,) * 8), replace(number("finetune", 1), resources=Resources(cpus=0))
    book.held.start(stage, {**PLAIN, "pid": 1})
    book.hour()  # they wait for their machines
    book.held.report(stage)
    book.hour()
    book.held.leave(stage)
    at = (group or "no group", "false")
    assert book.total() == {("node_hours", "no group", "false"): 2, ("gpu_hours", *at): 8, ("cpu_hours", *at): 16}
