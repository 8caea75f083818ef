"""How a page fault ends: what the driver's and the virtual EPC's fault handlers return.

Source:
    ``vm_fault_t``, include/linux/mm_types.h; arch/x86/mm/fault.c for SEGV.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["FaultResult"]


class FaultResult(Enum):
    """How a page fault ended."""

    NOPAGE = "nopage"
    """Repeat the access: the page is mapped, or will be."""
    RETRY = "retry"
    """Repeat the access: the fault has waited for an EPC page with no lock held."""
    SIGBUS = "sigbus"
    """There is no EPC page, the page cannot be loaded, or its owner was destroyed."""
    OOM = "oom"
    SEGV = "segv"
    """No mapping there, or it does not allow the access."""
