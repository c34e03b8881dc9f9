"""`m2mkd submit|jobs|logs|stop`: runs on a cluster, through the job server of its head.

A submitted job is the same `m2mkd` command that one would type on the cluster; it is
read here by the same parser, so that what is wrong with it is said before anything is
sent, and its recipe gives the run its id.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.output import Column, print_json, print_table
from m2mkd_ray.commands.session import AsJson, chosen, planned
from m2mkd_ray.errors import RunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.job_submission import JobDetails

    from m2mkd_ray.submission import JobServer, Request

JobAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard (http://HOST:8265); default: RAY_API_SERVER_ADDRESS, or a Ray on this machine.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, as `m2mkd jobs` has it.")]
_STOP_S = 3
"""Seconds from SIGTERM to SIGKILL where a job says nothing (Ray 2.60, job_supervisor.py)."""


@dataclass(frozen=True)
class Command:
    """A job's command, as the parser reads it."""

    name: str
    """With that of its group (`data import`)."""
    values: "Mapping[str, Any]"
    """Values of its arguments and options by name."""


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job (demo, incubate, …), or a YAML file of your own.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="Change a setting of the job's recipe; may be repeated."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Store of the run, which all nodes reach: a folder or URI; default: the job's.")
    ] = None,
    address: JobAddress = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the log until the job ends; 1 if it fails.")] = (
        False
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, measure, print the `ray job submit` line; send nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job on a cluster; the same command again goes on with a run that has ended early."""
    from m2mkd_ray.submission import JobServer, plain_line

    request = request_of(job, settings or [], store)
    num_bytes = _upload(request)
    server = None if dry_run else JobServer(address)
    if server is not None:
        request = _next_attempt(request, server.jobs())
    line = plain_line(request, server.address if server else address, waits=watch)
    typer.echo(line, err=as_json)
    if server is not None:
        server.submit(request)
    if as_json:
        told = {"id": request.submission_id, "bytes": num_bytes, "line": line, "submitted": not dry_run}
        print_json(told | request.given())
    if server is not None:
        job_id = request.submission_id
        typer.echo(f"Submitted. Next: m2mkd logs {job_id} --follow · m2mkd stop {job_id} · m2mkd jobs", err=True)
        if watch:
            _follow(server, job_id)


def jobs(address: JobAddress = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster, the newest last."""
    from m2mkd_ray.submission import JobServer

    found = JobServer(address).jobs()
    if as_json:
        print_json([_as_json(job) for job in found])
        return
    columns = (Column("job"), Column("status"), Column("since"), Column("took", is_number=True), Column("store"))
    print_table([*columns, Column("message", wraps=True)], (_row(job) for job in found))


def logs(
    job_id: JobId,
    address: JobAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; 1 if it fails.")] = (False),
) -> None:
    """Print what a job has written: the log and the result of its run."""
    from m2mkd_ray.submission import JobServer

    server = JobServer(address)
    if follow:
        _follow(server, job_id)
    else:
        typer.echo(server.logs(job_id), nl=False)


def stop(job_id: JobId, address: JobAddress = None) -> None:
    """End a job; its store is left so that submitting the same again goes on."""
    from m2mkd_ray.submission import JobServer

    server = JobServer(address)
    before = server.job(job_id)
    if before.status.is_terminal():
        typer.echo(f"{job_id} has ended already: {before.status.value}")
        return
    ended = server.stop(job_id, timeout_s=_grace_s(before) + 30)
    typer.echo(f"{job_id} {ended.status.value}; submit the same again to go on")


# A request


def request_of(job: str, settings: "Sequence[str]", store: str | None) -> "Request":
    """A job as it is to be sent, with the id that its run has if the cluster has had none of that id.

    Args:
        job: name of a shipped job, or path of a file.
        settings: `a.b=value`, after those of the job.
        store: in place of the job's.

    Raises:
        UsageError: there is no such job, or its command, recipe or store is wrong.
    """
    from m2mkd_ray.submission import Request, find_job, read_job
    from m2mkd_ray.submission.jobfile import arguments, replaced

    file = find_job(job)
    read = read_job(file)
    entrypoint = replaced(read.entrypoint, list(settings), store)
    command = parsed(arguments(entrypoint), file)
    key = recipe_key(command, arguments(entrypoint), Path(read.runtime_env.get("working_dir", ".")))
    root = _shared_store(command, file)
    metadata = {**read.metadata, "job": file.stem, "recipe_key": key, "store": root, **_code()}
    if isinstance(recipe := command.values.get("recipe"), str):
        metadata |= {"recipe": recipe}
    given = read.model_dump(exclude={"entrypoint", "submission_id", "metadata"})
    run = read.submission_id or f"{file.stem}-{key}"
    return Request(entrypoint=entrypoint, submission_id=run, metadata=metadata, **given)


