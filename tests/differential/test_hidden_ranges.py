"""What the pager does before pages are hidden, in Python and in C: where, and whether threads run.

Method: a store, a memory file, a page table and a pager with a real address space, whose mappings
and threads differ.  Requests to the kernel are noted; the records of the pages must be equal.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from tests.support.native import needs_tracing

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, EpcAddr
from softsgx.driver import Mm
from softsgx.driver.mm import EnclaveVma
from softsgx.engines.native import kernel
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore, StoredPage
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.hw import EpcPage
from softsgx.runtime import InlineRuntime

BASE = 0x3000_0000_0000
PAGES = (0, 1, 2, 5, 6, 9)

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(compiled.speedups is None, reason=compiled.description),
]
STAY = (3, 4, 8, 10, 70)
"""Pages that do not leave."""

Mappings = list[tuple[int, int, str]]


class Site:
    """Pages that leave, of a memory file that an address space maps."""

    def __init__(self, mappings: Mappings, threads: list[bool], faulting: int | None) -> None:
        self.memories = {name: self._memory() for name in ("own", "other")}
        self.store, self.log = NativeStore(), list[object]()
        image: Any = ProcessImage.__new__(ProcessImage)
        self.image = image
        self.pager = UffdPager(
            *(-1, -1, self.log.append, image.is_running),
            *(lambda _at: 3, lambda error: self.log.append(repr(error))),
        )
        self.table: Any = EnclavePageTable(
            *cast(Any, (0, self.store, {}, self.pager)),
            memory_at=lambda _at: None,
            mapped_in=image.mapped_in,
            is_readable=lambda _at: False,
            kick_all=lambda: None,
        )
        mm = Mm(InlineRuntime(), self.table)
        for start, end, name in mappings:
            file: Any = SimpleNamespace(memory=self.memories[name])
            vma = EnclaveVma(BASE + start * PAGE_BYTES, BASE + end * PAGE_BYTES, 3, file, None)
            mm._starts.append(vma.start)
            mm._vmas.append(vma)
        running = {number: SimpleNamespace(running=runs) for number, runs in enumerate(threads)}
        vars(image).update(mm=mm, threads=running)
        image.faulting = None if faulting is None else running[faulting]
        self.memories["own"].users.append(self.table)
        self.records = [StoredPage(EpcPage(EpcAddr(0x8000 + number))) for number in PAGES]
        self.leave()

    def _memory(self) -> EnclaveMemory:
        file = os.memfd_create("sgx_enclave", os.MFD_ALLOW_SEALING)
        try:
            return EnclaveMemory(os.dup(file))
        finally:
            os.close(file)

    def leave(self) -> None:
        """The pages are shown, and no page table maps them any more."""
        memory = self.memories["own"]
        for number, record in zip(PAGES, self.records, strict=True):
            linaddr = BASE + number * PAGE_BYTES
            record.memory, record.linaddr, record.rights = memory, linaddr, 3
            os.pwrite(memory.fd, bytes([number + 1]) * PAGE_BYTES, linaddr)
            memory.pages[linaddr] = self.pager._fetches.rights[linaddr] = 3
            self.pager._watched.add(linaddr)
        for number in STAY:
            memory.pages[BASE + number * PAGE_BYTES] = 1
        self.store._leaving += self.records

    def state(self) -> object:
        return (
            self.log,
            [(record.rights, record.data) for record in self.records],
            len(self.store._leaving),
            [(at - BASE) // PAGE_BYTES for at in sorted(self.pager._watched)],
            *(
                (len(rights), [(at - BASE) // PAGE_BYTES for at in rights])
                for rights in (self.memories["own"].pages, self.pager._fetches.rights)
            ),
        )

    def close(self) -> None:
        for memory in self.memories.values():
            memory.close()


@contextmanager
def noting(site: Site) -> Iterator[None]:
    """Note each request for a write protection."""

    def protect(_uffd: int, start: int, end: int, mode: int) -> int:
        site.log.append(((start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES, mode))
        return 0

    with patch.object(kernel, "protect_pages", protect):
        yield


def compare(mappings: Mappings, threads: list[bool], faulting: int | None = None) -> list[Any]:
    """Hide the pages with both forms; return what the kernel was asked for."""
    assert compiled.speedups is not None
    states = []
    for hide in (NativeStore.hide_unmapped, compiled.speedups.hide_unmapped):
        site = Site(mappings, threads, faulting)
        with noting(site):
            hide(site.store)
        states.append(site.state())
        site.close()
    assert states[0] == states[1]
    (notes, records, left, _watched, pages, _rights) = cast(Any, states[0])
    assert pages == (len(STAY), list(STAY))
    assert left == 0 and all(rights == 0 for rights, _data in records)
    assert [data[:1] for _rights, data in records] == [bytes([number + 1]) for number in PAGES]
    return [note[:2] for note in notes]


RUNS = [(0, 3), (5, 7), (9, 10)]
MAPPINGS: dict[str, tuple[Mappings, list[tuple[int, int]]]] = {
    "one mapping": ([(0, 16, "own")], RUNS),
    "exactly": ([(0, 10, "own")], RUNS),
    "one page short": ([(0, 9, "own")], RUNS),
    "one page too few": ([(1, 16, "own")], RUNS),
    "no mapping": ([], RUNS),
    "two mappings": ([(0, 6, "own"), (6, 16, "own")], RUNS),
    "a gap": ([(0, 4, "own"), (8, 16, "own")], RUNS),
    "another file between": (
        [(0, 3, "own"), (3, 5, "other"), (5, 16, "own")],
        [(0, 3), (5, 7), (9, 10)],
    ),
    "another file first": ([(0, 2, "other"), (2, 16, "own")], [(2, 3), (5, 7), (9, 10)]),
    "another file last": ([(0, 6, "own"), (6, 16, "other")], [(0, 3), (5, 6)]),
    "another file alone": ([(0, 16, "other")], []),
}


@pytest.mark.parametrize("which", MAPPINGS)
def test_pages_are_protected_where_no_other_file_is_mapped(which: str) -> None:
    mappings, expected = MAPPINGS[which]
    assert compare(mappings, [True]) == expected


@pytest.mark.parametrize(
    ("threads", "faulting", "protects"),
    [
        ([], None, False),
        ([True], None, True),
        ([False], None, False),
        ([True], 0, False),
        ([False, True], None, True),
        ([True, False], 0, False),
        ([True, True], 0, True),
        ([True, True], 1, True),
        ([False, False], 1, False),
    ],
)
def test_pages_are_protected_while_another_thread_runs(
    threads: list[bool], faulting: int | None, protects: bool
) -> None:
    assert bool(compare([(0, 16, "own")], threads, faulting)) is protects


@pytest.mark.parametrize("without", [(), (0,), (1, 5), (2, 6, 9), PAGES], ids=str)
def test_pages_without_rights_are_counted_no_more(without: tuple[int, ...]) -> None:
    assert compiled.speedups is not None
    for hide in (NativeStore.hide_unmapped, compiled.speedups.hide_unmapped):
        site = Site([(0, 16, "own")], [False], None)
        rights, stays = site.pager._fetches.rights, BASE + STAY[0] * PAGE_BYTES
        rights[stays] = 1
        for number in without:
            del rights[BASE + number * PAGE_BYTES]
        hide(site.store)
        site.close()
        assert len(rights) == 1 and dict(rights) == {stays: 1}


@pytest.mark.parametrize("first", [127, 128, 129, 189, 190, 191])
@pytest.mark.parametrize("count", [1, 2, 3, 62, 63, 64, 65, 127, 128])
def test_neighbours_of_pages_that_leave_keep_their_rights(first: int, count: int) -> None:
    """The compiled core has rights in blocks of 64 pages."""
    assert compiled.speedups is not None
    leave, neighbours = range(first, first + count), {}
    for number in (first - 2, first - 1, first + count, first + count + 1):
        neighbours[BASE + number * PAGE_BYTES] = 1
    for hide in (NativeStore.hide_unmapped, compiled.speedups.hide_unmapped):
        site = Site([(0, 512, "own")], [False], None)
        memory, rights = site.memories["own"], site.pager._fetches.rights
        hide(site.store)
        for number in STAY:
            del memory.pages[BASE + number * PAGE_BYTES]
        for number in leave:
            record = StoredPage(EpcPage(EpcAddr(0x9000 + number)))
            record.memory, record.linaddr = memory, BASE + number * PAGE_BYTES
            record.rights = rights[record.linaddr] = memory.pages[record.linaddr] = 3
            site.store._leaving.append(record)
        rights.update(neighbours)
        memory.pages.update(neighbours)
        hide(site.store)
        site.close()
        assert dict(rights) == dict(memory.pages) == neighbours
        assert len(rights) == len(memory.pages) == len(neighbours)


@pytest.mark.parametrize("places", [(0,), (3,), (6,), (0, 7), (1, 4), (2, 2, 6)], ids=str)
def test_a_page_that_leaves_while_others_are_hidden_is_hidden_after_them(
    places: tuple[int, ...],
) -> None:
    """The pager calls the loop, which unmaps more pages."""
    assert compiled.speedups is not None
    for hide in (NativeStore.hide_unmapped, compiled.speedups.hide_unmapped):
        site = Site([(0, 16, "own")], [True], None)
        late = [StoredPage(EpcPage(EpcAddr(0x9000 + number))) for number in range(len(places))]

        def unmap(*_args: object, site: Site = site, late: list[StoredPage] = late) -> int:
            memory, leaving = site.memories["own"], site.store._leaving
            for number, (place, record) in enumerate(zip(places, late, strict=True)):
                if record.rights == 0:
                    record.memory, record.linaddr = memory, BASE + STAY[number] * PAGE_BYTES
                    record.rights = memory.pages[record.linaddr] = 1
                    os.pwrite(memory.fd, bytes([100 + number]) * PAGE_BYTES, record.linaddr)
                    leaving.insert(place, record)
            return 0

        with patch.object(kernel, "protect_pages", unmap):
            hide(site.store)
        assert sorted(site.store._leaving, key=late.index) == late
        assert not any(record.rights for record in site.records)
        site.image.threads.clear()
        hide(site.store)
        hidden = [record.data and record.data[0] for record in (*site.records, *late)]
        site.close()
        assert hidden == [*(number + 1 for number in PAGES), *range(100, 100 + len(late))]
        assert not site.store._leaving


@pytest.mark.parametrize(
    ("threads", "faulting"), [([True], None), ([False], None), ([True], 0), ([False, True], 1)]
)
def test_one_mapping_and_its_threads_need_no_python(
    threads: list[bool], faulting: int | None
) -> None:
    assert compiled.speedups is not None
    site, called = Site([(0, 16, "own")], threads, faulting), list[str]()

    def note(frame: Any, event: str, _arg: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    assert site.image.mm.find(BASE) is not None  # as the fault before has found it
    with noting(site):
        sys.setprofile(note)
        compiled.speedups.hide_unmapped(site.store)
        sys.setprofile(None)
    site.close()
    asked = {"before_hide", "is_running", "<genexpr>", "_protect", "protect"}
    assert set(called) == (asked if threads == [True] and faulting is None else set())


@pytest.mark.parametrize("which", MAPPINGS)
def test_hiding_leaves_no_reference_behind(which: str) -> None:
    assert compiled.speedups is not None
    site = Site(MAPPINGS[which][0], [False, False], 0)
    things: list[object] = [site.image, site.table, site.pager, site.store, *site.memories.values()]
    things += [site.image.mm, *site.image.mm._vmas, site.image.threads, site.image.threads[0]]
    things += [site.image.threads[1], site.table._mapped_in, site.pager._running, True, False, None]
    counts = []
    for _ in range(3):
        for _ in range(30):
            site.leave()
            compiled.speedups.hide_unmapped(site.store)
        gc.collect()
        counts.append(list(map(sys.getrefcount, things)))
    site.close()
    assert all(abs(late - early) < 20 for early, late in zip(*counts[1:], strict=True))
