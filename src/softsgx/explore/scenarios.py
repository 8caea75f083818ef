"""The built-in scenarios of the host, each a race of a few tasks.

Each is a function of a stage; its docstring says in one sentence what races.  Pages of an enclave
are numbered from 0; the holes behind them are where EAUG makes pages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN, EBUSY

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.driver import FaultResult
from softsgx.explore.stage import Stage, StagedEnclave
from softsgx.explore.violation import Violation
from softsgx.paging import EpcBusy, NoEpc
from softsgx.userland import Signal, SoftProcess

__all__ = ["HOST_SCENARIOS"]

_TRIM = PageType.TRIM
_TRIMMED = PageType.TRIM << 8 | 16  # TRIM, MODIFIED
_TRIES = 200


def fault_reclaim(stage: Stage) -> None:
    """A fault loads a page while its neighbour, whose PCMD is in the same PCMD page, is evicted."""
    enclave = stage.enclave(2)
    enclave.evict(0)
    stage.task("fault", lambda: enclave.touch(0))
    stage.task("reclaim", lambda: enclave.evict(1))

    def restore() -> None:
        enclave.touch(1)
        enclave.evict(0)

    stage.restore(restore)


def thread_reclaim(stage: Stage) -> None:
    """A thread reads and writes pages while they are evicted under it."""
    enclave = stage.enclave(3)
    enclave.evict(0)

    def use() -> None:
        with enclave.inhabitant() as thread:
            thread.read(0)
            thread.write(1, 100)
            thread.read(1)

    stage.task("thread", use)
    stage.task("reclaim", lambda: (enclave.evict(1), enclave.evict(2)))

    def restore() -> None:
        with enclave.inhabitant() as thread:  # the mappings of all its pages
            for number in range(enclave.pages):
                thread.read(number)
        enclave.evict(0)

    stage.restore(restore)


def batch_fault(stage: Stage) -> None:
    """A reclaim batch evicts everything, ksgxd included, while a thread uses two pages."""
    platform = stage.boot(32, ksgxd=True)
    enclave = stage.enclave(2)

    def use() -> None:
        with enclave.inhabitant() as thread:
            thread.write(0, 100)
            thread.read(1)

    stage.task("thread", use)
    stage.task("reclaim", lambda: platform.core.reclaim(force=True))


def two_faults(stage: Stage) -> None:
    """Two threads touch the same evicted page."""
    enclave = stage.enclave(2)
    enclave.evict(0)
    stage.task("first", lambda: enclave.touch(0))
    stage.task("second", lambda: enclave.touch(0))
    stage.restore(lambda: enclave.evict(0))


def two_augments(stage: Stage) -> None:
    """Two threads touch the same hole, which EAUG fills."""
    enclave = stage.enclave(2)
    stage.task("first", lambda: enclave.touch(2))
    stage.task("second", lambda: enclave.touch(2))
    stage.check(lambda: _accept_new(enclave, 2))

    def restore() -> None:
        if enclave.content.pop(2, None) is not None:
            _trim(enclave, 2)
            enclave.process.remove_pages(enclave.fd, enclave.offset(2), PAGE_BYTES)

    stage.restore(restore)


def augment_evicted_secs(stage: Stage) -> None:
    """A thread touches a hole while the last pages of its enclave, then the SECS, are evicted."""
    enclave = stage.enclave(1)
    for page in list(enclave.enclave.pages.values())[1:]:
        if page.epc is not None:
            stage.platform.core.evict(page.epc)

    def reclaim() -> None:
        for page in list(enclave.enclave.pages.values()):
            if page.epc is not None:
                stage.platform.core.evict(page.epc)

    stage.task("fault", lambda: enclave.touch(1))
    stage.task("reclaim", reclaim)


def augment_remove(stage: Stage) -> None:
    """A trimmed page is removed by ioctl while a fault touches it, and EAUG may make it anew."""
    enclave = stage.enclave(2)
    process = enclave.process

    def remove() -> None:
        _again(stage, lambda: process.remove_pages(enclave.fd, enclave.offset(1), PAGE_BYTES))

    stage.task("remove", remove)
    stage.task("fault", lambda: _touch_what_goes(stage, enclave, 1))
    stage.check(lambda: _accept_new(enclave, 1))

    def restore() -> None:
        enclave.content.clear()
        enclave.touch(0)
        _trim(enclave, 1)

    stage.restore(restore)


def ioctl_fault(stage: Stage) -> None:
    """RESTRICT_PERMISSIONS and MODIFY_TYPES change a page while a fault and a batch want it."""
    enclave = stage.enclave(2)
    process, offset = enclave.process, enclave.offset(1)

    def change() -> None:
        _again(stage, lambda: process.restrict(enclave.fd, offset, PAGE_BYTES, 1))
        _again(stage, lambda: process.modify_types(enclave.fd, offset, PAGE_BYTES, _TRIM))

    enclave.content.pop(1)
    stage.task("ioctl", change)
    stage.task("fault", lambda: _touch_what_goes(stage, enclave, 1))
    stage.task("reclaim", lambda: enclave.evict(1))


def fork_reclaim(stage: Stage) -> None:
    """A process forks while a page is evicted; then both processes read it."""
    enclave = stage.enclave(2)
    children: list[SoftProcess] = []

    def check_mapping() -> None:
        entry, page = children[-1].ptes.entry(enclave.addr(1)), enclave.page(1)
        if entry is not None and (page.epc is None or page.epc.blocked):
            raise enclave.violation("stale mapping", 1, "the child maps a page that is evicted")

    def fork() -> None:
        children.append(enclave.process.fork(name="child"))
        check_mapping()

    def read() -> None:
        check_mapping()
        enclave.touch(1, children[-1])
        children.pop().exit()

    stage.task("fork", fork)
    stage.task("reclaim", lambda: enclave.evict(1))
    stage.check(read)
    stage.restore(lambda: enclave.touch(1))


def exit_reclaim(stage: Stage) -> None:
    """A child process and the last file end while a page of their enclave is evicted."""
    enclave = stage.enclave(2)
    child = enclave.process.fork(name="child")
    page = enclave.page(1)
    enclave.open = False

    def reclaim() -> None:
        if page.epc is not None:
            stage.platform.core.evict(page.epc)

    stage.task("exit", child.exit)
    stage.task("close", enclave.process.exit)
    stage.task("reclaim", reclaim)
    stage.check(lambda: _nothing_left(stage))


def exit_close(stage: Stage) -> None:
    """An address space that was registered ends while the last file of its enclave is closed."""
    enclave = stage.enclave(1)
    other = stage.platform.process("other")
    file = enclave.process.enclave_file(enclave.fd)
    file.mmap(other.mm, enclave.base, PAGE_BYTES, 1, 0x11)
    other.munmap(enclave.base, PAGE_BYTES)
    enclave.process.munmap(enclave.base, enclave.size)
    enclave.open = False
    stage.task("close", lambda: enclave.process.close(enclave.fd))
    stage.task("exit", other.mm.exit)
    stage.check(lambda: _nothing_left(stage))


def alloc_free(stage: Stage) -> None:
    """Two tasks allocate and free EPC pages, as two processors do that build enclaves."""
    core = stage.boot().core

    def churn() -> None:
        for _ in range(2):
            core.free(core.alloc(None, reclaim=False))

    stage.task("first", churn)
    stage.task("second", churn)
    stage.restore(lambda: None)


def limit_fault(stage: Stage) -> None:
    """The EPC limit of a group falls and rises while a thread of it loads pages."""
    platform = stage.boot(40, groups={"jobs": {"max": 30 * PAGE_BYTES}})
    enclave = stage.enclave(4, group="jobs")
    group = platform.cgroups.find("jobs")

    def limit() -> None:
        group.max_pages = 25
        platform.core.reclaim(group)
        group.max_pages = 30

    def use() -> None:
        with enclave.inhabitant() as thread:
            for number in range(4):
                thread.read(number)

    enclave.evict(0)
    enclave.evict(1)
    stage.task("limit", limit)
    stage.task("thread", use)
    stage.check(lambda: _peak_in_bounds(group.peak_pages, 30))


def poison_reclaim(stage: Stage) -> None:
    """Memory of a page fails while a batch evicts it and faults want it and its neighbour."""
    platform = stage.platform
    enclave = stage.enclave(3)
    enclave.evict(0)
    epc = enclave.page(1).epc
    assert epc is not None, "the page is resident"
    enclave.content.pop(1)  # nothing is read from failed memory

    def use() -> None:
        enclave.touch(0)
        enclave.fault(1)

    stage.task("poison", lambda: platform.core.poison(epc.addr + 5))
    stage.task("reclaim", lambda: (enclave.evict(1), platform.core.reclaim(force=True)))
    stage.task("fault", use)


def poison_free(stage: Stage) -> None:
    """Memory of free and of used pages fails while two tasks allocate and free."""
    core = stage.boot().core
    page = core.alloc(None, reclaim=False)

    def churn() -> None:
        with suppress(EpcBusy, NoEpc):
            core.free(core.alloc(None, reclaim=False))

    stage.task("poison", lambda: (core.poison(page.addr), core.poison(page.addr + 4096)))
    stage.task("first", lambda: core.free(page))
    stage.task("second", churn)
    stage.check(lambda: _counts_poison(core.free_pages, core.poisoned_pages, core.epc_pages))


def va_eviction(stage: Stage) -> None:
    """A page is loaded while the VA page with its version, and a neighbour, are evicted."""
    platform = stage.boot(40)
    enclave = stage.enclave(2)
    core = platform.core
    _evict_all(stage, enclave)

    def reclaim() -> None:
        core.reclaim(force=True)

    stage.task("fault", lambda: enclave.touch(0))
    stage.task("reclaim", reclaim)
    stage.task("second", lambda: enclave.touch(1))


def power_fault(stage: Stage) -> None:
    """Power is lost between a thread's accesses; nothing that is wrong is read afterwards."""
    platform = stage.platform
    enclave = stage.enclave(2)
    enclave.evict(0)
    lost = False

    def power() -> None:
        nonlocal lost
        lost = True
        platform.power_loss()

    def use() -> None:
        try:
            with enclave.inhabitant() as thread:
                thread.read(0)
                thread.read(1)
        except Signal:
            if not lost:
                raise

    enclave.open = False  # what it held is gone
    stage.task("power", power)
    stage.task("thread", use)


