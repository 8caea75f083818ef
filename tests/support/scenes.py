"""Calls of leaves that a test breaks one check at a time, on enclaves that real leaves built.

``InfoScene`` is a call with PAGEINFO, ``CallScene`` one by registers; ``check`` writes a row for
``tests.support.checks``, ``rows`` and ``pairs`` make parameters of a table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import pytest
from tests.support.checks import Check
from tests.support.hw import Built
from tests.support.paging import Pf, outcome
from tests.support.tables import sampled

from softsgx.arch import PAGE_BYTES, PageInfo, SecInfo
from softsgx.hw import EpcPage, LogicalProcessor, Machine, PageInfoArgs
from softsgx.hw.secs import ResidentSecs

__all__ = [
    "INFO_AT",
    "SECINFO_AT",
    "SRCPGE_AT",
    "CallScene",
    "InfoScene",
    "Row",
    "check",
    "memory",
    "operand",
    "pairs",
    "park",
    "put",
    "rows",
    "state_of",
]


def park(machine: Machine, addr: int, data: bytes) -> int:
    """Put ``data`` into ordinary memory and return its address."""
    assert machine.section_of(addr) is None, f"{addr:#x} is EPC"
    machine.ram.write(addr, data)
    return addr


def state_of(machine: Machine) -> list[object]:
    """Everything that a leaf may change: EPCM, locks, SECS, bytes, measurements, counters."""
    state: list[object] = [repr(machine._eids), machine.cpusvn, machine.launch_key_hash[:]]
    for addr in sorted(machine.pages):
        page = machine.pages[addr]
        if not page.valid and not page.lock and not page.modification_lock:
            continue  # as good as never used
        state.append((addr, page.valid, page.lock, page.modification_lock))
        if not page.valid:
            continue
        enclave = page.enclave
        state.append(
            (
                page.secinfo_flags(),
                page.linaddr,
                page.blocked,
                page.bepoch,
                page.secs and page.secs.addr,
                page.slots and tuple(page.slots),
                enclave and [(name, getattr(enclave, name)) for name in ResidentSecs.__slots__],
                page.secs and machine.store.read(page, 0, PAGE_BYTES),
            )
        )
    running = sorted(machine.measurements.items())
    return [*state, *((eid, digest.hexdigest()) for eid, digest in running)]


INFO_AT, SECINFO_AT, SRCPGE_AT = 0x1_0000, 0x1_0100, 0x2_0000


@dataclass
class InfoScene:
    """A call of a leaf that takes PAGEINFO; ``tests.support.checks`` breaks it.

    Attributes:
        leaf: its name.
        rcx: the target.
        source: bytes of SRCPGE; ``None`` where it must be zero.
        secinfo: SECINFO; ``None`` where it may be left out.
        at: address in memory of ``info``, ``srcpge``, ``secinfo``; an operand that has none is
            given as an object.
    """

    machine: Machine
    leaf: str
    rcx: int
    source: bytes | None = None
    secinfo: SecInfo | None = None
    linaddr: int = 0
    secs: int = 0
    at: dict[str, int] = field(default_factory=dict)
    built: Built | None = None

    @property
    def cpu(self) -> LogicalProcessor:
        """The processor that it runs on, which is the operating system's."""
        return self.machine.kernel

    @property
    def target(self) -> EpcPage:
        """EPCM entry of ``rcx``."""
        page = self.machine.page_at(self.rcx)
        assert page is not None, "the target is no EPC page"
        return page

    @property
    def enclave(self) -> ResidentSecs:
        """The enclave that the page goes to."""
        assert self.built is not None, "the scene has no enclave"
        return self.built.enclave

    @property
    def secs_page(self) -> EpcPage:
        """EPCM entry of the SECS."""
        assert self.built is not None, "the scene has no enclave"
        return self.machine.pages[self.built.secs]

    def run(self) -> object:
        """Store what is to be in memory and call the leaf."""
        if "info" in self.at:
            self.at.setdefault("srcpge", SRCPGE_AT)
            self.at.setdefault("secinfo", SECINFO_AT)
        source: int | bytes = 0 if self.source is None else self.source
        secinfo: int | SecInfo = 0 if self.secinfo is None else self.secinfo
        if isinstance(source, bytes) and "srcpge" in self.at:
            source = park(self.machine, self.at["srcpge"], source)
        if isinstance(secinfo, SecInfo) and "secinfo" in self.at:
            secinfo = park(self.machine, self.at["secinfo"], secinfo.pack())
        info: int | PageInfoArgs = PageInfoArgs(self.linaddr, source, secinfo, self.secs)
        if "info" in self.at:
            assert isinstance(source, int) and isinstance(secinfo, int), "operands not in memory"
            packed = PageInfo(linaddr=self.linaddr, srcpge=source, secinfo=secinfo, secs=self.secs)
            info = park(self.machine, self.at["info"], packed.pack())
        return outcome(partial(getattr(self.machine.leaves, self.leaf), info, self.rcx))

    def snapshot(self) -> object:
        """Return the machine's state."""
        return state_of(self.machine)


