"""Expanding a layout table: the pages that a loader adds after the image.

Attributes, SECINFO flags and content decide how a page is added.  Ids do not: their numbering
changed without a new version of the metadata.

Source:
    Intel SGX SDK, psw/urts/loader.cpp, build_context and validate_layout_table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

from softsgx.arch import PAGE_BYTES, Tcs
from softsgx.errors import SoftSgxError
from softsgx.image.plan import (
    MASK_ALL,
    MASK_NONE,
    SECINFO_TCS,
    ZERO,
    Fill,
    Padded,
    Run,
    lay,
)
from softsgx.image.sdk.metadata import Block, LayoutEntry, LayoutGroup
from softsgx.image.sdk.segments import round_up

__all__ = [
    "ATTRIBUTE_NAMES",
    "EADD",
    "EEXTEND",
    "EREMOVE",
    "MAX_EXPANDED",
    "POST_ADD",
    "POST_REMOVE",
    "entry_name",
    "expand",
    "has_old_ids",
    "layout_runs",
]

EADD, EEXTEND, EREMOVE, POST_ADD, POST_REMOVE, DYN_THREAD, GROW_DOWN = (1 << n for n in range(7))
ATTRIBUTE_NAMES = (
    "EADD", "EEXTEND", "EREMOVE", "POST_ADD", "POST_REMOVE", "DYN_THREAD", "GROW_DOWN",
)  # fmt: skip
MAX_EXPANDED = 1 << 16
"""The most items that a table may expand to; load_times alone could ask for 2**32."""

_U64 = (1 << 64) - 1
_TCS_FIELDS_BYTES = Tcs.OFFSETS["reserved"]
_NEW_NAMES = {
    1: "HEAP_MIN", 2: "HEAP_INIT", 3: "HEAP_MAX", 4: "TCS", 5: "TD", 6: "SSA", 7: "STACK_MAX",
    8: "STACK_MIN", 10: "GUARD", 11: "HEAP_DYN_MIN", 12: "HEAP_DYN_INIT", 13: "HEAP_DYN_MAX",
    14: "TCS_DYN", 15: "TD_DYN", 16: "SSA_DYN", 17: "STACK_DYN_MAX", 18: "STACK_DYN_MIN",
    20: "RSRV_MIN", 21: "RSRV_INIT", 22: "RSRV_MAX", 23: "USER_REGION",
    4096 + 9: "THREAD_GROUP", 4096 + 19: "THREAD_GROUP_DYN",
}  # fmt: skip
_OLD_NAMES = {
    1: "HEAP", 2: "TCS", 3: "TD", 4: "SSA", 5: "STACK", 7: "GUARD", 4096 + 6: "THREAD_GROUP",
}  # fmt: skip


def has_old_ids(table: Sequence[LayoutEntry | LayoutGroup]) -> bool:
    """Return whether ids are those of SDK 1.9 and before: its TCS is item 2."""
    return any(
        isinstance(item, LayoutEntry) and item.si_flags == SECINFO_TCS and item.item_id == 2
        for item in table
    )


def entry_name(item_id: int, *, old: bool) -> str:
    """Return the signer's name of an item, for output."""
    return (_OLD_NAMES if old else _NEW_NAMES).get(item_id, f"id {item_id}")


def expand(block: Block) -> Iterator[tuple[LayoutEntry, int]]:
    """Yield each entry with the offset to add to its address; groups repeated.

    Raises:
        SoftSgxError: a group covers entries before the table or in another group, or the table
            expands to more than ``MAX_EXPANDED`` items.
    """
    table = block.layout()
    where = block.header.dir_layout.offset
    count, last_group = 0, -1
    for index, item in enumerate(table):
        at = where + index * LayoutEntry.SIZE
        if isinstance(item, LayoutEntry):
            count += 1
            yield item, 0
            continue
        if item.entry_count > index:
            raise block.bytes.bad(at, f"group of {item.entry_count} at item {index}")
        if last_group >= index - item.entry_count and item.entry_count:
            raise block.bytes.bad(at, f"group of {item.entry_count} has a group in it")
        last_group = index
        members = table[index - item.entry_count : index]
        count += item.entry_count * item.load_times
        if count > MAX_EXPANDED:
            raise block.bytes.bad(
                at,
                f"layout of {count} items: load_times is {item.load_times}",
                f"at most {MAX_EXPANDED} are taken",
            )
        if item.load_times * item.load_step > block.header.enclave_size:
            raise block.bytes.bad(at, f"{item.load_times} steps of {item.load_step:#x} leave it")
        if not item.entry_count:
            continue
        for nth in range(1, item.load_times + 1):
            for member in members:
                assert isinstance(member, LayoutEntry)
                yield member, nth * item.load_step


