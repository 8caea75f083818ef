"""The corners of swapping: VA slots, backing, the last page of an enclave, in each implementation.

See ``test_paging_corners`` for the method.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from tests.differential.test_optimised_paging import IMPLEMENTATIONS, worlds_of
from tests.differential.test_paging_corners import (
    compare,
    evicted,
    isolated,
    load,
    pages_of,
)
from tests.model.test_random_programs import World
from tests.support.ciphers import NewerCipher, OlderCipher
from tests.support.hw import RepeatingRuntime

from softsgx.arch import VA_SLOTS
from softsgx.hw.secrets import PagingKey
from softsgx.paging import FlatBacking, LoadFailed, SwapSpace
from softsgx.paging.va import VaArray
from softsgx.paging.va_page import VaSlot
from softsgx.sim.stories.system import build, plan_for


def evict_together(world: World, pages: list[Any]) -> None:
    """Evict pages in one batch: the ETRACK of the first is that of the others, too."""
    reclaimer, lru = world.system.core._reclaimer, pages[0].epc.lru
    some = [page.epc for page in pages]
    assert all(lru.isolate_page(epc) for epc in some)
    victims = reclaimer._prepare(lru, some, force=True)
    assert reclaimer._write(lru, reclaimer._block(lru, victims)) == len(pages)


def test_an_enclave_leaves_with_its_last_page_and_comes_back_with_its_first() -> None:
    def action(world: World) -> object:
        core, enclave, seen = world.system.core, world.system.driver.enclaves[0], list[object]()
        swap, pages = enclave.swap, list[Any](enclave.pages.values())
        for page in pages:
            assert core.evict(page.epc)
            seen.append((swap.children, swap.secs is None, core.counters.secs_out))
        for page in reversed(pages):
            swap.peak_children = swap.children
            load(world, page, group=world.group)
            seen.append((swap.children, swap.peak_children, core.counters.secs_in))
        return [*seen, len(pages)]

    *seen, count = compare(action)
    assert [children for children, *_ in seen] == [*range(count - 1, -1, -1), *range(1, count + 1)]
    assert [gone for _children, gone, _out in seen[:count]] == [False] * (count - 1) + [True]


@pytest.mark.parametrize("together", [2, 3])
def test_an_enclave_leaves_with_the_last_page_of_a_batch(together: int) -> None:
    def action(world: World) -> object:
        core, enclave = world.system.core, world.system.driver.enclaves[0]
        pages = list[Any](enclave.pages.values())
        for page in pages[together:]:
            assert core.evict(page.epc)
        evict_together(world, pages[:together])
        return enclave.swap.children, enclave.swap.secs is None, core.counters.secs_out

    assert compare(action) == (0, True, 1)


def test_a_page_without_content_in_the_backing_is_not_loaded() -> None:
    for fast in IMPLEMENTATIONS[:-1]:
        world = World(80, optimised=fast)
        (page,) = evicted(world)
        free, backing = world.system.core.free_pages, page.swap._backing
        backing.sealed.drop(page.entry.index)
        with pytest.raises(LoadFailed):
            load(world, page)
        assert world.system.core.counters.eldu_failed == 1
        assert world.system.core.free_pages == free


def test_a_page_that_is_poisoned_before_its_ewb_stays() -> None:
    def action(world: World) -> object:
        pages = isolated(world, 2)
        for page in pages:
            assert page.prepare() and page.block()
        # The ETRACK of the first is the second's, too.
        assert pages[0].write()
        world.system.core.poison(pages[1].epc.addr)
        return pages[1].write(), pages[1].epc is not None, pages[1].entry is None

    assert compare(action) == (False, True, True)


def test_a_reservation_ends_the_report_that_backing_is_full() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        slowpath = world.system.core.slowpath
        slowpath.backing_error = "full"
        assert page.prepare() and page.block() and page.write()
        return slowpath.backing_error

    assert compare(action) == ""


def test_an_enclave_with_more_pages_than_a_va_page_has_slots_comes_and_goes() -> None:
    pages = VA_SLOTS + 60

    def action(world: World) -> object:
        build(world.actor.process, plan_for(pages), base=1 << 32)
        enclave, seen = world.system.driver.enclaves[-1], list[object]()
        every: list[Any] = list(enclave.pages.values())
        for turn, some in enumerate((every, every[::3], every[::2], every)):
            resident = [page for page in some if page.epc is not None and page.epc.lru is not None]
            for at in range(0, len(resident), 16):
                evict_together(world, resident[at : at + 16])
            seen.append([(page.free, page.pins) for page in enclave.swap.va.pages()])
            for page in some[turn:]:
                if page.entry is not None:
                    load(world, page, group=world.group)
            va = enclave.swap.va
            seen.append([va.used, va.room, va.promised])
        return seen

    compare(action, pages + 150)


def test_kinds_of_pages_keep_their_flags_and_groups_of_pcmds() -> None:
    def action(world: World) -> object:
        core, seen = world.system.core, list[object]()
        build(world.actor.process, plan_for(70), base=1 << 32)
        enclave = world.system.driver.enclaves[-1]
        for _turn in range(2):
            for page in enclave.pages.values():
                if page.epc is not None and page.epc.lru is not None:
                    core.evict(page.epc)
            seen.append((enclave.swap._backing.pages(), core.counters.truncated))
            for page in enclave.pages.values():
                if page.entry is not None:
                    epc = load(world, page)
                    seen.append(repr(world.system.machine.pages[epc.addr]))
            seen.append((enclave.swap._backing.pages(), core.counters.pcmd_truncated))
        return seen

    compare(action, 200)


class OtherKey(PagingKey):
    """A key of another class: C code does not use it."""


@pytest.mark.parametrize("optimised", IMPLEMENTATIONS)
def test_a_paging_key_of_another_class_seals_and_opens(optimised: Any) -> None:
    world = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised)
    secrets = world.system.machine.secrets
    key = OtherKey(secrets.paging._key)
    key._versions = secrets.paging._versions
    secrets.paging = key
    (page,) = evicted(world)
    assert load(world, page) is page.epc
    world.check()


@pytest.mark.parametrize("cipher", [OlderCipher, NewerCipher])
def test_a_cipher_that_returns_objects_makes_the_same_bytes(cipher: type[OlderCipher]) -> None:
    def action(world: World) -> object:
        pages, seen = evicted(world, 3), list[object]()
        key = world.system.machine.secrets.paging
        key._aead = cipher(key._key)  # type: ignore[assignment]
        for page in pages:
            load(world, page)
            assert world.system.core.evict(page.epc)
            pinned = page.swap._file.open(page.index)
            seen.append((bytes(pinned.data), bytes(pinned.pcmd_bytes)))
        key._aead = None
        for page in pages:
            load(world, page)
        return seen

    assert len(compare(action)) == 3


def test_a_cipher_in_python_can_keep_the_memory_that_it_reads() -> None:
    kept: list[memoryview] = []

    class Keeping(OlderCipher):
        def decrypt(self, *args: Any) -> bytes:
            kept.append(memoryview(args[1]))
            return super().decrypt(*args)

    def action(world: World) -> object:
        (page,) = evicted(world)
        key = world.system.machine.secrets.paging
        key._aead = Keeping(key._key)  # type: ignore[assignment]
        load(world, page)
        for backing in world.backings:
            if isinstance(backing, FlatBacking):
                backing.sealed.clear()  # with the blocks' memory
        return len(bytes(kept.pop()))

    assert compare(action) == 4112


# --- VA slots -------------------------------------------------------------------------------------


class Noting(VaArray):
    """An array of another class, which C code asks."""

    __slots__ = ()
    log: ClassVar[list[str]] = []

    def slot_loaded(self, slot: VaSlot) -> None:
        self.log.append("loaded")
        super().slot_loaded(slot)

    def slot_written(self, slot: VaSlot) -> None:
        self.log.append("written")
        super().slot_written(slot)


def test_a_va_array_of_another_class_is_asked_itself() -> None:
    def action(world: World) -> list[str]:
        (page,), (other,) = evicted(world), isolated(world, 1, first=1)
        va = page.swap.va
        assert other.prepare() and other.block()
        Noting.log = []
        va.__class__ = Noting
        assert other.write()
        load(world, page)
        va.__class__ = VaArray
        return Noting.log

    assert compare(action) == ["written", "loaded"]


def test_a_slot_of_a_page_that_has_become_unusable_makes_no_room() -> None:
    """Reclaim that a charge requests is the only step between the slot's use and its end."""

    def action(world: World) -> object:
        first, second = evicted(world, 2)
        va = first.swap.va
        slot = first.entry.slot

        def request(_group: object) -> None:
            slot.page.eviction, slot.page.accessed = (None, None), False

        world.group.max_pages = world.group.usage_pages + 1
        world.tree.reclaim_ahead = request
        room = va.room
        epc = first.swap.load(first.entry, first, group=world.group)
        seen = va.room - room, slot.page.accessed, va.used, slot.page.free
        world.tree.reclaim_ahead, world.group.max_pages = None, None
        slot.page.eviction = None
        va.room = room + 1
        first.epc, first.entry = epc, None
        world.system.core.mark_reclaimable(epc)
        return seen, second.entry.slot.number

    assert compare(action)[0][:2] == (0, True)


