"""Makes small ELF files with exactly the oddities that a test asks for."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from softsgx.image.elf import PF_R, PF_W, PF_X, ElfHeader, ProgramHeader, SectionHeader

RX, RW, R = PF_R | PF_X, PF_R | PF_W, PF_R
PT_LOAD, PT_DYNAMIC, PT_TLS = 1, 2, 7
SHT_PROGBITS, SHT_STRTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS, SHT_DYNSYM = 1, 3, 4, 7, 8, 11


@dataclass
class Seg:
    vaddr: int
    data: bytes
    flags: int = RX
    memsz: int | None = None
    align: int = 0x1000
    offset: int | None = None


@dataclass
class Sec:
    name: str
    data: bytes = b""
    kind: int = SHT_PROGBITS
    addr: int = 0
    link: int = 0
    align: int = 1
    entsize: int = 0
    in_segment: bool = False
    size: int | None = None
    flags: int = 0


@dataclass
class Sym:
    name: str
    value: int = 0
    size: int = 8
    defined: bool = True
    weak: bool = False


@dataclass
class Made:
    data: bytes
    offsets: dict[str, int] = field(default_factory=dict)


def make_elf(
    segments: list[Seg],
    sections: list[Sec] | None = None,
    *,
    symbols: list[Sym] | None = None,
    dynamic: list[tuple[int, int]] | None = None,
    dynamic_at: int = 0,
    tls: ProgramHeader | None = None,
    entry: int = 0x1000,
    e_type: int = 3,
) -> Made:
    """Return the file: header, program headers, segments at offset ≡ vaddr, sections, table."""
    out = bytearray(0x1000)
    headers: list[ProgramHeader] = []
    offsets: dict[str, int] = {}
    for seg in segments:
        at = seg.offset
        if at is None:
            at = -(-len(out) // 0x1000) * 0x1000 + seg.vaddr % 0x1000
        out.extend(bytes(max(0, at + len(seg.data) - len(out))))
        out[at : at + len(seg.data)] = seg.data
        memsz = len(seg.data) if seg.memsz is None else seg.memsz
        headers.append(
            ProgramHeader(
                p_type=PT_LOAD,
                p_flags=seg.flags,
                p_offset=at,
                p_vaddr=seg.vaddr,
                p_filesz=len(seg.data),
                p_memsz=memsz,
                p_align=seg.align,
            )
        )
        offsets[f"seg{len(headers) - 1}"] = at
    loads = list(headers)

    def offset_of(addr: int) -> int:
        for ph in loads:
            if ph.p_vaddr <= addr < ph.p_vaddr + ph.p_filesz:
                offset: int = ph.p_offset + addr - ph.p_vaddr
                return offset
        raise AssertionError(f"{addr:#x} in no segment")

    if dynamic is not None:
        table = b"".join(struct.pack("<QQ", *entry) for entry in [*dynamic, (0, 0)])
        at = offset_of(dynamic_at)
        out[at : at + len(table)] = table
        headers.append(
            ProgramHeader(
                p_type=PT_DYNAMIC,
                p_flags=RW,
                p_offset=at,
                p_vaddr=dynamic_at,
                p_filesz=len(table),
                p_memsz=len(table),
            )
        )
    if tls is not None:
        headers.append(tls)

    all_sections = list(sections or [])
    if symbols is not None:
        names, syms = bytearray(b"\0"), bytearray(24)
        for sym in symbols:
            syms += struct.pack(
                "<IBBHQQ",
                len(names),
                (2 if sym.weak else 1) << 4 | 1,
                0,
                1 if sym.defined else 0,
                sym.value,
                sym.size,
            )
            names += sym.name.encode() + b"\0"
        strtab = len(all_sections) + 2
        all_sections.append(
            Sec(".dynsym", bytes(syms), SHT_DYNSYM, link=strtab, align=8, entsize=24)
        )
        all_sections.append(Sec(".dynstr", bytes(names), SHT_STRTAB))
    if all_sections:
        names = bytearray(b"\0")
        shdrs = [SectionHeader()]
        for sec in [*all_sections, Sec(".shstrtab", kind=SHT_STRTAB)]:
            name_at = len(names)
            names += sec.name.encode() + b"\0"
            data = bytes(names) if sec.name == ".shstrtab" else sec.data
            if sec.in_segment:
                at = offset_of(sec.addr)
                out[at : at + len(data)] = data
            elif sec.kind == SHT_NOBITS:
                at = len(out)
            else:
                out.extend(bytes(-len(out) % max(1, sec.align)))
                at = len(out)
                out.extend(data)
            offsets[sec.name] = at
            shdrs.append(
                SectionHeader(
                    sh_name=name_at,
                    sh_type=sec.kind,
                    sh_flags=sec.flags,
                    sh_addr=sec.addr,
                    sh_offset=at,
                    sh_size=len(data) if sec.size is None else sec.size,
                    sh_link=sec.link,
                    sh_addralign=sec.align,
                    sh_entsize=sec.entsize,
                )
            )
        out.extend(bytes(-len(out) % 8))
        shoff = len(out)
        out.extend(b"".join(shdr.pack() for shdr in shdrs))
    else:
        shoff, shdrs = 0, []
    header = ElfHeader(
        e_type=e_type,
        e_entry=entry,
        e_phoff=64 if headers else 0,
        e_shoff=shoff,
        e_phnum=len(headers),
        e_shnum=len(shdrs),
        e_shstrndx=max(0, len(shdrs) - 1),
    )
    out[:64] = header.pack()
    table = b"".join(ph.pack() for ph in headers)
    assert 64 + len(table) <= 0x1000, "program headers fit the first page"
    out[64 : 64 + len(table)] = table
    return Made(bytes(out), offsets)


def note_section(descsz: int = 0x6000, align: int = 4) -> Sec:
    """Return an empty metadata note: 13 bytes of name, no padding behind it."""
    body = struct.pack("<III", 13, descsz, 1) + b"sgx_metadata\0" + bytes(descsz)
    body += bytes(-len(body) % align)
    return Sec(".note.sgxmeta", body, SHT_NOTE, align=align)
