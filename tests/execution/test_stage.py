"""A stage's key stands for its result: it changes with what decides that, and with nothing else."""

import pytest
from pydantic import BaseModel
from toy import Number, Pace, add, number

from m2mkd_ray.execution import Resources, Stage, in_order

BASE = Stage("a", add, Number(value=1), {"x": number("need")})


class Other(BaseModel, frozen=True, extra="forbid"):
    """Another field, of the same value."""

    other: int = 1


@pytest.mark.parametrize(
    "changed",
    [
        Stage("b", add, Number(value=1), {"x": number("need")}),
        Stage("a", add, Number(value=2), {"x": number("need")}),
        Stage("a", add, Other(), {"x": number("need")}),
        Stage("a", add, Number(value=1), {"x": number("need", 2)}),
        Stage("a", add, Number(value=1), {"y": number("need")}),
        Stage("a", add, Number(value=1), {}),
        Stage("a", add, Number(value=1), {"x": number("need")}, version=2),
    ],
    ids=["name", "config", "field", "need", "role", "no need", "version"],
)
def test_the_key_changes_with_what_decides_the_result(changed: Stage) -> None:
    assert changed.key != BASE.key


@pytest.mark.parametrize(
    "same",
    [
        Stage("a", add, Number(value=1), {"x": number("need")}, resources=Resources(cpus=8, gpus=1, memory_gb=2)),
        Stage("a", add, Number(value=1), {"x": number("need")}, placement=Pace(sleep_s=1)),
        Stage("a", add, Number(value=1), {"x": number("need")}, of="another recipe"),
        Stage("a", add, Number(value=1), {"x": number("need", placement=Pace(sleep_s=1))}),
    ],
    ids=["resources", "placement", "recipe", "placement of a need"],
)
def test_the_key_stays_with_what_decides_only_place_and_speed(same: Stage) -> None:
    assert same.key == BASE.key


def test_roles_may_come_in_any_order() -> None:
    one, two = number("one"), number("two")
    assert number("a", 1, x=one, y=two).key == number("a", 1, y=two, x=one).key


def test_in_order_gives_each_stage_once_and_after_its_needs() -> None:
    top = number("top")
    left, right = number("left", a=top), number("right", a=number("top"))
    ordered = in_order([number("bottom", a=left, b=right), left])
    assert [stage.name for stage in ordered] == ["top", "left", "right", "bottom"]
