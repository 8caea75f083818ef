"""A page's bytes are in exactly one place, and no store is lost while they move.

Method: a memory file that this process maps itself stands for the program's; histories of what
machine and page tables do, against a dictionary.
"""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx.arch import EpcAddr, PageType
from softsgx.engines.native.memory.memory_file import EnclaveMemory, Guard
from softsgx.engines.native.memory.store import NativeStore
from softsgx.hw import EpcPage

BASE = 0x7000_0000_0000
PAGES = 4


def make_memory() -> tuple[EnclaveMemory, int]:
    theirs = os.memfd_create("sgx_enclave", os.MFD_ALLOW_SEALING)
    return EnclaveMemory(os.dup(theirs)), theirs


def make_page(index: int, rwx: int = 3) -> EpcPage:
    page = EpcPage(EpcAddr(0x5000_0000 + index * 4096))
    page.fill(PageType.REG, rwx=rwx, linaddr=BASE + index * 4096)
    return page


def test_a_device_is_released_when_its_last_descriptor_is_closed() -> None:
    memory, theirs = make_memory()
    other = os.dup(theirs)
    assert not memory.released()
    os.close(theirs)
    assert not memory.released()
    os.close(other)
    assert memory.released()
    memory.close()


def test_a_mapping_keeps_a_device_that_is_closed() -> None:
    memory, theirs = make_memory()
    mapping = mmap.mmap(theirs, 4096)  # holds a duplicate of the descriptor, like a mapping does
    os.close(theirs)
    assert not memory.released()
    mapping.close()
    assert memory.released()
    memory.close()


