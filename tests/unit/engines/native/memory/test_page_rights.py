"""Rights of pages are found as in a dictionary, in the order of their addresses.

Method: histories of changes, against a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx import compiled
from softsgx.engines.native.memory.page_maps import BLOCK_SHIFT, PageRights, page_rights

PAGE = 4096
BLOCK = 1 << BLOCK_SHIFT
BASE = 0x7000_0000_0000
#: Both sides of ends of blocks, far from each other.
PAGES = [BASE + block * BLOCK + at * PAGE for block in (0, 1, 2, 90) for at in (0, 1, 300, 511)]

MAKERS = (PageRights, page_rights)

steps = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "delete", "discard", "within"]),
        st.sampled_from(PAGES),
        st.integers(1, 7),
        st.sampled_from([PAGE, 3 * PAGE, BLOCK, 3 * BLOCK, 1 << 46]),
    ),
    max_size=40,
)


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=200, deadline=None)
@given(history=steps)
def test_rights_are_those_that_were_set_last(
    make: Callable[[], PageRights], history: list[tuple[str, int, int, int]]
) -> None:
    rights, expected = make(), dict[int, int]()
    for what, page, value, length in history:
        match what:
            case "set":
                rights[page] = expected[page] = value
            case "delete" if page in expected:
                del rights[page], expected[page]
            case "delete":
                with pytest.raises(KeyError):
                    del rights[page]
                with pytest.raises(KeyError):
                    rights[page + 8]
            case "discard":
                rights.discard(page + 8)
                expected.pop(page, None)
            case _:
                found = rights.within(page, page + length)
                inside = sorted(at for at in expected if page <= at < page + length)
                assert list(found.items()) == [(at, expected[at]) for at in inside]
        assert rights == expected and len(rights) == len(expected)
        assert list(rights) == sorted(expected)
        for at in (page, page + 1, page + PAGE - 1):
            assert rights.get(at, 0) == expected.get(page, 0) and (at in rights) is (page in rights)


@pytest.mark.parametrize("make", MAKERS)
def test_a_range_can_start_and_end_at_any_address(make: Callable[[], PageRights]) -> None:
    half, rights = 1 << 63, make()
    pages = [0, half - PAGE, half, half + PAGE, half + 3 * BLOCK, (1 << 64) - PAGE]
    ends = [-PAGE, *pages, PAGE, half + 2 * PAGE, 1 << 64, 1 << 70]
    for page in pages:
        rights[page] = 5
    for start, end in product(ends, ends):
        assert list(rights.within(start, end)) == [page for page in pages if start <= page < end]


def test_blocks_without_pages_do_not_accumulate() -> None:
    rights = PageRights()
    rights[BASE] = 3
    for number in range(1, 2000):
        rights[BASE + number * BLOCK] = 1
        del rights[BASE + number * BLOCK]
    assert rights == {BASE: 3} and len(rights.blocks) < 200


@pytest.mark.parametrize("make", MAKERS)
def test_a_page_cannot_be_there_without_rights(make: Callable[[], PageRights]) -> None:
    rights = make()
    with pytest.raises(AssertionError, match="without rights"):
        rights[BASE] = 0
    assert not rights


@pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)
@pytest.mark.parametrize("wrong", [-1, 256, 1 << 70])
def test_rights_of_the_compiled_core_are_of_one_byte(wrong: int) -> None:
    rights = page_rights()
    with pytest.raises(OverflowError):
        rights[BASE] = wrong
    assert not rights
