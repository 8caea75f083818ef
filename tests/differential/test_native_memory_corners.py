"""What random steps of ``test_native_memory`` meet seldom, in each implementation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.differential.test_native_memory import ENCLU, Site, compare, sites
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx.arch import PAGE_BYTES, EpcAddr, PageType
from softsgx.driver import FaultResult
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_maps import BLOCK_SHIFT
from softsgx.engines.native.memory.store import NativeStore, StoredPage
from softsgx.hw import EpcPage

pytestmark = [
    needs_tracing,
    pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd"),
]

BLOCK_BYTES = 1 << BLOCK_SHIFT
WRITABLE = 0  # number of a page with rights R W


@pytest.fixture
def made() -> Iterator[list[Site]]:
    with sites("userfaultfd") as some:
        yield some


def out(site: Site, number: int) -> None:
    """Let the page be evicted, and the first of those in use be the one that is freed last."""
    if site.page(number).epc is not None:
        assert site.do("evict", number, 0)


def next_page(site: Site) -> StoredPage:
    """The EPC page that the next load takes."""
    (node,) = site.system.core._pool.nodes.values()
    page = site.system.machine.page_at(node.freed[0].addr)
    assert page is not None
    return site.store.record(page)


# --- pages that become usable ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PageType.REG, PageType.TCS, PageType.TRIM])
@pytest.mark.parametrize("flag", ["", "pending", "modified"])
def test_only_pages_that_the_program_can_use_are_shown(
    made: list[Site], kind: PageType, flag: str
) -> None:
    for site in made:
        site.do("fault", WRITABLE, 0)
        entry: Any = site.epcm(WRITABLE)
        entry.pt = kind
        if flag:
            setattr(entry, flag, True)
        site.store.refresh(entry)
        out(site, WRITABLE)
        site.mm.fault(site.address(WRITABLE), 1, site.process)
        assert site.store.is_shown(site.stored(WRITABLE).page) is (
            kind is PageType.REG and not flag
        )
    compare(made, (kind, flag))


def older_entry(site: Site, at: int, _page: StoredPage) -> None:
    """The address has the entry of another page."""
    site.do("fault", 1, 0)
    other = site.stored(1)
    site.table._entries[at] = other
    other.maps = 2


def mapped_elsewhere(site: Site, at: int, page: StoredPage) -> None:
    page.memory, page.linaddr, page.maps = site.memory, at, 1
    site.other._entries[at] = page


def shown_already(site: Site, _at: int, page: StoredPage) -> None:
    """The page has lost its entry, and is not hidden yet."""
    site.do("fault", WRITABLE, 0)
    site.do("zap", WRITABLE, 0)
    assert page.rights and site.store._leaving == [page]


def poisoned(_site: Site, _at: int, page: StoredPage) -> None:
    page.poisoned = True


def only_user_is_another(site: Site, _at: int, _page: StoredPage) -> None:
    site.memory.users[:] = [site.other]


def first_use(site: Site, _at: int, page: StoredPage) -> None:
    """The store has not known the EPC page."""
    site.store._pages.remove(page)
    page.page.stored = None


def no_hole(site: Site, at: int, _page: StoredPage) -> None:
    """UFFDIO_COPY fails: the file has a page there."""
    os.pwrite(site.file, b"\2" * PAGE_BYTES, at)


@pytest.mark.parametrize(
    "state",
    [
        *(older_entry, mapped_elsewhere, shown_already, poisoned, only_user_is_another, first_use),
        no_hole,
    ],
    ids=lambda state: state.__name__,
)
def test_a_page_is_mapped_over_what_is_there(
    made: list[Site], state: Callable[[Site, int, StoredPage], None]
) -> None:
    for site in made:
        out(site, WRITABLE)
        if state is older_entry:
            out(site, 1)
        at = site.address(WRITABLE)
        state(site, at, next_page(site))
        assert site.mm.fault(at, 1, site.process) is FaultResult.NOPAGE
    compare(made, state)


class OtherStore(NativeStore):
    """A store of another class, which C code asks."""

    __slots__ = ()
    log: list[str]

    def mapped(self, page: EpcPage, *arguments: Any) -> None:
        OtherStore.log.append("mapped")
        super().mapped(page, *arguments)

    def unmapped(self, record: StoredPage) -> None:
        OtherStore.log.append("unmapped")
        super().unmapped(record)


def test_a_store_of_another_class_is_asked_itself(made: list[Site]) -> None:
    for site in made:
        out(site, WRITABLE)
        kind = type(site.store)
        if kind is NativeStore:
            OtherStore.log = []
            site.store.__class__ = OtherStore
        site.do("fault", WRITABLE, 0)
        site.do("age", WRITABLE, 0)
        out(site, WRITABLE)
        site.do("go on", WRITABLE, 0)
        if kind is NativeStore:
            site.store.__class__ = NativeStore
            assert OtherStore.log == ["mapped", "unmapped"]
    compare(made, "evicted")


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        bytes(PAGE_BYTES),
        b"\x5a" * PAGE_BYTES,
        bytes(PAGE_BYTES - 1) + b"\1",
        b"\1" + bytes(PAGE_BYTES - 1),
        bytes(PAGE_BYTES // 2) + b"\1" + bytes(PAGE_BYTES // 2 - 1),
    ],
    ids=["zeros", "the same", "last", "first", "middle"],
)
def test_a_page_comes_back_with_its_bytes(made: list[Site], data: bytes) -> None:
    for site in made:
        site.do("fault", WRITABLE, 0)
        page: Any = site.epcm(WRITABLE)
        site.store.write(page, 0, data)
        site.do("zap", WRITABLE, 0)
        site.hide()
        assert (page.stored.data is not None) is any(data)
        out(site, WRITABLE)
        site.do("fault", WRITABLE, 0)
        assert os.pread(site.file, PAGE_BYTES, site.address(WRITABLE)) == data
    compare(made, "back")


def test_a_page_that_is_still_shown_leaves_with_its_bytes(made: list[Site]) -> None:
    for site in made:
        site.do("fault", WRITABLE, 0)
        page, at = site.page(WRITABLE), site.address(WRITABLE)
        data = os.pread(site.file, PAGE_BYTES, at)
        vma: Any = site.mm.find(at)
        assert any(data) and page.epc.lru.isolate_page(page.epc) and page.prepare()
        vma.enclave = None  # its entry stays
        assert page.block()
        vma.enclave = site.enclave
        record = site.stored(WRITABLE)
        assert site.store.is_shown(record.page) and page.write()
        site.system.core.free(_untracked(site, record))
        page.put()
        site.table._entries.pop(at)
        record.maps = 0
        assert site.mm.fault(at, 1, site.process) is FaultResult.NOPAGE
        assert os.pread(site.file, PAGE_BYTES, at) == data


def _untracked(site: Site, stored: StoredPage) -> Any:
    """An EPC page that was evicted, off its list."""
    record: Any = site.system.core._pool.records[stored.page.addr]
    record.tracked, record.lru = False, None
    return record


def test_nothing_is_asked_of_a_store_without_pages_that_leave(made: list[Site]) -> None:
    for site in made:
        site.do("fault", WRITABLE, 0)
        site.hide()
        assert site.store.is_shown(site.stored(WRITABLE).page)
    compare(made, "hidden")


# --- hiding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "numbers", [(0,), (0, 1), (0, 2), (0, 1, 3, 4, 8), (8, 6, 4), (5, 4, 3, 1)]
)
def test_runs_of_pages_are_hidden_with_their_own_bytes(
    made: list[Site], numbers: tuple[int, ...], running: bool
) -> None:
    for site in made:
        for number in range(9):
            site.do("fault", number, 0)
        before = [
            (site.stored(number), os.pread(site.file, PAGE_BYTES, site.address(number)))
            for number in numbers
        ]
        for number in numbers:
            site.do("zap", number, 0)
        site.running = running
        site.hide()
        site.running = False
        for record, data in before:
            assert (record.data or bytes(PAGE_BYTES)) == data and not record.rights
    compare(made, numbers)


@pytest.mark.parametrize("shared", [False, True])
def test_pages_of_a_file_with_two_users_are_hidden_from_both(
    made: list[Site], shared: bool
) -> None:
    for site in made:
        if shared:
            site.do("join", 0, 0)
        for number in (0, 1, 3):
            site.do("fault", number, 0)
            site.do("zap", number, 0)
        site.hide()
        assert bool(site.note.log) is shared
    compare(made, "hidden")


def test_pages_of_two_files_are_hidden_each_in_its_own(made: list[Site]) -> None:
    for site in made:
        other = EnclaveMemory(os.memfd_create("other", os.MFD_ALLOW_SEALING))
        for number in (0, 1):
            site.do("fault", number, 0)
            site.do("zap", number, 0)
        record, at = site.stored(1), site.address(1)
        os.pwrite(other.fd, b"\7" * PAGE_BYTES, at)
        other.pages[at] = 3
        del site.memory.pages[at]
        record.memory = other
        site.hide()
        assert record.data == b"\7" * PAGE_BYTES
        record.memory = site.memory
        assert not other.pages and not site.store._leaving
        other.close()
    compare(made, "hidden")


@pytest.mark.parametrize("around", [[], [-1, 0, 1, 2], [-3, 512, 1024]], ids=str)
def test_pages_of_several_blocks_are_no_longer_known(made: list[Site], around: list[int]) -> None:
    """Of a run over an end of 2 MiB, or of two; those beside it keep what is known of them."""
    for site in made:
        end = (site.base | BLOCK_BYTES - 1) + 1
        hidden = [end + at * PAGE_BYTES for at in range(-2, 515) if at not in around]
        beside = [
            end + at * PAGE_BYTES for at in (-3, *(at for at in around if -3 < at < 515), 515)
        ]
        fetches: Any = site.pager
        fetches = fetches._fetches
        for at in (*hidden, *beside):
            fetches.rights[at] = 3
        for number, at in enumerate((*hidden, *beside)):
            page = EpcPage(EpcAddr(number << 12 | 1 << 40))
            page.fill(PageType.REG, rwx=3, linaddr=at)
            site.store.mapped(page, site.memory, at)
            if at not in beside:
                site.store.unmapped(site.store.record(page))
        site.hide()
        for rights in (site.memory.pages, fetches.rights):
            assert rights == dict.fromkeys(beside, 3)


@pytest.mark.parametrize("marked", [0, 1, 2])
def test_any_page_of_those_that_are_hidden_can_have_marks(made: list[Site], marked: int) -> None:
    first = next(at for at, rights in enumerate(made[0].rights) if rights == 7)
    for site in made:
        for number in range(first, first + 3):
            site.do("fault", number, 0)
            site.do("zap", number, 0)
        at = site.address(first + marked)
        own = bytearray(site.memory.read(at, PAGE_BYTES))
        own[8:9] = ENCLU[:1]  # what a mark replaces
        site.memory.mark(at + 8)
        site.hide()
        assert site.stored(first + marked).data == bytes(own)
        assert not site.memory.marked
    compare(made, "hidden")
