"""RESTRICT_PERMISSIONS, MODIFY_TYPES, REMOVE_PAGES and pages made by touching them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.support.driver import RW, Launched, System, errno_of, launch, pattern, tcs_bytes

from softsgx.arch import PAGE_BYTES, PageType, SgxFeature, Status
from softsgx.driver import (
    FaultResult,
    Ioctl,
    ModifyTypes,
    ProcessorsKicked,
    RemovePages,
    RestrictPermissions,
)
from softsgx.hw import GeneralProtection, Machine
from softsgx.userland import Signal

R = 1
REG, TCS, TRIM = PageType.REG << 8, PageType.TCS << 8, PageType.TRIM << 8
PENDING, MODIFIED, PR = 8, 16, 32
SIZE = 16 * PAGE_BYTES
SGX1_ONLY = SgxFeature.SGX1


@pytest.fixture
def made() -> Launched:
    return launch(System(processors=3).process(), 4, threads=2, size=SIZE)


def _args(made: Launched) -> list[tuple[Ioctl, Any]]:
    offset, length = made.offset(0), PAGE_BYTES
    restrict = RestrictPermissions(offset=offset, length=length, permissions=R)
    modify = ModifyTypes(offset=offset, length=length, page_type=PageType.TRIM)
    remove = RemovePages(offset=offset, length=length)
    return [
        (Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, restrict),
        (Ioctl.ENCLAVE_MODIFY_TYPES, modify),
        (Ioctl.ENCLAVE_REMOVE_PAGES, remove),
    ]


def _try(made: Launched, command: Ioctl, args: Any) -> str:
    return errno_of(lambda: made.process.ioctl(made.fd, command, args))


WRONG: list[tuple[str, dict[str, int]]] = [
    ("offset not aligned", {"offset": 8}),
    ("length not aligned", {"length": 8}),
    ("no length", {"length": 0}),
    ("behind the end", {"offset": SIZE}),
    ("across the end", {"offset": SIZE - PAGE_BYTES, "length": 2 * PAGE_BYTES}),
    ("wraps round", {"offset": (1 << 64) - PAGE_BYTES, "length": 2 * PAGE_BYTES}),
    ("count not 0", {"count": 1}),
    ("result not 0", {"result": 1}),
    ("no such right", {"permissions": 8}),
    ("W without R", {"permissions": 2}),
    ("no such type", {"page_type": 0x100 | PageType.TRIM}),
    ("type REG", {"page_type": PageType.REG}),
]


@pytest.mark.parametrize("fields", [pytest.param(fields, id=name) for name, fields in WRONG])
def test_wrong_arguments_are_invalid_for_each_ioctl_that_has_them(
    made: Launched, fields: dict[str, int]
) -> None:
    tried = 0
    for command, args in _args(made):
        if all(name in args.OFFSETS for name in fields):
            assert _try(made, command, args.replace(**fields)) == "EINVAL", command.name
            tried += 1
    assert tried


def test_without_sgx2_the_ioctls_fail_with_any_arguments() -> None:
    system = System(config={"features": SGX1_ONLY})
    made = launch(system.process(), 1, size=SIZE)
    for command, args in _args(made):
        assert _try(made, command, args.replace(length=1)) == "ENODEV"
    assert made.process.mm.fault(made.data(3), R) is FaultResult.SIGBUS  # and no EAUG either


def test_before_init_they_are_invalid() -> None:
    process = System().process()
    fd = process.open()
    for command, args in _args(Launched(process, fd, 0, SIZE, 0, 0)):
        assert errno_of(partial(process.ioctl, fd, command, args)) == "EINVAL"


def test_a_hole_is_a_bad_address_and_what_came_before_counts(made: Launched) -> None:
    made.process.modify_types(made.fd, made.offset(3), PAGE_BYTES, PageType.TRIM)
    args = RestrictPermissions(offset=made.offset(2), length=4 * PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "EINVAL"  # page 3 is TRIM now
    assert args.count == PAGE_BYTES
    args = RestrictPermissions(offset=made.offset(4), length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "EFAULT"
    assert (args.count, args.result) == (0, 0)


# --- permissions ----------------------------------------------------------------------------------


def test_restricted_pages_fault_once_accepted_and_emodpe_gives_the_right_back(
    made: Launched,
) -> None:
    page, scratch = made.data(1), made.data(0)
    thread = made.thread()
    thread.store(page, b"before")
    args = made.process.restrict(made.fd, made.offset(1), PAGE_BYTES, R)
    assert (args.count, args.result) == (PAGE_BYTES, 0)
    assert thread.eaccept(page, REG | R | PR, scratch) is Status.SUCCESS
    with pytest.raises(Signal) as seen:
        thread.store(page, b"denied")
    assert (seen.value.name, seen.value.code) == ("SIGSEGV", 0x8007)
    thread.emodpe(page, RW, scratch)
    thread.store(page, b"after!")
    assert thread.load(page, 6) == b"after!"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [("pending", Status.PAGE_NOT_MODIFIABLE), ("locked", Status.EPC_PAGE_CONFLICT)],
)
def test_a_leaf_that_refuses_gives_its_code_in_result(
    made: Launched, row: str, wanted: Status
) -> None:
    made.process.mm.fault(made.data(4), R)
    epc = made.enclave.pages[made.enclave.index_of(made.data(4))].epc
    assert epc is not None
    machine = made.process.machine
    assert isinstance(machine, Machine)
    system_page = machine.pages[epc.addr]
    if row == "locked":
        system_page.modification_lock = True
    args = RestrictPermissions(offset=made.offset(4), length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "EFAULT"
    assert (args.result, args.count) == (wanted, 0)
    system_page.modification_lock = False


def test_a_tcs_cannot_be_restricted(made: Launched) -> None:
    args = RestrictPermissions(offset=0, length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "EINVAL"
    assert (args.result, args.count) == (0, 0)


# --- EAUG -----------------------------------------------------------------------------------------


def test_a_page_that_is_touched_must_be_accepted(made: Launched) -> None:
    page, thread = made.data(4), made.thread()
    with pytest.raises(Signal) as seen:
        thread.store(page, b"early")
    assert (seen.value.name, seen.value.code) == ("SIGSEGV", 0x8007)
    helper = made.thread(1)
    assert helper.eaccept(page, REG | RW | PENDING, made.data(0)) is Status.SUCCESS
    helper.exit()
    thread.store(page, b"later")
    assert thread.load(page, 5) == b"later"


def test_a_page_can_be_made_by_accepting_it(made: Launched) -> None:
    page, thread = made.data(5), made.thread()
    assert thread.eaccept(page, REG | RW | PENDING, made.data(0)) is Status.SUCCESS
    assert thread.load(page) == bytes(8)


def test_a_page_can_be_made_by_copying_into_it(made: Launched) -> None:
    page, thread = made.data(5), made.thread()
    status = thread.eacceptcopy(page, made.data(2), R, made.data(0))
    assert status is Status.SUCCESS
    assert thread.load(page, PAGE_BYTES) == pattern(2)


def test_a_page_that_was_made_survives_eviction_pending_and_accepted() -> None:
    system = System(epc_pages=32)
    made = launch(system.process(), 4, size=SIZE)
    made.process.mm.fault(made.data(4), R)
    system.evict(made.enclave)
    thread = made.thread()
    assert thread.eaccept(made.data(4), REG | RW | PENDING, made.data(0)) is Status.SUCCESS
    thread.store(made.data(4), b"kept")
    thread.exit()
    system.evict(made.enclave)
    thread.enter(made.tcs())
    assert thread.load(made.data(4), 4) == b"kept"


def test_nothing_is_made_outside_the_enclave_or_before_init() -> None:
    process = System().process()
    fd = process.open()
    process.mmap(fd, 0x10_0000, SIZE)
    assert process.mm.fault(0x10_0000, R) is FaultResult.SIGBUS


@pytest.mark.parametrize("leaf", ["eaug", "alloc"])
def test_a_page_that_could_not_be_made_leaves_nothing(made: Launched, leaf: str) -> None:
    system_core = made.process.driver.core
    before = system_core.free_pages
    if leaf == "eaug":
        real = system_core.leaves.eaug

        def refuse(*_operands: Any) -> None:
            raise GeneralProtection

        system_core.leaves.eaug = refuse
        assert made.process.mm.fault(made.data(4), R) is FaultResult.SIGBUS
        system_core.leaves.eaug = real
    else:
        held = [system_core.alloc(None, reclaim=False) for _ in range(before)]
        assert made.process.mm.fault(made.data(4), R) is FaultResult.RETRY
        for page in held:
            if page.group is not None:
                system_core.free(page)
    made.process.driver.check_invariants()
    assert made.process.mm.fault(made.data(4), R) is FaultResult.NOPAGE


# --- types ----------------------------------------------------------------------------------------


def test_a_new_thread_is_made_at_run_time(made: Launched) -> None:
    """EAUG three pages, write a TCS, convert, accept, enter; then take all of it away again."""
    tcs, ssa = made.data(4), made.data(5)
    thread, scratch = made.thread(), made.data(0)
    for page in (tcs, ssa, ssa + PAGE_BYTES):
        assert thread.eaccept(page, REG | RW | PENDING, scratch) is Status.SUCCESS
    thread.store(tcs, tcs_bytes(ossa=ssa - made.base))
    args = made.process.modify_types(made.fd, tcs - made.base, PAGE_BYTES, PageType.TCS)
    assert args.count == PAGE_BYTES
    assert thread.eaccept(tcs, TCS | MODIFIED, scratch) is Status.SUCCESS
    fresh = made.process.thread(2)
    fresh.enter(tcs)
    assert fresh.load(made.data(1)) == pattern(1)[:8]
    fresh.exit()

    args = made.process.modify_types(made.fd, tcs - made.base, 3 * PAGE_BYTES, PageType.TRIM)
    assert args.count == 3 * PAGE_BYTES
    for page in (tcs, ssa, ssa + PAGE_BYTES):
        assert thread.eaccept(page, TRIM | MODIFIED, scratch) is Status.SUCCESS
    removed = made.process.remove_pages(made.fd, tcs - made.base, 3 * PAGE_BYTES)
    assert removed.count == 3 * PAGE_BYTES
    assert thread.eaccept(tcs, REG | RW | PENDING, scratch) is Status.SUCCESS
    thread.store(tcs, b"data now")
    assert thread.load(tcs) == b"data now"


@pytest.mark.parametrize(
    ("page", "target", "errno"),
    [
        pytest.param("tcs", PageType.TCS, "EINVAL", id="TCS to TCS"),
        pytest.param("trim", PageType.TRIM, "EINVAL", id="TRIM to TRIM"),
        pytest.param("trim", PageType.TCS, "EINVAL", id="TRIM to TCS"),
        pytest.param("reg", PageType.TRIM, "ok", id="REG to TRIM"),
        pytest.param("reg", PageType.TCS, "ok", id="REG to TCS"),
        pytest.param("tcs", PageType.TRIM, "ok", id="TCS to TRIM"),
        pytest.param("read-only", PageType.TCS, "EPERM", id="read-only to TCS"),
        pytest.param("hole", PageType.TRIM, "EFAULT", id="hole"),
    ],
)
def test_a_type_changes_only_as_the_hardware_allows(page: str, target: int, errno: str) -> None:
    rights = R if page == "read-only" else RW
    made = launch(System().process(), 4, threads=2, size=SIZE, rights=rights)
    offset = {"tcs": 3 * PAGE_BYTES, "hole": made.offset(5)}.get(page, made.offset(1))
    if page == "trim":
        made.process.modify_types(made.fd, offset, PAGE_BYTES, PageType.TRIM)
    args = ModifyTypes(offset=offset, length=PAGE_BYTES, page_type=target)
    assert _try(made, Ioctl.ENCLAVE_MODIFY_TYPES, args) == errno
    assert args.count == (PAGE_BYTES if errno == "ok" else 0)


def test_a_page_in_a_batch_is_tried_again_and_keeps_its_rights(made: Launched) -> None:
    page = made.enclave.pages[made.enclave.index_of(made.data(1))]
    assert page.epc is not None and page.epc.lru is not None
    made.thread().exit()
    page.max_prot = 7
    isolated, _dying = page.epc.lru.isolate(100)  # as a batch does first
    args = ModifyTypes(offset=made.offset(1), length=PAGE_BYTES, page_type=PageType.TCS)
    assert _try(made, Ioctl.ENCLAVE_MODIFY_TYPES, args) == "EAGAIN"
    assert page.max_prot == 7
    page.being_reclaimed = True
    restrict = RestrictPermissions(offset=made.offset(1), length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, restrict) == "EAGAIN"
    page.being_reclaimed = False
    for epc in isolated:
        page.epc.lru.put_back(epc)
        page.put()
    assert _try(made, Ioctl.ENCLAVE_MODIFY_TYPES, args) == "ok"
    assert page.max_prot == RW


# --- removal --------------------------------------------------------------------------------------


def _trim(made: Launched, number: int, *, accept: bool) -> None:
    made.process.modify_types(made.fd, made.offset(number), PAGE_BYTES, PageType.TRIM)
    if accept:
        thread = made.thread(1)
        assert thread.eaccept(made.data(number), TRIM | MODIFIED, made.data(0)) is Status.SUCCESS
        thread.exit()


@pytest.mark.parametrize(
    ("trim", "accept", "errno"),
    [(False, False, "EPERM"), (True, False, "EPERM"), (True, True, "ok")],
)
def test_only_pages_that_the_enclave_let_go_are_removed(
    made: Launched, trim: bool, accept: bool, errno: str
) -> None:
    free = made.process.driver.core.free_pages
    if trim:
        _trim(made, 1, accept=accept)
    args = RemovePages(offset=made.offset(1), length=PAGE_BYTES)
    assert _try(made, Ioctl.ENCLAVE_REMOVE_PAGES, args) == errno
    gone = errno == "ok"
    assert args.count == PAGE_BYTES * gone
    assert made.process.driver.core.free_pages == free + gone
    made.process.driver.check_invariants()


def test_a_trimmed_page_is_denied_before_and_after_it_was_accepted(made: Launched) -> None:
    for accept in (False, True):
        _trim(made, 1 + accept, accept=accept)
        thread = made.thread()
        with pytest.raises(Signal) as seen:
            thread.load(made.data(1 + accept))
        assert seen.value.code == 0x8005
        thread.run(lambda cpu: None)  # resumes
        thread.exit()


def test_an_untouched_page_can_be_removed_and_so_can_an_evicted_one() -> None:
    system = System(epc_pages=32)
    made = launch(system.process(), 4, threads=2, size=SIZE)
    _trim(made, 3, accept=True)
    _trim(made, 2, accept=True)
    system.evict(made.enclave)
    args = made.process.remove_pages(made.fd, made.offset(2), 2 * PAGE_BYTES)
    assert args.count == 2 * PAGE_BYTES
    system.check_invariants()
    made.process.exit()
    assert system.free_pages == system.epc_pages


def test_a_page_in_a_batch_is_busy(made: Launched) -> None:
    _trim(made, 1, accept=True)
    page = made.enclave.pages[made.enclave.index_of(made.data(1))]
    assert page.epc is not None and page.epc.lru is not None
    lru = page.epc.lru
    isolated, _dying = lru.isolate(100)
    args = RemovePages(offset=made.offset(1), length=PAGE_BYTES)
    assert _try(made, Ioctl.ENCLAVE_REMOVE_PAGES, args) == "EBUSY"
    for epc in isolated:
        lru.put_back(epc)
        page.put()
    assert _try(made, Ioctl.ENCLAVE_REMOVE_PAGES, args) == "ok"


def test_each_page_of_an_ioctl_costs_a_round_of_interrupts() -> None:
    system = System(listen=True)
    made = launch(system.process(), 4)
    system.events.clear()
    made.process.restrict(made.fd, made.offset(0), 3 * PAGE_BYTES, R)
    assert sum(isinstance(event, ProcessorsKicked) for event in system.events) == 3


def test_tracking_that_cannot_begin_is_tried_again_after_interrupts(made: Launched) -> None:
    core = made.process.driver.core
    thread = made.thread()
    secs = made.enclave.swap.secs
    assert secs is not None
    core.leaves.etrack(secs.addr)  # its cycle is incomplete: the thread is still inside
    args = RestrictPermissions(offset=made.offset(1), length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "ok"
    thread.exit()

    def refuse(_secs: int) -> Status:
        return Status.PREV_TRK_INCMPL

    core.leaves.etrack = refuse
    args = RestrictPermissions(offset=made.offset(2), length=PAGE_BYTES, permissions=R)
    assert _try(made, Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, args) == "EFAULT"
    assert (args.count, args.result) == (0, 0)
