"""The guest sees no effect of the host's evictions of its pages.

Goal: each difference between native and guest EPC (the table "native and guest" of
``docs/internals/guests.md``) is handled, and the guest does not see it.

Method: a guest with its own driver on a host with room for all; the test evicts chosen pages in the
steps of a reclaim batch, checks the EPCM, and lets the guest continue.
"""

from __future__ import annotations

import pytest
from tests.support.driver import Launched, launch, pattern
from tests.support.guests import GuestHost, GuestSystem

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.hw import Fault, PageInfoArgs
from softsgx.kvm import GuestStoppedError, PageKept, PageKind, VepcEvicted
from softsgx.paging import FaultResult, MemoryBacking


def system(**options: object) -> tuple[GuestHost, GuestSystem, Launched]:
    """A host, a guest, and an enclave of four data pages in it."""
    host = GuestHost(epc_pages=80)
    guest = host.guest(24, **options)  # type: ignore[arg-type]
    return host, guest, launch(guest.process(), 4)


def index(made: Launched, number: int) -> int:
    return made.offset(number) // PAGE_BYTES


def test_the_host_learns_what_a_page_is_when_it_evicts_it() -> None:
    host, guest, made = system()
    enclave = made.enclave
    va = guest.page(enclave.swap.va.pages()[0].epc.addr)  # type: ignore[union-attr]
    spare = guest.core.alloc(None, reclaim=False)
    guest.guest.leaves.epa(PageType.VA, spare.addr)
    guest.guest.leaves.eremove(spare.addr)
    unused = guest.page(spare.addr)
    tcs, data = guest.data(enclave, 0), guest.data(enclave, index(made, 0))
    children = [guest.data(enclave, at) for at in enclave.pages]
    host.evict(va, unused, *children)
    host.evict(guest.secs(enclave))
    fates = {event.gpa: event.kind for event in host.events if isinstance(event, VepcEvicted)}
    assert fates[va.gpa] == "va"
    assert fates[unused.gpa] == "unused"
    assert fates[tcs.gpa] == fates[data.gpa] == "child"
    assert fates[guest.secs(enclave).gpa] == "secs"
    assert unused.evicted is None, "a page that the guest does not use was written out"
    host.check_invariants()
    thread = made.thread()
    assert thread.load(made.data(2), 8) == pattern(2)[:8]


def test_an_evicted_page_comes_back_as_it_was() -> None:
    host, guest, made = system()
    thread = made.thread()
    thread.store(made.data(1) + 100, b"kept")
    page = guest.data(made.enclave, index(made, 1))
    before = host.epcm(page)
    facts = before.pt, before.rwx, before.linaddr, before.pending, before.modified, before.pr
    host.evict(page)
    assert page.epc is None and page.evicted is not None
    assert thread.load(made.data(1) + 100, 4) == b"kept"
    after = host.epcm(page)
    assert (after.pt, after.rwx, after.linaddr, after.pending, after.modified, after.pr) == facts
    assert not after.blocked
    host.check_invariants()


def test_the_secs_may_be_in_another_virtual_epc_than_its_children() -> None:
    host = GuestHost(epc_pages=80)
    guest = host.guest((12, 12))
    first, second = guest.guest.vepcs
    # Fill the first section but for a few pages, so that the enclave lies in both.
    spare = [guest.core.alloc(None, reclaim=False) for _ in range(8)]
    made = launch(guest.process(), 8)
    secs = guest.secs(made.enclave)
    children = [guest.data(made.enclave, at) for at in made.enclave.pages]
    assert secs.vepc is first and {page.vepc for page in children} == {first, second}
    host.evict(*children)
    host.evict(secs)
    child = next(page for page in children if page.vepc is second)
    assert child.evicted is not None and child.evicted.secs is secs
    thread = made.thread()
    for number in range(8):
        assert thread.load(made.data(number), 8) == pattern(number)[:8]
    assert secs.epc is not None
    host.check_invariants()
    for page in spare:
        guest.core.free(page)


