"""An EPCM entry is written as a whole, in C as in Python, and a page keeps it."""

from __future__ import annotations

import gc
import sys
from itertools import product
from typing import Any

import pytest
from tests.model.test_random_programs import World
from tests.support.hw import make_machine
from tests.unit.test_compiled_references import fault

from softsgx import compiled
from softsgx.arch import EpcAddr, PageType
from softsgx.hw import EpcPage
from softsgx.hw.epcm import _write_fields

needs_core = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)
ADDR = EpcAddr(0x1000)


def dirty() -> EpcPage:
    """An entry of which every field has another value than a new one's."""
    page = EpcPage(ADDR)
    page.lock, page.modification_lock, page.stored = 3, True, "stored"
    page.pt, page.rwx, page.secs, page.linaddr = PageType.TRIM, 5, EpcPage(ADDR), 2**64 - 1
    page.blocked = page.pending = page.modified = page.pr = page.valid = True
    page.bepoch = -2
    any_object: Any = "held"
    page.enclave = page.slots = any_object
    return page


def fields(page: EpcPage) -> dict[str, object]:
    return {name: getattr(page, name) for name in EpcPage.__slots__}


@needs_core
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("pt", PageType)
def test_c_code_writes_an_entry_as_python_code_does(
    pt: PageType, pending: bool, valid: bool
) -> None:
    core: Any = compiled.speedups
    for rwx, linaddr, (first, second) in product(
        (0, 7), (0, 2**64 - 4096), ((dirty(), dirty()), (EpcPage(ADDR), EpcPage(ADDR)))
    ):
        second.secs = first.secs
        new: Any = (pt, rwx, EpcPage(ADDR), linaddr, pending, [8], valid)
        core.write_entry(first, *new)
        _write_fields(second, *new)
        assert fields(first) == fields(second)
        assert first.linaddr == linaddr and first.rwx == rwx and first.valid is valid


@needs_core
@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        *((0, 1, TypeError), (2, "7", TypeError), (4, "1", TypeError)),
        *((2, 256, OverflowError), (2, -1, OverflowError)),
        *((4, -1, OverflowError), (4, 2**64, OverflowError)),
    ],
)
def test_an_entry_that_cannot_be_written_stays_as_it_is(
    place: int, value: Any, error: type[Exception]
) -> None:
    core: Any = compiled.speedups
    page = dirty()
    before = fields(page)
    arguments: list[Any] = [page, PageType.REG, 1, None, 0, False, None, False]
    arguments[place] = value
    with pytest.raises(error):
        core.write_entry(*arguments)
    with pytest.raises(TypeError):
        core.write_entry(*arguments[:7])
    assert fields(page) == before


@needs_core
def test_an_entry_releases_what_it_held() -> None:
    core: Any = compiled.speedups
    page, secs = EpcPage(ADDR), EpcPage(ADDR)
    core.write_entry(page, PageType.VA, 1, None, 0, False, None, True)
    before = [sys.getrefcount(one) for one in (secs, PageType.REG)]
    for _ in range(100):
        core.write_entry(page, PageType.REG, 1, secs, 2**40, False, [8], True)
        core.write_entry(page, PageType.VA, 1, None, 0, False, None, True)
    assert [sys.getrefcount(one) for one in (secs, PageType.REG)] == before


@needs_core
def test_an_entry_of_c_code_has_112_bytes() -> None:
    assert sys.getsizeof(EpcPage(ADDR)) == 112


# --- entries and pages of a core ------------------------------------------------------------------


def test_a_map_of_pages_keeps_its_entries() -> None:
    machine = make_machine()
    base = machine.config.sections[0].base
    entry = machine.page_at(base)
    machine.power_transition()
    assert machine.page_at(base) is entry and machine.pages[base] is entry


def test_platforms_share_no_page() -> None:
    """So the entry that a page keeps is that of its machine."""
    worlds = [World(40) for _ in range(2)]
    first, second = (world.system.core._pool.records for world in worlds)
    assert {*first} & {*second}, "pages of the same addresses"
    assert not {*map(id, first.values())} & {*map(id, second.values())}


@needs_core
def test_pages_do_not_keep_entries_alive_that_nothing_else_holds() -> None:
    def entries() -> int:
        gc.collect()
        return sum(type(one) is EpcPage for one in gc.get_objects())

    before = entries()
    for _ in range(2):
        world = World(40, optimised="compiled")
        for number in range(60):
            fault(world, number)
        assert entries() > before
        del world
        assert entries() <= before


@needs_core
def test_a_page_holds_its_entry_once() -> None:
    world = World(40, optimised="compiled")
    for number in range(60):
        fault(world, number)
    machine = world.system.machine
    resident = [page.epc for page in world.system.driver.enclaves[0].pages.values() if page.epc]
    counts = set()
    for page in resident:
        entry = machine.pages[page.addr]
        assert entry.valid
        counts.add(sys.getrefcount(entry))
    # The map, the page, and in this function the variable and the argument.
    assert counts == {4}
