"""A finite EPC below ordinary programs: their pages are enclave pages that the core really evicts.

Each address space gets an enclave of the driver, which is never initialised, so that EADD can add a
page with its content when the program first accesses it.  From then on the paging core decides
where the content is.  While the page is in the EPC, its content is in the program's memory, or,
after the core has tested the accessed bit, with the recorder.  While the page is evicted, the
backing store has it, encrypted: EBLOCK, ETRACK, EWB, and ELDU at the next access.

Deviation: memory that the program unmaps stays in the enclave, as without SGX2, until its address
is used again; the page then gets its new content in the EPC.

Deviation: after fork, the child has no page in the EPC, and each page that it accesses is added to
an enclave of its own, as if a library OS copied the parent's memory to the child.

Source:
    ``sgx_reclaim_pages()``, arch/x86/kernel/cpu/sgx/main.c; ``sgx_vma_fault()``, encl.c.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, SecInfo, Secs
from softsgx.driver import (
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    AddPages,
    Enclave,
    Ioctl,
)
from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.space import AddressSpace
from softsgx.errors import SoftSgxError
from softsgx.host import Platform
from softsgx.hw import EpcPage
from softsgx.image import SECINFO_RWX
from softsgx.paging import FaultResult
from softsgx.runtime import InlineRuntime
from softsgx.userland import SoftProcess

__all__ = ["Epc", "EpcStore"]

_SIZE_SHIFT = 36
_RWX = PROT_READ | PROT_WRITE | PROT_EXEC
_PAGE_SHIFT = 12


class _Enclosed:
    """An address space and its enclave; its page tables, as the driver sees them.

    Attributes:
        space: the address space.
        base: the enclave's first address.
        leaving: pages that the driver has unmapped and the program may still have.
        aged: pages that were accessed, and are hidden so that the next access is seen.
        evicted: pages that the backing store has.
        stale: pages of the enclave whose content the program has given up.
        given: contents that stale pages get at their next access; a page that is not in it gets
            its initial content, zeros or those of its file.
    """

    def __init__(self, space: AddressSpace, base: int) -> None:
        self.space, self.base = space, base
        self.leaving: set[int] = set()
        self.aged: set[int] = set()
        self.evicted: set[int] = set()
        self.stale: set[int] = set()
        self.given: dict[int, int] = {}

    def page(self, linaddr: int) -> int:
        """Return the program's page of a page of the enclave."""
        return self.space.numbers.page(linaddr - self.base >> _PAGE_SHIFT)

    def flush(self) -> None:
        """Hide the pages of ``leaving`` and ``aged``."""
        pages = self.leaving | self.aged
        self.leaving.clear()
        self.aged.clear()
        if pages:
            self.space.hide(pages)


class _PageTables:
    """The page tables of all address spaces, which the driver sees as one.

    Enclaves of all address spaces are mapped in one simulated process, side by side.
    """

    def __init__(self, find: dict[int, _Enclosed]) -> None:
        self._find = find
        self._entries: dict[int, tuple[int, int]] = {}

    def install(self, linaddr: int, epc_addr: int, prot: int) -> None:
        """As :meth:`Ptes.install`; the page appears when the program's fault is answered."""
        self._entries[linaddr] = epc_addr, prot

    def zap(self, linaddr: int) -> None:
        """As :meth:`Ptes.zap`: the page is hidden before its content is written."""
        self._entries.pop(linaddr, None)
        enclosed = self._find.get(linaddr >> _SIZE_SHIFT)
        if enclosed is not None:
            page = enclosed.page(linaddr)
            if page in enclosed.space.present:
                enclosed.leaving.add(page)

    def entry(self, linaddr: int) -> tuple[int, int] | None:
        """As :meth:`Ptes.entry`."""
        return self._entries.get(linaddr)

    def protect(self, start: int, end: int, prot: int) -> None:
        """As :meth:`Ptes.protect`; nothing to do: the kernel enforces the program's rights."""

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        """As :meth:`Ptes.test_and_clear_accessed`."""
        enclosed = self._find.get(linaddr >> _SIZE_SHIFT)
        if enclosed is None:
            return False
        page = enclosed.page(linaddr)
        if enclosed.space.is_fixed(page):
            return True
        if page in enclosed.aged or page not in enclosed.space.present:
            return False
        enclosed.aged.add(page)
        return True

    def zap_pages(self, linaddrs: list[int]) -> None:
        """As :meth:`Ptes.zap_pages`."""
        for linaddr in linaddrs:
            self.zap(linaddr)

    def test_and_clear_pages(self, linaddrs: list[int]) -> list[bool]:
        """As :meth:`Ptes.test_and_clear_pages`."""
        return [self.test_and_clear_accessed(linaddr) for linaddr in linaddrs]

    def kick(self) -> None:
        """As :meth:`Ptes.kick`; nothing to do: hiding a page has flushed its translations."""


