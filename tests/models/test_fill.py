import pytest
import torch
from torch import nn

from m2mkd_ray.errors import FillError
from m2mkd_ray.models.fill import Filled, fill

PARTS = [
    {"0.weight": torch.full((2, 3), 1.0), "0.bias": torch.full((2,), 2.0), "stitch.weight": torch.zeros(9, 9)},
    {"0.weight": torch.full((4, 2), 3.0), "0.bias": torch.full((4,), 4.0)},
]
RULES = [{r"0\.(.+)": r"0.\1", r"stitch\..+": None}, {r"0\.(.+)": r"1.\1"}]


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.LayerNorm(4))


def test_fill_loads_every_part_and_counts_tensors() -> None:
    model = student()
    assert fill(model, PARTS, RULES, fresh=[r"2\..+"]) == Filled(filled=4, dropped=1, fresh=2)
    assert torch.equal(model[0].bias, PARTS[0]["0.bias"])
    assert torch.equal(model[1].weight, PARTS[1]["0.weight"])


def test_the_first_rule_that_matches_the_whole_name_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    rules = {"0": "nowhere", r"0\.bias": "0.bias", ".*": r"0.weight"}
    fill(model, [{"0.bias": torch.ones(2), "w": torch.ones(2, 3)}], [rules])
    assert model[0].bias.tolist() == [1, 1]


def test_all_misfits_are_in_one_message_and_nothing_is_loaded() -> None:
    model = student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = [
        PARTS[0] | {"extra": torch.zeros(1), "2.bias": torch.zeros(4)},
        {"0.weight": torch.zeros(4, 3), "moved": torch.zeros(2), "lost": torch.zeros(5)},
    ]
    rules = [
        RULES[0] | {r"2\.(.+)": r"2.\1"},
        {r"0\.(.+)": r"1.\1", "moved": "0.bias", "lost": "3.weight"},
    ]
    with pytest.raises(FillError) as error:
        fill(model, parts, rules, fresh=[r"2\..+"])
    assert str(error.value).splitlines() == [
        "Cannot fill the student, nothing was loaded. 6 misfits:",
        "  module 0's extra (1,): no rule says where it goes",
        "  0.bias: filled by module 0's 0.bias and module 1's moved",
        "  1.weight: found (4, 3) in module 1's 0.weight, expected (4, 2)",
        "  1.bias (4,): no module fills it",
        "  2.bias: declared fresh, but filled by module 0's 2.bias",
        "  module 1's lost: the student has no 3.weight",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_missing_part_is_refused() -> None:
    with pytest.raises(FillError, match="1 modules, but rules for 2"):
        fill(student(), PARTS[:1], RULES)
