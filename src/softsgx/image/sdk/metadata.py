"""The metadata of a signed Intel SDK library: note, blocks, tables.

A file has one or more adjacent *blocks* in its section ``.note.sgxmeta``.  All describe the same
enclave, each for loaders of other versions.  Version 1.x has no run-time paging; 2.x and 3.x have
it; 11.x to 13.x are the same with an ELRANGE directory.

Source:
    Intel SGX SDK, common/inc/internal/metadata.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from softsgx.arch import Attributes, SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.elf import Elf
from softsgx.layout import U16, U32, U64, Nested, Raw, Structure, at

__all__ = [
    "DATA_AT_2_DIRS",
    "DATA_AT_4_DIRS",
    "ELRANGE_MAJORS",
    "EXTEND_MODULE",
    "EXTEND_SIGNATURE",
    "MAX_BLOCKS",
    "METADATA_MAGIC",
    "NOTE_NAME",
    "NOTE_SECTION",
    "SIGSTRUCT_AT",
    "Block",
    "BlockHeader",
    "Directory",
    "Elrange",
    "Extend",
    "LayoutEntry",
    "LayoutGroup",
    "ModuleExtension",
    "Patch",
    "choose_block",
    "metadata_area",
    "read_blocks",
    "version_text",
]

METADATA_MAGIC = 0x86A80294635D0E4C
NOTE_SECTION = ".note.sgxmeta"
NOTE_NAME = b"sgx_metadata\0"
_NOTE_TYPE = 1
_SHT_NOTE = 7
_NOTE_HEADER_BYTES = 12
SIGSTRUCT_AT = 64
DATA_AT_2_DIRS, DATA_AT_4_DIRS = 1888, 1904
EXTEND_SIGNATURE, EXTEND_MODULE = 0x1001, 0x1002
MAX_BLOCKS = 4
"""The most blocks that the reader accepts; signers write at most three."""
_GROUP_BIT = 1 << 12
ELRANGE_MAJORS = 10


class Directory(Structure, size=8):
    """Where a table is, in bytes from the block's start."""

    offset: int = at(0, U32)
    size: int = at(4, U32)


class BlockHeader(Structure, size=1888):
    """The fixed part of a block, up to the directories that every version has.

    Attributes:
        version: minor in bits 31:0, major in 63:32.
        size: bytes of the block, this header included.
        tcs_policy: 0 a TCS is bound to a thread, 1 it is not.
        ssa_frame_size: pages.
        max_save_buffer_size: bytes of XSAVE area that the signer assumed.
        desired_misc_select: MISCSELECT bits that the enclave asks for beyond the SIGSTRUCT's.
        tcs_min_pool: threads that the runtime creates at start.
        attributes: FLAGS, and every XFRM bit that the loader may set.
    """

    magic_num: int = at(0, U64, default=METADATA_MAGIC)
    version: int = at(8, U64)
    size: int = at(16, U32)
    tcs_policy: int = at(20, U32)
    ssa_frame_size: int = at(24, U32)
    max_save_buffer_size: int = at(28, U32)
    desired_misc_select: int = at(32, U32)
    tcs_min_pool: int = at(36, U32)
    enclave_size: int = at(40, U64)
    attributes: Attributes = at(48, Nested(Attributes))
    enclave_css: SigStruct = at(SIGSTRUCT_AT, Nested(SigStruct))
    dir_patch: Directory = at(1872, Nested(Directory))
    dir_layout: Directory = at(1880, Nested(Directory))


class LayoutEntry(Structure, size=32):
    """Pages after the image: heap, stacks, threads, guards.

    Attributes:
        item_id: the signer's number for them; the numbering changed, so for output only.
        attributes: EADD 1, EEXTEND 2, EREMOVE 4, POST_ADD 8, POST_REMOVE 16, DYN_THREAD 32,
            GROW_DOWN 64.
        rva: from the image's base.
        content_size: bytes at ``content_offset``; if the offset is 0, the 32-bit word that fills
            the pages.
    """

    item_id: int = at(0, U16)
    attributes: int = at(2, U16)
    page_count: int = at(4, U32)
    rva: int = at(8, U64)
    content_size: int = at(16, U32)
    content_offset: int = at(20, U32)
    si_flags: int = at(24, U64)


