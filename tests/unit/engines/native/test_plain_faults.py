"""The short path serves a fault only if nothing else has to happen at it.

Goal: each condition of a plain fault counts, in Python and in C; everything else goes to the loop.
Method: a thread of which only the state is real that the path looks at; each test changes one thing
about its fault, and reads who was called.  ``tests/differential`` compares effects on programs.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.children import end, running
from tests.support.native import needs_tracing

from softsgx import compiled
from softsgx.driver import FaultResult
from softsgx.driver.mm import EnclaveVma
from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.faults import plain
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.tracing import tracee
from softsgx.engines.native.tracing.fault_fields import FaultingImage, FaultingThread
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.permit_code import CLOSED, CROSSING, IN, OUT
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
from softsgx.engines.native.vdso.permits import Permits
from softsgx.hw.processor import EnclaveMode, ProcessorMode
from softsgx.hw.secs import Crossings
from softsgx.runtime import InlineRuntime

#: Python; C code that asks for attributes by name; and that reads and sets the fields of records.
FORMS = ["python"] if compiled.speedups is None else ["python", "c", "records"]
BASE, PAGE = 0x7000_0000, 4096
ADDRESS = BASE + 5 * PAGE + 8
TCS = BASE + PAGE
SIGBUS_STOP = abi.SIGBUS << 8 | 0x7F
FAULT = 11, SIGBUS_STOP, kernel.INFORMATION
END = 12, 0, 0
#: What the path calls at a plain fault.
PLAIN = ["stopped", "fault", "hide", "flush", "resume"]
LOOP = ["stopped", "guard"]
THEN_LOOP = ["stopped", "fault", "faulted", "resume_thread"]


class Reports(Permits):
    """Permits that say what they report, without a machine."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(True, lambda _thread: True, lambda _image, _error: None)
        self.log = log

    def _report(self, slots: Iterable[Slot], at_hand: Any = None) -> None:
        for slot in list(slots):
            self.log.append(f"report {slot.tcs:#x}")
            self._open.discard(slot)
            self._unused = {who: one for who, one in self._unused.items() if one is not slot}

    def has(self, thread: Any) -> tuple[bool, bool]:
        """Whether the slot of a thread is open, and whether it is known to be unused."""
        slot = thread.image.permits.slot(thread.cpu.inside.tcs_linaddr)
        return slot in self._open, thread in self._unused


class AnImage(FaultingImage):
    """A record with more attributes; the same holds for those that follow."""


class AProcessor(ProcessorMode):
    pass


class SomeWaits(Waits):
    pass


RECORDS = {"image": AnImage, "cpu": AProcessor, "waits": SomeWaits, "inside": EnclaveMode}


def make(kind: str, form: str, **values: Any) -> Any:
    """Return an object that has those attributes."""
    if form != "records":
        return SimpleNamespace(**values)
    cls: Any = RECORDS[kind]
    made = cls.__new__(cls)
    for name, value in values.items():
        setattr(made, name, value)
    return made


