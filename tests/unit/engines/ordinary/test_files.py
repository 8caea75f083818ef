"""Ranges with the content of files, under every change of mappings.

Goal: which byte of which file a page has.  Method: a list of one entry a page as the model.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.engines.ordinary.files import File, FileRange, FileRanges

PAGE = 4096
PAGES = 24
range_of_pages = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], PAGES))
)
changes = st.lists(st.tuples(range_of_pages, st.booleans(), st.integers(0, 50)), max_size=12)


@given(changes)
def test_each_page_has_the_file_and_offset_that_it_was_given_last(
    made: list[tuple[tuple[int, int], bool, int]],
) -> None:
    file = File(os.open("/dev/null", os.O_RDONLY))
    ranges, model = FileRanges(), list[int | None]([None] * PAGES)
    for (start, end), adds, offset in made:
        if adds:
            ranges.add(FileRange(start * PAGE, end * PAGE, file, offset * PAGE))
        else:
            ranges.remove(start * PAGE, end * PAGE)
        for page in range(start, end):
            model[page] = (offset + page - start) * PAGE if adds else None
    for page in range(PAGES):
        found = ranges.find(page * PAGE)
        assert (None if found is None else found.offset + page * PAGE - found.start) == model[page]
    parts = ranges.within(0, PAGES * PAGE)
    assert sum(each.end - each.start for each in parts) == PAGE * (PAGES - model.count(None))


def test_a_copy_keeps_its_ranges_when_the_original_changes() -> None:
    file = File(os.open("/dev/null", os.O_RDONLY))
    ranges = FileRanges()
    ranges.add(FileRange(0, 4 * PAGE, file, 0))
    copy = ranges.copy()
    ranges.remove(0, PAGE)
    assert copy.find(0) is not None
    assert ranges.find(0) is None


@pytest.mark.parametrize(("offset", "length"), [(0, PAGE), (PAGE, 10), (2 * PAGE, None)])
def test_a_page_of_a_file_ends_with_it(tmp_path: Path, offset: int, length: int | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (PAGE + 10))
    data = File(os.open(path, os.O_RDONLY)).page(offset)
    assert (None if data is None else len(data)) == length
