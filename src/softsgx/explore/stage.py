"""The stage of a scenario: a platform, enclaves whose content is known, and tasks that race.

A scenario is a function that gets a :class:`Stage`.  It makes the platform and the enclaves, and
names the tasks, the checks and, if possible, the calls that restore the state for another round.
The schedule begins when the tasks race; all before that is unscheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from softsgx.arch import PAGE_BYTES, AttributesFlags, PageType, Status
from softsgx.defects import Defect
from softsgx.driver import PROT_READ, PROT_WRITE, Enclave, FaultResult
from softsgx.driver.page import EnclavePage
from softsgx.explore.violation import Violation
from softsgx.host import GuestPlatform, Platform
from softsgx.hw import Machine
from softsgx.image import (
    MASK_NONE,
    SECINFO_RW,
    Blob,
    EnclaveImage,
    SignOptions,
    measure,
    sign,
    throwaway_key,
    unsigned_sigstruct,
)
from softsgx.image.blob import tcs_page
from softsgx.runtime import SeededRuntime
from softsgx.trace import Tracer
from softsgx.userland import SoftProcess, SoftThread

__all__ = ["Inhabitant", "Scenario", "Stage", "StagedEnclave"]

RW = PROT_READ | PROT_WRITE
_WORD = 8
_ACCEPTED = PageType.REG << 8 | 8 | RW  # REG, PENDING, R and W
_EPC_PAGES = 40
_TRIES = 2000


class Stage:
    """One platform and the tasks that race on it.

    Args:
        runtime: runs everything.
        defects: known defects that the platform is to have.
        tracer: receives the events of the platform.

    Attributes:
        platform: the platform; made by :meth:`boot`.
        enclaves: the enclaves that :meth:`enclave` has made.
        tasks: the functions of the tasks that race, by name.
        checks: functions called when the race is over, in order.
        restores: functions that restore the state of the first round; empty: every schedule begins
            with a new stage.
        body: a whole program instead of tasks: it calls :meth:`race` itself.
        watch: called at every place of a race.
    """

    def __init__(
        self,
        runtime: SeededRuntime,
        *,
        defects: frozenset[Defect] = frozenset(),
        tracer: Tracer | None = None,
    ) -> None:
        self.runtime, self.defects, self.tracer = runtime, defects, tracer
        self.enclaves: list[StagedEnclave] = []
        self.tasks: dict[str, Callable[[], object]] = {}
        self.checks: list[Callable[[], object]] = []
        self.restores: list[Callable[[], object]] = []
        self.body: Callable[[], object] | None = None
        self.watch: Callable[[], None] | None = None
        self._platform: Platform | None = None

    # --- what there is --------------------------------------------------------------------------

    @property
    def platform(self) -> Platform:
        """The platform; :meth:`boot` makes it, with the default size if nothing has."""
        return self._platform if self._platform is not None else self.boot()

    @property
    def booted(self) -> bool:
        """Whether there is a platform."""
        return self._platform is not None

    def boot(self, epc_pages: int = _EPC_PAGES, *, ksgxd: bool = False, **config: Any) -> Platform:
        """Make the platform and start it.

        Args:
            epc_pages: size of its EPC.
            ksgxd: whether ksgxd takes part in the race; otherwise a task that needs a page
                reclaims itself.
            config: other fields of :class:`~softsgx.host.PlatformConfig`, and arguments of
                :class:`~softsgx.host.Platform`.
        """
        assert self._platform is None, "a stage has one platform"
        platform = self._platform = Platform(
            epc=epc_pages * PAGE_BYTES,
            runtime=self.runtime,
            defects=self.defects,
            tracer=self.tracer,
            **config,
        )
        platform.start()
        if not ksgxd:
            platform.core.stop()
        return platform

    def enclave(
        self,
        pages: int = 2,
        *,
        threads: int = 1,
        process: SoftProcess | None = None,
        guest: GuestPlatform | None = None,
        group: str = "/",
    ) -> StagedEnclave:
        """Build, initialise and map an enclave.

        Args:
            pages: data pages; as many holes follow, where EAUG makes pages.
            threads: how many of its threads may be inside.
            process: owns it; a new process when ``None``.
            guest: the guest in which that process runs; the host when ``None``.
            group: the group that the new process is in.
        """
        if process is None:
            here = self.platform
            process = here.process(group=group) if guest is None else guest.process()
        made = StagedEnclave(process, pages, threads)
        self.enclaves.append(made)
        return made

    # --- the race -------------------------------------------------------------------------------

    def task(self, name: str, run: Callable[[], object]) -> None:
        """Let ``run`` race against the other tasks; what it raises is a finding."""
        assert name not in self.tasks, f"two tasks are called {name!r}"
        self.tasks[name] = run

    def check(self, check: Callable[[], object]) -> None:
        """Call ``check`` when all tasks have ended; what it raises is a finding."""
        self.checks.append(check)

    def restore(self, restore: Callable[[], object]) -> None:
        """Call ``restore`` before another round on the same platform.

        It makes the state equal to that of the first round, as far as a schedule depends on it, so
        that a seed gives the same schedule in every round.
        """
        self.restores.append(restore)

    def race(self, runs: Mapping[str, Callable[[], object]]) -> None:
        """Run tasks as a race now; for a :attr:`body`."""
        self.runtime.race(runs, watch=self.watch)

    def end(self) -> None:
        """Stop all that still runs."""
        if self._platform is not None:
            self._platform.stop()

    def recount(self) -> None:
        """Check everything after a race: counts, pages, and the content of the enclaves."""
        if self._platform is not None:
            self._platform.check()
        for enclave in self.enclaves:
            enclave.check()


Scenario = Callable[[Stage], None]
"""Sets a stage; its docstring says in one sentence what races."""


class StagedEnclave:
    """An enclave of data pages, and a dictionary of what each must hold.

    Attributes:
        process: the process that owns it.
        fd: its descriptor.
        base: its first address.
        pages: number of data pages.
        content: the first 8 bytes of each data page, by number; pages without an entry are not
            checked.
    """

    def __init__(self, process: SoftProcess, pages: int, threads: int) -> None:
        image = _image(pages, threads)
        self.process, self.pages, self.threads = process, pages, threads
        loaded = self.loaded = process.load(image)
        self.fd, self.base, self.size = loaded.fd, loaded.base, loaded.size
        self.first = pages_before(threads)
        process.mmap(self.fd, self.base + self.first * PAGE_BYTES, 2 * pages * PAGE_BYTES, RW)
        self.content = {number: _word(number) for number in range(pages)}
        self.open = True

    @property
    def enclave(self) -> Enclave:
        """The driver's."""
        return self.process.enclave_file(self.fd).enclave

    def addr(self, number: int) -> int:
        """Return the address of a data page, or of a hole behind the last one."""
        return self.base + self.offset(number)

    def offset(self, number: int) -> int:
        """Return the offset of a data page."""
        return (self.first + number) * PAGE_BYTES

    def page(self, number: int) -> EnclavePage:
        """Return the driver's page."""
        return self.enclave.pages[self.first + number]

    def evict(self, number: int) -> bool:
        """Evict one page, as a batch of only that page does; ``False``: it stays."""
        page = self.enclave.pages.get(self.first + number)
        epc = None if page is None else page.epc
        return epc is not None and self.process.driver.core.evict(epc)

    def fault(self, number: int, process: SoftProcess | None = None) -> FaultResult:
        """Handle faults on a page until one need not be repeated."""
        who = self.process if process is None else process
        for _try in range(_TRIES):
            result = who.mm.fault(self.addr(number), PROT_READ, who)
            if result is not FaultResult.RETRY:
                return result
        raise Violation("livelock", f"page {number} faults {_TRIES} times in a row")

    def touch(self, number: int, process: SoftProcess | None = None) -> None:
        """Handle a fault on a page, which must succeed."""
        result = self.fault(number, process)
        if result is not FaultResult.NOPAGE:
            why = self.enclave.refusal or "the access itself is refused"
            raise self.violation("lost page", number, f"page {number}: {result.value}: {why}")

    def inhabitant(self, thread: int = 0, process: SoftProcess | None = None) -> Inhabitant:
        """Return a thread that enters on the processor of its number."""
        return Inhabitant(self, thread, process)

    def check(self) -> None:
        """Load evicted pages, and compare every page with the dictionary."""
        if not self.open:
            return
        for number in self.content:
            page = self.enclave.pages.get(self.first + number)
            if page is None:
                raise self.violation("lost page", number, f"page {number} does not exist")
            if page.epc is None or page.busy:
                self.touch(number)
            assert page.epc is not None, f"{page!r} is loaded and not resident"
            self.compare(number, self._peek(number, page.epc.addr))

    def _peek(self, number: int, addr: int) -> bytes:
        """Return the content of a resident page, without an access that could fault."""
        machine = self.process.machine
        if isinstance(machine, Machine):
            held = machine.page_at(addr)
            assert held is not None, f"{addr:#x} is no EPC page"
            return machine.store.read(held, 0, _WORD)
        with self.inhabitant(0) as inside:  # a guest's page may be evicted by the host
            return inside.thread.load(self.addr(number), _WORD)

    def compare(self, number: int, seen: bytes) -> None:
        """Compare bytes read from a page with the dictionary."""
        wanted = self.content[number]
        if seen != wanted:
            kind = "stale data" if any(seen) else "lost data"
            text = f"page {number} holds {seen.hex()}, stored was {wanted.hex()}"
            raise self.violation(kind, number, text)

    def violation(self, name: str, number: int, text: str) -> Violation:
        """Return the exception for a property of a page that does not hold."""
        return Violation(name, text, self.addr(number), self.first + number)

    def close(self) -> None:
        """Unmap and close it."""
        self.open = False
        self.loaded.close()


