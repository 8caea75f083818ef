"""The ioctls that change an initialized enclave: permissions, types, removal.

Each page has its own tracking cycle and round of interrupts.  The first refusal ends the ioctl;
``count`` says how many bytes were processed.

Source:
    sgx_ioc_enclave_{restrict_permissions,modify_types,remove_pages}(), ioctl.c.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, EBUSY, EFAULT, EINVAL, ENODEV, EPERM
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES, PAGE_SHIFT, PageType, SecInfo, SecInfoFlags, Status
from softsgx.defects import Defect
from softsgx.driver.build import check_range, copy_in, copy_out
from softsgx.driver.fault import PageBusy, load
from softsgx.driver.task import Task
from softsgx.driver.uapi import (
    PROT_READ,
    PROT_WRITE,
    ModifyTypes,
    RemovePages,
    RestrictPermissions,
    refuse,
)
from softsgx.hw import Fault, PageFault
from softsgx.paging import BackingError, EpcBusy, LoadFailed, NoEpc, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave
    from softsgx.driver.page import EnclavePage

__all__ = ["modify_types", "remove_pages", "restrict_permissions"]

_RWX = int(SecInfoFlags.RWX)
_RW = PROT_READ | PROT_WRITE
_PAGE_TYPES = 0xFF
Step = Callable[["EnclavePage", SgxEpcPage], None]
Args = RestrictPermissions | ModifyTypes | RemovePages


class _LeafRefused(Exception):
    """A leaf returned a code, which the ioctl reports in ``result``: EFAULT."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


