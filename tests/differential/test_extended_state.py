"""Software against this machine: XSAVE, XSAVEC and XRSTOR leave the same bytes.

Method: the real instructions in a few bytes of machine code, which loads a random state, saves it
with a random mask, and has the test's own state back afterwards; the model does the same from the
same state.  Components of AVX-512 and below, as far as this machine has them.
"""

from __future__ import annotations

import ctypes
import mmap
import random

import pytest
from tests.support.threads import DATA, Border

from softsgx.engines.native.x86.cpuid import host_cpuid, xsave_components
from softsgx.hw.access import load, store
from softsgx.hw.extended_state import SaveKind, xrstor, xsave

XCR0, LAYOUT = xsave_components(host_cpuid())
USED = XCR0 & 0xE7
SIZE = 4096
INSTRUCTIONS = {SaveKind.XSAVE: "480fae26", SaveKind.XSAVEC: "480fc726"}  # at RSI

pytestmark = pytest.mark.skipif(
    not host_cpuid()(0xD, 1)[0] & 2, reason="this processor has no XSAVEC"
)


class Real:
    """xsave64 own; xrstor64 [rdi] all; save [rsi] mask; xrstor64 own."""

    def __init__(self, save: str) -> None:
        load_all = f"b8{USED.to_bytes(4, 'little').hex()}31d2"
        code = bytes.fromhex(
            f"4989d0 {load_all} 490fae21 480fae2f 4489c0 31d2 {save} {load_all} 490fae29 c3"
        )
        # r9: where our own state is kept; r8: the mask
        code = b"\x49\x89\xc9" + code  # mov r9, rcx
        self._page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code)
        self._anchor = ctypes.c_char.from_buffer(self._page)
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, ctypes.c_uint32, ctypes.c_void_p)
        self._run = prototype(ctypes.addressof(self._anchor))
        self._memory = mmap.mmap(-1, 3 * SIZE)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def __call__(self, state: bytes, area: bytes, mask: int) -> bytes:
        self._memory[: 3 * SIZE] = state + area + bytes(SIZE)
        self._run(self._at, self._at + SIZE, mask, self._at + 2 * SIZE)
        return self._memory[SIZE : 2 * SIZE]


def random_state(source: random.Random) -> bytes:
    """A legal area: any components in use, any bytes in vectors, sane x87 control."""
    state = bytearray(source.randbytes(SIZE))
    held = source.getrandbits(8) & USED
    state[0:32] = bytes(32)
    state[0:2] = (0x037F).to_bytes(2, "little")
    state[24:28] = (0x1F80 | source.getrandbits(6)).to_bytes(4, "little")
    for register in range(8):
        state[42 + 16 * register : 48 + 16 * register] = bytes(6)
    state[416:576] = bytes(96) + held.to_bytes(8, "little") + bytes(56)
    return bytes(state)


def model(state: bytes, area: bytes, mask: int, kind: SaveKind) -> bytes:
    """What the model makes of the same: XRSTOR of everything, then the instruction."""
    border = Border(config={"xsave": LAYOUT, "xfrm": USED})
    cpu, base = border.cpu, border.base + DATA
    cpu.regs.xcr0 = USED
    cpu.enclu.eenter(border.rbx, border.rcx)
    border.enclave.xfrm = USED
    cpu.regs.xsave = bytes(border.hw.config.xsave_bytes(USED))
    store(cpu, base, state)
    xrstor(cpu, base, USED)
    store(cpu, base, area)
    xsave(cpu, base, mask, kind)
    return load(cpu, base, SIZE)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_the_model_saves_what_the_processor_saves(kind: SaveKind) -> None:
    real = Real(INSTRUCTIONS[kind])
    source = random.Random(5)
    for _round in range(40):
        state, mask = random_state(source), source.getrandbits(8)
        area = b"\x5a" * 512 + bytes(64) + b"\x5a" * (SIZE - 576)
        wanted, got = bytearray(real(state, area, mask)), bytearray(model(state, area, mask, kind))
        for both in (wanted, got):
            both[28:32] = bytes(4)  # MXCSR_MASK is no state
        assert got == wanted, [i for i in range(SIZE) if got[i] != wanted[i]]
