"""One enclave's pages out and in: tracking, the SECS, failures at every place, loss of power.

Toy enclaves on the real leaves.  "Processors inside" are entries in the tracking counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from tests.support.epc import ToyEnclave, ToyPage
from tests.support.hw import make_machine

from softsgx.arch import PAGE_BYTES, Pcmd, Status
from softsgx.defects import Defect
from softsgx.hw import Machine
from softsgx.paging import (
    BackingFile,
    EpcBusy,
    EpcCore,
    FailingBacking,
    FileBacking,
    LoadFailed,
    MachineCheck,
    MemoryBacking,
    NoEpc,
    Policy,
    SwapEntry,
)
from softsgx.paging.events import Evicted, TrackingRound
from softsgx.runtime import InlineRuntime, Runtime, SeededRuntime
from softsgx.trace import Event

EPC_PAGES = 512


class Bench:
    def __init__(
        self,
        *defects: Defect,
        pages: int = EPC_PAGES,
        runtime: Runtime | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.runtime = InlineRuntime() if runtime is None else runtime
        self.machine: Machine = make_machine(epc_pages=pages, runtime=self.runtime)
        self.events: list[Event] = []
        self.core = EpcCore(
            self.machine,
            self.runtime,
            dirty=(),
            tracer=self.events.append,
            defects=frozenset(defects),
            policy=policy,
        )
        self.enclaves: list[ToyEnclave] = []

    def enclave(self, pages: int = 0, **more: object) -> ToyEnclave:
        encl = ToyEnclave(self.core, self.machine, number=len(self.enclaves) + 1, **more)  # type: ignore[arg-type]
        self.enclaves.append(encl)
        for index in range(pages):
            encl.add(index)
        return encl

    def evict(self, pages: int | None = None) -> None:
        """Run batches by force until ``pages`` pages left, or none is left on the list."""
        before = self.core.counters.reclaimed
        for _ in range(1000):
            if pages is not None and self.core.counters.reclaimed - before >= pages:
                return
            if not self.core.root.has_reclaimable():
                return
            self.core.reclaim(force=True)

    def check(self) -> None:
        self.core.check_invariants()
        self.machine.check_invariants()
        for encl in self.enclaves:
            if not encl.destroyed:
                encl.check_invariants()


def evict_one(encl: ToyEnclave, index: int) -> ToyPage:
    """Take one page through the reclaimer's calls; it must leave."""
    page = encl.pages[index]
    epc = page.epc
    assert epc is not None and encl.core.unmark_reclaimable(epc)
    assert page.prepare() and page.block() and page.write()
    encl.core.free(epc)
    return page


# --- tracking -------------------------------------------------------------------------------------


def rounds(bench: Bench) -> Counter[str]:
    return Counter(event.step for event in bench.events if isinstance(event, TrackingRound))


def tries(bench: Bench, kind: str = "page") -> list[int]:
    return [
        event.tries for event in bench.events if isinstance(event, Evicted) and event.kind == kind
    ]


