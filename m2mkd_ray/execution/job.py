"""A job: a stage as its worker sees it.

It is a stage without its graph: what it reads is a list of addresses, so a worker
imports the files of its own stage and no others.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from m2mkd_ray.execution.cohort import Together
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics, Resources, Stage

Where = Mapping[str, Any]
"""The place of a worker: host, pid, and with Ray node_id, actor_id, node_group and spot; `cohort` are the addresses
of all members of the stage's cohort, if it ran in one."""


@dataclass(frozen=True)
class Job:
    """A stage as its worker sees it."""

    name: str
    key: str
    address: str
    of: str
    version: int
    run: Callable[[Any, StageContext], Metrics]
    config: BaseModel
    needs: Mapping[str, str]
    """Addresses of all that it reads, by role."""
    resources: Resources
    placement: BaseModel
    together: Together | None = None
    """Runs several such jobs as a cohort."""


def job(stage: Stage) -> Job:
    """The job of a stage."""
    return Job(
        name=stage.name,
        key=stage.key,
        address=stage.address,
        of=stage.of,
        version=stage.version,
        run=stage.run,
        config=stage.config,
        needs={role: need.address for role, need in stage.reads.items()},
        resources=stage.resources,
        placement=stage.placement,
        together=stage.together,
    )


def here() -> dict[str, Any]:
    """The place of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "node_id": None, "actor_id": None}
