"""A job's file: the arguments of `JobSubmissionClient.submit_job` by their names, as YAML.

They are Ray's own names, so whoever knows Ray's jobs knows these files, and nothing is
translated. The shipped ones are in the repository's folder `jobs/`, beside `cluster/`,
because people read, copy and change them, and because what a job ships is the checkout.
A wheel carries them too (`data_files`), for people without one.
"""

import importlib.metadata
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from m2mkd_ray.errors import UsageError
from m2mkd_ray.yaml_files import read_mapping

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package that runs."""
_WAYS_TO_CALL = (("python", "-m", "m2mkd_ray"), ("python3", "-m", "m2mkd_ray"), ("m2mkd",))
_ENVIRONMENT = "runtime_env.yaml"
"""What all shipped jobs share; no job itself."""
_EXPECTED = "settings by name"


class JobFile(BaseModel, frozen=True, extra="forbid"):
    """What a file says of a job; every field is an argument of `submit_job` (Ray 2.60)."""

    entrypoint: str
    """The command: `python -m m2mkd_ray …`, or `m2mkd …`."""
    submission_id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Id of the run; None: made from the job's name and the recipe's key."""
    runtime_env: dict[str, Any] = {}
    """Ray's runtime environment; a string is the path of a YAML file with it, from the job's file."""
    metadata: dict[str, str] = {}
    """Said of the job where jobs are listed."""
    entrypoint_num_cpus: float | None = Field(None, ge=0)
    """Cores that the driver holds while it runs."""
    entrypoint_num_gpus: float | None = Field(None, ge=0)
    """GPUs that it holds. A driver computes nothing; this is for others' commands."""
    entrypoint_memory: int | None = Field(None, ge=0)
    """Bytes that it holds."""
    entrypoint_resources: dict[str, float] | None = None
    """Other resources that it holds, by name."""
    entrypoint_label_selector: dict[str, str] | None = None
    """Labels of nodes on which it may run."""

    @field_validator("entrypoint")
    @classmethod
    def _is_ours(cls, entrypoint: str) -> str:
        arguments(entrypoint)
        return entrypoint

    @model_validator(mode="after")
    def _as_ray_takes_it(self) -> "JobFile":
        if problems := [*environment_problems(self.runtime_env), *_label_problems(self.entrypoint_label_selector)]:
            raise ValueError("; ".join(problems))
        return self


def arguments(entrypoint: str) -> list[str]:
    """The words after `m2mkd` of a job's command.

    Raises:
        ValueError: it is another command, or quotes do not match.
    """
    words = shlex.split(entrypoint)
    for call in _WAYS_TO_CALL:
        if tuple(words[: len(call)]) == call:
            return words[len(call) :]
    raise ValueError(f"is {entrypoint!r}, expected a command of m2mkd: `python -m m2mkd_ray run RECIPE …`")


def replaced(entrypoint: str, settings: list[str], store: str | None) -> str:
    """The command with more settings (`--set`), which come last, and perhaps another store."""
    words = shlex.split(entrypoint)
    if store is not None:
        words = [*without(words, "--store"), "--store", store]
    return shlex.join([*words, *(word for setting in settings for word in ("--set", setting))])


def without(words: list[str], option: str) -> list[str]:
    """A command's words without `option VALUE` and `option=VALUE`."""
    kept, is_value = [], False
    for word in words:
        if not is_value and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        is_value = not is_value and word == option
    return kept


def shipped_jobs() -> dict[str, Path]:
    """Files of the shipped jobs by name: those beside the package, or those that its wheel brought."""
    beside = PACKAGE.parent / "jobs"
    files = sorted(beside.glob("*.yaml")) if beside.is_dir() else _installed()
    return {file.stem: file for file in files if file.name != _ENVIRONMENT}


def _installed() -> list[Path]:
    try:
        files = importlib.metadata.files("m2mkd_ray") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    shipped = (file for file in files if file.suffix == ".yaml" and file.parts[-3:-1] == ("m2mkd_ray", "jobs"))
    return sorted(Path(str(file.locate())) for file in shipped)


def find_job(name: str) -> Path:
    """The file of a shipped job by name, or of a user's own by its path.

    Raises:
        UsageError: there is no such job; lists the known ones.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    known = shipped_jobs()
    if name not in known:
        raise UsageError(
            f"There is no job {name!r}. Known jobs: {', '.join(known) or 'none'}; a file of your own ends in .yaml."
        )
    return known[name]


def read_job(file: Path) -> JobFile:
    """A job as its file says it.

    Raises:
        UsageError: it cannot be read, or is not as Ray takes it; lists all problems.
    """
    content = read_mapping(file, "job file", _EXPECTED)
    environment = content.get("runtime_env")
    if isinstance(environment, str):
        what = f"runtime environment of the job file {file},"
        content["runtime_env"] = read_mapping(file.parent / environment, what, _EXPECTED)
    try:
        return JobFile.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(
            f"  - {'.'.join([*map(str, problem['loc']), '']) if problem['loc'] else ''} "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise UsageError(
            f"The job file {file} is not as Ray takes it:\n{problems}\nKnown: {', '.join(JobFile.model_fields)}."
        ) from error


def environment_problems(environment: Mapping[str, Any]) -> list[str]:
    """What Ray would not take of a runtime environment."""
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(environment.keys() - RuntimeEnv.known_fields)
    if unknown:  # RuntimeEnv only warns of them
        return [f"runtime_env has {', '.join(unknown)}, but Ray knows {', '.join(sorted(RuntimeEnv.known_fields))}"]
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError, OSError) as error:
        return [f"runtime_env: {error}"]
    return []


def _label_problems(selector: Mapping[str, str] | None) -> list[str]:
    from ray._private.label_utils import validate_label_selector  # the server says the same, but only then

    problem = validate_label_selector(dict(selector)) if selector else None
    return [f"entrypoint_label_selector: {problem}"] if problem else []
