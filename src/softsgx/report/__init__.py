"""Runs as text, JSON, traces and pages: what happened, and what it would have cost on silicon."""

from softsgx.report.costs import COST_PROFILES, CostItem, CostProfile, Estimate, Price, estimate
from softsgx.report.document import FORMAT, document
from softsgx.report.summary import (
    Collector,
    CpuTimes,
    EnclaveSummary,
    GroupSummary,
    PlatformSummary,
    RunSummary,
)
from softsgx.report.tables import cycles_text, print_summary, size_text, status_line

__all__ = [
    "COST_PROFILES",
    "FORMAT",
    "Collector",
    "CostItem",
    "CostProfile",
    "CpuTimes",
    "EnclaveSummary",
    "Estimate",
    "GroupSummary",
    "PlatformSummary",
    "Price",
    "RunSummary",
    "cycles_text",
    "document",
    "estimate",
    "print_summary",
    "size_text",
    "status_line",
]
