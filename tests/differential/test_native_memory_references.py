"""Enclave memory of the native engine in C gives back each reference that it takes.

Method: the same steps many times on a site of ``test_native_memory``.  The number of allocated
blocks stays what it was, and so do the references of everything that the steps share.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.differential.test_native_memory import Site
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx import compiled
from softsgx.engines.native.memory.store import StoredPage

TIMES = 300

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(compiled.speedups is None, reason=compiled.description),
    pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd"),
]


def shared(site: Site) -> list[object]:
    table, store, memory, pager = site.table, site.store, site.memory, site.pager
    objects: list[object] = [None, True, False, 0, 1, 3, site, table, store, memory, pager]
    owners: list[Any] = [table, store, memory, pager, cast(Any, pager)._fetches]
    for owner in owners:
        names = getattr(type(owner), "__slots__", None) or vars(owner)
        objects += [getattr(owner, name, None) for name in names]
    objects += site.system.machine.pages.values()
    objects += list(site.enclave.pages.values())
    objects += [page.index for page in site.enclave.pages.values()]
    for record in store._pages:
        objects += [record, *(getattr(record, name) for name in StoredPage.__slots__)]
    return objects


def fault(site: Site, number: int) -> None:
    site.do("fault", number, 0)


def hide(site: Site, number: int) -> None:
    site.do("fault", number, 0)
    site.do("zap", number, 0)
    site.hide()
    site.do("evict", number, 0)


def evict(site: Site, number: int) -> None:
    site.do("fault", number, 0)
    site.do("evict", number, 0)


def age(site: Site, number: int) -> None:
    site.do("fault", number, 0)
    site.do("age", number, 0)
    site.do("age", number, 0)
    site.do("go on", number, 0)


def age_and_show(site: Site, number: int) -> None:
    """Blocks of pagemap are read, and a page is shown after that."""
    site.do("fault", number + 1, 0)
    site.do("age", number + 1, 0)
    evict(site, number)
    site.do("go on", number, 0)


def mark(site: Site, number: int) -> None:
    site.do("fault", number, 0)
    site.do("zap", number, 0)
    site.memory.mark(site.address(number) + 8)
    site.hide()
    site.do("evict", number, 0)


def no_hole(site: Site, number: int) -> None:
    site.do("evict", number, 0)
    os.pwrite(site.file, b"\2", site.address(number))
    site.do("fault", number, 0)


def joined(site: Site, number: int) -> None:
    if site.other not in site.memory.users:
        site.do("join", 0, 0)
    hide(site, number)


def several(site: Site, number: int) -> None:
    for each in (number, number + 1, number + 3):
        site.do("fault", each, 0)
        site.do("zap", each, 0)
    site.hide()
    for each in (number, number + 1, number + 3):
        site.do("evict", each, 0)


def elsewhere(site: Site, number: int) -> None:
    """Another page table than that of the file's only user."""
    site.memory.users[:] = [site.other]
    evict(site, number)
    site.memory.users[:] = [site.table]


@pytest.mark.parametrize(
    "step",
    [fault, hide, evict, age, age_and_show, mark, no_hole, joined, several, elsewhere],
    ids=lambda step: step.__name__,
)
def test_a_step_leaves_no_reference_behind(step: Callable[[Site, int], None]) -> None:
    site: Any = Site(0, "compiled", "userfaultfd")
    try:

        def action() -> None:
            step(site, 1)
            site.calls.clear()
            site.errors.clear()
            site.note.log.clear()

        for _ in range(5):
            action()
        gc.collect()
        things = shared(site)
        before = [sys.getrefcount(thing) for thing in things]
        blocks = sys.getallocatedblocks()
        for _ in range(TIMES):
            action()
        gc.collect()
        more = sys.getallocatedblocks() - blocks
        after = [sys.getrefcount(thing) for thing in things]
        assert more < TIMES // 2, more
        for thing, early, late in zip(things, before, after, strict=True):
            assert abs(late - early) < TIMES // 2, (type(thing), early, late)
    finally:
        site.close()
