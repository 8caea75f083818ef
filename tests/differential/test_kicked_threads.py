"""Interrupts of the native engine's threads during an eviction, in Python and in C.

Method: an EWB that comes too early interrupts the threads of an address space with a real page
table, image, loop and permits.  Their processors are inside an enclave of a machine of its own,
whose pages the native engine's store has.  Exits, counts, gates and calls must be equal.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from tests.differential.test_kicks import Site
from tests.differential.test_virtual_exits import Scene, set_of
from tests.model.test_random_programs import World
from tests.support.hw import RepeatingRuntime

from softsgx import compiled
from softsgx.arch import EpcAddr
from softsgx.engines.native.faults.exits import AsynchronousExits
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import StoredPage
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permit_table import CLOSED_BEHIND, PermitTable, Slot
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.insn import ENCLU
from softsgx.hw import EpcPage

THREADS = (11, 12)
AEP_OF_VDSO = 0x40_1000  # that of the entries of the scene

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


class NotingPermits(Permits):
    """Notes that all crossings are reported."""

    log: list[object]

    def settle(self) -> None:
        self.log.append("settle")
        super().settle()


class OtherTransitions(Transitions):
    """Handlers of another class."""

    log: ClassVar[list[object]] = []

    def stays_inside(self, thread: ProgramThread) -> bool:
        self.log.append(thread.tid)
        return super().stays_inside(thread)


class OtherExits(AsynchronousExits):
    """Exits of another class."""

    log: ClassVar[list[object]] = []

    def interrupt(self, thread: ProgramThread) -> bool:
        self.log.append(thread.tid)
        return super().interrupt(thread)


class OtherTable(EnclavePageTable):
    """A page table of another class."""

    __slots__ = ()
    log: ClassVar[list[object]] = []

    def kick(self) -> None:
        self.log.append("kick")
        super().kick()


class OtherLoop(Loop):
    """A loop that has more to do."""

    def kick(self, image: ProcessImage) -> None:
        cast(Any, self).log.append("kick")
        super().kick(image)


class Kicked:
    """Two threads inside, and what may interrupt them."""

    def __init__(self, implementation: Any) -> None:
        self.log: list[object] = []
        self.scene = Scene()
        self.site = Site(World(80, runtime=RepeatingRuntime(7), optimised=implementation))
        self.image = self._image()
        self.loop: Any = Loop.__new__(Loop)
        self.permits: Any = Permits(True, lambda _thread: True, lambda *_: None)
        self.transitions: Any = Transitions.__new__(Transitions)
        self.exits = AsynchronousExits(cast(Any, None))
        vars(self.transitions)["exits"] = self.exits
        vars(self.loop).update(
            _permits=self.permits, _transitions=self.transitions, log=self.log, _take_out=self._out
        )
        self.threads = [self._thread(number) for number in range(2)]
        self.table: Any = EnclavePageTable(
            *cast(Any, (1, self.scene.store, {}, None)),
            memory_at=lambda _at: None,
            mapped_in=lambda _start, _end: [],
            is_readable=lambda _at: False,
            kick_all=partial(self.loop.kick, self.image),
        )
        self.permit_table = PermitTable(os.memfd_create("table", os.MFD_ALLOW_SEALING), 1 << 20, {})
        self.slots = [self._slot(number) for number in range(2)]
        self.out: Callable[[], object] = lambda: None

    def _image(self) -> Any:
        image = ProcessImage.__new__(ProcessImage)
        vars(image).update(
            threads={}, vdso_base=AEP_OF_VDSO, vdso=SimpleNamespace(aep=0), read=self._read
        )
        image.current = image.faulting = None
        self.code = b"other"
        return image

    def _read(self, address: int, size: int) -> bytes:
        self.log.append(("read", address, size))
        return self.code

    def _thread(self, number: int) -> Any:
        thread: Any = ProgramThread.__new__(ProgramThread)
        cpu = self.scene.hw.cpus[number]
        thread.tid, thread.image = THREADS[number], self.image
        thread.cpu, thread.resumes = cpu, cpu.inside
        self.image.threads[thread.tid] = thread
        return thread

    def _slot(self, number: int) -> Slot:
        slot = Slot(self.permit_table, number, 4096 * number)
        slot.set("gate", 7)
        slot.set("exited", 5)
        return slot

    def _out(self, thread: Any) -> bool:
        state = [repr(each.cpu.inside and each.cpu.inside.entry_epoch) for each in self.threads]
        self.log.append(("take out", thread.tid, state, list(self.site.srcu._readers)))
        self.out()
        return True

    def act(self) -> object:
        """Evict a page, in vain: a processor of another machine stays.  Return what is left."""
        mm, site = self.site.mms[0], self.site
        kept, mm.ptes = mm.ptes, self.table
        try:
            result: object = site.evict()
        except (AssertionError, ArithmeticError) as error:
            result = type(error)
        mm.ptes = kept
        images = [each and each.tid for each in (self.image.current, self.image.faulting)]
        threads = [(thread.resumes is thread.cpu.inside) for thread in self.threads]
        words = [(slot.word("gate"), slot.word("exited"), slot.entry) for slot in self.slots]
        permits = len(self.permits._open), len(self.permits._unused), len(self.permits._recorded)
        self.permit_table.close()
        return (
            *(result, self.log, self.scene.state(), sorted(self.scene.table._used), images),
            *(threads, words, permits, self.permits._exited, site.counts()),
        )


Change = Callable[[Kicked], object]


def compare(change: Change) -> Any:
    """Evict with both forms; return what both have done."""
    seen = []
    for implementation in (True, "compiled"):
        kicked = Kicked(implementation)
        change(kicked)
        seen.append(kicked.act())
    assert seen[0] == seen[1]
    return seen[0]


def nothing(_kicked: Kicked) -> None:
    """Both threads stay inside."""


def tracked(kicked: Kicked) -> None:
    kicked.scene.enclave.track()


def outside(kicked: Kicked) -> None:
    kicked.threads[0].cpu.inside = None


def current(kicked: Kicked) -> None:
    kicked.image.current = kicked.threads[1]


def faulting(kicked: Kicked) -> None:
    kicked.image.faulting = kicked.threads[0]


def entered_again(kicked: Kicked) -> None:
    for thread in kicked.threads:
        thread.resumes = None


def code_at_aep(code: bytes) -> Change:
    def change(kicked: Kicked) -> None:
        entered_again(kicked)
        kicked.code, kicked.image.vdso.aep = code, 8

    return change


def notifies(kicked: Kicked) -> None:
    entered_again(kicked)
    kicked.scene.secs.flags |= 1 << 10


def in_scene(change: Any) -> Change:
    return lambda kicked: change(kicked.scene)


def no_exits_yet(kicked: Kicked) -> None:
    del vars(kicked.transitions)["exits"]
    vars(kicked.transitions)["_breakpoints"] = None


def of_class(part: str, cls: type) -> Change:
    return lambda kicked: setattr(getattr(kicked, part), "__class__", cls)


def other_loop(kicked: Kicked) -> None:
    kicked.loop.__class__ = OtherLoop
    kicked.table.kick_all = partial(kicked.loop.kick, kicked.image)


def other_function(kicked: Kicked) -> None:
    kicked.table.kick_all = lambda: kicked.log.append("function")


def other_partial(kicked: Kicked) -> None:
    kicked.table.kick_all = partial(kicked.log.append, "partial")


def one_open(kicked: Kicked) -> None:
    kicked.permits._open = {kicked.slots[0]}
    kicked.permits._unused = {kicked.threads[0]: kicked.slots[0]}
    kicked.permits._exited = (kicked.threads[0], kicked.slots[0])


def both_open(kicked: Kicked) -> None:
    one_open(kicked)
    kicked.permits._open = set(kicked.slots)
    kicked.permits._report = lambda slots: kicked.log.append(
        ("report", sorted(slot.number for slot in slots))
    )


def recorded(kicked: Kicked) -> None:
    kicked.permits._recorded.add(kicked.slots[1])
    kicked.slots[1].entry = cast(Any, "outcome")


def noting_permits(kicked: Kicked) -> None:
    one_open(kicked)
    kicked.permits.__class__ = NotingPermits
    kicked.permits.log = kicked.log


def leaving(kicked: Kicked) -> None:
    """A page that no table maps any more is hidden before the threads are interrupted."""

    class Memory:
        def hide(self, pages: list[int]) -> list[bytes]:
            kicked.log.append(("hide", pages, kicked.scene.secs.crossings.aex))
            return [b"\1" * 4096]

    record = StoredPage(EpcPage(EpcAddr(0x8000)))
    record.memory, record.linaddr, record.rights = cast(Any, Memory()), 4096, 3
    kicked.scene.store._leaving.append(record)


def no_threads(kicked: Kicked) -> None:
    kicked.image.threads.clear()


def without_entry(thread: int = 0) -> Change:
    def change(kicked: Kicked) -> None:
        frame = kicked.threads[thread].cpu.inside.frame.gpr
        del kicked.scene.table._entries[frame.linaddr]

    return change


def ends_with_another(kicked: Kicked) -> None:
    """The thread that is taken out has ended, and the other one with it."""
    without_entry()(kicked)

    def end() -> None:
        kicked.image.threads.clear()
        kicked.threads[1].cpu.inside = None

    kicked.out = end


def fails(kicked: Kicked) -> None:
    without_entry()(kicked)
    kicked.out = lambda: 1 / 0


def cannot_be(kicked: Kicked) -> None:
    kicked.scene.secs.cur_count = 0


def tracked_at_a_fault(kicked: Kicked) -> None:
    tracked(kicked)
    faulting(kicked)


_NAMED: tuple[Any, ...] = (
    *(nothing, tracked, outside, current, faulting, entered_again, notifies, no_exits_yet),
    *(other_loop, other_function, other_partial, one_open, both_open, recorded),
    *(noting_permits, leaving, no_threads, ends_with_another, fails, cannot_be),
)
CHANGES: dict[str, Change] = {
    **{change.__name__: change for change in _NAMED},
    "ENCLU of the program": code_at_aep(ENCLU),
    "other code": code_at_aep(b"\x90\x90\x90"),
    "the first cannot resume": without_entry(0),
    "the second cannot resume": without_entry(1),
    "32-bit mode": in_scene(set_of("cpu", "mode64", False)),
    "tracked, the first at its fault": tracked_at_a_fault,
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_eviction_interrupts_each_thread_inside(what: str) -> None:
    compare(CHANGES[what])


def crossings(seen: Any) -> tuple[int, ...]:
    """Return AEX and ERESUME of the enclave, as the state of a scene has them."""
    words = seen[2][1].strip(")").partition("(")[2].split(", ")
    counts = dict(word.split("=") for word in words)
    return int(counts["aex"]), int(counts["eresume"])


def test_the_usual_interrupts_count_and_change_no_more() -> None:
    for change, exits in ((nothing, 2), (outside, 1), (current, 1), (faulting, 1)):
        seen = compare(change)
        assert not seen[1] and crossings(seen) == (exits, exits)


@pytest.mark.parametrize(
    ("part", "cls", "once"),
    [
        ("table", OtherTable, ["kick"]),
        ("transitions", OtherTransitions, [*THREADS]),
        ("exits", OtherExits, [*THREADS]),
    ],
)
def test_objects_of_other_classes_are_asked_themselves(
    part: str, cls: Any, once: list[object]
) -> None:
    cls.log = []
    compare(of_class(part, cls))
    assert cls.log == once * 2


def test_threads_that_cannot_resume_are_taken_out() -> None:
    (first, second) = (compare(without_entry(number))[1] for number in range(2))
    assert [note[:2] for note in first] == [("take out", 11)]
    assert [note[:2] for note in second] == [("take out", 12)]
    assert first[0][3] == [1, 0], "the walk is a reader of the list"


def test_permits_end_before_threads_are_interrupted() -> None:
    seen = compare(one_open)
    assert seen[6] == [(7, CLOSED_BEHIND, None), (7, 5, None)] and seen[8] is None
    assert compare(both_open)[1] == [("report", [1])]
    assert compare(recorded)[7] == (0, 0, 0)


def test_a_tracer_receives_exits_and_resumptions() -> None:
    events = []
    for implementation in (True, "compiled"):
        kicked = Kicked(implementation)
        seen: list[object] = []
        kicked.scene.hw.tracer = seen.append
        events.append((kicked.act(), list(map(repr, seen))))
    assert events[0] == events[1] and len(events[0][1]) == 4


def test_the_usual_interrupts_need_no_python() -> None:
    kicked, called = Kicked("compiled"), list[str]()
    one_open(kicked)

    def note(frame: Any, event: str, _arg: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    page: Any = next(iter(kicked.site.enclave.pages.values()))
    mm = kicked.site.mms[0]
    mm.ptes = kicked.table
    assert page.epc is not None and page.epc.lru.isolate_page(page.epc)
    assert page.prepare() and page.block()
    del vars(kicked.loop)["_take_out"]
    sys.setprofile(note)
    try:
        page.write()
    finally:
        sys.setprofile(None)
    kicked.permit_table.close()
    assert kicked.site.world.system.core.counters.ewb_failed == 1  # the machine's count stays
    own = {"interrupt", "kick", "settle", "stays_inside", "try_virtual_exit", "_try_again"}
    assert not [name for name in called if name.rsplit(".", 1)[-1] in own], called


def test_interrupts_leave_no_reference_behind() -> None:
    kicked = Kicked("compiled")
    mm = kicked.site.mms[0]
    mm.ptes = kicked.table
    one_open(kicked)
    swap, secs = kicked.site.swap, kicked.site.secs
    things: list[object] = [kicked.loop, kicked.image, kicked.permits, kicked.transitions]
    things += [kicked.exits, kicked.table, kicked.scene.store, kicked.table.kick_all, swap, secs]
    things += [*kicked.threads, *kicked.slots, kicked.site.enclave, mm, kicked.site.srcu]
    things += [*(thread.cpu for thread in kicked.threads), kicked.scene.hw, kicked.image.threads]
    things += [*(thread.cpu.inside for thread in kicked.threads), swap._kick, None, True, False]
    things += [kicked.permits._open, kicked.permits._unused, kicked.permits._recorded]
    pages: list[Any] = list(kicked.site.enclave.pages.values())
    core = kicked.site.world.system.core
    process = kicked.site.world.actor.process

    def turn(number: int) -> None:
        page = pages[number % 3 - 3]
        secs.cur_count, secs.prev_count = 1, 0
        kicked.threads[0].resumes = kicked.threads[0].cpu.inside if number % 4 else None
        assert page.epc is not None
        core.evict(page.epc)
        secs.cur_count = secs.prev_count = 0
        core.evict(page.epc)
        process.mm.ptes = kept
        process.mm.fault(page.linaddr, 1, process)
        process.mm.ptes = kicked.table

    kept = Site(World(80, optimised="compiled")).mms[0].ptes
    for number in range(6):
        turn(number)
    gc.collect()
    before = list(map(sys.getrefcount, things))
    for number in range(300):
        turn(number)
    gc.collect()
    after = list(map(sys.getrefcount, things))
    assert all(abs(late - early) < 40 for early, late in zip(before, after, strict=True))
