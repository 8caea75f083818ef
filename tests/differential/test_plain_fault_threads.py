"""A plain fault with the engine's own threads and address spaces, in Python and in C.

Goal: what C code does directly to a thread, a page table and a pager is what their methods do.
Method: the scenes of ``test_plain_fault_steps``, with a real ``ProgramThread`` and a real
``ProcessImage`` with its page table and pager, where C code does not call methods.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.differential.test_native_kernel import tracee
from tests.differential.test_plain_fault_steps import (
    ADDRESS,
    INFORMATION,
    SIGBUS_STOP,
    TCS,
    Scene,
    moved,
    without_permits,
)
from tests.support.native import needs_tracing

from softsgx import compiled
from softsgx.arch import EpcAddr
from softsgx.engines.native import abi
from softsgx.engines.native.abi import SigInfo
from softsgx.engines.native.faults import plain
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore, StoredPage
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.permits import Permits
from softsgx.hw import EnclaveMode, EpcPage

NO_THREAD = 1 << 22  # above the largest process id
PAGE = 4096
PAGE_AT = ADDRESS & -PAGE
BOOLS = (False, True)
OF_STOPS = ("_loaded", "_borrowed", "at_call", "mid_call", "in_call", "_fetched", "_at_signal")
OF_CHANGES = ("_kept", "_changed", "_new_xstate", "_real_xstate")

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(compiled.speedups is None, reason=compiled.description),
]


def faults_of(scene: Scene) -> PlainFaults:
    return PlainFaults(
        *cast(Any, (scene.server, scene.waits, scene, scene.permits)),
        *cast(Any, (scene.store, scene.runtime)),
    )


def both() -> Iterator[Callable[[PlainFaults], object]]:
    """Yield each form of the path."""
    assert compiled.speedups is not None
    yield plain.serve_in_python
    yield compiled.speedups.serve_faults


def with_thread(scene: Scene, tid: int = NO_THREAD) -> ProgramThread:
    """Put a real thread in the place of the first one."""
    thread, fake = ProgramThread.__new__(ProgramThread), scene.threads.pop(11)
    Thread.__init__(thread, tid, Waits(), NativeRegisters())
    for name in ("image", "process", "cpu", "mode", "breakpoints", "watched", "blocked", "resumes"):
        setattr(thread, name, getattr(fake, name))
    thread.spurious, thread._own_tid = fake.spurious, 11  # type: ignore[assignment]
    thread.running = thread.unstoppable = True
    thread.info.code, thread.info.addr = abi.BUS_ADRERR, ADDRESS
    scene.threads[tid] = cast(Any, thread)
    scene.slots[0].inside = thread
    scene.events[0] = tid, SIGBUS_STOP, INFORMATION
    return thread


def with_image(scene: Scene) -> tuple[Any, Any]:
    """Put a real address space, page table and pager in the place of the fakes."""
    image, fake = ProcessImage.__new__(ProcessImage), scene.image
    del fake.flush
    pager = UffdPager(
        -1,
        -1,
        lambda calls: scene.note("made", calls),
        lambda: False,
        lambda _at: 7,
        lambda error: scene.note("failed", repr(error)),
    )
    table: Any = EnclavePageTable(
        0,
        NativeStore(),
        {},
        pager,
        memory_at=lambda _at: None,
        mapped_in=lambda _start, _end: [],
        is_readable=lambda _at: False,
        kick_all=lambda: None,
    )
    own = {"page_table": table, "pager": pager, "_deferred_calls": []}
    for name, value in (vars(fake) | own).items():
        setattr(image, name, value)
    image.inject = lambda calls: scene.note("injected", calls)  # type: ignore[method-assign]
    scene.image = image
    for thread in scene.threads.values():
        thread.image = image
    return image, pager


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetched", [INFORMATION, INFORMATION | 1])
@pytest.mark.parametrize("inside", BOOLS)
def test_a_stop_of_a_real_thread_is_recorded_as_its_method_does(fetched: int, inside: bool) -> None:
    states = []
    for serve in both():
        scene = Scene()
        thread: Any = with_thread(scene)
        for name in ("_loaded", "_borrowed", "at_call", "mid_call", "in_call"):
            setattr(thread, name, True)
        thread._kept, thread._real_xstate, thread._fetched = SigInfo(), b"of the last stop", 0
        scene.events[0] = NO_THREAD, SIGBUS_STOP, fetched
        if not inside:
            thread.cpu.inside = None
        done = serve(faults_of(scene)), scene.state()
        states.append((done, [getattr(thread, name) for name in OF_STOPS + OF_CHANGES]))
    assert states[0] == states[1]
    (_result, (notes, *_rest)), _values = cast(Any, states[0])
    # No such thread can be resumed: it is gone.
    assert [note[0] for note in notes][-1] == ("failed" if inside else "guard")


def change_registers(thread: ProgramThread) -> None:
    thread.load()
    thread.store()


def change_xstate(thread: ProgramThread) -> None:
    thread._new_xstate = bytes(thread.xstate())


def be_in_call(thread: ProgramThread) -> None:
    thread.in_call = True


def change_nothing(thread: ProgramThread) -> None:
    """Nothing is set before it is resumed."""


@pytest.mark.parametrize(
    "change",
    [change_nothing, change_registers, change_xstate, be_in_call],
    ids=lambda c: c.__name__,
)
def test_a_real_thread_gets_its_changes_before_it_continues(change: Any) -> None:
    states = []
    for serve in both():
        with tracee() as pid:
            scene = Scene()
            thread = with_thread(scene, pid)
            scene.during = partial(change, thread)
            left = [getattr(thread, name) for name in OF_CHANGES]
            result = serve(faults_of(scene))
            assert not [note for note in scene.notes if cast(Any, note)[0] in ("failed", "guard")]
            _pid, status = os.waitpid(pid, abi.WALL)
            left = [getattr(thread, name) for name in ("_changed", "_new_xstate")]
            states.append((result, left, thread.running, status, len(scene.notes)))
    assert states[0] == states[1]
    assert states[0][1] == [False, None] and states[0][2]


@pytest.mark.parametrize("what", ["ended", "kept"])
def test_a_real_thread_that_may_be_another_by_now_is_not_resumed(what: str) -> None:
    states = []
    for serve in both():
        with tracee() as pid:
            scene = Scene()
            thread = with_thread(scene, pid)
            scene.waits.kept = thread.waits.kept

            def change(thread: ProgramThread = thread) -> None:
                if what == "ended":
                    thread._ended = True
                else:
                    thread.waits.kept.append((thread.tid, SIGBUS_STOP))

            scene.during = change
            result = serve(faults_of(scene))
            last = [str(part).replace(str(pid), "tid") for part in cast(Any, scene.notes[-1])]
            states.append((result, last))
            assert os.waitpid(pid, abi.WALL | os.WNOHANG) == (0, 0)
    assert states[0] == states[1]
    assert states[0][1] == ["failed", "1", "tid", "Gone('thread tid is gone')"]


# --- address spaces -------------------------------------------------------------------------------


@pytest.mark.parametrize(("deferred", "due", "watched"), list(product(BOOLS, repeat=3)))
def test_a_real_address_space_makes_what_is_due_before_the_thread_continues(
    deferred: bool, due: bool, watched: bool
) -> None:
    states = []
    for serve in both():
        scene = Scene()
        image, pager = with_image(scene)
        image._deferred_calls += [(1, 2, 3)] * deferred
        pager._present[PAGE_AT & -(1 << 18)] = bytes(64)
        pager._watched.update({PAGE_AT, PAGE_AT + PAGE} if watched else ())
        pager._fetches.due.update({PAGE_AT} if due else ())
        done = serve(faults_of(scene)), scene.state()
        states.append((done, set(pager._present), set(pager._watched), pager._fetches.due))
    assert states[0] == states[1]
    (_result, (notes, *_rest)), *_left = cast(Any, states[0])
    made = [note[0] for note in notes]
    assert ("made" in made) is (due or watched) and ("injected" in made) is deferred
    assert states[0][1:] == (set(), set(), set())


@pytest.mark.parametrize("page", [-1, 0, 1])
@pytest.mark.parametrize("offset", [0, 0x123, 0xFFF])
def test_a_real_page_table_has_the_entry_of_each_address_in_a_page(page: int, offset: int) -> None:
    states = []
    for serve in both():
        scene = Scene()
        image, _pager = with_image(scene)
        image.page_table._entries[PAGE_AT + page * PAGE] = StoredPage(EpcPage(EpcAddr(0x8000)))
        scene.threads[11].signal(abi.BUS_ADRERR, PAGE_AT + offset)
        faults = faults_of(scene)
        states.append((serve(faults), scene.state(), faults.served))
    assert states[0] == states[1]
    assert states[0][2] == (page != 0)


# --- permits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("permits", BOOLS)
def test_permits_that_only_the_thread_can_use_need_no_python(permits: bool) -> None:
    assert compiled.speedups is not None
    scene = Scene()
    if not permits:
        without_permits(scene)
    called: list[str] = []
    for name in ("report", "settle", "going"):
        setattr(scene.permits, name, lambda *_: called.append("permits"))
    if not permits:
        scene.permits.report = Scene.note.__get__(scene)  # type: ignore[method-assign]
    faults = faults_of(scene)
    assert compiled.speedups.serve_faults(faults) == (0, 0, 0)
    assert faults.served == 1 and not called


@pytest.mark.parametrize("setting", [None, moved])
def test_the_exit_of_the_stop_is_forgotten_before_the_loop_handles_it(setting: Any) -> None:
    for serve in both():
        scene = Scene()
        if setting is not None:
            setting(scene)
        scene.threads[11].breakpoints = True
        seen: list[object] = []
        scene.server.guard = lambda *_, scene=scene, seen=seen: seen.append(scene.permits._exited)
        serve(faults_of(scene))
        assert seen == [None]


# --- waits ----------------------------------------------------------------------------------------


def test_a_wait_without_an_event_ends_the_path() -> None:
    for serve in both():
        scene = Scene()
        scene.events.append(cast(Any, None))
        assert serve(faults_of(scene)) is None
        assert [cast(Any, note)[0] for note in scene.notes][-1] == "resume"


def test_without_a_time_to_look_at_the_kernel_is_asked_at_once() -> None:
    for serve in both():
        scene = Scene()
        scene.waits.look_ns = None
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        assert serve(faults_of(scene)) == (pid, 3 << 8, 0)
        assert not scene.notes and len(scene.events) == 1


class Interrupted(Exception):
    """By a handler."""


def test_a_signal_of_the_supervisor_is_handled_before_the_next_wait() -> None:
    """The handler cannot run in the calls of the path, which are none of Python here."""

    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        assert compiled.speedups is not None
        scene = Scene()
        scene.waits.next = scene.events.popleft
        scene.events.append((0, 0, 0))
        scene.threads[11].resume = partial(  # type: ignore[method-assign]
            ctypes.CDLL(None)["raise"], int(signal.SIGUSR2)
        )
        with pytest.raises(Interrupted):
            compiled.speedups.serve_faults(faults_of(scene))
        assert len(scene.events) == 1
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_an_error_of_a_fault_says_where_it_came_from() -> None:
    def fail() -> None:
        raise ValueError("of ours")

    for serve in both():
        scene = Scene()
        scene.during = fail
        errors: list[Any] = []
        scene.server.failed = lambda _pid, _tid, error, errors=errors: errors.append(error)
        serve(faults_of(scene))
        names, at = [], errors[0].__traceback__
        while at is not None:
            names.append(at.tb_frame.f_code.co_name)
            at = at.tb_next
        assert names[-1] == "fail"


class CountingPermits(Permits):
    """Counts the gates that it is asked for, and reports to no machine."""

    asked = 0

    def going(self, thread: Any) -> None:
        self.asked += 1
        super().going(thread)

    def _report(self, slots: Any, at_hand: Any = None) -> None:
        self._open.difference_update(slots)


@pytest.mark.parametrize("what", ["jumps", "no jumps", "no memory", "another enclave", "no slot"])
def test_a_gate_stays_closed_where_every_exit_stops(what: str) -> None:
    assert compiled.speedups is not None and compiled.speedups.bind("EnclaveMode", EnclaveMode)
    states, asked, none = [], [], cast(Any, None)
    for serve in both():
        scene: Any = Scene()
        scene.permits = permits = CountingPermits(True, none, none)
        thread, slot = scene.threads[11], scene.slots[0]
        mode: Any = EnclaveMode(*[None] * 8)  # type: ignore[arg-type]
        mode.tcs_linaddr, mode.enclave = TCS, thread.mode.enclave
        mode.outside = SimpleNamespace(tf=0, fs_base=1, gs_base=2)
        thread.mode = thread.cpu.inside = thread.resumes = mode
        scene.hw.store = SimpleNamespace(read=lambda *_: bytes(8))
        memory: Any = EnclaveMemory.__new__(EnclaveMemory)
        memory.jumps = {4096: 5} if what == "jumps" else {}
        thread.load = lambda: SimpleNamespace(gs_base=0)
        scene.image.page_table.memory_at = lambda _at, memory=memory: memory
        slot.enclave = object() if what == "another enclave" else mode.enclave
        slot.memory = None if what == "no memory" else memory
        if what == "another enclave":  # whose file has no jumps, as ours has
            memory.jumps, slot.memory = {4096: 5}, EnclaveMemory.__new__(EnclaveMemory)
            slot.memory.jumps = {}
        if what == "no slot":
            del scene.table._slots[TCS]
        result = serve(faults_of(scene))
        states.append((result, scene.notes, slot in permits._open, slot.word("gate"), slot.enclave))
        asked.append(permits.asked)
        scene.table.close()
    assert [each[:4] for each in states] == [states[0][:4]] * 2
    assert asked == [1, int(what not in ("no jumps", "no memory"))]
    assert states[0][2] is (what in ("jumps", "another enclave"))
