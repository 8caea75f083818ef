"""Writing metadata: laying out an unsigned SDK library, and putting a SIGSTRUCT into every block.

Deviation: the signer's patch of ``g_global_data`` needs the runtime's own thread-data template,
which is not in the file's tables; it is written only when its bytes are given.

Source:
    Intel SGX SDK, sdk/sign_tool/SignTool/manage_metadata.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from softsgx.arch import (
    PAGE_BYTES,
    SIGSTRUCT_HEADER,
    Attributes,
    AttributesFlags,
    MiscSelect,
    SigStruct,
    Tcs,
    Xfrm,
)
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.blob import enclave_size
from softsgx.image.elf import Elf
from softsgx.image.plan import SECINFO_RW, SECINFO_TCS
from softsgx.image.sdk.layout import EADD, EEXTEND, GROW_DOWN, POST_ADD, POST_REMOVE
from softsgx.image.sdk.metadata import (
    DATA_AT_2_DIRS,
    DATA_AT_4_DIRS,
    SIGSTRUCT_AT,
    Block,
    BlockHeader,
    Directory,
    Elrange,
    Extend,
    LayoutEntry,
    LayoutGroup,
    Patch,
    metadata_area,
    read_blocks,
)
from softsgx.image.sdk.segments import require_loadable, round_up

__all__ = [
    "IN_DATA",
    "TCS_TEMPLATE_BYTES",
    "BlockSpec",
    "SdkLayout",
    "blocks_for",
    "embed_sigstruct",
    "lay_out_sdk",
    "tcs_template",
    "write_blocks",
]

TCS_TEMPLATE_BYTES = 72
_STACK_WORD = 0xCCCC_CCCC
_GUARD_PAGES = 16
_MOST_THREADS = 1 << 12
_ENTRY_SYMBOL = "enclave_entry"
_TAIL_PAGE_VERSION = (1, 3)
_E_SHOFF, _E_SHNUM = 40, 60
_ATTRIBUTES_AT = BlockHeader.OFFSETS["attributes"]
_GUARD, _HEAP_MIN, _HEAP_INIT, _HEAP_MAX = 10, 1, 2, 3
_TCS, _TD, _SSA, _STACK_MAX, _STACK_MIN = 4, 5, 6, 7, 8
_THREAD_GROUP = 4096 + 9


@dataclass(frozen=True, kw_only=True)
class SdkLayout:
    """What an SDK configuration file says about memory; all sizes in pages.

    Attributes:
        threads: TCS pages.
        stack_min: pages of each stack added at build time whatever the runtime.
        stack_max: pages of each stack.
        heap_min: pages that are always there.
        heap_init: pages there at start, ``heap_min`` of them included.
        heap_max: pages there may be; more than ``heap_init`` needs run-time paging.
        ssa_frame_size: pages.
        unbound: whether any thread may use any TCS.
        run_time_blocks: also write a block for runtimes with run-time paging.
        fallback_block: also write a block for runtimes without.
        desired_misc_select: MISCSELECT wished for beyond the SIGSTRUCT's.
        versions: of the block for run-time paging, and of the other.
        global_data: bytes for the variable ``g_global_data``; not written when empty.
    """

    threads: int = 1
    stack_min: int = 2
    stack_max: int = 64
    heap_min: int = 1
    heap_init: int = 4096
    heap_max: int = 4096
    ssa_frame_size: int = 1
    unbound: bool = True
    run_time_blocks: bool = True
    fallback_block: bool = True
    versions: tuple[tuple[int, int], tuple[int, int]] = ((3, 3), (1, 5))
    desired_misc_select: int = 0
    global_data: bytes = b""

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other.

        Raises:
            SoftSgxError: naming the first that does.
        """
        ordered = (
            ("stack", 0 < self.stack_min <= self.stack_max),
            ("heap", 0 < self.heap_min <= self.heap_init <= self.heap_max),
            ("threads", 0 < self.threads <= _MOST_THREADS),
            ("SSA frame size", 0 < self.ssa_frame_size <= 4),
        )
        for name, ok in ordered:
            if not ok:
                raise SoftSgxError(f"sign: {name}: sizes are positive, and minimum <= maximum")


