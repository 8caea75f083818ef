"""Each step of a plain fault, in Python and in C: permits, what is asked, what is left to the loop.

Method: threads, memory and machine are fakes that note their calls, the table of permits and its
slots are real.  Both forms serve the same scripted stops; notes, gates and permits must be equal.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace as Fake
from typing import Any, cast

import pytest

from softsgx import compiled
from softsgx.driver import FaultResult
from softsgx.driver.mm import EnclaveVma
from softsgx.engines.native import abi
from softsgx.engines.native.faults import plain
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
from softsgx.engines.native.vdso.permits import Permits

ADDRESS, TCS = 0x7000_1000, 0x7000_0000
SIGBUS_STOP = abi.SIGBUS << 8 | 0x7F
INFORMATION = 2

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


class NotingPermits(Permits):
    """Notes what it would report to a machine."""

    notes: list[object]

    def _report(self, slots: Any, at_hand: Any = None) -> None:
        slots = sorted(slots, key=lambda slot: slot.number)
        self.notes.append(("report", [slot.number for slot in slots], at_hand and at_hand.tid))
        self._open.difference_update(slots)

    def _slot(self, thread: Any, inside: Any) -> Slot | None:
        self.notes.append(("slot", thread.tid))
        return None


class Thread:
    """A thread that stops by SIGBUS, inside unless said otherwise."""

    def __init__(self, tid: int, world: Scene) -> None:
        self.tid = self.own_tid = tid
        self.scene, self.image, self.process = world, world.image, Fake(pid=1)
        crossings = Fake(aex=0, eresume=0)
        self.mode: Any = Fake(tcs_linaddr=TCS, enclave=Fake(crossings=crossings), outside=None)
        self.cpu = Fake(inside=self.mode, hw=world.hw)
        self.breakpoints, self.watched, self.blocked = False, False, None
        self.running = self.unstoppable = True
        self.resumes: object = self.mode
        self.spurious: object = "before"
        self._info = ctypes.create_string_buffer(128)
        self.info_at = ctypes.addressof(self._info)
        self.signal(abi.BUS_ADRERR, ADDRESS)

    def signal(self, code: int, address: int) -> None:
        """Set what GETSIGINFO has fetched."""
        ctypes.memmove(self.info_at + 8, code.to_bytes(4, "little"), 4)
        ctypes.memmove(self.info_at + 16, address.to_bytes(8, "little"), 8)

    def siginfo(self) -> Any:
        raw = self._info.raw
        at = int.from_bytes(raw[16:24], "little")
        return Fake(code=int.from_bytes(raw[8:12], "little"), addr=at)

    def stopped(self, status: int, fetched: int) -> object:
        self.scene.note("stopped", self.tid, status, fetched, self.running, self.unstoppable)
        return "stop"

    def resume(self) -> None:
        self.scene.note("resume", self.tid, self.running, self.image.current is None)


class Scene:
    """What a run has, and what is done with it."""

    def __init__(self) -> None:
        self.notes: list[object] = []
        self.hw = Fake(tracer=None)
        self.vma: Any = EnclaveVma(TCS, TCS + (1 << 20), 3, cast(Any, None), None)
        self.result = FaultResult.NOPAGE
        self.during: Callable[[], object] = lambda: None
        self.entry: object = None
        self.table = PermitTable(os.memfd_create("table", os.MFD_ALLOW_SEALING), 1 << 20, {})
        self.image: Any = Fake(permits=self.table, permits_at=1, watched=False, current=None)
        self.image.threads = {}
        self.image.mm = Fake(find=lambda _at: self.vma, found=None, fault=self._fault)
        self.image.page_table = Fake(entry=lambda _at: self.entry)
        self.image.flush = lambda: self.note("flush")
        self.permits = NotingPermits(usable=True, hold=cast(Any, None), failed=cast(Any, None))
        self.permits.notes = self.notes
        self.permits._exited = cast(Any, "before")
        self.threads = {tid: Thread(tid, self) for tid in (11, 12)}
        self.slots: list[Slot] = []
        for number, thread in enumerate(self.threads.values()):
            thread.mode.tcs_linaddr = TCS + number * 4096
            slot = Slot(self.table, number, thread.mode.tcs_linaddr)
            self.table._slots[slot.tcs] = slot
            slot.inside, slot.stay, slot.opened = cast(Any, thread), thread.mode, 77 + number
            slot.set("gate", slot.opened)
            slot.set("exited", 5)
            self.slots.append(slot)
        self.permits._open = {self.slots[0]}
        self.events: deque[tuple[int, int, int]] = deque([(11, SIGBUS_STOP, INFORMATION)])
        self.waits: Any = Fake(kept=[], places={}, look_ns=1, next=self._event, faults=None)
        self.store: Any = Fake(_leaving=[1], hide_unmapped=self._hide)
        self.runtime: Any = Fake(_ready=[], _lock_waiters=[], _timers=[], _has_failures=False)
        self.runtime.is_quiet = lambda: not any(vars(self.runtime)[name] for name in QUIET)
        self.server: Any = Fake(held=[], threads=self.threads)
        self.server.guard = self._guard
        self.server.resume_thread = lambda *each: self.note("resume_thread", *map(named, each))
        self.server.failed = lambda *each: self.note("failed", *map(named, each))
        self.enclave = Fake(faulted=self._faulted)
        self.at_once = True
        self.exits: Any = Fake(return_at_once=self._return_at_once)

    def note(self, *what: object) -> None:
        self.notes.append(what)

    def _return_at_once(self, thread: Any) -> bool:
        self.note("at once", thread.tid)
        return self.at_once

    def _hide(self) -> None:
        if self.store._leaving:
            self.note("hide")

    def _guard(self, thread: Any, stop: object) -> None:
        """Report crossings, as the loop does before all else."""
        self.permits.report(thread)
        self.note("guard", thread.tid, stop)

    def _event(self) -> tuple[int, int, int]:
        return self.events.popleft() if self.events else (0, 0, 0)

    def _fault(self, address: int, access: int, thread: Any) -> FaultResult:
        self.note("fault", address, access, thread.tid, self.image.current is thread)
        self.during()
        return self.result

    def _faulted(self, thread: Any, address: int, code: int, result: FaultResult) -> int:
        self.note("faulted", thread.tid, address, code, result)
        return 7

    def state(self) -> object:
        """Notes, and everything that steps change."""
        permits, threads = self.permits, self.threads.values()
        return (
            self.notes,
            sorted(slot.number for slot in permits._open),
            {thread.tid: slot.number for thread, slot in permits._unused.items()},
            (len(permits._recorded), permits._exited, self.image.current),
            [(slot.word("gate"), slot.word("exited"), slot.entry) for slot in self.slots],
            [(each.running, each.unstoppable, each.spurious) for each in threads],
            [vars(each.mode.enclave.crossings) for each in threads],
        )


QUIET = ("_ready", "_lock_waiters", "_timers", "_has_failures")


def named(thing: object) -> object:
    return thing.tid if isinstance(thing, Thread) else repr(thing)


def usual(scene: Scene) -> None:
    """Nothing special."""


def crossed(scene: Scene) -> None:
    scene.slots[0].set("gate", 1)


def of_another(scene: Scene) -> None:
    scene.slots[0].inside = cast(Any, scene.threads[12])


def other_open(scene: Scene) -> None:
    scene.permits._open = set(scene.slots)


def other_stopped(scene: Scene) -> None:
    scene.permits._open = set(scene.slots)
    scene.permits._unused[cast(Any, scene.threads[12])] = scene.slots[1]


def recorded(scene: Scene) -> None:
    scene.permits._recorded.add(scene.slots[1])
    scene.slots[1].entry = cast(Any, "outcome")


def none_open(scene: Scene) -> None:
    scene.permits._open = set()


def without_permits(scene: Scene) -> None:
    scene.image.permits = None
    scene.permits._open = set()


def outside(scene: Scene) -> None:
    scene.threads[11].cpu.inside = None


def kicked(scene: Scene) -> None:
    def kick() -> None:
        scene.threads[11].cpu.inside = None

    scene.during = kick


def blocks(scene: Scene) -> None:
    scene.threads[11].blocked = cast(Any, 3)


def moved(scene: Scene) -> None:
    scene.slots[0].stay = None


def breaks(scene: Scene) -> None:
    scene.threads[11].breakpoints = True


def watches(scene: Scene) -> None:
    scene.image.watched = True


def watches_both(scene: Scene) -> None:
    scene.image.watched = scene.threads[11].watched = True


def present(scene: Scene) -> None:
    scene.entry = 1


def read_only(scene: Scene) -> None:
    scene.vma.prot = 1


def unmapped(scene: Scene) -> None:
    scene.vma = None


def found_in_front(scene: Scene) -> None:
    scene.image.mm.found = EnclaveVma(TCS, ADDRESS, 1, cast(Any, None), None)


def found_behind(scene: Scene) -> None:
    end = ADDRESS + 8192
    scene.image.mm.found = EnclaveVma(ADDRESS + 4096, end, 1, cast(Any, None), None)


def again(scene: Scene) -> None:
    scene.threads[11].resumes = None


def not_at_once(scene: Scene) -> None:
    scene.threads[11].resumes, scene.at_once = None, False


def retries(scene: Scene) -> None:
    scene.result = FaultResult.RETRY


def refused(scene: Scene) -> None:
    scene.result = FaultResult.SIGBUS


def traced(scene: Scene) -> None:
    scene.hw.tracer = print


def busy(name: str) -> Any:
    def set_up(scene: Scene) -> None:
        scene.during = lambda: setattr(scene.runtime, name, [1])

    set_up.__name__ = f"busy{name}"
    return set_up


def nothing_leaves(scene: Scene) -> None:
    scene.store._leaving = []


def fails(scene: Scene) -> None:
    def fail() -> None:
        raise RuntimeError("mapping")

    scene.during = fail


def other_code(scene: Scene) -> None:
    scene.threads[11].signal(4, ADDRESS)


def holds(scene: Scene) -> None:
    scene.during = lambda: scene.server.held.append(scene.threads[12])


def keeps(scene: Scene) -> None:
    scene.during = lambda: scene.waits.kept.append((12, 0))


def both_threads(scene: Scene) -> None:
    scene.permits._open = set(scene.slots)
    scene.events.extend([(12, SIGBUS_STOP, INFORMATION), (11, SIGBUS_STOP, INFORMATION)])


def stranger(scene: Scene) -> None:
    scene.events.appendleft((99, SIGBUS_STOP, INFORMATION))


SETTINGS = [
    *(usual, crossed, of_another, other_open, other_stopped, recorded, none_open, without_permits),
    *(outside, kicked, blocks, moved, breaks, watches, watches_both, present, read_only, unmapped),
    *(again, not_at_once, retries, refused, traced, *map(busy, QUIET), nothing_leaves, fails),
    *(found_in_front, found_behind, other_code, holds, keeps, both_threads, stranger),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_each_step_is_the_same_in_python_and_in_c(setting: Any) -> None:
    assert compiled.speedups is not None
    states = []
    for serve in (plain.serve_in_python, compiled.speedups.serve_faults):
        scene = Scene()
        setting(scene)
        faults = PlainFaults(
            *cast(Any, (scene.server, scene.waits, scene, scene.permits)),
            *cast(Any, (scene.store, scene.runtime)),
        )
        states.append((serve(faults), faults.served, scene.state()))
        scene.table.close()
    assert states[0] == states[1]