def test_a_guest_counts_its_children_wherever_they_are() -> None:
    host, guest, made = system()
    secs = guest.secs(made.enclave)
    children = [guest.data(made.enclave, at) for at in made.enclave.pages]
    host.evict(*children)
    assert host.epcm(secs).owner.children == 0
    assert host.epcm(secs).owner.virt_children == len(children)
    assert guest.guest.leaves.eremove(secs.gpa) is Status.CHILD_PRESENT
    slot = made.enclave.swap.va.pages()[0].epc.addr + 511 * 8  # type: ignore[union-attr]
    out = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128), 0)
    assert guest.guest.leaves.ewb(out, secs.gpa, slot) is Status.CHILD_PRESENT
    host.evict(secs)
    assert guest.guest.leaves.eremove(secs.gpa) is Status.CHILD_PRESENT, "after it was away itself"
    made.process.exit()
    assert guest.free_pages == guest.epc_pages
    host.check_invariants()


def test_a_secs_leaves_only_when_no_child_is_in_the_epc() -> None:
    host, guest, made = system()
    secs = guest.secs(made.enclave)
    assert secs.get() and secs.prepare()
    assert not secs.block()
    secs.put()
    assert guest.guest.counters.kept_secs == 1
    assert any(isinstance(e, PageKept) and e.reason == "secs with children" for e in host.events)
    assert guest.guest.unreclaimable() == {"secs with children": 1}
    made.thread().store(made.data(0), b"x")  # it is still usable
    host.check_invariants()


def test_the_va_pages_of_a_guest_can_leave() -> None:
    host, guest, made = system()
    for _round in range(8):
        guest.core.reclaim(force=True)
    assert not made.enclave.resident_pages, "the guest's own reclaim has evicted everything"
    va = [
        page
        for vepc in guest.guest.vepcs
        for page in vepc.pages.values()
        if page.epc is not None and host.epcm(page).valid and host.epcm(page).pt is PageType.VA
    ]
    assert va
    host.evict(*va)
    assert all(page.evicted is not None and page.evicted.kind is PageKind.VA for page in va)
    thread = made.thread()
    for number in range(4):
        assert thread.load(made.data(number), 8) == pattern(number)[:8]
    host.check_invariants()


@pytest.mark.parametrize("tracked_before", [False, True])
def test_a_page_that_the_guest_has_blocked_comes_back_blocked(tracked_before: bool) -> None:
    host, guest, made = system()
    leaves = guest.guest.leaves
    secs, page = guest.secs(made.enclave), guest.data(made.enclave, index(made, 0))
    assert leaves.eblock(page.gpa) is Status.SUCCESS
    if tracked_before:
        assert leaves.etrack(secs.gpa) is Status.SUCCESS
    host.evict(page)
    assert page.evicted is not None and page.evicted.blocked
    assert guest.guest.counters.guest_blocked == 1
    assert leaves.eblock(page.gpa) is Status.BLKSTATE
    assert host.epcm(page).blocked
    slot = made.enclave.swap.va.pages()[0].epc.addr + 511 * 8  # type: ignore[union-attr]
    out = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128), 0)
    assert leaves.ewb(out, page.gpa, slot) is Status.SUCCESS
    assert out.linaddr == made.data(0)
    back = PageInfoArgs(made.data(0), out.srcpge, out.secinfo, secs.gpa)
    assert leaves.eldu(back, page.gpa, slot) is Status.SUCCESS
    assert made.thread().load(made.data(0), 8) == pattern(0)[:8]


def test_a_page_tracked_while_it_was_away_is_tracked_when_it_is_back() -> None:
    host, guest, made = system()
    leaves = guest.guest.leaves
    thread = made.thread()
    secs, page = guest.secs(made.enclave), guest.data(made.enclave, index(made, 0))
    leaves.eblock(page.gpa)
    host.evict(page)
    made.process.ptes.kick()
    assert leaves.etrack(secs.gpa) is Status.SUCCESS
    assert thread.load(made.data(1), 8) == pattern(1)[:8]
    slot = made.enclave.swap.va.pages()[0].epc.addr + 511 * 8  # type: ignore[union-attr]
    out = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128), 0)
    assert leaves.ewb(out, page.gpa, slot) is Status.SUCCESS