steps = st.lists(
    st.tuples(
        st.sampled_from(["map", "unmap", "write", "pending", "accept", "evict", "load", "go on"]),
        st.integers(0, PAGES - 1),
        st.integers(0, 255),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_bytes_are_what_was_written_last_wherever_they_are(
    history: list[tuple[str, int, int]],
) -> None:
    memory, theirs = make_memory()
    store, pages = NativeStore(), [make_page(index) for index in range(PAGES)]
    expected = [bytes([index]) * 4096 for index in range(PAGES)]
    mapped, outside = [0] * PAGES, dict[int, bytes]()
    for page, data in zip(pages, expected, strict=True):
        store.fill(page, data)
    try:
        for what, index, value in history:
            page = pages[index]
            if index in outside and what not in ("load", "go on"):
                continue
            match what:
                case "map":
                    store.mapped(page, memory, page.linaddr)
                    mapped[index] += 1
                case "unmap" if mapped[index]:
                    store.unmapped(store.record(page))
                    mapped[index] -= 1
                case "write":
                    store.write(page, value, bytes([value]))
                    old = expected[index]
                    expected[index] = old[:value] + bytes([value]) + old[value + 1 :]
                case "pending" | "accept":
                    page.pending = what == "pending"
                    store.refresh(page)
                case "evict" if not mapped[index]:
                    outside[index] = bytes(store.freeze(page))
                    store.drop(page)
                case "load" if index in outside:
                    store.fill(page, outside.pop(index))
                case "go on":
                    store.hide_unmapped()
                case _:
                    continue  # not possible in this state
            for number, seen in enumerate(pages):
                if number in outside:
                    assert outside[number] == expected[number]
                    continue
                shown = store.is_shown(seen)
                assert shown == bool(mapped[number] and not seen.pending)
                assert store.read(seen, 0, 4096) == expected[number]
                in_file = os.pread(theirs, 4096, seen.linaddr)
                if shown or what == "go on":
                    assert in_file == (expected[number] if shown else bytes(4096))
                else:
                    assert in_file in (expected[number], bytes(4096))
    finally:
        os.close(theirs)
        memory.close()


class Watching:
    """A guard that notes what is hidden, and what the file holds then."""

    def __init__(self, fd: int) -> None:
        self.fd, self.log = fd, list[tuple[str, int, bytes]]()
        self.rights: dict[int, int] = {}

    def _note(self, what: str, start: int, end: int) -> None:
        self.log.append((what, (end - start) // 4096, os.pread(self.fd, 1, start)))

    def before_hide(self, start: int, end: int) -> None:
        self._note("before", start, end)

    def after_hide(self, start: int, end: int) -> None:
        self._note("after", start, end)

    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        return False

    def shown(self, linaddr: int, rights: int) -> None:
        self.rights[linaddr] = rights

    def set_rights(self, linaddr: int, rights: int) -> None:
        self.rights[linaddr] = rights

    def flush(self) -> None:
        pass


class Everywhere:
    """A space that maps the file wherever it is asked."""

    def __init__(self, guard: Guard) -> None:
        self.pager = guard

    def maps(self, memory: EnclaveMemory, linaddr: int) -> bool:
        return True

    def parts(self, memory: EnclaveMemory, start: int, end: int) -> list[tuple[int, int]]:
        return [(start, end)]

    def refresh_range(self, start: int, end: int) -> None:
        pass


def test_pages_that_leave_together_are_hidden_at_once_when_the_first_is_needed() -> None:
    memory, theirs = make_memory()
    guard = Watching(theirs)
    memory.users.append(Everywhere(guard))
    store, pages = NativeStore(), [make_page(index) for index in range(PAGES)]
    for page in pages:
        store.fill(page, bytes([1 + page.linaddr // 4096 % 4096]) * 4096)
        store.mapped(page, memory, page.linaddr)
    for page in (pages[2], pages[0], pages[3]):
        store.unmapped(store.record(page))
    assert not guard.log
    assert store.freeze(pages[3]) == b"\x04" * 4096
    assert guard.log == [
        *(("before", 1, b"\x01"), ("before", 2, b"\x03")),
        *(("after", 1, b"\0"), ("after", 2, b"\0")),
    ]
    assert [store.read(page, 0, 1) for page in pages] == [b"\x01", b"\x02", b"\x03", b"\x04"]
    os.close(theirs)
    memory.close()


def test_a_page_is_shown_with_the_rights_of_its_epcm_entry() -> None:
    memory, theirs = make_memory()
    guard = Watching(theirs)
    memory.users.append(Everywhere(guard))
    store, pages = NativeStore(), [make_page(index) for index in range(PAGES)]
    for page, rwx in zip(pages, (1, 3, 4, 0), strict=True):
        page.rwx = rwx
        store.fill(page, bytes(4096))
        store.mapped(page, memory, page.linaddr)
    # X alone can be read as well: page tables do not know it.
    expected = {page.linaddr: rights for page, rights in zip(pages, (1, 3, 5), strict=False)}
    assert guard.rights == memory.pages == memory.within(BASE, BASE + (1 << 40)) == expected
    assert [store.rights(page) for page in pages] == [1, 3, 5, 0]
    pages[1].rwx = 5
    store.refresh(pages[1])
    assert guard.rights == memory.pages == expected | {pages[1].linaddr: 5}
    pages[1].rwx = 0
    store.refresh(pages[1])
    assert not store.is_shown(pages[1])
    assert memory.within(BASE, BASE + 2 * 4096) == {BASE: 1}
    os.close(theirs)
    memory.close()


def test_a_frozen_page_that_stays_is_shown_again() -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0)
    store.fill(page, b"x" * 4096)
    store.mapped(page, memory, page.linaddr)
    assert store.freeze(page) == b"x" * 4096
    assert not store.is_shown(page)
    store.thaw(page)
    assert store.is_shown(page)
    os.close(theirs)
    memory.close()


@pytest.mark.parametrize("pt", [PageType.TCS, PageType.TRIM])
def test_a_page_that_enclave_code_may_not_touch_is_never_shown(pt: PageType) -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0)
    page.pt = pt
    store.fill(page, b"secret".ljust(4096))
    store.mapped(page, memory, page.linaddr)
    assert os.pread(theirs, 4096, page.linaddr) == bytes(4096)
    os.close(theirs)
    memory.close()


def test_a_marked_instruction_is_the_enclaves_own_wherever_it_is_read_or_goes() -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0, rwx=5)
    code = b"\x90" * 100 + b"\x0f\x01\xd7" + b"\x90" * 3993
    store.fill(page, code)
    store.mapped(page, memory, page.linaddr)
    memory.mark(page.linaddr + 100)
    assert os.pread(theirs, 3, page.linaddr + 100) == b"\xf4\x01\xd7"
    assert store.read(page, 0, 4096) == code
    assert store.read(page, 99, 3) == code[99:102]
    assert store.freeze(page) == code
    assert not memory.marked
    os.close(theirs)
    memory.close()


def test_a_store_to_a_marked_page_takes_its_marks_away() -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0, rwx=5)
    store.fill(page, b"\x0f\x01\xd7".ljust(4096, b"\x90"))
    store.mapped(page, memory, page.linaddr)
    memory.mark(page.linaddr)
    store.write(page, 0, b"\xf4")
    assert os.pread(theirs, 3, page.linaddr) == b"\xf4\x01\xd7"
    assert bytes(store.freeze(page))[:3] == b"\xf4\x01\xd7"
    os.close(theirs)
    memory.close()


def test_a_forbidden_instruction_is_ud2_for_the_program_and_unchanged_for_other_readers() -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0, rwx=5)
    memory.forbidden = lambda data: [
        at + 1 for at in range(4095) if data[at : at + 2] == b"\x0f\xa2"
    ]
    code = (b"\x90" * 8 + b"\x0f\xa2").ljust(4096, b"\x90")
    store.fill(page, code)
    store.mapped(page, memory, page.linaddr)
    assert os.pread(theirs, 10, page.linaddr) == b"\x90" * 8 + b"\x0f\x0b"
    assert store.read(page, 0, 4096) == code
    page.rwx = 7  # the enclave may write here now: its bytes are left alone
    store.refresh(page)
    assert os.pread(theirs, 4096, page.linaddr) == code
    page.rwx = 5
    store.refresh(page)
    assert os.pread(theirs, 10, page.linaddr)[-2:] == b"\x0f\x0b"
    assert bytes(store.freeze(page)) == code
    memory.close()
    os.close(theirs)


@pytest.mark.parametrize("pending", [False, True])
def test_a_page_that_was_lent_as_ones_has_its_own_bytes_again(pending: bool) -> None:
    memory, theirs = make_memory()
    store, page = NativeStore(), make_page(0)
    store.fill(page, b"own!" * 1024)
    page.pending = pending
    store.mapped(page, memory, page.linaddr)
    store.lend(page, memory, page.linaddr)
    assert os.pread(theirs, 4096, page.linaddr) == b"\xff" * 4096
    assert store.read(page, 0, 4) == b"own!"
    os.pwrite(theirs, b"lost", page.linaddr)
    store.take_back(memory, page.linaddr)
    store.refresh(page)
    assert store.is_shown(page) is not pending
    assert os.pread(theirs, 4, page.linaddr) == (bytes(4) if pending else b"own!")
    assert store.read(page, 0, 4096) == b"own!" * 1024
    memory.close()
    os.close(theirs)
