"""Where areas of stubs are: near their code, and neither in an enclave's range nor in the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import Mapping
from softsgx.engines.native.vdso import areas
from softsgx.engines.native.vdso.areas import AREA_PAGES, gap_near, make_area

GUARD = 0x1_0000


def test_an_area_is_below_the_mapping_that_is_nearest() -> None:
    taken = [(0x40_0000, 0x41_0000, "/a"), (0x100_0000, 0x101_0000, "/b")]
    assert gap_near(taken, 0x40_5000, 0x4000) == 0x40_0000 - GUARD - 0x4000
    assert gap_near(taken, 0x100_5000, 0x4000) == 0x100_0000 - GUARD - 0x4000


def test_an_area_is_not_where_others_are_or_grow() -> None:
    taken = [(0x100_0000, 0x101_0000, "[stack]"), (0x20_0000, 0xF0_0000, "enclave")]
    assert gap_near(taken, 0x100_5000, 0x4000) == 0x20_0000 - GUARD - 0x4000
    assert gap_near([(0, 0x100_0000, "")], 0x1000, 0x4000) is None
    assert gap_near([(1 << 40, (1 << 40) + 4096, "")], 0x1000, 0x4000) is None
    nested = [(0x20_0000, 0x90_0000, ""), (0x30_0000, 0x31_0000, ""), (0x80_0000, 0x81_0000, "")]
    assert gap_near(nested, 0x80_0000, 0x4000) == 0x20_0000 - GUARD - 0x4000


@pytest.mark.parametrize("refused", [False, True])
def test_a_hole_in_the_range_of_an_enclave_stays_free(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    made: list[tuple[int, ...]] = []

    def syscall(*call: int) -> int:
        made.append(call)
        return -17 if refused else call[1]

    class Enclave:
        base = size = 0x40_0000

    enclave = Enclave()
    vma = SimpleNamespace(file=SimpleNamespace(enclave=enclave))
    mm = SimpleNamespace(vmas=lambda: [vma, vma])
    thread: Any = SimpleNamespace(tid=1, image=SimpleNamespace(mm=mm), syscall=syscall)
    code = Mapping(0x70_0000, 0x71_0000, 5, True, 0, 1, 1, "/memfd:sgx_enclave")
    monkeypatch.setattr(areas, "mappings", lambda tid: [code])
    size = AREA_PAGES * abi.PAGE
    start = 0x40_0000 - GUARD - size
    assert make_area(thread, 0x70_0000, 512) == (None if refused else (start, size // 512))
    ((_number, at, length, rights, flags, *_rest),) = made
    assert (at, length, rights) == (start, size, abi.PROT_READ | abi.PROT_EXEC)
    assert flags & abi.MAP_FIXED_NOREPLACE and not flags & abi.MAP_FIXED
