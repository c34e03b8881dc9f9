import torch

from m2mkd_ray.models.stitch import Stitch


def test_a_stitch_is_a_layer_norm_and_a_linear() -> None:
    stitch, tokens = Stitch(6, 4), 3 + 2 * torch.randn(2, 5, 6)
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(stitch(tokens), normed @ stitch.proj.weight.T)


def test_a_pair_of_stitches_between_widths_1024_and_768_has_the_papers_size() -> None:
    with torch.device("meta"):
        pair = (Stitch(1024, 768), Stitch(768, 1024))
    assert sum(p.numel() for stitch in pair for p in stitch.parameters()) == 2 * 1024 * 768 + 3 * 768 + 3 * 1024
