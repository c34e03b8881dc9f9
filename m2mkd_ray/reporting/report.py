"""What a report says, as data: the only door into this room.

The stage that writes a report gathers these values from manifests, histories and
evaluations; figures, tables, page and JSON are functions of them and of nothing
else. So the same report always gives the same page, and a page can be made again
from its `report.json`. Every accuracy is a fraction from 0 to 1, every time is in
seconds, and numbers are finite: a NaN is refused here rather than drawn as a gap.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import matplotlib.image
import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, model_validator

from m2mkd_ray.reporting.counters import CounterRow

Kind = Literal["teacher", "meta", "hybrid", "student", "baseline"]
"""What a network is: a hybrid is the meta model with one student module spliced in, a student was assembled from
distilled modules and fine-tuned, a baseline is a control for the student."""

Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Positive = Annotated[FiniteFloat, Field(ge=0)]


class ExpertUse(BaseModel, frozen=True, extra="forbid"):
    """How the tokens of a suite spread over the experts of one block."""

    load: tuple[Fraction, ...] = Field(min_length=1)
    """Each expert's share of all assignments of a token to an expert; the shares add up to 1, 1/E each is even."""
    entropy: Positive
    """Mean entropy of the router's probabilities, in nats: 0 is always sure, ln E is undecided."""

    @model_validator(mode="after")
    def _is_a_distribution(self) -> "ExpertUse":
        if not math.isclose(sum(self.load), 1.0, abs_tol=1e-3):
            raise ValueError(f"the loads of {len(self.load)} experts add up to {sum(self.load):.4f}, expected 1")
        most = math.log(len(self.load))
        if self.entropy > most + 1e-3:
            raise ValueError(f"entropy {self.entropy:.4f} is more than ln {len(self.load)} = {most:.4f}")
        return self


class SuiteResult(BaseModel, frozen=True, extra="forbid"):
    """What one network scores on one suite."""

    suite: str
    """Name of the suite, the same for every subject."""
    title: str
    """For people: "test set", "fog, severity 3"."""
    shifted: bool
    """Whether its images come from another distribution than those trained on."""
    num_images: int = Field(gt=0)
    top1: Fraction
    top5: Fraction | None = None
    """None: not measured, or fewer than six classes."""
    nll: Positive | None = None
    """Mean negative log-likelihood of the label, in nats."""
    ece: Fraction | None = None
    """Expected calibration error (Naeini et al., 2015)."""
    per_class: dict[str, Fraction] = {}
    """Accuracy of each class, by its name for people."""
    experts: dict[str, ExpertUse] = {}
    """By block, in the order of the blocks; empty for a network without experts."""


class Subject(BaseModel, frozen=True, extra="forbid"):
    """A network that was evaluated."""

    name: str
    """Unique in the report; the `Curve` of its training, if there is one, has the same name."""
    title: str
    """For people, short: "m2mKD", "pure", "teacher", "hybrid 0"."""
    kind: Kind
    recipe: str
    results: tuple[SuiteResult, ...] = ()
    num_parameters: int | None = None
    num_active_parameters: int | None = None
    """Parameters that one token meets; None: all of them."""
    epochs: Positive | None = None
    """Epochs of end-to-end training; None: read from its curve."""
    compute_matched: bool = False
    """A baseline that was given as much compute as all stages of the student together."""

    def result(self, suite: str) -> SuiteResult | None:
        """Its result on a suite; None: it was not evaluated there."""
        return next((result for result in self.results if result.suite == suite), None)

    def accuracy(self, *, shifted: bool) -> float | None:
        """Mean top-1 over its shifted, or its other, suites, each with the same weight; None: it has none."""
        scores = [result.top1 for result in self.results if result.shifted == shifted]
        return sum(scores) / len(scores) if scores else None


class Curve(BaseModel, frozen=True, extra="forbid"):
    """The history of one training, as the stages write it."""

    name: str
    title: str
    kind: Kind
    """Kind of the network that was trained; the pairs are hybrids."""
    recipe: str
    points: tuple[dict[str, FiniteFloat], ...] = ()
    """Rows in the order of steps: `step`, `epoch` (epochs done), `loss`, `lr`, `images_per_s`, and now and then
    `val_top1` (fraction; one at epoch 0 is the start), `ce`, `kd`, `teacher_share` (fraction of the gradient)."""

    def series(self, key: str, *, over: str = "epoch") -> tuple[list[float], list[float]]:
        """Where `key` was measured, and its values there."""
        rows = [row for row in self.points if key in row and over in row]
        return [row[over] for row in rows], [row[key] for row in rows]


class RoutingExample(BaseModel, frozen=True, extra="forbid"):
    """A real image and the expert that each of its patches prefers in one block."""

    image: str
    """A PNG file in base64; `encode_image` makes it."""
    label: str
    predicted: str
    block: str
    grid: tuple[tuple[int, ...], ...]
    """Index of the top-1 expert of each patch, row by row from the top left."""

    @model_validator(mode="after")
    def _grid_is_whole(self) -> "RoutingExample":
        widths = {len(row) for row in self.grid}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"the grid of {self.block} is not a rectangle: its rows have {sorted(widths)} patches")
        if min(expert for row in self.grid for expert in row) < 0:
            raise ValueError(f"the grid of {self.block} has negative indices of experts: {self.grid}")
        return self


