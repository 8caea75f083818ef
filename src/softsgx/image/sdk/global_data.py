"""The variable ``g_global_data`` of the SDK's trusted runtime, which a signer fills in.

The runtime inside the enclave reads the places of its heap, its threads and the layout table from
it.  The variable grew with the SDK; its size identifies the form that a library has.

Source:
    Intel SGX SDK, common/inc/internal/global_data.h, thread_data.h;
    psw/urts/parser/update_global_data.hxx.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from softsgx.arch import GPRSGX_BYTES, PAGE_BYTES
from softsgx.errors import SoftSgxError
from softsgx.image.elf import Elf
from softsgx.image.sdk.metadata import Elrange, LayoutEntry
from softsgx.image.sdk.settings import SdkLayout
from softsgx.image.sdk.tables import HEAP_MIN, RSRV_MIN, SSA, STACK_MIN, TCS, TD, Item, tls_bytes

__all__ = ["GlobalData"]

_SYMBOLS = ("g_global_data", "g_global_data_sim")
_WORD = 8
_LAYOUT_ITEM_BYTES = 32


@dataclass(frozen=True)
class _Form:
    """The fields that one form of the variable has.

    Attributes:
        tcs_num: a word for the number of threads.
        items: places in its copy of the layout table.
        elrange: three words for an enclave range.
        aex_notify: three more words and two half words in the thread's data.
        bookkeeping: a word for the memory that run-time paging needs for itself.
        fips: two half words.
    """

    tcs_num: bool = True
    items: int = 43
    elrange: bool = True
    aex_notify: bool = True
    bookkeeping: bool = True
    fips: bool = True


_FORMS = {
    1656: _Form(False, 42, False, False, False, False),  # SDK 2.13
    1680: _Form(False, 42, True, False, False, False),  # 2.14
    1688: _Form(True, 42, True, False, False, False),  # 2.17
    1720: _Form(True, 43, True, False, False, False),  # 2.19
    1728: _Form(True, 43, True, False, True, False),  # 2.20
    1760: _Form(True, 43, True, True, True, False),  # 2.21
    1768: _Form(),  # 2.25
}
_BLOCK_VERSIONS = (
    (26, ((3, 3), (1, 5))),
    (24, ((3, 2), (1, 5))),
    (22, ((3, 1), (1, 4))),
    (18, ((3, 0), (1, 4))),
)


@dataclass(frozen=True)
class GlobalData:
    """The variable in a library that is not signed yet.

    Attributes:
        at: its offset in the file.
        size: its size in bytes.
        sdk_version: the SDK's version that it holds: major in bits 63:32, minor in 31:16.
    """

    at: int
    size: int
    sdk_version: int

    @classmethod
    def of(cls, elf: Elf) -> GlobalData | None:
        """Return the variable of a library; None if the library has none of a known form.

        Raises:
            SoftSgxError: it lies outside the file's bytes.
        """
        symbol = next((s for name in _SYMBOLS if (s := elf.symbol(name)) is not None), None)
        if symbol is None or symbol.size not in _FORMS:
            return None
        for load in elf.loads:
            end = load.p_vaddr + load.p_filesz
            if load.p_vaddr <= symbol.value and symbol.value + symbol.size <= end:
                at = symbol.value - load.p_vaddr + load.p_offset
                return cls(at, symbol.size, elf.file.u64(at, symbol.name))
        raise SoftSgxError(f"{elf.file.name}: {symbol.name} is not in the file's bytes")

    @property
    def minor(self) -> int:
        """Return the SDK's minor version; its major is 2."""
        return self.sdk_version >> 16 & 0xFFFF

    @property
    def versions(self) -> tuple[tuple[int, int] | None, tuple[int, int]]:
        """Return which blocks a signer of the same SDK writes; None for an unknown one."""
        for minor, versions in _BLOCK_VERSIONS:
            if self.minor >= minor:
                return versions
        return None, (1, 4)

    def filled(
        self,
        elf: Elf,
        layout: SdkLayout,
        *,
        enclave_size: int,
        table: Sequence[Item],
        tcs: bytes,
        bookkeeping: int,
    ) -> bytes:
        """Return the variable's bytes.

        Args:
            elf: the library.
            layout: the settings of the layout.
            enclave_size: SECS.SIZE.
            table: the layout table of the block.
            tcs: the template of a TCS.
            bookkeeping: bytes that run-time paging needs for itself.

        Raises:
            SoftSgxError: the table has more items than the variable has places.
        """
        form = _FORMS[self.size]
        if len(table) > form.items:
            raise SoftSgxError(
                f"{elf.file.name}: a layout table of {len(table)} items; its runtime takes "
                f"{form.items}"
            )
        first = _first_of(table)
        reserved = first.get(RSRV_MIN)
        words = [
            0,  # sdk_version: for the signer only
            enclave_size,
            first[HEAP_MIN].rva,
            layout.heap_at_start * PAGE_BYTES,
            reserved.rva if reserved else 0,
            layout.reserved_at_start * PAGE_BYTES if reserved else 0,
            int(layout.reserved_executable) if reserved else 0,
            int(layout.unbound),
            layout.most_threads,
        ]
        if form.tcs_num:
            words.append(layout.threads)
        words += _thread_data(elf, layout, first, aex_notify=form.aex_notify)
        data = struct.pack(f"<{len(words)}Q", *words) + tcs + struct.pack("<II", len(table), 0)
        copy = b"".join(item.pack() for item in table)
        data += copy.ljust(form.items * _LAYOUT_ITEM_BYTES, b"\0")
        if form.elrange:
            size = 0 if form.fips else enclave_size  # the value without an enclave range
            data += (layout.elrange or Elrange(elrange_size=size)).pack()
        if form.bookkeeping:
            data += struct.pack("<Q", bookkeeping)
        data += bytes(8) if form.fips else b""
        assert len(data) == self.size, f"{len(data)} bytes for a variable of {self.size}"
        return data


def _first_of(table: Sequence[Item]) -> dict[int, LayoutEntry]:
    """Return the first entry of each kind."""
    first: dict[int, LayoutEntry] = {}
    for item in table:
        if isinstance(item, LayoutEntry):
            first.setdefault(item.item_id, item)
    return first


def _thread_data(
    elf: Elf, layout: SdkLayout, first: dict[int, LayoutEntry], *, aex_notify: bool
) -> list[int]:
    """Return the words of a thread's data; addresses count from its TCS."""
    tcs = first[TCS].rva
    base = first[STACK_MIN].rva + layout.stack_min * PAGE_BYTES - tcs
    ssa = first[SSA].rva - tcs
    own = first[TD].rva + (first[TD].page_count - 1) * PAGE_BYTES - tcs
    limit = base - layout.stack_max * PAGE_BYTES
    gpr = ssa + layout.frame_pages * PAGE_BYTES - GPRSGX_BYTES
    words = [own, base, base, limit, gpr, 0, 0, layout.xsave_bytes, 0]
    if aex_notify:
        words += [0, 0, ssa]
    words.append(0)
    tls_at = own + len(words) * _WORD
    words += [own - tls_bytes(elf), tls_at]
    words += [0] * 8  # exception_flag, cxx_thread_info, stack_commit_addr
    if aex_notify:
        words.append(0)
    return [word % (1 << 64) for word in words]
