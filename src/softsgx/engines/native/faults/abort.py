"""The abort page: the result of accesses to EPC addresses that code may not use.

Loads return ones, stores are dropped, and no access faults.  The thread executes one instruction
alone, by single step, while the pages that it touches hold ones in the memory file.  Afterwards the
pages get their own bytes back.  So every kind of instruction works, and none is emulated.

Deviation: a system call whose buffer is such a page fails with EFAULT.  On hardware the kernel
copies ones from it, and its stores are dropped.

Source:
    SDM vol. 3D, "Access Control Requirements": "abort page semantics"; ptrace(2).
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import PAGE_BYTES
from softsgx.driver import PROT_READ, FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults.faulting_instruction import access_at
from softsgx.engines.native.memory.memory_file import WRITE, EnclaveMemory
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.syscalls.registry import Device
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["AbortPage"]

_ALL_SIGNALS = (1 << 64) - 1
_PAGE_MASK = -PAGE_BYTES
_TRACE_CODES = (1, 2)  # TRAP_BRKPT, TRAP_TRACE: codes of a single step
_MENDED = (FaultResult.NOPAGE, FaultResult.RETRY)
_MOST_STEPS = 4096
_MOST_PAGES = 64


class AbortPage:
    """See the module.

    Args:
        store: the pages.
        stop_other_users: stops every other thread that could use pages of a device meanwhile.
    """

    def __init__(
        self, store: NativeStore, stop_other_users: Callable[[ProgramThread, Device], None]
    ) -> None:
        self._store, self._stop_other_users = store, stop_other_users

    def execute(self, thread: ProgramThread, address: int) -> int:
        """Execute the instruction of ``thread`` that faulted at ``address``.

        The page has an entry in the page tables, or is foreign memory, and the access is allowed.
        Repeated string instructions may end in the middle; they fault again.

        Returns:
            The signal to deliver, 0 when it was executed.
        """
        image = thread.image
        thread.flush()
        mask = thread.sigmask()
        # A fault that must be forced on a thread that blocks it would end the program.
        thread.set_sigmask(_ALL_SIGNALS & ~abi.FAULT_SIGNALS)
        lent: dict[int, EnclaveMemory | None] = {}
        try:
            found = self._lend(thread, address & _PAGE_MASK, lent)
            assert found, f"no page at {address:#x} to take the place of"
            return self._steps(thread, lent)
        finally:
            for page, memory in lent.items():
                if memory is None:
                    image.foreign_mappings.lower(page)
                    continue
                self._store.take_back(memory, page)
                image.lower(page)
                image.page_table.refresh(page)
            thread.set_sigmask(mask)
            thread.load()

    def _steps(self, thread: ProgramThread, lent: dict[int, EnclaveMemory | None]) -> int:
        start = thread.load().rip
        for _step in range(_MOST_STEPS):
            stop = thread.step()
            if stop.event or stop.syscall:
                continue
            number, info = stop.signal, thread.siginfo()
            if number == abi.SIGTRAP and info.code in _TRACE_CODES:
                if thread.load().rip != start:
                    return 0
                continue  # one round of a repeated string instruction
            page = info.addr & _PAGE_MASK
            fault = number in (abi.SIGSEGV, abi.SIGBUS) and info.code in (1, 2)
            if fault and _reports_use(thread, info.addr):
                continue
            if not fault or page in lent or len(lent) == _MOST_PAGES:
                return number
            if not self._lend(thread, page, lent):
                return number
        return 0

    def _lend(
        self, thread: ProgramThread, page: int, lent: dict[int, EnclaveMemory | None]
    ) -> bool:
        """Make ``page`` hold ones, or usable if it is foreign memory; ``False``: it is neither."""
        image = thread.image
        device = image.device_at(page)
        if device is None:
            return self._lend_foreign(thread, page, lent)
        epc = image.page_table.page(page)
        while epc is None:
            if image.mm.fault(page, PROT_READ, thread) not in _MENDED:
                return False
            epc = image.page_table.page(page)
        self._stop_other_users(thread, device)
        self._store.lend(epc, device.memory, page)
        lent[page] = device.memory
        image.pager.touched(page, WRITE)  # else its use would be a fault that only reports it
        image.lift(page)
        return True

    def _lend_foreign(
        self, thread: ProgramThread, page: int, lent: dict[int, EnclaveMemory | None]
    ) -> bool:
        foreign_mappings = thread.image.foreign_mappings
        foreign = foreign_mappings.find(page)
        if foreign is None or not foreign.prot:
            return False
        self._stop_other_users(thread, foreign.device)
        lent[page] = None
        foreign_mappings.lift(page, foreign.prot)
        return True


def _reports_use(thread: ProgramThread, address: int) -> bool:
    """Return whether a fault only reports the use of a watched page that the thread may use."""
    image = thread.image
    if image.is_covered(address):
        return False
    thread.load()
    access = access_at(thread, address)
    return access is not None and image.page_table.touched(address & _PAGE_MASK, access)
