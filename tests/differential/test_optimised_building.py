"""The fast EADD and EEXTEND against the readable ones, on the same histories.

Method: two machines, one with optimised leaves, take the same random calls, good and bad ones, and
must agree in result, EPCM, page bytes and measurement.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hw import RepeatingRuntime

from softsgx.arch import Attributes, AttributesFlags, PageType, SecInfo, Secs
from softsgx.hw import EpcPage, Fault, Machine, MachineConfig, PageInfoArgs
from softsgx.hw.optimised import OPTIMISED
from softsgx.trace import Tracer

PAGE = 4096
ELRANGE = 4 * PAGE
SECS, FIRST, PAGES = 0, 1, 3
#: Pages by ``fill``: zeros, and such that no two chunks are the same.
_CONTENTS = (bytes(PAGE), *(random.Random(fill).randbytes(PAGE) for fill in (1, 2, 3)))


@dataclass(frozen=True)
class Step:
    what: str
    page: int
    place: int
    flags: int
    reserved: bool
    secs: int
    dirt: int
    fill: int


class Half:
    """One machine with an enclave that is being built."""

    def __init__(self, *, fast: bool, tracer: Tracer | None = None) -> None:
        self.hw = Machine(
            MachineConfig.with_epc(16 << 12),
            RepeatingRuntime(seed=7),
            tracer=tracer,
            optimised=OPTIMISED if fast else None,
        )
        self.base = self.hw.config.sections[0].base
        attributes = Attributes(flags=int(AttributesFlags.MODE64BIT), xfrm=3)
        image = Secs(size=ELRANGE, base=ELRANGE, ssa_frame_size=1, attributes=attributes).pack()
        info = PageInfoArgs(0, image, SecInfo.of(PageType.SECS), 0)
        self.hw.leaves.ecreate(info, self.base)

    def page(self, index: int) -> EpcPage:
        page = self.hw.page_at(self.base + index * PAGE)
        assert page is not None
        return page

    def run(self, step: Step) -> str:
        target = self.base + (FIRST + step.page) * PAGE
        enclave = self.page(SECS).enclave
        assert enclave is not None
        if step.what == "lock":
            page = self.page((SECS, FIRST, FIRST + 1)[step.page])
            page.lock = (0, 1, -1)[step.place % 3]
            return ""
        if step.what == "measure":
            enclave.measurement_lock = not enclave.measurement_lock
            return ""
        if step.what == "initialize":
            enclave.flags ^= int(AttributesFlags.INIT)
            return ""
        try:
            secs = self.base + step.secs * PAGE
            if step.what == "eadd":
                secinfo = SecInfo(flags=step.flags, reserved=bytes(55) + bytes([step.reserved]))
                where = ELRANGE + step.place * PAGE + step.dirt
                info = PageInfoArgs(where, _CONTENTS[step.fill], secinfo, secs)
                self.hw.leaves.eadd(info, target + step.dirt * (step.fill & 1))
            elif step.what == "eextend":
                self.hw.leaves.eextend_page(secs, target + step.dirt)
            else:
                self.hw.leaves.eremove(target)
        except Fault as fault:
            return str(fault)
        return "done"

    def state(self) -> list[object]:
        """Everything that a leaf could have changed."""
        seen: list[object] = [each.hexdigest() for each in self.hw.measurements.values()]
        for index in range(FIRST + PAGES):
            page = self.page(index)
            seen.append((repr(page), page.lock, page.valid and page.bepoch))
            if page.valid and page.secs is not None:
                seen.append(self.hw.store.read(page, 0, PAGE))
            if page.enclave is not None:
                seen.append((page.enclave.children, page.enclave.measurement_lock))
        return seen


_FLAGS = [0x203, 0x203, 0x201, 0x205, 0x207, 0x200, 0x202, 0x206, 0x100, 0x300, 0x20B, 0x1_0203]
_pages = st.integers(0, PAGES - 1)
_calls = [*["eadd"] * 3, *["eextend"] * 3, "eremove", "lock", "measure", "initialize"]
_rubbish = st.builds(
    Step,
    what=st.sampled_from(_calls),
    page=_pages,
    place=st.sampled_from([0, 1, 2, 3, 4, -1]),
    flags=st.sampled_from(_FLAGS),
    reserved=st.sampled_from([False, False, False, True]),
    secs=st.sampled_from([SECS, SECS, SECS, SECS, FIRST]),
    dirt=st.sampled_from([0, 0, 0, 0, 8, 256]),
    fill=st.integers(0, 3),
)
# Calls that succeed when nothing is in their way.
_fitting = st.builds(
    Step,
    what=st.sampled_from(["eadd", "eadd", "eextend", "eremove"]),
    page=_pages,
    place=_pages,
    flags=st.sampled_from([0x203, 0x205]),
    reserved=st.just(False),
    secs=st.just(SECS),
    dirt=st.just(0),
    fill=st.integers(0, 3),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(_fitting | _fitting | _rubbish, max_size=25))
def test_fast_and_readable_building_do_the_same(history: list[Step]) -> None:
    fast, readable = Half(fast=True), Half(fast=False)
    for step in history:
        assert fast.run(step) == readable.run(step), step
        assert fast.state() == readable.state(), step


@pytest.mark.parametrize("what", ["eadd", "eextend"])
@pytest.mark.parametrize("held", ["page alone", "page shared", "SECS alone", "measurement", "init"])
def test_the_fast_leaves_find_what_others_hold(held: str, what: str) -> None:
    ended, wanted = Half(fast=True), Half(fast=False)
    results = []
    for half in (ended, wanted):
        assert half.run(Step("eadd", 0, 0, 0x203, False, SECS, 0, 1)) == "done"
        target, enclave = half.page(FIRST + (what == "eadd")), half.page(SECS).enclave
        assert enclave is not None
        if held == "measurement":
            enclave.measurement_lock = True
        elif held == "init":
            enclave.flags |= int(AttributesFlags.INIT)
        else:
            page = half.page(SECS) if held == "SECS alone" else target
            page.lock = 1 if held == "page shared" else -1
        step = Step(what, int(what == "eadd"), 1, 0x203, False, SECS, 0, 2)
        results.append((half.run(step), half.state()))
    assert results[0] == results[1]


def test_the_fast_leaves_are_those_that_run_unless_there_is_a_listener() -> None:
    leaves = Half(fast=True).hw.leaves
    names = {leaves.eadd.__func__.__name__, leaves.eextend_page.__func__.__name__}  # type: ignore[attr-defined]
    assert names == {"_eadd", "_eextend_page"}
    heard: list[str] = []
    half = Half(fast=True, tracer=lambda event: heard.append(event.line().split(":")[1]))
    half.run(Step("eadd", 0, 0, 0x203, False, SECS, 0, 0))
    half.run(Step("eextend", 0, 0, 0, False, SECS, 0, 0))
    assert heard == ["ecreate", "eadd"] + ["eextend"] * 16