def test_a_slot_that_is_free_again_is_taken_before_those_of_other_pages() -> None:
    def action(world: World) -> object:
        va, seen = world.system.driver.enclaves[0].swap.va, list[object]()
        page, other = evicted(world, 2)
        # A second page without a slot in use stands first.
        epc = world.system.core.alloc(None, reclaim=False, kind="va")
        va.link(va.make(epc))
        first = page.entry.slot.page
        seen.append([each is first for each in va.pages()])
        load(world, page)
        seen.append([each is first for each in va.pages()])
        assert world.system.core.evict(page.epc)
        seen.append(page.entry.slot.page is first)
        load(world, other)
        return seen

    assert compare(action) == [[False, True], [True, False], True]


@pytest.mark.parametrize("what", ["epc", "eviction", "free"])
def test_no_slot_is_taken_of_a_page_that_has_none_to_give(what: str) -> None:
    def action(world: World) -> None:
        (page,) = isolated(world)
        (va_page,) = page.swap.va.pages()
        kept = getattr(va_page, what)
        setattr(va_page, what, {"epc": None, "eviction": (None, None), "free": 0}[what])
        try:
            page.prepare()
        finally:
            setattr(va_page, what, kept)

    for world in worlds_of(80):
        (page,) = evicted(world, last=True)  # makes buffers and room in the backing
        load(world, page)
        with pytest.raises(AssertionError, match="no free VA slot"):
            action(world)