def restrict_permissions(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS; returns the bytes changed."""
    _check_ready(enclave)
    args = copy_in(task, RestrictPermissions, arg)
    check_range(enclave, args.offset, args.length)
    rights = args.permissions
    if rights & ~_RWX or (rights & SecInfoFlags.W and not rights & SecInfoFlags.R):
        refuse(EINVAL, f"permissions {rights:#x}")
    if args.result or args.count:
        refuse(EINVAL, "result and count must be 0")
    secinfo = SecInfo(flags=rights)

    def restrict(page: EnclavePage, epc: SgxEpcPage) -> None:
        if page.kind is not PageType.REG:
            refuse(EINVAL, f"page {page.linaddr:#x} is {page.kind.name}")
        _code(lambda: enclave.driver.core.leaves.emodpr(secinfo, epc.addr))
        _track(enclave)

    return _each(enclave, task, arg, args, restrict)


def modify_types(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_MODIFY_TYPES; returns the bytes changed."""
    _check_ready(enclave)
    args = copy_in(task, ModifyTypes, arg)
    check_range(enclave, args.offset, args.length)
    if args.page_type & ~_PAGE_TYPES or args.result or args.count:
        refuse(EINVAL, f"type {args.page_type:#x}; result and count must be 0")
    if args.page_type not in (PageType.TCS, PageType.TRIM):
        refuse(EINVAL, f"type {args.page_type:#x} is neither TCS nor TRIM")
    target = PageType(args.page_type)
    secinfo = SecInfo.of(target)

    def modify(page: EnclavePage, epc: SgxEpcPage) -> None:
        if page.kind is not PageType.REG and (page.kind, target) != (PageType.TCS, PageType.TRIM):
            refuse(EINVAL, f"page {page.linaddr:#x} is {page.kind.name}")
        before = page.max_prot
        try:
            if target is PageType.TCS:
                _make_room_for_tcs(page, epc)
            _code(lambda: enclave.driver.core.leaves.emodt(secinfo, epc.addr))
        except (_LeafRefused, OSError):
            page.max_prot = before
            raise
        _track(enclave)
        page.kind = target

    return _each(enclave, task, arg, args, modify)


def _make_room_for_tcs(page: EnclavePage, epc: SgxEpcPage) -> None:
    """Remove every PTE of the page: a TCS is mapped RW at most.  The lock is held."""
    if ~page.max_prot & _RW:
        refuse(EPERM, f"page {page.linaddr:#x} is not readable and writable")
    page.max_prot = _RW
    _unmap(page, epc, EAGAIN)
    page.enclave.driver.core.mark_reclaimable(epc)


def _unmap(page: EnclavePage, epc: SgxEpcPage, being_reclaimed: int) -> None:
    """Take a page off its LRU list and remove its PTEs in every address space; lock held.

    Raises:
        OSError: ``being_reclaimed``: a batch has it; EFAULT: the enclave was killed.
    """
    if not page.enclave.driver.core.unmark_reclaimable(epc):
        refuse(being_reclaimed, f"page {page.linaddr:#x} is being reclaimed")
    with _Unlocked(page):
        page.enclave.zap(page)
    if page.epc is not epc:
        refuse(EFAULT, "the enclave was killed meanwhile")


class _Unlocked:
    """Releases the enclave's lock, since PTEs are removed without it, and marks the page."""

    def __init__(self, page: EnclavePage) -> None:
        self._page = page

    def __enter__(self) -> None:
        # Without the mark, a fault could insert a PTE after the zap.
        self._page.being_modified = (
            Defect.PAGE_NOT_BUSY_WHILE_ZAPPED not in self._page.enclave.driver.defects
        )
        self._page.enclave.lock.release()

    def __exit__(self, *_error: object) -> None:
        self._page.enclave.lock.acquire()
        self._page.being_modified = False
        self._page.enclave.changed.notify_all()


def remove_pages(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_REMOVE_PAGES; returns the bytes removed."""
    _check_ready(enclave)
    args = copy_in(task, RemovePages, arg)
    check_range(enclave, args.offset, args.length)
    if args.count:
        refuse(EINVAL, "count must be 0")

    def remove(page: EnclavePage, epc: SgxEpcPage) -> None:
        if page.kind is not PageType.TRIM:
            refuse(EPERM, f"page {page.linaddr:#x} is {page.kind.name}, not TRIM")
        if not _accepted(enclave, epc):
            refuse(EPERM, f"page {page.linaddr:#x}: the enclave has not accepted its removal")
        _unmap(page, epc, EBUSY)
        enclave.free_epc_page(epc)
        page.epc = None
        del enclave.pages[page.index]
        enclave.swap.shrink()

    return _each(enclave, task, arg, args, remove)


def _accepted(enclave: Enclave, epc: SgxEpcPage) -> bool:
    """Probe a trimmed page: EMODPR raises #PF after EACCEPT, and returns a code before."""
    try:
        enclave.driver.core.leaves.emodpr(SecInfo(flags=_RWX), epc.addr)
    except PageFault:
        return True
    except Fault:
        pass
    return False


# --- helpers --------------------------------------------------------------------------------------


def _check_ready(enclave: Enclave) -> None:
    if not enclave.driver.sgx2:
        refuse(ENODEV, "the processor has no SGX2")
    if not enclave.initialized:
        refuse(EINVAL, "the enclave is not initialized")


def _each(enclave: Enclave, task: Task, arg: int, args: Args, step: Step) -> int:
    """Call ``step`` for every page of the range, with the enclave's lock held."""
    core = enclave.driver.core
    group, _node = enclave.driver.group_and_node(task)
    try:
        while args.count < args.length:
            core.reclaim_direct(group)
            with enclave.lock:
                page = enclave.pages.get((args.offset + args.count) >> PAGE_SHIFT)
                if page is None or enclave.dead:
                    refuse(EFAULT, f"no page at offset {args.offset + args.count:#x}")
                try:
                    epc = load(page, task)
                except (PageBusy, EpcBusy):
                    refuse(EAGAIN, f"page {page.linaddr:#x} cannot be loaded now")
                except (NoEpc, LoadFailed, BackingError) as error:
                    refuse(EFAULT, f"page {page.linaddr:#x}: {error}")
                step(page, epc)
            args.count += PAGE_BYTES
    except _LeafRefused as error:
        assert not isinstance(args, RemovePages), "removing has no result"
        args.result = int(error.status)
        refuse(EFAULT, error.status.manual_name)
    finally:
        copy_out(task, arg, args)
    return int(args.count)


def _code(leaf: Callable[[], Status]) -> None:
    """Execute a leaf that returns a code.

    Raises:
        _LeafRefused: the code is not SUCCESS.
        OSError: EFAULT: it faulted.
    """
    try:
        status = leaf()
    except Fault as fault:
        refuse(EFAULT, str(fault))
    if status is not Status.SUCCESS:
        raise _LeafRefused(status)


def _track(enclave: Enclave) -> None:
    """Execute ETRACK, if needed again after a round of interrupts; then a round of interrupts.

    When this returns, every thread that was inside has left, and EACCEPT finds the page tracked.

    Raises:
        OSError: EFAULT: ETRACK refused to begin a tracking cycle.
    """
    for last in (False, True):
        secs = enclave.swap.secs
        assert secs is not None, "a resident page has a resident SECS"
        try:
            if enclave.driver.core.leaves.etrack(secs.addr) is Status.SUCCESS:
                break
            why = Status.PREV_TRK_INCMPL.manual_name
        except Fault as fault:
            why = str(fault)
        if last:
            refuse(EFAULT, f"ETRACK: {why}")
        enclave.kick()
    enclave.kick()
