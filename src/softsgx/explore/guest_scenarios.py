"""The built-in scenarios with guests: races between the host and a guest over the guest's EPC."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, SecInfo, Secs
from softsgx.explore.stage import Stage
from softsgx.explore.violation import Violation
from softsgx.hw import Fault, PageInfoArgs
from softsgx.kvm import GuestStoppedError, Vepc
from softsgx.paging import FaultResult
from softsgx.userland import Signal

__all__ = ["GUEST_SCENARIOS"]

_HOST_PAGES, _GUEST_PAGES = 48, 32
_MODE64, _PROVISION = AttributesFlags.MODE64BIT.value, AttributesFlags.PROVISIONKEY.value


def guest_reclaim(stage: Stage) -> None:
    """The host evicts a guest's pages while the guest evicts them too and a thread reads them."""
    platform = stage.boot(_HOST_PAGES)
    guest = platform.guest("a", epc=_GUEST_PAGES * PAGE_BYTES, processors=2)
    guest.core.stop()
    enclave = stage.enclave(2, guest=guest)

    def use() -> None:
        with enclave.inhabitant() as thread:
            thread.read(0)

    stage.task("host", lambda: _evict_on_host(stage, guest.guest.vepcs[0], 3))
    stage.task("guest", lambda: enclave.evict(1))
    stage.task("thread", use)


def guest_fault(stage: Stage) -> None:
    """The host evicts a page of a guest while two of the guest's processors touch it."""
    platform = stage.boot(_HOST_PAGES)
    guest = platform.guest("a", epc=_GUEST_PAGES * PAGE_BYTES, processors=2)
    guest.core.stop()
    enclave = stage.enclave(2, threads=2, guest=guest)

    def use(thread: int) -> None:
        with enclave.inhabitant(thread) as inside:
            inside.read(thread)

    stage.task("host", lambda: _evict_on_host(stage, guest.guest.vepcs[0], 4))
    stage.task("first", lambda: use(0))
    stage.task("second", lambda: use(1))


def guest_end(stage: Stage) -> None:
    """A guest is stopped while the host evicts its pages and a thread runs in it."""
    platform = stage.boot(_HOST_PAGES)
    guest = platform.guest("a", epc=_GUEST_PAGES * PAGE_BYTES)
    guest.core.stop()
    enclave = stage.enclave(1, guest=guest)
    enclave.open = False

    def use() -> None:
        try:
            with enclave.inhabitant() as thread:
                thread.read(0)
        except (GuestStoppedError, Signal):
            pass  # what it held is gone

    vepc = guest.guest.vepcs[0]
    stage.task("stop", lambda: guest.guest.stop("on command"))
    stage.task("host", lambda: _evict_on_host(stage, vepc, 3))
    stage.task("thread", use)
    stage.check(lambda: _nothing_resident(guest.guest.resident))


def vepc_mappings(stage: Stage) -> None:
    """Two mappings of one virtual EPC touch the same page; each fault maps it."""
    platform = stage.boot(_HOST_PAGES)
    guest = platform.guest("a", epc=_GUEST_PAGES * PAGE_BYTES)
    guest.core.stop()
    vepc = guest.guest.vepcs[0]
    first, second = vepc.mmap(8), vepc.mmap(8)

    def touch(fault: Callable[[int], FaultResult]) -> None:
        result = fault(3)
        if result not in (FaultResult.NOPAGE, FaultResult.RETRY):
            raise Violation("lost page", f"a fault of the virtual EPC ends with {result.value}")

    stage.task("first", lambda: touch(first.fault))
    stage.task("second", lambda: touch(second.fault))

    def mapped() -> None:
        missing = [name for name, m in (("first", first), ("second", second)) if 3 not in m.entries]
        if missing:
            raise Violation("livelock", f"no entry in the {missing[0]} mapping: it only faults")

    stage.check(mapped)


def guest_ecreate(stage: Stage) -> None:
    """A guest without provisioning executes ECREATE while its other processor changes the SECS."""
    platform = stage.boot(_HOST_PAGES)
    guest = platform.guest("a", epc=_GUEST_PAGES * PAGE_BYTES, processors=2)
    guest.core.stop()
    leaves, page = guest.guest.leaves, guest.core.alloc(None, reclaim=False)
    leaves.eremove(page.addr)  # the host gives it a page; so ECREATE does not fault
    plain, wanted = (_secs(flags) for flags in (_MODE64, _MODE64 | _PROVISION))
    secs = bytearray(plain)

    def create() -> None:
        with suppress(Fault):  # refused: the guest sees a fault
            leaves.ecreate(PageInfoArgs(0, secs, SecInfo(), 0), page.addr)

    def change() -> None:
        secs[:] = wanted

    def check() -> None:
        backed = guest.guest.page_at(page.addr)
        if backed is None or backed.epc is None:
            return
        held = platform.machine.page_at(backed.epc.addr)
        if held is not None and held.valid and held.owner.flags & _PROVISION:
            raise Violation("privilege", "the guest's enclave has PROVISIONKEY", page.addr)

    stage.task("ecreate", create)
    stage.task("change", change)
    stage.check(check)


def _secs(flags: int) -> bytes:
    attributes = Attributes(flags=flags, xfrm=3)
    size = 2 * PAGE_BYTES
    return Secs(size=size, base=size, ssa_frame_size=1, attributes=attributes).pack()


def _evict_on_host(stage: Stage, vepc: Vepc, count: int) -> None:
    for page in list(vepc.pages.values())[:count]:
        if page.epc is not None:
            stage.platform.core.evict(page.epc)


def _nothing_resident(pages: int) -> None:
    if pages:
        raise Violation("leaked pages", f"{pages} pages of a guest that was stopped are resident")


GUEST_SCENARIOS: dict[str, Callable[[Stage], None]] = {
    "guest-reclaim": guest_reclaim,
    "guest-fault": guest_fault,
    "guest-end": guest_end,
    "guest-ecreate": guest_ecreate,
    "vepc-mappings": vepc_mappings,
}
"""By the names that users give."""
