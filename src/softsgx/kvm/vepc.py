"""An open ``/dev/sgx_vepc``: EPC for a guest, allocated page by page at the first touch.

An open file is one virtual EPC; a guest sees a mapping of it as an EPC section.  A page gets an EPC
page when it is first touched; from then on the core may evict it, and a fault loads it.

Deviation: a mapping has one table for the VMM's page tables and the guest's second-level tables.  A
fork of the VMM is not modelled: its child would not get the mapping.

Source:
    arch/x86/kernel/cpu/sgx/virt.c; its oversubscription branch in intel/kvm-sgx.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOTTY
from mmap import MAP_SHARED
from typing import TYPE_CHECKING, NoReturn

from softsgx.arch import PAGE_BYTES, RdInfo, RdInfoStatus, Status
from softsgx.defects import Defect
from softsgx.kvm.evicted_page import PageKind
from softsgx.kvm.loading import drop, make_resident
from softsgx.kvm.page import VepcPage
from softsgx.kvm.swap import VepcSwap
from softsgx.paging import (
    Claim,
    EpcBusy,
    FaultResult,
    LeafResult,
    LoadFailed,
    NoEpc,
    RefCounted,
    result_name,
)

if TYPE_CHECKING:
    from softsgx.kvm.device import VepcDevice
    from softsgx.kvm.monitor import Monitor

__all__ = ["SGX_IOC_VEPC_REMOVE_ALL", "Vepc", "VepcMapping"]

SGX_IOC_VEPC_REMOVE_ALL = 0xA404
"""_IO(SGX_MAGIC, 0x04)."""
_MOST_PAGES = 1 << 36
"""Larger than any virtual EPC: a file has no size, only its mappings have."""


def _refuse(errno: int, why: str) -> NoReturn:
    raise OSError(errno, why)


class VepcMapping:
    """A shared mapping of a virtual EPC; holds a reference to the file.

    Attributes:
        vepc: the file.
        offset: index of the first page.
        pages: how many.
        entries: EPC address by index, of the pages that the guest's processors can reach.
        accessed: indices of the pages used since the last :meth:`Vepc.test_and_clear_accessed`.
    """

    def __init__(self, vepc: Vepc, offset: int, pages: int) -> None:
        self.vepc, self.offset, self.pages = vepc, offset, pages
        self.entries: dict[int, int] = {}
        self.accessed: set[int] = set()

    def fault(
        self,
        index: int,
        *,
        retry: bool = True,
        pins: list[VepcPage] | None = None,
        claim: Claim | None = None,
    ) -> FaultResult:
        """Handle a fault on page ``index`` of the file; see :meth:`Vepc.fault`."""
        assert self.offset <= index < self.offset + self.pages, f"page {index} is not mapped"
        return self.vepc.fault(self, index, retry=retry, pins=pins, claim=claim)

    def unmap(self) -> None:
        """Remove the mapping: munmap(2)."""
        vepc = self.vepc
        with vepc.monitor.lock:
            self.entries.clear()
            vepc.mappings.remove(self)
        vepc.monitor.quiesce()
        vepc.put()


class Vepc(RefCounted):
    """One open file; ``Monitor.lock`` protects it.  Its descriptor and its mappings reference it.

    Attributes:
        base: guest-physical address of its first page.
        pages: pages that were ever touched, by index.
        mappings: its mappings.
        swap: backing and VA slots.
        refusal: the reason of the last failed load.
    """

    def __init__(self, device: VepcDevice, monitor: Monitor, base: int) -> None:
        super().__init__(device.core.runtime)
        self.device, self.monitor, self.base = device, monitor, base
        self.pages: dict[int, VepcPage] = {}
        self.mappings: list[VepcMapping] = []
        self.refusal = ""
        self._closed = False
        self.swap = VepcSwap(
            device.core,
            device.backing(_MOST_PAGES),
            pages=_MOST_PAGES,
            lock=monitor.lock,
            pin=self,
            group=monitor.group,
        )
        monitor.vepcs.append(self)
        device.vepcs.append(self)

    def close(self) -> None:
        """Close its descriptor; the device exists until it is no longer mapped."""
        assert not self._closed, "a virtual EPC is closed twice"
        self._closed = True
        self.put()

    # --- system calls ---------------------------------------------------------------------------

    def mmap(self, pages: int, *, offset: int = 0, flags: int = MAP_SHARED) -> VepcMapping:
        """Map ``pages`` pages from page ``offset``.

        Raises:
            OSError: EINVAL: not MAP_SHARED, or nothing to map.
        """
        if not flags & MAP_SHARED or pages <= 0:
            _refuse(EINVAL, f"mmap of {pages} pages with flags {flags:#x}")
        mapping = VepcMapping(self, offset, pages)
        with self.monitor.lock:
            self.mappings.append(mapping)
        assert self.get(), "a file without references is mapped"
        return mapping

    def ioctl(self, cmd: int, arg: int = 0) -> int:
        """SGX_IOC_VEPC_REMOVE_ALL: EREMOVE every page; the file keeps its EPC pages.

        The guest's processors must not run in its enclaves.

        Returns:
            The SECS pages that remain because they have children.  When files share enclaves, a
            second round on each of them must return 0.

        Raises:
            OSError: ENOTTY: no such command; EINVAL: an argument is given; EBUSY: EREMOVE of a
                page failed, since a processor is inside its enclave or another leaf holds it.
        """
        if cmd != SGX_IOC_VEPC_REMOVE_ALL:
            _refuse(ENOTTY, f"ioctl {cmd:#x}")
        if arg:
            _refuse(EINVAL, f"argument {arg:#x}")
        remaining, monitor = 0, self.monitor
        with monitor.lock:
            for index in list(self.pages):
                page = self.pages[index]
                while page.being_reclaimed:
                    monitor.changed.wait()
                with monitor.host_working():
                    result = self._eremove(page)
                if result is Status.CHILD_PRESENT:
                    remaining += 1
                elif result is not Status.SUCCESS:
                    _refuse(EBUSY, f"EREMOVE of page {index}: {result_name(result)}")
        monitor.reap()
        return remaining

    # --- faults ---------------------------------------------------------------------------------

    def fault(
        self,
        mapping: VepcMapping,
        index: int,
        *,
        retry: bool = True,
        pins: list[VepcPage] | None = None,
        claim: Claim | None = None,
    ) -> FaultResult:
        """Map page ``index`` through ``mapping``; load or make it first.

        Args:
            mapping: the mapping through which a processor touched it.
            index: of the page.
            retry: whether to wait for an EPC page, with no lock held, and return RETRY.
            pins: if given, pin the page until :meth:`unpin`, and append it here.
            claim: of the processor that touched it.

        Returns:
            NOPAGE, RETRY or SIGBUS; no lock is held then.  A page that does not authenticate has
            stopped the guest; after any other failure a later fault may succeed.

        Source:
            sgx_vepc_fault(), __sgx_vepc_fault(), virt.c.
        """
        core, monitor = self.device.core, self.monitor
        page = self._page(index)
        if page is None:
            return FaultResult.SIGBUS
        busy: EpcBusy | None = None
        refusal = ""
        with monitor.lock:
            while page.being_reclaimed and retry and monitor.stopped is None:
                monitor.changed.wait()
            if monitor.stopped is not None or page.being_reclaimed:
                return FaultResult.SIGBUS
            not_mapped = Defect.RESIDENT_VEPC_PAGE_NOT_MAPPED in self.device.defects
            if not_mapped and page.epc is not None and not page.blocked_by_host:
                return FaultResult.NOPAGE
            try:
                with monitor.host_working():
                    epc = make_resident(page, claim)
                if epc is not None:
                    # Last, so that the guest never sees a page that is not loaded completely.
                    mapping.entries[index] = epc.addr
                    if pins is not None:
                        page.pins += 1
                        pins.append(page)
                    return FaultResult.NOPAGE
            except EpcBusy as error:
                busy = error
            except NoEpc:
                return FaultResult.SIGBUS
            except LoadFailed as error:
                self.refusal = refusal = error.result
        if refusal == Status.MAC_COMPARE_FAIL.manual_name:
            monitor.stop(f"page {page.gpa:#x} cannot be loaded: {refusal}")
        elif refusal:
            return FaultResult.SIGBUS
        monitor.reap()
        if not monitor.alive or not retry:
            return FaultResult.SIGBUS
        if busy is None:  # a reclaim batch has the page
            monitor.runtime.yield_now()
        else:
            core.wait_for_page(busy)
        return FaultResult.RETRY

    def _page(self, index: int) -> VepcPage | None:
        """Return the page, with a VA slot promised; ``None``: there is no EPC for a VA page."""
        page = self.pages.get(index)
        if page is not None and page.promised:
            return page
        try:
            self.swap.grow()
        except (NoEpc, LoadFailed):
            return None
        with self.monitor.lock:
            page = self.pages.setdefault(index, VepcPage(self, index))
            if page.promised:
                self.swap.shrink()
            page.promised = True
        return page

    def unpin(self, page: VepcPage) -> None:
        """Undo one pin of :meth:`fault`; the lock is held."""
        assert page.pins, f"{page!r} is not pinned"
        page.pins -= 1

    # --- mappings -------------------------------------------------------------------------------

    def test_and_clear_accessed(self, index: int) -> bool:
        """Return whether a processor has used page ``index`` since the last call."""
        young = False
        for mapping in list(self.mappings):
            young |= index in mapping.accessed
            mapping.accessed.discard(index)
        return young

    def unmap(self, page: VepcPage) -> None:
        """Remove every entry of ``page``; the lock is held."""
        for mapping in self.mappings:
            mapping.entries.pop(page.index, None)
            mapping.accessed.discard(page.index)

    def unmap_all(self) -> None:
        """Remove every entry; the lock is held."""
        for mapping in self.mappings:
            mapping.entries.clear()

    def page_at(self, gpa: int) -> VepcPage | None:
        """Return the page at a guest-physical address."""
        return self.pages.get((gpa - self.base) // PAGE_BYTES) if gpa % PAGE_BYTES == 0 else None

    # --- removal; the lock is held --------------------------------------------------------------

    def _eremove(self, page: VepcPage) -> LeafResult:
        """EREMOVE ``page``, or forget it if it is evicted; a SECS with any child stays."""
        monitor = self.monitor
        leaves = monitor.host.leaves
        if page.evicted_children:
            return Status.CHILD_PRESENT
        if page.epc is None:
            if page.evicted is not None:
                drop(page)
            return Status.SUCCESS
        at = page.epc.addr
        result = monitor.host_leaf(lambda: leaves.eremove(at))
        if result is Status.SUCCESS:
            page.epc.blocked = False  # an unused page is not blocked
        return result

    def remove(self, page: VepcPage) -> bool:
        """EREMOVE ``page`` and free its EPC page; the lock is held.

        Returns:
            Whether that succeeded.
        """
        monitor = self.monitor
        epc = page.epc
        if epc is not None and not monitor.host.unmark_reclaimable(epc):
            return False  # a batch has it
        result = self._eremove(page)
        if result is not Status.SUCCESS:
            if epc is not None:
                monitor.host.mark_reclaimable(epc)
            return False
        if epc is not None:
            monitor.host.free(epc)
            page.epc = None
            monitor.resident -= 1
        return True

    def free_all(self) -> None:
        """Free every page that EREMOVE accepts: a pass of :meth:`Monitor.reap`; lock held."""
        for page in self.pages.values():
            if not page.being_reclaimed:
                self.remove(page)

    def power_lost(self) -> None:
        """Forget all pages: resident ones are lost, evicted ones cannot be loaded; lock held."""
        monitor = self.monitor
        self.unmap_all()
        for page in self.pages.values():
            assert not page.being_reclaimed, f"{page!r} is being reclaimed while power goes"
            if page.epc is not None:
                unmarked = monitor.host.unmark_reclaimable(page.epc)
                assert unmarked, f"{page!r} is being reclaimed while power goes"
                monitor.host.free(page.epc)
                monitor.resident -= 1
            monitor.counters.lost += page.epc is not None or page.evicted is not None
            if page.evicted is not None:
                self.swap.drop(page.evicted.entry)
            elif page.promised:
                self.swap.shrink()
            page.epc = page.evicted = None
            page.promised = False
            page.evicted_children = page.deferred_edecvirtchild = 0
        # Power loss has invalidated its VA pages too.
        for va_page in self.swap.va.pages():
            self.swap.va.unlink(va_page)

    def _destroy(self) -> None:
        """The last reference was given back: free every page.

        Source:
            sgx_vepc_release(), virt.c.
        """
        monitor, zombies = self.monitor, self.device.zombies
        with monitor.lock, monitor.host_working():
            monitor.kick()
            pages = list(self.pages.values())
            pages = [page for page in pages if not self.remove(page)]
            zombies += [page for page in pages if not self.remove(page)]
            self.forget_if_empty()
        self.device.retry_zombies()

    def forget_if_empty(self) -> None:
        """Forget the closed file unless it has zombies; the lock is held."""
        has_zombies = any(page.vepc is self for page in self.device.zombies)
        if self in self.monitor.vepcs and not has_zombies:
            self.monitor.vepcs.remove(self)
            self.device.vepcs.remove(self)
            self.swap.destroy()

    # --- checks ---------------------------------------------------------------------------------

    def unreclaimable_reason(self, page: VepcPage) -> str | None:
        """Return why ``page``, which is resident, cannot be evicted now; the lock is held.

        ``None``: it can be evicted, or is being evicted.
        """
        if page.pins:
            return "pinned"
        if page.epc is None or page.being_reclaimed:
            return None
        info, at = RdInfo(), page.epc.addr
        result = self.monitor.host_leaf(lambda: self.monitor.host.leaves.erdinfo(info, at))
        if result is Status.SUCCESS and info.status & RdInfoStatus.CHILDPRESENT:
            return "secs with children"
        return "ballast" if not self.monitor.above_ballast() else None

    def check_invariants(self) -> None:
        """Check each page and each entry of a mapping; call it while no task uses them."""
        self.swap.check_invariants()
        for page in self.pages.values():
            assert page.epc is None or page.evicted is None, f"{page!r} is in two places"
            assert not page.being_reclaimed and not page.pins, f"{page!r} is reclaimed or pinned"
            for mapping in self.mappings:
                entry = mapping.entries.get(page.index)
                assert entry is None or (page.epc is not None and entry == page.epc.addr), (
                    f"{page!r} is mapped to {entry:#x}"
                )
            evicted = page.evicted
            if evicted is not None:
                assert (evicted.secs is not None) == (evicted.kind is PageKind.CHILD), f"{page!r}"
            assert page.evicted_children >= 0, f"{page!r} has fewer than 0 children"