def test_every_processor_inside_is_interrupted_and_no_other() -> None:
    host = GuestHost(epc_pages=100)
    guest, other = host.guest(24), host.guest(24, name="other")
    made, foreign = launch(guest.process(), 4, threads=2), launch(other.process(), 4)
    threads = [made.thread(0), made.thread(1)]
    outsider = foreign.thread(0)
    for thread in threads:
        thread.load(made.data(0))
    inside = outsider.cpu.inside
    host.evict(guest.data(made.enclave, index(made, 0)))
    assert [thread.cpu.inside for thread in threads] == [None, None]
    assert outsider.cpu.inside is inside is not None
    assert guest.guest.counters.kicks >= 1 and other.guest.counters.kicks == 0
    for thread in threads:
        assert thread.load(made.data(0), 8) == pattern(0)[:8]
        assert thread.exits >= 1


def test_without_a_processor_inside_none_is_interrupted() -> None:
    host, guest, made = system()
    host.evict(guest.data(made.enclave, index(made, 0)))
    assert guest.guest.counters.kicks == 0
    assert guest.guest.counters.etrackc == 1


def test_a_batch_of_one_enclave_costs_one_tracking_cycle_and_one_round_of_interrupts() -> None:
    host, guest, made = system()
    thread = made.thread()
    thread.load(made.data(0))
    host.evict(*(guest.data(made.enclave, index(made, number)) for number in range(4)))
    assert (guest.guest.counters.etrackc, guest.guest.counters.kicks) == (1, 1)


def test_a_cycle_that_the_guest_has_left_incomplete_is_completed() -> None:
    host, guest, made = system()
    thread = made.thread()
    thread.load(made.data(0))
    assert guest.guest.leaves.etrack(guest.secs(made.enclave).gpa) is Status.SUCCESS
    host.evict(guest.data(made.enclave, index(made, 0)))
    assert guest.guest.counters.prev_incomplete == 1
    assert thread.load(made.data(0), 8) == pattern(0)[:8]


def test_a_page_is_young_while_the_guest_uses_it() -> None:
    host, guest, made = system()
    thread = made.thread()
    used, other = (guest.data(made.enclave, index(made, number)) for number in (1, 2))
    for page in (used, other):
        page.age()
    thread.load(made.data(1))
    assert not used.age() and other.age()
    assert used.age(), "looking makes it old"
    thread.load(made.data(1))
    assert used.age(), "a translation that a processor holds hides its use"
    host.check_invariants()


def test_the_guest_evicts_a_page_that_the_host_has_evicted() -> None:
    host, guest, made = system()
    page = guest.data(made.enclave, index(made, 3))
    host.evict(*(guest.data(made.enclave, at) for at in made.enclave.pages))
    for _round in range(8):
        guest.core.reclaim(force=True)
    assert not made.enclave.resident_pages
    assert page.evicted is None, "the host keeps a page that the guest has evicted itself"
    assert made.thread().load(made.data(3), 8) == pattern(3)[:8]
    host.check_invariants()