def test_an_idle_enclaves_batch_takes_one_etrack_and_no_interrupt() -> None:
    bench = Bench()
    bench.enclave(8)
    bench.core.reclaim(force=True)
    assert rounds(bench) == {"etrack": 1}
    assert tries(bench) == [2, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("processors", [1, 3])
def test_a_busy_enclaves_batch_takes_one_etrack_and_one_round_of_interrupts(
    processors: int,
) -> None:
    bench = Bench()
    encl = bench.enclave(8)
    for _ in range(processors):
        encl.enter()
    bench.core.reclaim(force=True)
    assert rounds(bench) == {"etrack": 1, "ipi": 1} and encl.kicks == 1
    assert tries(bench) == [3, 1, 1, 1, 1, 1, 1, 1]


def test_each_enclave_of_a_mixed_batch_has_its_own_round() -> None:
    bench = Bench()
    first, second = bench.enclave(), bench.enclave()
    for index in range(4):
        first.add(index)
        second.add(index)
    first.enter()
    bench.core.reclaim(force=True)
    assert rounds(bench) == {"etrack": 2, "ipi": 1}
    assert (first.kicks, second.kicks) == (1, 0)


def test_processors_are_interrupted_only_after_etrack_did_not_help() -> None:
    bench = Bench()
    encl = bench.enclave(2)
    encl.enter()
    evict_one(encl, 0)
    steps = [event.step for event in bench.events if isinstance(event, TrackingRound)]
    assert steps == ["etrack", "ipi"]


def test_a_processor_that_enters_after_etrack_does_not_delay_eviction() -> None:
    bench = Bench()
    encl = bench.enclave(2)
    encl.enter()
    encl.on_kick = encl.enter  # it comes back at once
    evict_one(encl, 0)
    assert encl.kicks == 1 and len(encl.inside) == 1
    encl.on_kick = None
    evict_one(encl, 1)
    assert encl.kicks == 2


def test_a_tracking_cycle_left_incomplete_by_others_is_completed_first() -> None:
    bench = Bench()
    encl = bench.enclave(2)
    encl.enter()
    assert encl.swap.secs is not None
    assert bench.core.leaves.etrack(encl.swap.secs.addr) is Status.SUCCESS
    evict_one(encl, 0)
    assert bench.core.counters.prev_trk_incmpl == 1
    bench.check()


# --- content, SECS, backing -----------------------------------------------------------------------


def test_every_page_comes_back_as_it_was_written() -> None:
    bench = Bench()
    encl = bench.enclave(40)
    for index in range(40):
        encl.store(index, bytes([index]) * PAGE_BYTES)
    bench.evict()
    bench.check()
    encl.check()
    bench.check()


def test_the_secs_leaves_with_its_last_child_and_comes_back_before_the_first() -> None:
    bench = Bench()
    encl = bench.enclave(3)
    bench.evict()
    assert encl.swap.secs is None and encl.swap.secs_entry is not None
    assert bench.core.free_pages == EPC_PAGES - 1  # the VA page
    order = [event.kind for event in bench.events if isinstance(event, Evicted)]
    assert order == ["page", "page", "page", "secs"]
    encl.touch(1)
    assert encl.swap.secs is not None
    bench.check()


def test_the_secs_of_an_enclave_that_is_not_initialised_stays() -> None:
    bench = Bench()
    encl = bench.enclave(3)
    encl.swap.secs_may_leave = False
    bench.evict()
    assert encl.swap.secs is not None
    encl.swap.secs_may_leave = True
    bench.evict()
    assert encl.swap.secs is None
    encl.check()
    bench.check()


@pytest.mark.parametrize("size_pages", [2, 16, 32, 64, 128])
def test_contents_pcmds_and_the_secs_are_where_linux_puts_them(size_pages: int) -> None:
    bench = Bench()
    backing = MemoryBacking()
    encl = bench.enclave(size_pages=size_pages, backing=backing)
    pages = size_pages
    for index in (0, pages - 1):
        encl.add(index)
    bench.evict()
    where = {0: (0, pages + 1), pages - 1: (pages - 1, pages + 1 + (pages - 1) // 32)}
    where[pages] = (pages, pages + 1 + pages // 32)
    assert backing.pages() == 3 + len({pcmd for _content, pcmd in where.values()})
    for index, (content, pcmd) in where.items():
        assert any(backing.pin(content, create=False).data)
        stored = Pcmd.unpack(backing.pin(pcmd, create=False).data, index % 32 * 128)
        assert any(stored.mac)
        assert stored.secinfo.page_type == (0 if index == pages else 2)


def test_backing_shrinks_to_nothing_when_everything_is_back() -> None:
    bench = Bench()
    backing = MemoryBacking()
    encl = bench.enclave(40, backing=backing)
    bench.evict()
    assert backing.pages() > 40
    encl.check()
    assert backing.pages() == 0


def test_an_enclave_may_die_with_all_its_pages_evicted() -> None:
    bench = Bench()
    encl = bench.enclave(40)
    bench.evict()
    encl.close()
    assert encl.destroyed and bench.core.free_pages == EPC_PAGES
    bench.check()


def test_an_enclave_may_die_with_some_pages_here_and_some_there() -> None:
    bench = Bench()
    encl = bench.enclave(40)
    bench.evict(10)
    encl.close()
    assert bench.core.free_pages == EPC_PAGES
    bench.check()


def test_an_evicted_page_that_is_dropped_leaves_its_slot_to_another() -> None:
    bench = Bench()
    encl = bench.enclave(2)
    evict_one(encl, 0)
    encl.remove(0)
    encl.add(5)
    evict_one(encl, 5)  # into the same slot, which still holds a version
    assert encl.read(5) == encl.pages[5].content
    bench.check()


def test_a_slot_that_still_belongs_to_another_page_is_our_mistake() -> None:
    bench = Bench()
    encl = bench.enclave(2)
    page = evict_one(encl, 0)
    assert page.entry is not None and page.entry.slot is not None
    slot = page.entry.slot
    slot.page.free |= 1 << slot.number  # a bookkeeping error
    epc = encl.pages[1].epc
    assert epc is not None and bench.core.unmark_reclaimable(epc)
    assert encl.pages[1].prepare() and encl.pages[1].block()
    with pytest.raises(AssertionError, match="another page's version"):
        encl.pages[1].write()


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_page_is_lost_when_any_backing_request_fails() -> None:
    for nth in range(1, 200):
        bench = Bench(policy=Policy(batch_pages=4, scan_pages=4))
        backing = FailingBacking.at(MemoryBacking(), nth)
        encl = bench.enclave(6, backing=backing)
        bench.evict()
        bench.check()
        for index in range(6):
            for _try in range(2):
                try:
                    encl.touch(index)
                except LoadFailed:
                    continue
                break
        bench.check()
        encl.check()
        bench.check()
        encl.close()
        assert bench.core.free_pages == EPC_PAGES
        if not backing.failures:
            assert nth > 20, "few places were tried"
            return
    raise AssertionError("more requests than expected")


def test_a_secs_whose_backing_failed_is_tried_again() -> None:
    bench = Bench()
    requests = 2 * 3 + 1  # of the children, then the SECS' first
    encl = bench.enclave(3, backing=FailingBacking.at(MemoryBacking(), requests))
    bench.core.reclaim(force=True)
    assert encl.swap.secs is not None and encl.swap.children == 0
    bench.evict()
    assert encl.swap.secs is None
    encl.check()
    bench.check()


class Unkickable(ToyEnclave):
    """Its processors stay inside whatever happens."""

    def kick(self) -> None:
        self.kicks += 1


def failing_ewb(*defects: Defect) -> tuple[Bench, ToyEnclave]:
    bench = Bench(*defects)
    encl = Unkickable(bench.core, bench.machine)
    bench.enclaves.append(encl)
    for index in range(2):
        encl.add(index)
    encl.enter()
    bench.core.reclaim(force=True)
    return bench, encl


def test_a_page_that_would_not_leave_stays_blocked_and_leaves_later() -> None:
    bench, encl = failing_ewb()
    page = encl.pages[0]
    assert page.epc is not None and page.epc.blocked and page.epc.tracked
    assert bench.core.counters.ewb_failed == 2
    bench.core.check_invariants()
    encl.check_invariants()
    ToyEnclave.kick(encl)
    bench.evict()
    assert encl.swap.children == 0
    encl.check()
    bench.check()


def test_a_blocked_page_is_usable_again_after_it_was_out() -> None:
    _bench, encl = failing_ewb()
    ToyEnclave.kick(encl)
    assert encl.read(0) == encl.pages[0].content


def test_defect_l1_frees_a_page_that_is_still_valid() -> None:
    bench, encl = failing_ewb(Defect.PAGE_FREED_AFTER_FAILED_EWB)
    assert bench.core.counters.lost > 0
    freed = [page for page in bench.machine.valid_pages() if page.secs is not None]
    assert len(freed) == 2 and bench.core.counters.held["reg"] == 0
    with pytest.raises(LoadFailed, match="lost"):
        encl.touch(0)


def test_defect_b26_leaks_the_slot_of_a_failed_eviction() -> None:
    _bench, encl = failing_ewb(Defect.VA_SLOT_LEAKED_BY_FAILED_EWB)
    with pytest.raises(AssertionError):
        encl.check_invariants()


def tampered(*defects: Defect) -> tuple[Bench, ToyEnclave, Callable[[], None]]:
    bench = Bench(*defects)
    backing = MemoryBacking()
    encl = bench.enclave(2, backing=backing)
    evict_one(encl, 0)

    def flip() -> None:
        page = backing.pin(0, create=True)
        page.data[100] ^= 1
        page.mark_dirty()
        page.unpin()

    flip()
    return bench, encl, flip


def test_a_tampered_page_is_refused_and_loads_once_it_is_itself_again() -> None:
    bench, encl, flip = tampered()
    free = bench.core.free_pages
    for _ in range(2):
        with pytest.raises(LoadFailed, match="SGX_MAC_COMPARE_FAIL"):
            encl.touch(0)
        bench.check()
        assert bench.core.free_pages == free
    flip()
    assert encl.read(0) == encl.pages[0].content
    bench.check()


def test_defect_l2_destroys_a_page_whose_load_failed() -> None:
    _bench, encl, flip = tampered(Defect.PAGE_DESTROYED_BY_FAILED_ELDU)
    with pytest.raises(LoadFailed, match="MAC"):
        encl.touch(0)
    flip()
    with pytest.raises(LoadFailed):
        encl.touch(0)


def without_backing(*defects: Defect) -> tuple[Bench, ToyEnclave]:
    bench = Bench(*defects)
    full = FailingBacking(MemoryBacking(), lambda _request: True)
    encl = bench.enclave(2, backing=full)
    bench.core.reclaim(force=True)
    return bench, encl


def test_a_page_without_backing_stays() -> None:
    bench, encl = without_backing()
    assert encl.swap.children == 2 and bench.core.counters.lost == 0
    encl.check()
    bench.check()


def test_defect_b25_loses_a_page_whose_backing_fails_late() -> None:
    bench, encl = without_backing(Defect.BACKING_FETCHED_AFTER_BLOCK)
    assert bench.core.counters.lost > 0
    with pytest.raises(LoadFailed, match="lost"):
        encl.touch(0)


def poisoned_in_a_batch(*defects: Defect) -> tuple[Bench, ToyEnclave]:
    """The page is poisoned when it was blocked already."""
    bench = Bench(*defects)
    encl = bench.enclave(2)
    page = encl.pages[0]
    assert page.epc is not None
    bench.core.root.lru.isolate(1)
    assert page.prepare() and page.block()
    bench.core.poison(page.epc.addr)
    return bench, encl


def test_a_page_poisoned_in_a_batch_is_not_read() -> None:
    bench, encl = poisoned_in_a_batch()
    assert not encl.pages[0].write()
    epc = encl.pages[0].epc
    assert epc is not None and not bench.core.root.lru.put_back(epc)
    encl.put()
    encl.check_invariants()
    bench.check()


def test_defect_l6_reads_a_poisoned_page() -> None:
    _bench, encl = poisoned_in_a_batch(Defect.PAGE_POISONED_IN_BATCH_EVICTED)
    with pytest.raises(MachineCheck):
        encl.pages[0].write()


# --- shortage -------------------------------------------------------------------------------------


def test_a_load_without_a_free_page_says_so_and_changes_nothing() -> None:
    bench = Bench(pages=16)
    encl = bench.enclave(4)
    bench.evict()
    while bench.core.free_pages:
        bench.core.alloc(None, reclaim=False)
    with pytest.raises(NoEpc):
        encl.touch(0)
    bench.check()


def test_what_a_load_that_got_stuck_has_brought_in_can_leave_again() -> None:
    """The SECS came in, but there was no page for the child: it must not stay for ever."""
    bench = Bench(pages=16)
    encl = bench.enclave(4)
    bench.evict()
    held = [bench.core.alloc(None, reclaim=False) for _ in range(bench.core.free_pages - 1)]
    entry = encl.pages[0].entry
    assert entry is not None
    with pytest.raises(EpcBusy), encl.lock:
        encl.swap.load(entry, encl.pages[0])
    assert encl.swap.secs is not None and encl.swap.secs.tracked
    bench.evict()
    assert encl.swap.secs is None
    for page in held:
        bench.core.free(page)
    encl.check()
    bench.check()


@pytest.mark.parametrize("pages", [12, 13, 16, 24])
def test_a_tiny_epc_serves_enclaves_much_larger_than_itself(pages: int) -> None:
    bench = Bench(pages=pages)
    enclaves = [bench.enclave(30) for _ in range(3)]
    bench.check()
    for _ in range(2):
        for encl in enclaves:
            encl.check()
    bench.check()
    for encl in enclaves:
        encl.close()
    assert bench.core.free_pages == pages


def test_many_enclaves_share_a_tiny_epc() -> None:
    bench = Bench(pages=12)
    enclaves = [bench.enclave(2) for _ in range(40)]
    for encl in enclaves:
        encl.check()
    bench.check()
    assert bench.core.counters.va_out > 0
    for encl in enclaves:
        encl.close()
    bench.check()
    assert bench.core.free_pages == 12


# --- loss of power --------------------------------------------------------------------------------


def test_after_loss_of_power_every_load_fails_and_no_page_leaks() -> None:
    bench = Bench()
    encl = bench.enclave(20)
    bench.evict(6)
    resident = [index for index, page in encl.pages.items() if page.epc is not None]
    bench.machine.power_transition()
    for index, page in encl.pages.items():
        if page.entry is not None:
            with pytest.raises(LoadFailed):
                encl.touch(index)
    bench.evict()  # what was resident has vanished: no content, but the EPC page is free
    for index in resident:
        assert encl.pages[index].entry == SwapEntry(index, None)
        with pytest.raises(LoadFailed, match="lost"):
            encl.touch(index)
    assert bench.core.counters.ewb_failed == 0
    encl.close()
    bench.core.check_invariants()
    assert bench.core.free_pages == EPC_PAGES and bench.core.counters.leaked == 0


@pytest.mark.parametrize("evicted", [0, 6, 20])
def test_an_enclave_that_lost_power_can_be_destroyed(evicted: int) -> None:
    bench = Bench()
    encl = bench.enclave(20)
    if evicted:
        bench.evict(evicted)
    bench.machine.power_transition()
    encl.close()
    bench.core.check_invariants()
    assert bench.core.free_pages == EPC_PAGES and bench.core.counters.leaked == 0
    fresh = bench.enclave(20)
    bench.evict()
    fresh.check()


def test_a_backing_file_of_its_own_kind_serves_as_well() -> None:
    bench = Bench()
    backing: BackingFile = FileBacking()
    encl = bench.enclave(20, backing=backing)
    bench.evict()
    encl.check()
    encl.close()


@pytest.mark.parametrize("left", range(4))
def test_a_load_that_needs_more_pages_than_can_leave_ends_in_no_memory(left: int) -> None:
    """VA page, SECS and the page itself: what comes in first is all that can leave again."""
    runtime = SeededRuntime(0, step_limit=50_000)

    def main() -> None:
        machine = make_machine(epc_pages=16, runtime=runtime)
        core = EpcCore(machine, runtime, dirty=())
        enclaves = [ToyEnclave(core, machine, number=number) for number in (1, 2)]
        for encl in enclaves:
            for index in range(3):
                encl.add(index)
        while core.reclaim(force=True).freed:
            pass
        held = []
        while core.free_pages > left:
            held.append(core.alloc(None, reclaim=False))
        if left < 3:
            with pytest.raises(NoEpc):
                enclaves[0].touch(0)
        core.check_invariants()
        for page in held:
            core.free(page)
        for encl in enclaves:
            encl.check()
            encl.close()
        core.check_invariants()

    runtime.run(main)
