"""What a sweep varies: domains, written as in Ray Tune, and conditions on other parameters.

    pairs.distill.temperature: loguniform(1, 8)
    pairs.of.3.temperature: {domain: "loguniform(1, 8)", when: {pairs.distill.kind: soft}}

A domain is parsed, never run: a known name, and literals for arguments. A parameter
whose condition does not hold is drawn all the same and left out of the point. So a
searcher needs to know nothing of conditions, and points that differ only in what has
no effect are one point, trained once.
"""

import ast
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, field_validator, model_serializer, model_validator

Kind = Literal["choice", "grid", "lograndint", "loguniform", "qloguniform", "quniform", "randint", "uniform"]

FORMS: dict[Kind, str] = {
    "choice": "choice([a, b, …])",
    "grid": "grid([a, b, …])",
    "lograndint": "lograndint(low, high)",
    "loguniform": "loguniform(low, high)",
    "qloguniform": "qloguniform(low, high, step)",
    "quniform": "quniform(low, high, step)",
    "randint": "randint(low, high)",
    "uniform": "uniform(low, high)",
}
"""How every domain is written; meanings are Ray Tune's (`randint` leaves `high` out, the quantized ones do not)."""


@dataclass(frozen=True)
class Domain:
    """The values that a parameter may have."""

    kind: Kind
    arguments: tuple[Any, ...]

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All of them, where they were listed; None for a range."""
        return tuple(self.arguments[0]) if self.kind in ("choice", "grid") else None

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values whose fit speaks for all: the lowest and highest of a range, every one of a list."""
        if self.values is not None:
            return self.values
        low, high = self.arguments[:2]
        return (low, high - 1) if self.kind in ("randint", "lograndint") else (low, high)

    def may_be(self, value: Any) -> bool:
        """Whether it may be drawn. That a continuous range gives just this number is taken to be impossible."""
        if self.values is not None:
            return value in self.values
        low, high = self.ends
        return self.kind not in ("uniform", "loguniform") and isinstance(value, int | float) and low <= value <= high

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers in an order."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.ends)

    @property
    def is_log(self) -> bool:
        """Whether equal factors are equally likely: such an axis is drawn logarithmically."""
        if self.values is None:
            return "log" in self.kind
        return len(self.values) > 2 and self.is_numeric and min(self.values) > 0 and _grows_by_factors(self.values)

    def to_tune(self) -> Any:
        """As Ray Tune has it, for `param_space`."""
        from ray import tune

        name = "grid_search" if self.kind == "grid" else self.kind
        arguments = [list(self.arguments[0])] if self.values is not None else self.arguments
        return getattr(tune, name)(*arguments)


class Parameter(BaseModel, frozen=True, extra="forbid"):
    """A setting of the recipe that a sweep varies; a string alone is its domain."""

    domain: str
    """See `FORMS`."""
    when: Mapping[str, Any] = {}
    """Values that other parameters must have, by path, for this one to have an effect; a list holds any of several."""

    @model_validator(mode="before")
    @classmethod
    def _from_domain(cls, value: Any) -> Any:
        return {"domain": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _to_domain(self, dump: Any) -> Any:
        return dump(self) if self.when else self.domain

    @field_validator("domain")
    @classmethod
    def _can_be_parsed(cls, text: str) -> str:
        parse(text)
        return text

    @property
    def parsed(self) -> Domain:
        """The domain."""
        return parse(self.domain)

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Whether the other parameters' values let this one have an effect; one left out has no value."""
        return all(path in values and values[path] in any_of(wanted) for path, wanted in self.when.items())


def parse(text: str) -> Domain:
    """A domain from its text: `loguniform(1, 8)`, `choice([numel, batchmean])`. Bare words are strings.

    Raises:
        ValueError: it is not of one of the `FORMS`, or holds no value.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no domain: {error.msg}. {_known()}") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise ValueError(f"{text!r} is no domain. {_known()}")
    name = call.func.id
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no domain {name!r}{hint}. {_known()}")
    kind: Kind = name
    try:
        arguments = tuple(ast.literal_eval(_Words().visit(argument)) for argument in call.args)
    except ValueError as error:
        raise ValueError(
            f"{text!r} has an argument that is no number, word or list of these (quote words with -)"
        ) from error
    if problem := _wrong(kind, arguments):
        raise ValueError(f"{text!r}: {problem}")
    return Domain(kind, (tuple(arguments[0]),) if kind in ("choice", "grid") else arguments)


def active(space: Mapping[str, Parameter], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What of drawn values has an effect, in the order of the space: a *point*.

    A condition on a parameter that is itself without effect does not hold. Plain values, so that a point is JSON.
    """
    point: dict[str, Any] = {}
    left = dict(space)
    while ready := [path for path, of in left.items() if not any(other in left for other in of.when)]:
        for path in ready:
            if left.pop(path).is_active(point):
                point[path] = _plain(drawn[path])
    return {path: point[path] for path in space if path in point}


def circles(space: Mapping[str, Parameter]) -> list[str]:
    """Parameters whose conditions wait for each other, or for what is not in the space."""
    left = dict(space)
    while ready := [path for path, of in left.items() if not any(other in left for other in of.when)]:
        for path in ready:
            del left[path]
    return list(left)


class _Words(ast.NodeTransformer):
    """Bare words as strings."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        named = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(named.get(node.id, node.id)), node)


def _wrong(kind: Kind, arguments: Sequence[Any]) -> str:
    """What is wrong with a domain's arguments; empty if nothing is."""
    form = FORMS[kind]
    if len(arguments) != (1 if kind in ("choice", "grid") else form.count(",") + 1):
        return f"expected {form}, found {len(arguments)} arguments"
    if kind in ("choice", "grid"):
        if not isinstance(arguments[0], list | tuple):
            return f"expected {form}, a list"
        values = [repr(value) for value in arguments[0]]
        if not values:
            return "it holds no value"
        twice = sorted({value for value in values if values.count(value) > 1})
        return f"it holds {', '.join(twice)} more than once" if twice else ""
    numbers = int if kind in ("randint", "lograndint") else (int, float)
    if not all(isinstance(a, numbers) and not isinstance(a, bool) and math.isfinite(a) for a in arguments):
        return f"expected {form} with {'whole ' if numbers is int else ''}numbers"
    low, high, *step = arguments
    if low >= high:
        return f"it holds no value: low {low} is not below high {high}"
    if "log" in kind and low <= 0:
        return f"low {low} must be above 0 for a logarithm"
    if step and step[0] <= 0:
        return f"step {step[0]} must be above 0"
    if step and any(not math.isclose(end / step[0], round(end / step[0])) for end in (low, high)):
        return f"low and high must be multiples of step {step[0]}"
    return ""


def _known() -> str:
    return f"Known: {', '.join(FORMS.values())}."


def any_of(wanted: Any) -> Sequence[Any]:
    """Values of which a condition asks for one."""
    return wanted if isinstance(wanted, list | tuple) else [wanted]


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    return value.item() if hasattr(value, "item") else value


def _grows_by_factors(values: Sequence[float]) -> bool:
    ordered = sorted(values)
    return ordered[-1] / ordered[0] >= 4 and ordered[-1] - ordered[-2] > 1.5 * (ordered[1] - ordered[0])