class Scene:
    """A thread inside an enclave, and everything around it."""

    def __init__(self, form: str) -> None:
        self.log: list[str] = []
        self.held: list[Any] = []
        self.result: FaultResult = FaultResult.NOPAGE
        self.during: Callable[[], object] = lambda: None
        self.entry: object = None
        self.at_once = False
        self.events: list[tuple[int, int, int] | None] = [FAULT, END]
        vma = EnclaveVma(
            BASE, BASE + 64 * PAGE, abi.PROT_READ | abi.PROT_WRITE, *[cast(Any, None)] * 2
        )
        self.vma: EnclaveVma | None = vma
        self.mm = SimpleNamespace(found=None, find=lambda _at: self.vma, fault=self.fault)
        self.image = make(
            "image",
            form,
            current=None,
            faulting=None,
            watched=False,
            mm=self.mm,
            page_table=SimpleNamespace(entry=self.entry_at),
            permits=None,
            flush=lambda: self.log.append("flush"),
        )
        self.crossings = Crossings()
        enclave = SimpleNamespace(crossings=self.crossings)
        self.inside = make("inside", form, enclave=enclave, tcs_linaddr=TCS)
        hw = SimpleNamespace(tracer=None)
        self.cpu = make("cpu", form, inside=self.inside, hw=hw)
        self.thread = RecordThread(self) if form == "records" else Thread(self)
        self.permits = Reports(self.log)
        self.runtime = InlineRuntime()
        self.threads = {11: self.thread}
        self.waits = make("waits", form, kept=deque(), places={}, look_ns=1, faults=None)
        self.waits.next = self.next_event
        self.store = SimpleNamespace(_leaving={4096}, hide_unmapped=lambda: self.log.append("hide"))
        enclave_faults = SimpleNamespace(faulted=self.faulted)
        exits = SimpleNamespace(return_at_once=lambda _thread: self.at_once)
        transitions = SimpleNamespace(enclave=enclave_faults, exits=exits)
        parts: Any = self, self.waits, transitions, self.permits, self.store, self.runtime
        self.served = PlainFaults(*parts)
        if form == "python":
            self.serve: Callable[[PlainFaults], object] = plain.serve_in_python
        else:
            assert compiled.speedups is not None
            self.serve = compiled.speedups.serve_faults

    def next_event(self) -> tuple[int, int, int] | None:
        return self.events.pop(0)

    def entry_at(self, address: int) -> object:
        assert address == ADDRESS
        return self.entry

    def fault(self, address: int, access: int, task: object) -> FaultResult:
        assert (address, access, task) == (ADDRESS, abi.PROT_READ, self.thread)
        assert self.image.current is self.thread and not self.thread.running
        self.log.append("fault")
        self.during()
        return self.result

    def faulted(self, thread: object, address: int, code: int, result: object) -> int:
        assert (thread, address, code) == (self.thread, ADDRESS, abi.BUS_ADRERR)
        assert result is self.result
        self.log.append("faulted")
        return 7

    def resume_thread(self, thread: object, number: int = 0) -> None:
        assert (thread, number) == (self.thread, 7)
        self.log.append("resume_thread")

    def guard(self, thread: object, stop: object) -> None:
        assert (thread, stop) == (self.thread, "the stop")
        self.log.append("guard")

    def failed(self, pid: int, tid: int, error: Exception) -> None:
        self.log.append(f"failed {pid} {tid} {error}")

    def run(self) -> list[str]:
        """Serve until the thread has ended; return what was called."""
        assert self.serve(self.served) == END
        assert self.image.current is None
        return self.log

    def slot(self, tcs: int = TCS) -> Slot:
        """Give a TCS a slot whose gate is open for the thread."""
        if self.image.permits is None:
            fd = os.memfd_create("permits", os.MFD_ALLOW_SEALING)
            self.image.permits = PermitTable(fd, 0x4000_0000, cast(Any, self.threads))
        slot: Slot | None = self.image.permits.give_slot(tcs, tcs)
        assert slot is not None
        slot.open_in(cast(Any, self.thread), 11, 0, 0, 0)
        slot.set("exited", CROSSING + OUT)
        self.permits._open.add(slot)
        return slot


class Thread:
    """The thread."""

    blocked: Any
    resumes: Any
    spurious: Any

    def __init__(self, scene: Scene) -> None:
        self.scene, self.image, self.cpu = scene, scene.image, scene.cpu
        self.tid, self.process = 11, SimpleNamespace(pid=10)
        self.running = self.unstoppable = True
        self.fetched = kernel.INFORMATION
        self.breakpoints, self.watched, self.blocked = 0, False, None
        self.resumes, self.spurious = scene.inside, None
        self.info = SigInfo()
        self.info.signo, self.info.code, self.info.addr = abi.SIGBUS, abi.BUS_ADRERR, ADDRESS
        self.info_at = ctypes.addressof(self.info)

    def stopped(self, status: int, fetched: int) -> str:
        assert (status, fetched) == (SIGBUS_STOP, self.fetched)
        assert not self.running and not self.unstoppable
        self.scene.log.append("stopped")
        return "the stop"

    def siginfo(self) -> SigInfo:
        return self.info

    def resume(self) -> None:
        assert self.running and self.image.current is None
        self.scene.log.append("resume")

    @property
    def own_tid(self) -> int:
        return self.tid


