"""A page is executable exactly when its mapping and its EPCM entry both say so.

Method: histories of calls by address spaces and stores, against simulated page tables.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx.engines.native import abi
from softsgx.engines.native.memory.fetches import Call, Fetches

BASE, PAGES, PAGE = 0x7000_0000_0000, 100, 4096
RWX, RW = 7, 3


class Native:
    """The real page tables: rights of each page, changed by the program and by our calls."""

    def __init__(self) -> None:
        self.asked = {BASE + index * PAGE: RWX for index in range(PAGES)}
        self.real = dict(self.asked)
        self.calls = 0
        self.fetches = Fetches(self.asked.get)

    def make(self, calls: list[Call]) -> None:
        for number, start, length, prot in calls:
            assert number == abi.SYS_MPROTECT
            self.calls += 1
            self.protect(self.real, start, start + length, prot)

    def protect(self, table: dict[int, int], start: int, end: int, prot: int) -> None:
        for page in range(start, end, PAGE):
            assert page in table
            table[page] = prot

    def go_on(self) -> None:
        self.make(self.fetches.calls())
        for page, rights in self.fetches.rights.items():
            right = self.asked[page] & (rights | ~4)
            assert self.real[page] == right, f"page {(page - BASE) // PAGE}"


step = st.tuples(
    st.sampled_from(["show", "hide", "change", "protect", "reveal", "go on"]),
    st.integers(0, PAGES - 1),
    st.integers(1, 20),
    st.sampled_from([0, 1, RW, 5, RWX]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=40))
def test_shown_pages_lose_exactly_the_right_that_the_epcm_refuses(
    history: list[tuple[str, int, int, int]],
) -> None:
    native = Native()
    fetches = native.fetches
    for what, index, length, rights in history:
        start = BASE + index * PAGE
        end = min(start + length * PAGE, BASE + PAGES * PAGE)
        match what:
            case "show" if start not in fetches.rights:
                fetches.shown(start, rights or 1)
            case "hide":
                fetches.hidden(range(start, end, PAGE))
            case "change" if start in fetches.rights:
                fetches.changed(start, rights or 1)
            case "protect":
                for table in (native.asked, native.real):
                    native.protect(table, start, end, rights)
                fetches.mapped(
                    start, end, {page: fetches.rights[page] for page in fetches.within(start, end)}
                )
            case "reveal":
                native.protect(native.asked, start, end, rights)
                native.make(fetches.reveal(start, end, rights))
            case _:
                native.go_on()
    native.go_on()


def test_a_heap_that_grows_page_by_page_needs_few_calls() -> None:
    native = Native()
    for page in native.asked:
        native.fetches.shown(page, RW)
        native.go_on()
    assert native.calls <= 1 + PAGES // 64 + 1


def test_pages_whose_mapping_cannot_be_executed_cost_nothing() -> None:
    native = Native()
    for page in native.asked:
        native.asked[page] = native.real[page] = RW
        native.fetches.shown(page, RW)
        native.go_on()
    assert not native.calls
