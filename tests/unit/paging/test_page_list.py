"""Lists of EPC pages: the compiled form and the readable one against a list of Python.

Method: random histories of operations on two lists; each state, and what each operation returns or
raises, is compared.  References of pages are counted, also where the list ends or is part of a
cycle.
"""

from __future__ import annotations

import copy
import gc
import re
import sys
import weakref
from collections import deque
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.paging import SgxEpcPage
from softsgx.paging.page_list import PageList, PageQueue, ReadablePageList

LISTS = [ReadablePageList] if PageList is ReadablePageList else [ReadablePageList, PageList]
PAGES = 6

needs_core = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


def make_pages(count: int = PAGES) -> list[Any]:
    return [SgxEpcPage(number * PAGE_BYTES, 0) for number in range(count)]  # type: ignore[arg-type]


class Owner:
    """An owner that weak references see."""


def owned(page: Any) -> weakref.ref[Owner]:
    """Give a page an owner that nothing else refers to."""
    page.owner = owner = Owner()
    return weakref.ref(owner)


def filled(kind: Any, pages: list[Any]) -> Any:
    made = kind()
    for page in pages:
        made.append(page)
    return made


# --- as a list of Python --------------------------------------------------------------------------


def compare(lists: list[Any], models: list[list[Any]], pages: list[Any]) -> None:
    for made, model in zip(lists, models, strict=True):
        assert list(made) == list(islice(made, len(model) + 1)) == model
        assert len(made) == len(model) and bool(made) == bool(model)
        assert [page in made for page in pages] == [page in model for page in pages]
        if PageList is not ReadablePageList and type(made) is PageList:
            for at in range(-len(model), len(model)):
                assert made[at] is model[at]  # type: ignore[index]
            for at in (len(model), -len(model) - 1):
                with pytest.raises(IndexError):
                    _ = made[at]  # type: ignore[index]


def step(made: Any, model: list[Any], page: Any, operation: str) -> None:
    """Do an operation that is allowed with a page that may be on the list."""
    here = page in model
    if operation == "popleft":
        if model:
            assert made.popleft() is model.pop(0)
        else:
            with pytest.raises((IndexError, KeyError)):
                made.popleft()
    elif operation == "append":
        if not here:
            made.append(page)
            model.append(page)
    elif here:
        getattr(made, operation)(page)
        model.remove(page)
        if operation == "move_to_end":
            model.append(page)
    else:
        with pytest.raises(KeyError, match=re.escape(repr(page))):
            getattr(made, operation)(page)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, PAGES - 1),
        st.sampled_from(["append", "append", "popleft", "remove", "move_to_end"]),
    ),
    max_size=60,
)


@pytest.mark.parametrize("kind", LISTS)
@given(steps=STEPS)
def test_a_list_is_as_a_list_of_python(kind: Any, steps: list[tuple[int, int, str]]) -> None:
    lists: list[Any] = [kind(), kind()]
    models: list[list[Any]] = [[], []]
    pages = make_pages()
    before = [sys.getrefcount(page) for page in pages]
    for which, number, operation in steps:
        if operation == "append" and pages[number] in models[1 - which]:
            continue
        step(lists[which], models[which], pages[number], operation)
        compare(lists, models, pages)
    if kind is not ReadablePageList:
        on = [2 * sum(page in model for model in models) for page in pages]  # of the model too
        counts = [sys.getrefcount(page) for page in pages]
        assert counts == [count + more for count, more in zip(before, on, strict=True)]
    models.clear()
    lists.clear()
    assert [sys.getrefcount(page) for page in pages] == before


@pytest.mark.parametrize("kind", LISTS)
def test_several_pages_are_removed_at_once(kind: Any) -> None:
    for some in ([], [0], [5], [0, 1], [4, 5], [1, 3, 4], [5, 0, 2], [*range(PAGES)]):
        pages = make_pages()
        made = filled(kind, pages)
        made.remove_all([pages[at] for at in some])
        assert list(made) == [page for at, page in enumerate(pages) if at not in some]
    pages = make_pages()
    made = filled(kind, pages[:3])
    with pytest.raises(KeyError):
        made.remove_all([pages[0], pages[3], pages[1]])
    assert list(made) == pages[1:3]


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_that_changes_during_iteration_is_an_error(kind: Any) -> None:
    for change in ("append", "remove", "move_to_end", "popleft"):
        pages = make_pages()
        made = filled(kind, pages[:4])
        iterator = iter(made)
        assert next(iterator) is pages[0]
        arguments = () if change == "popleft" else (pages[4 if change == "append" else 1],)
        getattr(made, change)(*arguments)
        with pytest.raises(RuntimeError):
            next(iterator)
    pages = make_pages()
    made = filled(kind, pages[:2])
    iterator = iter(made)
    assert iter(iterator) is iterator and list(iterator) == pages[:2]
    made.remove(pages[0])
    assert list(iterator) == []


