"""The layout of an enclave from C: image, threads, heap.

=================  ======================  =========  ========
what               pages                   rights     measured
=================  ======================  =========  ========
code               image                   R X        yes
constants          image                   R          yes
data, zeros        image                   R W        yes
per thread:
  guard            1                       none       absent
  stack            ``stack_bytes``         R W        yes
  TCS              1                       TCS        yes
  SSA frames       2 of one page           R W        yes
  thread page      1                       R          yes
guard              1                       none       absent
heap               ``heap_bytes``          R W        no
=================  ======================  =========  ========

The stack of a thread ends where its TCS begins, and its thread page follows its SSA frames: the
runtime computes both addresses from RBX.  A heap is zeros whose content is not measured: EADD
measures only that the pages exist.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from softsgx.arch import PAGE_BYTES
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes, read_bytes
from softsgx.image.blob import Blob, enclave_size, tcs_page
from softsgx.image.csource.compiler import Compiler
from softsgx.image.elf import PF_X, Elf, ProgramHeader
from softsgx.image.flat import page_flags
from softsgx.image.plan import SECINFO_R, Plan

__all__ = ["BuildOptions", "build_enclave", "lay_out"]

_NSSA: Final = 2  # runtime.c computes the address of the thread page from it
_THREAD_PAGE: Final = struct.Struct("<5Q")  # struct thread_page, runtime.c
_RELATIVE: Final = 8  # R_X86_64_RELATIVE, the only relocation that runtime.c applies
_MAX_BYTES: Final = 16 << 30  # each page is measured, which takes 20 µs
_MAX_THREADS: Final = 1024


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The sizes of an enclave from C, besides its code.

    Attributes:
        heap_bytes: size of the heap that all threads share; whole pages.
        stack_bytes: size of each thread's stack; whole pages, at least one.
        threads: number of TCS.

    Raises:
        SoftSgxError: a size is no whole number of pages, or out of range.
    """

    heap_bytes: int = 1 << 20
    stack_bytes: int = 64 << 10
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("heap", 0), ("stack", PAGE_BYTES)):
            size = getattr(self, f"{name}_bytes")
            if size % PAGE_BYTES or not least <= size <= _MAX_BYTES:
                raise SoftSgxError(
                    f"--{name} {size}: invalid size; give whole pages of 4096 bytes, from {least} "
                    "to 16GiB"
                )
        if not 1 <= self.threads <= _MAX_THREADS:
            raise SoftSgxError(f"--threads {self.threads}: out of range; give 1 to {_MAX_THREADS}")


def build_enclave(
    sources: Sequence[Path],
    compiler: Compiler,
    options: BuildOptions | None = None,
    flags: Sequence[str] = (),
    elf: Path | None = None,
) -> Plan:
    """Compile ``sources`` with the runtime and return the enclave's plan.

    The same sources, options, flags and compiler give the same plan in every directory.

    Args:
        sources: C files; one of them has ``ecall``.
        compiler: the compiler.
        options: the sizes.
        flags: further arguments for the compiler; they follow our own.
        elf: path for the linked image with debug information; None: it is not kept.

    Raises:
        SoftSgxError: a source does not compile or link, or needs something that enclaves lack.
    """
    for source in sources:
        if not os.path.isfile(source):
            raise SoftSgxError(f"{source}: no such file; give a C source")
    with tempfile.TemporaryDirectory(prefix="softsgx-") as scratch:
        image = Path(scratch) / "image.elf"
        compiler.enclave(sources, image, flags, debug_info=elf is not None)
        linked = read_bytes(image)
        if elf is not None:
            shutil.copyfile(image, elf)
    return lay_out(Bytes(str(sources[0]), linked.view), options or BuildOptions())


def lay_out(file: Bytes, options: BuildOptions) -> Plan:
    """Return the plan of a linked image, which is position independent and begins at offset 0.

    Raises:
        SoftSgxError: a segment overlaps another, or there is a relocation that the runtime
            does not apply.
    """
    elf = Elf(file)
    blob = Blob()
    for load in elf.loads:
        _add_segment(blob, file, load)
    _require_entry(elf)
    _require_relative(elf)

    size = _size(blob.end, options)
    stack_pages = options.stack_bytes // PAGE_BYTES
    thread_pages = 1 + stack_pages + 1 + _NSSA + 1
    heap = blob.end + (options.threads * thread_pages + 1) * PAGE_BYTES
    for number in range(options.threads):
        blob.gap(1).zeros(stack_pages, label="stack")
        ossa = blob.end + PAGE_BYTES
        page = ossa + _NSSA * PAGE_BYTES
        blob.tcs(tcs_page(ossa=ossa, oentry=elf.header.e_entry, nssa=_NSSA, ogs_base=page))
        blob.zeros(_NSSA, label="SSA")
        assert blob.end == page, f"the thread page belongs at {page:#x}, not {blob.end:#x}"
        page_bytes = _THREAD_PAGE.pack(page, size, heap, options.heap_bytes, number)
        blob.data(page_bytes, flags=SECINFO_R, label="thread page")
    blob.gap(1)
    assert blob.end == heap, f"the heap belongs at {heap:#x}, not {blob.end:#x}"
    return blob.heap(options.heap_bytes // PAGE_BYTES).plan(size)


def _size(image_end: int, options: BuildOptions) -> int:
    """Return the SECS.SIZE that holds the image, the threads and the heap."""
    stack_pages = options.stack_bytes // PAGE_BYTES
    threads = options.threads * (1 + stack_pages + 1 + _NSSA + 1) * PAGE_BYTES
    return enclave_size(image_end + threads + PAGE_BYTES + options.heap_bytes)


def _add_segment(blob: Blob, file: Bytes, load: ProgramHeader) -> None:
    if load.p_memsz == 0:
        return
    if load.p_vaddr % PAGE_BYTES or load.p_vaddr < blob.end:
        raise file.bad(
            load.p_offset, f"segment at {load.p_vaddr:#x}", "segments rise, each on its own pages"
        )
    flags = page_flags(load.p_flags)
    data = file.take(load.p_offset, load.p_filesz, "segment")
    blob.data(data, flags=flags, offset=load.p_vaddr, label="code" if load.p_flags & PF_X else "")
    filled = -(-load.p_filesz // PAGE_BYTES) * PAGE_BYTES
    zeros = -(-load.p_memsz // PAGE_BYTES) * PAGE_BYTES - filled
    blob.zeros(zeros // PAGE_BYTES, flags=flags, offset=load.p_vaddr + filled)


def _require_entry(elf: Elf) -> None:
    entry = elf.header.e_entry
    if not any(
        load.p_flags & PF_X and load.p_vaddr <= entry < load.p_vaddr + load.p_filesz
        for load in elf.loads
    ):
        raise elf.file.bad(24, f"entry point {entry:#x} is in no code", "was it linked by us?")


def _require_relative(elf: Elf) -> None:
    """Refuse relocations that the runtime does not apply."""
    for offset, info, _ in elf.relocations():
        if info != _RELATIVE:
            raise SoftSgxError(
                f"{elf.file.name}: relocation type {info & 0xFFFF_FFFF} at {offset:#x}; an enclave "
                "is linked with nothing else: is a weak symbol left undefined?"
            )
