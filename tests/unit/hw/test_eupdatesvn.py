"""EUPDATESVN: a security version is adopted on an idle machine with an empty EPC, and only then.

Goal: each code, their order, and what becomes of secrets.  Method: the leaf is called in states
that real leaves made; another leaf is caught in its middle by a runtime whose points call back.

Source:
    Linux, "x86/sgx: Implement ENCLS[EUPDATESVN]".
"""

from __future__ import annotations

from collections.abc import Callable

from tests.support.hw import free_pages, make_machine

from softsgx.arch import PageType, Status
from softsgx.hw import Machine, PageInfoArgs
from softsgx.runtime import InlineRuntime

NEWER = bytes([2] * 8 + [0] * 8)
OLD = bytes([1] * 8 + [0] * 8)


def with_new_microcode() -> Machine:
    return make_machine(microcode_svn=NEWER)


def test_without_newer_microcode_nothing_changes() -> None:
    machine = make_machine()
    paging, report = machine.secrets.paging, machine.secrets.report_key_id
    assert machine.leaves.eupdatesvn() is Status.NO_UPDATE
    assert (machine.cpusvn, machine.secrets.paging, machine.secrets.report_key_id) == (
        OLD, paging, report,
    )  # fmt: skip


def test_an_update_takes_the_new_version_once() -> None:
    machine = with_new_microcode()
    paging, device = machine.secrets.paging, machine.secrets.device_key
    assert machine.leaves.eupdatesvn() is Status.SUCCESS
    assert machine.cpusvn == NEWER
    assert machine.secrets.paging is not paging
    assert machine.secrets.device_key == device, "what is fused stays"
    assert machine.leaves.eupdatesvn() is Status.NO_UPDATE


def test_microcode_may_be_loaded_later() -> None:
    machine = make_machine()
    machine.microcode_svn = NEWER
    assert machine.leaves.eupdatesvn() is Status.SUCCESS


def test_any_page_in_use_stands_in_the_way() -> None:
    machine = with_new_microcode()
    va = next(free_pages(machine))
    machine.leaves.epa(PageType.VA, va)
    assert machine.leaves.eupdatesvn() is Status.EPC_NOT_READY
    assert machine.cpusvn == OLD
    machine.leaves.eremove(va)
    assert machine.leaves.eupdatesvn() is Status.SUCCESS


def test_a_dry_generator_asks_for_a_repetition() -> None:
    machine = with_new_microcode()
    machine.entropy_failures = 2
    codes = [machine.leaves.eupdatesvn() for _ in range(3)]
    assert codes == [Status.INSUFFICIENT_ENTROPY] * 2 + [Status.SUCCESS]
    machine.entropy_failures = 1
    machine.leaves.epa(PageType.VA, next(free_pages(machine)))
    assert machine.leaves.eupdatesvn() is Status.EPC_NOT_READY


def test_a_page_evicted_before_can_never_be_loaded_after() -> None:
    machine = with_new_microcode()
    leaves, free = machine.leaves, free_pages(machine)
    va, victim = next(free), next(free)
    leaves.epa(PageType.VA, va)
    leaves.epa(PageType.VA, victim)
    info = PageInfoArgs(0, bytearray(4096), bytearray(128))
    assert leaves.ewb(info, victim, va) is Status.SUCCESS
    version = machine.pages[va].slots
    assert version is not None
    kept = version[0]
    leaves.eremove(va)
    assert leaves.eupdatesvn() is Status.SUCCESS
    leaves.epa(PageType.VA, va)
    slots = machine.pages[va].slots
    assert slots is not None
    slots[0] = kept  # even with the very version in place
    assert leaves.eldu(info, victim, va) is Status.MAC_COMPARE_FAIL


class Interrupting(InlineRuntime):
    """Calls back at the point of another leaf, once."""

    callback: Callable[[], None] | None = None

    def point(self, where: str) -> None:
        if where != "EUPDATESVN" and self.callback is not None:
            callback, self.callback = self.callback, None
            callback()


def test_a_leaf_that_is_running_conflicts() -> None:
    runtime = Interrupting()
    machine = make_machine(runtime=runtime, microcode_svn=NEWER)
    seen: list[Status] = []
    runtime.callback = lambda: seen.append(machine.leaves.eupdatesvn())
    va = next(free_pages(machine))
    machine.leaves.epa(PageType.VA, va)
    assert seen == [Status.EPC_PAGE_CONFLICT]
    machine.leaves.eremove(va)
    assert machine.leaves.eupdatesvn() is Status.SUCCESS
