"""Our vDSO: an ELF image that replaces the kernel's, made for one process.

It forwards every symbol of the kernel's image and adds ``__vdso_sgx_enter_enclave``.  Programs find
the symbol by each method in use: DT_HASH, DT_GNU_HASH, symbol versions (ld.so), and section headers
by name.

Source:
    System V ABI, chapters "Object Files" and "Program Loading and Dynamic Linking"; vdso(7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache

from softsgx.engines.native import abi
from softsgx.engines.native.vdso.code import (
    emit_enter_enclave,
    emit_forward,
    emit_injection,
    target_of,
)
from softsgx.engines.native.vdso.cpuid_jumps import AREA_BYTES
from softsgx.engines.native.vdso.path_calls import PATH_BYTES
from softsgx.engines.native.vdso.permit_code import STUB_BYTES, TAILS_BYTES
from softsgx.engines.native.vdso.stubs import STATE_BYTES
from softsgx.engines.native.x86.asm import Assembler
from softsgx.ondemand import dataclass, replace

__all__ = [
    "DEVICE_NAME",
    "HEADER_BYTES",
    "Linker",
    "Vdso",
    "build_vdso",
    "image_bytes",
    "linked_image",
    "linker",
    "read_symbols",
    "vdso_of",
]

DEVICE_NAME = b"sgx_enclave\0"
"""Name of the memory file behind an open enclave device, as ``/proc/PID/maps`` shows it."""

_ENTER = "__vdso_sgx_enter_enclave"
_SONAME = "linux-vdso.so.1"
_VERSION = "LINUX_2.6"

HEADER_BYTES = 64
"""Of an ELF image; :func:`image_bytes` wants as many."""
_EHDR, _PHDR, _SHDR, _SYM, _DYN = HEADER_BYTES, 56, 64, 24, 16
_STT_FUNC_GLOBAL = 0x12
_SHT = {
    "": 0,
    ".hash": 5,
    ".gnu.hash": 0x6FFFFFF6,
    ".dynsym": 11,
    ".dynstr": 3,
    ".gnu.version": 0x6FFFFFFF,
    ".gnu.version_d": 0x6FFFFFFD,
    ".dynamic": 6,
    ".text": 1,
    ".shstrtab": 3,
}


@dataclass(frozen=True, slots=True)
class Vdso:
    """The image, and the places in it that the supervisor needs, as offsets from its base.

    Attributes:
        image: whole pages, to be mapped readable and executable.
        inject: a ``syscall; int3``.
        injected: RIP after that int3.
        eenter_after: RIP after our EENTER; the enclave gets it in RCX.
        aep: the asynchronous exit pointer of our enclave entry.
        fixup: where our enclave entry continues after an exception.
        device_name: the string :data:`DEVICE_NAME`.
        illegal: an illegal instruction.
        scratch: bytes that only the supervisor writes, for calls that take pointers.
        calls: makes a table of calls; called: RIP after its int3.
        slots: a page behind the image, for ``vdso/out_of_line.py``.
        stubs: room for ``most_stubs`` exit stubs, behind the slots.
        tails: room for the tails of slots, see ``vdso/entry_code.py``.
        answers: room for what answers CPUID, see ``vdso/cpuid_jumps.py``.
        state: room for what executes instructions on extended state, see ``vdso/state_jumps.py``.
        paths: room for ``vdso/path_calls.py``.
        table: a page for a table of calls; end: where it ends.
        watched: a word that is not zero once the process has had a device.
        permits_at: where the supervisor writes the address of the table of permits.
        ask, pushed, popping, popped, added, permit_end, undo: as ``vdso/permit_code.py`` has them.
        symbols: exported functions.
        targets: places for the addresses where functions of the kernel's vDSO continue.
    """

    image: bytes
    inject: int
    injected: int
    eenter_after: int
    aep: int
    fixup: int
    device_name: int
    illegal: int
    scratch: int
    calls: int
    called: int
    slots: int
    stubs: int
    most_stubs: int
    tails: int
    answers: int
    state: int
    paths: int
    table: int
    end: int
    watched: int
    permits_at: int
    ask: int
    pushed: int
    popping: int
    popped: int
    added: int
    permit_end: int
    undo: int
    symbols: dict[str, int]
    targets: dict[str, int]


def image_bytes(header: bytes) -> int:
    """Return the size of an image with section headers at its end, as the kernel's vDSO is."""
    if header[:4] != b"\x7fELF" or len(header) < _EHDR:
        return 0
    table, count = _section_table(header)
    return table + _SHDR * count