class LayoutGroup(Structure, size=32):
    """Repeats the entries before it.

    Attributes:
        entry_count: how many of them.
        load_times: the number of further copies.
        load_step: bytes between two copies.
    """

    item_id: int = at(0, U16)
    entry_count: int = at(2, U16)
    load_times: int = at(4, U32)
    load_step: int = at(8, U64)
    reserved: bytes = at(16, Raw(16))


class Patch(Structure, size=32):
    """Bytes to copy over the file before it is laid out.

    Attributes:
        dst: offset in the file.
        src: offset in the block.
    """

    dst: int = at(0, U64)
    src: int = at(8, U32)
    size: int = at(12, U32)
    reserved: bytes = at(16, Raw(16))


class Elrange(Structure, size=24):
    """An enclave range that is larger than the image and begins elsewhere."""

    enclave_image_address: int = at(0, U64)
    elrange_start_address: int = at(8, U64)
    elrange_size: int = at(16, U64)


class Extend(Structure, size=16):
    """One entry of the EXTEND directory."""

    extend_id: int = at(0, U32)
    size: int = at(4, U32)
    offset: int = at(8, U32)
    reserved: int = at(12, U32)


class ModuleExtension(Structure, size=32):
    """A second shared object at the end of the file."""

    file_offset: int = at(0, U64)
    mem_offset: int = at(8, U64)
    size: int = at(16, U64)
    reserved: int = at(24, U64)


def version_text(version: int) -> str:
    """Return ``major.minor``."""
    return f"{version >> 32}.{version & 0xFFFF_FFFF}"


@dataclass(frozen=True)
class Block:
    """One block; each method reads and checks its table when it is called.

    Attributes:
        bytes: the bytes of the block alone.
        header: its fixed part.
    """

    bytes: Bytes = field(repr=False)
    header: BlockHeader = field(repr=False)

    @property
    def major(self) -> int:
        """Return the major version as stored."""
        return self.header.version >> 32

    @property
    def minor(self) -> int:
        """Return the minor version."""
        return self.header.version & 0xFFFF_FFFF

    @property
    def family(self) -> int:
        """Return the major version without the mark for an ELRANGE: 1, 2 or 3."""
        return self.major % ELRANGE_MAJORS

    @property
    def version(self) -> str:
        """Return ``major.minor``."""
        return version_text(self.header.version)

    @property
    def has_extend_directory(self) -> bool:
        """Return whether bytes 1896 to 1903 are a directory; they are data in older versions."""
        return (self.family == 1 and self.minor >= 5) or (self.family == 3 and self.minor >= 2)

    def patches(self) -> list[Patch]:
        """Return the PATCH table."""
        return [Patch.unpack(item) for item in self._items(self.header.dir_patch, "PATCH", 32)]

    def layout(self) -> list[LayoutEntry | LayoutGroup]:
        """Return the LAYOUT table."""
        table: list[LayoutEntry | LayoutGroup] = []
        for item in self._items(self.header.dir_layout, "LAYOUT", 32):
            is_group = struct.unpack_from("<H", item)[0] & _GROUP_BIT
            table.append(LayoutGroup.unpack(item) if is_group else LayoutEntry.unpack(item))
        return table

    def elrange(self) -> Elrange | None:
        """Return the ELRANGE entry of a block whose version says that it has one."""
        if self.major <= ELRANGE_MAJORS:
            return None
        directory = self.bytes.structure(Directory, DATA_AT_2_DIRS, "ELRANGE directory")
        items = self._items(directory, "ELRANGE", Elrange.SIZE)
        if len(items) != 1:
            raise self.bytes.bad(DATA_AT_2_DIRS, f"{len(items)} ELRANGE entries", "there is one")
        return Elrange.unpack(items[0])

    def extends(self) -> list[Extend]:
        """Return the EXTEND table."""
        if not self.has_extend_directory:
            return []
        directory = self.bytes.structure(Directory, DATA_AT_2_DIRS + 8, "EXTEND directory")
        return [Extend.unpack(item) for item in self._items(directory, "EXTEND", Extend.SIZE)]

    def content(self, offset: int, size: int, what: str) -> memoryview:
        """Return data that a table points to."""
        return self.bytes.take(offset, size, f"{what} of metadata {self.version}")

    def _items(self, directory: Directory, what: str, item_bytes: int) -> list[memoryview]:
        if directory.offset == directory.size == 0:
            return []
        table = self.bytes.take(directory.offset, directory.size, f"{what} table")
        if table.nbytes % item_bytes:
            raise self.bytes.bad(
                directory.offset,
                f"{what} table of {table.nbytes} bytes",
                f"items have {item_bytes}",
            )
        return [table[i : i + item_bytes] for i in range(0, table.nbytes, item_bytes)]


