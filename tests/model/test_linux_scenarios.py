"""The situations that a scheduler-controlled bench must bring about, one by one.

Goal: at each border between the phases of a reclaim batch (isolated, prepared, blocked, written),
all other actions on the page, the enclave or its address spaces end as specified.

Method: a batch of one page is driven phase by phase from here, or a seeded runtime interleaves;
counts come from the events.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tests.support.driver import BASE, RW, Launched, System, errno_of, launch, pattern, secs_bytes

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.driver import FaultResult, Ioctl, ModifyTypes, RemovePages
from softsgx.driver.page import EnclavePage
from softsgx.hw import LeafDone
from softsgx.paging import EpcBusy, MemoryBacking, NoEpc, SgxEpcPage
from softsgx.runtime import SeededRuntime
from softsgx.userland import Signal, SoftThread

R = 1
SIZE = 16 * PAGE_BYTES
REG, TRIM = PageType.REG << 8, PageType.TRIM << 8
PENDING, MODIFIED = 8, 16
PHASES = ("isolated", "prepared", "blocked", "written")


class Batch:
    """A reclaim batch of one page that stops at each border."""

    def __init__(self, system: System, made: Launched, number: int) -> None:
        self.system = system
        self.page: EnclavePage = made.enclave.pages[made.enclave.index_of(made.data(number))]
        self.epc: SgxEpcPage | None = None

    def run_to(self, phase: str) -> None:
        steps: dict[str, Callable[[], None]] = {
            "isolated": self._isolate,
            "prepared": lambda: _require(self.page.prepare()),
            "blocked": lambda: _require(self.page.block()),
            "written": self._write,
        }
        for name in PHASES[: PHASES.index(phase) + 1]:
            steps[name]()

    def finish(self, phase: str) -> None:
        """Do what is left after ``phase``, as the reclaimer would."""
        left = PHASES[PHASES.index(phase) + 1 :]
        if "prepared" in left and not self.page.prepare():
            return self._back()
        if "blocked" in left and not self.page.block():
            return self._back()
        if "written" in left:
            self._write()
        return None

    def _isolate(self) -> None:
        self.epc = self.page.epc
        assert self.epc is not None and self.epc.lru is not None
        lru = self.epc.lru
        isolated, _dying = lru.isolate(1)
        while isolated != [self.epc]:
            lru.put_back(isolated[0])
            assert isolated[0].owner is not None
            isolated[0].owner.put()
            isolated, _dying = lru.isolate(1)

    def _write(self) -> None:
        assert self.epc is not None and self.epc.lru is not None
        if not self.page.write():
            return self._back()
        self.epc.lru.forget(self.epc)
        self.system.core.free(self.epc)
        self.page.put()
        return None

    def _back(self) -> None:
        assert self.epc is not None and self.epc.lru is not None
        self.epc.lru.put_back(self.epc)
        self.page.put()


def _require(done: bool) -> None:
    assert done


def _leaves(system: System, name: str) -> int:
    return sum(isinstance(event, LeafDone) and event.leaf == name for event in system.events)


# 1


@pytest.mark.parametrize("phase", PHASES)
def test_1_a_fault_at_a_border_waits_before_the_write_and_loads_after_it(phase: str) -> None:
    system = System()
    made = launch(system.process(), 4)
    batch = Batch(system, made, 1)
    batch.run_to(phase)
    mm, addr = made.process.mm, made.data(1)
    with mm.mmap_lock.reading():
        vma = mm.find(addr)
        assert vma is not None
        result, wait = made.enclave.fault(mm, vma, addr, made.process)
    assert result is FaultResult.NOPAGE
    assert (wait is not None) == (phase in ("prepared", "blocked"))
    assert (mm.ptes.entry(addr) is not None) == (wait is None)
    if phase != "written":
        batch.finish(phase)
        assert mm.ptes.entry(addr) is None
    thread = made.thread()
    assert thread.load(addr) == pattern(1)[:8]
    thread.exit()
    system.check_invariants()


# 2


@pytest.mark.parametrize("phase", PHASES)
def test_2_an_enclave_given_up_at_a_border_is_destroyed_when_the_batch_ends(phase: str) -> None:
    system = System()
    made = launch(system.process(), 4)
    batch = Batch(system, made, 1)
    batch.run_to(phase)
    made.process.exit()
    assert bool(system.driver.enclaves) == (phase != "written")
    batch.finish(phase)
    assert not system.driver.enclaves
    assert system.free_pages == system.epc_pages
    system.check_invariants()


# 3


@pytest.mark.parametrize("event", ["added", "removed", "forked"])
@pytest.mark.parametrize("phase", PHASES[:3])
def test_3_no_space_maps_a_written_page_whenever_it_came_or_went(phase: str, event: str) -> None:
    system = System()
    made = launch(system.process(), 4)
    spaces = [made.process, made.process.fork()]
    addr = made.data(1)
    for process in spaces:
        process.mm.fault(addr, R)
    batch = Batch(system, made, 1)
    batch.run_to(phase)
    if event == "removed":
        spaces.pop().exit()
    elif event == "forked":
        spaces.append(spaces[0].fork())
    else:
        other = system.process()
        made.file.mmap(other.mm, addr, PAGE_BYTES, RW, 0x11)
        spaces.append(other)
    batch.finish(phase)
    for process in spaces:
        assert process.ptes.entry(addr) is None
        assert process.mm.fault(addr, R) is FaultResult.NOPAGE
    for process in spaces:
        process.exit()
    assert system.free_pages == system.epc_pages


# 4


@pytest.mark.parametrize("phase", PHASES[:3])
def test_4_changing_a_page_in_a_batch_is_refused_and_undone(phase: str) -> None:
    system = System()
    made = launch(system.process(), 4, threads=2, size=SIZE)
    process = made.process
    process.modify_types(made.fd, made.offset(2), PAGE_BYTES, PageType.TRIM)
    thread = made.thread()
    assert thread.eaccept(made.data(2), TRIM | MODIFIED, made.data(0)) is Status.SUCCESS
    thread.exit()
    convert = ModifyTypes(offset=made.offset(1), length=PAGE_BYTES, page_type=PageType.TCS)
    remove = RemovePages(offset=made.offset(2), length=PAGE_BYTES)
    first, second = Batch(system, made, 1), Batch(system, made, 2)
    first.run_to(phase)
    second.run_to(phase)
    first.page.max_prot = 7
    before = errno_of(lambda: process.ioctl(made.fd, Ioctl.ENCLAVE_MODIFY_TYPES, convert))
    assert (before, convert.count, first.page.max_prot) == ("EAGAIN", 0, 7)
    busy = errno_of(lambda: process.ioctl(made.fd, Ioctl.ENCLAVE_REMOVE_PAGES, remove))
    # Before the mark the page can still be loaded, and then its list says no.
    assert (busy, remove.count) == ("EBUSY" if phase == "isolated" else "EAGAIN", 0)
    first.finish(phase)
    second.finish(phase)
    assert process.remove_pages(made.fd, made.offset(2), PAGE_BYTES).count == PAGE_BYTES
    args = process.modify_types(made.fd, made.offset(1), PAGE_BYTES, PageType.TCS)
    assert args.count == PAGE_BYTES
    system.check_invariants()


# 5


def _reenter(threads: list[SoftThread]) -> None:
    for thread in threads:
        thread.run(lambda cpu: None)


@pytest.mark.parametrize("inside", [0, 1, 2, 3])
def test_5_one_batch_costs_one_cycle_and_one_round_of_interrupts(inside: int) -> None:
    system = System(listen=True, processors=3)
    made = launch(system.process(), 6, threads=3, size=32 * PAGE_BYTES)
    threads = [made.thread(cpu) for cpu in range(inside)]
    batches = [Batch(system, made, number) for number in range(1, 6)]
    for batch in batches:
        batch.run_to("isolated")
    for batch in batches:
        _require(batch.page.prepare())
    for batch in batches:
        _require(batch.page.block())
    _reenter(threads)
    system.events.clear()
    kicks = system.core.counters.kicks
    for batch in batches:
        batch.finish("blocked")
    assert _leaves(system, "etrack") == 1
    assert system.core.counters.kicks - kicks == (1 if inside else 0)
    assert _leaves(system, "ewb") == 5 + 1 + (1 if inside else 0)
    for cpu, thread in enumerate(threads):
        assert thread.load(made.data(1 + cpu)) == pattern(1 + cpu)[:8]
        thread.exit()
    system.check_invariants()


def test_5_enclaves_mixed_in_a_batch_have_a_cycle_each() -> None:
    system = System(listen=True)
    one = launch(system.process(), 4)
    two = launch(system.process(), 4, base=0x6000_0000_0000)
    batches = [Batch(system, made, number) for number in range(3) for made in (one, two)]
    for phase in ("isolated", "prepared", "blocked"):
        for batch in batches:
            if phase == "isolated":
                batch.run_to("isolated")
            else:
                _require(batch.page.prepare() if phase == "prepared" else batch.page.block())
    system.events.clear()
    for batch in batches:
        batch.finish("blocked")
    assert _leaves(system, "etrack") == 2
    assert _leaves(system, "ewb") == 6 + 2


# 6


def test_6_with_nothing_left_to_reclaim_there_is_no_memory_and_no_hang() -> None:
    system = System(epc_pages=12)
    process = system.process()
    made = launch(process, 4)
    system.evict(made.enclave)
    while system.free_pages:
        system.core.alloc(None, reclaim=False)
    for _ in range(8):  # the idle SECS may go, and with it its VA pages
        system.core.reclaim(force=True)
        while system.free_pages:
            system.core.alloc(None, reclaim=False)
    results = [process.mm.fault(made.data(0), R)]
    while results[-1] is FaultResult.RETRY:
        results.append(process.mm.fault(made.data(0), R))
        assert len(results) < 100, "hangs"
    assert results[-1] is FaultResult.SIGBUS
    assert errno_of(lambda: process.create(process.open(), secs_bytes(SIZE, 0))) == "ENOMEM"
    with pytest.raises(Signal, match="SIGBUS"):
        made.thread()


# 7


@pytest.mark.parametrize("free", [31, 32, 63, 64])
@pytest.mark.parametrize("reclaimable", [False, True])
def test_7_the_watermarks_are_where_they_are(free: int, reclaimable: bool) -> None:
    system = System(epc_pages=1200)
    made = launch(system.process(), 80) if reclaimable else None
    while system.free_pages > free:
        system.core.alloc(None, reclaim=False)
    system.core.reclaim_direct()
    batches = system.core.counters.batches
    assert bool(batches) == (free < 32 and reclaimable)
    system.core.start()
    while system.free_pages < 64 and reclaimable:
        system.runtime.yield_now()
    system.runtime.yield_now()
    system.core.stop()
    assert system.free_pages == (free if not reclaimable else system.free_pages)
    assert (system.core.counters.batches > batches) == (reclaimable and free < 64)
    assert made is None or made.enclave.resident_pages > 0


# 8


@pytest.mark.parametrize("pages", [4, 16, 32, 64])
def test_8_the_secs_has_its_pcmd_behind_those_of_the_pages(pages: int) -> None:
    backing = MemoryBacking()
    system = System(epc_pages=128, backing=lambda _pages: backing)
    process = system.process()
    made = launch(process, pages - 3, size=pages * PAGE_BYTES)
    system.evict(made.enclave)
    assert made.enclave.swap.secs is None
    contents = pages + 1
    pcmds = pages // 32 + 1  # index ``pages`` is the SECS's
    assert backing.pages() == contents + pcmds
    thread = made.thread()
    for number in range(made.data_pages):
        assert thread.load(made.data(number)) == pattern(number)[:8]
    thread.exit()


def test_8_a_size_that_is_no_power_of_two_is_rejected() -> None:
    process = System().process()
    fd = process.open()
    assert errno_of(lambda: process.create(fd, secs_bytes(33 * PAGE_BYTES))) == "EINVAL"


# 9


@pytest.mark.parametrize("after", range(6))
def test_9_a_signal_during_add_pages_counts_what_was_done(after: int) -> None:
    system = System()
    process = system.process()
    fd = process.open()
    process.create(fd, secs_bytes(SIZE))
    asked = iter([*[False] * after, *[True] * 100])
    process.signal = lambda: next(asked)
    data = b"".join(pattern(number) for number in range(4))
    seen: list[Any] = []
    errno = errno_of(lambda: seen.append(process.add_pages(fd, 0, data, REG | RW)))
    assert errno == ("ERESTARTSYS" if after == 0 else "ok")
    done = min(after, 4)
    assert len(process.enclave_file(fd).enclave.pages) == done
    if seen:
        assert seen[0].count == done * PAGE_BYTES
    system.check_invariants()


# 10


@pytest.mark.parametrize("where", ["inside", "outside", "building"])
def test_10_after_a_loss_of_power_users_get_signals_and_everything_can_be_freed(where: str) -> None:
    system = System(epc_pages=32)
    process = system.process()
    if where == "building":
        fd = process.open()
        process.create(fd, secs_bytes(SIZE))
        process.add_pages(fd, 0, pattern(1), REG | RW)
        system.machine.power_transition()
        add = errno_of(lambda: process.add_pages(fd, PAGE_BYTES, pattern(1), REG | RW))
        assert add == "EIO"
    else:
        made = launch(process, 6, threads=2, size=SIZE)
        thread = made.thread()
        enter = partial(thread.enter, made.tcs())
        for number in range(3):
            thread.load(made.data(number))
        if where == "outside":
            thread.exit()
        Batch(system, made, 4).run_to("written")
        system.machine.power_transition()
        use = partial(thread.load, made.data(0)) if where == "inside" else enter
        with pytest.raises(Signal, match=r"SIGSEGV|SIGBUS"):
            use()
        assert made.process.mm.fault(made.data(4), R) is FaultResult.SIGBUS  # evicted: lost
        assert made.process.mm.fault(made.data(9), R) is FaultResult.SIGBUS  # EAUG faults
        change = ModifyTypes(offset=made.offset(1), length=PAGE_BYTES, page_type=PageType.TRIM)
        command = Ioctl.ENCLAVE_MODIFY_TYPES
        assert errno_of(partial(process.ioctl, made.fd, command, change)) == "EFAULT"
        for _ in range(6):
            system.core.reclaim(force=True)  # EWB finds nothing: the pages are free already
    process.exit()
    assert system.free_pages == system.epc_pages
    assert not system.core.counters.leaked
    system.check_invariants()
    again = launch(system.process(), 2)
    fresh = again.thread()
    assert fresh.load(again.data(1)) == pattern(1)[:8]
    fresh.exit()


def test_10_a_page_evicted_before_the_loss_never_comes_back_as_another_ones() -> None:
    system = System(epc_pages=32)
    made = launch(system.process(), 4)
    system.evict(made.enclave)
    system.machine.power_transition()
    other = launch(system.process(), 4, base=0x6000_0000_0000)
    for number in range(4):
        assert made.process.mm.fault(made.data(number), R) is FaultResult.SIGBUS
    thread = other.thread()
    assert thread.load(other.data(3)) == pattern(3)[:8]
    thread.exit()


# Waiting, as L9 asks for it


def test_a_fault_waits_for_ksgxd_and_burns_no_processor() -> None:
    def main(runtime: SeededRuntime) -> None:
        system = System(epc_pages=32, runtime=runtime, ksgxd=True)
        made = launch(system.process(), 8)
        batch = Batch(system, made, 1)
        batch.run_to("written")
        while system.free_pages:
            try:
                system.core.alloc(None, reclaim=False)
            except (EpcBusy, NoEpc):
                break
        results: list[FaultResult] = []
        while not results or results[-1] is FaultResult.RETRY:
            results.append(made.process.mm.fault(made.data(1), R))
        assert results[-1] is FaultResult.NOPAGE
        assert len(results) < 20, "it was repeated instead of waiting"
        system.core.stop()

    for seed in range(5):
        runtime = SeededRuntime(seed)
        runtime.run(partial(main, runtime))


def test_base_is_where_the_tests_think_it_is() -> None:
    assert launch(System().process()).base == BASE