@lru_cache(maxsize=4)
def read_symbols(image: bytes) -> dict[str, int]:
    """Return name and value of each function a vDSO image exports.

    Reads section headers, which the kernel's image has; without them there are no symbols.
    """
    if image[:4] != b"\x7fELF" or len(image) < _EHDR:
        return {}
    table, count = _section_table(image)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", image, table + _SHDR * index)
        for index in range(count)
        if table + _SHDR * (index + 1) <= len(image)
    ]
    symbols: dict[str, int] = {}
    for section in sections:
        if section[1] != _SHT[".dynsym"]:
            continue
        strings = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], _SYM):
            name, info, _other, index, value, _size = struct.unpack_from("<IBBHQQ", image, at)
            if info & 15 == 2 and index != 0:
                end = image.index(0, strings + name)
                symbols[image[strings + name : end].decode()] = value
    return symbols


def _section_table(header: bytes) -> tuple[int, int]:
    """Return where the section headers are, and how many."""
    return struct.unpack_from("<Q", header, 0x28)[0], struct.unpack_from("<H", header, 60)[0]


def build_vdso(original: Mapping[str, int]) -> Vdso:
    """Make the image.

    Args:
        original: absolute address of each function of the kernel's vDSO in this process.
    """
    blank = vdso_of(original)
    return replace(blank, image=linked_image(blank, original))


def vdso_of(original: Iterable[str]) -> Vdso:
    """Return the vDSO with functions of these names, before it is known where they lead to."""
    return _blank_vdso(tuple(sorted({*original} - {_ENTER})))


def linked_image(vdso: Vdso, original: Mapping[str, int]) -> bytes:
    """Return the image of a vDSO whose functions lead to those of the kernel's.

    Args:
        vdso: of :func:`vdso_of`.
        original: absolute address of each function of the kernel's vDSO in this process.
    """
    image = bytearray(vdso.image)
    for name, place in vdso.targets.items():
        _TARGET.pack_into(image, place, original[name])
    return bytes(image)


class Linker:
    """Makes images as :func:`linked_image` does, for one vDSO of the kernel at any address.

    Each place gets an address that is the kernel's base more than a constant.  An image is a
    number, so one multiplication adds the base at all places; no sum is longer than its place.

    Args:
        image: of the kernel's vDSO; empty without one.

    Attributes:
        vdso: as :func:`vdso_of` returns it.
    """

    def __init__(self, image: bytes) -> None:
        self.image = image
        symbols = read_symbols(image)
        self.vdso = vdso_of(symbols)
        self._at_zero = int.from_bytes(linked_image(self.vdso, symbols), "little")
        self._places = sum(1 << 8 * place for place in self.vdso.targets.values())

    def link(self, original: int) -> bytes:
        """Return our image for a process that has the kernel's vDSO at ``original``."""
        linked = self._at_zero + original * self._places
        return linked.to_bytes(len(self.vdso.image), "little")


def linker(image: bytes) -> Linker:
    """Return the linker for an image of the kernel's vDSO, which most programs share."""
    if not _latest or image != _latest[0].image:
        _latest[:] = [Linker(image)]
    return _latest[0]


_latest: list[Linker] = []


