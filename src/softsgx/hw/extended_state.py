"""XGETBV, XSAVE and XRSTOR of enclave code: XCR0 is the enclave's XFRM.

For engines whose processor keeps the system's XCR0 while it is in an enclave.  State is what
``cpu.regs.xsave`` holds, in the non-compacted form; memory is accessed as any instruction does.

Source:
    SDM vol. 1, "Managing State Using the XSAVE Feature Set"; vol. 2, "XGETBV", "XSAVE",
    "XSAVEC", "XSAVEOPT", "XRSTOR"; vol. 3D, EENTER: "XCR0 := SECS.ATTRIBUTES.XFRM".
"""

from __future__ import annotations

from enum import Enum, auto

from softsgx.arch import XSAVE_ALIGNED, Xfrm
from softsgx.hw.access import load, store
from softsgx.hw.config import MachineConfig
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["SaveKind", "xgetbv", "xrstor", "xsave"]

_ALIGN, _LEGACY, _HEADER_END = 64, 512, 576
_COMPACTED = 1 << 63
_MXCSR_INIT, _MXCSR_RESERVED = 0x1F80, 0xFFFF_0000
_FCW_INIT = (0x037F).to_bytes(2, "little")
_X87 = ((0, 24), (32, 160))
_MXCSR = (24, 32)  # with MXCSR_MASK
_XMM = (160, 416)
_XINUSE_REGISTER = 1
# Plain integers: arithmetic on enums is ten times slower.
_BIT_X87, _BIT_SSE = int(Xfrm.X87), int(Xfrm.SSE)
#: Components that MXCSR belongs to: SSE and AVX.
_USES_MXCSR = int(Xfrm.SSE | Xfrm.AVX)


class SaveKind(Enum):
    """Which of the instructions that save."""

    XSAVE = auto()
    XSAVEOPT = auto()
    XSAVEC = auto()


def xgetbv(cpu: LogicalProcessor, register: int) -> int:
    """Return what XGETBV gives for ECX = ``register``.

    Raises:
        GeneralProtection: there is no such register.
    """
    if register == 0:
        return _xcr0(cpu)
    if register == _XINUSE_REGISTER:
        return _xcr0(cpu) & _in_use(cpu.regs.xsave)
    raise GeneralProtection


def xsave(
    cpu: LogicalProcessor, linaddr: int, requested: int, kind: SaveKind, *, wide: bool = True
) -> None:
    """Save the components of ``requested``, EDX:EAX, that XFRM has.

    Without ``wide`` (REX.W), x87 pointers have 32 bits, and FCS and FDS are zero.

    XSAVEOPT does not write components in their initial state; it does not track which memory an
    earlier XRSTOR loaded.

    Raises:
        GeneralProtection: ``linaddr`` is not 64-byte aligned.
        PageFault: some of the area cannot be written; bytes before the fault may have been written.
    """
    if linaddr % _ALIGN:
        raise GeneralProtection
    state, wanted = cpu.regs.xsave, requested & _xcr0(cpu)
    in_use = _in_use(state) & wanted
    pieces: list[tuple[int, bytes]] = []
    mxcsr: int
    if kind is SaveKind.XSAVEC:
        places = _compacted(cpu.hw.config, wanted)
        if wanted & _BIT_SSE and state[24:28] != _MXCSR_INIT.to_bytes(4, "little"):
            in_use |= _BIT_SSE
        saved, header = in_use, _word(in_use) + _word(wanted | _COMPACTED)
        mxcsr = saved & _BIT_SSE
    else:
        places = _standard(cpu.hw.config, wanted)
        before = int.from_bytes(load(cpu, linaddr + _LEGACY, 8), "little")
        saved = in_use if kind is SaveKind.XSAVEOPT else wanted
        header = _word(before & ~wanted | in_use)
        mxcsr = wanted & _USES_MXCSR
    if saved & _BIT_X87:
        pieces += [(start, _legacy(state, start, end, _BIT_X87)) for start, end in _X87]
        if not wide:
            pieces[0] = 0, _narrow(pieces[0][1])
    if mxcsr:
        pieces.append((_MXCSR[0], state[slice(*_MXCSR)]))
    if saved & _BIT_SSE:
        pieces.append((_XMM[0], _legacy(state, *_XMM, _BIT_SSE)))
    for number, (size, at) in places.items():
        if saved >> number & 1:
            pieces.append((at, _component(cpu.hw.config, state, number, size)))
    pieces.append((_LEGACY, header))
    for offset, data in pieces:
        store(cpu, linaddr + offset, data)


