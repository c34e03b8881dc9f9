"""The family NAC: neural attentive circuits, as m2mKD trains them (kamanphoebe/m2mKD `nacs/`, `nacstudent.py`).

Modules and the parts of a circuit that they train:

    module 0      tokenizer, read-in, stitch D -> T
    module i      stitch T -> D, propagator i - 1, stitch D -> T
    module N - 1  stitch T -> D, read-out, the pooling's classifier

Codes, signatures, the kernels' bandwidths, the seeder of first states and the pooling's confidence are trained in no
module: they start anew in the circuit. The last module has a confidence, but learns nothing of it, as its softmax is
over one latent. Grid and classifier are carried over, as here all stages have the same images and classes; the
reference carries them, and the confidence as it is, over for ImageNet, but not for Tiny-ImageNet, whose modules it
trains on ImageNet.

Modules have no graph, and no latents but those of the read-in, so most settings of a circuit decide nothing of them.
These are at their defaults in what modules are trained by: circuits with other priors share their modules. A setting
is named here to be left out; one that is not named stays in all keys, which is never wrong.
"""

from collections.abc import Sequence

from m2mkd_ray.blueprint import Blueprint, Nac
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models.fill import Rules
from m2mkd_ray.models.nac.circuit import Circuit
from m2mkd_ray.models.nac.hybrid import PropagatorModule, ReadInModule, ReadOutModule
from m2mkd_ray.models.nac.layers import nac_of
from m2mkd_ray.models.nac.macs import macs, module_macs, num_tokens
from m2mkd_ray.models.vit import width

__all__ = [
    "for_modules",
    "for_training",
    "fresh",
    "macs",
    "model",
    "module_macs",
    "modules",
    "num_tokens",
    "rules",
]

Module = ReadInModule | PropagatorModule | ReadOutModule

NEVER_TAUGHT = (
    r"(inputs|mediators|outputs)\.(signatures|codes)",
    r"seeder\..+",
    r"propagators\.\d+\.attention\.kernel\.bandwidth",
    r"read_out\.attention\.kernel\.bandwidth",
    r"pooling\.confidence\..+",
)

OF_CIRCUIT_ALONE = (
    *("signature_width", "num_inputs", "num_mediators", "num_outputs", "code_noise", "truncation", "temperature"),
    *("prior", "repulsion", "hinge", "evaluation"),
)
"""Settings that no module goes by."""
NOT_OF_TRAINING = ("hybrid_inputs", "hybrid_codes", "evaluation")
"""Settings that the training of the circuit does not go by. It is validated without noise, whatever `evaluation` says
of the circuit that comes out: so accuracies of a training can be compared, and another way to evaluate trains nothing.
"""


def model(blueprint: Blueprint, drop_path: float = 0.0, *, keep_stitches: bool = False) -> Circuit:
    """Build the whole circuit, images (B, 3, H, W) to logits (B, K), with random weights.

    Args:
        blueprint: what to build.
        drop_path: stochastic depth of every propagator.
        keep_stitches: has to be False.

    Raises:
        UsageError: stitches are to be kept: latents have no place for them.
    """
    if keep_stitches:
        raise UsageError("A NAC cannot keep its stitches: its latents are no tokens of the teacher's. Drop them.")
    return Circuit(nac_of(blueprint), blueprint.num_modules - 2, drop_path)


def modules(blueprint: Blueprint, drop_path: float = 0.0) -> list[Module]:
    """Build the student's modules, with stitches to the teacher's width and random weights.

    Module 0 maps images to tokens (B, hybrid_inputs, T), the last one tokens (B, L, T) to logits, the others tokens to
    tokens. `drop_path` is the stochastic depth of every propagator; read-in and read-out have none.
    """
    nac, teacher_width = nac_of(blueprint), width(blueprint.teacher)
    between = [PropagatorModule(nac, teacher_width, drop_path) for _ in range(blueprint.num_modules - 2)]
    return [ReadInModule(nac, teacher_width), *between, ReadOutModule(nac, teacher_width)]


def rules(blueprint: Blueprint, *, keep_stitches: bool = False) -> list[Rules]:
    """Where the tensors of every module go in `model(blueprint)`.

    Stitches, codes, states and the pooling's confidence are dropped.
    """
    dropped = {r"(pre|post)_stitch\..+": None, r"code|state": None}
    between: list[Rules] = [
        {r"propagator\.(.+)": rf"propagators.{index}.\1", **dropped} for index in range(blueprint.num_modules - 2)
    ]
    return [
        {r"((tokenizer|read_in)\..+)": r"\1", **dropped},
        *between,
        {r"((read_out|pooling\.head)\..+)": r"\1", r"pooling\.confidence\..+": None, **dropped},
    ]


def fresh(blueprint: Blueprint) -> tuple[str, ...]:
    """What no module trains: signatures, codes, seeder, bandwidths and confidence."""
    return NEVER_TAUGHT


def for_modules(blueprint: Blueprint) -> Blueprint:
    """With `OF_CIRCUIT_ALONE` at their defaults."""
    return _without(OF_CIRCUIT_ALONE, blueprint)


def for_training(blueprint: Blueprint) -> Blueprint:
    """With `NOT_OF_TRAINING` at their defaults."""
    return _without(NOT_OF_TRAINING, blueprint)


def _without(settings: Sequence[str], blueprint: Blueprint) -> Blueprint:
    """With these settings of the circuit at their defaults, which fit to whatever the others are."""
    nac = Nac.model_validate(nac_of(blueprint).model_dump(exclude=set(settings)))
    student = blueprint.student.model_copy(update={"nac": nac})
    return blueprint.model_copy(update={"student": student})