@lru_cache(maxsize=4)
def _blank_vdso(forwarded: tuple[str, ...]) -> Vdso:
    """Return the image before it is known where the functions of these names are."""
    asm = Assembler()
    emit_injection(asm)
    asm.align(16)
    asm.label("device_name")
    asm.emit(DEVICE_NAME.hex())
    emit_enter_enclave(asm)
    for name in forwarded:
        emit_forward(asm, name)
    code = asm.finish()
    names = sorted({*forwarded, _ENTER}, key=lambda name: _gnu_hash(name) % _GNU_BUCKETS)
    layout = _Image(names, code, asm.labels)
    base = layout.text
    slots = len(layout.image)
    stubs = slots + abi.PAGE
    tails = stubs + _STUB_PAGES * abi.PAGE
    answers = tails + TAILS_BYTES
    return Vdso(
        image=layout.image,
        slots=slots,
        stubs=stubs,
        most_stubs=_STUB_PAGES * abi.PAGE // STUB_BYTES,
        tails=tails,
        answers=answers,
        state=answers + AREA_BYTES,
        paths=answers + AREA_BYTES + STATE_BYTES,
        table=answers + AREA_BYTES + STATE_BYTES + PATH_BYTES,
        end=answers + AREA_BYTES + STATE_BYTES + PATH_BYTES + abi.PAGE,
        **{name: base + asm.labels[name] for name in _PLACES},
        symbols={name: base + asm.labels[name] for name in names},
        targets={name: base + asm.labels[target_of(name)] for name in forwarded},
    )


_TARGET = struct.Struct("<Q")
_GNU_BUCKETS = 4
_FORWARD_BYTES = 18  # of a function that jumps to the kernel's vDSO
_STUB_PAGES = 4
_PLACES = (
    *("inject", "injected", "eenter_after", "aep", "fixup", "device_name", "illegal", "scratch"),
    *("calls", "called", "permits_at", "watched"),
    *("ask", "pushed", "popping", "popped", "added", "permit_end", "undo"),
)


class _Image:
    """Lays the parts out one after the other; file offset and address are the same."""

    def __init__(self, names: list[str], code: bytes, labels: dict[str, int]) -> None:
        strings = bytearray(b"\0")
        where: dict[str, int] = {}
        for text in (*names, _SONAME, _VERSION):
            where[text] = len(strings)
            strings += text.encode() + b"\0"

        blank = bytes(_SYM * (len(names) + 1))
        parts: dict[str, bytes] = {
            ".hash": _sysv_hash_table(names),
            ".gnu.hash": _gnu_hash_table(names),
            ".dynsym": blank,
            ".dynstr": bytes(strings),
            ".gnu.version": struct.pack(f"<{len(names) + 1}H", 0, *([2] * len(names))),
            ".gnu.version_d": _version_definitions(where),
            ".dynamic": bytes(_DYN * 11),
            ".text": code,
        }
        names_of_sections = b"\0" + b"".join(
            name.encode() + b"\0" for name in (*parts, ".shstrtab")
        )
        parts[".shstrtab"] = names_of_sections
        at: dict[str, int] = {}
        cursor = _EHDR + 2 * _PHDR
        for section, body in parts.items():
            cursor += -cursor % 16
            at[section] = cursor
            cursor += len(body)
        headers = cursor + -cursor % 16
        end = headers + _SHDR * (len(parts) + 1)
        self.text = at[".text"]

        parts[".dynsym"] = bytes(_SYM) + b"".join(
            struct.pack(
                "<IBBHQQ",
                where[name],
                _STT_FUNC_GLOBAL,
                0,
                list(parts).index(".text") + 1,
                self.text + labels[name],
                labels["enter_enclave_end"] - labels[name] if name == _ENTER else _FORWARD_BYTES,
            )
            for name in names
        )
        parts[".dynamic"] = _dynamic(at, where, len(strings))
        image = bytearray(end + -end % abi.PAGE)
        for section, body in parts.items():
            image[at[section] : at[section] + len(body)] = body
        image[:_EHDR] = _elf_header(headers, len(parts) + 1)
        image[_EHDR : _EHDR + 2 * _PHDR] = _program_header(1, 5, 0, end, abi.PAGE) + (
            _program_header(2, 4, at[".dynamic"], len(parts[".dynamic"]), 8)
        )
        image[headers:end] = _section_headers(parts, at)
        self.image = bytes(image)


