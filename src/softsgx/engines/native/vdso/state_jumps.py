"""Instructions on extended state of enclave code, executed without a stop.

Where XFRM is not this machine's XCR0, XSAVE and its like are UD2 in the code that is shown
(:mod:`softsgx.engines.native.faults.extended`).  When a thread has stopped at one, and constants
are loaded into EAX and EDX in front of it, the first load becomes a jump to a *stub* behind our
vDSO (``vdso/state_code.py``).  No other instruction is changed: code that jumps to the second load,
or to the instruction, executes that, and stops as before.

A thread that is stopped in a stub is moved to where it would be in the enclave: in front of the
instruction or behind it, or behind the first load if it has only jumped.

Source:
    SDM vol. 3D, EENTER: "XCR0 := SECS.ATTRIBUTES.XFRM".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.vdso.state_code import (
    MOST_STATE_STUBS,
    STATE_STUB_BYTES,
    StateSite,
    find_site,
)
from softsgx.engines.native.x86.state import StateInsn
from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["StateJumps", "StateStub", "straighten"]

_JUMP_BYTES = 5
_ARITHMETIC = 0x8D5  # OF, SF, ZF, AF, PF, CF
_LOW_FLAGS, _OF, _OF_SHIFT = 0xD5, 0x800, 11


@dataclass(slots=True, frozen=True)
class StateStub:
    """A stub of an address space.

    Attributes:
        site: what it stands for.
        xfrm, enclave: of the enclave.
        labels: as :meth:`StateSite.stub` returns them.
    """

    site: StateSite
    xfrm: int
    enclave: range
    labels: dict[str, int]


class StateJumps:
    """Stores the jumps.

    Args:
        usable: whether this run allows them, and the processor has the instructions they use.
        stop_others: stops all other threads of an address space that are inside an enclave.
    """

    def __init__(self, usable: bool, stop_others: Callable[[ProgramThread], None]) -> None:
        self._usable, self._stop_others = usable, stop_others

    def stopped_at(self, thread: ProgramThread, insn: StateInsn) -> None:
        """A thread has stopped at an instruction, registers loaded: spare the next one that."""
        image, rip = thread.image, thread.regs.rip
        if not self._usable or not thread.areas.same or rip in image.plain_states:
            return
        memory = image.page_table.read_only_code(rip, insn.length)
        if memory is None:
            return
        page, offset = rip & -PAGE_BYTES, rip % PAGE_BYTES
        site = find_site(memory.own_code(page, offset + insn.length), offset, page)
        stubs, inside = image.state_stubs, thread.cpu.inside
        assert inside is not None, "extended state of an enclave outside an enclave"
        if site is not None and site.start in memory.jumps:
            return
        enclave = inside.enclave
        addresses = range(enclave.base, enclave.base + enclave.size)
        known = (
            n
            for n, s in enumerate(stubs)
            if (s.site, s.xfrm, s.enclave) == (site, enclave.xfrm, addresses)
        )
        number = next(known, len(stubs))
        place = image.vdso_base + image.vdso.state + STATE_STUB_BYTES * number
        if site is None or number == MOST_STATE_STUBS or abs(place - rip) >> 30:
            image.plain_states.add(rip)
            return
        if memory.users != [image.page_table]:
            return  # a process with another vDSO may map it; a fork child would have the same one
        self._stop_others(thread)
        if number == len(stubs):
            area_bytes = thread.cpu.hw.config.xsave_bytes(enclave.xfrm)
            code, labels = site.stub(place, enclave.xfrm, addresses, area_bytes)
            os.pwrite(image.memory_fd, code, place)
            stubs.append(StateStub(site, enclave.xfrm, addresses, labels))
        distance = place - (site.start + _JUMP_BYTES)
        memory.jump_at(site.start, b"\xe9" + distance.to_bytes(4, "little", signed=True))


def straighten(thread: ProgramThread) -> None:
    """Move a stopped thread out of a stub, if it is in one.

    Raises:
        Gone: it has died meanwhile.
    """
    image, regs = thread.image, thread.load()
    number, at = divmod(regs.rip - (image.vdso_base + image.vdso.state), STATE_STUB_BYTES)
    if not 0 <= number < len(image.state_stubs):
        return
    stub = image.state_stubs[number]
    site, labels = stub.site, stub.labels
    _restore_flags(thread, at, labels)
    if not at:  # also when it steps: it has executed one instruction
        regs.rip = site.start + site.first
        if site.loads_rax:
            regs.rax = site.rax
        else:
            regs.rdx = site.rdx
    else:
        regs.rip = site.behind if site.executed(labels, at) else site.at
        regs.rax, regs.rdx = site.rax, site.rdx
    thread.store()


def _restore_flags(thread: ProgramThread, at: int, labels: dict[str, int]) -> None:
    """Give a thread at offset ``at`` of a stub its own flags, which may be in AX."""
    regs, whole = thread.regs, False
    if labels["kept"] < at <= labels["added"]:
        whole = at < labels["added"]
    elif labels["refuse"] <= at <= labels["refuse_added"]:
        whole = at == labels["refuse"]
    else:
        return
    kept = regs.rax >> 8 & _LOW_FLAGS | (regs.rax & 1) << _OF_SHIFT
    changed = _ARITHMETIC if whole else _ARITHMETIC & ~_OF
    regs.rflags = regs.rflags & ~changed | kept & changed