class Span(BaseModel, frozen=True, extra="forbid"):
    """One attempt at a stage: who ran it, where and when."""

    stage: str
    """Name of the stage; what stands before its first hyphen is its kind ("pair-0" is a pair)."""
    recipe: str
    worker: str
    """The process or actor, as an operator would look for it."""
    node: str
    start: FiniteFloat
    """Unix time in seconds; so is `end`."""
    end: FiniteFloat
    outcome: str = "COMPLETE"
    """COMPLETE, or how the attempt ended: PREEMPTED, LOST, RAISED, STALLED."""
    node_group: str = ""
    """Group of its node; empty: it has none."""
    spot: bool = False
    """Whether its node may be taken away at any time."""
    gpus: Positive = 0.0
    """That its worker, and its ranks if it had any, were given; so for `cpus`."""
    cpus: Positive = 0.0
    lost_steps: int = Field(0, ge=0)
    """Optimizer steps that no checkpoint held when it ended."""
    reused: bool = False
    """Whether this run found the result in the store; its times are then those of the run that made it."""

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> "Span":
        if self.end < self.start:
            raise ValueError(f"{self.stage} ends {self.start - self.end:.3f} s before it starts")
        return self

    @property
    def is_complete(self) -> bool:
        """Whether the attempt left its artifact."""
        return self.outcome.upper() == "COMPLETE"

    @property
    def kind(self) -> str:
        """What stands before the stage's first hyphen."""
        return self.stage.split("-", 1)[0]


class StageRow(BaseModel, frozen=True, extra="forbid"):
    """What one stage cost."""

    stage: str
    recipe: str
    seconds: Positive
    images_per_s: Positive | None = None
    attempts: int = Field(1, ge=1)
    reused: bool = False
    parameters: int | None = None
    """Parameters that the stage trained; None: it trained none."""


class DataCard(BaseModel, frozen=True, extra="forbid"):
    """The images that everything was trained and evaluated on."""

    name: str
    title: str
    licence: str
    num_classes: int = Field(gt=0)
    source: str | None = None
    rows: dict[str, int] = {}
    """Images by split."""
    fingerprint: str | None = None
    """Hash of the contents, so that two reports can be told to be of the same images."""


class Report(BaseModel, frozen=True, extra="forbid"):
    """All that a page shows. Whatever is empty is left out of the page."""

    title: str
    created: str
    """When, in ISO 8601; part of the data, so that rendering reads no clock."""
    seed: int
    recipe_yaml: str
    data: DataCard
    subjects: tuple[Subject, ...] = ()
    """The first student is the one the report is about, the first baseline ("pure") the one it is compared with."""
    curves: tuple[Curve, ...] = ()
    routing: tuple[RoutingExample, ...] = ()
    spans: tuple[Span, ...] = ()
    stages: tuple[StageRow, ...] = ()
    counters: tuple[CounterRow, ...] = ()
    """One a training."""
    versions: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    """What a reader has to know to read the numbers rightly, one sentence each."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Report":
        for what, names in (
            ("subjects", [subject.name for subject in self.subjects]),
            ("curves", [curve.name for curve in self.curves]),
        ):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise ValueError(f"{what} must have names of their own, but more than one is called {twice}")
        return self

    def of_kind(self, *kinds: Kind) -> tuple[Subject, ...]:
        """The subjects of these kinds, in the order of the kinds and then of the report."""
        return tuple(subject for kind in kinds for subject in self.subjects if subject.kind == kind)

    @property
    def student(self) -> Subject | None:
        """The subject that the report is about."""
        return next(iter(self.of_kind("student")), None)

    @property
    def pure(self) -> Subject | None:
        """The baseline that the student is compared with first."""
        return next(iter(self.of_kind("baseline")), None)

    @property
    def suites(self) -> tuple[SuiteResult, ...]:
        """One result a suite, in domain first: for its name, title and size, whoever's result it is."""
        first: dict[str, SuiteResult] = {}
        for subject in self.subjects:
            for result in subject.results:
                first.setdefault(result.suite, result)
        return tuple(sorted(first.values(), key=lambda result: result.shifted))

    def curve(self, name: str) -> Curve | None:
        """The training of the subject of that name; None: it was not recorded."""
        return next((curve for curve in self.curves if curve.name == name), None)

    def epochs(self, subject: Subject) -> float | None:
        """Epochs of end-to-end training of a subject; None: not known."""
        if subject.epochs is not None:
            return subject.epochs
        curve = self.curve(subject.name)
        return max((row["epoch"] for row in curve.points if "epoch" in row), default=None) if curve else None


def encode_image(pixels: np.ndarray) -> str:
    """A `RoutingExample.image` from uint8 pixels of shape (H, W), (H, W, 1) or (H, W, 3)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise ValueError(
            f"Cannot encode an image of {pixels.dtype} and shape {pixels.shape}: "
            f"expected uint8 of shape (H, W), (H, W, 1) or (H, W, 3)."
        )
    colour = np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))  # (H, W, 3)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.ascontiguousarray(colour), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(image: str) -> np.ndarray:
    """The pixels of a `RoutingExample.image`, float in [0, 1], (H, W, 3 or 4) or (H, W)."""
    return np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(image)), format="png"))


def mean(values: Sequence[float]) -> float:
    """The mean of a non-empty sequence."""
    return sum(values) / len(values)