def blocks_for(miscselect: int, misc_mask: int) -> tuple[bool, bool]:
    """Return whether a signer writes a block for run-time paging, and one for runtimes without.

    Run-time paging needs MISCSELECT.EXINFO, to learn where an enclave faulted.  When the mask
    leaves that open, both kinds of runtime can load the enclave.
    """
    exinfo, compared = miscselect & MiscSelect.EXINFO, misc_mask & MiscSelect.EXINFO
    return bool(exinfo), not exinfo or not compared


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One block to be written.

    Attributes:
        version: major and minor.
        layout: its table; ``content_offset`` counts from the start of ``data``, with bit 31 set
            to tell it from none.
        data: what the table points to.
        patches: offset in the file, and the bytes to put there.
        elrange: only with majors 11 to 13.
        extends: id and payload of entries of the EXTEND directory.
    """

    version: tuple[int, int]
    enclave_size: int
    layout: Sequence[LayoutEntry | LayoutGroup]
    data: bytes = b""
    patches: Sequence[tuple[int, bytes]] = ()
    elrange: Elrange | None = None
    extends: Sequence[tuple[int, bytes]] = ()
    tcs_policy: int = 1
    tcs_min_pool: int = 1
    ssa_frame_size: int = 1
    max_save_buffer_size: int = 2632
    desired_misc_select: int = 0
    attributes: Attributes = field(
        default_factory=lambda: Attributes(flags=AttributesFlags.MODE64BIT.value, xfrm=0xE7)
    )


IN_DATA = 1 << 31
"""Marks a ``content_offset`` that counts from the start of a specification's data."""


def tcs_template(*, oentry: int, ssa_frame_size: int, thread_data: int, flags: int = 0) -> bytes:
    """Return the first bytes of a TCS whose three addresses count from the TCS itself.

    Args:
        oentry: the entry point, from the image's base.
        ssa_frame_size: pages; two frames follow the TCS.
        thread_data: bytes from the TCS to the thread data.
        flags: TCS.FLAGS.
    """
    assert ssa_frame_size > 0, "a frame has at least a page"
    return Tcs(
        flags=flags,
        ossa=PAGE_BYTES,
        nssa=2,
        oentry=oentry,
        ofs_base=thread_data,
        ogs_base=thread_data,
        fs_limit=0xFFFF_FFFF,
        gs_limit=0xFFFF_FFFF,
    ).pack()[:TCS_TEMPLATE_BYTES]


def write_blocks(file: Bytes, specs: Sequence[BlockSpec]) -> bytes:
    """Return the library with these metadata blocks, and nothing else, in its note.

    Raises:
        SoftSgxError: it has no note, or one too small.
    """
    area = metadata_area(Elf(file))
    content = b"".join(_block_bytes(spec) for spec in specs)
    if len(content) > len(area):
        raise area.bad(0, f"{len(content)} bytes of metadata for {len(area)} of note", "link more")
    copy = bytearray(file.view)
    start = area.origin - file.origin
    copy[start : start + len(area)] = content.ljust(len(area), b"\0")
    return bytes(copy)


def embed_sigstruct(file: Bytes, sigstruct: SigStruct) -> bytes:
    """Return the library with ``sigstruct`` in every metadata block.

    A block's own ATTRIBUTES follow it: they tell the loader which XFRM bits it may set.
    """
    blocks = read_blocks(metadata_area(Elf(file)))
    if not blocks:
        raise SoftSgxError(f"{file.name}: no metadata block to put a SIGSTRUCT in")
    free = ~sigstruct.attribute_mask.xfrm & sum(Xfrm)
    may_set = Attributes(
        flags=sigstruct.attributes.flags, xfrm=sigstruct.attributes.xfrm | free
    ).pack()
    copy = bytearray(file.view)
    for block in blocks:
        at = block.bytes.origin - file.origin
        for offset, data in ((_ATTRIBUTES_AT, may_set), (SIGSTRUCT_AT, sigstruct.pack())):
            copy[at + offset : at + offset + len(data)] = data
    return bytes(copy)


