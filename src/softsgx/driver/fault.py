"""Page faults: the driver loads an evicted page, or EAUG makes a page.

The handlers run with the address space's ``mmap_lock`` held for reading, so they never reclaim.  If
a fault cannot be handled now, the task releases its locks, waits, and repeats the instruction.

Source:
    sgx_vma_fault(), sgx_encl_eaug_page(), sgx_encl_load_page(), arch/x86/kernel/cpu/sgx/encl.c.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from softsgx.arch import PAGE_SHIFT, PageType
from softsgx.defects import Defect
from softsgx.driver.events import Augmented, FaultHandled
from softsgx.driver.page import LABELS, EnclavePage
from softsgx.driver.uapi import PROT_EXEC, PROT_READ, PROT_WRITE
from softsgx.hw import Fault, PageInfoArgs
from softsgx.paging import (
    BackingError,
    Claim,
    EpcBusy,
    FaultResult,
    LoadFailed,
    NoEpc,
    PagingError,
    SgxEpcPage,
    SwapEntry,
)

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave
    from softsgx.driver.mm import EnclaveVma, Mm
    from softsgx.driver.task import Task

__all__ = ["Outcome", "PageBusy", "handle", "load", "load_ahead", "wait_while_busy"]

Outcome: TypeAlias = tuple[FaultResult, Callable[[], None] | None]

_NOPAGE = FaultResult.NOPAGE  # the lookup of an enumeration's member is slow
_RWX = PROT_READ | PROT_WRITE | PROT_EXEC


class PageBusy(Exception):
    """The page is being evicted or modified: EBUSY.

    Attributes:
        page: the page.
    """

    def __init__(self, page: EnclavePage) -> None:
        super().__init__(page)
        self.page = page


def handle(enclave: Enclave, mm: Mm, vma: EnclaveVma, linaddr: int, task: Task | None) -> Outcome:
    """Handle a fault on a page of an enclave; ``mmap_lock`` of ``mm`` is held for reading.

    Returns:
        The result; and, if the task must wait before it repeats the instruction, a function that
        waits and is called with no lock held.
    """
    driver = enclave.driver
    began_ns = 0 if driver.tracer is None else driver.runtime.now_ns()
    index = linaddr - enclave.base >> PAGE_SHIFT
    try:
        # Looked up without the lock; both functions look it up again under the lock.
        if index not in enclave.pages and _can_augment(enclave):
            kind, result = _augment(enclave, mm, vma, linaddr, task)
        else:
            kind, result = _fault_in(enclave, mm, vma, linaddr, index, task)
        wait = None
    except PageBusy as error:
        kind, result = "busy", FaultResult.NOPAGE
        wait = partial(wait_while_busy, error.page)
    except EpcBusy as error:
        kind, result = "busy", FaultResult.NOPAGE
        # The traceback refers to this frame, which refers to the error: a reference cycle.
        wait = partial(driver.core.wait_for_page, error.with_traceback(None))
    faults = enclave.counts.faults
    faults[kind] = faults.get(kind, 0) + 1
    if wait is not None and Defect.FAULT_REPEATED_WITHOUT_WAITING in driver.defects:
        wait = None
    if driver.tracer is not None:
        seen = result if wait is None else FaultResult.RETRY
        duration_ns = driver.runtime.now_ns() - began_ns
        driver.tracer(FaultHandled(enclave.number, linaddr, kind, seen.value, duration_ns))
    return result, wait


def _can_augment(enclave: Enclave) -> bool:
    return enclave.initialized and enclave.driver.sgx2


def _fault_in(
    enclave: Enclave, mm: Mm, vma: EnclaveVma, linaddr: int, index: int, task: Task | None
) -> tuple[str, FaultResult]:
    lock = enclave.lock
    lock.acquire()
    try:
        page = enclave.pages.get(index)
        if page is None and _can_augment(enclave) and not enclave.dead:
            # Deviation: Linux sends SIGBUS. The page was removed after the lookup without the
            # lock; the next fault makes it again.
            return "busy", _NOPAGE
        if page is None or enclave.dead or vma.prot & ~page.max_prot:
            return _refused(enclave)
        kind = "minor" if page.epc is not None else "major"
        epc = load(page, task)
        return kind, _map(mm, vma, page, epc)
    except (NoEpc, LoadFailed, BackingError) as error:
        return _refused(enclave, error)
    finally:
        lock.release()


def _refused(enclave: Enclave, error: PagingError | None = None) -> tuple[str, FaultResult]:
    enclave.refusal = "" if error is None else str(error)
    return "refused", FaultResult.SIGBUS


def load(page: EnclavePage, task: Task | None) -> SgxEpcPage:
    """Return the EPC page of a page; load it if it is evicted.  The enclave's lock is held.

    Raises:
        PageBusy: it is being evicted or modified.
        EpcBusy, NoEpc: no EPC page for it now, or at all.
        LoadFailed, BackingError: it cannot be loaded, or its memory has failed after EBLOCK.
    """
    epc = page.epc
    if page.being_reclaimed or page.being_modified or (epc is not None and epc.blocked):
        if page.unusable and not page.being_reclaimed:
            # Modelled: Linux executes EWB in this case, which reads the failed memory: the
            # processor shuts down, and the kernel panics.
            raise LoadFailed("poisoned")
        raise PageBusy(page)
    if epc is not None:
        return epc
    entry = page.entry
    if entry is None:
        raise LoadFailed("lost")
    epc = _reload(page, entry, task, None if task is None else task.claim)
    load_ahead(page, task)
    return epc


def load_ahead(page: EnclavePage, task: Task | None) -> None:
    """Load the pages that the policy wants with ``page``, while EPC pages are free."""
    enclave = page.enclave
    policy = enclave.driver.core.policy
    for index in policy.neighbours(page.index, enclave.size >> PAGE_SHIFT):
        other = enclave.pages.get(index)
        entry = None if other is None or other.busy else other.entry
        if other is None or entry is None:
            continue
        try:
            _reload(other, entry, task, None)
        except (EpcBusy, NoEpc, LoadFailed, BackingError):
            break


def claim_of(task: Task | None) -> Claim | None:
    """Return the claim of the task that a page is loaded for."""
    return None if task is None else task.claim


def _reload(
    page: EnclavePage, entry: SwapEntry, task: Task | None, claim: Claim | None
) -> SgxEpcPage:
    enclave = page.enclave
    driver = enclave.driver
    group, node = driver.group_and_node(task)
    epc = page.swap.load(
        entry, page, kind=LABELS[page.kind], cpu_node=node, group=group, claim=claim
    )
    page.epc, page.entry = epc, None
    enclave.counts.reloads += 1
    driver.core.mark_reclaimable(epc)
    return epc


def _map(mm: Mm, vma: EnclaveVma, page: EnclavePage, epc: SgxEpcPage) -> FaultResult:
    """Insert the PTE, not accessed: the fault itself is not an access."""
    try:
        mm.ptes.install(page.linaddr, epc.addr, vma.prot)
    except MemoryError:
        return FaultResult.SIGBUS
    if not page.touched:
        page.touched = True
        page.enclave.counts.touched += 1
    return _NOPAGE


def _augment(
    enclave: Enclave, mm: Mm, vma: EnclaveVma, linaddr: int, task: Task | None
) -> tuple[str, FaultResult]:
    """EAUG a page of an initialized enclave, which then accepts it by EACCEPT."""
    defects = enclave.driver.defects
    with enclave.lock:
        if enclave.dead or not enclave.covers(enclave.index_of(linaddr)):
            return _refused(enclave)
        exists = enclave.index_of(linaddr) in enclave.pages
        if exists and Defect.CONCURRENT_EAUG_REFUSED not in defects:
            # Another thread has made the page; if it is not mapped here, the next fault maps it.
            return "augment", FaultResult.NOPAGE
        try:
            epc = _eaug(enclave, linaddr, task)
        except (NoEpc, LoadFailed, BackingError) as error:
            return _refused(enclave, error)
        if epc is None:
            return _refused(enclave)
        if enclave.driver.tracer is not None:
            enclave.driver.tracer(Augmented(enclave.number, linaddr))
        page = enclave.pages[enclave.index_of(linaddr)]
        return "augment", _map(mm, vma, page, epc)


def _eaug(enclave: Enclave, linaddr: int, task: Task | None) -> SgxEpcPage | None:
    """Execute EAUG; ``None``: it has failed, and all is undone.  The lock is held."""
    driver, swap = enclave.driver, enclave.swap
    core = driver.core
    group, node = driver.group_and_node(task)
    claim = claim_of(task)
    if Defect.EAUG_ASSUMES_RESIDENT_SECS in driver.defects:
        secs = swap.secs
        assert secs is not None, "NULL pointer dereference: the SECS is evicted"
    else:
        secs = swap.load_secs(cpu_node=node, claim=claim)
    page = driver.page_type(enclave, enclave.index_of(linaddr), _RWX, PageType.REG)
    epc = None
    added = False
    try:
        epc = core.alloc(page, reclaim=False, group=group, cpu_node=node, claim=claim)
        try:
            swap.grow_locked(cpu_node=node, claim=claim)
        except EpcBusy as error:
            if Defect.EAUG_WITHOUT_VA_PAGE_REFUSED in driver.defects:
                raise NoEpc from error
            raise
        try:
            if page.index in enclave.pages:
                return None  # only with Defect.CONCURRENT_EAUG_REFUSED
            core.leaves.eaug(PageInfoArgs(linaddr, 0, 0, secs.addr), epc.addr)
            added = True
        except Fault:
            return None
        finally:
            if not added:
                swap.shrink()
    finally:
        if not added:
            if epc is not None:
                core.remove(epc)
            swap.secs_idle()
    page.epc = epc
    enclave.pages[page.index] = page
    swap.child_added()
    if claim is not None:
        core.claims.loaded(claim, page, epc)
    core.mark_reclaimable(epc)
    return epc


def wait_while_busy(page: EnclavePage) -> None:
    """Wait until a page is no longer busy; the caller holds no lock."""
    enclave = page.enclave
    with enclave.lock:
        while page.being_reclaimed or page.being_modified:
            enclave.waiting += 1
            try:
                enclave.changed.wait()
            finally:
                enclave.waiting -= 1
        blocked = page.busy and not page.unusable
    if blocked:
        # An eviction has failed after EBLOCK; the page is usable after another one.
        enclave.driver.core.reclaim(force=True)
