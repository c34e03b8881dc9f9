"""What is cut, into how many modules, and how wide each is.

A blueprint is data: it knows names, depths and widths, not tensors. Teacher,
meta model and student are cut into the same number of modules; a teacher
module and the student module of the same index are a pair.
"""

from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator


class Vit(BaseModel, frozen=True, extra="forbid"):
    """A timm ViT with a class token: an entry point by name, and what differs from it."""

    name: str = "vit_base_patch16_224"
    """timm entry point, as `timm.list_models("vit_*")` prints it."""
    img_size: int = Field(224, gt=0)
    """Height and width of the images in pixels."""
    num_classes: int = Field(1000, gt=1)
    patch_size: int | None = Field(None, gt=0)
    """Height and width of a patch in pixels; None: as in the entry point. So for the fields below."""
    width: int | None = Field(None, gt=0)
    """timm's `embed_dim`."""
    depth: int | None = Field(None, gt=0)
    """Number of blocks."""
    num_heads: int | None = Field(None, gt=0)
    mlp_ratio: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "Vit":
        if self.width and self.num_heads and self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.patch_size and self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        return self


class Moe(BaseModel, frozen=True, extra="forbid"):
    """The sparse part of a V-MoE (kamanphoebe/m2mKD `vmoe.py`; see docs/method.md)."""

    num_experts: int = Field(8, gt=0)
    top_k: int = Field(2, gt=0)
    """Experts that each token is sent to; no capacity limit, so no token is dropped."""
    blocks: Literal["all", "every_2"] | tuple[int, ...] = "all"
    """Blocks whose MLP is a mixture: all (m2mKD), odd 0-based ones (V-MoE's "Every 2"), or their indices."""
    expert_init: Literal["trunc_normal", "fastmoe"] = "trunc_normal"
    """trunc_normal: std 0.02 as every other weight. fastmoe: U(-1/sqrt(in*out), 1/sqrt(in*out)), as fastmoe
    1.1.0 draws them (a fan-in of in*out), which the reference inherits."""

    @model_validator(mode="after")
    def _top_k_is_possible(self) -> "Moe":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self


class Prior(BaseModel, frozen=True, extra="forbid"):
    """The random graph that a NAC's mediators start from (kamanphoebe/m2mKD `configs/nac_*.yml`)."""

    kind: Literal["scale_free", "planted_partition", "ring_of_cliques", "erdos_renyi"] = "scale_free"
    """networkx' barabasi_albert_graph, planted_partition_graph, ring_of_cliques or erdos_renyi_graph."""
    new_edges: int = Field(2, gt=0)
    """scale_free: edges that each new node brings (m)."""
    num_groups: int = Field(8, gt=1)
    """planted_partition, ring_of_cliques: groups of equal size; must divide the number of mediators."""
    p_in: float = Field(0.9, ge=0, le=1)
    """planted_partition: probability of an edge inside a group."""
    p_out: float = Field(0.2, ge=0, le=1)
    """planted_partition: probability of an edge between groups."""
    p: float = Field(0.1, ge=0, le=1)
    """erdos_renyi: probability of any edge."""
    threshold: float = Field(0.8, gt=0, lt=2)
    """Signatures are fitted so that edges end below this distance and others above it. The reference's is not the
    kernel's truncation, so its graphs are denser than their prior; equal to `truncation`, they are the prior."""
    steps: int = Field(1000, gt=0)
    """Adam's, when signatures are fitted."""


