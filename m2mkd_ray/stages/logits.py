"""Stages `logits-i`: write down the logits of a pair's teacher hybrid, for pairs to read.

With `views` the batches of a training come again, and so do the teacher's answers:
they are the same for every epoch, try and trial of a sweep. A pair's own training
then runs no teacher, which is about a third of its step (docs/method.md); reading a
row costs a few kilobytes. Steps are written in parts, so that a stage that was killed
goes on after the last whole part.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel, Field

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import FeedConfig
from m2mkd_ray.data.logits import LogitsKind
from m2mkd_ray.execution.cohort import Left, Member
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.stages.pair import Frozen, IncubatePlacement
from m2mkd_ray.stages.parts import LOGITS
from m2mkd_ray.training import Precision, TeacherHybrid
from m2mkd_ray.training.engine import autocast, local_device, micro_batches
