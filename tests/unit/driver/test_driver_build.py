"""CREATE, ADD_PAGES, INIT, PROVISION: each errno, the order of checks, counts, and that a refusal
leaves the EPC as it was.

Method: a bench whose next call would succeed; a row breaks one thing.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tests.support.driver import (
    BASE,
    RW,
    SECINFO_RW,
    SECINFO_RWX,
    SECINFO_TCS,
    System,
    build,
    errno_of,
    launch,
    pattern,
    plan_for,
    secs_bytes,
    sigstruct_for,
    tcs_bytes,
    unsigned,
)

from softsgx.arch import PAGE_BYTES, AttributesFlags, PageType, SecInfo, SigStruct, Status
from softsgx.driver import AddPages, BadAddress, Create, Init, Ioctl, VmaInfo
from softsgx.driver import build as build_module
from softsgx.hw import GeneralProtection
from softsgx.paging import BackingError
from softsgx.userland import SoftProcess
from softsgx.userland.memory import SoftMemory

SIZE = 16 * PAGE_BYTES
NOWHERE = 0xDEAD_0000


class Bench:
    """A process with an open, perhaps created enclave, and arguments that would work."""

    def __init__(self, *, created: bool = False, **options: Any) -> None:
        self.system = System(**options)
        self.process = self.system.process()
        self.fd = self.process.open()
        if created:
            self.process.create(self.fd, secs_bytes(SIZE))
        memory = self.process.memory
        self.free_before = self.system.free_pages
        self.args = AddPages(
            src=memory.put(b"".join(pattern(at) for at in range(4))),
            offset=0,
            length=4 * PAGE_BYTES,
            secinfo=memory.put(SecInfo(flags=SECINFO_RW).pack()),
            flags=1,
        )

    def secinfo(self, **fields: Any) -> None:
        self.args.secinfo = self.process.memory.put(SecInfo(**fields).pack())

    def add(self) -> str:
        return errno_of(lambda: self.process.ioctl(self.fd, Ioctl.ENCLAVE_ADD_PAGES, self.args))

    def create(self, secs: bytes) -> str:
        return errno_of(lambda: self.process.create(self.fd, secs))

    def raw(self, cmd: int, arg: int) -> str:
        file = self.process.enclave_file(self.fd)
        return errno_of(lambda: file.ioctl(self.process, cmd, arg))


def fail_leaf(system: System, name: str, nth: int = 1) -> None:
    """Let the ``nth`` call of a leaf raise #GP."""
    leaves = system.core.leaves
    real = getattr(leaves, name)
    left = iter(range(nth, 0, -1))

    def leaf(*operands: Any) -> Any:
        if next(left, 0) == 1:
            raise GeneralProtection
        return real(*operands)

    setattr(leaves, name, leaf)


# --- what all ioctls share ------------------------------------------------------------------------


def test_an_unknown_command_is_no_tty() -> None:
    assert Bench().raw(0xA4FF, 0) == "ENOTTY"


@pytest.mark.parametrize("cmd", [command for command in Ioctl if "_PERM" not in command.name])
def test_a_bad_argument_pointer_is_a_bad_address(cmd: Ioctl) -> None:
    bench = Bench(created=cmd is not Ioctl.ENCLAVE_CREATE)
    if cmd in (Ioctl.ENCLAVE_MODIFY_TYPES, Ioctl.ENCLAVE_REMOVE_PAGES):
        bench.process.enclave_file(bench.fd).enclave.initialized = True
    assert bench.raw(cmd, NOWHERE) == "EFAULT"


def test_a_second_ioctl_on_one_file_is_busy() -> None:
    bench = Bench(created=True)
    seen: list[str] = []

    def pending() -> bool:
        if not seen:
            seen.append("asked")
            seen.append(bench.add())
        return False

    bench.process.signal = pending
    assert bench.add() == "ok"
    assert seen == ["asked", "EBUSY"]
    assert bench.add() == "EBUSY"  # now because the pages are there: the first is not stuck


# --- CREATE ---------------------------------------------------------------------------------------

