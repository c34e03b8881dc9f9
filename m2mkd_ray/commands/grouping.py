"""Which group of nodes each kind of work asks for, on a cluster that has groups (label `m2mkd.node-group`).

An autoscaler starts the type of node that a request uses best, so a pair may get one of
the few large nodes that the fine-tuning waits for. So what asks for GPUs asks for a group
too: the fine-tuning's ranks for `finetune`, everything else for `incubate`. That is a hard
wish, because Ray would give a soft one up as soon as any other node is free, and it is
wished only where the group can hold the request: otherwise any node will do, and the log
says why. Where no node has the label (a laptop, a plain cluster) nothing is asked for. A
group that somebody set in the recipe (`any` for none) is kept, and checked as any request is.

Groups are chosen in the recipe's placement, which is in no key, before the stages are planned:
so planner, checks, workers, ranks and hints to the autoscaler cannot disagree.

Turned down: Ray's `fallback_strategy` (it goes to a live node of another group before it waits
for one of the first), and groups for stages without GPUs (Ray keeps those off GPU nodes by
itself, and a core that is free anywhere is better than a wait).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m2mkd_ray.execution.feasibility import GROUP_LABEL, in_ray, is_in_group, said

if TYPE_CHECKING:
    from m2mkd_ray.execution.feasibility import Node
    from m2mkd_ray.execution.node_groups import Autoscaler
    from m2mkd_ray.execution.stage import Resources
    from m2mkd_ray.recipe import Placement, Recipe

logger = logging.getLogger(__name__)

PREFERRED = {"models": "incubate", "pairs": "incubate", "evaluation": "incubate", "finetune": "finetune"}
"""The group of each kind of work, by its field of `recipe.Placement`."""


@dataclass(frozen=True)
class _Request:
    """What a kind of work asks for."""

    kind: str
    setting: str
    """Path of its group in the recipe."""
    each: "Resources"
    """Of each of its processes."""
    num: int
    """Processes at once."""


def in_groups(recipe: "Recipe", nodes: "Sequence[Node]", autoscaler: "Autoscaler | None" = None) -> "Recipe":
    """The recipe with a node group for all that asks for GPUs, where the cluster has the group and it can hold that.

    Args:
        recipe: whose placement is looked at.
        nodes: all that are there.
        autoscaler: what may start more. Where its groups are not known (KubeRay), the preferred ones are taken to be
            among them if any node has the label: a wish that nobody can meet waits with a reason, and ends with
            `--wait-timeout`. One that reads no labels is asked for no group.

    Returns:
        The recipe itself, if nothing changes.
    """
    grows = autoscaler if autoscaler is not None and autoscaler.may_grow else None
    known = [*nodes, *(grows.most_nodes if grows is not None else ())]
    if not any(GROUP_LABEL in node.labels for node in known):
        return recipe
    placement = recipe.placement
    for request in _requests(placement):
        if grows is not None and not grows.reads_labels:
            _warn_of_version_1(request)
        elif request.each.gpus and not request.each.node_group:
            group = _group_for(request, known, is_guess=grows is not None and not grows.groups)
            placement = placement if group is None else _with_group(placement, request.kind, group)
    return recipe if placement is recipe.placement else recipe.model_copy(update={"placement": placement})


def _requests(placement: "Placement") -> "Iterator[_Request]":
    for kind in ("models", "pairs", "evaluation"):
        of_kind = getattr(placement, kind)
        num = of_kind.ranks if kind == "pairs" else 1
        yield _Request(kind, f"placement.{kind}.resources.node_group", of_kind.resources, num)
    if (ranks := placement.finetune.group) is not None:
        yield _Request("finetune", "placement.finetune.node_group", ranks.each, ranks.num_ranks)


def _group_for(request: _Request, nodes: "Sequence[Node]", *, is_guess: bool) -> str | None:
    """The preferred group, or None and a line in the log if it cannot hold the request."""
    from m2mkd_ray.preflight import room

    group = PREFERRED[request.kind]
    wanted = request.each.model_copy(update={"node_group": group})
    of_group = [node for node in nodes if is_in_group(node, wanted)]
    if sum(room(node, in_ray(wanted)) for node in of_group) >= request.num:
        logger.info("placement.%s asks for nodes of group %s", request.kind, group)
        return group
    if not of_group and is_guess:
        logger.warning(
            "placement.%s asks for nodes of group %s. Which groups the cluster's autoscaler has is not known here: "
            "if there is no such one, set %s=any",
            request.kind, group, request.setting,
        )  # fmt: skip
        return group
    processes = f"{request.num} processes of " if request.num > 1 else ""
    logger.warning(
        "placement.%s may be on any node: it asks for %s%s, and group %s %s. Set %s to choose another group",
        request.kind, processes, said(in_ray(request.each)), group,
        "cannot hold that" if of_group else "is not there", request.setting,
    )  # fmt: skip
    return None


def _with_group(placement: "Placement", kind: str, group: str) -> "Placement":
    of_kind = getattr(placement, kind)
    if kind == "finetune":
        changed = of_kind.model_copy(update={"node_group": group})
    else:
        resources = of_kind.resources.model_copy(update={"node_group": group})
        changed = of_kind.model_copy(update={"resources": resources})
    return placement.model_copy(update={kind: changed})


def _warn_of_version_1(request: _Request) -> None:
    if request.each.group:
        logger.warning(
            "%s=%s: the cluster's autoscaler is version 1, which may start nodes of other groups for it. Start the "
            "head with RAY_enable_autoscaler_v2=1",
            request.setting, request.each.group,
        )  # fmt: skip