class EpcStore:
    """The machine's page store: contents of hidden pages are shared with their address spaces."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.enclosed: dict[int, _Enclosed] = {}

    def _where(self, page: EpcPage) -> tuple[_Enclosed, int] | None:
        enclosed = self.enclosed.get(page.linaddr >> _SIZE_SHIFT)
        return None if enclosed is None else (enclosed, enclosed.page(page.linaddr))

    def fill(self, page: EpcPage, data: bytes) -> None:
        """EADD or ELDU: the content is in the EPC, and hidden."""
        found = self._where(page)
        if found is not None:
            enclosed, number = found
            before = enclosed.space.hidden.get(number)
            enclosed.space.hidden[number] = self._contents.store(bytes(data))
            enclosed.evicted.discard(number)
            if before is not None:
                self._contents.release(before)

    def freeze(self, page: EpcPage) -> bytes:
        """Hide the page, so that no thread can store to it, and return its bytes."""
        found = self._where(page)
        assert found is not None, "a page of an address space that has ended is written back"
        enclosed, number = found
        if number in enclosed.space.present:
            enclosed.leaving.add(number)
            enclosed.flush()
        return self._contents.bytes(enclosed.space.hidden.get(number, self._contents.zero))

    def thaw(self, page: EpcPage) -> None:
        """The page stays, hidden until its next access."""

    def drop(self, page: EpcPage) -> None:
        """The page was evicted, or removed: release its content."""
        found = self._where(page)
        if found is not None:
            enclosed, number = found
            content = enclosed.space.hidden.pop(number, None)
            enclosed.evicted.add(number)
            if content is not None:
                self._contents.release(content)

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        """Return bytes of a page that is hidden."""
        return self.freeze(page)[offset : offset + size]

    def write(self, page: EpcPage, offset: int, data: bytes) -> None:
        """Never called: without EENTER no leaf writes to a page of an enclave."""
        raise AssertionError("a leaf writes to an enclave that no thread enters")

    def clear(self) -> None:
        """Never called: the power of this platform is not lost."""
        raise AssertionError("the power of a recording is lost")


class Epc:
    """See the module.

    Args:
        platform: a machine with ``store`` as its page store.
        store: has the contents of resident pages.
        contents: of hidden pages.

    Attributes:
        loads: how many pages were added or loaded.
    """

    is_finite = True

    def __init__(self, platform: Platform, store: EpcStore, contents: Contents) -> None:
        driver, runtime = platform.driver, platform.runtime
        assert driver is not None, "a platform that runs has its driver"
        assert isinstance(runtime, InlineRuntime), "pages are hidden by the thread that traces"
        self._runtime, self._store, self._contents = runtime, store, contents
        tables = _PageTables(store.enclosed)
        self._process = SoftProcess(
            platform.machine,
            driver,
            name="ordinary",
            make_mm=lambda process: driver.mm_type(runtime, tables, owner=process, name="ordinary"),
        )
        memory = self._process.memory
        self._source = memory.map(PAGE_BYTES)
        secinfo = memory.put(SecInfo(flags=SECINFO_RWX).pack())
        self._add = AddPages(src=self._source, offset=0, length=PAGE_BYTES, secinfo=secinfo)
        self._enclosed: dict[AddressSpace, tuple[_Enclosed, int, Enclave]] = {}
        self.loads = 0

    # --- Pager ----------------------------------------------------------------------------------

    def opened(self, space: AddressSpace) -> None:
        """Make the enclave of a new address space."""
        key = next(key for key in range(1, 1 << 11) if key not in self._store.enclosed)
        base, size = key << _SIZE_SHIFT, 1 << _SIZE_SHIFT
        secs = Secs(
            size=size,
            base=base,
            ssa_frame_size=1,
            attributes=Attributes(flags=AttributesFlags.MODE64BIT, xfrm=3),
        )
        descriptor = self._process.open()
        self._process.create(descriptor, secs.pack())
        self._process.mmap(descriptor, base, size, _RWX)
        enclosed = self._store.enclosed[key] = _Enclosed(space, base)
        enclave = self._process.enclave_file(descriptor).enclave
        self._enclosed[space] = enclosed, descriptor, enclave

    def enclave_of(self, space: AddressSpace) -> Enclave | None:
        """Return the enclave of an address space, ``None`` if that has ended."""
        found = self._enclosed.get(space)
        return None if found is None else found[2]

    def closed(self, space: AddressSpace) -> None:
        """Remove the enclave of an address space that has ended."""
        enclosed, descriptor, _enclave = self._enclosed.pop(space)
        del self._store.enclosed[enclosed.base >> _SIZE_SHIFT]
        self._process.munmap(enclosed.base, 1 << _SIZE_SHIFT)
        self._process.close(descriptor)

    def need(self, space: AddressSpace, page: int) -> None:
        """Add or load a page into the EPC, since the program accesses it.

        Raises:
            SoftSgxError: the EPC, or the backing store, has no room for it.
        """
        if self._runtime.has_pending():
            self._runtime.run_pending()
        enclosed, descriptor, enclave = self._enclosed[space]
        number = space.numbers.number(page)
        known = enclave.pages.get(number)
        if known is None:
            self._add_page(enclosed, descriptor, number, page)
            self.loads += 1
        elif known.epc is None or known.busy:
            self._load(enclosed, enclave, number)
            self.loads += 1
        if page in enclosed.stale:
            self._renew(enclosed, page)
        for other, _descriptor, _enclave in self._enclosed.values():
            other.flush()

    def _renew(self, enclosed: _Enclosed, page: int) -> None:
        """Give a page of the enclave, which is in the EPC and hidden, its new content."""
        enclosed.stale.discard(page)
        space, given = enclosed.space, enclosed.given.pop(page, None)
        if given is not None:
            data = self._contents.bytes(given)
            self._contents.release(given)
        else:
            data = space.first_bytes(page) or b""
        if self._contents.is_shared(space.hidden[page]):
            self._contents.release(space.hidden[page])
            space.hidden[page] = self._contents.store(data)
        else:
            self._contents.fill(space.hidden[page], data)

    def _add_page(self, enclosed: _Enclosed, descriptor: int, number: int, page: int) -> None:
        content = enclosed.space.hidden.get(page)
        if content is None:
            data = enclosed.space.first_bytes(page) or b""
        else:
            data = self._contents.bytes(content)
        self._process.memory.write(self._source, data.ljust(PAGE_BYTES, b"\0"))
        self._add.offset = number << _PAGE_SHIFT
        try:
            self._process.ioctl(descriptor, Ioctl.ENCLAVE_ADD_PAGES, self._add)
        except OSError as error:
            raise SoftSgxError(f"EPC: no room for a page ({error.strerror})") from None

    def _load(self, enclosed: _Enclosed, enclave: Enclave, number: int) -> None:
        linaddr = enclosed.base + (number << _PAGE_SHIFT)
        while True:
            result = self._process.mm.fault(linaddr, PROT_READ)
            if result is FaultResult.SIGBUS:
                raise SoftSgxError(f"EPC: a page cannot be loaded: {enclave.refusal}")
            if result is FaultResult.NOPAGE and enclave.pages[number].epc is not None:
                return  # no task has run since the fault that could evict it
            self._runtime.run_pending()

    def forgotten(self, space: AddressSpace, page: int) -> bool:
        """The program has dropped a page's content; return whether the enclave has the page."""
        enclosed, _descriptor, enclave = self._enclosed[space]
        if space.numbers.number(page) not in enclave.pages:
            return False
        enclosed.stale.add(page)
        enclosed.leaving.discard(page)
        enclosed.aged.discard(page)
        given = enclosed.given.pop(page, None)
        if given is not None:
            self._contents.release(given)
        return True

    def evicted(self, space: AddressSpace) -> set[int]:
        """Return the pages that the backing store has."""
        enclosed = self._enclosed[space][0]
        return enclosed.evicted - enclosed.stale | enclosed.given.keys()

    def give(self, space: AddressSpace, page: int, content: int) -> None:
        """Give a hidden page another content, which the EPC gets at the page's next access."""
        enclosed, _descriptor, enclave = self._enclosed[space]
        if space.numbers.number(page) in enclave.pages:
            enclosed.stale.add(page)
            enclosed.given[page] = content
        else:
            space.hidden[page] = content

    def forked(self, space: AddressSpace) -> None:
        """Hide the pages that fork has copied: no enclave has them yet."""
        space.collect()

    def take(self, space: AddressSpace, page: int) -> int | None:
        """Return the content of a hidden page, shared; ``None``: its initial content."""
        enclosed, _descriptor, enclave = self._enclosed[space]
        if page in enclosed.stale:
            given = enclosed.given.get(page)
            if given is not None:
                self._contents.share(given)
            return given
        number = space.numbers.number(page)
        known = enclave.pages.get(number)
        if known is not None and known.epc is None:
            self._load(enclosed, enclave, number)
        content = space.hidden.get(page)
        if content is not None:
            self._contents.share(content)
        return content