def xrstor(cpu: LogicalProcessor, linaddr: int, requested: int, *, wide: bool = True) -> None:
    """Load the components of ``requested``, EDX:EAX, that XFRM has; others keep their state.

    Without ``wide`` (REX.W), x87 pointers have 32 bits.

    Raises:
        GeneralProtection: misaligned, or the header or MXCSR has what the manual forbids.
        PageFault: some of the area cannot be read.
    """
    if linaddr % _ALIGN:
        raise GeneralProtection
    config, xcr0 = cpu.hw.config, _xcr0(cpu)
    wanted = requested & xcr0
    area = load(cpu, linaddr, _HEADER_END)
    held = int.from_bytes(area[512:520], "little")
    form = int.from_bytes(area[520:528], "little")
    compacted = bool(form & _COMPACTED)
    _check_header(area, held, form, xcr0)
    places = _compacted(config, form & ~_COMPACTED) if compacted else _standard(config, wanted)
    loaded = held & wanted

    made = bytearray(cpu.regs.xsave)
    if wanted & _BIT_X87:
        for start, end in _X87:
            made[start:end] = area[start:end] if loaded & _BIT_X87 else bytes(end - start)
        if not loaded & _BIT_X87:
            made[0:2] = _FCW_INIT
        if not wide:
            made[0:24] = _narrow(bytes(made[0:24]))
    if wanted & (_BIT_SSE if compacted else _USES_MXCSR):
        mxcsr = int.from_bytes(area[24:28], "little")
        if compacted and not loaded & _BIT_SSE:
            mxcsr = _MXCSR_INIT
        if mxcsr & _MXCSR_RESERVED:
            raise GeneralProtection
        made[24:28] = mxcsr.to_bytes(4, "little")
    if wanted & _BIT_SSE:
        made[slice(*_XMM)] = area[slice(*_XMM)] if loaded & _BIT_SSE else bytes(_XMM[1] - _XMM[0])
    for number, (size, at) in places.items():
        if wanted >> number & 1:
            to = config.xsave[number][1]
            given = load(cpu, linaddr + at, size) if loaded >> number & 1 else bytes(size)
            made += bytes(max(0, to + size - len(made)))
            made[to : to + size] = given
    made[512:520] = _word(_in_use(cpu.regs.xsave) & ~wanted | loaded)
    cpu.regs.xsave = bytes(made)


def _check_header(area: bytes, held: int, form: int, xcr0: int) -> None:
    if form & _COMPACTED:
        legal = not form & ~_COMPACTED & ~xcr0 and not held & ~form and not any(area[528:576])
    else:
        legal = not held & ~xcr0 and not any(area[520:536])
    if not legal:
        raise GeneralProtection


def _xcr0(cpu: LogicalProcessor) -> int:
    assert cpu.inside is not None, "extended state of an enclave outside an enclave"
    return cpu.inside.enclave.xfrm


def _in_use(state: bytes) -> int:
    return int.from_bytes(state[512:520], "little")


def _word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _legacy(state: bytes, start: int, end: int, component: int) -> bytes:
    if _in_use(state) & component:
        return state[start:end]
    data = bytearray(end - start)
    if start == 0:
        data[0:2] = _FCW_INIT
    return bytes(data)


def _narrow(x87: bytes) -> bytes:
    """Return FCW to FDP with pointers of 32 bits."""
    return x87[:12] + bytes(4) + x87[16:20] + bytes(4)


def _component(config: MachineConfig, state: bytes, number: int, size: int) -> bytes:
    if not _in_use(state) >> number & 1:
        return bytes(size)
    at = config.xsave[number][1]
    return state[at : at + size].ljust(size, b"\0")


def _standard(config: MachineConfig, components: int) -> dict[int, tuple[int, int]]:
    """Return (bytes, offset) of extended components in the non-compacted form."""
    return {number: place for number, place in config.xsave.items() if components >> number & 1}


def _compacted(config: MachineConfig, components: int) -> dict[int, tuple[int, int]]:
    """Return (bytes, offset) of the components of XCOMP_BV, one after the other."""
    places, at = {}, _HEADER_END
    for number, (size, _offset) in sorted(config.xsave.items()):
        if components >> number & 1:
            if number in XSAVE_ALIGNED:
                at = -(-at // _ALIGN) * _ALIGN
            places[number] = size, at
            at += size
    return places
