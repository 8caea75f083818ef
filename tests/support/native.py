"""Helpers of tests that run programs under the native engine: what a test needs, as marks.

A test that looks at something that a mode (``tests.support.modes``) or a processor does not have
says so by a mark of this module, which has the reason for the skip.
"""

from __future__ import annotations

import pytest
from tests.support import modes

from softsgx.engines.native import PAGERS, doctor

__all__ = [
    "FAULTS_ARE_SIGBUS",
    "HAS_PERMITS",
    "USABLE_PAGERS",
    "needs_both_pagers",
    "needs_free_calls",
    "needs_no_strict_mode",
    "needs_pages_that_stay",
    "needs_permits",
    "needs_tracing",
    "needs_userfaultfd",
]

_FINDINGS = doctor()

USABLE_PAGERS = (
    PAGERS
    if any(finding.name == "userfaultfd" and finding.ok for finding in _FINDINGS)
    else ("mprotect",)
)
"""Pagers that this machine lets programs have."""

FAULTS_ARE_SIGBUS = "userfaultfd" in USABLE_PAGERS and not modes.has("mprotect")
"""Whether a fault on a page that is not shown has a signal of its own, unless a test chooses."""

needs_tracing = pytest.mark.skipif(
    any(finding.needed and not finding.ok for finding in _FINDINGS),
    reason="this machine does not let programs be traced",
)

HAS_PERMITS = not modes.has("stops", "strict")
"""Whether calls of an enclave do not stop, unless a test asks for a strict run."""

needs_permits = pytest.mark.skipif(not HAS_PERMITS, reason="there are no permits in this mode")

needs_pages_that_stay = pytest.mark.skipif(
    modes.has("recorded"), reason="in this mode all pages are hidden each millisecond"
)

needs_both_pagers = pytest.mark.skipif(modes.has(*PAGERS), reason="this mode chooses the pager")

needs_userfaultfd = pytest.mark.skipif(
    "userfaultfd" not in USABLE_PAGERS or modes.has("mprotect"), reason="needs userfaultfd"
)

needs_free_calls = pytest.mark.skipif(
    modes.has("strict", "recorded"),
    reason="in this mode each process is served from its start; if strict, at each system call",
)

needs_no_strict_mode = pytest.mark.skipif(
    modes.has("strict"), reason="in strict mode code outside finds ones in an enclave's memory"
)
