"""What all pages share: figures drawn and written for light and dark paper, sections, the templates."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from m2mkd_ray.reporting.plots.style import DARK, Numbers, Plot, png
from m2mkd_ray.reporting.tables import Table


@dataclass(frozen=True)
class Drawn:
    """A figure as the page holds it."""

    plot: Plot[Any]
    light: str
    """A PNG file in base64, as `dark` is."""
    dark: str
    alt: str
    file: str


def draw(plots: Mapping[str, Plot[Numbers]], report: Numbers, folder: Path) -> list[Drawn]:
    """Draw what applies, and write it below `folder` as `figures/*.png`; the folder is made if need be."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures = []
    for name, plot in plots.items():
        if plot.applies(report):
            light, alt = png(plot, report)
            (folder / "figures" / f"{name}.png").write_bytes(light)
            dark, _ = png(plot, report, DARK)
            figures.append(Drawn(plot, _base64(light), _base64(dark), alt, f"figures/{name}.png"))
    return figures


def sections(figures: Sequence[Drawn], tables: Sequence[Table]) -> dict[str, tuple[list[Drawn], list[Table]]]:
    """Figures, then tables, of each section; tables without rows are left out."""
    shown = [table for table in tables if table.rows]
    names = dict.fromkeys([f.plot.section for f in figures] + [table.section for table in shown])
    return {
        name: ([f for f in figures if f.plot.section == name], [t for t in shown if t.section == name])
        for name in names
    }


def html(template: str, **values: Any) -> str:
    """A page from a template of this package; a name that it asks for and is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