def test_a_pending_page_is_accepted_after_it_was_away() -> None:
    host, guest, made = system()
    made = launch(guest.process(), 4, size=32 * PAGE_BYTES)
    thread = made.thread()
    hole = made.data(6)
    with pytest.raises(Exception, match="SIGSEGV"):
        thread.load(hole)
    thread.abandon()
    page = guest.data(made.enclave, (hole - made.base) // PAGE_BYTES)
    assert host.epcm(page).pending
    host.evict(page)
    again = made.process.thread(1)
    again.enter(made.tcs())
    assert again.eaccept(hole, PageType.REG << 8 | 3 | 8, made.data(0)) is Status.SUCCESS
    assert again.load(hole, 8) == bytes(8)


def test_a_page_whose_bytes_were_changed_stops_its_guest_and_no_other() -> None:
    backings: list[MemoryBacking] = []

    def backing(_pages: int) -> MemoryBacking:
        backings.append(MemoryBacking())
        return backings[-1]

    host = GuestHost(epc_pages=100, backing=backing)
    guest, other = host.guest(24, name="victim"), host.guest(24, name="other")
    made, foreign = launch(guest.process(), 4), launch(other.process(), 4)
    page = guest.data(made.enclave, index(made, 1))
    host.evict(page)
    content = backings[0].pin(page.index, create=False)
    content.data[17] ^= 1
    with pytest.raises(GuestStoppedError, match=f"page {page.gpa:#x}.*SGX_MAC_COMPARE_FAIL"):
        made.thread().load(made.data(1))
    assert guest.guest.stopped is not None and guest.guest.resident == 0
    with pytest.raises(GuestStoppedError):
        made.process.thread(1).enter(made.tcs())
    assert foreign.thread().load(foreign.data(1), 8) == pattern(1)[:8]
    host.check_invariants()


def test_a_page_that_could_not_be_written_is_not_seen_blocked() -> None:
    host, guest, made = system()
    page = guest.data(made.enclave, index(made, 1))
    assert page.get() and page.prepare() and page.block()
    assert page.epc is not None
    entry = host.epcm(page)
    enclave, enclave_epoch = entry.owner, entry.owner.epoch
    enclave.epoch = -1  # EWB now finds the block count impossible: #GP
    assert not page.write()
    enclave.epoch = enclave_epoch
    page.put()
    assert page.blocked_by_host and guest.guest.counters.kept_failed == 1
    assert enclave.virt_children == 0
    assert made.thread().load(made.data(1), 8) == pattern(1)[:8]
    assert not page.blocked_by_host and not host.epcm(page).blocked
    host.check_invariants()


def test_a_page_poisoned_before_ewb_is_not_read_and_its_faults_are_sigbus() -> None:
    host, guest, made = system()
    page = guest.data(made.enclave, index(made, 1))
    assert page.get() and page.prepare() and page.block()
    epc = page.epc
    assert epc is not None and epc.lru is not None and epc.lru.isolate_page(epc)
    host.core.poison(epc.addr)
    assert not page.write() and page.epc is epc
    epc.lru.put_back(epc)
    page.put()
    evicted = guest.guest.counters.evicted
    assert page.vepc.mappings[0].fault(page.index) is FaultResult.SIGBUS
    assert guest.guest.counters.evicted == evicted and host.epcm(page).valid
    host.check_invariants()


def test_a_page_poisoned_before_eblock_is_not_blocked() -> None:
    host, guest, made = system()
    page = guest.data(made.enclave, index(made, 1))
    assert page.get() and page.prepare()
    assert page.epc is not None
    host.core.poison(page.epc.addr)
    assert not page.block()
    page.put()
    assert not page.blocked_by_host and not host.epcm(page).blocked
    assert made.thread().load(made.data(1), 8) == pattern(1)[:8]
    host.check_invariants()


def test_leaves_of_hypervisors_are_not_for_guests() -> None:
    _host, guest, made = system()
    leaves, secs = guest.guest.leaves, guest.secs(made.enclave).gpa
    outcomes = {}
    for name, operands in {
        "erdinfo": (bytearray(32), secs),
        "etrackc": (secs,),
        "elduc": (PageInfoArgs(), secs, secs),
        "eupdatesvn": (),
        "eincvirtchild": (secs, secs),
        "esetcontext": (secs, bytes(8)),
    }.items():
        with pytest.raises(Fault) as fault:
            getattr(leaves, name)(*operands)
        outcomes[name] = str(fault.value)
    assert outcomes == {
        "erdinfo": "#GP(0)",
        "etrackc": "#GP(0)",
        "elduc": "#GP(0)",
        "eupdatesvn": "#GP(0)",
        "eincvirtchild": "#UD",
        "esetcontext": "#UD",
    }
