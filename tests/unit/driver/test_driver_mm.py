"""mmap, mprotect, munmap, mremap, fork: which mappings of enclaves are allowed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from tests.support.driver import (
    BASE,
    RW,
    RWX,
    Launched,
    System,
    build,
    errno_of,
    launch,
    pattern,
    plan_for,
)

from softsgx.arch import PAGE_BYTES
from softsgx.driver import (
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    FaultResult,
)
from softsgx.userland import Signal

R = 1
FIXED = MAP_SHARED | MAP_FIXED


@pytest.fixture
def made() -> Launched:
    return launch(System().process(), 4, size=16 * PAGE_BYTES)


def _mmap(made: Launched, *args: Any, **options: Any) -> str:
    file, mm = made.file, made.process.mm
    return errno_of(lambda: file.mmap(mm, *args, **options))


@pytest.mark.parametrize(
    ("addr", "length", "prot", "flags", "errno"),
    [
        pytest.param(BASE, PAGE_BYTES, R, MAP_PRIVATE | MAP_FIXED, "EINVAL", id="private"),
        pytest.param(BASE, PAGE_BYTES, R, MAP_FIXED, "EINVAL", id="neither"),
        pytest.param(BASE, 0, R, FIXED, "EINVAL", id="no length"),
        pytest.param(BASE + 1, PAGE_BYTES, R, FIXED, "EINVAL", id="not aligned"),
        pytest.param(BASE, PAGE_BYTES, R, MAP_SHARED | MAP_FIXED_NOREPLACE, "EEXIST", id="taken"),
        pytest.param(1 << 47, PAGE_BYTES, R, FIXED, "ENOMEM", id="no user address"),
        pytest.param(BASE, PAGE_BYTES, R, FIXED, "ok", id="TCS for reading"),
        pytest.param(BASE, PAGE_BYTES, RW, MAP_SHARED_VALIDATE | MAP_FIXED, "ok", id="validate"),
        pytest.param(BASE, PAGE_BYTES, RWX, FIXED, "EACCES", id="TCS with X"),
        pytest.param(BASE, 16 * PAGE_BYTES, RWX, FIXED, "EACCES", id="one page does not allow X"),
        pytest.param(BASE, 16 * PAGE_BYTES, 0, FIXED, "ok", id="none is always fine"),
        pytest.param(BASE + 7 * PAGE_BYTES, PAGE_BYTES, RWX, FIXED, "ok", id="a hole"),
        pytest.param(BASE, 17 * PAGE_BYTES, R, FIXED, "EACCES", id="across the end"),
        pytest.param(BASE - PAGE_BYTES, PAGE_BYTES, R, FIXED, "EACCES", id="before the start"),
    ],
)
def test_mmap_says_what_the_row_says(
    made: Launched, addr: int, length: int, prot: int, flags: int, errno: str
) -> None:
    assert _mmap(made, addr, length, prot, flags) == errno


def test_a_mapping_without_a_place_gets_one_of_its_own(made: Launched) -> None:
    made.process.munmap(made.base, made.size)
    process, length = made.process, made.size
    fd = process.open()  # not created yet: anything goes, anywhere
    first = process.mmap(fd, 0, length, RWX, MAP_SHARED)
    second = process.mmap(fd, 0, length, RWX, MAP_SHARED)
    assert abs(first - second) >= length
    assert process.mmap(fd, 0x1234_5678, length, R, MAP_SHARED) == 0x1234_5000


def test_before_init_a_mapping_may_lie_outside_the_enclave() -> None:
    process = System().process()
    fd = build(process, plan_for(1), init=False)
    assert errno_of(lambda: process.mmap(fd, BASE - PAGE_BYTES, PAGE_BYTES, RWX)) == "ok"


def test_a_task_whose_reads_imply_execution_maps_no_enclave(made: Launched) -> None:
    made.process.personality_read_implies_exec = True
    assert errno_of(lambda: made.process.mmap(made.fd, BASE, PAGE_BYTES, R)) == "EACCES"
    assert errno_of(lambda: made.process.mprotect(BASE, PAGE_BYTES, R)) == "EACCES"


def test_an_ended_address_space_cannot_be_registered(made: Launched) -> None:
    other = made.process.driver.open(made.process)
    made.process.mm.exit()
    mm = made.process.mm
    assert errno_of(lambda: other.mmap(mm, BASE, PAGE_BYTES, R, FIXED)) == "ENOMEM"


def test_mapping_over_a_mapping_replaces_it(made: Launched) -> None:
    thread = made.thread()
    thread.load(made.data(0))
    made.process.mmap(made.fd, made.data(0), PAGE_BYTES, R)
    assert len(made.process.mm.vmas()) == 3
    assert thread.load(made.data(0)) == pattern(0)[:8]
    with pytest.raises(Signal, match="SIGSEGV"):
        thread.store(made.data(0), b"x")


def test_mprotect_takes_a_right_from_threads_that_are_using_it(made: Launched) -> None:
    thread = made.thread()
    thread.store(made.data(1), b"mine")  # the translation with W is in its TLB now
    made.process.mprotect(made.data(1), PAGE_BYTES, R)
    with pytest.raises(Signal) as seen:
        thread.store(made.data(1), b"late")
    assert (seen.value.name, seen.value.code) == ("SIGSEGV", 0x7)
    made.process.mprotect(made.data(1), PAGE_BYTES, RW)
    thread.store(made.data(1) + 4, b"back")
    assert thread.load(made.data(1)) == b"mineback"


def test_mprotect_splits_mappings_and_refuses_what_a_page_forbids(made: Launched) -> None:
    mm = made.process.mm
    before = len(mm.vmas())
    assert errno_of(lambda: mm.mprotect(made.data(1), PAGE_BYTES, RWX)) == "EACCES"
    assert errno_of(lambda: mm.mprotect(made.data(1) + 1, PAGE_BYTES, R)) == "EINVAL"
    assert errno_of(lambda: mm.mprotect(made.data(1), PAGE_BYTES, 8)) == "EINVAL"
    assert len(mm.vmas()) == before
    mm.mprotect(made.data(1), PAGE_BYTES, R)
    assert [vma.prot for vma in mm.vmas()] == [RW, RW, R, RW]


def test_munmap_takes_the_middle_out_and_the_file_lives_with_the_rest(made: Launched) -> None:
    process, thread = made.process, made.thread()
    for at in range(3):
        thread.load(made.data(at))
    assert errno_of(lambda: process.munmap(made.data(1), 0)) == "EINVAL"
    process.munmap(made.data(1), PAGE_BYTES)
    with pytest.raises(Signal, match="SIGSEGV"):
        thread.load(made.data(1))
    assert thread.load(made.data(2)) == pattern(2)[:8]
    process.close(made.fd)
    assert thread.load(made.data(0)) == pattern(0)[:8]


@pytest.mark.parametrize(
    ("old", "old_pages", "new_pages", "to", "errno"),
    [
        pytest.param(3, 13, 14, None, "EFAULT", id="grow"),
        pytest.param(3, 13, 14, 0x10_0000, "EFAULT", id="grow and move"),
        pytest.param(3, 14, 14, None, "EFAULT", id="longer than the mapping"),
        pytest.param(40, 1, 1, None, "EFAULT", id="no mapping"),
        pytest.param(3, 1, 0, None, "EINVAL", id="to nothing"),
        pytest.param(3, 2, 2, BASE + 4 * PAGE_BYTES, "EINVAL", id="onto itself"),
        pytest.param(3, 2, 2, 0x10_0001, "EINVAL", id="to an odd place"),
        pytest.param(3, 13, 2, None, "ok", id="shrink"),
        pytest.param(3, 13, 13, None, "ok", id="stay"),
        pytest.param(3, 13, 13, 0x10_0000, "ok", id="move"),
        (0, 2, 1, (1 << 47) - PAGE_BYTES, "ok"),
        (0, 2, 2, (1 << 47) - PAGE_BYTES, "EINVAL"),
        (0, 1, 1, 1 << 47, "EINVAL"),
        (0, 1, 1, 1 << 63, "EINVAL"),
        (1 << 20, 1, 1, 1 << 63, "EFAULT"),
    ],
)
def test_mremap_says_what_the_row_says(
    made: Launched, old: int, old_pages: int, new_pages: int, to: int | None, errno: str
) -> None:
    mm = made.process.mm
    args = (BASE + old * PAGE_BYTES, old_pages * PAGE_BYTES, new_pages * PAGE_BYTES, to)
    assert errno_of(lambda: mm.mremap(*args)) == errno
    if errno == "ok":
        start = args[0] if to is None else to
        vma = mm.find(start)
        assert vma is not None
        assert (vma.start, vma.end) == (start, start + args[2])
        assert to is None or mm.find(args[0]) is None


@pytest.mark.parametrize("to", [(1 << 47) - PAGE_BYTES, 1 << 47, (1 << 64) - 2 * PAGE_BYTES])
def test_a_process_that_moves_mappings_to_the_end_of_memory_lets_the_enclave_go(to: int) -> None:
    system = System()
    process = system.process()
    made = launch(process)
    with suppress(OSError):
        process.mm.mremap(made.data(0), PAGE_BYTES, PAGE_BYTES, to)
    process.exit()
    system.driver.unload()
    assert system.free_pages == system.epc_pages


def test_pages_of_a_moved_mapping_are_not_found(made: Launched) -> None:
    mm = made.process.mm
    mm.mremap(made.data(0), PAGE_BYTES, PAGE_BYTES, 0x10_0000)
    assert mm.fault(0x10_0000, R) is FaultResult.SIGBUS
    assert mm.fault(made.data(0), R) is FaultResult.SEGV


def test_a_forked_child_shares_the_enclave() -> None:
    system = System()
    made = launch(system.process(), 4)
    child = made.process.fork()
    mine, hers = made.thread(0), child.thread(1)
    mine.store(made.data(0), b"from parent")
    mine.exit()
    hers.enter(made.tcs())
    assert hers.load(made.data(0), 11) == b"from parent"
    hers.exit()
    made.process.exit()
    hers.enter(made.tcs())
    assert hers.load(made.data(0), 11) == b"from parent"
    hers.exit()
    child.exit()
    system.check_invariants()
    assert system.free_pages == system.epc_pages


def test_a_child_that_could_not_be_registered_gets_sigbus() -> None:
    made = launch(System().process())
    child = made.process.fork(fail=True)
    assert child.mm.fault(made.data(0), R) is FaultResult.SIGBUS
    assert made.process.mm.fault(made.data(0), R) is FaultResult.NOPAGE
    child.exit()
    made.process.exit()


def test_private_memory_of_a_child_is_its_own() -> None:
    process = System().process()
    at = process.memory.put(b"before")
    child = process.fork()
    process.memory.write(at, b"parent")
    assert child.memory.read(at, 6) == b"before"
