"""A code in RAX and in the flag that the manual gives it: ENCLS by registers.

Goal: "RAX is not 0" is not "ZF is 1": some codes are information and come in CF.  Method: every
code that a paging leaf can return, with all flags set before.

Source:
    SDM vol. 3D, "Error and information codes", and each leaf's "Flags Affected".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.paging import PAGEINFO_AT, PCMD_AT, RDINFO_AT, SRCPGE_AT, Bench

from softsgx.arch import Encls, PageInfo, PageType, Pcmd, SecInfo
from softsgx.hw.dispatch import encls

_CF, _ZF, _OTHERS = 1 << 0, 1 << 6, 1 << 2 | 1 << 4 | 1 << 7 | 1 << 11


class Machinery:
    """A bench whose kernel executes ENCLS by registers."""

    def __init__(self) -> None:
        self.bench = bench = Bench()
        self.cpu = bench.machine.cpus[0]
        self.secs, self.va, self.free = bench.secs(), bench.va(), bench.free()
        self.reg = bench.child(self.secs)
        self.page, self.enclave = bench.page(self.reg), bench.enclave(self.secs)

    def ewb(self) -> tuple[int, int, int]:
        info = PageInfo(srcpge=SRCPGE_AT, secinfo=PCMD_AT)
        self.bench.machine.ram_write(PAGEINFO_AT, info.pack())
        return PAGEINFO_AT, self.reg, self.va

    def eldu(self) -> tuple[int, int, int]:
        info = PageInfo(srcpge=SRCPGE_AT, secinfo=PCMD_AT, secs=self.secs)
        self.bench.machine.ram_write(PAGEINFO_AT, info.pack())
        self.bench.machine.ram_write(PCMD_AT, Pcmd(secinfo=SecInfo.of(PageType.REG, 3)).pack())
        return PAGEINFO_AT, self.free, self.va

    def run(self, leaf: Encls, operands: tuple[int, int, int]) -> tuple[int, int]:
        """Execute ENCLS with every flag set; return RAX and the flags."""
        regs = self.cpu.regs
        regs.rax, regs.rflags = int(leaf), regs.rflags | _CF | _ZF | _OTHERS
        regs.rbx, regs.rcx, regs.rdx = operands
        encls(self.cpu)
        return regs.rax, regs.rflags & (_CF | _ZF | _OTHERS)


def case(
    leaf: Encls,
    code: int,
    flag: int,
    operand: str | Callable[[Machinery], tuple[int, int, int]],
    *changes: tuple[str, str, object],
) -> object:
    def arrange(machinery: Machinery) -> tuple[int, int, int]:
        for what, name, value in changes:
            setattr(getattr(machinery, what), name, value)
        if callable(operand):
            return operand(machinery)
        return RDINFO_AT, getattr(machinery, operand), 0

    return pytest.param(leaf, code, flag, arrange, id=f"{leaf.name}-{code}")


BLOCKED = ("page", "blocked", True)
TRACKED = ("page", "bepoch", -2)
CASES = [
    case(Encls.EBLOCK, 0, 0, "reg"),
    case(Encls.EBLOCK, 3, _CF, "reg", BLOCKED),
    case(Encls.EBLOCK, 5, _CF, "va"),
    case(Encls.EBLOCK, 6, _ZF, "free"),
    case(Encls.EBLOCK, 7, _ZF, "reg", ("page", "lock", -1)),
    case(Encls.EBLOCK, 15, _ZF, "reg", ("enclave", "etrack_running", True)),
    case(Encls.EBLOCK, 18, _CF, "secs"),
    case(Encls.ERDINFO, 0, 0, "reg"),
    case(Encls.ERDINFO, 6, _CF, "free"),
    case(Encls.ERDINFO, 7, _ZF, "reg", ("page", "lock", -1)),
    case(Encls.ERDINFO, 26, _CF, lambda _: (RDINFO_AT, 0x7000_0000, 0)),
    case(Encls.ETRACK, 0, 0, "secs"),
    case(Encls.ETRACK, 17, _ZF, "secs", ("enclave", "prev_count", 1)),
    case(Encls.ETRACKC, 0, 0, "reg"),
    case(Encls.ETRACKC, 6, _ZF, "free"),
    case(Encls.ETRACKC, 7, _ZF, "reg", ("page", "lock", -1)),
    case(Encls.ETRACKC, 17, _ZF, "reg", ("enclave", "prev_count", 1)),
    case(Encls.ETRACKC, 27, _CF, "va"),
    case(Encls.EWB, 0, 0, Machinery.ewb, BLOCKED, TRACKED),
    case(Encls.EWB, 10, _ZF, Machinery.ewb),
    case(Encls.EWB, 11, _ZF, Machinery.ewb, BLOCKED),
    case(Encls.ELDU, 9, _ZF, Machinery.eldu),
    case(Encls.ELDB, 9, _ZF, Machinery.eldu),
    case(Encls.ELDUC, 9, _ZF, Machinery.eldu),
    case(Encls.EREMOVE, 0, 0, "reg"),
    case(Encls.EREMOVE, 13, _ZF, "secs"),
    case(Encls.EREMOVE, 14, _ZF, "reg", ("enclave", "cur_count", 1)),
]


@pytest.mark.parametrize(("leaf", "code", "flag", "arrange"), CASES)
def test_a_code_is_in_rax_and_in_the_flag_that_the_manual_gives_it(
    leaf: Encls, code: int, flag: int, arrange: Callable[[Machinery], tuple[int, int, int]]
) -> None:
    machinery = Machinery()
    assert machinery.run(leaf, arrange(machinery)) == (code, flag)


def test_code_12_is_in_cf() -> None:
    machinery = Machinery()
    machinery.page.blocked, machinery.page.bepoch = True, -2
    slots = machinery.bench.page(machinery.va).slots
    assert slots is not None
    slots[0] = 8008
    assert machinery.run(Encls.EWB, machinery.ewb()) == (12, _CF)


def test_a_leaf_without_codes_leaves_rax_and_the_flags_alone() -> None:
    machinery = Machinery()
    assert machinery.run(Encls.EPA, (3, machinery.free, 0)) == (
        int(Encls.EPA),
        _CF | _ZF | _OTHERS,
    )