def layout_runs(block: Block) -> list[Run]:
    """Return the pages that the table adds, in its order.

    Raises:
        SoftSgxError: an item is misaligned, outside the enclave or overlaps another.
    """
    runs: list[Run] = []
    spans: list[tuple[int, int]] = []
    names = has_old_ids(block.layout())
    for entry, delta in expand(block):
        rva = entry.rva + delta
        name = entry_name(entry.item_id, old=names)
        end = rva + entry.page_count * PAGE_BYTES
        if rva % PAGE_BYTES or end > block.header.enclave_size:
            raise SoftSgxError(
                f"{block.bytes.name}: metadata {block.version}: {name} from {rva:#x} to {end:#x}; "
                f"items are page aligned and below {block.header.enclave_size:#x}"
            )
        if entry.page_count:
            spans.append((rva, end))
            runs += _entry_runs(block, entry, rva, name)
    spans.sort()
    for before, after in pairwise(spans):
        if after[0] < before[1]:
            raise SoftSgxError(
                f"{block.bytes.name}: metadata {block.version}: items at {before[0]:#x} and "
                f"{after[0]:#x} overlap; the layout table is damaged"
            )
    return runs


def _entry_runs(block: Block, entry: LayoutEntry, rva: int, name: str) -> list[Run]:
    """Return the pages of one entry, by the rule of the SDK's loader."""
    mask = MASK_ALL if entry.attributes & EEXTEND else MASK_NONE
    if not entry.attributes & EADD:
        return []
    if entry.content_offset and entry.si_flags == SECINFO_TCS:
        return [_tcs_run(block, entry, rva, mask, name)]
    if entry.content_offset:
        data = block.content(entry.content_offset, entry.content_size, name)
        if data.nbytes > entry.page_count * PAGE_BYTES:
            raise block.bytes.bad(
                entry.content_offset, f"{name}: {data.nbytes} bytes for {entry.page_count} pages"
            )
        runs = lay(rva, data, entry.si_flags, label=name)
        filled = rva + round_up(data.nbytes)
        rest = entry.page_count - (filled - rva) // PAGE_BYTES
        return [*runs, Run(filled, rest, entry.si_flags, ZERO, label=name)] if rest else runs
    if entry.si_flags:
        source = Fill(entry.content_size) if entry.content_size else ZERO
        return [Run(rva, entry.page_count, entry.si_flags, source, mask, name)]
    return []


def _tcs_run(block: Block, entry: LayoutEntry, rva: int, mask: int, name: str) -> Run:
    """Return a TCS made from the block's template, with its three addresses relocated."""
    template = block.content(entry.content_offset, entry.content_size, name)
    if entry.page_count != 1 or template.nbytes > PAGE_BYTES:
        raise block.bytes.bad(
            entry.content_offset, f"{name}: {template.nbytes} bytes for {entry.page_count} pages"
        )
    page = bytearray(bytes(template).ljust(_TCS_FIELDS_BYTES, b"\0"))
    for field in ("ossa", "ofs_base", "ogs_base"):
        at = Tcs.OFFSETS[field]
        moved = struct.unpack_from("<Q", page, at)[0] + rva & _U64
        struct.pack_into("<Q", page, at, moved)
    return Run(rva, 1, entry.si_flags, Padded(memoryview(bytes(page))), mask, name)