class Nac(BaseModel, frozen=True, extra="forbid"):
    """A neural attentive circuit; defaults are those of m2mKD for Tiny-ImageNet, with the classes to be given.

    kamanphoebe/m2mKD `configs/nac_scale_tinyimnet_config.yml`; see docs/method.md.
    """

    img_size: int = Field(64, gt=0)
    """Height and width of the images in pixels, a multiple of 8: the tokenizer makes one token of 8 x 8 pixels."""
    num_classes: int = Field(gt=1)
    width: int = Field(384, gt=0)
    """Of states and of codes; a multiple of 4, as the tokenizer begins at a quarter of it."""
    num_heads: int = Field(6, gt=0)
    head_width: int = Field(64, gt=0)
    signature_width: int = Field(64, gt=0)
    num_inputs: int = Field(64, gt=0)
    """Input latents, which read the image's tokens."""
    num_mediators: int = Field(256, gt=0)
    """Mediator latents, which the propagators update; the graph is theirs."""
    num_outputs: int = Field(64, gt=0)
    """Output latents, whose states are pooled."""
    mlp_ratio: float = Field(2.0, gt=0)
    """Hidden width of the GEGLU MLPs by the width."""
    grid_width: int = Field(64, gt=0)
    """Channels of the learned grid of positions, beside those of the features."""
    layer_scale: float = Field(0.1, ge=0)
    """LayerScale at the start; the read-in's attention starts with 1."""
    code_noise: float = Field(0.05, ge=0)
    """In training a code c becomes c + U(-1, 1) * code_noise * |c|."""
    truncation: float = Field(0.9, gt=0)
    """Cosine distance beyond which a sender is not seen."""
    temperature: float = Field(0.5, gt=0)
    """Of the relaxed Bernoulli samples of edges in training."""
    prior: Prior = Prior()
    repulsion: float = Field(0.1, ge=0)
    """Weight of the term that drives signatures apart, in training end to end."""
    hinge: float = Field(0.4, gt=0)
    """Distance below which they are driven apart."""
    evaluation: Literal["mean", "sampled"] = "mean"
    """mean: initial states and pooling without noise. sampled: with noise, as the reference's, but from a seed of its
    own, and one noise for all images. Of the trained student; its training is validated without noise."""
    hybrid_inputs: int = Field(1, gt=0)
    """Latents of the read-in, and so tokens that it hands on, in the meta model; 1 as in the reference."""
    hybrid_codes: Literal["fixed", "learned"] = "fixed"
    """Codes and states that modules have in the meta model: random and fixed as in the reference, or trained."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Nac":
        problems = []
        if self.img_size % 8:
            problems.append(f"img_size {self.img_size} is not a multiple of 8, the pixels of a token")
        if self.width % 4:
            problems.append(f"width {self.width} is not a multiple of 4")
        prior, mediators = self.prior, self.num_mediators
        if prior.kind in ("planted_partition", "ring_of_cliques") and mediators % prior.num_groups:
            problems.append(f"prior.num_groups {prior.num_groups} does not divide num_mediators {mediators}")
        elif prior.kind == "ring_of_cliques" and mediators < 2 * prior.num_groups:
            problems.append(
                f"prior.num_groups {prior.num_groups} leaves each clique of num_mediators {mediators} one node, but a "
                f"clique has two or more"
            )
        if prior.kind == "scale_free" and prior.new_edges >= mediators:
            problems.append(f"prior.new_edges {prior.new_edges} is not less than num_mediators {mediators}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Student(BaseModel, frozen=True, extra="forbid"):
    """The modular student: a ViT whose MLPs are mixtures, or a neural attentive circuit."""

    family: str = "vmoe"
    """A name in `m2mkd_ray.models.FAMILIES`."""
    vit: Vit | None = None
    """What a V-MoE is made of."""
    moe: Moe = Moe()
    """Its mixtures. Left out of a NAC's dumps, which has none."""
    nac: Nac | None = Field(None, exclude_if=lambda nac: nac is None)
    """A NAC's sizes. Left out of dumps while None, so that keys of other students stay as they were before it."""

    @model_validator(mode="after")
    def _has_the_sizes_of_its_family(self) -> "Student":
        if (self.family == "nac") != (self.nac is not None):
            raise ValueError(f"`nac` is needed by family=nac, and only by it; family is {self.family}")
        if (self.nac is None) != (self.vit is not None):
            raise ValueError("`vit` is needed by every family but nac, and not by that one")
        if self.nac is not None and self.moe != Moe():
            raise ValueError("`moe` changes nothing for family=nac, which has no mixtures; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_mixtures_of_a_circuit(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = dump(self)
        return dumped if self.nac is None else {name: value for name, value in dumped.items() if name != "moe"}

    @property
    def sizes(self) -> Vit | Nac:
        """What the student is made of."""
        sizes = self.nac or self.vit
        assert sizes is not None
        return sizes


class Blueprint(BaseModel, frozen=True, extra="forbid"):
    """Teacher and student, and where both are cut."""

    teacher: Vit
    teacher_depths: tuple[int, ...]
    """Blocks of each teacher module, first to last."""
    student: Student
    student_depths: tuple[int, ...]
    """Blocks of each student module, first to last."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Blueprint":
        problems = [
            f"{who}_depths {depths} add up to {sum(depths)} blocks, but {who} has depth {sizes.depth}"
            for who, sizes, depths in (
                ("teacher", self.teacher, self.teacher_depths),
                ("student", self.student.sizes, self.student_depths),
            )
            if isinstance(sizes, Vit) and sizes.depth is not None and sum(depths) != sizes.depth
        ]
        if self.student.nac is not None and (set(self.student_depths) != {1} or len(self.student_depths) < 3):
            problems.append(
                f"a NAC's modules are read-in, propagators and read-out, of one layer each, so student_depths must be "
                f"three or more ones, but is {self.student_depths}"
            )
        if len(self.teacher_depths) != len(self.student_depths):
            problems.append(
                f"teacher_depths {self.teacher_depths} make {len(self.teacher_depths)} modules, "
                f"but student_depths {self.student_depths} make {len(self.student_depths)}"
            )
        if len(self.teacher_depths) < 2:
            problems.append(f"at least two modules are needed, but teacher_depths is {self.teacher_depths}")
        if any(depth < 1 for depth in self.teacher_depths + self.student_depths):
            problems.append("every module needs at least one block")
        for field in ("img_size", "num_classes"):
            of_teacher, of_student = getattr(self.teacher, field), getattr(self.student.sizes, field)
            if of_teacher != of_student:
                problems.append(f"teacher has {field} {of_teacher}, but student has {of_student}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def num_modules(self) -> int:
        """Modules of teacher, meta model and student alike."""
        return len(self.teacher_depths)

    @property
    def meta(self) -> Vit:
        """The meta model: the teacher with one block a module (Deep Incubation; m2mKD 1.3)."""
        return self.teacher.model_copy(update={"depth": self.num_modules})

    @property
    def pairs(self) -> tuple["ModulePair", ...]:
        """One pair a module, first to last."""
        teacher_starts = accumulate(self.teacher_depths, initial=0)
        student_starts = accumulate(self.student_depths, initial=0)
        return tuple(
            ModulePair(index=i, teacher_blocks=(t, t + td), student_blocks=(s, s + sd))
            for i, (t, td, s, sd) in enumerate(
                zip(teacher_starts, self.teacher_depths, student_starts, self.student_depths)
            )
        )


class ModulePair(BaseModel, frozen=True, extra="forbid"):
    """A teacher module and the student module of the same index, as half-open ranges of blocks."""

    index: int
    teacher_blocks: tuple[int, int]
    student_blocks: tuple[int, int]
