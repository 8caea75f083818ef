"""Optimised implementations of the reclaimer's calls to a page, and of a fault that loads a page.

Each function handles the common case: no task holds a lock that it needs, and the enclave is
alive.  One function has the effects of many readable ones, in the same order.  Otherwise it falls
back to the readable ones; no state has changed.  It is for runtimes that do not interleave tasks: a
free lock stays free, since no other task runs.  The functions use neither tracer nor defects, so a
driver that has them uses the readable methods.  ``tests/differential`` runs both on the same
histories.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PAGE_SHIFT, PageType, Status
from softsgx.driver import fault
from softsgx.driver.counts import EnclaveCounts
from softsgx.driver.mm import Mm
from softsgx.driver.page import LABELS, EnclavePage
from softsgx.driver.pages import EnclavePages
from softsgx.driver.task import first_node, own_group
from softsgx.hw import Fault
from softsgx.paging import BackingError, EpcBusy, FaultResult, LoadFailed, NoEpc, Policy
from softsgx.paging.optimised import PlainSwap
from softsgx.paging.plain_load import load_at
from softsgx.paging.sparse import MASK, SHIFT

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave
    from softsgx.driver.mm import EnclaveVma
    from softsgx.driver.task import Task

__all__ = ["CompiledPage", "PlainMm", "PlainPage", "fast_handle", "handle"]

_SUCCESS = Status.SUCCESS
_NOPAGE, _SIGBUS = FaultResult.NOPAGE, FaultResult.SIGBUS


class PlainPage(EnclavePage):
    """See the module."""

    __slots__ = ()

    def get(self) -> bool:
        """As :meth:`EnclavePage.get`."""
        enclave = self.enclave
        if enclave.references:
            enclave.references += 1
            return True
        return False

    def put(self) -> None:
        """As :meth:`EnclavePage.put`."""
        enclave = self.enclave
        if enclave.references > 1:
            enclave.references -= 1
        else:
            enclave.put()

    def age(self) -> bool:
        """As :meth:`EnclavePage.age`."""
        enclave = self.enclave
        if enclave.dead:
            return True
        linaddr = enclave.base + (self.index << PAGE_SHIFT)
        young = False
        for entry in enclave.mms:
            mm = entry.mm
            if mm.mmap_lock.has_writer:
                return super().age() and not young
            if not mm.users:
                continue
            vma = mm.found
            if vma is None or not vma.start <= linaddr < vma.end:
                vma = mm.find(linaddr)
            if vma is not None and vma.enclave is enclave:
                young |= mm.ptes.test_and_clear_accessed(linaddr)
        return not young

    def block(self) -> bool:
        """As :meth:`EnclavePage.block`."""
        enclave, epc = self.enclave, self.epc
        if enclave.dead or enclave.lock.held() or epc is None or epc.poisoned:
            return super().block()
        linaddr = enclave.base + (self.index << PAGE_SHIFT)
        for entry in enclave.mms:
            mm = entry.mm
            if mm.mmap_lock.has_writer:
                return super().block()
            if not mm.users:
                continue
            vma = mm.found
            if vma is None or not vma.start <= linaddr < vma.end:
                vma = mm.find(linaddr)
            if vma is not None and vma.enclave is enclave:
                mm.ptes.zap(linaddr)
        eblock = enclave.driver.core.leaves.eblock
        try:
            status = eblock(epc.addr)
        except Fault:
            return super().block()  # executes EBLOCK again; the first one has changed nothing
        if status is not _SUCCESS:
            return super().block()
        epc.blocked = True
        return True

    def prepare(self) -> bool:
        """As :meth:`EnclavePage.prepare`."""
        enclave = self.enclave
        if enclave.dead or enclave.lock.held():
            return super().prepare()
        reservation = self.reservation = enclave.swap.prepare(self.index)
        if reservation is None:
            return False
        self.being_reclaimed = True
        return True

    def write(self) -> bool:
        """As :meth:`EnclavePage.write`."""
        enclave, epc, reservation = self.enclave, self.epc, self.reservation
        if enclave.dead or epc is None or reservation is None or enclave.lock.held():
            return super().write()
        self.reservation = None
        swap = enclave.swap
        entry = swap.write(epc, reservation)
        if entry is not None:
            swap.entries.put(self.index, entry)
            enclave.counts.evictions += 1
            self.epc = None
        self.being_reclaimed = False
        if enclave.waiting:  # read after EWB: tasks run while it interrupts processors
            enclave.page_changed()
        return entry is not None


def handle(
    enclave: Enclave, mm: Mm, vma: EnclaveVma, linaddr: int, task: Task | None
) -> fault.Outcome:
    """As :func:`fault.handle`."""
    index = linaddr - enclave.base >> PAGE_SHIFT
    page = enclave.pages.get(index)
    swap = enclave._swap
    entry = None if page is None or swap is None else swap.entries.get(index)
    if (
        page is None
        or entry is None
        or swap is None
        or page.being_reclaimed
        or enclave.modified
        or vma.prot & ~page.max_prot
        or enclave.dead
        or enclave.lock.held()
    ):
        return fault.handle(enclave, mm, vma, linaddr, task)
    driver, counts = enclave.driver, enclave.counts
    core, kind, result = driver.core, "major", _NOPAGE
    wait: Callable[[], None] | None = None
    group, node = driver.group_and_node(task)
    try:
        epc = swap.load(
            entry,
            page,
            kind=LABELS[page.kind],
            cpu_node=node,
            group=group,
            claim=None if task is None else task.claim,
        )
        page.epc = epc
        swap.entries.put(index, None)
        counts.reloads += 1
        core.mark_reclaimable(epc)
        policy = core.policy
        ahead = type(policy).neighbours is not Policy.neighbours
        if ahead and policy.neighbours(index, enclave.size >> PAGE_SHIFT):
            fault.load_ahead(page, task)
        mm.ptes.install(linaddr, epc.addr, vma.prot)
        if not page.touched:
            page.touched = True
            counts.touched += 1
    except (EpcBusy, NoEpc, LoadFailed, BackingError, MemoryError) as error:
        kind, result, wait = _ended(enclave, error)
    faults = counts.faults
    faults[kind] = faults.get(kind, 0) + 1
    return result, wait


class PlainMm(Mm):
    """As :class:`Mm`; its faults on evicted pages are one step."""

    __slots__ = ()

    def fault(self, addr: int, access: int, task: Task | None = None) -> FaultResult:
        """As :meth:`Mm.fault`.  No task runs meanwhile, so ``mmap_lock`` is not needed."""
        vma = self.found
        if vma is None or not vma.start <= addr < vma.end:
            vma = self.find(addr)
        enclave = None if vma is None else vma.enclave
        if vma is None or enclave is None or self.mmap_lock.has_writer:
            return super().fault(addr, access, task)
        index, prot = addr - enclave.base >> PAGE_SHIFT, vma.prot
        chunk = enclave.pages.chunks.get(index >> SHIFT)
        page = None if chunk is None else chunk[index & MASK]
        swap, driver, task = enclave._swap, enclave.driver, task or self.owner
        policy = driver.core.policy
        if (
            page is None
            or type(swap) is not PlainSwap
            or access & ~prot
            or prot & ~page.max_prot
            or page.being_reclaimed
            or enclave.modified
            or enclave.dead
            or enclave.lock.held()
            or type(policy).neighbours is not Policy.neighbours
        ):
            return super().fault(addr, access, task)
        counts, kind, result = enclave.counts, "major", _NOPAGE
        wait: Callable[[], None] | None = None
        now_ns = self.runtime.now_ns
        began_ns = now_ns()
        try:
            if task is None:
                epc = load_at(swap, index, page, LABELS[page.kind], 0, None, None)
            else:
                node_of = driver._node_of
                node = 0 if node_of is first_node else node_of(task)
                group, claim = driver._group_of(task), task.claim
                epc = load_at(swap, index, page, LABELS[page.kind], node, group, claim)
            if epc is None:
                return super().fault(addr, access, task)
            page.epc = epc
            counts.reloads += 1
            self.ptes.install(addr & -PAGE_BYTES, epc.addr, prot)
            if not page.touched:
                page.touched = True
                counts.touched += 1
        except (EpcBusy, NoEpc, LoadFailed, BackingError, MemoryError) as error:
            kind, result, wait = _ended(enclave, error)
        faults = counts.faults
        faults[kind] = faults.get(kind, 0) + 1
        if wait is not None:
            wait()
            result = FaultResult.RETRY
        counts.fault_ns += now_ns() - began_ns
        return result


def _ended(
    enclave: Enclave, error: BaseException
) -> tuple[str, FaultResult, Callable[[], None] | None]:
    """Return what a fault is that has ended with ``error``, and its outcome."""
    if isinstance(error, EpcBusy):
        # The traceback refers to a frame, which refers to the error: a reference cycle.
        busy = error.with_traceback(None)
        return "busy", _NOPAGE, partial(enclave.driver.core.wait_for_page, busy)
    if not isinstance(error, MemoryError):
        enclave.refusal = str(error)
        return "refused", _SIGBUS, None
    return "major", _SIGBUS, None


# --- the same in C --------------------------------------------------------------------------------


class CompiledPage(PlainPage):
    """As :class:`PlainPage`, with methods of the compiled core."""

    __slots__ = ()


def _ended_in_core(
    enclave: Enclave, error: BaseException
) -> tuple[str, FaultResult, Callable[[], None] | None] | None:
    """As :func:`_ended`; ``None`` for errors that :func:`handle` does not catch."""
    known = EpcBusy, NoEpc, LoadFailed, BackingError, MemoryError
    return _ended(enclave, error) if isinstance(error, known) else None


def _give(core: ModuleType) -> None:
    """Give the compiled core the classes and objects that it uses; take its methods."""
    from softsgx.driver.enclave import Enclave, EnclaveMm
    from softsgx.driver.mm import EnclaveVma
    from softsgx.driver.sync import RwLock, Srcu

    core.bind("EnclavePages", EnclavePages)
    for record in (Enclave, EnclaveCounts, EnclaveMm, EnclaveVma, Mm, RwLock, Srcu):
        core.bind(record.__name__, record)
    core.bind("EnclavePage", CompiledPage)
    for name, value in {
        "CompiledPage": CompiledPage,
        "Fault": Fault,
        "NOPAGE": _NOPAGE,
        "RETRY": FaultResult.RETRY,
        "busy": "busy",
        "handle": core.handle,
        "first_node": first_node,
        "kick_enclave": Enclave.kick,
        "labels": LABELS,
        "load_ahead": fault.load_ahead,
        "major": "major",
        "own_group": own_group,
        "partial": partial,
        "REG": PageType.REG,
        "reg": LABELS[PageType.REG],
        "page_ended": _ended_in_core,
    }.items():
        core.give(name, value)
    core.add_methods(CompiledPage)
    core.add_methods(Mm)
    core.fall_back(handle)


fast_handle = handle
if compiled.speedups is not None:
    _give(compiled.speedups)
    fast_handle = compiled.speedups.handle
