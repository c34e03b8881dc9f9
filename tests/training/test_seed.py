import torch

from m2mkd_ray.training import derive, seeded


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive(0, "step", 7) == 0xDB309F74B20FDB6D >> 1  # printf "(0, 'step', 7)" | sha256sum, from the left


def test_seeds_differ_by_every_part_and_by_its_kind() -> None:
    parts = [(0,), (1,), ("0",), (0, 0), (0, "step", 1, 0), (0, "step", 0, 1), (0, "step", 10), (0, "step", 1)]
    assert len({derive(*some) for some in parts}) == len(parts)
    assert all(0 <= derive(*some) < 2**63 for some in parts)


def test_inside_the_block_numbers_follow_from_the_parts_and_outside_nothing_happened() -> None:
    before = torch.get_rng_state()
    with seeded(1, "student"):
        first = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(5)
    with seeded(1, "student"):
        assert torch.equal(torch.randn(3), first)
