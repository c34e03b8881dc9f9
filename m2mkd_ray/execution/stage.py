"""A stage: one step of the pipeline, as data.

A stage's key is made from all that decides its result: its name, version and
config, and the keys of the stages that it reads. What decides only where and how
fast it runs (resources, placement) never enters the key, so a run may move to
other machines and go on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from m2mkd_ray.execution.cohort import Together
    from m2mkd_ray.execution.context import StageContext

ANY_GROUP = "any"
"""The node group that says there is to be none."""

Metrics = Mapping[str, Any]
"""What a stage returns: JSON values by name."""


class Resources(BaseModel, frozen=True, extra="forbid"):
    """What the worker that runs a stage is given."""

    cpus: float = 1.0
    """CPU cores; also the number of threads (rounded up, at least one)."""
    gpus: float = 0.0
    """GPUs; a fraction shares one with other stages, above one it is a whole number."""
    memory_gb: float | None = None
    """Memory to reserve in GB; None reserves none."""
    node_group: str = ""
    """Only on nodes of this group (label `m2mkd.node-group`); `any`, or empty: on any node. Empty in a recipe: as the
    cluster has groups (`commands/grouping.py`)."""

    @property
    def group(self) -> str:
        """The group that it has to be on; empty: none."""
        return "" if self.node_group == ANY_GROUP else self.node_group


@dataclass(frozen=True)
class Spread:
    """How a stage runs on several devices: data parallel, say, with the same result but for rounding."""

    resources: Resources
    """Of the stage's own worker, which then only drives."""
    placement: BaseModel
    device: Resources
    """What each device's process holds."""


class NoPlacement(BaseModel, frozen=True, extra="forbid"):
    """The placement of a stage that has nothing to choose."""


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    `run(config, context) -> metrics` is the whole contract: it reads
    `context.inputs`, writes under `context.out`, reports through `context`.
    """

    name: str
    run: Callable[[Any, "StageContext"], Metrics]
    config: BaseModel
    needs: Mapping[str, "Stage"] = field(default_factory=dict)
    """The stages it reads, by the role that each plays for it."""
    resources: Resources = Resources()
    placement: BaseModel = NoPlacement()
    """Settings of `run` that change speed or place, never the result."""
    version: int = 1
    """Raised when `run` gives another result for the same config."""
    of: str = ""
    """The recipe it belongs to, for people; not in the key (recipes share stages)."""
    aids: Mapping[str, "Stage"] = field(default_factory=dict)
    """Stages that it reads, by role, only to be faster. They are complete before it starts, as its needs are, but
    decide nothing of its result, so they are not in the key."""
    together: "Together | None" = None
    """Runs several such stages in one worker, as a cohort; None: it always has a worker of its own."""
    mates: str = ""
    """Stages of equal, non-empty `mates` may be members of one cohort."""
    cohort: int = 1
    """Most members of its cohort where nobody plans the places (`execution/placement.py`)."""
    spread: Mapping[int, Spread] = field(default_factory=dict)
    """How it may run on several devices, by their number; empty: on one only."""
    flops: float = 0.0
    """Floating-point operations of the whole stage, to order stages that were never measured; 0: not known."""

    @cached_property
    def key(self) -> str:
        """Twelve hex digits that stand for the stage's result."""
        decides = {
            "name": self.name,
            "version": self.version,
            "config": self.config.model_dump(mode="json"),
            "needs": {role: stage.key for role, stage in sorted(self.needs.items())},
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def address(self) -> str:
        """The artifact's folder in the store."""
        return f"{self.name}-{self.key}"

    @property
    def reads(self) -> Mapping[str, "Stage"]:
        """Needs and aids: all that has to be complete before it starts, by role."""
        return {**self.needs, **self.aids}


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they read, each once (by address) and after what it reads."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.address not in ordered:
            for read in stage.reads.values():
                visit(read)
            ordered[stage.address] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())
