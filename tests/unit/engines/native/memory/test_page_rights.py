"""Rights of pages are found as in a dictionary, in the order of their addresses.

Method: histories of changes, against a dictionary.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softsgx.engines.native.memory.page_rights import BLOCK_SHIFT, PageRights

PAGE = 4096
BLOCK = 1 << BLOCK_SHIFT
BASE = 0x7000_0000_0000
#: Both sides of ends of blocks, far from each other.
PAGES = [BASE + block * BLOCK + at * PAGE for block in (0, 1, 2, 90) for at in (0, 1, 300, 511)]

steps = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "delete", "discard", "within"]),
        st.sampled_from(PAGES),
        st.integers(1, 7),
        st.sampled_from([PAGE, 3 * PAGE, BLOCK, 3 * BLOCK, 1 << 46]),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_rights_are_those_that_were_set_last(history: list[tuple[str, int, int, int]]) -> None:
    rights, expected = PageRights(), dict[int, int]()
    for what, page, value, length in history:
        match what:
            case "set":
                rights[page] = expected[page] = value
            case "delete" if page in expected:
                del rights[page], expected[page]
            case "delete":
                with pytest.raises(KeyError):
                    del rights[page]
            case "discard":
                rights.discard(page)
                expected.pop(page, None)
            case _:
                found = rights.within(page, page + length)
                inside = sorted(at for at in expected if page <= at < page + length)
                assert list(found.items()) == [(at, expected[at]) for at in inside]
        assert rights == expected and len(rights) == len(expected)
        assert list(rights) == sorted(expected)
        assert rights.get(page, 0) == expected.get(page, 0)


def test_blocks_without_pages_do_not_accumulate() -> None:
    rights = PageRights()
    rights[BASE] = 3
    for number in range(1, 2000):
        rights[BASE + number * BLOCK] = 1
        del rights[BASE + number * BLOCK]
    assert rights == {BASE: 3} and len(rights.blocks) < 200


def test_a_page_cannot_be_there_without_rights() -> None:
    with pytest.raises(AssertionError, match="without rights"):
        PageRights()[BASE] = 0
