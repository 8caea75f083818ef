"""What tests that run programs under the native engine have in common."""

from __future__ import annotations

import pytest

from softsgx.engines.native import doctor

__all__ = ["needs_tracing"]

needs_tracing = pytest.mark.skipif(
    any(finding.needed and not finding.ok for finding in doctor()),
    reason="this machine does not let programs be traced",
)
