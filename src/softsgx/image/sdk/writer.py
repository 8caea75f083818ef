"""Writing metadata: laying out an unsigned SDK library, and storing a SIGSTRUCT in every block.

Deviation: the writer fills in ``g_global_data`` for libraries of SDK 2.13 and later.  It measures
and signs other libraries, too, but without the variable their runtime does not find its heap.

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
    SigStruct,
    Tcs,
    TcsFlags,
    Xfrm,
)
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.blob import enclave_size
from softsgx.image.elf import Elf
from softsgx.image.plan import LARGEST_SECS_SIZE
from softsgx.image.sdk.global_data import GlobalData
from softsgx.image.sdk.metadata import (
    DATA_AT_2_DIRS,
    DATA_AT_4_DIRS,
    ELRANGE_MAJORS,
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
from softsgx.image.sdk.segments import require_loadable, require_signable, round_up
from softsgx.image.sdk.settings import SdkLayout
from softsgx.image.sdk.tables import (
    IN_DATA,
    TCS,
    TCS_TEMPLATE_BYTES,
    TD,
    Item,
    guard,
    layout_table,
    static_table,
    user_region_pages,
)

__all__ = [
    "BlockSpec",
    "embed_sigstruct",
    "lay_out_sdk",
    "sdk_runtime_is_known",
    "tcs_template",
    "write_blocks",
]

_ENTRY_SYMBOL = "enclave_entry"
_NEWEST_VERSIONS = ((3, 3), (1, 5))
_MOST_GUARD_PAGES = (1 << 32) - 1
_NEWEST_MINOR, _DESIRED_MISC_SINCE = 29, 22
_TAIL_PAGE_VERSION = (1, 3)
_E_SHOFF, _E_SHNUM, _E_SHSTRNDX = 40, 60, 62
_ATTRIBUTES_AT = BlockHeader.OFFSETS["attributes"]


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The content of one block.

    Attributes:
        version: major and minor.
        layout: its table; ``content_offset`` counts from the start of ``data``, with bit 31 set:
            0 means no content.
        data: the content that the table points to.
        patches: offset in the file, and the bytes for it.
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


def tcs_template(
    *, oentry: int, ssa_frame_size: int, thread_data: int, flags: int = 0, shift: int = 0
) -> bytes:
    """Return the first bytes of a TCS whose three addresses count from the TCS itself.

    Args:
        oentry: the entry point, from the image's base.
        ssa_frame_size: pages; two frames follow the TCS.
        thread_data: bytes from the TCS to the thread data.
        flags: TCS.FLAGS.
        shift: from BASEADDR to the image.
    """
    assert ssa_frame_size > 0, "a frame has at least a page"
    return Tcs(
        flags=flags,
        ossa=PAGE_BYTES + shift,
        nssa=2,
        oentry=oentry + shift,
        ofs_base=thread_data + shift,
        ogs_base=thread_data + shift,
        fs_limit=0xFFFF_FFFF,
        gs_limit=0xFFFF_FFFF,
    ).pack()[:TCS_TEMPLATE_BYTES]


def write_blocks(file: Bytes, specs: Sequence[BlockSpec]) -> bytes:
    """Return the library with these metadata blocks, and nothing else, in its note.

    Raises:
        SoftSgxError: the library has no note, or the note is too small.
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

    The ATTRIBUTES of each block follow the SIGSTRUCT: they name the XFRM bits that the loader may
    set.
    """
    blocks = read_blocks(metadata_area(Elf(file)))
    if not blocks:
        raise SoftSgxError(
            f"{file.name}: no metadata block to put a SIGSTRUCT in; lay the library out first"
        )
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


def sdk_runtime_is_known(file: Bytes) -> bool:
    """Return whether the library has a ``g_global_data`` of a form that this module fills in."""
    return GlobalData.of(Elf(file)) is not None


def lay_out_sdk(
    file: Bytes, layout: SdkLayout, *, init: bool = False, text_relocations: bool = False
) -> bytes:
    """Return an unsigned library with metadata for ``layout`` and a blank SIGSTRUCT.

    Args:
        file: the library.
        layout: the settings of the layout.
        init: accept a library with a section ``.init``.
        text_relocations: accept a library with relocations of code.

    Raises:
        SoftSgxError: the library has metadata, has no room for it, or cannot be loaded.
    """
    elf = Elf(file)
    if read_blocks(metadata_area(elf)):
        raise SoftSgxError(f"{file.name}: has metadata already; sign it again as it is")
    require_loadable(elf)
    require_signable(elf, init=init, text_relocations=text_relocations)
    return write_blocks(file, _specs(elf, layout))


def _specs(elf: Elf, layout: SdkLayout) -> list[BlockSpec]:
    """Return the blocks that a signer of the library's SDK would write."""
    variable = GlobalData.of(elf)
    newer, older = layout.versions or (variable.versions if variable else _NEWEST_VERSIONS)
    minor = variable.minor if variable else _NEWEST_MINOR
    run_time, static = layout.blocks()
    if run_time and newer is None:
        raise SoftSgxError(
            f"{elf.file.name}: built with an SDK before 2.18, whose run-time paging is not written "
            "here; sign it without bit 0 of MISCSELECT"
        )
    region, books = user_region_pages(elf, layout, minor=minor) if run_time else (0, 0)
    table, end = layout_table(elf, layout, _behind_image(elf, older), region)
    size = enclave_size(end)
    if size > LARGEST_SECS_SIZE:
        raise SoftSgxError(
            f"{elf.file.name}: takes {end:#x} bytes of addresses; an enclave has at most "
            f"{LARGEST_SECS_SIZE:#x}"
        )
    if (size - end) // PAGE_BYTES > _MOST_GUARD_PAGES:
        raise SoftSgxError(
            f"{elf.file.name}: takes {end:#x} bytes of addresses; an item of the layout table has "
            f"at most {_MOST_GUARD_PAGES:#x} pages"
        )
    if size > end:
        table.append(guard(end, size))
    elrange = _checked_elrange(elf, layout.elrange, end)
    spec = BlockSpec(
        version=newer or older,
        enclave_size=size,
        layout=table,
        data=_template(elf, layout, table),
        elrange=elrange,
        tcs_policy=int(layout.unbound),
        tcs_min_pool=layout.threads_pool,
        max_save_buffer_size=layout.xsave_bytes,
        desired_misc_select=layout.miscselect if minor >= _DESIRED_MISC_SINCE else 0,
        ssa_frame_size=layout.frame_pages,
    )
    spec = replace(spec, patches=_patches(variable, elf, layout, spec, books))
    blocks = [spec] if run_time else []
    if static:
        blocks.append(replace(spec, version=older, layout=static_table(table, layout.threads)))
    return [_for_elrange(block) for block in blocks]