def unload_open(stage: Stage) -> None:
    """The driver is unloaded while a process opens an enclave and a guest keeps running."""
    platform = stage.platform
    guest = platform.guest("a", epc=32 * PAGE_BYTES)
    inside = stage.enclave(1, guest=guest)
    process = platform.process()

    def unload() -> None:
        try:
            platform.unload("driver")
        except OSError as error:
            if error.errno != EBUSY:
                raise

    def open_and_close() -> None:
        try:
            fd = process.open()
        except OSError:
            return
        process.close(fd)

    stage.task("unload", unload)
    stage.task("open", open_and_close)
    stage.task("guest", lambda: inside.touch(0))


# --- helpers --------------------------------------------------------------------------------------


def _evict_all(stage: Stage, enclave: StagedEnclave) -> None:
    for _round in range(8):
        stage.platform.core.reclaim(force=True)
    assert not enclave.enclave.resident_pages, "pages of the enclave would not leave"


def _again(stage: Stage, ioctl: Callable[[], object]) -> None:
    """Make an ioctl until the page is not busy."""
    for _try in range(_TRIES):
        try:
            ioctl()
        except OSError as error:
            if error.errno not in (EAGAIN, EBUSY):
                raise
            stage.runtime.yield_now()
        else:
            return
    raise Violation("livelock", f"an ioctl finds the page busy {_TRIES} times")


