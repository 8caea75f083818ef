"""Watching pages changes no accessed bit that the reclaimer reads, and misses no first use.

Method: a plain pager and a recording one go through the same histories above a stand-in for the
kernel, which has the entries, rights and write protection of a few pages.
"""

from __future__ import annotations

import os
from errno import EEXIST
from typing import Any, Protocol
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.memory.mprotect import MprotectPager
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.recording.pagers import RecordedMprotectPager, RecordedUffdPager
from softsgx.hw import READ, WRITE

PAGE, PAGES = 4096, 2
START, END = 0x40000, 0x40000 + PAGES * PAGE
MAPPINGS = [(START, START + PAGE), (START + PAGE, END)]
READ_WRITE = READ | WRITE


def rights_asked_for(_linaddr: int) -> int:
    return READ_WRITE


class Memory(Protocol):
    """The stand-in for the kernel, with a pager above it."""

    pager: Any

    def faults(self, page: int, access: int) -> bool: ...


class MprotectMemory:
    def __init__(self, recorded: bool) -> None:
        self.rights = dict.fromkeys(range(START, END, PAGE), 0)
        arguments = self.inject, rights_asked_for
        self.pager = (
            RecordedMprotectPager(*arguments, stores=True)
            if recorded
            else MprotectPager(*arguments)
        )

    def inject(self, calls: list[tuple[int, ...]]) -> None:
        for number, start, size, prot in calls:
            assert number == abi.SYS_MPROTECT
            for page in range(start, start + size, PAGE):
                self.rights[page] = prot

    def faults(self, page: int, access: int) -> bool:
        return bool(access & ~self.rights[page])


class PlainUffd(UffdPager):
    def show(self, linaddr: int, data: bytes | bytearray, rights: int) -> bool:
        def copy(_uffd: int, address: int, mode: int, _data: bytes | bytearray) -> int:
            self.memory.fill(address, protected=bool(mode))
            return 0

        with patch.object(kernel, "copy_page", copy):
            return super().show(linaddr, data, rights)

    def _protect(self, start: int, end: int, mode: int) -> bool:
        self.memory.protect(start, end, protected=bool(mode))
        return True

    memory: UffdMemory


class RecordedUffd(RecordedUffdPager):
    memory: UffdMemory

    def _protect(self, start: int, end: int, mode: int) -> bool:
        self.memory.protect(start, end, protected=bool(mode))
        return True

    def _continue(self, linaddr: int, mode: int) -> int:
        if linaddr in self.memory.present:
            return EEXIST
        self.memory.fill(linaddr, protected=bool(mode))
        return 0