def _behind_image(elf: Elf, version: tuple[int, int]) -> int:
    """Return the address where the layout begins."""
    highest = max(elf.loads, key=lambda load: load.p_vaddr)
    if version == _TAIL_PAGE_VERSION:
        return round_up(round_up(highest.p_memsz) + highest.p_vaddr)
    return round_up(highest.p_vaddr + highest.p_memsz)


def _template(elf: Elf, layout: SdkLayout, table: Sequence[Item]) -> bytes:
    """Return the TCS template of all threads; its addresses count from the TCS itself."""
    first = {item.item_id: item for item in reversed(table) if isinstance(item, LayoutEntry)}
    entry = elf.symbol(_ENTRY_SYMBOL)
    thread_data = first[TD].rva + (first[TD].page_count - 1) * PAGE_BYTES - first[TCS].rva
    elrange = layout.elrange
    return tcs_template(
        oentry=entry.value if entry else elf.header.e_entry,
        ssa_frame_size=layout.frame_pages,
        thread_data=thread_data,
        flags=TcsFlags.AEXNOTIFY.value if layout.aex_notify else 0,
        shift=elrange.enclave_image_address - elrange.elrange_start_address if elrange else 0,
    )


def _checked_elrange(elf: Elf, elrange: Elrange | None, image_bytes: int) -> Elrange | None:
    """Refuse an enclave range that is impossible or does not hold the image."""
    if elrange is None:
        return None
    start, image, size = (
        elrange.elrange_start_address,
        elrange.enclave_image_address,
        elrange.elrange_size,
    )
    if size < PAGE_BYTES or size & (size - 1) or start % size or image % PAGE_BYTES:
        raise SoftSgxError(
            f"{elf.file.name}: enclave range of {size:#x} bytes from {start:#x}, image at "
            f"{image:#x}; the size is a power of two, the start a multiple of it"
        )
    if image < start or image + image_bytes > start + size:
        raise SoftSgxError(
            f"{elf.file.name}: the image from {image:#x} to {image + image_bytes:#x} lies outside "
            f"its enclave range from {start:#x} to {start + size:#x}; enlarge ELRangeSize"
        )
    return elrange


