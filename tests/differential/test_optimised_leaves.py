"""The fast leaves against the readable ones, on the same histories.

Method: two machines with the same secrets, one with optimised leaves, take the same random calls,
good and bad ones, and must agree in result, EPCM, slots, page bytes and every byte written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hw import RepeatingRuntime

from softsgx.arch import PageType, Pcmd, SecInfo, Secs, Status
from softsgx.hw import EpcPage, Fault, Machine, MachineConfig, PageInfoArgs
from softsgx.hw.optimised import OPTIMISED
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.tracking import count_in, count_out

PAGES = 3
SECS, VA, FIRST = 0, 1, 2
ELRANGE = 1 << 20


class Half:
    """One machine with an enclave of a few pages, and the buffers that its pages go to."""

    def __init__(self, *, fast: bool) -> None:
        self.hw = Machine(
            MachineConfig.with_epc(64 << 12),
            RepeatingRuntime(seed=7),
            optimised=OPTIMISED if fast else None,
        )
        self.base = self.hw.config.sections[0].base
        secs = self.page(SECS)
        secs.fill(PageType.SECS)
        secs.enclave = ResidentSecs(Secs(size=ELRANGE, base=ELRANGE), self.hw.next_eid(), secs.addr)
        self.hw.leaves.epa(int(PageType.VA), self.page(VA).addr)
        for n in range(PAGES):
            page = self.page(FIRST + n)
            kind = (PageType.REG, PageType.TCS, PageType.TRIM)[n % 3]
            page.fill(kind, rwx=n + 3, secs=secs, linaddr=ELRANGE + n * 4096, pending=n == 0)
            page.modified, page.pr = n == 1, n == 2
            self.hw.store.fill(page, bytes([n + 1]) * 4096)
            secs.enclave.children += 1
        self.inside: list[int] = []
        self.enclave = secs.enclave
        self.out = [(bytearray(4096), bytearray(128)) for _ in range(PAGES)]

    def page(self, index: int) -> EpcPage:
        page = self.hw.page_at(self.base + index * 4096)
        assert page is not None
        return page

    def info(self, step: Step) -> PageInfoArgs:
        contents, pcmd = self.out[step.buffer]
        if step.leaf.endswith("eldu"):
            linaddr, secs = ELRANGE + step.linaddr * 4096, self.base + step.secs * 4096
        else:
            linaddr, secs = step.dirt, 0
        return PageInfoArgs(linaddr, contents, pcmd, secs)

    def try_ewb(self, info: PageInfoArgs, page: int, slot: int) -> Status:
        """EWB, first without buffers; then what it would have written is written here."""
        before = self.state()
        done = None if info.linaddr else self.hw.leaves.try_ewb(page, slot)
        if isinstance(done, tuple):
            sealed, flags, eid = done
            contents, pcmd = info.srcpge, info.pcmd
            assert isinstance(contents, bytearray) and isinstance(pcmd, bytearray)
            contents[:] = sealed[:4096]
            pcmd[:] = Pcmd(secinfo=SecInfo(flags=flags), enclave_id=eid, mac=sealed[4096:]).pack()
            info.linaddr = self.hw.pages[page].linaddr
            return Status.SUCCESS
        assert self.state() == before
        return self.hw.leaves.ewb(info, page, slot) if done is None else done

    def try_eldu(self, info: PageInfoArgs, page: int, slot: int) -> Status:
        """ELDU, first without buffers."""
        before = self.state()
        assert isinstance(info.srcpge, bytearray) and isinstance(info.pcmd, bytearray)
        pcmd, leaves = Pcmd.unpack(bytes(info.pcmd)), self.hw.leaves
        sealed = bytes(info.srcpge) + pcmd.mac
        clean = not any(pcmd.secinfo.reserved) and not any(pcmd.reserved)
        flags = pcmd.secinfo.flags
        if clean and leaves.try_eldu(info.linaddr, info.secs, sealed, flags, page, slot):
            return Status.SUCCESS
        assert self.state() == before
        return leaves.eldu(info, page, slot)

    def run(self, step: Step) -> str:
        leaves = self.hw.leaves
        target = self.base + (FIRST + step.page) * 4096
        slot = self.base + VA * 4096 + 8 * step.slot + step.dirt
        if step.flip is not None:
            contents, pcmd = self.out[step.buffer]
            (pcmd if step.flip < 128 else contents)[step.flip % 128] ^= 1
        info = self.info(step)
        try:
            match step.leaf:
                case "eblock":
                    result = leaves.eblock(target)
                case "etrack":
                    result = leaves.etrack(self.base)
                case "ewb":
                    result = leaves.ewb(info, target, slot)
                case "eldu":
                    result = leaves.eldu(info, target, slot)
                case "try_ewb":
                    result = self.try_ewb(info, target, slot)
                case "try_eldu":
                    result = self.try_eldu(info, target, slot)
                case "lock":
                    self.lock(step)
                    result = Status.SUCCESS
                case "enter":
                    self.inside.append(count_in(self.enclave))
                    result = Status.SUCCESS
                case "leave":
                    if self.inside:
                        count_out(self.enclave, self.inside.pop(0))
                    result = Status.SUCCESS
                case _:
                    result = leaves.eremove(target)
        except Fault as fault:
            return str(fault)
        return f"{Status(result).name} {info.linaddr:#x}"

    def lock(self, step: Step) -> None:
        """Another leaf takes a lock, or gives it back."""
        if step.slot:
            page = self.page((SECS, VA, FIRST + step.page)[step.buffer])
            page.lock = 0 if page.lock else (-1, 1)[step.slot - 1]
        else:
            self.enclave.tracking_lock = not self.enclave.tracking_lock

    def state(self) -> list[object]:
        """Everything that a leaf could have changed."""
        seen: list[object] = [bytes(b) for pair in self.out for b in pair]
        for index in range(FIRST + PAGES):
            page = self.page(index)
            seen.append((repr(page), page.lock, page.valid and page.bepoch))
            if page.valid and page.secs is not None:
                seen.append(self.hw.store.read(page, 0, 4096))
            if page.slots is not None:
                seen.append(list(page.slots))
            if page.enclave is not None:
                seen.append((page.enclave.children, page.enclave.epoch, page.enclave.tracking_lock))
        return seen


@dataclass(frozen=True)
class Step:
    leaf: str
    page: int
    buffer: int
    slot: int
    linaddr: int
    secs: int
    flip: int | None
    dirt: int


pages = st.integers(0, PAGES - 1)


LEAVES = [
    "eblock",
    "etrack",
    "ewb",
    "try_ewb",
    "eldu",
    "try_eldu",
    "eremove",
    "lock",
    "enter",
    "leave",
]


@st.composite
def rubbish(draw: st.DrawFn) -> list[Step]:
    """One call whose operands need not fit each other."""
    return [
        Step(
            draw(st.sampled_from(LEAVES)),
            draw(pages),
            draw(pages),
            draw(pages),
            draw(pages),
            draw(st.sampled_from([SECS, SECS, SECS, VA, FIRST])),
            draw(st.none() | st.integers(0, 255)),
            draw(st.sampled_from([0, 0, 0, 4])),
        )
    ]


@st.composite
def fitting(draw: st.DrawFn) -> list[Step]:
    """Calls that succeed when nothing is in their way, so that pages really come and go."""
    page = draw(pages)
    calls = draw(
        st.sampled_from(
            [
                ["eblock", "etrack", "ewb"],
                ["etrack", "eblock", "ewb"],
                ["eblock", "etrack", "ewb", "eldu"],
                ["eblock", "etrack", "try_ewb"],
                ["etrack", "eblock", "try_ewb"],
                ["eblock", "etrack", "try_ewb", "try_eldu"],
                ["eldu"],
                ["try_eldu"],
                ["enter"],
                ["leave"],
            ]
        )
    )
    slot = draw(st.sampled_from([page, page, 0]))  # 0: now and then occupied by another page
    to = draw(st.sampled_from([page, page, 0]))  # 0: now and then in use by another page
    return [
        Step(call, to if call.endswith("eldu") else page, page, slot, page, SECS, None, 0)
        for call in calls
    ]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(fitting() | fitting() | rubbish(), max_size=20))
def test_fast_and_readable_leaves_do_the_same(history: list[list[Step]]) -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    for step in chain.from_iterable(history):
        assert fast.run(step) == readable.run(step), step
        assert fast.state() == readable.state(), step


def test_the_fast_leaves_are_those_that_run() -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    assert fast.hw.leaves.ewb.__func__.__name__ == "_ewb"  # type: ignore[attr-defined]
    assert readable.hw.leaves.ewb.__func__.__name__ == "ewb"  # type: ignore[attr-defined]
    for half, plain in ((fast, True), (readable, False)):
        target, slot = half.page(FIRST).addr, half.page(VA).addr
        half.hw.leaves.eblock(target)
        half.hw.leaves.etrack(half.base)
        done = half.hw.leaves.try_ewb(target, slot)
        assert isinstance(done, tuple) is plain
        if isinstance(done, tuple):
            sealed, flags, _eid = done
            assert half.hw.leaves.try_eldu(ELRANGE, half.base, sealed, flags, target, slot)


WAYS: dict[str, Callable[[Half], object]] = {
    "nothing": lambda half: None,
    "a processor of the previous cycle": lambda half: setattr(half.enclave, "prev_count", 1),
    "a processor of this cycle": lambda half: setattr(half.enclave, "cur_count", 1),
    "the facility is in use": lambda half: setattr(half.enclave, "tracking_lock", True),
    "a leaf has the page alone": lambda half: setattr(half.page(SECS), "lock", -1),
    "leaves share the page": lambda half: setattr(half.page(SECS), "lock", 2),
    "the page is invalid": lambda half: setattr(half.page(SECS), "valid", False),
    "the page is of another type": lambda half: setattr(half.page(SECS), "pt", PageType.REG),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0, 8, 4096 * FIRST, 4096 * VA, 4096 * 63, 1 << 40])
def test_a_tracking_cycle_begins_where_nothing_is_in_its_way(way: str, offset: int) -> None:
    ended, epochs = [], []
    for half in (Half(fast=True), Half(fast=False)):
        WAYS[way](half)
        before = half.enclave.epoch
        try:
            ended.append(half.hw.leaves.etrack(half.base + offset).name)
        except Fault as fault:
            ended.append(str(fault))
        counts = half.enclave.prev_count, half.enclave.cur_count
        epochs.append((half.enclave.epoch - before, counts, half.state()))
    assert ended[0] == ended[1] and epochs[0] == epochs[1]
    free = way in ("nothing", "a processor of this cycle", "leaves share the page")
    assert (ended[0] == "SUCCESS") is (free and not offset)
