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

from collections.abc import Callable
from typing import TYPE_CHECKING

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.vdso.stubs import replace_in_enclave
from softsgx.engines.native.x86.areas import Move
from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.vdso.state_code import StateSite
    from softsgx.engines.native.x86.state import StateInsn

__all__ = ["EnclaveSite", "StateJumps", "straighten"]

_ARITHMETIC = 0x8D5  # OF, SF, ZF, AF, PF, CF
_LOW_FLAGS, _OF, _OF_SHIFT = 0xD5, 0x800, 11


@dataclass(slots=True, frozen=True)
class EnclaveSite:
    """A site in an enclave.

    Attributes:
        code: its code.
        xfrm, enclave, area_bytes, moves, loading: as :meth:`StateSite.stub` takes them.
    """

    code: StateSite
    xfrm: int
    enclave: range
    area_bytes: int
    moves: tuple[Move, ...]
    loading: bool

    @property
    def start(self) -> int:
        """As :attr:`Site.start`."""
        return self.code.start

    @property
    def at(self) -> int:
        """As :attr:`Site.at`."""
        return self.code.at

    def stub(self, place: int) -> tuple[bytes, dict[str, int]]:
        """As :meth:`Site.stub`."""
        return self.code.stub(
            place, self.xfrm, self.enclave, self.area_bytes, self.moves, self.loading
        )


class StateJumps:
    """Stores the jumps.

    Args:
        usable: whether this run allows them, and the processor has the instructions they use.
        loading: whether it has those that load moved components.
        stop_others: stops all other threads of an address space that are inside an enclave.
    """

    def __init__(
        self, usable: bool, loading: bool, stop_others: Callable[[ProgramThread], None]
    ) -> None:
        self._usable, self._loading, self._stop_others = usable, loading, stop_others

    def stopped_at(self, thread: ProgramThread, insn: StateInsn) -> None:
        """A thread has stopped at an instruction, registers loaded: spare the next one that."""
        rip, page_table = thread.regs.rip, thread.image.page_table
        if not self._usable:
            return
        if page_table.read_only_code(rip, insn.length) is None:
            return

        def find(at: int) -> EnclaveSite | None:
            return _site(thread, at, insn.length, self._loading)

        replace_in_enclave(thread, rip, thread.image.state_stubs, find, self._stop_others)


def _site(thread: ProgramThread, at: int, length: int, loading: bool) -> EnclaveSite | None:
    from softsgx.engines.native.vdso.state_code import find_site

    page, offset = at & -PAGE_BYTES, at % PAGE_BYTES
    memory, inside = thread.image.page_table.memory_at(at), thread.cpu.inside
    assert inside is not None, "extended state of an enclave outside an enclave"
    assert memory is not None, "an instruction of an enclave outside an enclave"
    code = find_site(memory.own_code(page, offset + length), offset, page)
    enclave, moves = inside.enclave, thread.areas.moves
    if code is None or not code.can_have_stub(enclave.xfrm, moves):
        return None
    addresses = range(enclave.base, enclave.base + enclave.size)
    area_bytes = thread.cpu.hw.config.xsave_bytes(enclave.xfrm)
    return EnclaveSite(code, enclave.xfrm, addresses, area_bytes, moves, loading)


def straighten(thread: ProgramThread) -> None:
    """Move a stopped thread out of a stub, if it is in one.

    Raises:
        Gone: it has died meanwhile.
    """
    image, regs = thread.image, thread.load()
    found = image.state_stubs.find(regs.rip)
    if found is None:
        return
    stub, at = found
    site, labels = stub.site.code, stub.labels
    _restore_flags(thread, at, labels)
    if not at:  # also when it steps: it has executed one instruction
        regs.rip = site.start + site.first
        if site.loads_rax:
            regs.rax = site.rax
        else:
            regs.rdx = site.rdx
    elif at < len(site.before):  # the copy has changed registers and flags as the code would
        regs.rip = site.start + at
    else:
        regs.rip = site.behind if site.executed(labels, at) else site.at
        regs.rax, regs.rdx = site.rax, site.rdx
    thread.store()


#: Behind which label and up to which one flags are in AX; at the latter overflow is back.
_KEPT = (("kept", "added"), ("kept_again", "added_again"), ("kept_loading", "added_loading"))
#: The same, from the first label on.
_BROUGHT = (("refuse", "refuse_added"), ("loads", "added_loads"))


def _restore_flags(thread: ProgramThread, at: int, labels: dict[str, int]) -> None:
    """Give a thread at offset ``at`` of a stub its own flags, which may be in AX."""
    regs = thread.regs
    for pairs, first in ((_KEPT, 1), (_BROUGHT, 0)):
        for start, added in pairs:
            if start in labels and labels[start] + first <= at <= labels[added]:
                kept = regs.rax >> 8 & _LOW_FLAGS | (regs.rax & 1) << _OF_SHIFT
                changed = _ARITHMETIC if at < labels[added] else _ARITHMETIC & ~_OF
                regs.rflags = regs.rflags & ~changed | kept & changed