def parsed(words: "Sequence[str]", file: Path) -> Command:
    """A command line as `m2mkd` itself would read it.

    Raises:
        UsageError: there is no such command, or an argument or option is wrong.
    """
    from typer.core import TyperGroup
    from typer.exceptions import TyperException
    from typer.main import get_command

    from m2mkd_ray.cli import app

    command: Any = get_command(app)
    names, rest = [], list(words)
    try:
        read = command.make_context("m2mkd", list(rest))
        while isinstance(command, TyperGroup):
            name, command, rest = command.resolve_command(read, rest)
            names.append(str(name))
            read = command.make_context(name, list(rest), parent=read)
    except TyperException as error:
        raise UsageError(
            f"The command of the job file {file}, `m2mkd {' '.join(words)}`, is wrong: {error.format_message()}"
        ) from error
    return Command(" ".join(names), read.params)


def recipe_key(command: Command, words: "Sequence[str]", folder: Path) -> str:
    """Twelve hex digits that stand for what a job's command makes.

    They follow from the addresses of all stages that it runs, so two commands that make
    the same have one key, wherever and however fast. For other commands than `run` they
    follow from the words, but for the store.

    Raises:
        UsageError: there is no such recipe, setting or stage.
    """
    if command.name == "run":
        from m2mkd_ray.execution import closure

        name = str(command.values["recipe"])
        in_folder = str(folder / name) if Path(name).suffix in (".yaml", ".yml") else name
        stages = planned(chosen(in_folder, command.values.get("settings") or ()))
        made = [stage.address for stage in closure(stages, list(command.values.get("until") or ()) or None)]
    else:
        from m2mkd_ray.submission.jobfile import without

        made = without(list(words), "--store")
    return hashlib.sha256("\n".join(made).encode()).hexdigest()[:12]


def _shared_store(command: Command, file: Path) -> str:
    """The store of a job's command, which has to outlive the job and be the same on all nodes; "" if it has none."""
    if "store" not in command.values:
        return ""
    root = command.values["store"]
    if not isinstance(root, str) or not (root.startswith("/") or "://" in root):
        raise UsageError(
            f"The job {file.stem} has the store {root!r}, which would lie in the job's own copy of the code and go "
            f"with it. Give --store an absolute path that all nodes share, or a URI (s3://, gs://, abfs://)."
        )
    return root


def _code() -> dict[str, str]:
    from m2mkd_ray.execution.worker import versions

    found = versions()
    return {"version": found["m2mkd_ray"] or "unknown", "git_commit": found["git_commit"] or "unknown"}


def _upload(request: "Request") -> int:
    """Bytes that a job uploads, if the dashboard takes so many.

    Raises:
        UsageError: it does not.
    """
    from m2mkd_ray.submission import check_size, measure

    package = measure(request.runtime_env)
    if package is None:
        return 0
    check_size(package)
    if not (package.folder / "m2mkd_ray").is_dir():
        typer.echo(
            f"{package.folder} has no m2mkd_ray: the job runs the one that is installed on the cluster. Submit from a "
            f"checkout to ship its code.",
            err=True,
        )
    return package.size


def _next_attempt(request: "Request", known: "Sequence[JobDetails]") -> "Request":
    """A request whose id the cluster has not had.

    Raises:
        LockedError: its run runs.
    """
    from m2mkd_ray.submission import next_id, refuse_second

    refuse_second(known, request.metadata["recipe_key"], request.metadata["store"])
    taken = {job.submission_id for job in known if job.submission_id}
    return replace(request, submission_id=next_id(request.submission_id, taken))


# What is said


def _follow(server: "JobServer", job_id: str) -> None:
    typer.echo(f"Following {job_id}; Ctrl-C ends the reading, not the job.", err=True)
    ended = server.follow(job_id, lambda text: typer.echo(text, nl=False))
    typer.echo(f"{job_id} {ended.status.value}", err=True)
    if ended.status.value != "SUCCEEDED":
        raise RunError(f"The job {job_id} has {ended.status.value}: {_first_line(ended.message)}")


def _grace_s(job: "JobDetails") -> float:
    variables = (job.runtime_env or {}).get("env_vars") or {}
    return float(variables.get("RAY_JOB_STOP_WAIT_TIME_S", _STOP_S))


def _as_json(job: "JobDetails") -> dict[str, Any]:
    return {
        "id": job.submission_id,
        "status": job.status.value,
        "entrypoint": job.entrypoint,
        "started": _seconds(job.start_time),
        "ended": _seconds(job.end_time),
        "exit_code": job.driver_exit_code,
        "message": job.message,
        "metadata": job.metadata or {},
    }


def _row(job: "JobDetails") -> tuple[str, ...]:
    started, ended = _seconds(job.start_time), _seconds(job.end_time)
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else ""
    took = f"{((ended or time.time()) - started) / 60:.1f} min" if started else ""
    said = _first_line(job.message) if job.status.value in ("FAILED", "PENDING") else ""
    return (job.submission_id or "", job.status.value, since, took, (job.metadata or {}).get("store", ""), said)


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _first_line(message: str | None) -> str:
    return (message or "").partition("\n")[0]
