"""A reader of the parts of ELF that enclave files need, with all bounds checked.

It takes 64-bit little-endian x86-64 files, loads nothing and resolves no symbol.  Names are cut
after 256 bytes.  Time and memory are linear in the size of the file: its segments together hold at
most twice as many bytes.

Source:
    System V ABI, "Object Files", "Program Loading and Dynamic Linking"; its AMD64 supplement.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from softsgx.image._file import Bytes
from softsgx.layout import U8, U16, U32, U64, Raw, Structure, at

__all__ = [
    "DT_JMPREL",
    "DT_NEEDED",
    "DT_PLTRELSZ",
    "DT_REL",
    "DT_RELA",
    "DT_RELASZ",
    "DT_TEXTREL",
    "ELF_MAGIC",
    "ET_DYN",
    "PF_R",
    "PF_W",
    "PF_X",
    "Elf",
    "ElfHeader",
    "ProgramHeader",
    "Section",
    "SectionHeader",
    "Symbol",
]

ELF_MAGIC = b"\x7fELF"
ET_DYN = 3
_EM_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC, _PT_TLS = 1, 2, 7
_SHT_NOBITS, _SHT_DYNSYM = 8, 11
PF_X, PF_W, PF_R = 1, 2, 4
_DT_NULL, DT_NEEDED, DT_PLTRELSZ, DT_RELA, DT_RELASZ = 0, 1, 2, 7, 8
DT_REL, DT_TEXTREL, DT_JMPREL = 17, 22, 23
_SHN_UNDEF = 0
_STB_WEAK = 2
_NAME_LIMIT = 256
_SHARED_BYTES = 2  # segments may share bytes: together they hold at most twice the file
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_DYN = struct.Struct("<QQ")


class ElfHeader(Structure, size=64):
    """The file header."""

    magic: bytes = at(0, Raw(4), default=ELF_MAGIC)
    elf_class: int = at(4, U8, default=2)
    data: int = at(5, U8, default=1)
    ident_version: int = at(6, U8, default=1)
    abi: bytes = at(7, Raw(9))
    e_type: int = at(16, U16, default=ET_DYN)
    e_machine: int = at(18, U16, default=_EM_X86_64)
    e_version: int = at(20, U32, default=1)
    e_entry: int = at(24, U64)
    e_phoff: int = at(32, U64)
    e_shoff: int = at(40, U64)
    e_flags: int = at(48, U32)
    e_ehsize: int = at(52, U16, default=64)
    e_phentsize: int = at(54, U16, default=56)
    e_phnum: int = at(56, U16)
    e_shentsize: int = at(58, U16, default=64)
    e_shnum: int = at(60, U16)
    e_shstrndx: int = at(62, U16)


class ProgramHeader(Structure, size=56):
    """One segment."""

    p_type: int = at(0, U32)
    p_flags: int = at(4, U32)
    p_offset: int = at(8, U64)
    p_vaddr: int = at(16, U64)
    p_paddr: int = at(24, U64)
    p_filesz: int = at(32, U64)
    p_memsz: int = at(40, U64)
    p_align: int = at(48, U64)


class SectionHeader(Structure, size=64):
    """One section."""

    sh_name: int = at(0, U32)
    sh_type: int = at(4, U32)
    sh_flags: int = at(8, U64)
    sh_addr: int = at(16, U64)
    sh_offset: int = at(24, U64)
    sh_size: int = at(32, U64)
    sh_link: int = at(40, U32)
    sh_info: int = at(44, U32)
    sh_addralign: int = at(48, U64)
    sh_entsize: int = at(56, U64)


@dataclass(frozen=True, slots=True)
class Section:
    """A section header with its name."""

    name: str
    header: SectionHeader


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic symbol."""

    name: str
    value: int
    size: int
    is_defined: bool
    is_weak: bool


