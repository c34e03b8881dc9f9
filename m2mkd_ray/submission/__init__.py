"""Jobs on a cluster: their files, what of them is uploaded, and the job server of a cluster's head.

A *job* is what Ray calls so: a command that the head of a cluster starts on one of
its nodes, here always an `m2mkd` command, the driver of a run. That driver knows
nothing of all this; whatever is submitted can be run by hand just as well.
"""

from m2mkd_ray.submission.jobfile import JobFile, find_job, read_job, shipped_jobs
from m2mkd_ray.submission.package import LIMIT_BYTES, Package, check_size, measure
from m2mkd_ray.submission.request import Request, next_id, plain_line, refuse_second
from m2mkd_ray.submission.server import JobServer

__all__ = [
    "JobFile",
    "find_job",
    "read_job",
    "shipped_jobs",
    "LIMIT_BYTES",
    "Package",
    "check_size",
    "measure",
    "Request",
    "next_id",
    "plain_line",
    "refuse_second",
    "JobServer",
]