def test_a_reservation_uses_a_page_and_pins_it() -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        (va_page,) = page.swap.va.pages()
        va_page.accessed, pins = False, va_page.pins
        assert page.prepare()
        seen = va_page.accessed, va_page.pins - pins
        assert page.block() and page.write()
        return seen, va_page.pins - pins

    assert compare(action) == ((True, 1), 0)


@pytest.mark.parametrize("stale", [False, True])
def test_a_version_that_is_written_replaces_a_stale_one(stale: bool) -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        assert page.prepare() and page.block()
        slot = page.reservation.slot
        slot.page.stale |= (1 << slot.number | 2 << slot.number) if stale else 0
        assert page.write()
        seen = bin(slot.page.stale), slot.page.pins
        slot.page.stale = 0
        return seen

    compare(action)


@pytest.mark.parametrize("free", ["some", "none"])
@pytest.mark.parametrize("more", [0, 1])
def test_a_va_page_may_leave_once_its_slots_are_all_taken_or_no_page_needs_one(
    free: str, more: int
) -> None:
    def action(world: World) -> object:
        (page,) = isolated(world)
        assert page.prepare() and page.block()
        va, va_page = page.swap.va, page.reservation.slot.page
        kept = va.promised, va.room, va_page.free
        if free == "none":
            va.room, va_page.free = 1, 0  # that of another page
        va.promised = va.used + more
        assert page.write()
        seen = va_page.epc.tracked, va_page.epc.lru is not None
        if va_page.epc.tracked:
            assert va_page.epc.lru.isolate_page(va_page.epc)
            va_page.epc.tracked, va_page.epc.lru = False, None
        va.promised, va.room, va_page.free = kept
        return seen

    assert compare(action)[0] is (more == 0 or free == "none")