def _elf_header(sections: int, count: int) -> bytes:
    ident = b"\x7fELF\2\1\1" + bytes(9)
    return ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, _EHDR, sections, 0, _EHDR, _PHDR, 2, _SHDR, count, count - 1
    )


def _program_header(kind: int, flags: int, offset: int, size: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, align)


def _section_headers(parts: dict[str, bytes], at: dict[str, int]) -> bytes:
    order = ["", *parts]
    names = parts[".shstrtab"]
    links = {
        ".hash": ".dynsym",
        ".gnu.hash": ".dynsym",
        ".dynsym": ".dynstr",
        ".gnu.version": ".dynsym",
        ".gnu.version_d": ".dynstr",
        ".dynamic": ".dynstr",
    }
    sizes = {".hash": 4, ".dynsym": _SYM, ".gnu.version": 2, ".dynamic": _DYN}
    headers = [bytes(_SHDR)]
    for name, body in parts.items():
        allocated = 0 if name == ".shstrtab" else 6 if name == ".text" else 2
        headers.append(
            struct.pack(
                "<IIQQQQIIQQ",
                names.index(b"\0" + name.encode() + b"\0") + 1,
                _SHT[name],
                allocated,
                at[name] if allocated else 0,
                at[name],
                len(body),
                order.index(links[name]) if name in links else 0,
                {".dynsym": 1, ".gnu.version_d": 2}.get(name, 0),
                16 if name == ".text" else 8 if allocated else 1,
                sizes.get(name, 0),
            )
        )
    return b"".join(headers)


def _dynamic(at: dict[str, int], where: dict[str, int], string_bytes: int) -> bytes:
    entries = [
        (14, where[_SONAME]),
        (4, at[".hash"]),
        (0x6FFFFEF5, at[".gnu.hash"]),
        (5, at[".dynstr"]),
        (6, at[".dynsym"]),
        (10, string_bytes),
        (11, _SYM),
        (0x6FFFFFF0, at[".gnu.version"]),
        (0x6FFFFFFC, at[".gnu.version_d"]),
        (0x6FFFFFFD, 2),
    ]
    # DT_NULL ends the table.
    return b"".join(struct.pack("<QQ", *entry) for entry in (*entries, (0, 0)))


def _version_definitions(where: dict[str, int]) -> bytes:
    rows = ((1, 1, _SONAME), (0, 2, _VERSION))
    table = b""
    for position, (flags, index, name) in enumerate(rows):
        following = 0 if position == len(rows) - 1 else 28
        table += struct.pack("<HHHHIII", 1, flags, index, 1, _elf_hash(name), 20, following)
        table += struct.pack("<II", where[name], 0)
    return table


def _elf_hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF000_0000
        value = (value ^ high >> 24) & ~high & 0xFFFF_FFFF
    return value


def _gnu_hash(name: str) -> int:
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFF_FFFF
    return value


def _sysv_hash_table(names: list[str]) -> bytes:
    count = len(names)
    buckets, chains = [0] * count, [0] * (count + 1)
    for index, name in enumerate(names, start=1):
        bucket = _elf_hash(name) % count
        chains[index], buckets[bucket] = buckets[bucket], index
    return struct.pack(f"<II{2 * count + 1}I", count, count + 1, *buckets, *chains)


def _gnu_hash_table(names: list[str]) -> bytes:
    """``names`` are sorted by bucket, as the table wants its symbols."""
    hashes = [_gnu_hash(name) for name in names]
    bloom = 0
    for value in hashes:
        bloom |= 1 << value % 64 | 1 << (value >> 6) % 64
    buckets, chain = [0] * _GNU_BUCKETS, []
    for index, value in enumerate(hashes):
        bucket = value % _GNU_BUCKETS
        if not buckets[bucket]:
            buckets[bucket] = index + 1
        last = index + 1 == len(hashes) or hashes[index + 1] % _GNU_BUCKETS != bucket
        chain.append(value & ~1 | last)
    head = struct.pack("<IIIIQ", _GNU_BUCKETS, 1, 1, 6, bloom)
    return head + struct.pack(f"<{_GNU_BUCKETS}I{len(chain)}I", *buckets, *chain)