CREATE_ROWS: list[tuple[str, bytes, str]] = [
    ("no power of two", secs_bytes(3 * PAGE_BYTES), "EINVAL"),
    ("size zero", secs_bytes(0), "EINVAL"),
    ("one page: ECREATE faults", secs_bytes(PAGE_BYTES), "EIO"),
    ("base not aligned: ECREATE faults", secs_bytes(SIZE, BASE + PAGE_BYTES), "EIO"),
    ("reserved attribute: ECREATE faults", secs_bytes(SIZE, flags=1 << 3 | 4), "EIO"),
]


@pytest.mark.parametrize(("secs", "errno"), [row[1:] for row in CREATE_ROWS])
def test_a_create_that_is_refused_leaves_nothing_and_can_be_repeated(
    secs: bytes, errno: str
) -> None:
    bench = Bench()
    assert bench.create(secs) == errno
    assert bench.system.free_pages == bench.free_before
    bench.system.check_invariants()
    assert bench.create(secs_bytes(SIZE)) == "ok"
    assert bench.create(secs_bytes(SIZE)) == "EINVAL"  # created already


def test_create_takes_a_secs_and_a_va_page() -> None:
    bench = Bench()
    assert bench.create(secs_bytes(SIZE)) == "ok"
    assert bench.free_before - bench.system.free_pages == 2


def test_create_with_a_bad_secs_pointer_is_a_bad_address() -> None:
    bench = Bench()
    at = bench.process.memory.put(Create(src=NOWHERE).pack())
    assert bench.raw(Ioctl.ENCLAVE_CREATE, at) == "EFAULT"


@pytest.mark.parametrize("leaf", ["epa", "ecreate"])
def test_create_unwinds_when_a_leaf_faults(leaf: str) -> None:
    bench = Bench()
    fail_leaf(bench.system, leaf)
    assert bench.create(secs_bytes(SIZE)) in ("EIO", "EFAULT")
    assert bench.system.free_pages == bench.free_before
    bench.system.check_invariants()
    assert bench.create(secs_bytes(SIZE)) == "ok"


@pytest.mark.parametrize("epc_pages", [1, 2])
def test_create_without_epc_is_out_of_memory(epc_pages: int) -> None:
    system = System(epc_pages=2)
    process = system.process()
    if epc_pages == 1:
        system.core.alloc(None, reclaim=False)
    else:
        process.create(process.open(), secs_bytes(SIZE))
    before = system.free_pages
    assert errno_of(lambda: process.create(process.open(), secs_bytes(SIZE))) == "ENOMEM"
    assert system.free_pages == before


def test_create_without_memory_for_backing_is_out_of_memory() -> None:
    def none(_pages: int) -> Any:
        raise BackingError("no room")

    bench = Bench(backing=none)
    assert bench.create(secs_bytes(SIZE)) == "ENOMEM"
    assert bench.system.free_pages == bench.free_before


def test_create_is_restarted_when_a_signal_comes_while_it_reclaims() -> None:
    system = System(epc_pages=12)
    process = system.process()
    launch(process, 20)  # fills the EPC with pages that can be reclaimed
    while system.free_pages:
        system.core.alloc(None, reclaim=False)
    fd = process.open()
    process.signal = True
    assert errno_of(lambda: process.create(fd, secs_bytes(SIZE, 0))) == "ERESTARTSYS"
    assert not system.free_pages
    process.signal = False
    assert errno_of(lambda: process.create(fd, secs_bytes(SIZE, 0))) == "ok"


# --- ADD_PAGES ------------------------------------------------------------------------------------


def _set(**fields: int) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        for name, value in fields.items():
            setattr(bench.args, name, value)

    return change


