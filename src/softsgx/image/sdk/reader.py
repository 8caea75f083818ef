"""Reading signed libraries of the Intel SGX SDK, every metadata version from 1.3 to 13.x.

Source:
    Intel SGX SDK, psw/urts/loader.cpp, psw/urts/urts_com.h, common/inc/internal/metadata.h.
"""

from __future__ import annotations

from dataclasses import replace

from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes
from softsgx.image.elf import Elf
from softsgx.image.enclave import EnclaveImage, Variant, plan_of
from softsgx.image.plan import Plan, Run
from softsgx.image.sdk.layout import ATTRIBUTE_NAMES, entry_name, has_old_ids, layout_runs
from softsgx.image.sdk.metadata import (
    DATA_AT_2_DIRS,
    EXTEND_MODULE,
    EXTEND_SIGNATURE,
    Block,
    Directory,
    LayoutEntry,
    ModuleExtension,
    choose_block,
    metadata_area,
    read_blocks,
)
from softsgx.image.sdk.segments import image_runs, require_loadable

__all__ = ["block_plan", "read_sdk", "sdk_blocks", "sdk_is_laid_out"]

_LARGEST_SSA_FRAME = 4
_SIMULATION_SYMBOL = "g_global_data_sim"


def sdk_blocks(file: Bytes) -> tuple[Elf, list[Block]]:
    """Return the ELF tables and the metadata blocks of a signed library."""
    elf = Elf(file)
    return elf, read_blocks(metadata_area(elf))


def sdk_is_laid_out(file: Bytes) -> bool:
    """Return whether a library of the SDK has metadata."""
    return bool(sdk_blocks(file)[1])


def read_sdk(
    file: Bytes,
    *,
    newest_major: int = 3,
    sgx2: bool = True,
    driver_edmm: bool = True,
    takes_2x: bool = False,
) -> EnclaveImage:
    """Read a signed library as an untrusted runtime of the SDK would.

    Args:
        file: the ``.signed.so``.
        newest_major: see :func:`choose_block`, as the three below.
        sgx2: whether the processor reports SGX2.
        driver_edmm: whether the driver supports run-time paging.
        takes_2x: whether the runtime is older than 2.18.

    Raises:
        SoftSgxError: it has no metadata for such a runtime, or the metadata is damaged.
    """
    elf, blocks = sdk_blocks(file)
    if not blocks:
        raise SoftSgxError(f"{file.name}: the metadata section is empty; sign the library first")
    simulation = elf.symbol(_SIMULATION_SYMBOL) is not None
    chosen = choose_block(
        blocks,
        newest_major=newest_major,
        sgx2=sgx2,
        driver_edmm=driver_edmm,
        simulation=simulation,
        takes_2x=takes_2x,
    )
    if chosen is None:
        versions = ", ".join(block.version for block in blocks)
        raise SoftSgxError(
            f"{file.name}: metadata {versions} only; a runtime for major versions up to "
            f"{newest_major} takes none of them"
        )
    require_loadable(elf)
    plan = block_plan(elf, chosen)
    variants = tuple(_variant(elf, block, chosen, plan) for block in blocks)
    header = chosen.header
    return EnclaveImage(
        file.name,
        "sdk",
        plan,
        sigstruct=header.enclave_css,
        sigstruct_from=f"metadata block {chosen.version}",
        variants=variants,
        chosen=chosen.version,
        notes=_notes(elf, blocks, chosen, simulation),
        attributes=(header.attributes.flags, header.attributes.xfrm),
    )


def block_plan(elf: Elf, block: Block) -> Plan:
    """Return the plan that one block describes: the image, then its layout table.

    Raises:
        SoftSgxError: a table points outside the file, the block or the enclave.
    """
    header = block.header
    if not 0 < header.ssa_frame_size <= _LARGEST_SSA_FRAME:
        raise block.bytes.bad(24, f"SSA frame of {header.ssa_frame_size} pages", "1 to 4 are taken")
    contents = _patched(elf.file, block)
    runs = image_runs(elf, contents, tail_pages=(block.major, block.minor) == (1, 3))
    for module in _modules(block):
        part = contents.part(module.file_offset, module.size, "second module")
        second = Elf(elf.file.part(module.file_offset, module.size, "second module"))
        require_loadable(second)
        runs += image_runs(second, part, tail_pages=False, shift=module.mem_offset)
    _require_inside(block, runs)
    runs += layout_runs(block)
    elrange = block.elrange()
    if elrange is None:
        return plan_of(
            elf.file.name, header.enclave_size, runs, ssa_frame_size=header.ssa_frame_size
        )
    shift = elrange.enclave_image_address - elrange.elrange_start_address
    return plan_of(
        elf.file.name,
        elrange.elrange_size,
        [replace(run, offset=run.offset + shift) for run in runs],
        ssa_frame_size=header.ssa_frame_size,
        base=elrange.elrange_start_address,
    )


