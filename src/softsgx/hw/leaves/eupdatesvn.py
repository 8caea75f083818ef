"""ENCLS[EUPDATESVN]: adopt the security version of microcode that was loaded at run time."""

from __future__ import annotations

from softsgx.arch import Status
from softsgx.hw.checks import svn_beyond
from softsgx.hw.processor import LogicalProcessor

__all__ = ["eupdatesvn"]


def eupdatesvn(cpu: LogicalProcessor) -> Status:
    """Set CPUSVN to that of the loaded microcode and draw all transient secrets anew.

    Modelled: the leaf is one step.  While another leaf holds a page it returns a conflict; no leaf
    begins in its middle.

    Args:
        cpu: the processor it runs on.

    Returns:
        ``SUCCESS``: pages evicted before can never be loaded again.  Unchanged otherwise:
        ``EPC_PAGE_CONFLICT`` (another leaf is running), ``EPC_NOT_READY`` (an EPC page is in use),
        ``INSUFFICIENT_ENTROPY`` (repeat), ``NO_UPDATE`` (the loaded microcode is not newer, the
        usual outcome).

    Source:
        Linux, "x86/sgx: Implement ENCLS[EUPDATESVN]" (v6.18), for codes and meaning; the order of
        checks is modelled.
    """
    hw = cpu.hw
    hw.point("EUPDATESVN")
    with hw.latch:
        # Checks
        pages = list(hw.pages.values())
        if any(page.lock or page.modification_lock for page in pages):
            return Status.EPC_PAGE_CONFLICT
        if any(page.valid for page in pages):
            return Status.EPC_NOT_READY
        if hw.entropy_failures:
            hw.entropy_failures -= 1
            return Status.INSUFFICIENT_ENTROPY
        if not svn_beyond(hw.microcode_svn, hw.cpusvn):
            return Status.NO_UPDATE

        # Commit
        hw.cpusvn = hw.microcode_svn
        hw.secrets.power_up()
        return Status.SUCCESS
