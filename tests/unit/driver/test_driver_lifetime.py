"""The lifetime of an enclave: files, mappings, address spaces, batches; killing; unloading.

Each test ends with every EPC page free again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.driver import (
    BASE,
    System,
    build,
    errno_of,
    launch,
    pattern,
    plan_for,
    secs_bytes,
)

from softsgx.arch import PAGE_BYTES, AttributesFlags
from softsgx.driver import (
    EnclaveCreated,
    EnclaveInitialized,
    EnclaveKilled,
    EnclaveReleased,
    FaultHandled,
    FaultResult,
    Ioctl,
    IoctlDone,
    RestrictPermissions,
    peek,
    poke,
)
from softsgx.driver.sync import RwLock, Srcu
from softsgx.runtime import SeededRuntime, Uniform
from softsgx.userland import Signal

R = 1
OTHER_BASE = 0x6000_0000_0000
DEBUG = AttributesFlags.MODE64BIT | AttributesFlags.DEBUG


@pytest.fixture
def system() -> Iterator[System]:
    made = System(listen=True)
    yield made
    made.check_invariants()
    assert made.free_pages == made.epc_pages
    assert not made.driver.enclaves


def _released(system: System) -> bool:
    return any(isinstance(event, EnclaveReleased) for event in system.events)


def test_closing_the_file_frees_an_enclave_without_mappings(system: System) -> None:
    process = system.process()
    fd = build(process, plan_for(4))
    process.close(fd)
    assert _released(system)


@pytest.mark.parametrize("order", ["close first", "unmap first"])
def test_a_mapping_keeps_the_enclave_and_so_does_the_descriptor(system: System, order: str) -> None:
    process = system.process()
    made = launch(process)
    if order == "close first":
        process.close(made.fd)
    else:
        process.munmap(made.base, made.size)
    assert not _released(system)
    if order == "close first":
        process.munmap(made.base, made.size)
    else:
        process.close(made.fd)
    assert _released(system)


def test_an_uncreated_enclave_costs_nothing(system: System) -> None:
    process = system.process()
    fd = process.open()
    process.mmap(fd, BASE, PAGE_BYTES)
    assert system.free_pages == system.epc_pages
    process.exit()


def test_an_enclave_half_built_is_freed(system: System) -> None:
    process = system.process()
    process.create(process.open(), secs_bytes(16 * PAGE_BYTES))
    build(process, plan_for(2), base=OTHER_BASE, init=False)
    process.exit()


def test_the_enclave_outlives_its_file_while_a_batch_has_it(system: System) -> None:
    process = system.process()
    fd = build(process, plan_for(4))
    enclave = process.enclave_file(fd).enclave
    page = enclave.pages[3]
    assert page.epc is not None and page.epc.lru is not None
    lru, epc = page.epc.lru, page.epc
    isolated, _dying = lru.isolate(4)  # what a batch does first: it pins the enclave
    process.close(fd)
    assert not _released(system)
    assert errno_of(system.driver.unload) == "EBUSY"
    for at, other in enumerate(isolated):
        lru.put_back(other)
        assert not _released(system), f"destroyed before page {at} of the batch was put"
        page.put()
    assert _released(system)
    assert epc.free


def test_a_dying_enclave_is_not_pinned_again(system: System) -> None:
    process = system.process()
    fd = build(process, plan_for(1))
    enclave = process.enclave_file(fd).enclave
    process.close(fd)
    assert not enclave.get()


def test_an_address_space_that_ends_while_it_is_walked_ends_after_the_walk(
    system: System,
) -> None:
    made = launch(system.process())
    mm = made.process.mm
    made.process.close(made.fd)
    assert mm.pin()
    mm.exit()
    assert not _released(system)
    mm.unpin()
    assert not mm.pin()
    system.runtime.yield_now()  # a task of its own does the rest
    assert _released(system)


def test_two_enclaves_in_one_process_and_one_in_two_processes(system: System) -> None:
    first = system.process()
    one, two = launch(first, 4), launch(first, 2, base=OTHER_BASE)
    second = first.fork()
    first.exit()
    thread = second.thread()
    for made in (one, two):
        thread.enter(made.tcs())
        assert thread.load(made.data(1)) == pattern(1)[:8]
        thread.exit()
    second.exit()


# --- killing --------------------------------------------------------------------------------------


def test_a_killed_enclave_gives_its_pages_back_and_its_users_get_sigbus(system: System) -> None:
    made = launch(system.process())
    other = launch(system.process(), base=OTHER_BASE)
    system.core.reclaim(force=True)
    thread = made.thread()
    victims = system.driver.victims()
    assert {file.enclave for file in victims} == {made.enclave, other.enclave}
    resident = made.enclave.resident_pages
    assert made.file.kill() == resident
    assert made.enclave.resident_pages == 0
    with pytest.raises(Signal, match="SIGBUS"):
        thread.load(made.data(0))
    for addr in (made.data(0), made.data(4)):
        assert made.process.mm.fault(addr, R) is FaultResult.SIGBUS
    args = RestrictPermissions(offset=made.offset(0), length=PAGE_BYTES, permissions=R)
    command = Ioctl.ENCLAVE_RESTRICT_PERMISSIONS
    assert errno_of(lambda: made.process.ioctl(made.fd, command, args)) == "EFAULT"
    assert made.file.kill() == 0
    assert [file.enclave for file in system.driver.victims()] == [other.enclave]
    survivor = other.thread(1, tcs=0)
    assert survivor.load(other.data(0)) == pattern(0)[:8]
    survivor.exit()
    assert any(isinstance(event, EnclaveKilled) for event in system.events)
    made.process.exit()
    other.process.exit()


def test_an_enclave_can_be_killed_while_it_is_built(system: System) -> None:
    process = system.process()
    fd = build(process, plan_for(2), init=False)
    process.enclave_file(fd).kill()
    data = bytes(PAGE_BYTES)
    assert errno_of(lambda: process.add_pages(fd, 5 * PAGE_BYTES, data, 0x203)) == "EFAULT"
    process.exit()


def test_pages_of_a_killed_enclave_in_a_batch_are_removed_by_the_batch(system: System) -> None:
    process = system.process()
    fd = build(process, plan_for(4))
    file = process.enclave_file(fd)
    page = file.enclave.pages[3]
    assert page.epc is not None and page.epc.lru is not None
    lru, epc = page.epc.lru, page.epc
    isolated, _dying = lru.isolate(16)
    assert epc in isolated
    prepared = [other.owner for other in isolated if other.owner is not None]
    assert all(owner.prepare() for owner in prepared)
    assert file.kill() == 0
    for other, owner in zip(isolated, prepared, strict=True):
        assert owner.age() and owner.block() and owner.write()
        lru.forget(other)
        system.core.free(other)
        owner.put()
    assert file.enclave.resident_pages == 0
    process.exit()


# --- the module -----------------------------------------------------------------------------------


def test_the_driver_can_be_unloaded_and_loaded_while_the_core_goes_on(system: System) -> None:
    process = system.process()
    launch(process)
    permission = process.open_provision()
    assert errno_of(system.driver.unload) == "EBUSY"
    process.exit()
    assert process.file(permission) is None
    kept = system.core.alloc(None, reclaim=False, kind="vepc")  # somebody else's
    system.driver.unload()
    assert errno_of(system.process().open) == "ENODEV"
    assert errno_of(system.process().open_provision) == "ENODEV"
    system.driver = system.load_driver()
    again = launch(system.process())
    thread = again.thread()
    assert thread.load(again.data(0)) == pattern(0)[:8]
    thread.exit()
    again.process.exit()
    system.core.remove(kept)
    system.driver.unload()
    system.driver.load()


def test_a_machine_without_launch_control_has_no_driver() -> None:
    with pytest.raises(OSError, match="No such device"):
        System(config={"launch_control": False})


# --- debug access ---------------------------------------------------------------------------------


def test_a_debugger_reads_and_writes_a_debug_enclave_evicted_or_not(system: System) -> None:
    made = launch(system.process(), flags=DEBUG)
    system.evict(made.enclave)
    mm = made.process.mm
    assert peek(mm, made.data(1) + 3, 10) == pattern(1)[3:13]
    assert poke(mm, made.data(1) + 5, b"poked across words") == 18
    assert (
        peek(mm, made.data(1), 32)
        == (pattern(1)[:5] + b"poked across words" + pattern(1)[23:])[:32]
    )
    thread = made.thread()
    assert thread.load(made.data(1) + 5, 18) == b"poked across words"
    thread.exit()
    made.process.exit()


def test_debug_access_stops_where_the_enclave_does(system: System) -> None:
    made = launch(system.process(), flags=DEBUG)
    mm = made.process.mm
    assert len(peek(mm, made.data(3) + 4090, 20)) == 6
    assert errno_of(lambda: peek(mm, made.data(4), 8)) == "EFAULT"
    assert errno_of(lambda: peek(mm, 0x1000, 8)) == "EFAULT"
    assert len(peek(mm, made.tcs(), 200)) == 72  # the readable part of a TCS
    assert errno_of(lambda: poke(mm, made.tcs(), b"x")) == "EIO"
    made.process.exit()


def test_a_production_enclave_cannot_be_debugged(system: System) -> None:
    made = launch(system.process())
    assert errno_of(lambda: peek(made.process.mm, made.data(0), 8)) == "EFAULT"
    assert errno_of(lambda: poke(made.process.mm, made.data(0), b"x")) == "EFAULT"
    made.process.exit()


# --- events ---------------------------------------------------------------------------------------


def test_a_listener_hears_an_enclaves_life(system: System) -> None:
    made = launch(system.process(), 2, size=16 * PAGE_BYTES)
    thread = made.thread()
    thread.load(made.data(0))
    with pytest.raises(Signal):
        thread.load(made.data(3))
    thread.exit()
    errno_of(lambda: made.process.restrict(made.fd, 0, PAGE_BYTES, R))
    made.process.exit()
    seen = [event for event in system.events if type(event).__module__ == "softsgx.driver.events"]
    kinds = [type(event) for event in seen]
    assert kinds.index(EnclaveCreated) < kinds.index(EnclaveInitialized)
    assert kinds[-1] is EnclaveReleased
    faults = {event.kind for event in seen if isinstance(event, FaultHandled)}
    assert faults == {"minor", "augment"}
    refused = [event for event in seen if isinstance(event, IoctlDone) and event.errno]
    assert [event.command for event in refused] == ["SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS"]
    assert "errno=" in refused[0].line()


# --- the locks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_writers_are_alone_and_readers_are_not(seed: int) -> None:
    runtime = SeededRuntime(seed, policy=Uniform())
    lock = RwLock(runtime, "rw")
    inside: list[str] = []
    together = 0

    def read() -> None:
        nonlocal together
        for _ in range(4):
            with lock.reading():
                inside.append("r")
                runtime.point("reading")
                assert "w" not in inside
                together = max(together, len(inside))
                inside.remove("r")

    def write() -> None:
        for _ in range(4):
            with lock.writing():
                assert not inside
                inside.append("w")
                runtime.point("writing")
                inside.remove("w")

    def main() -> None:
        for task in [runtime.spawn(run, run.__name__) for run in (read, read, write, write)]:
            task.join()

    runtime.run(main)
    assert not lock.held()


@pytest.mark.parametrize("seed", range(20))
def test_a_grace_period_waits_for_readers_that_came_before_and_only_for_those(seed: int) -> None:
    runtime = SeededRuntime(seed, policy=Uniform())
    srcu = Srcu(runtime, "srcu")
    linked = [0]

    def read() -> None:
        for _ in range(4):
            turn = srcu.enter()
            seen = linked[0]
            runtime.point("reading")
            assert freed < seen + 1, "a reader holds what was freed"
            srcu.leave(turn)

    freed = -1

    def update() -> None:
        nonlocal freed
        for version in range(1, 4):
            old, linked[0] = linked[0], version
            srcu.synchronize()
            freed = old

    def main() -> None:
        for task in [runtime.spawn(run, run.__name__) for run in (read, read, update)]:
            task.join()

    runtime.run(main)
    srcu.cleanup()
    with pytest.raises(AssertionError, match="after cleanup"):
        srcu.enter()
