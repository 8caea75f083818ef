"""Mutations of the core that are in no list of defects: a scenario finds each.

Each mutation is of another kind: a lock is dropped, a recheck skipped, two phases are swapped.
"""

from __future__ import annotations

from typing import Any

import pytest

from softsgx.driver import EnclaveVma, FaultResult, Mm
from softsgx.driver import fault as fault_module
from softsgx.driver.enclave import Enclave
from softsgx.driver.page import EnclavePage
from softsgx.explore.work import Unit, UnitResult, run_unit
from softsgx.paging import LoadFailed, NoEpc, SgxEpcPage


def _explored(scenario: str) -> UnitResult:
    return run_unit(Unit(0, scenario, (), "random", 0, 300, until_found=True))


def test_a_dropped_lock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault loads a page without the enclave's lock."""

    def unlocked(
        enclave: Enclave, mm: Mm, vma: EnclaveVma, linaddr: int, index: int, task: Any
    ) -> tuple[str, FaultResult]:
        page = enclave.pages[index]
        try:
            epc = fault_module.load(page, task)
        except (NoEpc, LoadFailed):
            return "refused", FaultResult.SIGBUS
        return "major", fault_module._map(mm, vma, page, epc)

    assert not _explored("two-faults").findings
    monkeypatch.setattr(fault_module, "_fault_in", unlocked)
    assert _explored("two-faults").findings


@pytest.mark.slow
def test_a_skipped_recheck_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault maps a page without a look whether a batch is about to evict it."""
    real = fault_module.load

    def unchecked(page: EnclavePage, task: Any) -> SgxEpcPage:
        epc = page.epc
        return real(page, task) if epc is None else epc

    assert not _explored("thread-reclaim").findings
    monkeypatch.setattr(fault_module, "load", unchecked)
    assert _explored("thread-reclaim").findings


@pytest.mark.slow
def test_two_swapped_phases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is blocked before its mappings are removed."""

    def block_first(page: EnclavePage) -> bool:
        with page.enclave.lock:
            assert page.epc is not None and page.swap.block(page.epc)
        page.enclave.zap(page)
        return True

    assert not _explored("thread-reclaim").findings
    monkeypatch.setattr(EnclavePage, "block", block_first)
    assert _explored("thread-reclaim").findings
