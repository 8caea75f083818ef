"""The table of permits of one address space, as the supervisor reads and writes it.

The table is mapped below 2 GiB in the program, so that code can address it without a free register.
A slot belongs to one TCS as long as the address space exists.

Source:
    ``vdso/permit_code.py`` for the layout and its readers.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from softsgx import compiled
from softsgx.engines.native import abi, libc
from softsgx.engines.native.vdso.permit_code import (
    ALONE_AT,
    CLOSED,
    CROSSING,
    EXITS_AT,
    IN,
    OUT,
    SLOT,
    SLOT_BYTES,
    SLOTS,
    SLOTS_AT,
    STATE_MASK,
    TABLE_BYTES,
    THREAD_MASK,
    THREAD_SHIFT,
    hashed,
)
from softsgx.hw import EpcPage
from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.engines.native.memory.memory_file import EnclaveMemory
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.tracing.tracee import Thread
    from softsgx.hw.processor import EnclaveMode
    from softsgx.hw.secs import ResidentSecs

__all__ = [
    "CLOSED_BEHIND",
    "EXITED_WORD",
    "Entry",
    "Gate",
    "PermitTable",
    "Slot",
    "make_table",
    "reserve_table",
]

CLOSED_BEHIND = CROSSING + CLOSED
"""What EEXIT adds to a gate behind which no crossing is permitted."""

EXITED_WORD = (SLOT["exited"] - SLOT["gate"]) // 8
"""The place of that quadword, from the gate of its slot."""

_WORD_BYTES = 8
_MIDDLE = -SLOT["gate"]
_WORDS = {name: offset // _WORD_BYTES for name, offset in SLOT.items()}
_NAME = b"softsgx\0"
_MEMFD_FLAGS = abi.MFD_CLOEXEC | abi.MFD_ALLOW_SEALING
_SEALS = abi.F_SEAL_SEAL | abi.F_SEAL_SHRINK | abi.F_SEAL_GROW


@dataclass(slots=True, frozen=True)
class Entry:
    """The outcome of an EENTER that has succeeded and would succeed again.

    Attributes:
        gpr: the page that holds GPRSGX of the frame.
        ursp: the address of URSP in it.
        rip, cssa, fs_base, gs_base: values that EENTER has given the thread.
    """

    gpr: EpcPage
    ursp: int
    rip: int
    cssa: int
    fs_base: int
    gs_base: int


@dataclass(slots=True, frozen=True)
class Gate:
    """The value of a gate when the supervisor closed it.

    Attributes:
        state: OUT, BUSY, IN, or CLOSED.
        thread: the id of its thread, 0 for none.
        crossings: number of crossings since the gate was opened.
    """

    state: int
    thread: int
    crossings: int

    @classmethod
    def unpack(cls, word: int) -> Gate:
        """Decode the quadword of a gate."""
        return cls(
            min(word & STATE_MASK, CLOSED), word >> THREAD_SHIFT & THREAD_MASK, word // CROSSING
        )


class Slot:
    """The slot of one TCS.

    Attributes:
        table: the table that it is in.
        number: its place in the table.
        address: its address in the program, which pointers to it hold.
        gate_at: address of its gate in the supervisor.
        tcs: the address of the TCS.
        entry: the outcome of EENTER; ``None`` when the next EENTER must stop.
        opened: the value of the gate when it was opened for a thread inside.
        inside: the thread that was inside by this TCS when the gate was opened; ``None`` once the
            machine has its EEXIT.
        stay: that thread's enclave mode.
        enclave: the enclave of the TCS when the gate was opened.
        memory: its memory file.
    """

    __slots__ = (
        *("_at", "_words", "address", "enclave", "entry", "gate_at", "inside", "memory"),
        *("number", "opened", "stay", "table", "tcs"),
    )

    def __init__(self, table: PermitTable, number: int, tcs: int) -> None:
        self.table, self.number, self.tcs = table, number, tcs
        offset = SLOTS_AT + number * SLOT_BYTES + _MIDDLE
        self._words, self._at = table.words, offset // _WORD_BYTES
        self.gate_at = table.mapped_at + offset + SLOT["gate"]
        self.address = table.address + offset
        self.entry: Entry | None = None
        self.inside: ProgramThread | None = None
        self.stay: EnclaveMode | None = None
        self.opened = CLOSED
        self.enclave: ResidentSecs | None = None
        self.memory: EnclaveMemory | None = None

    def word(self, name: str) -> int:
        """Return a quadword of the slot."""
        return self._words[self._at + _WORDS[name]]

    def set(self, name: str, value: int) -> None:
        """Replace a quadword of the slot."""
        self._words[self._at + _WORDS[name]] = value

    def peek(self) -> Gate:
        """Return the value of the gate; threads may change it at any time."""
        return Gate.unpack(self.word("gate"))

    def belongs_to(self, enclave: ResidentSecs, memory: EnclaveMemory | None) -> None:
        """Record the enclave that the TCS belongs to now."""
        self.enclave, self.memory = enclave, memory

    def open_out(self) -> None:
        """Permit EENTER with the outcome of :attr:`entry`, and the crossings after it."""
        self.inside = self.stay = None
        self._put_entry()
        self.set("gate", OUT)

    def open_in(self, thread: ProgramThread, own_tid: int, aep: int, fs: int, gs: int) -> None:
        """Permit EEXIT to a thread inside, and with :attr:`entry` the crossings after it.

        Args:
            thread: the thread.
            own_tid: its id in its own PID namespace.
            aep: RCX after EEXIT.
            fs: FS base of the outside.
            gs: GS base of the outside.
        """
        self.inside, self.stay = thread, thread.cpu.inside
        if self.entry is None:
            self.close_behind()
        else:
            self._put_entry()
        self.set("aep", aep)
        self.set("outside_fs", fs)
        self.set("outside_gs", gs)
        self.opened = own_tid << THREAD_SHIFT | IN
        self.set("gate", self.opened)

    def close_behind(self) -> None:
        """Permit no crossing after the next EEXIT."""
        self.set("exited", CLOSED_BEHIND)

    def has_only(self, thread: ProgramThread) -> bool:
        """Return whether ``thread`` has been inside ever since the gate was opened.

        Only it can use the gate then.
        """
        return self.inside is thread and self.word("gate") == self.opened

    def _put_entry(self) -> None:
        entry = self.entry
        assert entry is not None, "EENTER is permitted without an outcome"
        self.set("entry", entry.rip)
        self.set("cssa", entry.cssa)
        self.set("fs", entry.fs_base)
        self.set("gs", entry.gs_base)
        self.set("ursp", entry.ursp)
        self.set("exited", CROSSING + OUT)

    def close(self) -> Gate:
        """Close the gate; return its value at that moment."""
        return Gate.unpack(_exchange()(self.gate_at, CLOSED))


class PermitTable:
    """See the module.

    Args:
        fd: a memory file of the table, which the constructor closes.  It allows sealing: no process
            can change its size afterwards.
        address: its address in the program.
        threads: the threads of the address space, by id.

    Attributes:
        words: its quadwords.
        mapped_at: its address in the supervisor.
    """

    __slots__ = (
        *("_anchor", "_by_own_tid", "_memory", "_slots", "_threads", "address", "mapped_at"),
        "words",
    )

    def __init__(self, fd: int, address: int, threads: Mapping[int, ProgramThread]) -> None:
        try:
            os.ftruncate(fd, TABLE_BYTES)
            fcntl.fcntl(fd, abi.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(fd, TABLE_BYTES)
        finally:
            os.close(fd)
        self.address, self._threads = address, threads
        self.words = memoryview(self._memory).cast("Q")
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self.mapped_at = ctypes.addressof(self._anchor)
        self._by_own_tid: dict[int, ProgramThread] = {}
        self._slots: dict[int, Slot] = {}

    def slot(self, tcs: int) -> Slot | None:
        """Return the slot of a TCS, if it has one."""
        return self._slots.get(tcs)

    def give_slot(self, tcs: int, gs: int) -> Slot | None:
        """Return the slot of a TCS whose thread has GS base ``gs``; ``None``: all are in use.

        The supervisor never replaces a pointer, since running threads use it: of TCSs with the same
        hash, the first gets the entry of the list.
        """
        slot, words = self._slots.get(tcs), self.words
        if slot is None:
            if len(self._slots) == SLOTS or words[hashed(tcs)]:
                return None
            slot = self._slots[tcs] = Slot(self, len(self._slots), tcs)
            slot.set("tcs", tcs)
            slot.set("gate", CLOSED)
            words[hashed(tcs)] = slot.address
        at = EXITS_AT // _WORD_BYTES + hashed(gs)
        words[at] = words[at] or slot.address
        return slot

    def slot_at(self, pointer: int) -> Slot:
        """Return the slot at an address of the program."""
        for slot in self._slots.values():
            if slot.address == pointer:
                return slot
        raise AssertionError(f"no slot of permits is at {pointer:#x}")

    def slot_of_tcs(self, tcs: int) -> Slot:
        """Return the slot that an EENTER of the host finds for this operand."""
        return self.slot_at(self.words[hashed(tcs)])

    def slot_of_gs(self, gs: int) -> Slot:
        """Return the slot that an EEXIT with this GS base finds."""
        return self.slot_at(self.words[EXITS_AT // _WORD_BYTES + hashed(gs)])

    def thread(self, own_tid: int) -> ProgramThread | None:
        """Return the thread with this id in its own PID namespace."""
        known = self._by_own_tid.get(own_tid)
        if known is None:
            for thread in self._threads.values():
                if thread.own_tid == own_tid:
                    known = self._by_own_tid[own_tid] = thread
        return known

    def image(self) -> ProcessImage | None:
        """Return the address space; ``None``: it has no thread any more."""
        return next((thread.image for thread in self._threads.values()), None)

    def forget(self, thread: ProgramThread) -> None:
        """Drop the id of a thread that has ended."""
        self._by_own_tid = {
            own_tid: each for own_tid, each in self._by_own_tid.items() if each is not thread
        }

    def set_alone(self, own_tid: int) -> None:
        """Store the id of the only thread of the address space; 0: there are several."""
        self.words[ALONE_AT // _WORD_BYTES] = own_tid

    def close(self) -> None:
        """Unmap the table; the address space has been released."""
        self.words.release()
        del self._anchor
        self._memory.close()


def make_table(thread: Thread, image: ProcessImage) -> PermitTable | None:
    """Map a new table into the address space of a stopped thread; ``None``: it has no room.

    Raises:
        Gone: the thread has died.
    """
    vdso, base, memory = image.vdso, image.vdso_base, image.memory_fd
    os.pwrite(memory, _NAME, base + vdso.scratch)
    theirs = thread.syscall(abi.SYS_MEMFD_CREATE, base + vdso.scratch, _MEMFD_FLAGS)
    if theirs < 0:
        return None
    try:
        fd = libc.take_descriptor(thread.tid, theirs)
        kind = abi.MAP_SHARED | (abi.MAP_FIXED if image.permits_at else abi.MAP_32BIT)
        rights = abi.PROT_READ | abi.PROT_WRITE
        at = thread.syscall(abi.SYS_MMAP, image.permits_at, TABLE_BYTES, rights, kind, theirs, 0)
    finally:
        thread.syscall(abi.SYS_CLOSE, theirs)
    if at < 0:
        os.close(fd)
        return None
    table = PermitTable(fd, at, image.threads)
    image.permits_at = at
    os.pwrite(memory, struct.pack("<Q", at), base + vdso.permits_at)
    return table


def reserve_table(thread: Thread, image: ProcessImage) -> None:
    """Replace the parent's table in a fork child by zeros, until it has a table of its own."""
    os.pwrite(image.memory_fd, bytes(8), image.vdso_base + image.vdso.permits_at)
    kind = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED
    thread.syscall(abi.SYS_MMAP, image.permits_at, TABLE_BYTES, abi.PROT_READ, kind, -1, 0)


# mov rax, rsi; xchg [rdi], rax; ret
_XCHG = bytes.fromhex("4889f0 488707 c3".replace(" ", ""))


_pages: list[object] = []


@cache
def _exchange() -> Callable[[int, int], int]:
    """Return a function that exchanges the quadword at an address, atomically.

    Source:
        SDM vol. 2D, "XCHG".
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_XCHG)
    anchor = ctypes.c_char.from_buffer(page)
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    _pages.append(anchor)  # must outlive the function
    return prototype(ctypes.addressof(anchor))


if compiled.speedups is not None:
    compiled.speedups.bind("PermitTable", PermitTable)
    compiled.speedups.bind("Slot", Slot)
