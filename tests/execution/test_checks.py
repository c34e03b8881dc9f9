"""A plan is refused whole, with every reason at once."""

from pathlib import Path

import pytest
from toy import diamond

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution import LocalLauncher, Store, check


def test_a_good_plan_passes(store: Store) -> None:
    check(diamond(), store, LocalLauncher(), extra=[lambda: []])


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError) as caught:
        check(
            diamond(),
            Store(f"{tmp_path}/file"),
            LocalLauncher(),
            extra=[lambda: ["no such data set"], lambda: ["experts do not divide", "fp16 on CPU"]],
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "The plan cannot be carried out (4 problems):"
    assert "a file is in the way" in lines[1]
    assert lines[2:] == ["- no such data set", "- experts do not divide", "- fp16 on CPU"]
