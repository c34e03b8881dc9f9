"""What is cut, into how many modules, and how wide each is.

A blueprint is data: it knows names, depths and widths, not tensors. Teacher,
meta model and student are cut into the same number of modules; a teacher
module and the student module of the same index are a pair.
"""

from itertools import accumulate
from typing import Literal

from pydantic import BaseModel, Field, model_validator


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


class Student(BaseModel, frozen=True, extra="forbid"):
    """The modular student."""

    family: str = "vmoe"
    """A name in `m2mkd_ray.models.FAMILIES`."""
    vit: Vit
    moe: Moe = Moe()


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
            f"{who}_depths {depths} add up to {sum(depths)} blocks, but {who} has depth {vit.depth}"
            for who, vit, depths in (
                ("teacher", self.teacher, self.teacher_depths),
                ("student", self.student.vit, self.student_depths),
            )
            if vit.depth is not None and sum(depths) != vit.depth
        ]
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
            of_teacher, of_student = getattr(self.teacher, field), getattr(self.student.vit, field)
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