def _secinfo(**fields: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.secinfo(**fields)


def _noexec(bench: Bench) -> None:
    bench.args.src = bench.process.memory.put(bytes(4 * PAGE_BYTES), may_exec=False)


def _unreadable(bench: Bench) -> None:
    bench.process.memory.protect(bench.args.src, 4 * PAGE_BYTES, 0)


def _added(bench: Bench) -> None:
    bench.process.add_pages(bench.fd, 0, bytes(PAGE_BYTES), SECINFO_RW)


def _bad_tcs(bench: Bench) -> None:
    bench.secinfo(flags=SECINFO_TCS)
    bench.args.src = bench.process.memory.put(b"\xff" * bench.args.length)


ADD_ROWS: list[tuple[str, Callable[[Bench], None], str]] = [
    ("source not aligned", _set(src=0x1234), "EINVAL"),
    ("offset not aligned", _set(offset=0x10), "EINVAL"),
    ("length not aligned", _set(length=0x1010), "EINVAL"),
    ("length zero", _set(length=0), "EINVAL"),
    ("behind the end", _set(offset=SIZE), "EINVAL"),
    ("across the end", _set(offset=SIZE - PAGE_BYTES), "EINVAL"),
    ("wraps round", _set(offset=(1 << 64) - PAGE_BYTES, length=2 * PAGE_BYTES), "EINVAL"),
    ("type VA", _secinfo(flags=PageType.VA << 8), "EINVAL"),
    ("type SECS", _secinfo(flags=0), "EINVAL"),
    ("type TRIM", _secinfo(flags=PageType.TRIM << 8), "EINVAL"),
    ("W without R", _secinfo(flags=PageType.REG << 8 | 2), "EINVAL"),
    ("TCS with rights", _secinfo(flags=SECINFO_TCS | 3), "EINVAL"),
    ("PENDING set", _secinfo(flags=SECINFO_RW | 8), "EINVAL"),
    ("reserved flag set", _secinfo(flags=SECINFO_RW | 1 << 16), "EINVAL"),
    ("reserved byte set", _secinfo(flags=SECINFO_RW, reserved=b"\1" + bytes(55)), "EINVAL"),
    ("bad SECINFO pointer", _set(secinfo=NOWHERE), "EFAULT"),
    ("nothing mapped at the source", _set(src=NOWHERE), "EFAULT"),
    ("source not readable", _unreadable, "EFAULT"),
    ("source on a noexec mount", _noexec, "EACCES"),
    ("page there already", _added, "EBUSY"),
    ("EADD faults", _bad_tcs, "EIO"),
]


@pytest.mark.parametrize(("change", "errno"), [pytest.param(*r[1:], id=r[0]) for r in ADD_ROWS])
def test_add_pages_refuses_with_the_errno_of_the_row_and_adds_nothing(
    change: Callable[[Bench], None], errno: str
) -> None:
    bench = Bench(created=True)
    change(bench)
    before = bench.system.free_pages
    assert bench.add() == errno
    assert bench.args.count == 0
    assert bench.system.free_pages == before
    bench.system.check_invariants()


def test_pages_are_added_only_between_create_and_init() -> None:
    assert Bench().add() == "EINVAL"
    bench = Bench()
    made = launch(bench.process, 1, base=0x10_0000)
    bench.fd = made.fd
    assert bench.add() == "EINVAL"


def test_flags_other_than_measure_are_not_looked_at() -> None:
    bench = Bench(created=True)
    bench.args.flags = 0xFFFF_FFFE
    assert bench.add() == "ok"
    assert bench.args.count == bench.args.length


@pytest.mark.parametrize(
    ("leaf", "nth"), [("eadd", 1), ("eadd", 3), ("eextend_page", 1), ("eextend_page", 3)]
)
def test_a_leaf_that_faults_undoes_one_page_and_counts_those_before(leaf: str, nth: int) -> None:
    bench = Bench(created=True)
    fail_leaf(bench.system, leaf, nth)
    before = bench.system.free_pages
    assert bench.add() == "EIO"
    done = nth - 1
    assert bench.args.count == done * PAGE_BYTES
    assert before - bench.system.free_pages == done
    bench.system.check_invariants()


def test_add_pages_goes_on_where_it_was_interrupted() -> None:
    bench = Bench(created=True)
    asked = iter([False, False, True])
    bench.process.signal = lambda: next(asked)
    assert bench.add() == "ok"  # two pages, then the signal: success, with less done
    assert bench.args.count == 2 * PAGE_BYTES
    bench.process.signal = False
    for name in ("src", "offset"):
        setattr(bench.args, name, getattr(bench.args, name) + bench.args.count)
    bench.args.length -= bench.args.count
    assert bench.add() == "ok"
    assert len(bench.process.enclave_file(bench.fd).enclave.pages) == 4


class _ReadingAhead(SoftMemory):
    """Memory that gives up to three pages at once."""

    def read_pages(self, address: int, count: int) -> list[bytes]:
        pages = [self.read(address, PAGE_BYTES)]
        with suppress(BadAddress):
            while len(pages) < min(count, 3):
                pages.append(self.read(address + len(pages) * PAGE_BYTES, PAGE_BYTES))
        return pages

    def vma_info(self, address: int) -> VmaInfo | None:
        found = super().vma_info(address)
        end = address
        while found is not None:
            end += PAGE_BYTES
            following = super().vma_info(end)
            if following is None or following.may_exec != found.may_exec:
                return VmaInfo(address, end, may_exec=found.may_exec)
        return None


def _reading_ahead() -> Bench:
    bench = Bench(created=True)
    bench.process.memory.__class__ = _ReadingAhead
    return bench


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("how", ["unreadable", "noexec", "unmapped"])
def test_every_page_before_a_bad_source_is_added_however_far_it_was_read_ahead(
    how: str, bad: int
) -> None:
    bench = _reading_ahead()
    memory, at = bench.process.memory, bench.args.src + bad * PAGE_BYTES
    if how == "unreadable":
        memory.protect(at, PAGE_BYTES, 0)
    else:
        memory.unmap(at, PAGE_BYTES)
        if how == "noexec":
            memory.map(PAGE_BYTES, addr=at, may_exec=False)
    assert bench.add() == ("EACCES" if how == "noexec" else "EFAULT")
    assert bench.args.count == bad * PAGE_BYTES
    bench.system.check_invariants()


def test_pages_that_were_read_ahead_have_their_own_bytes() -> None:
    bench = _reading_ahead()
    assert bench.add() == "ok"
    enclave, store = bench.process.enclave_file(bench.fd).enclave, bench.system.machine.store
    for index, page in enclave.pages.items():
        assert page.epc is not None
        epc = bench.system.machine.page_at(page.epc.addr)
        assert epc is not None and store.read(epc, 0, PAGE_BYTES) == pattern(index)


def test_pages_that_were_read_ahead_are_added_before_a_signal_ends_the_call() -> None:
    bench = _reading_ahead()
    asked = iter([False, True])
    bench.process.signal = lambda: next(asked)
    assert bench.add() == "ok"
    assert bench.args.count == 3 * PAGE_BYTES


def test_a_signal_before_the_first_page_restarts_the_call() -> None:
    bench = Bench(created=True)
    bench.process.signal = True
    assert bench.add() == "ERESTARTSYS"
    assert bench.args.count == 0


def test_adding_more_than_the_epc_holds_evicts_what_was_added() -> None:
    bench = Bench(created=True, epc_pages=8)
    bench.args.src = bench.process.memory.put(bytes(SIZE))
    bench.args.length = SIZE
    assert bench.add() == "ok"
    assert bench.system.core.counters.reclaimed > 0
    bench.system.check_invariants()


def test_adding_without_epc_is_out_of_memory() -> None:
    bench = Bench(created=True)
    while bench.system.free_pages:
        bench.system.core.alloc(None, reclaim=False)
    assert bench.add() == "ENOMEM"
    assert bench.args.count == 0


@pytest.mark.parametrize(
    ("flags", "data", "most"),
    [(SECINFO_RW, bytes(4096), RW), (SECINFO_RWX, bytes(4096), 7), (SECINFO_TCS, tcs_bytes(), RW)],
)
def test_a_page_may_be_mapped_with_the_rights_it_was_added_with(
    flags: int, data: bytes, most: int
) -> None:
    bench = Bench(created=True)
    bench.process.add_pages(bench.fd, 0, data, flags)
    for prot in range(8):
        wanted = "ok" if prot & ~most == 0 else "EACCES"
        assert errno_of(partial(bench.process.mmap, bench.fd, BASE, PAGE_BYTES, prot)) == wanted


def test_outputs_are_copied_back_and_failing_to_is_a_bad_address() -> None:
    bench = Bench(created=True)
    at = bench.process.memory.put(bench.args.pack())
    bench.process.memory.protect(at, PAGE_BYTES, 1)
    assert bench.raw(Ioctl.ENCLAVE_ADD_PAGES, at) == "EFAULT"
    with pytest.raises(BadAddress):
        bench.process.memory.write(at, b"x")


# --- INIT -----------------------------------------------------------------------------------------


@pytest.fixture
def added() -> Iterator[tuple[System, SoftProcess, int]]:
    system = System()
    process = system.process()
    yield system, process, build(process, plan_for(1), init=False)
    process.exit()
    system.check_invariants()
    assert system.free_pages == 64


PLAN = plan_for(1)


def _no_platform_bits() -> bytes:
    sig = SigStruct.unpack(sigstruct_for(PLAN))
    attributes = sig.attributes.replace(xfrm=sig.attributes.xfrm | 1 << 30)
    mask = sig.attribute_mask.replace(xfrm=1 << 30)
    return sig.replace(attributes=attributes, attribute_mask=mask).pack()


INIT_ROWS: list[tuple[str, Callable[[], bytes], str]] = [
    ("vendor", lambda: unsigned(sigstruct_for(PLAN), vendor=7), "EINVAL"),
    ("unsupported XFRM", _no_platform_bits, "EINVAL"),
    (
        "unsupported MISCSELECT",
        lambda: unsigned(sigstruct_for(PLAN), miscselect=1 << 9, misc_mask=1 << 9),
        "EINVAL",
    ),
    ("bad signature", lambda: unsigned(sigstruct_for(PLAN), date=0x20240101), "EPERM"),
    ("other measurement", lambda: sigstruct_for(plan_for(0, size=PLAN.size)), "EPERM"),
    ("fits", lambda: sigstruct_for(PLAN), "ok"),
]


@pytest.mark.parametrize(("sig", "errno"), [pytest.param(*r[1:], id=r[0]) for r in INIT_ROWS])
def test_init_refuses_with_the_errno_of_the_row_and_can_be_repeated(
    added: tuple[System, SoftProcess, int], sig: Callable[[], bytes], errno: str
) -> None:
    _system, process, fd = added
    assert errno_of(lambda: process.init(fd, sig())) == errno
    if errno != "ok":
        assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN))) == "ok"
    assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN))) == "EINVAL"


