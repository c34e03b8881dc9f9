"""Give a student its modules' weights, by rules, with nothing left over.

The reference assembles with `load_state_dict(strict=False)`, which is how a name that changed turns into a random
tensor that nobody notices. Here every tensor of every module is named by a rule, as carried over or as dropped on
purpose, every tensor of the student is filled once or declared fresh, and whatever is not so is reported in one
message before anything is loaded.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from m2mkd_ray.errors import FillError

Rules = Mapping[str, str | None]
"""Where the tensors of one module go: regular expression for the whole name → the student's name, in which
`\\1` … stand for groups; None: dropped on purpose. The first rule that matches counts."""


@dataclass(frozen=True)
class Filled:
    """What `fill` did, in numbers of tensors."""

    filled: int
    dropped: int
    """Tensors of modules that have no place in the student, such as stitches."""
    fresh: int
    """Tensors of the student that keep their random start."""


@dataclass
class _Draft:
    """What would be loaded, and from where."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dropped: int = 0
    unruled: list[str] = field(default_factory=list)


def fill(
    model: nn.Module, parts: Sequence[Mapping[str, Tensor]], rules: Sequence[Rules], fresh: Sequence[str] = ()
) -> Filled:
    """Load the tensors of all modules into the student, or, if anything does not fit, nothing.

    Args:
        model: the student.
        parts: the state dict of every module, first to last.
        rules: where the tensors of every module go.
        fresh: regular expressions for the student's tensors that no module trains.

    Raises:
        FillError: modules and rules differ in number, a tensor of a module has no rule, or one of the student is
            filled by none, by two, from another shape, or although it is fresh. The message lists all of it.
    """
    if len(parts) != len(rules):
        raise FillError(f"Cannot fill the student: there are {len(parts)} modules, but rules for {len(rules)}.")
    target = model.state_dict()
    draft = _draft(parts, rules)
    is_fresh = {name for name in target if any(re.fullmatch(pattern, name) for pattern in fresh)}
    misfits = [*draft.unruled, *_misfits(draft, target, is_fresh)]
    if misfits:
        raise FillError(
            "\n  ".join([f"Cannot fill the student, nothing was loaded. {len(misfits)} misfits:", *misfits])
        )
    model.load_state_dict({**target, **draft.tensors})
    return Filled(filled=len(draft.tensors), dropped=draft.dropped, fresh=len(is_fresh))


def _draft(parts: Sequence[Mapping[str, Tensor]], rules: Sequence[Rules]) -> _Draft:
    draft = _Draft()
    for index, (part, part_rules) in enumerate(zip(parts, rules, strict=True)):
        for name, tensor in part.items():
            source = f"module {index}'s {name}"
            pattern = next((pattern for pattern in part_rules if re.fullmatch(pattern, name)), None)
            if pattern is None:
                draft.unruled.append(f"{source} {tuple(tensor.shape)}: no rule says where it goes")
                continue
            replacement = part_rules[pattern]
            if replacement is None:
                draft.dropped += 1
                continue
            place = re.sub(pattern, replacement, name, count=1)
            draft.tensors[place] = tensor
            draft.sources[place].append(source)
    return draft


def _misfits(draft: _Draft, target: Mapping[str, Tensor], is_fresh: set[str]) -> Iterator[str]:
    for name in [*target, *(name for name in draft.tensors if name not in target)]:
        sources = " and ".join(draft.sources.get(name, ()))
        if name not in target:
            yield f"{sources}: the student has no {name}"
        elif name not in draft.tensors:
            if name not in is_fresh:
                yield f"{name} {tuple(target[name].shape)}: no module fills it"
        elif name in is_fresh:
            yield f"{name}: declared fresh, but filled by {sources}"
        elif len(draft.sources[name]) > 1:
            yield f"{name}: filled by {sources}"
        elif draft.tensors[name].shape != target[name].shape:
            found, expected = tuple(draft.tensors[name].shape), tuple(target[name].shape)
            yield f"{name}: found {found} in {sources}, expected {expected}"
