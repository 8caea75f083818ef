"""Permits: entering an enclave again without a stop.

When a thread has entered an enclave through our vDSO and left it with EEXIT, and nothing else has
happened since, the same EENTER would succeed again, with the same outcome.  A permit says so to
the vDSO, in a page that the program shares with us: the vDSO of a thread that finds one for its TCS
stores RSP and RBP in the SSA frame and loads FS, GS, RAX, RCX and RIP, as EENTER does, notes that
the permit was used, and is inside.  At the thread's next stop, whatever the reason, the EENTER is
done in the machine, with the registers of then, before anything else is; to the machine it has
happened now.  That is half the stops of a call.

A permit is given only while the program has one thread, so that nothing of ours can run between its
use and that stop; and it ends with every stop, and when one of the pages that EENTER needs leaves.
A stop at which an instruction of enclave code is executed in another way, and nothing else is done,
does not keep the EEXIT that follows from giving a permit.

What the frame holds as URSP and URBP at that stop is what EENTER stores there: what the vDSO has
stored, or the enclave since, which may move the stack of its host.

Source:
    SDM vol. 3D, "EENTER", Operation, for what the vDSO must store and load.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from softsgx.arch import GprSgx
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.vdso.code import PERMIT
from softsgx.engines.native.vdso.shared_page import SharedPage
from softsgx.hw import EpcPage, Registers
from softsgx.hw.entry import GPR_OFFSET

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["Permits"]

_WORD_BYTES = 8
_TCS, _ENTRY, _CSSA, _FS, _GS, _URSP, _USED, _OUT_FS, _OUT_GS = (
    PERMIT[name] // _WORD_BYTES
    for name in (
        *("tcs", "entry", "cssa", "fs", "gs", "ursp"),
        *("used", "outside_fs", "outside_gs"),
    )
)
_URSP_OFFSET = GPR_OFFSET + GprSgx.OFFSETS["ursp"]
_PAIR = struct.Struct("<QQ")  # URSP, URBP
_RFLAGS = 0x202  # nothing of the flags goes in but TF, and with TF set every instruction stops


@dataclass(slots=True)
class _Entry:
    """An EENTER that succeeded: who, what, and the outcome.

    Attributes:
        gpr: the page that has GPRSGX of the frame.
        needs: the addresses of the pages without which it would fault.
    """

    thread: ProgramThread
    page: SharedPage
    gpr: EpcPage
    needs: tuple[int, ...]
    tcs: int
    rip: int
    cssa: int
    fs_base: int
    gs_base: int


class Permits:
    """See the module.

    Args:
        allowed: returns whether the program has one thread, and the vDSO can do it on this machine.
    """

    def __init__(self, allowed: Callable[[], bool]) -> None:
        self._allowed = allowed
        self._entry: _Entry | None = None  # the last, if it would succeed again once it has ended
        self._fresh = False  # nothing was done since the entry, or since the permit
        self._given = False
        self._scratch = NativeRegisters()
        self._then = cast(Registers, self._scratch)  # what the machine sees of them

    def entered(self, thread: ProgramThread, tcs: int) -> None:
        """EENTER of ``tcs`` from our vDSO has succeeded; the thread has its new registers."""
        page = thread.image.page
        # A tracer of events must see an entry when it happens.
        if page is None or thread.cpu.hw.tracer is not None or not self._allowed():
            return
        regs, inside = thread.regs, thread.cpu.inside
        assert inside is not None, "the thread is in no enclave after EENTER"
        frame = inside.frame
        needs = tcs, frame.gpr.linaddr, *(part.linaddr for part in frame.xsave)
        outcome = regs.rip, regs.rax, regs.fs_base, regs.gs_base
        self._entry = _Entry(thread, page, frame.gpr, needs, tcs, *outcome)
        self._fresh = True

    def left(self, thread: ProgramThread) -> None:
        """EEXIT has succeeded: give a permit if nothing was done since the entry."""
        entry = self._entry
        if entry is None or entry.thread is not thread:
            return
        words = entry.page.words
        words[_ENTRY], words[_CSSA] = entry.rip, entry.cssa
        words[_FS], words[_GS] = entry.fs_base, entry.gs_base
        words[_URSP], words[_USED] = entry.gpr.linaddr + _URSP_OFFSET, 0
        words[_TCS] = entry.tcs
        self._given = self._fresh = True

    def outlast(self, thread: ProgramThread) -> None:
        """The stop at hand is over, and has changed nothing that the entry depends on."""
        if self._entry is not None and self._entry.thread is thread:
            self._fresh = True

    def going(self) -> None:
        """The program is about to go on: forget the entry if a page it needs has left meanwhile."""
        entry = self._entry
        if entry is None or not self._fresh:
            return
        page_table = entry.thread.image.page_table
        if any(page_table.entry(needed) is None for needed in entry.needs):
            entry.page.words[_TCS] = 0
            self._given, self._entry = False, None

    def stopped(self, thread: ProgramThread) -> None:
        """A thread has stopped: call this before anything else is done about it.

        Raises:
            Gone: it has died meanwhile.
        """
        entry = self._entry
        if entry is None:
            return
        if not self._fresh:
            self._entry = None
            return
        self._fresh = False
        if not self._given:
            return
        regs, image = thread.load(), entry.thread.image
        place = regs.rip - image.vdso_base
        if self._take(entry):
            if image.vdso.permitted <= place < image.vdso.permit_end:
                # It is about to load what EENTER has given it in the machine.
                regs.rip, regs.rax = entry.rip, entry.cssa
                regs.rcx = image.vdso_base + image.vdso.eenter_after
                regs.fs_base, regs.gs_base = entry.fs_base, entry.gs_base
                thread.store()
            return
        self._entry = None
        if image.vdso.permit <= place < image.vdso.permitted:
            # It may have seen the permit that is no more.
            regs.rip = image.vdso_base + image.vdso.permit
            thread.store()

    def ended(self, thread: ProgramThread) -> None:
        """A thread is gone, wherever it was."""
        entry, self._entry = self._entry, None
        if entry is not None and entry.thread is thread and self._given:
            self._take(entry)

    def _take(self, entry: _Entry) -> bool:
        """End the permit; if it was used, do its EENTER and return ``True``."""
        words = entry.page.words
        self._given, words[_TCS] = False, 0
        if not words[_USED]:
            return False
        thread, regs = entry.thread, self._scratch
        image, cpu = thread.image, thread.cpu
        regs.rip = image.eenter
        regs.rsp, regs.rbp = _PAIR.unpack(cpu.hw.store.read(entry.gpr, _URSP_OFFSET, _PAIR.size))
        regs.rflags = _RFLAGS
        regs.fs_base, regs.gs_base = words[_OUT_FS], words[_OUT_GS]
        real = cpu.regs
        regs.xcr0 = real.xcr0
        cpu.regs = self._then
        try:
            cpu.enclu.eenter(entry.tcs, image.aep)
        finally:
            cpu.regs = real
        real.xcr0 = regs.xcr0
        outcome = regs.rip, regs.rax, regs.fs_base, regs.gs_base
        assert outcome == (entry.rip, entry.cssa, entry.fs_base, entry.gs_base), (
            f"an entry by permit at {entry.tcs:#x} is not as the one before"
        )
        return True