def test_init_before_create_is_refused() -> None:
    bench = Bench()
    assert errno_of(lambda: bench.process.init(bench.fd, sigstruct_for(PLAN))) == "EINVAL"


def test_init_with_a_bad_sigstruct_pointer_is_a_bad_address(
    added: tuple[System, SoftProcess, int],
) -> None:
    _system, process, fd = added
    args = Init(sigstruct=NOWHERE)
    assert errno_of(lambda: process.ioctl(fd, Ioctl.ENCLAVE_INIT, args)) == "EFAULT"


def test_einit_is_repeated_while_events_are_pending(
    added: tuple[System, SoftProcess, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    system, process, fd = added
    leaves, tries = system.core.leaves, []
    real = leaves.einit

    def einit(*operands: Any) -> Status:
        tries.append(operands)
        return Status.UNMASKED_EVENT if len(tries) < 45 else real(*operands)

    monkeypatch.setattr(leaves, "einit", einit)
    monkeypatch.setattr(build_module, "EINIT_SLEEP_NS", 1000)
    assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN))) == "ok"
    assert len(tries) == 45


@pytest.mark.parametrize(
    ("signal", "errno", "tries"), [(False, "EPERM", 1000), (True, "ERESTARTSYS", 20)]
)
def test_einit_gives_up_after_fifty_naps_or_a_signal(
    added: tuple[System, SoftProcess, int],
    monkeypatch: pytest.MonkeyPatch,
    signal: bool,
    errno: str,
    tries: int,
) -> None:
    system, process, fd = added
    seen = []

    def einit(*operands: Any) -> Status:
        seen.append(operands)
        return Status.UNMASKED_EVENT

    monkeypatch.setattr(system.core.leaves, "einit", einit)
    monkeypatch.setattr(build_module, "EINIT_SLEEP_NS", 1000)
    process.signal = signal
    assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN))) == errno
    assert len(seen) == tries