class Inhabitant:
    """A thread of an enclave whose reads and writes are compared with the dictionary.

    A context manager: the thread enters, and leaves at the end.
    """

    def __init__(self, home: StagedEnclave, number: int, process: SoftProcess | None) -> None:
        self.home, self.number = home, number
        who = home.process if process is None else process
        self.thread: SoftThread = who.thread(number)

    def __enter__(self) -> Inhabitant:
        self.thread.enter(self.home.base + tcs_offset(self.number))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self.thread.exit()

    def read(self, number: int) -> None:
        """Read a page; it must hold the bytes stored last."""
        self.home.compare(number, self.thread.load(self.home.addr(number), _WORD))

    def write(self, number: int, value: int) -> None:
        """Store into a page; no other task writes to that page."""
        word = self.home.content[number] = _word(value)
        self.thread.store(self.home.addr(number), word)

    def accept(self, number: int, scratch: int = 0) -> Status:
        """Accept a page that EAUG makes; ``scratch`` is a page for its SECINFO."""
        home = self.home
        home.content.pop(scratch, None)
        status = self.thread.eaccept(home.addr(number), _ACCEPTED, home.addr(scratch))
        if status is Status.SUCCESS:
            home.content[number] = bytes(_WORD)
        return status


def tcs_offset(thread: int) -> int:
    """Return the offset of a thread's TCS."""
    return thread * 3 * PAGE_BYTES


def pages_before(threads: int) -> int:
    """Return the number of pages before the data: TCS and two SSA frames of each thread."""
    return 3 * threads


def _word(value: int) -> bytes:
    return (value + 1).to_bytes(_WORD, "little")


@cache
def _image(pages: int, threads: int) -> EnclaveImage:
    """Return an enclave, signed with the key of this process; nothing of it is measured."""
    blob = Blob()
    for thread in range(threads):
        at = tcs_offset(thread)
        blob.tcs(tcs_page(ossa=at + PAGE_BYTES, oentry=0), offset=at)
        blob.zeros(2, mask=MASK_NONE, label="SSA")
    start = blob.end
    data = b"".join(_word(number).ljust(PAGE_BYTES, b"\0") for number in range(pages))
    blob.data(data, flags=SECINFO_RW, mask=MASK_NONE)
    end = start + 2 * pages * PAGE_BYTES
    plan = blob.plan(1 << (end - 1).bit_length())
    flags = AttributesFlags.MODE64BIT.value
    options = SignOptions(attributes=flags, xfrm=3)
    signed = sign(unsigned_sigstruct(measure(plan), options), throwaway_key())
    return EnclaveImage("stage", "raw", plan, signed)