@dataclass
class CallScene:
    """A call of a leaf by its registers; a structure in ``rbx`` may be put into memory."""

    machine: Machine
    leaf: str
    operands: dict[str, Any]
    built: Built
    at: dict[str, int] = field(default_factory=dict)

    @property
    def cpu(self) -> LogicalProcessor:
        """The processor that it runs on, which is the operating system's."""
        return self.machine.kernel

    @property
    def enclave(self) -> ResidentSecs:
        """Its enclave."""
        return self.built.enclave

    def page(self, register: str = "rcx") -> EpcPage:
        """EPCM entry that a register names."""
        page = self.machine.page_at(self.operands[register])
        assert page is not None, f"{register} names no EPC page"
        return page

    def run(self) -> object:
        """Store what is to be in memory and call the leaf."""
        operands = dict(self.operands)
        for register, addr in self.at.items():
            operands[register] = park(self.machine, addr, operands[register].pack())
        return outcome(partial(getattr(self.machine.leaves, self.leaf), **operands))

    def snapshot(self) -> object:
        """Return the machine's state."""
        return state_of(self.machine)


@dataclass(frozen=True)
class Row(Check[Any]):
    """A row that knows how it ends before it is asked: ``says``."""

    says: object = None


def check(
    step: int,
    name: str,
    violate: Callable[[Any], object],
    ends: object,
    hides: Iterable[str] = (),
) -> Row:
    """A row of checks for a leaf with one kind of target; ``ends`` may be a register's name."""

    def end(scene: Any) -> object:
        if ends in ("rbx", "rcx"):
            operands = getattr(scene, "operands", None)
            return Pf(operands[ends] if operands else scene.rcx)
        return Pf(scene.secs) if ends == "secs" else ends

    kinds, hidden = frozenset({"any"}), frozenset(hides)
    return Row(step, name, violate, end, kinds, hides=hidden, says=ends)


def rows(checks: Sequence[Row]) -> list[Any]:
    """Parameters for every check alone."""
    return [pytest.param(row, id=row.name) for row in checks]


def pairs(checks: Sequence[Row]) -> list[Any]:
    """Parameters for every two checks that end differently, the earlier first."""
    return sampled(
        pytest.param(first, later, id=f"{first.name}-before-{later.name}")
        for first, later in combinations(sorted(checks, key=lambda row: row.step), 2)
        if first.step < later.step and first.says != later.says and first.name not in later.hides
    )


def put(**values: Any) -> Callable[[Any], None]:
    """Set attributes of the scene; a dotted path is written with two underscores."""

    def violate(scene: Any) -> None:
        for path, value in values.items():
            *path_to, name = path.split("__")
            owner = scene
            for step in path_to:
                owner = getattr(owner, step)
            setattr(owner, name, value)

    return violate


def operand(register: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Replace an operand by a function of itself."""

    def violate(scene: Any) -> None:
        if isinstance(scene, CallScene):
            scene.operands[register] = change(scene.operands[register])
        else:
            setattr(scene, register, change(getattr(scene, register)))

    return violate


def memory(operand_name: str, addr: int) -> Callable[[Any], None]:
    """Give an operand in memory, at ``addr``."""

    def violate(scene: Any) -> None:
        scene.at[operand_name] = addr

    return violate
