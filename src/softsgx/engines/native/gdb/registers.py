"""The registers of a thread as gdb numbers and transfers them.

gdb learns names, sizes and order from the target description (:func:`description`).
:class:`RegisterFile` holds the values of one thread: its general registers and its XSAVE area in
standard form, read from the thread itself or from an SSA frame of an enclave.

Source:
    "Debugging with GDB", "Target Descriptions", "i386 Features"; SDM vol. 1, "Managing State Using
    the XSAVE Feature Set", "FXSAVE and FXRSTOR Instructions" for the areas.
"""

from __future__ import annotations

import struct
from collections.abc import MutableMapping
from typing import NamedTuple

__all__ = [
    "REGISTERS",
    "RegisterFile",
    "description",
    "has_avx",
    "pack_tag_word",
    "unpack_tag_word",
]

_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{number}" for number in range(8, 16)),
    "rip",
)
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_POINTERS = {"rbp": "data_ptr", "rsp": "data_ptr", "rip": "code_ptr"}
_VECTORS = 16

# The XSAVE area.
_FCW, _FSW, _FTW, _FOP, _FIP, _FCS, _FDP, _FDS, _MXCSR = 0, 2, 4, 6, 8, 12, 16, 20, 24
_ST, _XMM, _YMMH, _SLOT_BYTES = 32, 160, 576, 16
_XSTATE_BV = 512
_X87, _SSE, _AVX = 1, 2, 4
_LEGACY_BYTES, _AVX_BYTES = 576, 256
_INITIAL_FCW, _INITIAL_MXCSR = 0x37F, 0x1F80


class Register(NamedTuple):
    """One register in gdb's order.

    Attributes:
        name: gdb's name of it.
        size: bytes.
        kind: its type in the target description.
        feature: the feature of the target description that has it.
        offset: where its bytes are in the XSAVE area, ``None``: it is a general register.
        component: the bit of its state component in XSTATE_BV, 0 for none.
    """

    name: str
    size: int
    kind: str
    feature: str
    offset: int | None = None
    component: int = 0


def _registers() -> tuple[Register, ...]:
    core, sse = "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse"
    linux, segments = "org.gnu.gdb.i386.linux", "org.gnu.gdb.i386.segments"
    found = [Register(name, 8, _POINTERS.get(name, "int64"), core) for name in _GENERAL]
    found.append(Register("eflags", 4, "i386_eflags", core))
    found += [Register(name, 4, "int32", core) for name in _SEGMENTS]
    found += [
        Register(f"st{number}", 10, "i387_ext", core, _ST + number * _SLOT_BYTES, _X87)
        for number in range(8)
    ]
    for name, offset in zip(
        ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"),
        (_FCW, _FSW, _FTW, _FCS, _FIP, _FDS, _FDP, _FOP),
        strict=True,
    ):
        found.append(Register(name, 4, "int", core, offset, _X87))
    found += [
        Register(f"xmm{number}", 16, "vec128", sse, _XMM + number * _SLOT_BYTES, _SSE)
        for number in range(_VECTORS)
    ]
    found.append(Register("mxcsr", 4, "i386_mxcsr", sse, _MXCSR, _SSE))
    found.append(Register("orig_rax", 8, "int64", linux))
    found += [Register(name, 8, "int64", segments) for name in ("fs_base", "gs_base")]
    found += [
        Register(
            f"ymm{number}h",
            16,
            "uint128",
            "org.gnu.gdb.i386.avx",
            _YMMH + number * _SLOT_BYTES,
            _AVX,
        )
        for number in range(_VECTORS)
    ]
    return tuple(found)


REGISTERS = _registers()
"""Every register in the order of gdb's numbers, which is that of its ``g`` packet."""

#: Bytes of a field of the x87 environment in the XSAVE area; gdb uses four for each.
_FIELD_BYTES = {"fctrl": 2, "fstat": 2, "fop": 2, "fiseg": 2, "foseg": 2, "ftag": 1}

_MXCSR_REGISTER = next(register for register in REGISTERS if register.name == "mxcsr")