@pytest.mark.parametrize("kind", LISTS)
def test_what_is_no_page_is_on_no_list(kind: Any) -> None:
    made = filled(kind, make_pages())
    assert None not in made and 1 not in made and object() not in made


@pytest.mark.skipif(compiled.speedups is not None, reason="of pure Python")
def test_a_queue_is_a_deque_without_the_compiled_core() -> None:
    assert PageQueue == deque[SgxEpcPage] and PageList is ReadablePageList
    assert type(PageQueue()) is deque


# --- in C -----------------------------------------------------------------------------------------


@needs_core
def test_a_page_is_on_one_list_at_most() -> None:
    first, second, (page, other, *_more) = PageList(), PageList(), make_pages()
    first.append(page)
    first.append(other)
    before = sys.getrefcount(page)
    for made in (first, second):
        with pytest.raises(AssertionError, match="is on a list already"):
            made.append(page)
    for operation in (second.remove, second.move_to_end):
        with pytest.raises(KeyError):
            operation(page)
    assert list(first) == [page, other] and not second and page not in second
    assert sys.getrefcount(page) == before
    first.remove(page)
    second.append(page)
    assert list(second) == [page]


@needs_core
def test_only_pages_can_be_appended() -> None:
    made: Any = PageList()
    for other in (None, 1, object(), SgxEpcPage, PageList()):
        for operation in (made.append, made.remove, made.move_to_end):
            with pytest.raises(TypeError, match="is no EPC page"):
                operation(other)
        with pytest.raises(TypeError, match="is no EPC page"):
            made.remove_all([other])
    for arguments, named in (((1,), {}), ((), {"pages": 1})):
        with pytest.raises(TypeError, match="takes no arguments"):
            type(made)(*arguments, **named)
    with pytest.raises(SystemError):
        made.remove_all(())
    with pytest.raises(TypeError):
        type(iter(made))()


@needs_core
def test_a_page_lives_as_long_as_it_is_on_a_list() -> None:
    pages = make_pages(3)
    made: Any = filled(PageList, pages)
    seen = [owned(page) for page in pages]
    iterator = iter(made)
    del pages
    assert all(owner() is not None for owner in seen)
    made.popleft()
    assert seen[0]() is None and seen[1]() is not None
    made.remove(made[-1])
    assert seen[2]() is None and len(made) == 1
    del made
    assert seen[1]() is not None
    del iterator
    assert seen[1]() is None


@needs_core
def test_a_page_leaves_a_list_that_ends() -> None:
    page, *_more = make_pages()
    for _ in range(3):
        made = filled(PageList, [page])
        del made
    made = filled(PageList, [page])
    assert list(made) == [page]


@needs_core
@pytest.mark.parametrize("through", ["list", "iterator"])
def test_a_cycle_through_a_list_is_collected(through: str) -> None:
    made: Any = filled(PageList, make_pages(3))
    iterator = iter(made)
    next(iterator)
    seen = owned(made[1])
    made[1].lru = made if through == "list" else iterator
    assert gc.is_tracked(made) and gc.is_tracked(iterator)
    assert gc.get_referents(made) == [*made, type(made)]
    assert gc.get_referents(iterator) == [made, type(iterator)]
    del made, iterator
    assert seen() is not None
    gc.collect()
    assert seen() is None


@needs_core
def test_types_of_lists_get_their_references_back() -> None:
    def counts() -> list[int]:
        gc.collect()
        iterator = type(iter(PageList()))
        return [*map(sys.getrefcount, (PageList, iterator, SgxEpcPage)), sys.getallocatedblocks()]

    def use() -> None:
        for _ in range(1000):
            made: Any = filled(PageList, make_pages())
            iterator = iter(made)
            made.move_to_end(next(iterator))
            assert made[2] in made and None not in made
            with pytest.raises(RuntimeError):
                next(iterator)
            with pytest.raises(KeyError):
                made.remove_all([made.popleft()] * 2)

    use()
    before = counts()
    use()
    after = counts()
    assert after[:3] == before[:3] and after[3] - before[3] < 50


@needs_core
def test_a_copy_of_a_page_is_on_no_list() -> None:
    made: Any = filled(PageList, make_pages(2))
    other: Any = copy.copy(made[0])
    assert other not in made and other.addr == made[0].addr
    made.append(other)
    assert list(made)[2] is other and len(made) == 3
