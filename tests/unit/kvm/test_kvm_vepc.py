"""``/dev/sgx_vepc``: faults, REMOVE_ALL, closing, and files that share an enclave.

Goal: mainline's semantics, with pages that the host may have evicted meanwhile.

Method: a guest with one or two virtual EPCs whose driver builds enclaves in them; the test plays
the VMM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from mmap import MAP_PRIVATE

import pytest
from tests.support.driver import Launched, launch, pattern
from tests.support.guests import GuestHost, GuestSystem

from softsgx.arch import Status
from softsgx.defects import Defect
from softsgx.kvm import (
    SGX_IOC_VEPC_REMOVE_ALL,
    GuestStoppedError,
    Monitor,
    Vepc,
    VepcPage,
)
from softsgx.paging import FaultResult


def errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def empty(**options: object) -> tuple[GuestHost, Monitor, Vepc]:
    """A virtual EPC that no guest uses yet."""
    host = GuestHost(epc_pages=40, **options)  # type: ignore[arg-type]
    monitor = Monitor(host.core, "vmm")
    return host, monitor, host.device.open(monitor)


def apart(epc_pages: int = 80) -> tuple[GuestHost, GuestSystem, Launched]:
    """A guest with two virtual EPCs: the SECS of its enclave is in A, all its pages are in B."""
    host = GuestHost(epc_pages=epc_pages)
    guest = host.guest((4, 16))
    process = guest.process()
    fd = process.open()
    process.close(fd)
    spare = [guest.core.alloc(None, reclaim=False) for _ in range(2)]
    made = launch(process, 4)  # SECS and its VA page take what is left of A
    first, second = guest.guest.vepcs
    assert guest.secs(made.enclave).vepc is first
    assert {guest.data(made.enclave, at).vepc for at in made.enclave.pages} == {second}
    for page in spare:
        guest.core.free(page)
    return host, guest, made


# --- mmap and faults --------------------------------------------------------------------------


def test_a_mapping_must_be_shared() -> None:
    _host, _monitor, vepc = empty()
    assert errno_of(lambda: vepc.mmap(4, flags=MAP_PRIVATE)) == errno.EINVAL
    assert errno_of(lambda: vepc.mmap(0)) == errno.EINVAL
    vepc.close()


def test_nothing_is_allocated_before_it_is_touched() -> None:
    host, monitor, vepc = empty()
    free = host.core.free_pages
    mapping = vepc.mmap(1 << 20)
    assert host.core.free_pages == free
    assert mapping.fault(1000) is FaultResult.NOPAGE
    assert monitor.resident == 1
    assert host.core.free_pages == free - 2, "the page, and a VA page of the host's"
    assert mapping.entries == {1000: vepc.pages[1000].epc.addr}  # type: ignore[union-attr]
    mapping.unmap()
    vepc.close()
    host.check_invariants()
    assert host.core.free_pages == free


def test_a_second_mapping_reaches_a_page_that_is_there() -> None:
    host, _monitor, vepc = empty()
    one, two = vepc.mmap(8), vepc.mmap(4, offset=2)
    assert one.fault(3) is FaultResult.NOPAGE
    assert two.fault(3) is FaultResult.NOPAGE
    assert two.entries == {3: one.entries[3]}
    one.unmap()
    vepc.close()
    assert host.core.counters.held["vepc"] == 1, "a mapping keeps the file"
    two.unmap()
    assert host.core.counters.held["vepc"] == 0


def test_l12_a_page_that_is_there_gets_no_entry() -> None:
    _host, _monitor, vepc = empty(defects=frozenset({Defect.RESIDENT_VEPC_PAGE_NOT_MAPPED}))
    one, two = vepc.mmap(8), vepc.mmap(8)
    assert one.fault(3) is FaultResult.NOPAGE
    assert two.fault(3) is FaultResult.NOPAGE
    assert two.entries == {}, "it will fault for ever"


def test_a_fault_without_retry_is_sigbus_when_there_is_no_page() -> None:
    host, monitor, vepc = empty()
    mapping = vepc.mmap(100)
    index = 0
    while host.core.free_pages:
        assert mapping.fault(index, retry=False) is FaultResult.NOPAGE
        index += 1
    assert mapping.fault(index, retry=False) is FaultResult.SIGBUS
    assert mapping.fault(index) is FaultResult.RETRY, "it has waited"
    assert mapping.fault(index) is FaultResult.NOPAGE
    assert monitor.counters.evicted > 0
    mapping.unmap()
    vepc.close()
    host.check_invariants()


# --- REMOVE_ALL -----------------------------------------------------------------------------------


def test_unknown_commands_and_arguments_are_refused() -> None:
    _host, _monitor, vepc = empty()
    assert errno_of(lambda: vepc.ioctl(0xA405)) == errno.ENOTTY
    assert errno_of(lambda: vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL, 1)) == errno.EINVAL
    assert vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 0


@pytest.mark.parametrize("evicted", [False, True])
def test_remove_all_empties_pages_and_keeps_them(evicted: bool) -> None:
    host = GuestHost(epc_pages=80)
    guest = host.guest(16)
    made = launch(guest.process(), 4)
    secs, children = guest.secs(made.enclave), _children(guest, made)
    if evicted:
        host.evict(*children[1:])
    resident = guest.guest.resident
    (vepc,) = guest.guest.vepcs
    left = vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL)
    assert left == 1, "the SECS came before its children"
    assert vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 0
    assert guest.guest.resident == resident
    for page in [secs, *children]:
        assert page.evicted is None
        assert page.epc is None or not host.epcm(page).valid
    assert secs.evicted_children == 0
    host.system.check_invariants()
    guest.guest.check_invariants()


@pytest.mark.parametrize("evicted", ["nothing", "children", "children and SECS"])
def test_two_rounds_over_all_files_empty_enclaves_that_they_share(evicted: str) -> None:
    host, guest, made = apart()
    first, second = guest.guest.vepcs
    if evicted != "nothing":
        host.evict(*_children(guest, made))
    if evicted == "children and SECS":
        host.evict(guest.secs(made.enclave))
    assert first.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 1
    assert second.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 0
    assert first.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 0
    valid = [page for page in host.system.machine.valid_pages() if page.pt.name not in ("VA",)]
    assert valid == []
    guest.guest.check_invariants()
    host.system.check_invariants()


def test_children_that_are_removed_while_their_secs_is_away_are_not_counted_any_more() -> None:
    host, guest, made = apart()
    _first, second = guest.guest.vepcs
    secs = guest.secs(made.enclave)
    host.evict(*_children(guest, made))
    host.evict(secs)
    assert second.ioctl(SGX_IOC_VEPC_REMOVE_ALL) == 0
    assert secs.deferred_edecvirtchild == len(made.enclave.pages)
    assert guest.guest.leaves.eremove(secs.gpa) is Status.SUCCESS
    assert secs.deferred_edecvirtchild == 0
    guest.guest.check_invariants()


def test_remove_all_is_refused_while_a_processor_is_inside() -> None:
    host = GuestHost(epc_pages=80)
    guest = host.guest(16)
    made = launch(guest.process(), 4)
    thread = made.thread()
    thread.load(made.data(0))
    (vepc,) = guest.guest.vepcs
    assert errno_of(lambda: vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL)) == errno.EBUSY
    assert thread.load(made.data(1), 8) == pattern(1)[:8]


# --- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", ["nothing", "a child", "children", "children and SECS"])
def test_a_secs_of_a_closed_file_exists_until_its_last_child_is_freed(evicted: str) -> None:
    host, guest, made = apart()
    first, second = guest.guest.mappings
    secs, children = guest.secs(made.enclave), _children(guest, made)
    match evicted:
        case "a child":
            host.evict(children[0])
        case "children":
            host.evict(*children)
        case "children and SECS":
            host.evict(*children)
            host.evict(secs)
        case _:
            pass
    first.unmap()
    assert host.device.zombies == [secs]
    if evicted != "nothing":
        # Its children still come and go, and find it.
        assert guest.guest.leaves.eblock(children[0].gpa) is not None
        host.check_invariants()
        host.evict(children[0])
    second.unmap()
    assert host.device.zombies == []
    guest.guest.mappings = []
    host.guests = []
    assert host.core.counters.held["vepc"] == 0
    host.check_invariants()
    assert host.core.free_pages == host.epc_pages


def test_a_secs_that_is_closed_last_leaves_no_zombie() -> None:
    host, guest, _made = apart()
    first, second = guest.guest.mappings
    second.unmap()
    assert host.device.zombies == []
    first.unmap()
    assert host.device.zombies == []
    assert host.core.free_pages == host.epc_pages


def test_everything_is_free_after_a_guest_that_was_in_the_middle_of_things() -> None:
    host = GuestHost(epc_pages=24)
    guest = host.guest(24)
    made = launch(guest.process(), 40)
    thread = made.thread()
    for number in range(40):
        thread.store(made.data(number), b"x")
    assert guest.guest.evicted_pages()
    guest.guest.destroy()
    host.guests = []
    host.check_invariants()
    assert host.core.free_pages == host.epc_pages
    with pytest.raises(GuestStoppedError, match="its VMM has ended"):
        thread.load(made.data(0))


def _children(guest: GuestSystem, made: Launched) -> list[VepcPage]:
    return [guest.data(made.enclave, at) for at in made.enclave.pages]
