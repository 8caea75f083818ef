"""A plain fault of a thread that waits is resolved without a stop; at any other the thread stops.

Goal: as in :mod:`test_plain_faults`, for events.  The kernel's answer to UFFDIO_WAKE tells whether
the thread was woken: descriptors that are no userfaultfd refuse it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.native import USABLE_PAGERS
from tests.unit.engines.native.test_plain_faults import (
    ADDRESS,
    BASE,
    END,
    FORMS,
    SIGBUS_STOP,
    TCS,
    Scene,
    change,
)

from softsgx.arch import Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi, libc
from softsgx.engines.native.memory.uffd import open_userfaultfd
from softsgx.engines.native.tracing.fault_events import FaultEvent
from softsgx.engines.native.vdso.permit_code import IN

pytestmark = pytest.mark.skipif(
    "userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd for its wake-ups"
)

PLAIN = ["fault", "hide", "flush"]
STOPS = ["stop at 0x70005008"]


class WaitingScene(Scene):
    """A thread inside an enclave that waits for a page, unless said otherwise."""

    def __init__(self, form: str, uffd: int) -> None:
        super().__init__(form)
        self.flushing: Callable[[], object] = lambda: None
        self.unknown = False
        self.thread._own_tid = 11  # type: ignore[attr-defined]
        self.image.faulting = None
        self.image.threads = self.threads
        self.image.flush = self.flush
        self.images = {uffd: self.image}
        self.event = FaultEvent(uffd, 11, ADDRESS, 0)
        self.reports: list[Any] = [self.event, END]
        self.waits.next_or_fault = lambda: self.reports.pop(0)
        self.waits.stop_at = self.stop_at
        self.waits.faults = SimpleNamespace(
            images=self.images, epoll=0, signals=0, may_have_stopped=True, thread=self.find
        )
        exits: Any = self.served._transitions.exits
        exits.skip = self.skip
        self.during_background: Callable[[], object] = lambda: None

    def find(self, event: FaultEvent) -> object:
        assert event == self.event
        return None if self.unknown else self.thread

    def fault(self, address: int, access: int, task: object) -> FaultResult:
        assert (address, access, task) == (ADDRESS, abi.PROT_READ, self.thread)
        assert self.image.faulting is self.thread and self.image.current is None
        assert self.thread.running
        self.log.append("fault")
        self.during()
        return self.result

    def stop_at(self, event: FaultEvent) -> None:
        assert type(event) is FaultEvent and event == self.event
        self.log.append(f"stop at {event.address:#x}")

    def skip(self, thread: object, vector: int) -> None:
        assert thread is self.thread and vector == Vector.PF
        if self.cpu.hw.tracer is not None:
            self.log.append("skip")
        self.crossings.aex += 1
        self.crossings.eresume += 1

    def background(self) -> None:
        assert self.image.faulting is self.thread
        self.log.append("background")
        self.during_background()

    def flush(self) -> None:
        assert self.crossings.aex == self.crossings.eresume == 1
        self.log.append("flush")
        self.flushing()

    def hold(self, thread: object) -> bool:
        assert thread is self.thread
        self.log.append("hold")
        return True

    def run(self) -> list[str]:
        assert self.serve(self.served) == END
        assert self.image.current is None and self.image.faulting is None
        return self.log

    def forbid_wake(self) -> None:
        """Make a wake-up fail."""
        [(uffd, image)] = self.images.items()
        self.images[uffd + 1000] = image
        self.event = self.reports[0] = FaultEvent(uffd + 1000, 11, self.event.address, 0)


@pytest.fixture
def uffd() -> Iterator[int]:
    flags = abi.O_CLOEXEC | abi.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
    descriptor = libc.syscall(abi.SYS_USERFAULTFD, flags)
    open_userfaultfd(descriptor, events=True)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=FORMS)
def scene(request: pytest.FixtureRequest, uffd: int) -> WaitingScene:
    return WaitingScene(request.param, uffd)


def test_a_plain_fault_is_resolved_and_the_thread_woken(scene: WaitingScene) -> None:
    scene.thread.unstoppable = True
    assert scene.run() == PLAIN
    assert scene.served.served == 1
    assert (scene.crossings.aex, scene.crossings.eresume) == (1, 1)
    assert scene.thread.spurious == (0, (0, 0))
    assert scene.thread.running and not scene.thread.unstoppable


def test_each_event_of_a_series_is_that_of_the_thread_as_it_is_then(scene: WaitingScene) -> None:
    scene.reports = [scene.event] * 4 + [END]
    found = [scene.result, FaultResult.SIGBUS, scene.result]

    def change_result() -> None:
        scene.crossings.aex = scene.crossings.eresume = 0
        scene.result = found.pop(0)
        if not found:
            del scene.threads[11]
            scene.unknown = True

    scene.during = change_result
    assert scene.run() == [*PLAIN, "fault", *STOPS, *PLAIN]
    assert scene.served.served == 3


def test_the_thread_is_woken_at_the_end(scene: WaitingScene) -> None:
    scene.forbid_wake()
    [*first, held, failure] = scene.run()
    assert first == PLAIN and held == "hold"
    assert failure.startswith("failed 10 11 [Errno 9]")


@pytest.mark.parametrize(
    "what",
    [
        *("outside", "breakpoints", "unwatched", "no mapping", "read-only", "executable"),
        *("above the mapping found last", "below the mapping found last"),
        *("an entry", "another AEP"),
    ],
)
def test_at_an_unusual_fault_the_thread_stops_before_anything_happens(
    scene: WaitingScene, what: str
) -> None:
    change(scene, what)
    scene.forbid_wake()
    assert scene.run() == STOPS
    assert not scene.served.served and not scene.crossings.aex


def test_at_a_store_to_a_protected_page_the_thread_stops(scene: WaitingScene) -> None:
    scene.event = scene.reports[0] = scene.event._replace(flags=abi.UFFD_PAGEFAULT_FLAG_WP)
    assert scene.run() == STOPS


def test_a_store_to_a_hole_is_plain(scene: WaitingScene) -> None:
    scene.event = scene.reports[0] = scene.event._replace(flags=abi.UFFD_PAGEFAULT_FLAG_WRITE)
    assert scene.run() == PLAIN


def test_a_thread_whose_registers_a_new_slot_needs_stops(scene: WaitingScene) -> None:
    scene.slot(TCS + 64 * 4096)
    scene.permits._open.clear()
    assert scene.run() == STOPS


@pytest.mark.parametrize("result", [*FaultResult])
def test_at_a_fault_that_is_not_resolved_the_thread_stops(
    scene: WaitingScene, result: FaultResult
) -> None:
    scene.result = result
    if result in (FaultResult.NOPAGE, FaultResult.RETRY):
        assert scene.run() == PLAIN
    else:
        scene.forbid_wake()
        assert scene.run() == ["fault", *STOPS]
        assert not scene.crossings.aex


def test_a_thread_that_was_stopped_meanwhile_is_left_to_the_loop(scene: WaitingScene) -> None:
    def kick() -> None:
        scene.thread.running = False
        scene.cpu.inside = None

    scene.during = kick
    scene.forbid_wake()
    assert scene.run() == ["fault"]
    assert not scene.crossings.aex


@pytest.mark.parametrize("when", ["flush", "background"])
def test_a_thread_that_was_stopped_for_calls_is_not_woken(scene: WaitingScene, when: str) -> None:
    slot = scene.slot()
    scene.forbid_wake()

    def stop() -> None:
        scene.thread.running = False

    if when == "flush":
        scene.flushing = stop
    else:
        scene.runtime._ready.append(cast(Any, None))
        scene.during_background = stop
    found = scene.run()
    assert [each for each in found if each != "background"] == PLAIN
    assert scene.crossings.aex == 1
    assert scene.permits.has(scene.thread) == (True, True), "the loop opens its gate"
    assert slot.inside is cast(Any, scene.thread)


def test_a_thread_inside_does_not_leave_without_a_stop(scene: WaitingScene) -> None:
    scene.during = lambda: setattr(scene.cpu, "inside", None)
    [*first, held, failure] = scene.run()
    assert (first, held) == (["fault"], "hold")
    assert "without a stop" in failure


@pytest.mark.parametrize("what", ["_ready", "_lock_waiters", "_timers", "failure"])
def test_background_work_is_done_before_the_thread_continues(
    scene: WaitingScene, what: str
) -> None:
    def happen() -> None:
        if what == "failure":
            scene.runtime._has_failures = True
        else:
            getattr(scene.runtime, what).append(None)

    scene.during = happen
    assert scene.run() == ["fault", "background", "hide", "flush"]


def test_what_watches_leaves_is_told_of_the_exit(scene: WaitingScene) -> None:
    scene.during = lambda: setattr(scene.cpu.hw, "tracer", print)
    assert scene.run() == ["fault", "skip", "hide", "flush"]
    assert scene.crossings.aex == 1


def test_an_exception_ends_the_process_of_the_thread_alone(scene: WaitingScene) -> None:
    def fail() -> None:
        raise ValueError("of ours")

    scene.during = fail
    scene.forbid_wake()
    assert scene.run() == ["fault", "hold", "failed 10 11 of ours"]


def test_an_interrupt_of_the_supervisor_ends_the_run(scene: WaitingScene) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    scene.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        scene.serve(scene.served)
    assert scene.image.faulting is None and scene.log == ["fault"]


@pytest.mark.parametrize("case", ["not asked yet", "in another namespace", "of another space"])
def test_a_thread_is_found_by_its_own_id(scene: WaitingScene, case: str) -> None:
    if case == "not asked yet":
        scene.thread._own_tid = 0  # type: ignore[attr-defined]
    elif case == "of another space":
        scene.images[scene.event.uffd] = SimpleNamespace()
    else:
        scene.threads[12] = scene.threads.pop(11)
        scene.event = scene.reports[0] = scene.event._replace(tid=12)
    found: list[FaultEvent] = []

    def find(event: FaultEvent) -> object:
        found.append(event)
        return scene.thread

    scene.waits.faults.thread = find
    assert scene.run() == PLAIN
    assert not found or found == [scene.event]
    if scene.serve.__name__ == "serve_faults":
        assert found


@pytest.mark.parametrize("what", ["its id in another space", "another id"])
def test_an_event_after_another_may_be_that_of_another_thread(
    scene: WaitingScene, what: str
) -> None:
    other = scene.event._replace(tid=12)
    if what == "its id in another space":
        other = scene.event._replace(uffd=scene.event.uffd + 1000)
        scene.images[other.uffd] = SimpleNamespace()
    scene.reports = [scene.event, other, END]
    scene.waits.faults.thread = lambda event: scene.thread if event == scene.event else None
    assert scene.run() == PLAIN


def test_an_event_of_a_thread_that_has_ended_is_nothing(scene: WaitingScene) -> None:
    scene.unknown = True
    scene.thread._own_tid = 99  # type: ignore[attr-defined]
    assert scene.run() == []


def test_stops_are_the_loops_where_faults_are_events(scene: WaitingScene) -> None:
    scene.reports = [(11, SIGBUS_STOP, 1)]
    scene.events = []
    assert scene.serve(scene.served) == (11, SIGBUS_STOP, 1)
    assert not scene.log


def test_without_an_address_space_that_has_events_faults_are_stops(scene: WaitingScene) -> None:
    scene.images.clear()
    scene.waits.next_or_fault = scene.next_event
    scene.events = [END]
    assert scene.run() == []


@pytest.mark.parametrize("where", ["held", "kept"])
def test_what_the_loop_holds_comes_before_the_next_wait(scene: WaitingScene, where: str) -> None:
    holder: Any = scene.held if where == "held" else scene.waits.kept
    scene.during = lambda: holder.append(None)
    assert scene.serve(scene.served) is None
    assert scene.log == PLAIN and scene.reports == [END]


def test_a_gate_that_only_the_thread_can_use_stays_open(scene: WaitingScene) -> None:
    slot = scene.slot()
    gate = slot.word("gate")
    assert scene.run() == PLAIN
    assert scene.permits.has(scene.thread) == (True, False)
    assert slot.word("gate") == gate == slot.opened


def test_crossings_of_others_are_reported_before_the_driver_runs(scene: WaitingScene) -> None:
    scene.slot()
    other = scene.slot(TCS + 8 * 4096)
    other.inside, other.opened = cast(Any, SimpleNamespace(tid=99)), 99 << 3 | IN
    other.set("gate", other.opened)
    assert scene.run()[:2] == [f"report {other.tcs:#x}", "fault"]
    assert other.tcs != BASE
