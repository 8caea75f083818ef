"""The summary of a run, from the counts of its parts.

A :class:`Collector` listens only to the creation and the end of enclaves.  It reads everything else
from the machine, the core and the driver on demand, so that a report does not slow paging down.

Source:
    The counts: ``driver/counts.py``, ``hw/secs.py`` (crossings), ``paging/counters.py``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import softsgx
from softsgx import driver, hw
from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import EpcCgroup
from softsgx.costs import COST_PROFILES, CostProfile, Estimate, estimate, find_profile
from softsgx.host import Platform
from softsgx.ondemand import dataclass, field
from softsgx.report.totals import LivingEnclave, Totals
from softsgx.trace import Event

__all__ = [
    "FAULT_KINDS",
    "Collector",
    "CpuTimes",
    "EnclaveSummary",
    "GroupSummary",
    "PlatformSummary",
    "RunSummary",
]

_NOTHING = Totals()
FAULT_KINDS = ("minor", "major", "augment", "busy", "refused")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Processor time so far, seconds.

    Attributes:
        supervisor: of this process: machine, driver and tracing.
        program: of its children that have ended.
    """

    supervisor: float
    program: float


@dataclass(frozen=True, slots=True)
class EnclaveSummary:
    """One enclave's history.

    Attributes:
        number: its name in events, from 1 in the order of opening.
        base, size_bytes: its linear range.
        group: the group that its EPC is charged to.
        state: ``building``, ``initialized``, ``killed``.
        created_s, initialized_s, released_s: when, seconds since the program's start.
        mrenclave: its measurement, hexadecimal; ``None`` before EINIT.
        pages_added: pages it had at EINIT.
        pages_touched: pages that were used: a page fault has mapped them.
        resident_bytes, peak_resident_bytes: its pages in the EPC, now and at most; its SECS and VA
            pages are not among them.
        faults: page faults by kind.
        evictions, reloads: of its pages.
        ewb: EWBs tried, those of its SECS included.
        etrack, ipi: ETRACKs, rounds of interrupts.
        eenter, eexit, aex, eresume: crossings.
        fault_s: time spent in handling its page faults.
        estimate: what this would have cost on silicon.
    """

    number: int
    base: int
    size_bytes: int
    group: str
    state: str
    created_s: float
    initialized_s: float | None
    released_s: float | None
    mrenclave: str | None
    pages_added: int
    pages_touched: int
    resident_bytes: int
    peak_resident_bytes: int
    faults: dict[str, int]
    evictions: int
    reloads: int
    ewb: int
    etrack: int
    ipi: int
    eenter: int
    eexit: int
    aex: int
    eresume: int
    fault_s: float
    estimate: Estimate

    @property
    def fault_count(self) -> int:
        """Page faults of all kinds."""
        return sum(self.faults.values())


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """One group's accounts.

    Attributes:
        path: from the root, which is ``/``.
        max_bytes: its limit, ``None`` for none.
        peak_bytes: the most that was charged to it at once.
        refused: charges that its limit refused.
    """

    path: str
    max_bytes: int | None
    peak_bytes: int
    refused: int


@dataclass(frozen=True, slots=True)
class PlatformSummary:
    """The machine and its operating-system half.

    Attributes:
        epc_bytes: size of the EPC; ``peak_epc_bytes`` of it were in use at most.
        processors: logical processors that the machine began with.
        profile: features it has.
        engine, pager: what ran the program.
        fault_delivery: how faults reached the supervisor: ``events``, ``sigbus`` or ``sigsegv``.
        defects: ids of the defects that are switched on.
        reclaim_s: time spent in batches of reclaim; what a fault had to wait for is also in its
            own time.
        counters: every counter of the core by name.
    """

    epc_bytes: int
    peak_epc_bytes: int
    processors: int
    profile: str
    engine: str
    pager: str
    fault_delivery: str
    defects: tuple[str, ...]
    reclaim_s: float
    counters: dict[str, object]


