"""A job as it is sent: its id, which is its run's, and the same thing as a line of `ray job submit`."""

import json
import shlex
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from m2mkd_ray.errors import LockedError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails


@dataclass(frozen=True)
class Request:
    """The arguments of `JobSubmissionClient.submit_job`, by their names; None: not given."""

    entrypoint: str
    submission_id: str
    runtime_env: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_memory: int | None = None
    entrypoint_resources: dict[str, float] | None = None
    entrypoint_label_selector: dict[str, str] | None = None

    def given(self) -> dict[str, Any]:
        """The arguments that are given."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def plain_line(request: Request, address: str | None, *, waits: bool) -> str:
    """The command of Ray's own that submits the same job, and perhaps waits for its end."""
    options: dict[str, Any] = {"address": address, "submission-id": request.submission_id}
    options |= {"runtime-env-json": request.runtime_env, "metadata-json": request.metadata}
    options |= {
        name.replace("_", "-"): value for name, value in request.given().items() if name.startswith("entrypoint_")
    }
    words = [word for name, value in options.items() if value for word in (f"--{name}", _as_word(value))]
    submit = ["ray", "job", "submit", *([] if waits else ["--no-wait"])]
    return shlex.join([*submit, *words, "--", *shlex.split(request.entrypoint)])


def _as_word(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else f"{value:g}" if isinstance(value, float) else str(value)


def next_id(run: str, taken: Collection[str]) -> str:
    """The run's id; with the number of the attempt where the cluster has had a job of that id, as Ray keeps ids."""
    if run not in taken:
        return run
    return next(name for number in count(2) if (name := f"{run}-{number}") not in taken)


def refuse_second(jobs: Iterable["JobDetails"], run_key: str, store: str) -> None:
    """Let nobody start a run that runs.

    Raises:
        LockedError: a job of the same run and store waits or runs.
    """
    for job in jobs:
        metadata = job.metadata or {}
        is_same = metadata.get("recipe_key") == run_key and metadata.get("store") == store
        if is_same and not job.status.is_terminal():
            name = job.submission_id
            raise LockedError(
                f"Submitting a job: {name} of the same run is {job.status.value} with the store `{store}`. Follow it "
                f"(m2mkd logs {name} --follow), or end it (m2mkd stop {name}) and submit again; the run then goes on "
                f"from its store."
            )
