"""Lists of VA pages: the compiled form and the readable one against a list of Python."""

from __future__ import annotations

import gc
import random
import sys
from typing import Any

import pytest

from softsgx.paging.va_page import ReadableVaPageList, VaPage, VaPageList

LISTS: list[Any] = list({ReadableVaPageList: None, VaPageList: None})


def make_pages(count: int) -> list[VaPage]:
    array: Any = None
    return [VaPage(array, number) for number in range(count)]


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_va_pages_is_one_of_python(kind: Any) -> None:
    rng = random.Random(5)
    for count in range(6):
        pages, made, model = make_pages(count), kind(), list[VaPage]()
        for _step in range(200):
            page = rng.choice(pages) if pages else None
            if page is None:
                pass
            elif page not in model:
                made.append(page)
                model.append(page)
                assert not rng.randrange(2) or made.move_to_end(page) is None
            elif rng.randrange(4) == 0:
                made.remove(page)
                model.remove(page)
            else:
                last = bool(rng.randrange(2))
                made.move_to_end(page, last=last)
                model.remove(page)
                model.insert(len(model) if last else 0, page)
            assert list(made) == model and len(made) == len(model)
            assert list(reversed(made)) == model[::-1]
            assert all((each in made) == (each in model) for each in pages)
            assert next(iter(made), None) is (model[0] if model else None)


@pytest.mark.parametrize("kind", LISTS)
def test_a_va_page_that_is_not_on_the_list_is_a_key_error(kind: Any) -> None:
    page, other = make_pages(2)
    made = kind()
    made.append(other)
    for wrong in (made.remove, made.move_to_end):
        with pytest.raises(KeyError):
            wrong(page)
    assert list(made) == [other] and page not in made and "page" not in made


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_has_a_reference_to_each_of_its_va_pages(kind: Any) -> None:
    (page,) = make_pages(1)
    before, made = sys.getrefcount(page), kind()
    made.append(page)
    assert sys.getrefcount(page) > before
    for last in (True, False):
        made.move_to_end(page, last=last)
    made.clear()
    assert not list(made)
    made.append(page)
    del made
    gc.collect()
    assert sys.getrefcount(page) == before


@pytest.mark.skipif(VaPageList is ReadableVaPageList, reason="the compiled core is not used")
def test_the_compiled_list_takes_va_pages_of_no_list_alone() -> None:
    (page,), first, second = make_pages(1), VaPageList(), VaPageList()
    first.append(page)
    with pytest.raises(AssertionError, match="on a list already"):
        second.append(page)
    with pytest.raises(TypeError, match="no VA page"):
        first.append("page")  # type: ignore[arg-type]
    iterator = iter(first)
    first.move_to_end(page)
    with pytest.raises(RuntimeError, match="changed"):
        next(iterator)