def metadata_area(elf: Elf) -> Bytes:
    """Return the content of the metadata note.

    Raises:
        SoftSgxError: there is no such section, or its note has another form.
    """
    header = elf.section(NOTE_SECTION)
    file = elf.file
    if header is None:
        raise SoftSgxError(
            f"{file.name}: no section {NOTE_SECTION}; not a library of the Intel SDK"
        )
    start, align = header.sh_offset, max(1, header.sh_addralign)
    namesz = file.u32(start, "note name size")
    descsz = file.u32(start + 4, "note size")
    kind = file.u32(start + 8, "note type")
    if header.sh_type != _SHT_NOTE or kind != _NOTE_TYPE or namesz != len(NOTE_NAME):
        raise file.bad(
            start, f"section type {header.sh_type}, note type {kind}, name of {namesz} bytes"
        )
    name = bytes(file.take(start + _NOTE_HEADER_BYTES, namesz, "note name"))
    if name != NOTE_NAME:
        raise file.bad(start + _NOTE_HEADER_BYTES, f"note name {name!r}", "want 'sgx_metadata'")
    used = _NOTE_HEADER_BYTES + namesz + descsz
    if header.sh_size != -(-used // align) * align:
        raise file.bad(
            start,
            f"section of {header.sh_size} bytes holds a note of {used}",
            f"the SDK's loader wants it padded to its alignment of {align}, and no further",
        )
    # The name has no padding, although ELF requires it for notes.
    return file.part(start + _NOTE_HEADER_BYTES + namesz, descsz, "metadata")


def read_blocks(area: Bytes) -> list[Block]:
    """Return the blocks of a metadata area in file order.

    Raises:
        SoftSgxError: a block is cut short or names an impossible size.
    """
    blocks: list[Block] = []
    start = 0
    while start + 8 <= len(area) and area.u64(start, "magic") == METADATA_MAGIC:
        size = area.u32(start + 16, "block size")
        if size < BlockHeader.SIZE:
            raise area.bad(
                start + 16, f"block size {size}", f"a block has {BlockHeader.SIZE} bytes or more"
            )
        part = area.part(start, size, "metadata block")
        blocks.append(Block(part, part.structure(BlockHeader, 0, "metadata block")))
        start += size
        if len(blocks) > MAX_BLOCKS:
            raise area.bad(start, "more blocks than any signer writes", f"{MAX_BLOCKS} are taken")
    return blocks


def choose_block(
    blocks: Sequence[Block],
    *,
    newest_major: int = 3,
    sgx2: bool = True,
    driver_edmm: bool = True,
    simulation: bool = False,
    takes_2x: bool = False,
) -> Block | None:
    """Return the block that an untrusted runtime would use.

    Args:
        blocks: in file order.
        newest_major: the newest major version that the runtime knows.
        sgx2: whether the processor reports SGX2.
        driver_edmm: whether the driver passes the runtime's probe for run-time paging.
        simulation: whether the runtime is one of simulation mode.
        takes_2x: whether the runtime is older than 2.18; later ones skip 2.x.
    """
    limit = newest_major if sgx2 and driver_edmm and not simulation else min(1, newest_major)
    usable = [b for b in blocks if b.family <= limit and (takes_2x or b.family != 2)]
    return max(usable, key=lambda block: block.header.version, default=None)
