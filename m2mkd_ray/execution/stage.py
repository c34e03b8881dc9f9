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
    from m2mkd_ray.execution.context import StageContext

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


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once (by address) and after its needs."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.address not in ordered:
            for need in stage.needs.values():
                visit(need)
            ordered[stage.address] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())
