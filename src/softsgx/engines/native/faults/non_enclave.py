"""Faults on enclave memory of code that is not in the enclave.

Source:
    arch/x86/mm/fault.c for what becomes of a fault; SDM vol. 3D, "Access Control Requirements".
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import Pfec, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults.abort import AbortPage
from softsgx.engines.native.faults.exceptions import send, send_page_fault
from softsgx.engines.native.faults.faulting_instruction import (
    access_at,
    again,
    pfec,
    repeat,
    resolved,
)
from softsgx.engines.native.memory.foreign import ForeignMapping
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.hw import EXECUTE

__all__ = ["NonEnclaveFaults"]


class NonEnclaveFaults:
    """Each method returns the signal to deliver when the thread is resumed, 0 for none.

    Args:
        abort_page: executes an instruction that may not use a page that it touches.
        refused: called for a SIGBUS on a page of an enclave, with thread and address.
    """

    def __init__(
        self, abort_page: AbortPage, refused: Callable[[ProgramThread, int], None]
    ) -> None:
        self._abort_page, self._tell_refused = abort_page, refused

    def fault(self, thread: ProgramThread, number: int, address: int) -> int:
        """Code outside any enclave has faulted at ``address`` with signal ``number``."""
        image = thread.image
        foreign = image.foreign_mappings.find(address)
        if image.mm.find(address) is None and foreign is None:
            return number
        access = access_at(thread, address)
        if access is None:
            return 0 if again(thread) else number
        if foreign is not None:
            return self.foreign(thread, address, access, foreign)
        if self._is_mapped(thread, address, access):
            if image.is_covered(address) or access & ~image.page_table.rights(address):
                return self.aborted(thread, address, access)
            return 0 if repeat(thread, address, access) else abi.SIGBUS
        return self._outcome(thread, image.mm.fault(address, access, thread), address, access)

    def foreign(
        self, thread: ProgramThread, address: int, access: int, foreign: ForeignMapping
    ) -> int:
        """Code that is not of the enclave has used memory mapped in the place of its pages."""
        image = thread.image
        if access & ~foreign.prot:
            present = Pfec.P if foreign.prot else 0
            error = pfec(access) | present
            return send_page_fault(thread, error, address, code=abi.SEGV_ACCERR)
        if not image.registry.has(foreign.device):
            image.foreign_mappings.give_back(foreign.start, foreign.end)
            return 0
        return self._abort_page.execute(thread, address)

    def aborted(self, thread: ProgramThread, address: int, access: int) -> int:
        """Code that is not of the enclave at ``address`` has touched it."""
        if access == EXECUTE:  # ones are no instruction
            return send(thread, Vector.UD)
        number = self._abort_page.execute(thread, address)
        if number not in (abi.SIGSEGV, abi.SIGBUS) or thread.siginfo().code not in (1, 2):
            return number
        # It also touches memory that it may not use, or that has no page yet.
        image, other = thread.image, thread.siginfo().addr
        if image.mm.find(other) is None:
            return number
        other_access = access_at(thread, other)
        if other_access is None:
            return 0 if again(thread) else number
        if self._is_mapped(thread, other, other_access):
            return 0 if repeat(thread, other, other_access) else number
        result = image.mm.fault(other, other_access, thread)
        return self._outcome(thread, result, other, other_access)

    def _is_mapped(self, thread: ProgramThread, address: int, access: int) -> bool:
        """Return whether page tables have the page and allow the access."""
        entry = thread.image.page_table.entry(address)
        return entry is not None and not access & ~entry[1]

    def _outcome(
        self, thread: ProgramThread, result: FaultResult, address: int, access: int
    ) -> int:
        """Return the signal that a fault handled by the driver ends with."""
        if result in (FaultResult.NOPAGE, FaultResult.RETRY):
            resolved(thread)
            return 0
        error = pfec(access)
        if result is FaultResult.SEGV:
            entry = thread.image.page_table.entry(address)
            if entry is not None and entry[1]:
                error |= Pfec.P
            return send_page_fault(thread, error, address, code=abi.SEGV_ACCERR)
        self._tell_refused(thread, address)
        return send_page_fault(thread, error, address, number=abi.SIGBUS, code=abi.BUS_ADRERR)