class UffdMemory:
    """Pages without an entry fault where minor faults are asked for, else they get their entry."""

    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded
        self.present: set[int] = set()
        self.protected: set[int] = set()
        self.shown: set[int] = set()
        self.pagemap = os.memfd_create("pagemap")
        os.ftruncate(self.pagemap, 8 * (END // PAGE))
        arguments: Any = (
            -1,
            self.pagemap,
            self.inject,
            lambda: False,
            lambda _linaddr: 3,
            self.fail,
        )
        self.pager = RecordedUffd(*arguments, stores=True) if recorded else PlainUffd(*arguments)
        self.pager.memory = self

    def fail(self, error: Exception) -> None:
        raise error

    def fill(self, page: int, *, protected: bool) -> None:
        self.present.add(page)
        self.protect(page, page + PAGE, protected=protected)
        self._note(page)

    def protect(self, start: int, end: int, *, protected: bool) -> None:
        pages = set(range(start, end, PAGE))
        self.protected = self.protected | pages if protected else self.protected - pages

    def inject(self, calls: list[tuple[int, ...]]) -> None:
        for number, start, size, _advice in calls:
            assert number == abi.SYS_MADVISE
            for page in range(start, start + size, PAGE):
                self.present.discard(page)
                self._note(page)

    def faults(self, page: int, access: int) -> bool:
        if page not in self.present:
            if self.recorded:
                return True
            self.present.add(page)
            self._note(page)
        return access == WRITE and page in self.protected

    def _note(self, page: int) -> None:
        word = (page in self.present) << 63
        os.pwrite(self.pagemap, word.to_bytes(8, "little"), page // PAGE * 8)


class History:
    """One pager, and what it has reported."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.reports = memory, list[tuple[int, bool]]()

    def show(self, page: int) -> None:
        if not self.memory.pager.show(page, bytes(PAGE), READ_WRITE):
            self.memory.pager.shown(page, READ_WRITE)

    def hide(self, page: int) -> None:
        self.memory.pager.before_hide(page, page + PAGE)
        self.memory.pager.after_hide(page, page + PAGE)
        if isinstance(self.memory, UffdMemory):
            self.memory.inject([(abi.SYS_MADVISE, page, PAGE, 0)])

    def use(self, page: int, access: int) -> None:
        self.memory.pager.flush()
        for _attempt in range(3):
            if not self.memory.faults(page, access):
                return
            assert self.memory.pager.touched(page, access), "a fault without a reason"
            self.reports.append((page, access == WRITE))
        pytest.fail("an instruction makes no progress")


pages = st.integers(0, PAGES - 1).map(lambda number: START + number * PAGE)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["show", "hide", "load", "store", "age", "load", "age"]), pages),
        st.tuples(st.just("watch"), st.just(START)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("kind", [MprotectMemory, UffdMemory])
@example(
    [(step, START) for step in ("show", "load", "age", "load", "watch", "age", "age", "store")]
)
@example(
    [
        *(("show", START), ("show", START + PAGE), ("hide", START + PAGE), ("age", START)),
        *(("show", START + PAGE), ("age", START + PAGE)),
    ]
)
@given(history=steps.map(lambda history: [("show", START), ("show", START + PAGE), *history]))
def test_ageing_sees_the_same_and_each_first_use_is_reported(
    kind: type[MprotectMemory | UffdMemory], history: list[tuple[str, int]]
) -> None:
    plain, recorded = History(kind(recorded=False)), History(kind(recorded=True))
    shown: set[int] = set()
    loaded: set[int] = set()  # since they were watched
    stored: set[int] = set()
    for step, page in history:
        if step == "watch":
            recorded.memory.pager.flush()
            recorded.memory.pager.watch_all(MAPPINGS)
            loaded.clear()
            stored.clear()
        elif step == "show" and page not in shown:
            plain.show(page)
            recorded.show(page)
            shown.add(page)
        elif page not in shown:
            continue
        elif step == "hide":
            plain.hide(page)
            recorded.hide(page)
            for known in (shown, loaded, stored):
                known.discard(page)
        elif step == "age":
            answers = [
                each.memory.pager.test_and_clear_accessed(page) for each in (plain, recorded)
            ]
            assert answers[0] == answers[1]
        elif step in ("load", "store"):
            access = WRITE if step == "store" else READ
            before = len(recorded.reports)
            plain.use(page, access)
            recorded.use(page, access)
            known = stored if access == WRITE else loaded
            if page not in known:
                assert recorded.reports[before:], "its first use was not reported"
            loaded.add(page)
            if access == WRITE:
                stored.add(page)
    for memory in (plain.memory, recorded.memory):
        if isinstance(memory, UffdMemory):
            os.close(memory.pagemap)


@pytest.mark.parametrize("kind", [MprotectMemory, UffdMemory])
def test_a_load_leaves_the_first_store_to_be_reported(
    kind: type[MprotectMemory | UffdMemory],
) -> None:
    recorded = History(kind(recorded=True))
    recorded.show(START)
    for access in (READ, READ, WRITE, WRITE, READ):
        recorded.use(START, access)
    assert recorded.reports == [(START, False), (START, True)]


def test_a_page_that_the_kernel_does_not_have_is_no_use() -> None:
    memory = UffdMemory(recorded=True)
    assert not memory.pager.touched(START, READ)
    os.close(memory.pagemap)