def test_init_of_an_enclave_that_lost_its_epc_is_an_io_error(
    added: tuple[System, SoftProcess, int],
) -> None:
    system, process, fd = added
    system.machine.power_transition()
    assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN))) == "EIO"


def test_init_writes_the_signers_hash_only_with_launch_control() -> None:
    system = System(config={"launch_key_hash": (1, 2, 3, 4)})
    process = system.process()
    build(process, PLAN)
    assert system.machine.launch_key_hash != [1, 2, 3, 4]


# --- PROVISION ------------------------------------------------------------------------------------

PROVISIONED = AttributesFlags.MODE64BIT | AttributesFlags.PROVISIONKEY


@pytest.mark.parametrize("when", ["never", "before create", "after create"])
def test_the_provisioning_key_needs_the_provision_device(when: str) -> None:
    system = System()
    process = system.process()
    fd, permission = process.open(), process.open_provision()
    if when == "before create":
        process.provision(fd, permission)
    process.create(fd, secs_bytes(PLAN.size, flags=PROVISIONED))
    if when == "after create":
        process.provision(fd, permission)
    for run in PLAN.runs:
        data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
        process.add_pages(fd, run.offset, data, run.flags, measure=False)
    sig = sigstruct_for(PLAN, PROVISIONED)
    assert errno_of(lambda: process.init(fd, sig)) == ("EACCES" if when == "never" else "ok")