def pager_text(platform: PlatformSummary) -> str:
    """Return the pager for display, with how faults reach the supervisor."""
    known = {"sigbus": "SIGBUS stops", "sigsegv": "SIGSEGV stops"}
    delivery = platform.fault_delivery
    return f"{platform.pager} ({known.get(delivery, delivery)})"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A whole run.

    Attributes:
        command: program and arguments.
        exit_code: the program's exit status, or -n when signal n ended it.
        wall_s, supervisor_s, program_s: time that passed, and processor time.
        enclaves: in the order of creation.
        groups: the root first.
        platform: the machine and its operating-system half.
        estimate: of all enclaves together.
        injected: failures and ticks that the user asked for, by name.
        began: date and time of the program's start, ISO 8601 in UTC; empty where none was given.
        version: of softsgx.
        options: of the command line, without program and arguments.
    """

    command: tuple[str, ...]
    exit_code: int
    wall_s: float
    supervisor_s: float
    program_s: float
    enclaves: tuple[EnclaveSummary, ...]
    groups: tuple[GroupSummary, ...]
    platform: PlatformSummary
    estimate: Estimate
    injected: Mapping[str, int]
    began: str = ""
    version: str = ""
    options: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int | None:
        """The program's exit status; ``None`` when a signal ended it."""
        return self.exit_code if self.exit_code >= 0 else None

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the program, ``None`` when it exited."""
        return None if self.exit_code >= 0 else signal_name(-self.exit_code)


@dataclass(slots=True)
class _Record:
    """An enclave that the collector follows; ``final`` once it was destroyed."""

    enclave: driver.Enclave | None
    crossings: hw.Crossings | None
    created_ns: int
    initialized_ns: int | None = None
    mrenclave: str | None = None
    pages_added: int = 0
    killed: bool = False
    final: EnclaveSummary | None = None

    @property
    def state(self) -> str:
        """``building``, ``initialized``, ``killed``."""
        if self.killed:
            return "killed"
        return "building" if self.initialized_ns is None else "initialized"


@dataclass(frozen=True, slots=True)
class _Gone:
    """What released enclaves have done; ``last`` is the number of the one released last.

    One object replaces the other, so that a reader in another thread finds the record of that
    enclave counted either here or as living, in whichever order the supervisor updates the two.
    """

    totals: Totals
    last: int


@dataclass(slots=True)
class Collector:
    """Collects; an observer of the native engine, or attached by hand.

    Args:
        clock_ns: nanoseconds since an arbitrary start.
        cpu_times: processor time so far.
        profile: of the prices; the platform's when ``None``.

    Raises:
        SoftSgxError: there are no such prices.
    """

    clock_ns: Callable[[], int]
    cpu_times: Callable[[], CpuTimes] = lambda: CpuTimes(0.0, 0.0)
    profile: str | None = None
    platform: Platform | None = None
    pager: str = ""
    _records: dict[int, _Record] = field(default_factory=dict)
    _gone: _Gone = _Gone(_NOTHING, 0)
    _costs: CostProfile | None = None
    _began_ns: int = 0
    _began_cpu: CpuTimes = CpuTimes(0.0, 0.0)

    def __post_init__(self) -> None:
        self._costs = None if self.profile is None else find_profile(self.profile)

    # --- observing ------------------------------------------------------------------------------

    def attached(self, platform: Platform, pager: str) -> None:
        """Follow the enclaves of ``platform``, whose driver is loaded."""
        assert platform.driver is not None, "a platform without its driver has no enclaves"
        self.platform, self.pager = platform, pager
        platform.driver.add_lifecycle_listener(self._listen)
        self._began_ns, self._began_cpu = self.clock_ns(), self.cpu_times()

    def started(self, pid: int) -> None:
        """The program starts: time counts from here."""
        self._began_ns, self._began_cpu = self.clock_ns(), self.cpu_times()

    def _listen(self, event: Event) -> None:
        match event:
            case driver.EnclaveCreated():
                self._created(event)
            case driver.EnclaveInitialized():
                self._initialized(event)
            case driver.EnclaveKilled():
                self._records[event.enclave].killed = True
            case driver.EnclaveReleased() if (
                event.enclave in self._records
            ):  # else it was never created
                record = self._records[event.enclave]
                record.final = self._summary_of(record, released_ns=self.clock_ns())
                assert record.enclave is not None, "an enclave is released twice"
                totals = Totals.of(record.enclave, record.crossings or hw.Crossings())
                self._gone = _Gone(self._gone.totals + totals, event.enclave)
                record.enclave = record.crossings = None
            case _:
                pass

    def _created(self, event: driver.EnclaveCreated) -> None:
        assert self.platform is not None and self.platform.driver is not None, "not attached"
        newest_first = reversed(self.platform.driver.enclaves)
        enclave = next(enclave for enclave in newest_first if enclave.number == event.enclave)
        secs = enclave.swap.secs
        assert secs is not None, "ECREATE has just made the SECS"
        page = self.platform.machine.page_at(secs.addr)
        crossings = None if page is None or page.enclave is None else page.enclave.crossings
        self._records[event.enclave] = _Record(enclave, crossings, self.clock_ns())

    def _initialized(self, event: driver.EnclaveInitialized) -> None:
        record = self._records[event.enclave]
        record.initialized_ns, record.pages_added = self.clock_ns(), event.pages
        assert self.platform is not None and record.enclave is not None, "EINIT of no enclave"
        secs = record.enclave.swap.secs
        page = None if secs is None else self.platform.machine.page_at(secs.addr)
        if page is not None and page.enclave is not None:  # the SECS may have left since EINIT
            record.mrenclave = page.enclave.mrenclave.hex()

    # --- asking ---------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Seconds since the program's start."""
        return (self.clock_ns() - self._began_ns) / 1e9

    def living(self) -> list[driver.Enclave]:
        """Return the enclaves that exist now; may be called from another thread."""
        records = list(self._records.values())
        return [enclave for record in records if (enclave := record.enclave) is not None]

    def resident(self) -> dict[int, int]:
        """Return the resident pages of each enclave that exists now, by its number."""
        return {enclave.number: enclave.swap.children for enclave in self.living()}

    def levels(self) -> dict[str, int]:
        """Return pages now: in the EPC, of each living enclave, charged to each group but the root.

        The keys are ``EPC``, ``enclave 1``, ``group /jobs``.
        """
        assert self.platform is not None, "nothing was attached"
        core = self.platform.core
        levels = {"EPC": core.epc_pages - core.free_pages}
        for number, pages in self.resident().items():
            levels[f"enclave {number}"] = pages
        for group in self.platform.cgroups.root.subtree():
            if group.path != "/":
                levels[f"group {group.path}"] = group.usage_pages
        return levels

    def totals(self) -> Totals:
        """Return sums over all enclaves, living or not; may be called from another thread."""
        while True:
            gone = self._gone
            total = gone.totals
            for living in self.living_enclaves():
                if living.enclave.number != gone.last:
                    total = total + living.totals
            if gone is self._gone:  # else an enclave was released, and may be counted twice
                return total

    def living_enclaves(self) -> list[LivingEnclave]:
        """Return the enclaves that exist now, with their counts; from any thread."""
        return [
            LivingEnclave(
                enclave,
                record.state,
                record.mrenclave,
                Totals.of(enclave, record.crossings or hw.Crossings()),
            )
            for record in list(self._records.values())
            if (enclave := record.enclave) is not None
        ]

    def enclaves(self) -> tuple[EnclaveSummary, ...]:
        """Return all enclaves as they are now."""
        return tuple(record.final or self._summary_of(record) for record in self._records.values())

    def summary(
        self,
        command: Sequence[str],
        exit_code: int,
        injected: Mapping[str, int] = MappingProxyType({}),
        *,
        fault_delivery: str,
        began: str = "",
        options: Sequence[str] = (),
    ) -> RunSummary:
        """Return everything.

        Args:
            command: program and arguments.
            exit_code: its exit status, or -n when signal n ended it.
            injected: failures on demand and ticks, by name.
            fault_delivery: of the platform.
            began: date and time of the program's start.
            options: of the command line.
        """
        wall_s, cpu = self.elapsed_s, self.cpu_times()
        platform = self.platform
        assert platform is not None, "nothing was attached"
        core, root = platform.core, platform.cgroups.root
        enclaves = self.enclaves()
        return RunSummary(
            command=tuple(command),
            exit_code=exit_code,
            wall_s=wall_s,
            supervisor_s=cpu.supervisor - self._began_cpu.supervisor,
            program_s=cpu.program - self._began_cpu.program,
            enclaves=enclaves,
            groups=tuple(_group(group) for group in root.subtree()),
            platform=PlatformSummary(
                epc_bytes=core.epc_pages * PAGE_BYTES,
                peak_epc_bytes=root.peak_pages * PAGE_BYTES,
                processors=platform.config.processors,
                profile=platform.config.profile,
                engine="native",
                pager=self.pager,
                fault_delivery=fault_delivery,
                defects=tuple(sorted(platform.config.defects)),
                reclaim_s=core.reclaim_ns / 1e9,
                counters=core.counters.as_dict(),
            ),
            estimate=self._estimate(_total(enclaves)),
            injected=injected,
            began=began,
            version=softsgx.__version__,
            options=tuple(options),
        )

    def _summary_of(self, record: _Record, released_ns: int | None = None) -> EnclaveSummary:
        enclave, crossings = record.enclave, record.crossings or hw.Crossings()
        assert enclave is not None, "the enclave of a final record"
        counts, swap = enclave.counts, enclave.swap
        faults = {kind: counts.faults.get(kind, 0) for kind in FAULT_KINDS}
        initialized = record.initialized_ns is not None
        priced = {
            "ecreate": 1,
            "eadd": record.pages_added,
            "einit": int(initialized),
            "eaug": faults["augment"],
            "eenter": crossings.eenter,
            "aex": crossings.aex,
            "fault": sum(faults.values()),
            "eldu": counts.reloads,
            "ewb": counts.evictions,
            "etrack": swap.etracks,
            "ipi": counts.kicks,
        }
        group = enclave.group
        return EnclaveSummary(
            number=enclave.number,
            base=enclave.base,
            size_bytes=enclave.size,
            group=group.path if isinstance(group, EpcCgroup) else "/",
            state=record.state,
            created_s=self._since_start(record.created_ns),
            initialized_s=None
            if record.initialized_ns is None
            else self._since_start(record.initialized_ns),
            released_s=None if released_ns is None else self._since_start(released_ns),
            mrenclave=record.mrenclave,
            pages_added=record.pages_added,
            pages_touched=counts.touched,
            resident_bytes=0 if released_ns is not None else swap.children * PAGE_BYTES,
            peak_resident_bytes=swap.peak_children * PAGE_BYTES,
            faults=faults,
            evictions=counts.evictions,
            reloads=counts.reloads,
            ewb=swap.ewbs,
            etrack=swap.etracks,
            ipi=counts.kicks,
            eenter=crossings.eenter,
            eexit=crossings.eexit,
            aex=crossings.aex,
            eresume=crossings.eresume,
            fault_s=counts.fault_ns / 1e9,
            estimate=self._estimate(priced),
        )

    def _since_start(self, when_ns: int) -> float:
        return (when_ns - self._began_ns) / 1e9

    def _estimate(self, counts: dict[str, int]) -> Estimate:
        assert self.platform is not None, "not attached"
        return estimate(counts, self._costs or COST_PROFILES[self.platform.config.profile])


def signal_name(number: int) -> str:
    """Return ``SIGTERM`` for 15, ``SIGRTMIN+1`` for real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _total(enclaves: Sequence[EnclaveSummary]) -> dict[str, int]:
    total: dict[str, int] = {}
    for enclave in enclaves:
        for item in enclave.estimate.items:
            total[item.price.event] = total.get(item.price.event, 0) + item.count
    return total


def _group(group: EpcCgroup) -> GroupSummary:
    limit = group.max_pages
    return GroupSummary(
        path=group.path,
        max_bytes=None if limit is None else limit * PAGE_BYTES,
        peak_bytes=group.peak_pages * PAGE_BYTES,
        refused=group.events_local,
    )
