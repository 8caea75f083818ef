"""The layout table that a signer writes: what follows the image, and in what order.

Source:
    Intel SGX SDK, sdk/sign_tool/SignTool/manage_metadata.cpp, build_layout_table; sign_tool.cpp,
    generate_compatible_metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softsgx.arch import PAGE_BYTES
from softsgx.image.elf import Elf
from softsgx.image.plan import SECINFO_RW, SECINFO_RWX, SECINFO_TCS
from softsgx.image.sdk.layout import (
    DYN_THREAD,
    EADD,
    EEXTEND,
    EREMOVE,
    GROW_DOWN,
    POST_ADD,
    POST_REMOVE,
)
from softsgx.image.sdk.metadata import LayoutEntry, LayoutGroup
from softsgx.image.sdk.segments import round_up
from softsgx.image.sdk.settings import SdkLayout

__all__ = [
    "GUARD_PAGES",
    "HEAP_MIN",
    "IN_DATA",
    "RSRV_MIN",
    "SSA",
    "STACK_MIN",
    "TCS",
    "TCS_TEMPLATE_BYTES",
    "TD",
    "Item",
    "guard",
    "layout_table",
    "static_table",
    "tls_bytes",
    "user_region_pages",
]

Item = LayoutEntry | LayoutGroup

IN_DATA = 1 << 31
"""Marks a ``content_offset`` that counts from the start of a specification's data."""

TCS_TEMPLATE_BYTES = 72
GUARD_PAGES = 16
_STACK_WORD = 0xCCCC_CCCC
HEAP_MIN, _HEAP_INIT, _HEAP_MAX, TCS, TD, SSA, _STACK_MAX, STACK_MIN = range(1, 9)
_GUARD, _THREAD_GROUP, _THREAD_GROUP_DYN = 10, 4096 + 9, 4096 + 19
_DYNAMIC_IDS = 10  # from an item of a thread to the same of a thread made at run time
RSRV_MIN, _RSRV_INIT, _RSRV_MAX, _USER_REGION = range(20, 24)

# What the runtime's memory manager takes from its region, for each node of its list.
_NODE_BYTES, _BITMAP_BYTES = 72, 24
_ALLOCATIONS_SINCE, _DOUBLED_RESERVES = 20, 19
_ALLOCATION_HEADER, _ALLOCATION_ALIGN, _SMALLEST_ALLOCATION = 8, 8, 16
_FIRST_RESERVE, _REGION_GUARD, _RESERVE_HEADER = 0x10000, 0x8000, 32
_BITMAP_SHIFT = 15  # a byte for each 2**15 bytes of a user region


def tls_bytes(elf: Elf) -> int:
    """Return the size of a thread's copy of PT_TLS."""
    return 0 if elf.tls is None else round_up(elf.tls.p_memsz, max(1, elf.tls.p_align))


def _tls_pages(elf: Elf) -> int:
    return round_up(tls_bytes(elf)) // PAGE_BYTES


def layout_table(
    elf: Elf, layout: SdkLayout, behind: int, user_region: int
) -> tuple[list[Item], int]:
    """Return the table for run-time paging, without its last guard, and where its items end.

    Args:
        elf: the library.
        layout: the settings of the layout.
        behind: the address after the image, page aligned.
        user_region: pages of the region for run-time paging, 0 for none.
    """
    items = [*_heap(layout), *_thread(layout, _tls_pages(elf), first=True)]
    thread = _thread(layout, _tls_pages(elf))
    if layout.pool:
        items += _several(thread, layout.pool)
    removed = layout.threads - 1 - layout.pool
    if removed:
        items += _several([_with(item, EREMOVE) for item in thread], removed)
    made_later = layout.most_threads - layout.pool
    if made_later > 1:
        items += [_made_later(item) for item in thread]
        items.append(_group(thread, made_later - 1, _THREAD_GROUP_DYN))
    items += _reserved(layout)
    if user_region:
        items.append(_item(_USER_REGION, POST_ADD, user_region))
    at = behind
    for item in items:
        if isinstance(item, LayoutGroup):
            at += item.load_times * item.load_step
        else:
            item.rva = at
            at += item.page_count * PAGE_BYTES
    return items, at


