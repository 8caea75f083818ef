"""Ballast, limits, shortage, pause and loss of power affect one guest and no other."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.driver import launch, pattern
from tests.support.guests import GuestHost, GuestSystem

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.errors import SoftSgxError
from softsgx.hw import PageFault, PageInfoArgs
from softsgx.kvm import GuestStopped, GuestStoppedError
from softsgx.kvm.vepc import VepcMapping
from softsgx.paging import FaultResult, NoEpc
from softsgx.runtime import SeededRuntime
from softsgx.userland import Signal


def test_the_ballast_is_never_taken() -> None:
    host = GuestHost(epc_pages=40)
    guest = host.guest(24, ballast_pages=10)
    made = launch(guest.process(), 12)
    host.evict_all()
    assert guest.guest.resident == 10
    assert guest.guest.counters.kept_ballast > 0
    assert guest.guest.unreclaimable()["ballast"] >= 8
    other = host.guest(24)
    foreign = launch(other.process(), 30)
    thread = foreign.thread()
    for number in range(30):
        thread.load(foreign.data(number))
    assert guest.guest.resident >= 10
    assert made.thread().load(made.data(3), 8) == pattern(3)[:8]
    host.check_invariants()


def test_a_batch_does_not_take_more_than_the_ballast_leaves() -> None:
    host = GuestHost(epc_pages=512)
    guest = host.guest(24, ballast_pages=12)
    launch(guest.process(), 12)
    assert guest.guest.resident > 16
    host.core.reclaim(force=True)  # a batch of 16
    assert 12 <= guest.guest.resident < 16


def test_a_ballast_larger_than_the_guests_epc_is_refused() -> None:
    with pytest.raises(SoftSgxError, match="ballast of 30 pages exceeds its EPC of 24"):
        GuestHost().guest(24, ballast_pages=30)


def test_a_guest_stays_within_the_limit_of_its_group() -> None:
    host = GuestHost(epc_pages=80)
    group = host.tree.make("guests")
    group.max_pages = 16
    guest = host.guest(40, group=group)
    made = launch(guest.process(), 30)
    thread = made.thread()
    for number in range(30):
        assert thread.load(made.data(number), 8) == pattern(number)[:8]
    assert group.peak_pages <= 16
    assert guest.guest.counters.evicted > 10
    assert host.core.free_pages > 40, "the pressure is in the group alone"
    host.check_invariants()


def test_a_guest_without_a_page_to_run_with_is_stopped_and_the_others_go_on() -> None:
    host = GuestHost(epc_pages=80)
    group = host.tree.make("tiny")
    group.max_pages = 4
    other = host.guest(24)
    made = launch(other.process(), 4)
    tiny = host.guest(24, group=group, name="tiny")
    with pytest.raises(
        GuestStoppedError, match="cannot be loaded: there are too few EPC pages"
    ) as stopped:
        _fill(tiny)
    assert stopped.value.guest == "tiny"
    assert tiny.guest.resident == 0
    assert [event for event in host.events if isinstance(event, GuestStopped)] == [
        GuestStopped("tiny", stopped.value.reason)
    ]
    assert made.thread().load(made.data(2), 8) == pattern(2)[:8]
    host.check_invariants()


def test_a_processor_waits_for_pages_as_long_as_others_claim_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = GuestHost(epc_pages=80)
    guest = host.guest(24)
    made = launch(guest.process(), 4)
    host.evict_all()
    fault, waits = VepcMapping.fault, iter(range(20_000))

    def busy(self: VepcMapping, *arguments: Any, **options: Any) -> FaultResult:
        if next(waits, None) is not None:
            return FaultResult.RETRY
        return fault(self, *arguments, **options)

    monkeypatch.setattr(VepcMapping, "fault", busy)
    assert made.thread().load(made.data(2), 8) == pattern(2)[:8]
    assert next(waits, None) is None
    assert guest.guest.stopped is None


def _fill(guest: GuestSystem) -> None:
    """Execute a leaf that needs more pages at once than there are."""
    leaves = guest.guest.leaves
    va = guest.core.alloc(None, reclaim=False)
    leaves.epa(PageType.VA, va.addr)
    page = guest.core.alloc(None, reclaim=False)
    leaves.epa(PageType.VA, page.addr)
    out = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128), 0)
    guest.guest.group.max_pages = 1  # type: ignore[union-attr]
    for _round in range(8):
        guest.host.core.reclaim(force=True)
    leaves.ewb(out, page.addr, va.addr)


@pytest.mark.parametrize("kill", [False, True])
def test_a_guest_can_be_killed_for_its_memory_if_allowed(kill: bool) -> None:
    host = GuestHost(epc_pages=60, kill=kill)
    guest = host.guest(40, ballast_pages=40, name="fat")
    made = launch(guest.process(), 30)
    host.victims.append(_Victim(guest))
    before = host.core.free_pages
    try:
        for _ in range(40):
            host.core.alloc(None, reclaim=True)
    except NoEpc:
        assert not kill and guest.guest.stopped is None
        assert host.core.free_pages == 0 < before
        assert made.thread().load(made.data(1), 8) == pattern(1)[:8]
    else:
        assert kill and guest.guest.stopped == "killed for its EPC"
        assert guest.guest.resident == 0
        with pytest.raises(GuestStoppedError, match="killed"):
            made.thread()
    host.check_invariants()


class _Victim:
    def __init__(self, guest: GuestSystem) -> None:
        self._guest = guest.guest
        self.name = self._guest.name

    def pages_in(self, group: object) -> int:
        return self._guest.resident

    def kill(self) -> None:
        self._guest.stop("killed for its EPC")


# --- pause ----------------------------------------------------------------------------------------


def test_a_paused_guest_executes_nothing_and_loses_nothing() -> None:
    runtime = SeededRuntime(3)

    def main() -> None:
        host = GuestHost(epc_pages=60, runtime=runtime)
        guest = host.guest(24)
        made = launch(guest.process(), 4)
        thread = made.thread()
        thread.store(made.data(0), b"before")
        guest.guest.pause()
        assert thread.cpu.inside is None
        done: list[bytes] = []
        reader = runtime.spawn(lambda: done.append(thread.load(made.data(0), 6)), "reader")
        leaf = runtime.spawn(lambda: _drop(guest), "leaf")
        for _ in range(50):
            runtime.yield_now()
        host.evict_all()
        for _ in range(50):
            runtime.yield_now()
        assert not done and not leaf.done()
        assert guest.guest.resident <= 2
        guest.guest.unpause()
        reader.join()
        leaf.join()
        assert done == [b"before"]
        host.check_invariants()

    def _drop(guest: GuestSystem) -> None:
        guest.core.remove(guest.core.alloc(None, reclaim=False))

    runtime.run(main)


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", [False, True])
def test_a_guest_that_loses_power_sees_what_a_machine_sees(evicted: bool) -> None:
    host = GuestHost(epc_pages=100)
    guest, other = host.guest(24), host.guest(24, name="other")
    made, foreign = launch(guest.process(), 30), launch(other.process(), 4)
    thread, outside = made.thread(), foreign.thread()
    thread.load(made.data(29))
    outside.store(foreign.data(0), b"mine")
    inside = outside.cpu.inside
    secs = guest.secs(made.enclave)
    page = guest.data(made.enclave, made.offset(29) // PAGE_BYTES)
    if evicted:
        host.evict(page)
    guest.guest.launch_key_hash[:] = [0, 0, 0, 0]
    guest.guest.power_transition()

    assert thread.cpu.inside is None
    assert guest.guest.launch_key_hash == list(guest.guest.config.launch_key_hash)
    with pytest.raises(Signal, match=r"SIGSEGV.*0x80") as lost:
        thread.load(made.data(29))
    assert lost.value.code & 0x8000, "a fault with the SGX bit, as after S3"
    thread.abandon()
    with pytest.raises(PageFault) as fault:
        guest.guest.leaves.etrack(secs.gpa)
    assert fault.value.address == secs.gpa
    assert guest.guest.leaves.eblock(page.gpa) is Status.PG_INVLD
    with pytest.raises(Signal):
        made.process.thread(0).load(made.data(0))  # evicted by the guest itself, before
    # What the guest had evicted cannot be loaded: SIGBUS from its own driver.
    assert guest.core.counters.reclaimed > 0

    assert outside.cpu.inside is inside
    assert outside.load(foreign.data(0), 4) == b"mine"
    again = launch(guest.process(), 4)
    assert again.thread(1, tcs=0).load(again.data(1), 8) == pattern(1)[:8]
    host.system.check_invariants()
    guest.guest.check_invariants()


def test_a_guest_that_boots_again_cleans_what_the_one_before_has_left() -> None:
    """INIT, or kexec: the EPC keeps its pages, some of them evicted by the host."""
    host = GuestHost(epc_pages=100)
    guest = host.guest(24)
    made = launch(guest.process(), 10)
    host.evict(*(guest.data(made.enclave, at) for at in list(made.enclave.pages)[:6]))
    core = guest.boot(dirty=None)
    assert core.free_pages == 0
    core.start()
    core.wait_sanitized()
    core.stop()
    assert core.free_pages == core.epc_pages
    assert core.counters.unsanitized == 0
    host.system.check_invariants()
    guest.guest.check_invariants()


def test_the_power_of_the_machine_is_every_guests_power() -> None:
    host = GuestHost(epc_pages=60)
    guest = host.guest(24)
    made = launch(guest.process(), 8)
    thread = made.thread()
    thread.load(made.data(0))
    gone = guest.data(made.enclave, made.offset(1) // PAGE_BYTES)
    host.evict(gone)
    had = guest.guest.resident + 1
    host.system.machine.power_transition()
    host.device.power_lost()
    assert thread.cpu.inside is None
    with pytest.raises(Signal, match="SIGSEGV") as lost:
        thread.load(made.data(0))
    assert lost.value.code & 0x8000, "a fault with the SGX bit, as after S3"
    thread.abandon()
    assert guest.guest.stopped is None, "the guest itself goes on"
    assert guest.guest.leaves.eblock(gone.gpa) is Status.PG_INVLD, "evicted, and lost as well"
    assert guest.guest.counters.lost == had
    again = launch(guest.process(), 2)
    assert again.thread().load(again.data(1), 8) == pattern(1)[:8]
    host.core.check_invariants()
    guest.guest.check_invariants()