def _patched(file: Bytes, block: Block) -> Bytes:
    """Return a copy of the file with the block's patches; they must not be larger than the file."""
    patches = block.patches()
    if not patches:
        return file
    asked = sum(patch.size for patch in patches)
    if asked > len(file):
        raise block.bytes.bad(
            block.header.dir_patch.offset, f"{asked} bytes of patches for {len(file)} of file"
        )
    copy = bytearray(file.view)
    for patch in patches:
        file.take(patch.dst, patch.size, "patch destination")
        copy[patch.dst : patch.dst + patch.size] = block.content(patch.src, patch.size, "patch")
    return Bytes(file.name, copy, origin=file.origin)


def _modules(block: Block) -> list[ModuleExtension]:
    """Return the appended shared object of the EXTEND table, if there is one."""
    entries = [entry for entry in block.extends() if entry.extend_id == EXTEND_MODULE]
    if len(entries) > 1:
        raise block.bytes.bad(
            DATA_AT_2_DIRS + Directory.SIZE, f"{len(entries)} second modules", "one is taken"
        )
    return [
        ModuleExtension.unpack(block.content(entry.offset, ModuleExtension.SIZE, "EXTEND entry"))
        for entry in entries
    ]


def _require_inside(block: Block, runs: list[Run]) -> None:
    for run in runs:
        if run.end > block.header.enclave_size:
            raise SoftSgxError(
                f"{block.bytes.name}: {run.label} ends at {run.end:#x}, beyond the enclave's size "
                f"{block.header.enclave_size:#x} in metadata {block.version}"
            )


def _variant(elf: Elf, block: Block, chosen: Block, plan: Plan) -> Variant:
    """Return a block for output, with the problem of a block that cannot be read."""
    try:
        own = plan if block is chosen else block_plan(elf, block)
        return Variant(block.version, own, facts=_facts(block), layout=_rows(block))
    except SoftSgxError as error:
        return Variant(block.version, None, problem=str(error), facts=_facts(block))


def _facts(block: Block) -> tuple[tuple[str, str], ...]:
    header = block.header
    facts = [
        ("version", block.version),
        ("size", f"{header.size}"),
        ("tcs_policy", "unbound" if header.tcs_policy else "bound"),
        ("ssa_frame_size", f"{header.ssa_frame_size}"),
        ("max_save_buffer_size", f"{header.max_save_buffer_size}"),
        ("desired_misc_select", f"{header.desired_misc_select:#x}"),
        ("tcs_min_pool", f"{header.tcs_min_pool}"),
        ("enclave_size", f"{header.enclave_size:#x}"),
        ("attributes", f"{header.attributes.flags:#x}"),
        ("xfrm", f"{header.attributes.xfrm:#x}"),
    ]
    return tuple(facts)


def _rows(block: Block) -> tuple[tuple[str, ...], ...]:
    table = block.layout()
    old = has_old_ids(table)
    rows: list[tuple[str, ...]] = []
    for item in table:
        name = entry_name(item.item_id, old=old)
        if isinstance(item, LayoutEntry):
            bits = [n for i, n in enumerate(ATTRIBUTE_NAMES) if item.attributes >> i & 1]
            rows.append(
                (
                    name,
                    f"{item.rva:#x}",
                    f"{item.page_count}",
                    f"{item.si_flags:#x}",
                    " ".join(bits),
                )
            )
        else:
            what = f"last {item.entry_count} items, step {item.load_step:#x}"
            rows.append((name, "", f"×{item.load_times}", "", what))
    return tuple(rows)


def _notes(elf: Elf, blocks: list[Block], chosen: Block, simulation: bool) -> tuple[str, ...]:
    notes = []
    if simulation:
        notes.append("a simulation-mode library: no processor runs it")
    if elf.section(".pcltbl") is not None:
        notes.append("encrypted (.pcltbl): measured as it lies here, decrypted by its first ECALL")
    if any(block.header.enclave_css != chosen.header.enclave_css for block in blocks):
        notes.append("its metadata blocks carry different SIGSTRUCTs: sign it again")
    if any(entry.extend_id == EXTEND_SIGNATURE for entry in chosen.extends()):
        notes.append("has a second signature over its SIGSTRUCT, which EINIT does not look at")
    return tuple(notes)