def guard(start: int, end: int) -> LayoutEntry:
    """Return the guard that fills an enclave up to its size."""
    item = _item(_GUARD, 0, (end - start) // PAGE_BYTES, flags=0)
    item.rva = start
    return item


def static_table(table: Sequence[Item], threads: int) -> list[Item]:
    """Return the table for runtimes without run-time paging.

    All threads are one group, and the table has no items that a runtime would add later.
    """
    names = [item.item_id for item in table]
    start, end = names.index(_GUARD), names.index(TD) + 1
    first, rest = list(table[:end]), list(table[end:])
    reserved = [item for item in rest if item.item_id in (RSRV_MIN, _RSRV_INIT, _RSRV_MAX)]
    if rest and rest[0].item_id != RSRV_MIN:
        rest = [_group(first[start:], threads - 1), *reserved]
    return [_never_later(item) for item in first + rest]


def _heap(layout: SdkLayout) -> list[Item]:
    items: list[Item] = [_item(HEAP_MIN, EADD, layout.heap_min)]
    if layout.heap_at_start > layout.heap_min:
        more = layout.heap_at_start - layout.heap_min
        items.append(_item(_HEAP_INIT, EADD | POST_REMOVE | POST_ADD, more))
    if layout.heap_max > layout.heap_at_start:
        items.append(_item(_HEAP_MAX, POST_ADD, layout.heap_max - layout.heap_at_start))
    return items


def _reserved(layout: SdkLayout) -> list[Item]:
    if not layout.reserved_max:
        return []
    flags = SECINFO_RWX if layout.reserved_executable else SECINFO_RW
    items: list[Item] = [_item(RSRV_MIN, EADD, layout.reserved_min, flags=flags)]
    if layout.reserved_at_start > layout.reserved_min:
        more = layout.reserved_at_start - layout.reserved_min
        items.append(_item(_RSRV_INIT, EADD | POST_REMOVE | POST_ADD, more, flags=flags))
    if layout.reserved_max > layout.reserved_at_start:
        items.append(_item(_RSRV_MAX, POST_ADD, layout.reserved_max - layout.reserved_at_start))
    return items


def _thread(layout: SdkLayout, tls_pages: int, *, first: bool = False) -> list[LayoutEntry]:
    """Return one thread's items; some pages of the first stack can be removed at run time."""
    measured = EADD | EEXTEND
    more_stack = layout.stack_max - layout.stack_min
    items = [_item(_GUARD, 0, GUARD_PAGES, flags=0)]
    if more_stack:
        attributes = measured | GROW_DOWN | (POST_ADD | POST_REMOVE if first else 0)
        items.append(_item(_STACK_MAX, attributes, more_stack, word=_STACK_WORD))
    items.append(_item(STACK_MIN, measured, layout.stack_min, word=_STACK_WORD))
    items.append(_item(_GUARD, 0, GUARD_PAGES, flags=0))
    tcs = _item(TCS, measured, 1, word=TCS_TEMPLATE_BYTES, flags=SECINFO_TCS)
    tcs.content_offset = IN_DATA
    items.append(tcs)
    items.append(_item(SSA, measured, 2 * layout.frame_pages))
    items.append(_item(_GUARD, 0, GUARD_PAGES, flags=0))
    items.append(_item(TD, measured, 1 + tls_pages))
    return items


def _several(thread: Sequence[LayoutEntry], count: int) -> list[Item]:
    """Return copies of a thread's items, and the group of all but the first."""
    items: list[Item] = [item.replace() for item in thread]
    if count > 1:
        items.append(_group(thread, count - 1))
    return items


def _group(items: Sequence[Item], times: int, item_id: int = _THREAD_GROUP) -> LayoutGroup:
    pages = sum(item.page_count for item in items if isinstance(item, LayoutEntry))
    return LayoutGroup(
        item_id=item_id, entry_count=len(items), load_times=times, load_step=pages * PAGE_BYTES
    )


def _with(item: LayoutEntry, attributes: int) -> LayoutEntry:
    if item.item_id == _GUARD:
        return item.replace()
    return item.replace(attributes=item.attributes | attributes)


def _made_later(item: LayoutEntry) -> LayoutEntry:
    """Return an item of a thread as an item of threads that the runtime adds later."""
    if item.item_id == _GUARD:
        return item.replace()
    later = GROW_DOWN if item.item_id == _STACK_MAX else DYN_THREAD
    return item.replace(item_id=item.item_id + _DYNAMIC_IDS, attributes=POST_ADD | later)


def _never_later(item: Item) -> Item:
    if isinstance(item, LayoutGroup) or not item.attributes & POST_ADD:
        return item
    flags = item.si_flags if item.attributes & EADD else 0
    return item.replace(attributes=item.attributes & ~POST_ADD, si_flags=flags)


def _item(
    item_id: int, attributes: int, pages: int, *, flags: int = SECINFO_RW, word: int = 0
) -> LayoutEntry:
    return LayoutEntry(
        item_id=item_id,
        attributes=attributes,
        page_count=pages,
        content_size=word,
        si_flags=flags,
    )


def user_region_pages(elf: Elf, layout: SdkLayout, *, minor: int) -> tuple[int, int]:
    """Return the pages of the region for run-time paging, and the bytes of its bookkeeping.

    Args:
        elf: the library.
        layout: the settings of the layout.
        minor: the SDK's minor version, of major 2.
    """
    user = layout.user_region * PAGE_BYTES
    allocated = minor >= _ALLOCATIONS_SINCE
    books = _bookkeeping(elf, layout, _allocated if allocated else int)
    if not allocated:
        reserve = round_up(books + _FIRST_RESERVE + 2 * _REGION_GUARD)
        if minor == _DOUBLED_RESERVES:
            # Each reserve is twice the one before, with guards of 64 KiB around it.
            times = (-(-books // _FIRST_RESERVE)).bit_length()
            reserve = ((1 << times) - 1 + times) * _FIRST_RESERVE
        total = reserve + user + round_up(user >> _BITMAP_SHIFT)
        return total // PAGE_BYTES, 0
    if user:
        books += max(PAGE_BYTES, round_up(user >> _BITMAP_SHIFT))
    reserve = round_up(books + _RESERVE_HEADER, _FIRST_RESERVE)
    return (user + reserve + 2 * _REGION_GUARD) // PAGE_BYTES, reserve


def _allocated(size: int) -> int:
    """Return the bytes of heap that an allocation of ``size`` bytes takes."""
    return max(_SMALLEST_ALLOCATION, round_up(size + _ALLOCATION_HEADER, _ALLOCATION_ALIGN))


def _bookkeeping(elf: Elf, layout: SdkLayout, taken: Callable[[int], int]) -> int:
    """Return the bytes that the runtime's memory manager needs to manage the table's items."""
    node = taken(_NODE_BYTES)

    def pages(count: int) -> int:
        """Return the bytes for one range: a node, and a bitmap with a bit a page."""
        return node + taken(_BITMAP_BYTES) + taken(round_up(count, 8) // 8)

    def growing(least: int, start: int, most: int) -> int:
        return pages(least) + sum(pages(more) for more in (start - least, most - start) if more)

    more_stack = layout.stack_max - layout.stack_min
    parts = [layout.stack_min, 1, 2 * layout.frame_pages, 1 + _tls_pages(elf)]
    kept = 3 * node + sum(map(pages, parts + ([more_stack] if more_stack else [])))
    nodes = 7 + bool(more_stack)
    removed = layout.threads - 1 - layout.pool
    made_later = layout.most_threads - layout.pool
    return (
        growing(layout.heap_min, layout.heap_at_start, layout.heap_max)
        + growing(layout.reserved_min, layout.reserved_at_start, layout.reserved_max)
        + kept * (1 + layout.pool + (made_later if made_later > 1 else 0))
        + nodes * node * (1 + removed)
        + sum(pages(round_up(load.p_memsz) // PAGE_BYTES) for load in elf.loads)
        + (node if taken is _allocated else 0)  # the last guard
    )
