"""Permits: entering and leaving enclaves without a stop.

When a thread has entered an enclave through our vDSO, and the machine has since executed nothing
but entries and exits, the same EENTER would succeed again with the same outcome.  EEXIT of a thread
inside always succeeds.  The supervisor writes these outcomes to the slot of the TCS and opens its
gate (``vdso/permit_code.py``).  From then on our vDSO does the EENTER.  A jump in place of the
enclave's ``mov eax, 4`` leads to a stub that does the EEXIT.  Neither stops the thread.

The machine does not see these crossings when they happen.  Permits *report* them to the machine
before anything else depends on them: they close the gates, count all crossings, and execute the
leaves for the last exit and the last entry of each TCS, with the registers of that time.

- :meth:`Permits.settle` reports all of them.  The loop calls it before it handles a stop, except a
  stop that only crosses, and before background tasks run.  So eviction, tracking cycles, ioctls and
  faults find every thread where it is.  Whatever they change may change the outcome of EENTER, so
  all permits end but EEXIT of threads that are inside.
- A stop that only crosses closes only the gates of its thread and its TCS.

The supervisor moves a thread that is stopped in the middle of a crossing to its start or its end
(:mod:`.crossing`).

A reported EENTER stores to URSP and URBP of the frame what the frame already holds: the values that
the vDSO stored, or that the enclave stored since, which may move the stack of its host.

Source:
    SDM vol. 3D, "EENTER" and "EEXIT", Operation.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, cast

from softsgx.engines.native.tracing.fault_fields import UnseenCrossings
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.vdso.permit_code import BUSY, IN, TAIL_BYTES
from softsgx.engines.native.vdso.permit_table import Entry, make_table
from softsgx.engines.native.vdso.stubs import replace_in_enclave
from softsgx.hw import Registers
from softsgx.hw.processor import EnclaveMode

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.vdso.permit_table import Gate, Slot

__all__ = ["Permits"]

_PAIR = struct.Struct("<QQ")  # URSP, URBP
_RFLAGS = 0x202  # EENTER uses no flag but TF, and with TF set every instruction stops


class Permits(UnseenCrossings):
    """See the module.

    Args:
        usable: whether this run allows permits, and the processor has the instructions they use.
        hold: stops a running thread; returns whether it is stopped and alive.
        failed: ends the processes of an address space because of an exception.
    """

    def __init__(
        self,
        usable: bool,
        hold: Callable[[ProgramThread], bool],
        failed: Callable[[ProcessImage, Exception], None],
    ) -> None:
        self._usable, self._hold, self._failed = usable, hold, failed
        self._open = set()
        self._recorded = set()  # slots with an outcome of EENTER
        # Open gates of threads that are stopped inside and have not crossed since they were opened.
        self._unused = {}
        self._exited = None  # by the EEXIT of the current stop
        self._scratch = NativeRegisters()
        self._then = cast(Registers, self._scratch)  # as the machine types them

    # --- crossings that stop --------------------------------------------------------------------

    def entering(self, tcs: int) -> None:
        """A thread that has stopped is about to enter by a TCS."""
        if self._open:
            self._report([slot for slot in self._open if slot.tcs == tcs])

    def entered(self, thread: ProgramThread, enclu: int | None = None) -> None:
        """EENTER has succeeded; the thread has its new registers.

        Args:
            thread: see there.
            enclu: address of the host's own ENCLU; ``None``: it was an EENTER of our vDSO.
        """
        inside, regs, image = thread.cpu.inside, thread.regs, thread.image
        assert inside is not None, "the thread is in no enclave after EENTER"
        if image.permits is None or not self._has_permits(thread) or inside.outside.tf != 0:
            return
        if enclu is not None:
            from softsgx.engines.native.vdso.host_jumps import replace_in_host

            replace_in_host(thread, enclu)
        slot = self._slot(thread, inside)
        if slot is not None:
            if enclu is not None and not slot.word("tail"):
                from softsgx.engines.native.vdso.entry_code import tail

                place = image.vdso_base + image.vdso.tails + TAIL_BYTES * slot.number
                os.pwrite(image.memory_fd, tail(slot.address), place)
                slot.set("tail", place)
            gpr = inside.frame.gpr
            outcome = regs.rip, regs.rax, regs.fs_base, regs.gs_base
            slot.entry = Entry(gpr, gpr.linaddr + _ursp_offset(), *outcome)
            self._recorded.add(slot)

    def left(self, thread: ProgramThread, inside: EnclaveMode, enclu: int) -> None:
        """The EEXIT at ``enclu`` has stopped, has succeeded, and has ended ``inside``."""
        if not self._has_permits(thread):
            return
        image = thread.image
        if image.permits is None:
            if image.has_room_for_permits:
                image.permits = make_table(thread, image)
                image.has_room_for_permits = image.permits is not None
            return
        from softsgx.engines.native.vdso.crossing_sites import find_exit

        find = partial(find_exit, image)
        replace_in_enclave(thread, enclu, image.exit_stubs, find, self.stop_others)
        slot = image.permits.slot(inside.tcs_linaddr)
        if slot is not None and slot.entry is not None:
            self._exited = thread, slot

    def going(self, thread: ProgramThread) -> None:
        """A thread is about to run code of the program: open its gate."""
        table, inside = thread.image.permits, thread.cpu.inside
        if table is None or not self._has_permits(thread):
            return
        unused = self._unused.pop(thread, None)
        if unused is not None:
            if unused.stay is inside and thread.blocked is None:
                return  # the gate is still valid
            self._report([unused])
        if inside is None:
            exited, self._exited = self._exited, None
            if exited is None or exited[0] is not thread:
                return
            slot: Slot | None = exited[1]
            assert slot is not None, "EEXIT by a TCS without a slot"
            slot.open_out()
        else:
            slot, outside = self._slot(thread, inside), inside.outside
            if slot is None or slot.memory is None or not slot.memory.jumps:
                return  # EEXIT stops in any case
            if outside.tf != 0 or thread.blocked is not None:
                return  # EEXIT has to restore state that a stub cannot restore
            aep = int.from_bytes(thread.cpu.hw.store.read(inside.tcs, _aep_offset(), 8), "little")
            slot.open_in(thread, thread.own_tid, aep, outside.fs_base, outside.gs_base)
        table.set_alone(thread.own_tid if len(thread.image.threads) == 1 else 0)
        self._open.add(slot)

    def has_slot(self, thread: ProgramThread, inside: EnclaveMode) -> bool:
        """Return whether :meth:`going` does not need the registers of a thread inside."""
        table = thread.image.permits
        return table is None or table.slot(inside.tcs_linaddr) is not None

    def _has_permits(self, thread: ProgramThread) -> bool:
        """Whether there are permits; a tracer receives each crossing when it happens."""
        return self._usable and thread.cpu.hw.tracer is None

    def _slot(self, thread: ProgramThread, inside: EnclaveMode) -> Slot | None:
        """Return the slot of the TCS that a thread has entered by; ``None``: all are in use."""
        image, tcs = thread.image, inside.tcs_linaddr
        assert image.permits is not None, "a slot without a table of permits"
        slot = image.permits.slot(tcs)
        if slot is None:
            slot = image.permits.give_slot(tcs, thread.load().gs_base)
        if slot is not None and slot.enclave is not inside.enclave:
            slot.belongs_to(inside.enclave, image.page_table.memory_at(tcs))
        return slot

    def stop_others(self, thread: ProgramThread) -> None:
        """Stop all other threads of its address space that are inside an enclave."""
        self.settle()
        for other in list(thread.image.threads.values()):
            if other is not thread and other.cpu.inside is not None:
                self._hold(other)

    # --- reporting to the machine ----------------------------------------------------------------

    def stopped(self, thread: ProgramThread) -> None:
        """A thread has stopped: :meth:`report`, and move it out of a crossing that it is in.

        Raises:
            Gone: the thread has died.
        """
        self.report(thread)
        if thread.image.permits_at:
            from softsgx.engines.native.vdso.crossing import straighten

            straighten(thread)

    def report(self, thread: ProgramThread) -> None:
        """A thread has stopped: report its crossings, before the stop is handled.

        If it is inside then, and its stop is a fault on enclave memory, it is in no crossing: the
        code of crossings touches enclave memory only in EENTER, while the thread is outside.
        """
        self._exited = None
        if self._open:
            inside = thread.cpu.inside
            table = thread.image.permits
            slot = None if inside is None or table is None else table.slot(inside.tcs_linaddr)
            if slot is not None and slot in self._open and slot.has_only(thread):
                self._unused[thread] = slot
            else:
                self._report(self._slots_of(thread), thread)

    def settle(self) -> None:
        """Report all crossings, and end permits: the next operation may change what EENTER does."""
        unused = self._unused.values()
        if len(self._open) > len(unused):
            self._report([slot for slot in self._open if slot not in unused])
        for slot in unused:
            slot.close_behind()
        if self._recorded:
            for slot in self._recorded:
                slot.entry = None
            self._recorded.clear()
        self._exited = None

    def ended(self, thread: ProgramThread) -> None:
        """A thread has ended, inside or outside."""
        self.settle()
        unused = self._unused.pop(thread, None)
        if unused is not None:
            self._report([unused])
        table = thread.image.permits
        if table is not None:
            table.forget(thread)

    def _slots_of(self, thread: ProgramThread) -> list[Slot]:
        """Return the open slots by which a thread has crossed, or may be inside."""
        table = thread.image.permits
        return [
            slot
            for slot in self._open
            if slot.inside is thread
            or (slot.table is table and slot.peek().thread == thread.own_tid)
        ]

    def _report(self, slots: Iterable[Slot], at_hand: ProgramThread | None = None) -> None:
        """Close gates and report their crossings; include all other slots of their threads.

        Args:
            slots: the slots to close.
            at_hand: a stopped thread, which the caller moves out of its crossing.
        """
        closed: list[tuple[Slot, Gate, ProgramThread | None]] = []
        rest = list(slots)
        while rest:
            slot = rest.pop()
            if slot not in self._open:
                continue
            self._open.discard(slot)
            if slot.inside is not None and self._unused.get(slot.inside) is slot:
                del self._unused[slot.inside]
            gate = slot.close()
            owner = slot.table.thread(gate.thread) if gate.thread else None
            closed.append((slot, gate, owner))
            for thread in {slot.inside, owner} - {None, at_hand}:
                assert thread is not None, "a set without None has it"
                rest += self._slots_of(thread)
        # The program can write to its slots: an impossible report ends its own processes only.
        unreported: dict[Slot, int] = {}
        failures: dict[Slot, Exception] = {}
        for slot, gate, _owner in closed:
            try:
                unreported[slot] = self._report_exit(slot, gate)
            except Exception as error:
                failures[slot] = error
        for slot, gate, owner in closed:
            try:
                if slot in unreported:
                    self._report_entry(slot, gate, owner, unreported[slot])
            except Exception as error:
                failures[slot] = error
        for _slot, gate, owner in closed:
            if gate.state == BUSY and owner is not None and owner is not at_hand:
                self._hold(owner)  # it must not write to the slot once another thread has it
        for slot, failure in failures.items():
            image = slot.table.image()
            if image is not None:  # otherwise its processes have ended
                self._failed(image, failure)

    def _report_exit(self, slot: Slot, gate: Gate) -> int:
        """Execute the EEXIT that came first, if any; return how many crossings remain."""
        thread = slot.inside
        if thread is None or not gate.crossings:
            return 0 if thread is not None else gate.crossings
        cpu, regs = thread.cpu, self._scratch
        regs.rip = regs.rax = regs.rflags = 0
        real = cpu.regs
        cpu.regs = self._then
        try:
            cpu.enclu.eexit(0)
        finally:
            cpu.regs = real
        real.xcr0 = regs.xcr0
        slot.inside = None
        return gate.crossings - 1

    def _report_entry(
        self, slot: Slot, gate: Gate, owner: ProgramThread | None, crossings: int
    ) -> None:
        """Count the later crossings; execute the last EENTER if no EEXIT has followed it."""
        enclave = slot.enclave
        assert enclave is not None, "a gate was open for no enclave"
        pairs = crossings // 2
        enclave.crossings.eenter += pairs
        enclave.crossings.eexit += pairs
        if not crossings & 1:
            assert gate.state != IN or slot.inside is not None, f"no entry by {slot.tcs:#x}, but IN"
            return
        assert gate.state == IN and owner is not None, f"an entry by {slot.tcs:#x} of no thread"
        entry, cpu, regs = slot.entry, owner.cpu, self._scratch
        assert entry is not None, f"an entry by {slot.tcs:#x} that was not permitted"
        regs.rip = owner.image.eenter
        regs.rsp, regs.rbp = _PAIR.unpack(cpu.hw.store.read(entry.gpr, _ursp_offset(), _PAIR.size))
        regs.rflags = _RFLAGS
        regs.fs_base, regs.gs_base = slot.word("outside_fs"), slot.word("outside_gs")
        real = cpu.regs
        regs.xcr0 = real.xcr0
        cpu.regs = self._then
        try:
            cpu.enclu.eenter(slot.tcs, slot.word("aep"))
        finally:
            cpu.regs = real
        real.xcr0 = regs.xcr0
        outcome = regs.rip, regs.rax, regs.fs_base, regs.gs_base
        assert outcome == (entry.rip, entry.cssa, entry.fs_base, entry.gs_base), (
            f"an entry by permit at {slot.tcs:#x} is not as the one before"
        )


@cache
def _ursp_offset() -> int:
    """Return where URSP and URBP are in the page that has a frame's registers."""
    from softsgx.arch import GprSgx
    from softsgx.hw.entry import GPR_OFFSET

    return GPR_OFFSET + GprSgx.OFFSETS["ursp"]


@cache
def _aep_offset() -> int:
    """Return where AEP is in a TCS."""
    from softsgx.arch import Tcs

    return Tcs.OFFSETS["aep"]
