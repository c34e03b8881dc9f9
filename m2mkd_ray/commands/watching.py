"""What `m2mkd status --address` and `m2mkd events` show: the cluster now, and what happened in the runs of a store."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2mkd_ray.commands.output import Column, print_json, print_table
from m2mkd_ray.commands.session import AsJson, RecipeName, Settings, StoreRoot, planned, session

if TYPE_CHECKING:
    from m2mkd_ray.execution import StageStatus
    from m2mkd_ray.execution.nodes import NodeNow

_NAMES = {"event", "time", "run", "stage", "recipe", "address", "traceback", "metrics", "where", "progress"}
"""Of an event, what has a column or is too long for one."""


def events(
    context: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    store: StoreRoot = "runs",
    last: Annotated[int | None, typer.Option("--last", min=1, help="Only so many, the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what happened to a recipe's stages, in all runs of the store, in order of time."""
    from m2mkd_ray.execution.event_log import read_events

    now = session(context)
    addresses = {stage.address for stage in planned(now.choose(recipe, settings))}
    found = read_events(now.open_store(store), addresses)
    found = found if last is None else found[-last:]
    if as_json:
        print_json(found)
        return
    columns = [Column("time"), Column("event"), Column("stage"), Column("what", wraps=True), Column("run")]
    rows = ((e["time"], e["event"].removeprefix("Stage"), e["stage"], _said(e), e["run"]) for e in found)
    print_table(columns, rows)


def _said(event: Mapping[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in event.items() if name not in _NAMES and value not in (None, "", [])]
    if progress := event.get("progress"):
        words.insert(0, f"step {progress['step']}/{progress['total_steps']}")
    if where := event.get("where"):
        words.insert(0, f"on {where['host']}:{where['pid']}" + (f" in {g}" if (g := where.get("node_group")) else ""))
    return ", ".join(words)


def cluster_now(address: str, statuses: "Sequence[StageStatus]") -> dict[str, Any]:
    """The nodes at an address with what runs on them, and the stages that wait, with reasons; JSON values.

    Raises:
        ClusterError: no Ray answers there.
    """
    from m2mkd_ray.execution.nodes import nodes_now
    from m2mkd_ray.execution.ray_launcher import RayLauncher

    launcher = RayLauncher(address)
    try:
        nodes = nodes_now()
    finally:
        launcher.close()
    return {
        "nodes": [{**asdict(node), "runs": _on(node, statuses)} for node in nodes],
        "queue": [{"stage": s.name, "address": s.address, "reason": reason} for s, reason in queue(statuses)],
    }


def _on(node: "NodeNow", statuses: "Sequence[StageStatus]") -> list[str]:
    return [s.name for s in statuses if s.state == "running" and s.where.get("node_id") == node.id]


def queue(statuses: "Sequence[StageStatus]") -> "list[tuple[StageStatus, str]]":
    """The stages that could run and do not, and why."""
    ready = [s for s in statuses if s.state in ("absent", "partial", "spoilt")]
    return [(s, _why(s)) for s in ready]


def _why(status: "StageStatus") -> str:
    if status.waits:
        return f"no node can hold it: it asks for {status.waits}"
    if status.owner is None:
        return "no driver runs its recipe now"
    return "it waits for a worker: for room on a node, or for a node to come"


def print_cluster(found: Mapping[str, Any]) -> None:
    """Print the nodes and the queue."""
    columns = [Column("node"), Column("group"), Column("spot"), Column("state"), Column("CPUs", is_number=True)]
    columns += [Column("GPUs", is_number=True), Column("runs", wraps=True)]
    print_table(columns, map(_node_cells, found["nodes"]))
    if found["queue"]:
        typer.echo("")
        print_table(
            [Column("waits"), Column("why", wraps=True)], ((one["stage"], one["reason"]) for one in found["queue"])
        )
    typer.echo("")


def _node_cells(node: Mapping[str, Any]) -> tuple[str, ...]:
    leaves = node["leaves_in_s"]
    state = "up" if leaves is None else f"leaves in {leaves:.0f} s" if leaves else "leaves"
    return (
        f"{node['host']} ({node['id'][:8]})",
        node["group"],
        "spot" if node["spot"] else "",
        state,
        _held(node, "CPU"),
        _held(node, "GPU"),
        ", ".join(node["runs"]),
    )


def _held(node: Mapping[str, Any], name: str) -> str:
    """`held/all`; all alone where it is not known how much is held."""
    total = node["resources"].get(name, 0.0)
    if not total or node["free"] is None:
        return f"{total:g}" if total else ""
    return f"{total - node['free'].get(name, 0.0):g}/{total:g}"
