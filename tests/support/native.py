"""Helpers of tests that run programs under the native engine."""

from __future__ import annotations

import pytest

from softsgx.engines.native import PAGERS, doctor

__all__ = ["USABLE_PAGERS", "needs_tracing"]

_FINDINGS = doctor()

USABLE_PAGERS = (
    PAGERS
    if any(finding.name == "userfaultfd" and finding.ok for finding in _FINDINGS)
    else ("mprotect",)
)
"""Pagers that this machine lets programs have."""

needs_tracing = pytest.mark.skipif(
    any(finding.needed and not finding.ok for finding in _FINDINGS),
    reason="this machine does not let programs be traced",
)
