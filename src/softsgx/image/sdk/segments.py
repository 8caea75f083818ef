"""The pages of an SDK library's segments, by the rules of the SDK's own loader.

Source:
    Intel SGX SDK, psw/urts/loader.cpp and psw/urts/parser/elfparser.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from softsgx.arch import PAGE_BYTES, SecInfoFlags
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.elf import (
    DT_REL,
    DT_TEXTREL,
    ET_DYN,
    PF_R,
    PF_W,
    PF_X,
    Elf,
    ProgramHeader,
)
from softsgx.image.flat import page_flags
from softsgx.image.plan import ZERO, Data, Run, lay

__all__ = [
    "image_runs",
    "require_loadable",
    "require_signable",
    "round_up",
    "writable_text_pages",
]

_RELOCATIONS = frozenset({0, 1, 6, 7, 8, 16, 17, 18})
_RELOCATION_BYTES = 8
_INIT_SECTION = ".init"
_SHF_EXECINSTR = 4


def round_up(value: int, step: int = PAGE_BYTES) -> int:
    """Return the next multiple of ``step``."""
    return -(-value // step) * step


def require_loadable(elf: Elf) -> None:
    """Refuse a library that the SDK's loader refuses.

    Raises:
        SoftSgxError: it names the first reason.
    """
    file, end = elf.file, 0
    if elf.header.e_type != ET_DYN:
        raise file.bad(16, f"ELF type {elf.header.e_type}", "an enclave is a shared object")
    if not elf.loads:
        raise file.bad(elf.header.e_phoff, "no PT_LOAD segment", "there is nothing to load")
    for load in sorted(elf.loads, key=lambda ph: ph.p_vaddr):
        where = f"segment at {load.p_vaddr:#x}"
        if load.p_align == 0 or load.p_align % PAGE_BYTES:
            raise file.bad(elf.header.e_phoff, f"{where} aligned to {load.p_align:#x}", "need 4096")
        if load.p_vaddr < end:
            raise file.bad(elf.header.e_phoff, f"{where} overlaps the one before, to {end:#x}")
        end = round_up(load.p_vaddr + load.p_memsz, load.p_align)
        if not load.p_flags & (PF_R | PF_W | PF_X):
            raise file.bad(elf.header.e_phoff, f"{where} has no rights", "give it some of R, W, X")
    if DT_REL in elf.dynamic:
        raise SoftSgxError(f"{file.name}: DT_REL relocations; x86-64 uses DT_RELA")
    if elf.section(".ctors") is not None:
        raise SoftSgxError(f"{file.name}: has a section .ctors; use .init_array")
    for symbol in elf.dynamic_symbols:
        if not symbol.is_defined and not symbol.is_weak:
            raise SoftSgxError(
                f"{file.name}: undefined symbol {symbol.name!r}; an enclave is linked with nothing"
            )
    for offset, info, _ in elf.relocations():
        if info & 0xFFFF_FFFF not in _RELOCATIONS:
            raise SoftSgxError(
                f"{file.name}: relocation type {info & 0xFFFF_FFFF} at address {offset:#x}; "
                f"the SDK's loader knows {', '.join(map(str, sorted(_RELOCATIONS)))}"
            )


def require_signable(elf: Elf, *, init: bool = False, text_relocations: bool = False) -> None:
    """Refuse a library that the SDK's signing tool refuses, although its loader does not.

    Args:
        elf: the library.
        init: accept a section ``.init``, whose code an enclave never runs.
        text_relocations: accept relocations of code, which make its pages writable.

    Raises:
        SoftSgxError: the library has one.
    """
    if not init and elf.section(_INIT_SECTION) is not None:
        raise SoftSgxError(
            f"{elf.file.name}: has a section {_INIT_SECTION}, whose code an enclave never runs; "
            "link with -nostartfiles, or sign with --ignore-init-sec-error"
        )
    code = sorted(
        (section.header.sh_addr, section.header.sh_addr + section.header.sh_size, section.name)
        for section in elf.sections
        if section.header.sh_flags & _SHF_EXECINSTR
    )
    if text_relocations or not code:
        return
    starts = [start for start, _, _ in code]
    for offset, _, _ in elf.relocations():
        at = bisect_right(starts, offset) - 1
        if at >= 0 and offset < code[at][1]:
            raise SoftSgxError(
                f"{elf.file.name}: relocation of code, at {offset:#x} in {code[at][2]}; compile "
                "with -fPIC, or sign with --ignore-rel-error"
            )


def writable_text_pages(elf: Elf) -> tuple[int, ...]:
    """Return the rising addresses of pages that text relocations touch; none without DT_TEXTREL."""
    if DT_TEXTREL not in elf.dynamic:
        return ()
    pages: set[int] = set()
    for offset, info, _ in elf.relocations():
        if info & 0xFFFF_FFFF:
            page = offset & -PAGE_BYTES
            pages.add(page)
            if offset % PAGE_BYTES > PAGE_BYTES - _RELOCATION_BYTES:
                pages.add(page + PAGE_BYTES)
    return tuple(sorted(pages))


def image_runs(elf: Elf, contents: Bytes, *, tail_pages: bool, shift: int = 0) -> list[Run]:
    """Return the measured pages of all segments, in program-header order.

    Args:
        elf: the tables of the file on disk.
        contents: its bytes with patches applied.
        tail_pages: add the zero page that loaders of version 1.3 add after some segments.
        shift: added to all addresses.
    """
    runs: list[Run] = []
    last: ProgramHeader | None = None
    marked = writable_text_pages(elf)
    for index, load in enumerate(elf.loads):
        if tail_pages:
            runs += _tail_page(last, load, shift)
        if load.p_memsz:
            runs += _segment(load, contents, marked, f"PT_LOAD {index}", shift)
        if load.p_vaddr and (last is None or load.p_vaddr > last.p_vaddr):
            last = load
    if tail_pages:
        runs += _tail_page(last, None, shift)
    return runs


def _segment(
    load: ProgramHeader, contents: Bytes, marked: tuple[int, ...], label: str, shift: int
) -> list[Run]:
    """Return file pages, zero-filled at both ends, then bss."""
    flags = page_flags(load.p_flags)
    data = contents.take(load.p_offset, load.p_filesz, label)
    runs = lay(load.p_vaddr + shift, data, flags, label=label)
    if not load.p_flags & PF_W and marked:
        runs = [part for run in runs for part in _split_marked(run, marked, shift)]
    begin = round_up(load.p_vaddr + load.p_filesz) if load.p_filesz else load.p_vaddr & -PAGE_BYTES
    pages = (round_up(load.p_vaddr + load.p_memsz) - begin) // PAGE_BYTES
    if pages > 0:
        runs.append(Run(begin + shift, pages, flags, ZERO, label=f"{label} bss"))
    return runs


def _split_marked(run: Run, marked: tuple[int, ...], shift: int) -> list[Run]:
    """Return ``run`` in parts; pages with text relocations are writable."""
    first, behind = (bisect_left(marked, at - shift) for at in (run.offset, run.end))
    parts: list[Run] = []
    start = 0

    def cut(to: int, extra: int) -> None:
        nonlocal start
        if to > start:
            source = run.source
            if isinstance(source, Data):
                source = Data(source.view[start * PAGE_BYTES : to * PAGE_BYTES])
            at = run.offset + start * PAGE_BYTES
            parts.append(Run(at, to - start, run.flags | extra, source, run.mask, run.label))
        start = to

    for page in marked[first:behind]:
        index = (page + shift - run.offset) // PAGE_BYTES
        cut(index, 0)
        cut(index + 1, SecInfoFlags.W.value)
    cut(run.pages, 0)
    return parts


def _tail_page(
    last: ProgramHeader | None, following: ProgramHeader | None, shift: int
) -> list[Run]:
    """Return the zero page that loaders of version 1.3 add after ``last``, if there is one.

    They round the size of a segment and add its address, where they should round its end.
    """
    if last is None:
        return []
    end = round_up(last.p_vaddr + last.p_memsz)
    if end >= round_up(round_up(last.p_memsz) + last.p_vaddr):
        return []
    if following is not None and end >= following.p_vaddr & -PAGE_BYTES:
        return []
    return [Run(end + shift, 1, page_flags(last.p_flags), ZERO, label="1.3 tail page")]
