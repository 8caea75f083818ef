"""The registers of a debug enclave's thread after an asynchronous exit, in its SSA frame.

A stop for gdb makes a thread exit its enclave, as on hardware.  Its registers then hold the
synthetic state: RIP is the AEP, RAX is ERESUME, RBX is the TCS.  In a debug enclave EDBGRD and
EDBGWR reach the SSA frame where the exit has saved the thread's registers; gdb reads and writes
those, and ERESUME loads them.  In a production enclave these leaves fail, and gdb sees the
synthetic state.

Deviation: the address of the frame is computed from SECS.SSAFRAMESIZE, which a debugger on hardware
has to know from the enclave's file.

Source:
    SDM vol. 3D, "Enclave Debugging", "Asynchronous Enclave Exit", "Synthetic State";
    ``sgx_vma_access()``, encl.c.
"""

from __future__ import annotations

import struct

from softsgx.arch import GPRSGX_BYTES, PAGE_BYTES, XSAVE_LEGACY_BYTES, GprSgx, PageType, Tcs
from softsgx.driver import peek, poke
from softsgx.engines.native.gdb.registers import RegisterFile, has_avx
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["SsaFrame"]

_ERESUME = 3
_NO_CALL = (1 << 64) - 1
_HEAD_BYTES = 72
_XFRM_AVX, _AVX_BYTES = 4, 256
_SHARED_WITH_OUTSIDE = ("cs", "ss", "ds", "es", "fs", "gs")
_FIELDS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rflags", "rip", "fs_base", "gs_base"),
)


class SsaFrame:
    """The frame that the next ERESUME of a stopped thread loads.

    Args:
        thread: outside its enclave, at its AEP.
        start: linear address of the frame.
        size: bytes of the frame.
        xsave_size: bytes of its XSAVE area that gdb uses.

    Attributes:
        rip: where ERESUME continues inside.

    Raises:
        OSError: the frame cannot be read.
    """

    def __init__(self, thread: ProgramThread, start: int, size: int, xsave_size: int) -> None:
        self._thread, self._start, self._xsave_size = thread, start, xsave_size
        self._gpr_at = start + size - GPRSGX_BYTES
        self._gpr = self._read(self._gpr_at, GPRSGX_BYTES)

    @classmethod
    def of(cls, thread: ProgramThread) -> SsaFrame | None:
        """Return the frame of a stopped thread.

        ``None``: it is not at the AEP of an exit, or its enclave is no debug enclave.
        """
        if thread.cpu.inside is not None:
            return None
        regs, mm = thread.load(), thread.image.mm
        vma = mm.find(regs.rbx)
        enclave = None if vma is None else vma.enclave
        if regs.rax != _ERESUME or enclave is None or not enclave.debug:
            return None
        page = enclave.pages.get(enclave.index_of(regs.rbx))
        if page is None or page.kind is not PageType.TCS:
            return None
        try:
            head = peek(mm, regs.rbx, _HEAD_BYTES, thread)
            (cssa,) = struct.unpack_from("<I", head, Tcs.OFFSETS["cssa"])
            (ossa,) = struct.unpack_from("<Q", head, Tcs.OFFSETS["ossa"])
            (aep,) = struct.unpack_from("<Q", head, Tcs.OFFSETS["aep"])
            epc = None if page.epc is None else thread.cpu.hw.page_at(page.epc.addr)
            if not cssa or aep != regs.rip or epc is None:
                return None
            size = epc.owner.ssa_frame_size * PAGE_BYTES
            avx = _AVX_BYTES if enclave.xfrm & _XFRM_AVX else 0
            start = enclave.base + ossa + (cssa - 1) * size
            return cls(thread, start, size, XSAVE_LEGACY_BYTES + avx)
        except (OSError, struct.error):
            return None

    @property
    def rip(self) -> int:
        """Where ERESUME continues inside."""
        return int(GprSgx.unpack(self._gpr).rip)

    def set_rip(self, rip: int) -> None:
        """Change where ERESUME continues inside."""
        self._write_field("rip", rip)

    def registers(self) -> RegisterFile:
        """Return the saved registers.

        Raises:
            OSError: the frame cannot be read.
        """
        saved = GprSgx.unpack(self._gpr)
        general = {name: int(getattr(saved, name)) for name in _FIELDS}
        general |= {name: getattr(self._thread.regs, name) for name in _SHARED_WITH_OUTSIDE}
        general["orig_rax"] = _NO_CALL
        area = self._read(self._start, self._xsave_size)
        return RegisterFile(general, area, avx=has_avx(self._thread.xstate()))

    def set_registers(self, file: RegisterFile) -> None:
        """Replace the saved registers; only changed ones are written.

        Raises:
            OSError: the frame cannot be written.
        """
        before = self.registers()
        for name in _FIELDS:
            if file.general[name] != before.general[name]:
                self._write_field(name, file.general[name])
        if file.xsave != before.xsave:
            poke(self._thread.image.mm, self._start, file.xsave, self._thread)

    def _write_field(self, name: str, value: int) -> None:
        at = self._gpr_at + GprSgx.OFFSETS[name]
        poke(self._thread.image.mm, at, value.to_bytes(8, "little"), self._thread)
        self._gpr = self._read(self._gpr_at, GPRSGX_BYTES)

    def _read(self, address: int, size: int) -> bytes:
        data = peek(self._thread.image.mm, address, size, self._thread)
        if len(data) < size:
            raise OSError(f"the SSA frame ends at {address + len(data):#x}")
        return data