def _touch_what_goes(stage: Stage, enclave: StagedEnclave, number: int) -> None:
    """Access a page that another task changes; any result is allowed, but the access must end."""
    result = enclave.fault(number)
    if result not in (FaultResult.NOPAGE, FaultResult.SIGBUS):
        raise enclave.violation("lost page", number, f"touching gives {result.value}")


def _trim(enclave: StagedEnclave, number: int) -> None:
    """Trim a page, and let the enclave accept its removal; page 0 is the scratch page."""
    enclave.process.modify_types(enclave.fd, enclave.offset(number), PAGE_BYTES, _TRIM)
    with enclave.inhabitant() as thread:
        status = thread.thread.eaccept(enclave.addr(number), _TRIMMED, enclave.addr(0))
    assert status is Status.SUCCESS, f"accepting that the page goes: {status!r}"


def _accept_new(enclave: StagedEnclave, number: int) -> None:
    """Make a removed page again by EACCEPT."""
    try:
        with enclave.inhabitant() as thread:
            status = thread.accept(number)
    except Signal as signal:
        raise enclave.violation("lost page", number, f"accepting gives {signal}") from signal
    if status is not Status.SUCCESS:
        raise enclave.violation("lost page", number, f"accepting gives {status.manual_name}")


def _nothing_left(stage: Stage) -> None:
    """Check that every page of the enclaves is free."""
    core = stage.platform.core
    lost = core.epc_pages - core.free_pages
    upper = core.counters.held.get("va", 0)
    if lost - upper:
        raise Violation("leaked pages", f"{lost - upper} EPC pages are in use by no enclave")


def _peak_in_bounds(peak: int, limit: int) -> None:
    if peak > limit:
        raise Violation("limit exceeded", f"the group had {peak} pages, its limit is {limit}")


def _counts_poison(free: int, poisoned: int, pages: int) -> None:
    if free + poisoned > pages:
        raise Violation("wrong count", f"{free} free and {poisoned} poisoned pages of {pages}")


HOST_SCENARIOS: dict[str, Callable[[Stage], None]] = {
    "fault-reclaim": fault_reclaim,
    "thread-reclaim": thread_reclaim,
    "batch-fault": batch_fault,
    "two-faults": two_faults,
    "two-augments": two_augments,
    "augment-secs": augment_evicted_secs,
    "augment-remove": augment_remove,
    "ioctl-fault": ioctl_fault,
    "fork-reclaim": fork_reclaim,
    "exit-reclaim": exit_reclaim,
    "exit-close": exit_close,
    "alloc-free": alloc_free,
    "limit-fault": limit_fault,
    "poison-reclaim": poison_reclaim,
    "poison-free": poison_free,
    "va-eviction": va_eviction,
    "power-fault": power_fault,
    "driver-unload": unload_open,
}
"""By the names that users give."""