class Elf:
    """An ELF file's tables.

    Attributes:
        file: the bytes.
        header: the file header.

    Raises:
        SoftSgxError: the file is no 64-bit little-endian x86-64 ELF file, or a table is cut short;
            each property reads its table at its first use.
    """

    def __init__(self, file: Bytes) -> None:
        self.file = file
        self.header = header = file.structure(ElfHeader, 0, "ELF header")
        if header.magic != ELF_MAGIC:
            raise file.bad(0, f"magic {header.magic.hex()}", "ELF begins 7f454c46")
        if (header.elf_class, header.data, header.e_machine) != (2, 1, _EM_X86_64):
            raise file.bad(
                4,
                f"class {header.elf_class}, data {header.data}, machine {header.e_machine}",
                "enclaves are 64-bit little-endian x86-64",
            )

    @cached_property
    def program_headers(self) -> tuple[ProgramHeader, ...]:
        """Return all segments, in file order."""
        header = self.header
        if header.e_phnum and header.e_phentsize != ProgramHeader.SIZE:
            raise self.file.bad(54, f"program headers of {header.e_phentsize} bytes", "need 56")
        return tuple(
            self.file.structure(
                ProgramHeader, header.e_phoff + i * ProgramHeader.SIZE, "program header"
            )
            for i in range(header.e_phnum)
        )

    @cached_property
    def loads(self) -> tuple[ProgramHeader, ...]:
        """Return the PT_LOAD segments in file order; the file has all of their bytes."""
        loads = tuple(ph for ph in self.program_headers if ph.p_type == _PT_LOAD)
        for index, load in enumerate(loads):
            self.file.take(load.p_offset, load.p_filesz, f"PT_LOAD {index}")
            if load.p_filesz > load.p_memsz:
                raise self.file.bad(
                    load.p_offset,
                    f"PT_LOAD {index} has {load.p_filesz:#x} bytes in the file and "
                    f"{load.p_memsz:#x} in memory",
                )
        total = sum(load.p_filesz for load in loads)
        if total > _SHARED_BYTES * len(self.file):
            raise self.file.bad(
                self.header.e_phoff,
                f"{len(loads)} segments of {total} bytes in a file of {len(self.file)}",
                "they repeat the same bytes of the file",
            )
        return loads

    @cached_property
    def tls(self) -> ProgramHeader | None:
        """Return PT_TLS."""
        return next((ph for ph in self.program_headers if ph.p_type == _PT_TLS), None)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Return all sections; none when there is no table."""
        header = self.header
        if header.e_shoff == 0 or header.e_shnum == 0:
            return ()
        if header.e_shentsize != SectionHeader.SIZE:
            raise self.file.bad(58, f"section headers of {header.e_shentsize} bytes", "need 64")
        headers = [
            self.file.structure(
                SectionHeader, header.e_shoff + i * SectionHeader.SIZE, "section header"
            )
            for i in range(header.e_shnum)
        ]
        if header.e_shstrndx >= len(headers):
            raise self.file.bad(62, f"section name table {header.e_shstrndx} of {len(headers)}")
        names = self._contents(headers[header.e_shstrndx], "section names")
        return tuple(Section(_string(names, sh.sh_name), sh) for sh in headers)

    def section(self, name: str) -> SectionHeader | None:
        """Return the first section called ``name``."""
        return next((s.header for s in self.sections if s.name == name), None)

    def contents(self, name: str) -> Bytes | None:
        """Return the bytes of the first section called ``name``, None when there is none."""
        header = self.section(name)
        return None if header is None else self._contents(header, name)

    @cached_property
    def dynamic(self) -> dict[int, int]:
        """Return PT_DYNAMIC's entries, the first of each tag."""
        entries: dict[int, int] = {}
        header = next((ph for ph in self.program_headers if ph.p_type == _PT_DYNAMIC), None)
        if header is None:
            return entries
        table = self.file.take(header.p_offset, header.p_filesz, "PT_DYNAMIC")
        for tag, value in _DYN.iter_unpack(table[: table.nbytes // _DYN.size * _DYN.size]):
            if tag == _DT_NULL:
                break
            entries.setdefault(tag, value)
        return entries

    def relocations(self) -> Iterator[tuple[int, int, int]]:
        """Yield (r_offset, r_info, r_addend) of DT_RELA, then of DT_JMPREL."""
        for table, size in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
            address, length = self.dynamic.get(table, 0), self.dynamic.get(size, 0)
            if address and length:
                data = self.at_address(address, length, "relocations")
                yield from _RELA.iter_unpack(data[: data.nbytes // _RELA.size * _RELA.size])

    def at_address(self, address: int, size: int, what: str) -> memoryview:
        """Return file bytes by memory address."""
        for load in self.loads:
            if load.p_vaddr <= address and address + size <= load.p_vaddr + load.p_filesz:
                return self.file.take(load.p_offset + address - load.p_vaddr, size, what)
        raise self.file.bad(0, f"{what}: no segment has {size} bytes at address {address:#x}")

    @cached_property
    def dynamic_symbols(self) -> tuple[Symbol, ...]:
        """Return ``.dynsym`` without its first, empty entry; found by section type."""
        header = next((s.header for s in self.sections if s.header.sh_type == _SHT_DYNSYM), None)
        if header is None:
            return ()
        if header.sh_link >= len(self.sections):
            raise self.file.bad(
                self.header.e_shoff, f".dynsym's names are section {header.sh_link}"
            )
        names = self._contents(self.sections[header.sh_link].header, "dynamic symbol names")
        table = self._contents(header, ".dynsym").view
        symbols = []
        whole = table.nbytes // _SYMBOL.size * _SYMBOL.size
        for name, info, _, index, value, size in _SYMBOL.iter_unpack(table[:whole]):
            symbols.append(
                Symbol(
                    _string(names, name), value, size, index != _SHN_UNDEF, info >> 4 == _STB_WEAK
                )
            )
        return tuple(symbols[1:])

    def symbol(self, name: str) -> Symbol | None:
        """Return the defined dynamic symbol called ``name``."""
        return next((s for s in self.dynamic_symbols if s.is_defined and s.name == name), None)

    def _contents(self, header: SectionHeader, what: str) -> Bytes:
        if header.sh_type == _SHT_NOBITS:
            return self.file.part(0, 0, what)
        return self.file.part(header.sh_offset, header.sh_size, what)


def _string(table: Bytes, offset: int) -> str:
    """Return the NUL-terminated name at ``offset``; an impossible offset gives an empty one."""
    data = bytes(table.view[offset : offset + _NAME_LIMIT])
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
