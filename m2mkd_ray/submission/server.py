"""The job server of a cluster's head, through Ray's own client: HTTP, with Ray's own token.

The client finds the token where Ray keeps it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH,
~/.ray/auth_token); this file only says in a sentence what went wrong.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from m2mkd_ray.errors import ClusterError, UsageError
from m2mkd_ray.submission.request import Request

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's client prefers to every address that it is given, in this order."""
_TOKEN = (
    "Give the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file with it, or "
    "~/.ray/auth_token. `ray get-auth-token` on the head prints it"
)


class JobServer:
    """What a cluster's head knows of jobs.

    Args:
        address: of the dashboard (`http://HOST:8265`, or https); `auto` or None: what Ray's environment variables say,
            or a Ray on this machine.

    Raises:
        UsageError: the address is of another kind, or an environment variable says another one.
        ClusterError: nobody answers there, or not to this token.
    """

    def __init__(self, address: str | None = None) -> None:
        self._client = _client(address)

    @property
    def address(self) -> str:
        """Of the dashboard, as a URL."""
        return self._client.get_address()

    def jobs(self) -> "list[JobDetails]":
        """All jobs that were submitted, also those that ended; the newest last.

        Raises:
            ClusterError: the server does not answer.
        """
        with _told("Asking for jobs"):
            found = self._client.list_jobs()
        return sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)

    def job(self, job_id: str) -> "JobDetails":
        """One job.

        Raises:
            UsageError: there is none of that id; lists the known ones.
            ClusterError: the server does not answer.
        """
        known = {job.submission_id: job for job in self.jobs()}
        if job_id not in known:
            raise UsageError(f"The cluster has no job {job_id!r}. It has: {', '.join(map(str, known)) or 'none'}.")
        return known[job_id]

    def submit(self, request: Request) -> None:
        """Upload what the job ships, unless the cluster has it, and have it started.

        Raises:
            ClusterError: the server does not take it.
        """
        with _told(f"Submitting the job {request.submission_id}"):
            self._client.submit_job(**request.given())

    def stop(self, job_id: str, *, timeout_s: float) -> "JobDetails":
        """End a job (SIGTERM, and SIGKILL after the job's RAY_JOB_STOP_WAIT_TIME_S); returns it when it has ended.

        Raises:
            UsageError: there is none of that id.
            ClusterError: the server does not answer, or the job has not ended in time.
        """
        self.job(job_id)
        with _told(f"Stopping the job {job_id}"):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Stopping the job {job_id}: it is still {job.status.value} after {timeout_s:.0f} s. One that is "
                    f"PENDING ends when a node has taken it up, or after RAY_JOB_START_TIMEOUT_SECONDS (900 on the "
                    f"head); else look at `m2mkd logs {job_id}` and, on the head, at `ray list actors`."
                )
            time.sleep(0.5)
        return job

    def logs(self, job_id: str) -> str:
        """What a job has written so far, stdout and stderr of its driver.

        Raises:
            UsageError: there is none of that id.
            ClusterError: the server does not answer.
        """
        self.job(job_id)
        with _told(f"Reading the log of the job {job_id}"):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> "JobDetails":
        """Pass a job's log on from its beginning until it ends; returns how it ended.

        Raises:
            UsageError: there is none of that id.
            ClusterError: the connection broke; the job goes on.
        """
        self.job(job_id)

        async def pass_on() -> None:
            async for text in self._client.tail_job_logs(job_id):
                write(text)

        with _told(f"Following the job {job_id} (which goes on without a reader)"):
            asyncio.run(pass_on())
        return self._ended(job_id)

    def _ended(self, job_id: str, *, timeout_s: float = 30.0) -> "JobDetails":
        """A job whose log has come to its end; its status follows a little later."""
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Following the job {job_id}: its log ended, but it is {job.status.value}. "
                    f"Follow it again: m2mkd logs {job_id} --follow"
                )
            time.sleep(0.2)
        return job


def _client(address: str | None) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    given = None if address == "auto" else address
    if given is not None and "://" not in given:
        raise UsageError(
            f"{address!r} is not the address of a job server, which is its dashboard's URL: http://HOST:8265."
        )
    for name in _ENVIRONMENT:
        said = os.environ.get(name)
        if given is not None and said and said != given:
            raise UsageError(
                f"The address is {given!r}, but {name}={said}, which Ray prefers to any other. Unset it, or leave "
                f"--address out."
            )
    where = given or next((said for name in _ENVIRONMENT if (said := os.environ.get(name))), None)
    with _told(f"Connecting to the job server {where or 'of a Ray on this machine'}"):
        return JobSubmissionClient(given)


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """Ray's client raises everything from ValueError to requests' own errors; make one sentence of each."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        found = str(error).partition("\n")[0].partition(": ")[2] or str(error)
        raise ClusterError(f"{doing}: the cluster refuses us: {found}. {_TOKEN}.") from error
    except aiohttp.WSServerHandshakeError as error:
        advice = f" {_TOKEN}." if error.status in (401, 403) else ""
        raise ClusterError(f"{doing}: the cluster answers {error.status} {error.message}.{advice}") from error
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise ClusterError(
            f"{doing}: nobody answers ({error}). Look at the address (--address http://HOST:8265), at `ray status` on "
            f"the head, and whether a tunnel or port-forward is still open."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"{doing}: {error}") from error
