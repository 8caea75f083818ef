"""An open ``/dev/sgx_vepc``: EPC for a guest, page by page as it is touched.

A file is one virtual EPC; a mapping of it is what a guest gets as an EPC section.  Until a page is
touched there is none; from then on the core may take it and a fault brings it back.

Deviation: one table of a mapping stands for the VMM's page tables and the guest's second-level
tables, which follow them.  A fork of the VMM is not modelled: its child would not get the mapping.

Source:
    arch/x86/kernel/cpu/sgx/virt.c; its oversubscription branch in intel/kvm-sgx.
"""

from __future__ import annotations

from enum import Enum
from errno import EBUSY, EINVAL, ENOTTY
from typing import TYPE_CHECKING, NoReturn

from softsgx.arch import PAGE_BYTES, RdInfo, RdInfoStatus, Status
from softsgx.defects import Defect
from softsgx.hw import Fault
from softsgx.kvm import motion
from softsgx.kvm.fate import Fate
from softsgx.kvm.page import VepcPage
from softsgx.kvm.swap import VepcSwap
from softsgx.paging import Claim, Counted, EpcBusy, LoadFailed, NoEpc

if TYPE_CHECKING:
    from softsgx.kvm.device import VepcDevice
    from softsgx.kvm.monitor import Monitor

__all__ = [
    "MAP_PRIVATE",
    "MAP_SHARED",
    "SGX_IOC_VEPC_REMOVE_ALL",
    "FaultResult",
    "Vepc",
    "VepcMapping",
]

SGX_IOC_VEPC_REMOVE_ALL = 0xA404
"""_IO(SGX_MAGIC, 0x04)."""
MAP_SHARED, MAP_PRIVATE = 1, 2
_ENDLESS = 1 << 36  # a virtual EPC has no size of its own


def _refuse(errno: int, why: str) -> NoReturn:
    raise OSError(errno, why)


class FaultResult(Enum):
    """How a fault of a mapping ended."""

    NOPAGE = "nopage"
    """Repeat the access."""
    RETRY = "retry"
    """Repeat the access: the fault has waited for an EPC page with no lock held."""
    SIGBUS = "sigbus"
    """There is no EPC page, or the guest has stopped."""


