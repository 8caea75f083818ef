"""An interrupt of a thread that would resume at once, in Python and in C, check by check.

Method: the processor is inside an enclave whose pages the native engine's store and page table
have.  One thing is changed that a check looks at; result, counts, pages and uses must be equal.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.hw import make_machine
from tests.support.inhabited import DATA, Inhabited

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore
from softsgx.hw import EpcPage
from softsgx.hw.optimised import entry
from softsgx.hw.processor import SsaFrame

READ, WRITE, EXECUTE = 1, 2, 4
FLAGS, OSSA, CSSA, NSSA, OFSBASE, OGSBASE = 8, 16, 24, 28, 48, 56  # in a TCS

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


class OtherStore(NativeStore):
    """A store of another class, which has other bytes."""

    __slots__ = ()

    def read(self, page: EpcPage, offset: int, size: int) -> bytes:
        return bytes(size)


class OtherTable(EnclavePageTable):
    """A page table of another class."""

    __slots__ = ()


class Scene:
    """Two threads of an enclave, both inside, and pages of the native engine."""

    def __init__(self) -> None:
        self.store = NativeStore()
        self.hw: Any = make_machine(processors=2, store=self.store)
        self.enclave = Inhabited(2, self.hw)
        self.table = EnclavePageTable(
            *cast(Any, (0, self.store, self.hw.pages, None)),
            memory_at=lambda _at: None,
            mapped_in=lambda _start, _end: [],
            is_readable=lambda _at: True,
            kick_all=lambda: None,
        )
        for linaddr, addr in self.enclave.built.pages.items():
            self.table._entries[linaddr] = self.store.record(self.hw.pages[addr])
        self.enclave.tables = cast(Any, self.table)
        for number in range(2):
            self.enclave.enter(number)
        self.table._used.clear()
        cpu: Any = self.hw.cpus[0]
        self.cpu = cpu
        self.cpu.tlb[5] = None
        inside: Any = self.cpu.inside
        self.inside = inside
        self.secs: Any = self.inside.enclave
        self.tcs: Any = self.inside.tcs
        self.gpr: Any = self.inside.frame.gpr
        self.other: Any = self.enclave.page(DATA[0])  # pages of no frame
        self.third: Any = self.enclave.page(DATA[1])

    def write(self, at: int, value: int, size: int = 8) -> None:
        """Change the TCS."""
        self.store.write(self.tcs, at, value.to_bytes(size, "little"))

    def take_frame(self, gpr: EpcPage, *xsave: EpcPage) -> None:
        """Let the frame have other pages behind the first."""
        self.inside.frame = SsaFrame(gpr, (self.gpr, *xsave))

    def state(self) -> list[object]:
        """Everything that the step could have changed."""
        counts = self.secs.epoch, self.secs.cur_count, self.secs.prev_count
        seen: list[object] = [counts, repr(self.secs.crossings)]
        for cpu in self.hw.cpus:
            inside = cpu.inside
            seen.append(inside and (inside.entry_epoch, inside.tcs_linaddr, repr(inside.outside)))
            seen.append((len(cpu.tlb), cpu.regs.rip, cpu.regs.rsp, cpu.regs.xcr0))
        for page in self.hw.pages.values():
            record = page.stored
            data = record and (record.maps, record.rights, record.poisoned, record.data)
            seen.append((repr(page), page.lock, data and (*data[:3], bytes(data[3] or b""))))
        return seen


Change = Callable[[Scene], object]


def compare(change: Change) -> object:
    """Do the step in both forms; return what both return: a value, or the type of an error."""
    assert compiled.speedups is not None
    results, states = [], []
    for step in (entry.exit_in_python, compiled.speedups.try_virtual_exit):
        scene = Scene()
        change(scene)
        try:
            results.append(step(scene.cpu))
        except (AssertionError, AttributeError) as error:
            results.append(type(error))
        # Python looks at the pages of a frame in any order, until it finds one that does not fit.
        any_order = results[-1] is False and scene.gpr is not scene.inside.frame.gpr
        states.append((scene.state(), any_order or sorted(scene.table._used)))
    assert results[0] == results[1]
    assert states[0] == states[1]
    return results[0]


def set_of(part: str, name: str, value: object) -> Change:
    return lambda scene: setattr(getattr(scene, part), name, value)


def written(at: int, value: int, size: int = 8) -> Change:
    return lambda scene: scene.write(at, value, size)


def entry_of(part: str, make: Callable[[Scene, Any], object]) -> Change:
    def change(scene: Scene) -> None:
        linaddr = getattr(scene, part).linaddr
        record = make(scene, scene.table._entries.pop(linaddr))
        if record is not None:
            scene.table._entries[linaddr] = cast(Any, record)

    return change


def prot_of(part: str, prot: int) -> Change:
    return lambda scene: scene.table._prots.__setitem__(getattr(scene, part).linaddr, prot)


def poisoned(part: str) -> Change:
    return lambda scene: setattr(getattr(scene, part).stored, "poisoned", True)


def with_frame(*xsave: str, gpr: str = "other") -> Change:
    def change(scene: Scene) -> None:
        scene.take_frame(getattr(scene, gpr), *(getattr(scene, name) for name in xsave))

    return change


def both(*changes: Change) -> Change:
    return lambda scene: [change(scene) for change in changes]


def nothing(_scene: Scene) -> None:
    """All checks pass."""


def tracked(scene: Scene) -> None:
    assert scene.enclave.track() is Status.SUCCESS


def other_protected(scene: Scene) -> None:
    scene.table._prots[scene.other.linaddr] = READ


def second_frame(scene: Scene) -> None:
    """As after an exception of the enclave: CSSA is 1."""
    page = scene.hw.pages[scene.enclave.built.pages[scene.gpr.linaddr + PAGE_BYTES]]
    scene.inside.frame = SsaFrame(page, (page,))
    scene.write(CSSA, 1, 4)


def frames_of_two_pages(scene: Scene) -> None:
    scene.secs.ssa_frame_size = 2
    scene.write(CSSA, 1, 4)
    at = scene.gpr.linaddr + 2 * PAGE_BYTES
    page = scene.hw.pages[scene.enclave.built.pages[at]]  # the next thread's TCS
    page.pt, page.rwx = PageType.REG, 3
    scene.inside.frame = SsaFrame(page, (page,))


def bytes_of_tcs(scene: Scene) -> None:
    scene.tcs.stored.data = bytes(scene.tcs.stored.data)


PLAIN: dict[str, Change] = {
    "nothing": nothing,
    "a new epoch": tracked,
    "bytes": bytes_of_tcs,
    "more flags": lambda scene: setattr(scene.secs, "flags", scene.secs.flags | 2),
    "a shared TCS": set_of("tcs", "lock", 1),
    "TF": lambda scene: setattr(scene.inside, "outside", scene.inside.outside._replace(tf=0x100)),
    "all rights": set_of("gpr", "rwx", 7),
    "other entries with rights": other_protected,
    "rights of the entry": prot_of("gpr", READ | WRITE | EXECUTE),
    "a frame of pages": with_frame("other"),
    "registers in a page of their own": with_frame(),
    "registers in a third page": with_frame("third"),
    "the second frame": second_frame,
    "frames of two pages": frames_of_two_pages,
    "aligned bases": both(written(OFSBASE, 0x3000), written(OGSBASE, 0x5000)),
}


@pytest.mark.parametrize("what", PLAIN)
def test_an_interrupt_passes_without_python(what: str) -> None:
    assert compare(PLAIN[what]) is True
    assert compiled.speedups is not None
    scene, called = Scene(), list[object]()
    PLAIN[what](scene)
    compiled.speedups.give("virtual_exit", called.append)
    try:
        assert compiled.speedups.try_virtual_exit(scene.cpu) is True
    finally:
        compiled.speedups.give("virtual_exit", entry.exit_in_python)
    assert not called


REFUSED: dict[str, Change] = {
    **{
        f"{name} of the {part}": set_of(part, name, value)
        for part in ("tcs", "gpr")
        for name, value in (
            ("valid", False),
            ("blocked", True),
            ("pending", True),
            ("modified", True),
        )
    },
    **{
        f"a page behind the frame's first: {name}": both(with_frame("other"), change)
        for name, change in {
            "blocked": set_of("other", "blocked", True),
            "pending": set_of("other", "pending", True),
            "modified": set_of("other", "modified", True),
            "invalid": set_of("other", "valid", False),
            "type": set_of("other", "pt", PageType.TCS),
            "rights": set_of("other", "rwx", READ),
            "no entry": entry_of("other", lambda _scene, _record: None),
        }.items()
    },
    "the first of a frame's pages": both(with_frame("other"), set_of("gpr", "blocked", True)),
    "the last of a frame's pages": both(with_frame("third"), set_of("third", "blocked", True)),
    **{
        f"the page of the registers: {name}": both(with_frame(), change)
        for name, change in {
            "blocked": set_of("other", "blocked", True),
            "rights": set_of("other", "rwx", READ),
            "no entry": entry_of("other", lambda _scene, _record: None),
        }.items()
    },
    "a locked TCS": set_of("tcs", "lock", -1),
    "a TCS elsewhere": lambda scene: setattr(scene.inside, "tcs_linaddr", 1 << 12),
    "32-bit mode": set_of("cpu", "mode64", False),
    "opted in": lambda scene: setattr(
        scene.inside, "outside", scene.inside.outside._replace(tf=None)
    ),
    **{
        f"flags ^ {bit:#x}": lambda scene, bit=bit: setattr(  # type: ignore[misc]
            scene.secs, "flags", scene.secs.flags ^ bit
        )
        for bit in (1, 4, 1 << 6, 1 << 10)
    },
    "TCS.FLAGS": written(FLAGS, 1),
    "TCS.FLAGS, high": written(FLAGS, 1 << 63),
    "CSSA is NSSA": written(CSSA, 2, 4),
    "CSSA 1": written(CSSA, 1, 4),
    "no frames": written(NSSA, 0, 4),
    "OSSA": written(OSSA, 0x1000),
    "OSSA, high": written(OSSA, (1 << 64) - PAGE_BYTES),
    "OFSBASE": written(OFSBASE, 8),
    "OGSBASE": written(OGSBASE, 0x1010),
    "no bytes": lambda scene: setattr(scene.tcs.stored, "data", None),
    "a type": set_of("gpr", "pt", PageType.TCS),
    "read-only": set_of("gpr", "rwx", READ),
    "write-only": set_of("gpr", "rwx", WRITE),
    "a frame elsewhere": set_of("gpr", "linaddr", 0x1000),
    **{
        f"{name} of the {part}": change
        for part in ("tcs", "gpr")
        for name, change in {
            "no entry": entry_of(part, lambda _scene, _record: None),
            "entry of another page": entry_of(part, lambda scene, _r: scene.other.stored),
            "entry that reads": prot_of(part, READ),
            "entry without rights": prot_of(part, 0),
            "poison": poisoned(part),
        }.items()
    },
    "a size that wraps": both(
        lambda scene: setattr(scene.secs, "ssa_frame_size", 1 << 21),
        written(CSSA, 1 << 31, 4),
        written(NSSA, (1 << 32) - 1, 4),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_interrupt_does_not_pass(what: str) -> None:
    assert compare(REFUSED[what]) is False


def outside(scene: Scene) -> None:
    scene.cpu.inside = None


@pytest.mark.parametrize(
    "change",
    [
        outside,
        set_of("secs", "cur_count", 0),
        set_of("inside", "entry_epoch", -3),
        both(tracked, set_of("secs", "prev_count", 0)),
        both(tracked, set_of("inside", "entry_epoch", -3)),
        both(tracked, lambda scene: setattr(scene.inside, "entry_epoch", scene.secs.epoch + 1)),
    ],
    ids=["outside", "none inside", "an old entry", "none inside before", "too old", "too new"],
)
def test_counts_that_cannot_be_are_an_error(change: Change) -> None:
    assert compare(change) is AssertionError


@pytest.mark.parametrize("what", ["store", "table", "frame"])
def test_objects_of_other_classes_are_asked_themselves(what: str) -> None:
    def change(scene: Scene) -> None:
        if what == "store":
            scene.store.__class__ = OtherStore
        elif what == "table":
            scene.table.__class__ = OtherTable
        else:
            scene.inside.frame = SsaFrame(scene.gpr, cast(Any, [scene.gpr]))

    assert compare(change) is (what != "store")


def test_a_virtual_exit_leaves_no_reference_behind() -> None:
    assert compiled.speedups is not None
    scene = Scene()
    tracked(scene)
    scene.inside.outside = scene.inside.outside._replace(tf=1 << 40)
    assert compiled.speedups.try_virtual_exit(scene.cpu)
    things = [scene.cpu, scene.inside, scene.secs, scene.tcs, scene.gpr, scene.table, scene.store]
    things += [scene.inside.frame.xsave, scene.inside.outside.tf]
    things += [scene.hw, scene.inside.frame, scene.cpu.tlb, scene.inside.outside, None, True, False]
    gc.collect()
    before = list(map(sys.getrefcount, things))
    for number in range(300):
        scene.tcs.blocked = number % 3 == 0
        assert compiled.speedups.try_virtual_exit(scene.cpu) is not scene.tcs.blocked
    after = list(map(sys.getrefcount, things))
    assert all(abs(late - early) < 20 for early, late in zip(before, after, strict=True))
