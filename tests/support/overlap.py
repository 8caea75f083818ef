"""Two leaves at once: every leaf as an operation on pages that a test can make overlap.

An :class:`Op` names the page that each of a leaf's operands is, makes fresh ones where none is
given, and runs.  :func:`during` runs one operation in the middle of another: at its point, where it
holds all its locks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from tests.support.hw import launch_hash, secs_of, signed
from tests.support.paging import BASE, SIZE, Bench, Blob, outcome

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    EinitToken,
    PageType,
    RdInfo,
    SecInfo,
    Secs,
    SigStruct,
)
from softsgx.hw import Leaves, LogicalProcessor, PageInfoArgs

__all__ = ["LEAVES", "Op", "World", "during"]


@cache
def _signature() -> SigStruct:
    """A signature of an enclave of which nothing has been measured."""
    secs = secs_of(SIZE, BASE)
    return signed(hashlib.sha256().digest(), secs)


class World:
    """A bench with an enclave that runs and one that is being built.

    Attributes:
        running: SECS of an initialised debug enclave.
        building: SECS of an enclave before EINIT.
        va: a VA page.
        cpus: the processors on which the holder and the other leaf run.
    """

    def __init__(self) -> None:
        self.bench = bench = Bench()
        bench.machine.launch_key_hash[:] = launch_hash()
        self.running, self.building = bench.secs(), bench.secs()
        bench.enclave(self.running).flags |= AttributesFlags.DEBUG
        bench.enclave(self.running).virt_children = 8
        enclave = bench.enclave(self.building)
        enclave.flags = int(AttributesFlags.MODE64BIT)
        bench.machine.measurements[enclave.eid] = hashlib.sha256()
        self.va = bench.va()
        self._slots = 0
        self._offsets = 0

    def slot(self) -> int:
        """Return an offset in a VA page that no one was given yet."""
        self._slots += 8
        return self._slots

    def linaddr(self) -> int:
        """Return an address in every enclave that no one was given yet."""
        self._offsets += PAGE_BYTES
        return BASE + 0x80000 + self._offsets

    def evicted(self, secs: int, va: int) -> Blob:
        """Return an evicted page of an enclave, its version in a slot of ``va``."""
        if self.bench.page(va).pt is not PageType.VA:
            va = self.va
        victim = self.bench.child(secs, linaddr=self.linaddr())
        return self.bench.evict(victim, va + self.slot())


Make = Callable[[World], int]
Run = Callable[["Op", Leaves], Any]


@dataclass(frozen=True)
class Leaf:
    """How to make a leaf's pages, in the order in which it locks them, and to run it."""

    make: dict[str, Make]
    run: Run
    prepare: Callable[[Op], Any] | None = None


@dataclass
class Op:
    """One call of a leaf in a world.

    Attributes:
        pages: EPC page of each operand; what is not given is made.
        extra: what :attr:`Leaf.prepare` made.
    """

    world: World
    leaf: str
    pages: dict[str, int] = field(default_factory=dict)
    extra: Any = None

    def __post_init__(self) -> None:
        leaf = LEAVES[self.leaf]
        for role, make in leaf.make.items():
            if role not in self.pages:
                self.pages[role] = make(self.world)
                if role == "va" and self.pages["target"] == self.pages["va"]:
                    self.pages["va"] = self.world.bench.va()
        if leaf.prepare is not None:
            self.extra = leaf.prepare(self)

    def run(self, cpu: LogicalProcessor) -> object:
        """Execute it on ``cpu``; return how it ends."""
        return outcome(partial(LEAVES[self.leaf].run, self, Leaves(cpu)))

    def secs(self) -> int | None:
        """Return the SECS of the enclave it works on; ``None`` without one."""
        if "secs" in self.pages:
            return self.pages["secs"]
        page = self.world.bench.page(self.pages["target"])
        if not page.valid:
            return None
        if page.pt is PageType.SECS:
            return page.addr
        return None if page.secs is None else page.secs.addr


def during(holder: Op, other: Op, *, guest: bool = False) -> tuple[object, object]:
    """Run ``other`` at the point of ``holder``; return how the holder and the other one end."""
    machine = holder.world.bench.machine
    ends: list[object] = []

    def stop(where: str) -> None:
        machine.point = lambda where: None
        cpu = machine.cpus[1]
        if guest:
            cpu.vmx_operation = cpu.vmx_nonroot = cpu.epc_virtualization = True
        ends.append(other.run(cpu))

    machine.point = stop
    holder_ends = holder.run(machine.cpus[0])
    assert len(ends) == 1, f"{holder.leaf} reached {len(ends)} points"
    return holder_ends, ends[0]


# --- the leaves --------------------------------------------------------------------------------


def _free(world: World) -> int:
    return world.bench.free()


