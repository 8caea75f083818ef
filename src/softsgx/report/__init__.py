"""Runs as text, JSON, traces and pages: what happened, and what it would have cost on silicon."""

from typing import TYPE_CHECKING

from softsgx.costs import COST_PROFILES, CostItem, CostProfile, Estimate, Price, estimate
from softsgx.ondemand import on_demand
from softsgx.report.summary import (
    Collector,
    CpuTimes,
    EnclaveSummary,
    GroupSummary,
    PlatformSummary,
    RunSummary,
)
from softsgx.report.verdict import Fit, Verdict, verdict

if TYPE_CHECKING:
    from softsgx.report.html import html_page
    from softsgx.report.perfetto import PerfettoWriter
    from softsgx.report.run_document import FORMAT, document
    from softsgx.report.sampler import Sample, Sampler, Ticker
    from softsgx.report.tables import (
        cycles_text,
        seconds_text,
        status_line,
        summary_text,
    )
    from softsgx.report.thresholds import Threshold
    from softsgx.report.totals import LivingEnclave, Totals

__all__ = [
    "COST_PROFILES",
    "FORMAT",
    "Collector",
    "CostItem",
    "CostProfile",
    "CpuTimes",
    "EnclaveSummary",
    "Estimate",
    "Fit",
    "GroupSummary",
    "LivingEnclave",
    "PerfettoWriter",
    "PlatformSummary",
    "Price",
    "RunSummary",
    "Sample",
    "Sampler",
    "Threshold",
    "Ticker",
    "Totals",
    "Verdict",
    "cycles_text",
    "document",
    "estimate",
    "html_page",
    "seconds_text",
    "status_line",
    "summary_text",
    "verdict",
]

__getattr__ = on_demand(
    __name__,
    {
        "run_document": (
            "FORMAT",
            "document",
        ),
        "html": ("html_page",),
        "perfetto": ("PerfettoWriter",),
        "sampler": (
            "Sample",
            "Sampler",
            "Ticker",
        ),
        "tables": (
            "cycles_text",
            "seconds_text",
            "status_line",
            "summary_text",
        ),
        "thresholds": ("Threshold",),
        "totals": (
            "LivingEnclave",
            "Totals",
        ),
    },
)
