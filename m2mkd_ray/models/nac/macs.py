"""What a circuit costs: multiply-accumulates (MAC) of its matrix products and convolutions, per image.

U = receivers, V = senders, D = width, I = heads times their width, F = the MLPs' hidden width, T = width of tokens

Left out is what is done once a batch: modulation of weights by codes, distances of signatures, means of first states.
Checked against torch's own counter.
"""

from m2mkd_ray.blueprint import Blueprint, Nac
from m2mkd_ray.models.nac.ends import DEPTH, PATCH
from m2mkd_ray.models.nac.layers import nac_of, token_width
from m2mkd_ray.models.vit import num_tokens as vit_tokens
from m2mkd_ray.models.vit import width


def macs(blueprint: Blueprint) -> float:
    """Forward MAC of the whole circuit."""
    nac = nac_of(blueprint)
    inner, outer = nac.num_inputs, nac.num_mediators
    senders = inner + outer
    propagator = _exchange(nac, outer, senders)
    ends = _tokenizer(nac) + _read_in(nac, inner) + _exchange(nac, nac.num_outputs, senders)
    return ends + (blueprint.num_modules - 2) * propagator + _pooling(nac, nac.num_outputs)


def module_macs(blueprint: Blueprint, index: int, *, short: bool = False) -> float:
    """Forward MAC of a module in the meta model, stitches included; there is nothing to cut `short`."""
    nac, of_teacher, last = nac_of(blueprint), width(blueprint.teacher), blueprint.num_modules - 1
    if index == 0:
        return _tokenizer(nac) + _read_in(nac, nac.hybrid_inputs) + nac.hybrid_inputs * nac.width * of_teacher
    tokens = vit_tokens(blueprint.teacher)
    stitch = tokens * nac.width * of_teacher
    if index == last:
        return stitch + _exchange(nac, 1, tokens) + _pooling(nac, 1)
    return 2 * stitch + _exchange(nac, tokens, tokens)


def num_tokens(blueprint: Blueprint, index: int) -> int:
    """Tokens that a module hands on in the meta model: the read-in's are few."""
    return nac_of(blueprint).hybrid_inputs if index == 0 else vit_tokens(blueprint.teacher)


def _tokenizer(nac: Nac) -> float:
    """Stem, then for each stage depthwise 7 x 7 and an MLP of 4 times the width, and a 2 x 2 convolution between."""
    first, second = nac.width // 4, nac.width // 2
    fine, coarse = (2 * nac.img_size // PATCH) ** 2, (nac.img_size // PATCH) ** 2
    stem = fine * 48 * first
    stages = sum(places * DEPTH * (49 * width + 8 * width**2) for places, width in ((fine, first), (coarse, second)))
    return stem + stages + coarse * 4 * first * second


def _read_in(nac: Nac, latents: int) -> float:
    """Queries and exit; queries to the tokens' width and back; scores and sums over tokens for each head."""
    inner, tokens, width = nac.num_heads * nac.head_width, (nac.img_size // PATCH) ** 2, token_width(nac)
    attention = 2 * nac.width * inner + 2 * inner * width + 2 * nac.num_heads * tokens * width
    return latents * attention + _mlp(nac, latents)


def _exchange(nac: Nac, receivers: int, senders: int) -> float:
    """Queries and exit of U, keys and values of V (D I each), scores and sums (U V I each), and the MLP."""
    inner = nac.num_heads * nac.head_width
    products = 2 * (receivers + senders) * nac.width * inner + 2 * receivers * senders * inner
    return products + _mlp(nac, receivers)


def _mlp(nac: Nac, latents: int) -> float:
    """3 D F, as GEGLU has two hidden halves."""
    return latents * 3 * nac.width * round(nac.mlp_ratio * nac.width)


def _pooling(nac: Nac, latents: int) -> float:
    """Confidences and weighted sum (of one latent there is none), then the classifier."""
    weighted = latents if latents > 1 else 0
    return (latents + weighted) * nac.width + nac.width * nac.num_classes