def lay_out_sdk(file: Bytes, layout: SdkLayout) -> bytes:
    """Return an unsigned library with metadata for ``layout``, its SIGSTRUCT still blank.

    Raises:
        SoftSgxError: it has metadata, or no room for it, or is not loadable.
    """
    elf = Elf(file)
    if read_blocks(metadata_area(elf)):
        raise SoftSgxError(f"{file.name}: has metadata already; sign it again as it is")
    require_loadable(elf)
    return write_blocks(file, _specs(elf, layout))


def _specs(elf: Elf, layout: SdkLayout) -> list[BlockSpec]:
    """Return the blocks that a signer of the SDK would write."""
    highest = max(elf.loads, key=lambda load: load.p_vaddr)
    behind = round_up(highest.p_vaddr + highest.p_memsz)
    if _TAIL_PAGE_VERSION in layout.versions:
        behind = round_up(round_up(highest.p_memsz) + highest.p_vaddr)
    table, end = _table(behind, layout, _tls_pages(elf))
    size = enclave_size(end + _GUARD_PAGES * PAGE_BYTES)
    table.append(_item(_GUARD, 0, end, (size - end) // PAGE_BYTES, 0))
    entry = elf.symbol(_ENTRY_SYMBOL)
    tcs_to_td = (1 + 2 * layout.ssa_frame_size + _GUARD_PAGES + _tls_pages(elf)) * PAGE_BYTES
    newer = BlockSpec(
        version=layout.versions[0],
        enclave_size=size,
        layout=table,
        data=tcs_template(
            oentry=entry.value if entry else elf.header.e_entry,
            ssa_frame_size=layout.ssa_frame_size,
            thread_data=tcs_to_td,
        ),
        patches=_patches(elf, layout),
        tcs_policy=int(layout.unbound),
        desired_misc_select=layout.desired_misc_select,
        ssa_frame_size=layout.ssa_frame_size,
    )
    older = replace(newer, version=layout.versions[1], layout=[_without_edmm(i) for i in table])
    dynamic = layout.heap_max > layout.heap_init
    specs = []
    if layout.run_time_blocks and dynamic:
        specs.append(newer)
    if layout.fallback_block or not specs:
        specs.append(older)
    return specs


def _table(
    at: int, layout: SdkLayout, tls_pages: int
) -> tuple[list[LayoutEntry | LayoutGroup], int]:
    """Return heap, first thread and the group of the others, and where they end."""
    table: list[LayoutEntry | LayoutGroup] = []

    def add(item_id: int, attributes: int, pages: int, flags: int, word: int = 0) -> None:
        nonlocal at
        if pages:
            table.append(_item(item_id, attributes, at, pages, flags, word))
            at += pages * PAGE_BYTES

    add(_HEAP_MIN, EADD, layout.heap_min, SECINFO_RW)
    add(_HEAP_INIT, EADD | POST_REMOVE, layout.heap_init - layout.heap_min, SECINFO_RW)
    add(_HEAP_MAX, POST_ADD, layout.heap_max - layout.heap_init, SECINFO_RW)
    first, start = len(table), at
    measured = EADD | EEXTEND
    add(_GUARD, 0, _GUARD_PAGES, 0)
    more_stack = layout.stack_max - layout.stack_min
    add(_STACK_MAX, measured | GROW_DOWN, more_stack, SECINFO_RW, _STACK_WORD)
    add(_STACK_MIN, measured, layout.stack_min, SECINFO_RW, _STACK_WORD)
    add(_GUARD, 0, _GUARD_PAGES, 0)
    table.append(
        LayoutEntry(
            item_id=_TCS,
            attributes=measured,
            page_count=1,
            rva=at,
            content_size=TCS_TEMPLATE_BYTES,
            content_offset=IN_DATA,
            si_flags=SECINFO_TCS,
        )
    )
    at += PAGE_BYTES
    add(_SSA, measured, 2 * layout.ssa_frame_size, SECINFO_RW)
    add(_GUARD, 0, _GUARD_PAGES, 0)
    add(_TD, measured, 1 + tls_pages, SECINFO_RW)
    if layout.threads > 1:
        step = at - start
        table.append(
            LayoutGroup(
                item_id=_THREAD_GROUP,
                entry_count=len(table) - first,
                load_times=layout.threads - 1,
                load_step=step,
            )
        )
        at += step * (layout.threads - 1)
    return table, at


def _item(
    item_id: int, attributes: int, rva: int, pages: int, flags: int, word: int = 0
) -> LayoutEntry:
    return LayoutEntry(
        item_id=item_id,
        attributes=attributes,
        page_count=pages,
        rva=rva,
        content_size=word,
        si_flags=flags,
    )


def _without_edmm(item: LayoutEntry | LayoutGroup) -> LayoutEntry | LayoutGroup:
    """Return the item for runtimes without run-time paging: what would come later never comes."""
    if isinstance(item, LayoutGroup) or not item.attributes & POST_ADD:
        return item
    return item.replace(attributes=item.attributes & ~POST_ADD, si_flags=0)


def _tls_pages(elf: Elf) -> int:
    tls = elf.tls
    if tls is None:
        return 0
    return round_up(round_up(tls.p_memsz, max(1, tls.p_align))) // PAGE_BYTES


def _patches(elf: Elf, layout: SdkLayout) -> list[tuple[int, bytes]]:
    """Return zeros over the section table's fields, and ``g_global_data`` if it is given."""
    patches = [(_E_SHOFF, bytes(8)), (_E_SHNUM, bytes(4))]
    if layout.global_data:
        symbol = elf.symbol("g_global_data") or elf.symbol("g_global_data_sim")
        if symbol is None or symbol.size < len(layout.global_data):
            raise SoftSgxError(
                f"{elf.file.name}: no variable g_global_data of {len(layout.global_data)} bytes"
            )
        for load in elf.loads:
            if load.p_vaddr <= symbol.value < load.p_vaddr + load.p_filesz:
                at = symbol.value - load.p_vaddr + load.p_offset
                return [(at, layout.global_data), *patches]
        raise SoftSgxError(f"{elf.file.name}: g_global_data is not in the file's bytes")
    return patches


def _block_bytes(spec: BlockSpec) -> bytes:
    """Return one block: header, directories, data, tables."""
    major, minor = spec.version
    header = BlockHeader(
        version=major << 32 | minor,
        tcs_policy=spec.tcs_policy,
        ssa_frame_size=spec.ssa_frame_size,
        max_save_buffer_size=spec.max_save_buffer_size,
        desired_misc_select=spec.desired_misc_select,
        tcs_min_pool=spec.tcs_min_pool,
        enclave_size=spec.enclave_size,
        attributes=spec.attributes,
        enclave_css=SigStruct(header=SIGSTRUCT_HEADER),
    )
    four = Block(Bytes("", b""), header).has_extend_directory or spec.elrange is not None
    start = DATA_AT_4_DIRS if four else DATA_AT_2_DIRS
    body = bytearray(spec.data)

    def put(data: bytes) -> Directory:
        body.extend(bytes(-len(body) % 8))
        at = start + len(body)
        body.extend(data)
        return Directory(offset=at, size=len(data)) if data else Directory()

    patches = [
        Patch(dst=dst, src=put(data).offset, size=len(data)) for dst, data in spec.patches if data
    ]
    extends = [
        Extend(extend_id=kind, size=len(data), offset=put(data).offset)
        for kind, data in spec.extends
    ]
    header.dir_patch = put(b"".join(patch.pack() for patch in patches))
    header.dir_layout = put(b"".join(_placed(item, start).pack() for item in spec.layout))
    elrange = put(spec.elrange.pack()) if spec.elrange else Directory()
    extend = put(b"".join(entry.pack() for entry in extends))
    body.extend(bytes(-len(body) % 8))
    header.size = start + len(body)
    directories = elrange.pack() + extend.pack() if four else b""
    return header.pack() + directories + bytes(body)


def _placed(item: LayoutEntry | LayoutGroup, start: int) -> LayoutEntry | LayoutGroup:
    """Return the item with its content offset counted from the block's start."""
    if isinstance(item, LayoutEntry) and item.content_offset & IN_DATA:
        return item.replace(content_offset=start + item.content_offset - IN_DATA)
    return item