class RecordThread(FaultingThread, Thread):
    """The same, a record."""


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return what it has itself, in slots or in a dictionary."""
    slots = [name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ())]
    return {name: getattr(thing, name) for name in (*slots, *vars(thing)) if hasattr(thing, name)}


@pytest.fixture(params=FORMS)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = Scene(request.param)
    yield made
    if made.image.permits is not None:
        made.image.permits.close()


@pytest.fixture
def stopped() -> Iterator[int]:
    """A stopped process that this one traces."""
    with running(["sleep", "100"]) as process:
        libc.ptrace(abi.PTRACE_SEIZE, process.pid, 0, abi.PTRACE_O_EXITKILL)
        libc.ptrace(abi.PTRACE_INTERRUPT, process.pid, 0, 0)
        os.waitpid(process.pid, abi.WALL)
        yield process.pid
        end(process)


def test_a_plain_fault_is_resolved_and_the_thread_continues(scene: Scene) -> None:
    assert scene.run() == PLAIN
    assert scene.served.served == 1
    assert (scene.crossings.aex, scene.crossings.eresume) == (1, 1)
    assert scene.thread.spurious == (0, (0, 0)) and scene.thread.running


def test_each_fault_of_a_series_is_served(scene: Scene) -> None:
    scene.events = [FAULT, FAULT, FAULT, END]
    assert scene.run() == PLAIN * 3
    assert scene.crossings.aex == scene.served.served == 3


def change(scene: Scene, what: str) -> None:
    """Make a fault unusual before the driver sees it."""
    assert scene.vma is not None
    match what:
        case "outside":
            scene.cpu.inside = scene.thread.resumes = None
        case "breakpoints":
            scene.thread.breakpoints = 1
        case "unwatched":
            scene.image.watched = True
        case "sent by a process":
            scene.thread.info.code = 0
        case "no mapping":
            scene.vma = None
        case "read-only" | "executable":
            scene.vma.prot = 1 if what == "read-only" else 7
        case "above the mapping found last" | "below the mapping found last":
            at = BASE + (0 if what.startswith("above") else 6) * PAGE
            scene.mm.found = EnclaveVma(at, at + 5 * PAGE, 3, *[cast(Any, None)] * 2)
            scene.vma.prot = 1
        case "an entry":
            scene.entry = (4096, 3)
        case "another AEP":
            scene.thread.resumes = None
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        *("outside", "breakpoints", "unwatched", "sent by a process", "no mapping", "read-only"),
        *("executable", "above the mapping found last", "below the mapping found last"),
        *("an entry", "another AEP"),
    ],
)
def test_an_unusual_fault_goes_to_the_loop_before_anything_happens(scene: Scene, what: str) -> None:
    change(scene, what)
    assert scene.run() == LOOP
    assert not scene.served.served and not scene.crossings.aex


def test_what_only_looks_unusual_is_plain(scene: Scene) -> None:
    scene.image.watched = scene.thread.watched = True
    scene.thread.resumes, scene.at_once = None, True
    scene.mm.found = scene.vma
    assert scene.run() == PLAIN


def test_information_that_the_wait_has_not_fetched_is_asked_for(scene: Scene) -> None:
    """C code leaves that to the loop: such a thread has died, mostly."""
    scene.events[0] = 11, SIGBUS_STOP, 0
    scene.thread.fetched = 0
    assert scene.run() == (PLAIN if scene.serve is plain.serve_in_python else LOOP)


@pytest.mark.parametrize("result", [*FaultResult])
def test_a_fault_that_is_not_resolved_goes_on_by_its_instruction(
    scene: Scene, result: FaultResult
) -> None:
    scene.result = result
    resolved = result in (FaultResult.NOPAGE, FaultResult.RETRY)
    assert scene.run() == (PLAIN if resolved else THEN_LOOP)


def test_a_thread_that_was_kicked_meanwhile_is_resumed_by_the_loop(scene: Scene) -> None:
    scene.during = lambda: setattr(scene.cpu, "inside", None)
    assert scene.run() == THEN_LOOP
    assert not scene.crossings.aex


@pytest.mark.parametrize("what", ["_ready", "_lock_waiters", "_timers", "failure", "tracer"])
def test_background_work_and_events_are_the_loops(scene: Scene, what: str) -> None:
    def happen() -> None:
        if what == "tracer":
            scene.cpu.hw.tracer = print
        elif what == "failure":
            scene.runtime._has_failures = True
        else:
            getattr(scene.runtime, what).append(None)

    scene.during = happen
    assert scene.run() == THEN_LOOP


def test_an_exception_ends_the_process_of_the_thread_alone(scene: Scene) -> None:
    def fail() -> None:
        raise ValueError("of ours")

    scene.during = fail
    assert scene.run() == ["stopped", "fault", "failed 10 11 of ours"]


def test_an_interrupt_of_the_supervisor_ends_the_run(scene: Scene) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    scene.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        scene.serve(scene.served)
    assert scene.image.current is None and scene.log == ["stopped", "fault"]


@pytest.mark.parametrize("where", ["held", "kept"])
def test_what_the_loop_holds_comes_before_the_next_wait(scene: Scene, where: str) -> None:
    holder: Any = scene.held if where == "held" else scene.waits.kept
    scene.during = lambda: holder.append(None)
    assert scene.serve(scene.served) is None
    assert scene.log == PLAIN
    assert scene.serve(scene.served) is None
    assert scene.events == [END]


def test_stops_of_others_and_other_stops_are_returned(scene: Scene) -> None:
    for event in ((13, SIGBUS_STOP, 1), (11, abi.SIGSEGV << 8 | 0x7F, 1), (11, 0x7F | 5 << 8, 0)):
        scene.events = [event]
        assert scene.serve(scene.served) == event
    assert not scene.log


def test_an_empty_list_of_pages_to_hide_is_no_work(scene: Scene) -> None:
    scene.store._leaving.clear()
    assert [each for each in scene.run() if each != "hide"] == [
        "stopped",
        "fault",
        "flush",
        "resume",
    ]


# --- permits --------------------------------------------------------------------------------------


def test_a_gate_that_only_the_thread_can_use_stays_open(scene: Scene) -> None:
    slot = scene.slot()
    seen: list[object] = []
    scene.during = lambda: seen.append((scene.permits.has(scene.thread), slot.word("exited")))
    gate = slot.word("gate")
    assert scene.run() == PLAIN
    assert seen == [((True, True), CROSSING + CLOSED)]
    assert scene.permits.has(scene.thread) == (True, False)
    assert slot.word("gate") == gate == slot.opened


def test_crossings_are_reported_before_the_fault_is_judged(scene: Scene) -> None:
    slot = scene.slot()
    slot.set("gate", slot.opened + 2 * CROSSING)
    assert scene.run()[:3] == ["stopped", f"report {TCS:#x}", "fault"]
    assert not scene.permits._open or slot.inside is cast(Any, scene.thread)


def test_a_thread_that_has_left_by_permit_is_outside(scene: Scene) -> None:
    slot = scene.slot()
    slot.set("gate", CROSSING + CLOSED)
    report = scene.permits._report

    def leave(slots: Iterable[Slot], at_hand: Any = None) -> None:
        report(slots, at_hand)
        scene.cpu.inside = None

    scene.permits._report = leave  # type: ignore[method-assign]
    assert scene.run() == ["stopped", f"report {TCS:#x}", "guard"]


def test_a_slot_of_another_thread_is_settled_before_the_driver_runs(scene: Scene) -> None:
    scene.slot()
    other = scene.slot(TCS + 8 * PAGE)
    other.inside, other.opened = cast(Any, SimpleNamespace(tid=99)), 99 << 3 | IN
    other.set("gate", other.opened)
    assert scene.run()[:3] == ["stopped", f"report {other.tcs:#x}", "fault"]


def test_recorded_entries_and_the_last_exit_end(scene: Scene) -> None:
    slot = scene.slot()
    slot.entry = cast(Any, "an outcome")
    scene.permits._recorded.add(slot)
    scene.permits._exited = cast(Any, (scene.thread, slot))
    assert scene.run() == PLAIN
    assert slot.entry is None and not scene.permits._recorded and scene.permits._exited is None


@pytest.mark.parametrize("what", ["blocked", "stay"])
def test_a_gate_that_is_not_valid_any_more_is_closed_before_the_thread_runs(
    scene: Scene, what: str
) -> None:
    slot = scene.slot()
    scene.image.aep = 0
    slot.memory = None
    slot.enclave = scene.inside.enclave

    def change_it() -> None:
        if what == "blocked":
            scene.thread.blocked = cast(Any, 0)
        else:
            slot.stay = None

    scene.during = change_it
    found = scene.run()
    assert found.index(f"report {TCS:#x}") > found.index("flush")


def test_a_slot_that_another_thread_has_entered_by_is_reported(scene: Scene) -> None:
    slot = scene.slot()
    slot.inside = cast(Any, SimpleNamespace(tid=99))
    assert scene.run()[:3] == ["stopped", f"report {TCS:#x}", "fault"]


def test_a_closed_gate_of_the_thread_counts_as_closed(scene: Scene) -> None:
    own, other = scene.slot(), scene.slot(TCS + 8 * PAGE)
    own.memory, own.enclave = None, scene.inside.enclave
    other.inside = cast(Any, SimpleNamespace(tid=99))
    scene.permits._open.discard(own)
    seen: list[object] = []
    scene.during = lambda: seen.append(scene.permits.has(scene.thread))
    scene.run()
    assert seen == [(False, False)]


@needs_tracing
@pytest.mark.parametrize("what", ["nothing", "its end", "a wait for it", "the end of another"])
def test_a_thread_that_ends_during_its_fault_is_not_resumed(
    scene: Scene, stopped: int, what: str
) -> None:
    waits = Waits()
    scene.waits.kept, scene.waits.keeps, scene.waits.asked = waits.kept, waits.keeps, {}
    thread = ProgramThread.__new__(ProgramThread)
    tracee.Thread.__init__(thread, stopped, cast(Waits, scene.waits))
    given = attributes_of(scene.thread) | {"tid": stopped, "waits": scene.waits}
    for name, value in given.items():
        setattr(thread, name, value)
    thread.info.code, thread.info.addr = abi.BUS_ADRERR, ADDRESS
    scene.thread = scene.threads[11] = cast(Any, thread)

    def end() -> None:
        if what == "a wait for it":
            thread._ended = True
        elif what != "nothing":
            waits.keep(stopped if what == "its end" else 12, 0)

    scene.during = end
    assert scene.serve(scene.served) == (None if waits.kept else END)
    ended = what in ("its end", "a wait for it")
    assert scene.log[2:] == ["flush", f"failed 10 {stopped} thread {stopped} is gone"][: 1 + ended]
    message = ctypes.c_uint64()
    at = ctypes.addressof(message)
    assert (kernel.try_ptrace(abi.PTRACE_GETEVENTMSG, stopped, 0, at) == 0) is ended