#: Types that the description has to define for gdb.
_TYPES = {
    "org.gnu.gdb.i386.core": (
        '<flags id="i386_eflags" size="4">'
        + "".join(
            f'<field name="{name}" start="{bit}" end="{bit}"/>'
            for name, bit in (
                *(("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8)),
                *(("IF", 9), ("DF", 10), ("OF", 11), ("NT", 14), ("RF", 16), ("VM", 17)),
                *(("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21)),
            )
        )
        + "</flags>"
    ),
    "org.gnu.gdb.i386.sse": (
        '<vector id="v4f" type="ieee_single" count="4"/>'
        '<vector id="v2d" type="ieee_double" count="2"/>'
        '<vector id="v16i8" type="int8" count="16"/>'
        '<vector id="v8i16" type="int16" count="8"/>'
        '<vector id="v4i32" type="int32" count="4"/>'
        '<vector id="v2i64" type="int64" count="2"/>'
        '<union id="vec128"><field name="v4_float" type="v4f"/>'
        '<field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/>'
        '<field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>'
        '<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>'
        '<flags id="i386_mxcsr" size="4">'
        + "".join(
            f'<field name="{name}" start="{bit}" end="{bit}"/>'
            for name, bit in (
                *(("IE", 0), ("DE", 1), ("ZE", 2), ("OE", 3), ("UE", 4), ("PE", 5), ("DAZ", 6)),
                *(("IM", 7), ("DM", 8), ("ZM", 9), ("OM", 10), ("UM", 11), ("PM", 12), ("FZ", 15)),
            )
        )
        + "</flags>"
    ),
}


def description(*, avx: bool) -> bytes:
    """Return the target description, ``target.xml``.

    Args:
        avx: whether the machine has AVX state; without it ``ymm…h`` are left out.
    """
    features: dict[str, list[str]] = {}
    for register in _present(avx=avx):
        features.setdefault(register.feature, []).append(
            f'<reg name="{register.name}" bitsize="{8 * register.size}" type="{register.kind}"/>'
        )
    body = "".join(
        f'<feature name="{name}">{_TYPES.get(name, "")}{"".join(lines)}</feature>'
        for name, lines in features.items()
    )
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target>'
        f"<architecture>i386:x86-64</architecture><osabi>GNU/Linux</osabi>{body}</target>"
    ).encode()


def has_avx(xsave: bytes) -> bool:
    """Return whether an XSAVE area in standard form has AVX state."""
    return len(xsave) >= _LEGACY_BYTES + _AVX_BYTES


def _present(*, avx: bool) -> tuple[Register, ...]:
    return tuple(register for register in REGISTERS if avx or register.component != _AVX)


class RegisterFile:
    """The registers of one thread.

    Args:
        general: general registers by the names of ``struct user_regs_struct``.
        xsave: the XSAVE area in standard form, at least the legacy region and the header.
        avx: as for :func:`description`; registers beyond the end of the area are zeros.
    """

    def __init__(self, general: MutableMapping[str, int], xsave: bytes, *, avx: bool) -> None:
        assert len(xsave) >= _LEGACY_BYTES, f"an XSAVE area of {len(xsave)} bytes"
        self.general, self._xsave, self._avx = general, bytearray(xsave), avx

    @property
    def xsave(self) -> bytes:
        """The XSAVE area as it is now."""
        return bytes(self._xsave)

    def get(self, number: int) -> bytes:
        """Return the bytes of register ``number``.

        Raises:
            IndexError: there is no such register.
        """
        register = REGISTERS[number]
        if register.offset is None:
            name = "rflags" if register.name == "eflags" else register.name
            value = self.general.get(name, 0)
            return (value & (1 << 8 * register.size) - 1).to_bytes(register.size, "little")
        size = _FIELD_BYTES.get(register.name, register.size)
        if register.offset + size > len(self._xsave):
            return bytes(register.size)
        data = bytes(self._xsave[register.offset : register.offset + size])
        if not self._in_use(register):
            data = _initial(register.name)[:size].ljust(size, b"\0")
        if register.name == "ftag":
            tags, top = self._tags()
            return unpack_tag_word(tags, top, self._stack()).to_bytes(4, "little")
        return data.ljust(register.size, b"\0")

    def set(self, number: int, data: bytes) -> None:
        """Give register ``number`` these bytes.

        Raises:
            IndexError: there is no such register.
        """
        register = REGISTERS[number]
        if register.offset is None:
            value = int.from_bytes(data, "little")
            name = register.name
            if name == "eflags":
                name, value = "rflags", self.general["rflags"] >> 32 << 32 | value
            if name in self.general:
                self.general[name] = value
            return
        size = _FIELD_BYTES.get(register.name, register.size)
        if register.offset + size > len(self._xsave) or data == self.get(number):
            return
        self._use(register.component)
        if register.name == "ftag":
            data = bytes([pack_tag_word(int.from_bytes(data, "little"))])
        self._xsave[register.offset : register.offset + size] = data[:size]

    def all(self) -> bytes:
        """Return the bytes of all registers, as the ``g`` packet has them."""
        present = len(_present(avx=self._avx))
        return b"".join(self.get(number) for number in range(present))

    def set_all(self, data: bytes) -> None:
        """Give all registers the bytes of a ``G`` packet."""
        at = 0
        for number, register in enumerate(_present(avx=self._avx)):
            self.set(number, data[at : at + register.size])
            at += register.size

    # --- extended state -------------------------------------------------------------------------

    def _in_use(self, register: Register) -> bool:
        """Return whether the area holds the register; otherwise its state is the initial one.

        MXCSR is in the area whatever XSTATE_BV says, if SSE or AVX is in use.
        """
        wanted = _SSE | _AVX if register.name == "mxcsr" else register.component
        return bool(self._xsave[_XSTATE_BV] & wanted)

    def _use(self, component: int) -> None:
        """Mark a component as in use: the area's bytes are valid from now on."""
        vectors = _SSE | _AVX
        new = [
            register
            for register in REGISTERS
            if register.component == component and register.name != "mxcsr"
        ]
        if component & vectors and not self._xsave[_XSTATE_BV] & vectors:
            new.append(_MXCSR_REGISTER)
        if not self._xsave[_XSTATE_BV] & component:
            for register in new:
                assert register.offset is not None, "extended state is in the XSAVE area"
                size = _FIELD_BYTES.get(register.name, register.size)
                initial = _initial(register.name)[:size].ljust(size, b"\0")
                self._xsave[register.offset : register.offset + size] = initial
        self._xsave[_XSTATE_BV] |= component

    def _tags(self) -> tuple[int, int]:
        if not self._xsave[_XSTATE_BV] & _X87:
            return 0, 0
        (status,) = struct.unpack_from("<H", self._xsave, _FSW)
        return self._xsave[_FTW], status >> 11 & 7

    def _stack(self) -> list[bytes]:
        return [
            bytes(self._xsave[at : at + 10])
            for at in range(_ST, _ST + 8 * _SLOT_BYTES, _SLOT_BYTES)
        ]


def _initial(name: str) -> bytes:
    """Return four bytes: the start of a register in its initial state; the rest is zero."""
    initial = {"fctrl": _INITIAL_FCW, "mxcsr": _INITIAL_MXCSR}.get(name, 0)
    return initial.to_bytes(4, "little")


_VALID, _ZERO, _SPECIAL, _EMPTY = 0, 1, 2, 3


def unpack_tag_word(abridged: int, top: int, stack: list[bytes]) -> int:
    """Return the x87 tag word of two bits a register from the abridged one of one bit.

    Args:
        abridged: bit n is set when physical register n is in use.
        top: the physical register that is ST(0).
        stack: the bytes of ST(0) to ST(7).

    Source:
        SDM vol. 1, "x87 FPU Tag Word"; vol. 2, FXSAVE, "Recreating FSAVE format".
    """
    word = 0
    for physical in range(8):
        tag = _EMPTY
        if abridged >> physical & 1:
            value = stack[(physical - top) % 8]
            exponent = int.from_bytes(value[8:10], "little") & 0x7FFF
            fraction = int.from_bytes(value[:8], "little")
            if exponent == 0 and fraction == 0:
                tag = _ZERO
            elif exponent in (0, 0x7FFF) or not fraction >> 63:
                tag = _SPECIAL
            else:
                tag = _VALID
        word |= tag << 2 * physical
    return word


def pack_tag_word(word: int) -> int:
    """Return the abridged tag word of one bit a register; inverse of :func:`unpack_tag_word`."""
    return sum(1 << at for at in range(8) if word >> 2 * at & 3 != _EMPTY)
