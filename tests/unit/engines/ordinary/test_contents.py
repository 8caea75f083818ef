"""Contents and numbers of pages: none is given away while a page has it, neighbours stay so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softsgx.engines.ordinary.contents import Contents
from softsgx.engines.ordinary.numbers import PageNumbers


def test_a_shared_content_is_free_when_the_last_page_has_released_it() -> None:
    contents = Contents()
    at = contents.store(b"abc")
    contents.share(at)
    contents.share(at)
    for _page in range(2):
        assert contents.is_shared(at)
        contents.release(at)
    assert not contents.is_shared(at)
    assert contents.bytes(at) == b"abc".ljust(4096, b"\0")
    contents.release(at)
    assert contents.allocate() == at


def test_no_two_contents_overlap_and_that_of_new_pages_is_zero() -> None:
    contents = Contents()
    places = [contents.allocate() for _content in range(5000)]
    assert len({*places, contents.zero}) == 5001
    assert all(place % 4096 == 0 for place in places)
    assert contents.bytes(contents.zero) == bytes(4096)


@given(st.lists(st.integers(0, (1 << 35) - 1), min_size=1))
def test_each_page_has_a_number_of_its_own_and_neighbours_have_neighbours(pages: list[int]) -> None:
    numbers = PageNumbers()
    found = [numbers.number(page) for page in pages]
    assert [numbers.page(number) for number in found] == pages
    assert len(set(found)) == len(set(pages))
    assert max(found) < numbers.end <= 512 * len(set(pages))
    for page, number in zip(pages, found, strict=True):
        if page % 512 < 511:
            assert numbers.number(page + 1) == number + 1