def test_only_an_open_provision_device_gives_permission() -> None:
    system = System()
    process = system.process()
    fd, permission = process.open(), process.open_provision()
    for bad in (fd, 99):
        assert errno_of(partial(process.provision, fd, bad)) == "EINVAL"
    process.close(permission)
    assert errno_of(lambda: process.provision(fd, permission)) == "EINVAL"


def test_the_launch_key_is_never_given() -> None:
    system = System()
    process = system.process()
    flags = AttributesFlags.MODE64BIT | AttributesFlags.EINITTOKENKEY
    fd = build(process, PLAN, flags=flags, init=False)
    assert errno_of(lambda: process.init(fd, sigstruct_for(PLAN, flags))) == "EACCES"


def test_a_heap_of_zeros_takes_no_memory_of_its_own_until_it_is_written() -> None:
    system = System(epc_pages=4096)
    process = system.process()
    fd = process.open()
    process.create(fd, secs_bytes(1 << 24))
    pages, chunk = 2048, bytes(256 * PAGE_BYTES)
    tracemalloc.start()
    try:
        for at in range(0, pages, 256):
            process.add_pages(fd, at * PAGE_BYTES, chunk, SECINFO_RW, measure=False)
        gc.collect()
        taken, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < pages * PAGE_BYTES // 3, f"{taken // pages} bytes a page"


def test_a_store_to_one_page_of_zeros_changes_no_other() -> None:
    system = System()
    process = system.process()
    plan = plan_for(4)
    fd = process.open()
    process.create(fd, secs_bytes(plan.size))
    for run in plan.runs[:2]:
        data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
        process.add_pages(fd, run.offset, data, run.flags, measure=False)
    process.add_pages(fd, 3 * PAGE_BYTES, bytes(4 * PAGE_BYTES), SECINFO_RW, measure=False)
    process.init(fd, sigstruct_for(plan))
    process.mmap(fd, BASE, plan.size, RW)
    thread = process.thread()
    thread.enter(BASE)
    thread.store(BASE + 4 * PAGE_BYTES, b"x" * 64)
    for number in (3, 5, 6):
        assert thread.load(BASE + number * PAGE_BYTES, 64) == bytes(64)
    assert thread.load(BASE + 4 * PAGE_BYTES, 64) == b"x" * 64