def test_the_last_free_slot_of_a_page_is_taken_and_the_next_page_is_used() -> None:
    def action(world: World) -> object:
        va, seen = world.system.driver.enclaves[0].swap.va, list[object]()
        (first,) = va.pages()
        epc = world.system.core.alloc(None, reclaim=False, kind="va")
        va.link(va.make(epc))
        va._pages.move_to_end(first, last=False)
        kept, room = first.free, va.room
        first.free = 1 << 300
        va.room -= kept.bit_count() - 1
        for page in pages_of(world)[:2]:
            assert world.system.core.evict(page.epc)
            seen.append((page.entry.slot.page is first, page.entry.slot.number, first.free))
        va.used += 0
        first.free = kept & ~(1 << 300)
        va.room += first.free.bit_count()
        return seen, va.room - room, [page is first for page in va.pages()]

    seen, _room, order = compare(action)
    assert seen[0] == (True, 300, 0) and not seen[1][0] and order == [False, True]


# --- backing --------------------------------------------------------------------------------------


def test_a_page_without_room_in_the_backing_is_not_prepared() -> None:
    def action(world: World) -> object:
        first, second = isolated(world, 2)
        seen = [first.prepare(), second.prepare()]
        seen += [second.reservation is None, second.being_reclaimed]
        assert first.block() and first.write()
        second.epc.lru.put_back(second.epc)
        second.put()
        return seen

    assert compare(action, backing_limit=2) == [True, False, True, False]


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_of_an_unusual_kind_leaves_no_trace_when_it_is_loaded(count: int) -> None:
    """Its flags differ from those of the first page that was evicted."""

    def action(world: World) -> object:
        core, seen = world.system.core, list[object]()
        pages = pages_of(world)[:count]
        entries = [world.system.machine.pages[page.epc.addr] for page in pages]
        for entry in entries:
            entry.pending = True
        evicted(world, count)
        for page in pages:
            entry = world.system.machine.pages[load(world, page).addr]
            seen.append(entry.pending)
            entry.pending = False
        for page in pages:
            assert core.evict(page.epc)
            seen.append(world.system.machine.pages[load(world, page).addr].pending)
        return seen

    assert compare(action) == [True] * count + [False] * count


@pytest.mark.parametrize("together", [1, 3])
def test_buffers_of_evictions_are_used_again(together: int) -> None:
    for optimised in IMPLEMENTATIONS[:-1]:
        world, counts = World(80, runtime=RepeatingRuntime(seed=7), optimised=optimised), []
        pages = pages_of(world)[:together]
        for _ in range(4):
            evict_together(world, pages)
            counts.append(len(pages[0].swap._file._buffers))
            for page in pages:
                load(world, page, group=world.group)
        # The compiled core takes a buffer only for an eviction that Python code ends.
        assert counts == [1 if world.system.core.compiled else together] * 4


def test_a_reservation_of_python_code_is_used_by_c_code() -> None:
    def action(world: World) -> object:
        seen: list[object] = []
        for page in pages_of(world)[:3]:
            assert page.epc.lru.isolate_page(page.epc)
            page.reservation, page.being_reclaimed = SwapSpace.prepare(page.swap, page.index), True
            number = page.reservation.slot.number
            assert page.block() and page.write()
            seen.append((number, page.entry.slot.number == number))
        return seen

    numbers, same = zip(*compare(action), strict=True)
    assert all(same) and max(numbers) > 0
