"""The report of a run: one page that opens without a network, its figures, its numbers.

Build a `Report` and give it to `render`. Nothing here knows torch, Ray or the store.
"""

from m2mkd_ray.reporting.page import render
from m2mkd_ray.reporting.plots import FIGURES
from m2mkd_ray.reporting.report import (
    Curve,
    DataCard,
    ExpertUse,
    Report,
    RoutingExample,
    Span,
    StageRow,
    Subject,
    SuiteResult,
    encode_image,
)
from m2mkd_ray.reporting.tables import TABLES, summary, text_table

__all__ = [
    "FIGURES",
    "TABLES",
    "Curve",
    "DataCard",
    "ExpertUse",
    "Report",
    "RoutingExample",
    "Span",
    "StageRow",
    "Subject",
    "SuiteResult",
    "encode_image",
    "render",
    "summary",
    "text_table",
]
