"""How results look: JSON, tables, and the words for what stages report."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import typer

_WIDE = 10_000
"""Columns of a stdout that is no terminal: nothing is wrapped or cut."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    is_number: bool = False
    wraps: bool = False
    """Whether it gives way on a narrow terminal; others are whole."""


def print_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to stdout: whole where it is piped, fitted where it is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(column.name, justify=justify, overflow="fold", no_wrap=not column.wraps)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=_WIDE)
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def bar(done: int | None, total: int | None, width: int = 10) -> str:
    """`━━━━······ 40/100`; empty if nothing is known."""
    if done is None or not total:
        return ""
    full = min(width, width * done // total)
    return f"{'━' * full}{'·' * (width - full)} {done}/{total}"


def said(metrics: Mapping[str, Any]) -> str:
    """The key metrics of a stage in a few words: loss, accuracy, speed, and waiting for data from a percent on."""
    words = []
    if isinstance(metrics.get("loss"), float):
        words.append(f"loss {metrics['loss']:.3f}")
    accuracies = {"top-1": metrics.get("val_top1")} | {
        name.removesuffix("/top1").rpartition("/")[2]: value for name, value in metrics.items() if _is_top1(name)
    }
    words += [f"{name} {100 * value:.1f} %" for name, value in accuracies.items() if isinstance(value, float)][:3]
    if isinstance(metrics.get("images_per_s"), float):
        words.append(f"{metrics['images_per_s']:,.0f} images/s")
    if isinstance(metrics.get("data_wait"), float) and metrics["data_wait"] >= 0.005:
        words.append(f"data wait {100 * metrics['data_wait']:.0f} %")
    return ", ".join(words)


def place(where: Mapping[str, Any]) -> str:
    """Host and process of a worker."""
    return f"{where['host']}:{where['pid']}" if "host" in where and "pid" in where else ""


def mates(where: Mapping[str, Any], address: str) -> list[str]:
    """Addresses of the other stages that its worker runs, as a cohort; none where it is alone."""
    return [other for other in where.get("cohort") or () if other != address]


def resources(cpus: float, gpus: float, memory_gb: float | None, node_group: str = "") -> str:
    """What a worker is given, in words."""
    words = [f"{cpus:g} CPU"] + ([f"{gpus:g} GPU"] if gpus else []) + ([f"{memory_gb:g} GB"] if memory_gb else [])
    return ", ".join(words) + (f" on {node_group}" if node_group else "")


def _is_top1(name: str) -> bool:
    return name.endswith("/top1")