def _reg(world: World) -> int:
    return world.bench.child(world.running, linaddr=world.linaddr())


def _unfinished_reg(world: World) -> int:
    return world.bench.child(world.building, linaddr=world.linaddr())


def _evictable(world: World) -> int:
    page = _reg(world)
    world.bench.page(page).blocked = True
    world.bench.page(page).bepoch = -2  # blocked two tracking cycles ago
    return page


def _running(world: World) -> int:
    return world.running


def _building(world: World) -> int:
    return world.building


def _va(world: World) -> int:
    return world.va


def _ewb(op: Op, leaves: Leaves) -> Any:
    info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
    return leaves.ewb(info, op.pages["target"], op.pages["va"] + op.extra)


def _blob(op: Op) -> Blob:
    world = op.world
    page = world.bench.page(op.pages["secs"])
    secs = op.pages["secs"] if page.valid and page.pt is PageType.SECS else world.running
    return world.evicted(secs, op.pages["va"])


def _eld(op: Op, leaves: Leaves) -> Any:
    blob: Blob = op.extra
    info = PageInfoArgs(blob.linaddr, blob.srcpge, blob.pcmd, op.pages["secs"])
    load = getattr(leaves, op.leaf)
    return load(info, op.pages["target"], op.pages["va"] + blob.slot % PAGE_BYTES)


def _ecreate(op: Op, leaves: Leaves) -> Any:
    secs: Secs = secs_of(SIZE, BASE)
    return leaves.ecreate(
        PageInfoArgs(0, secs.pack(), SecInfo.of(PageType.SECS)), op.pages["target"]
    )


def _eadd(op: Op, leaves: Leaves) -> Any:
    info = PageInfoArgs(op.extra, bytes(PAGE_BYTES), SecInfo.of(PageType.REG, 3), op.pages["secs"])
    return leaves.eadd(info, op.pages["target"])


def _eaug(op: Op, leaves: Leaves) -> Any:
    return leaves.eaug(PageInfoArgs(op.extra, 0, 0, op.pages["secs"]), op.pages["target"])


def _target(name: str) -> Run:
    return lambda op, leaves: getattr(leaves, name)(op.pages["target"])


def _with(first: Any, name: str) -> Run:
    return lambda op, leaves: getattr(leaves, name)(first, op.pages["target"])


def _eextend(op: Op, leaves: Leaves) -> Any:
    secs = op.secs()
    return leaves.eextend(op.world.building if secs is None else secs, op.pages["target"])


def _virtual(name: str) -> Run:
    def run(op: Op, leaves: Leaves) -> Any:
        secs = op.secs()
        return getattr(leaves, name)(op.pages["target"], secs or op.world.running)

    return run


_LOAD = Leaf({"target": _free, "va": _va, "secs": _running}, _eld, _blob)
LEAVES: dict[str, Leaf] = {
    "ecreate": Leaf({"target": _free}, _ecreate),
    "eadd": Leaf({"target": _free, "secs": _building}, _eadd, lambda op: op.world.linaddr()),
    "einit": Leaf(
        {"target": _building},
        lambda op, leaves: leaves.einit(_signature(), op.pages["target"], EinitToken()),
    ),
    "eremove": Leaf({"target": _reg}, _target("eremove")),
    "edbgrd": Leaf({"target": _reg}, _target("edbgrd")),
    "edbgwr": Leaf({"target": _reg}, _with(7, "edbgwr")),
    "eextend": Leaf({"target": _unfinished_reg}, _eextend),
    "eldb": _LOAD,
    "eldu": _LOAD,
    "eldbc": _LOAD,
    "elduc": _LOAD,
    "eblock": Leaf({"target": _reg}, _target("eblock")),
    "epa": Leaf({"target": _free}, _with(3, "epa")),
    "ewb": Leaf({"target": _evictable, "va": _va}, _ewb, lambda op: op.world.slot()),
    "etrack": Leaf({"target": _running}, _target("etrack")),
    "etrackc": Leaf({"target": _reg}, _target("etrackc")),
    "eaug": Leaf({"target": _free, "secs": _running}, _eaug, lambda op: op.world.linaddr()),
    "emodpr": Leaf({"target": _reg}, _with(SecInfo(flags=1), "emodpr")),
    "emodt": Leaf({"target": _reg}, _with(SecInfo.of(PageType.TRIM), "emodt")),
    "erdinfo": Leaf({"target": _reg}, _with(RdInfo(), "erdinfo")),
    "edecvirtchild": Leaf({"target": _reg}, _virtual("edecvirtchild")),
    "eincvirtchild": Leaf({"target": _reg}, _virtual("eincvirtchild")),
    "esetcontext": Leaf(
        {"target": _running},
        lambda op, leaves: leaves.esetcontext(op.pages["target"], bytes(range(8))),
    ),
}
