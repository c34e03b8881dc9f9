"""What a launcher tells of jobs: small, frozen, and able to cross processes."""

import traceback
from dataclasses import dataclass

from m2mkd_ray.errors import M2mkdError, PreemptedError
from m2mkd_ray.execution.cohort import Withdrawn
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.job import Where
from m2mkd_ray.execution.stage import Metrics


@dataclass(frozen=True)
class Started:
    """A worker took a job up."""

    address: str
    where: Where


@dataclass(frozen=True)
class Finished:
    """A job's artifact is complete."""

    address: str
    metrics: Metrics


@dataclass(frozen=True)
class Failed:
    """A job did not come to its end."""

    address: str
    kind: Kind
    message: str
    traceback: str = ""
    """Where it was raised, as Python prints it; empty if nothing was."""
    error: M2mkdError | None = None
    """The exception itself if it is one of ours; others need not pickle."""


@dataclass(frozen=True)
class Gone:
    """A job stopped because it was withdrawn; its checkpoints are kept."""

    address: str


End = Finished | Failed | Gone
"""How a job ended, for better or worse."""

Report = Started | Finished | Failed | Gone


def raised(address: str, error: BaseException) -> Failed | Gone:
    """An exception of a stage as a report that can cross processes."""
    if isinstance(error, Withdrawn):
        return Gone(address)
    ours = isinstance(error, M2mkdError)
    return Failed(
        address=address,
        kind=_kind(error),
        message=str(error) if ours else f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        error=error if isinstance(error, M2mkdError) else None,
    )


def _kind(error: BaseException) -> Kind:
    if isinstance(error, PreemptedError):
        return Kind.PREEMPTED
    return Kind.OUT_OF_MEMORY if is_out_of_memory(error) else Kind.RAISED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a process or a GPU had no memory left."""
    # By name: torch.OutOfMemoryError (CUDA) is not worth importing torch; its CPU allocator raises RuntimeError.
    by_name = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return by_name or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