def _for_elrange(spec: BlockSpec) -> BlockSpec:
    major, minor = spec.version
    return replace(spec, version=(major + ELRANGE_MAJORS, minor)) if spec.elrange else spec


def _patches(
    variable: GlobalData | None, elf: Elf, layout: SdkLayout, spec: BlockSpec, books: int
) -> list[tuple[int, bytes]]:
    """Return zeros over the fields of the section table, and the runtime's variable if known."""
    patches = [(_E_SHNUM, bytes(2)), (_E_SHOFF, bytes(8)), (_E_SHSTRNDX, bytes(2))]
    if variable is None:
        return patches
    start = _data_start(spec)
    filled = variable.filled(
        elf,
        layout,
        enclave_size=spec.enclave_size,
        table=[_placed(item, start) for item in spec.layout],
        tcs=spec.data,
        bookkeeping=books,
    )
    return [(variable.at, filled), *patches]


def _has_four_directories(spec: BlockSpec) -> bool:
    major, minor = spec.version
    header = BlockHeader(version=major << 32 | minor)
    return Block(Bytes("", b""), header).has_extend_directory or spec.elrange is not None


def _data_start(spec: BlockSpec) -> int:
    """Return where the data of a block begins: behind its directories and its enclave range."""
    start = DATA_AT_4_DIRS if _has_four_directories(spec) else DATA_AT_2_DIRS
    return start + (Elrange.SIZE if spec.elrange else 0)


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
    four = _has_four_directories(spec)
    start = DATA_AT_4_DIRS if four else DATA_AT_2_DIRS
    data_start = _data_start(spec)
    elrange = Directory(offset=start, size=Elrange.SIZE) if spec.elrange else Directory()
    body = bytearray((spec.elrange.pack() if spec.elrange else b"") + spec.data)

    def put(data: bytes) -> Directory:
        at = start + len(body)
        body.extend(data)
        return Directory(offset=at, size=len(data)) if data else Directory()

    # All patches with zeros share the same bytes, as in blocks that the SDK's signer writes.
    filled = [patch for patch in spec.patches if any(patch[1])]
    zeros = [patch for patch in spec.patches if patch[1] and not any(patch[1])]
    patches = [Patch(dst=dst, src=put(data).offset, size=len(data)) for dst, data in filled]
    shared = put(bytes(max((len(data) for _, data in zeros), default=0))).offset
    patches += [Patch(dst=dst, src=shared, size=len(data)) for dst, data in zeros]
    extends = [
        Extend(extend_id=kind, size=len(data), offset=put(data).offset)
        for kind, data in spec.extends
    ]
    header.dir_patch = put(b"".join(patch.pack() for patch in patches))
    header.dir_layout = put(b"".join(_placed(item, data_start).pack() for item in spec.layout))
    extend = put(b"".join(entry.pack() for entry in extends))
    header.size = start + len(body)
    directories = elrange.pack() + extend.pack() if four else b""
    return header.pack() + directories + bytes(body)


def _placed(item: LayoutEntry | LayoutGroup, start: int) -> LayoutEntry | LayoutGroup:
    """Return the item with its content offset counted from the block's start."""
    if isinstance(item, LayoutEntry) and item.content_offset & IN_DATA:
        return item.replace(content_offset=start + item.content_offset - IN_DATA)
    return item