class VepcMapping:
    """A shared mapping of a virtual EPC; holds a reference to the file.

    Attributes:
        vepc: the file.
        offset: index of the first page.
        pages: how many.
        entries: EPC address by index, of the pages that a processor can reach.
        accessed: indices that were reached since this was last looked at.
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
        """munmap(2)."""
        vepc = self.vepc
        with vepc.monitor.lock:
            self.entries.clear()
            vepc.mappings.remove(self)
        vepc.monitor.quiesce()
        vepc.put()


class Vepc(Counted):
    """One open file; ``Monitor.lock`` protects it.

    Attributes:
        base: guest-physical address of its first page.
        pages: pages that were ever touched, by index.
        mappings: where it is mapped.
        swap: backing and VA slots.
        refusal: why the last page that could not be loaded could not.
    """

    def __init__(self, device: VepcDevice, monitor: Monitor, base: int) -> None:
        super().__init__(device.core.runtime)
        self.device, self.monitor, self.base = device, monitor, base
        self.pages: dict[int, VepcPage] = {}
        self.mappings: list[VepcMapping] = []
        self.refusal = ""
        self._closed = False
        self.swap = self._make_swap()
        monitor.vepcs.append(self)
        device.vepcs.append(self)

    def _make_swap(self) -> VepcSwap:
        return VepcSwap(
            self.device.core,
            self.device.backing(_ENDLESS),
            pages=_ENDLESS,
            base=0,
            lock=self.monitor.lock,
            pin=self,
            kick=self.monitor.kick,
            group=self.monitor.group,
        )

    def close(self) -> None:
        """Close it; mappings keep it."""
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
        assert self.get(), "a file that is gone is mapped"
        return mapping

    def ioctl(self, cmd: int, arg: int = 0) -> int:
        """SGX_IOC_VEPC_REMOVE_ALL: make every page unused, without giving any back.

        The guest's processors must not run in its enclaves.

        Returns:
            SECS pages that are left because they have children; a second round on all files that
            share enclaves must give 0.

        Raises:
            OSError: ENOTTY: no such command; EINVAL: an argument; EBUSY: a processor is inside an
                enclave, or pages are being removed by somebody else.
        """
        if cmd != SGX_IOC_VEPC_REMOVE_ALL:
            _refuse(ENOTTY, f"ioctl {cmd:#x}")
        if arg:
            _refuse(EINVAL, f"argument {arg:#x}")
        left, monitor = 0, self.monitor
        with monitor.lock:
            for index in list(self.pages):
                page = self.pages[index]
                while page.reclaiming:
                    monitor.changed.wait()
                with monitor.working():
                    ending = self._eremove(page)
                if ending is Status.CHILD_PRESENT:
                    left += 1
                elif ending is not Status.SUCCESS:
                    _refuse(EBUSY, f"EREMOVE of page {index}: {motion.name_of(ending)}")
        monitor.reap()
        return left

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
        """Let ``mapping`` reach page ``index``, loading or making it.

        Args:
            mapping: through which it was touched.
            index: of the page.
            retry: whether to wait for an EPC page, with no lock held, and ask for another try.
            pins: keep the page until :meth:`unpin`, and note it here.
            claim: the processor's that touched it.

        Returns:
            What whoever touched it sees; nothing is locked then.  A page that does not
            authenticate has stopped the guest; any other failure may pass.

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
            while page.reclaiming and retry and monitor.stopped is None:
                monitor.changed.wait()
            if monitor.stopped is not None or page.reclaiming:
                return FaultResult.SIGBUS
            not_mapped = Defect.RESIDENT_VEPC_PAGE_NOT_MAPPED in self.device.defects
            if not_mapped and page.epc is not None and not page.stuck:
                return FaultResult.NOPAGE
            try:
                with monitor.working():
                    usable = motion.settle(page, claim)
                if usable is not None:
                    # Last: the guest must never see the page half loaded.
                    mapping.entries[index] = usable.addr
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
        if busy is None:  # a batch of reclaim is about to look at it
            monitor.runtime.yield_now()
        else:
            core.wait_for_page(busy)
        return FaultResult.RETRY

    def _page(self, index: int) -> VepcPage | None:
        """Return the page, with room for its version; ``None`` when there is no EPC for that."""
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
        """Undo one ``pins`` of :meth:`fault`; the lock is held."""
        assert page.pins, f"{page!r} is not pinned"
        page.pins -= 1

    # --- what the reclaimer asks; the lock is held where it says so -----------------------------

    def test_and_clear_accessed(self, index: int) -> bool:
        """Return whether a processor has reached page ``index`` since the last call."""
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

    def _eremove(self, page: VepcPage) -> Status | Fault:
        """Make ``page`` unused wherever it is; a SECS with children of either kind stays."""
        monitor = self.monitor
        leaves = monitor.host.leaves
        if page.evicted_children:
            return Status.CHILD_PRESENT
        if page.epc is None:
            if page.evicted is not None:
                motion.drop(page)
            return Status.SUCCESS
        at = page.epc.addr
        ending = monitor.leaf(lambda: leaves.eremove(at))
        if ending is Status.SUCCESS:
            # Unused, whoever had blocked it.
            page.epc.blocked = False
        return ending

    def remove(self, page: VepcPage) -> bool:
        """Make ``page`` unused and give its EPC page back; the lock is held.

        Returns:
            Whether it is gone.
        """
        monitor = self.monitor
        epc = page.epc
        if epc is not None and not monitor.host.unmark_reclaimable(epc):
            return False  # a batch has it
        ending = self._eremove(page)
        if ending is not Status.SUCCESS:
            if epc is not None:
                monitor.host.mark_reclaimable(epc)
            return False
        if epc is not None:
            monitor.host.free(epc)
            page.epc = None
            monitor.resident -= 1
        return True

    def free_all(self) -> None:
        """Give back what can be given back: a pass of :meth:`Monitor.reap`; the lock is held."""
        for page in self.pages.values():
            if not page.reclaiming:
                self.remove(page)

    def power_lost(self) -> None:
        """Everything in the EPC is gone, and what was evicted is dead; the lock is held."""
        monitor = self.monitor
        self.unmap_all()
        for page in self.pages.values():
            assert not page.reclaiming, f"{page!r} is being reclaimed while power goes"
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
            page.evicted_children = page.owed = 0
        # Its VA pages are no VA pages any more.
        for va_page in self.swap.va.pages():
            self.swap.va.unlink(va_page)

    def _end(self) -> None:
        """The last reference is gone.

        Source:
            sgx_vepc_release(), virt.c.
        """
        monitor, zombies = self.monitor, self.device.zombies
        with monitor.lock, monitor.working():
            monitor.kick()
            pages = list(self.pages.values())
            pages = [page for page in pages if not self.remove(page)]
            zombies += [page for page in pages if not self.remove(page)]
            self.end()
        self.device.retry_zombies()

    def end(self) -> None:
        """Forget the file once nothing is left of it; the lock is held."""
        left = any(page.vepc is self for page in self.device.zombies)
        if self in self.monitor.vepcs and not left:
            self.monitor.vepcs.remove(self)
            self.device.vepcs.remove(self)
            self.swap.destroy()

    # --- what there is --------------------------------------------------------------------------

    def why_not(self, page: VepcPage) -> str | None:
        """Return why ``page``, which is resident, could not leave now; the lock is held."""
        if page.pins:
            return "pinned"
        if page.epc is None or page.reclaiming:
            return None
        info, at = RdInfo(), page.epc.addr
        ending = self.monitor.leaf(lambda: self.monitor.host.leaves.erdinfo(info, at))
        if ending is Status.SUCCESS and info.status & RdInfoStatus.CHILDPRESENT:
            return "secs with children"
        return "ballast" if not self.monitor.may_shrink() else None

    def check_invariants(self) -> None:
        """Compare counts with a recount; call while no task runs here."""
        self.swap.check_invariants()
        for page in self.pages.values():
            assert page.epc is None or page.evicted is None, f"{page!r} is in two places"
            assert not page.reclaiming and not page.pins, f"{page!r} is left reclaiming or pinned"
            for mapping in self.mappings:
                entry = mapping.entries.get(page.index)
                assert entry is None or (page.epc is not None and entry == page.epc.addr), (
                    f"{page!r} is mapped to {entry:#x}"
                )
            evicted = page.evicted
            if evicted is not None:
                assert (evicted.secs is not None) == (evicted.fate is Fate.CHILD), f"{page!r}"
            assert page.evicted_children >= 0, f"{page!r} has less than no children"
