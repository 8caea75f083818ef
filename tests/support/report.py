"""History for reports: enclaves page on a platform with a clock that ticks at each reading."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from tests.support.driver import BASE, Launched, launch

from softsgx.host import Platform
from softsgx.report import (
    COST_PROFILES,
    Collector,
    CpuTimes,
    EnclaveSummary,
    GroupSummary,
    PlatformSummary,
    RunSummary,
    estimate,
)
from softsgx.runtime import InlineRuntime
from softsgx.trace import Event

TICK_NS = 1000
EPC_PAGES = 28
DATA_PAGES = 40


@dataclass
class Story:
    """A platform, its collector, and how to make things happen on it."""

    epc_pages: int = EPC_PAGES
    listen: bool = False
    groups: dict[str, dict[str, int | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        ticks = count(step=TICK_NS)
        self.clock = lambda: next(ticks)
        self.platform = Platform(
            epc=self.epc_pages * 4096,
            groups=self.groups,
            runtime=InlineRuntime(7, clock_ns=self.clock),
            tracer=self.events.append if self.listen else None,
        )
        self.platform.start()
        self.collector = Collector(self.clock, lambda: CpuTimes(0.25, 0.5))
        self.collector.attached(self.platform, "userfaultfd")
        self.collector.started(1)

    def enclave(
        self, data_pages: int = DATA_PAGES, *, group: str = "/", threads: int = 1
    ) -> Launched:
        """An initialized enclave of a process of its own."""
        process = self.platform.process(group=group)
        return launch(process, data_pages, base=BASE, threads=threads)

    def touch(self, made: Launched, rounds: int = 1) -> None:
        """Enter, write to every data page in turn, and leave."""
        thread = made.thread()
        for number in range(rounds):
            for page in range(made.data_pages):
                thread.store(made.data(page), number.to_bytes(8, "little"))
        thread.exit()

    def summary(self, exit_code: int = 0) -> RunSummary:
        """What the collector says."""
        return self.collector.summary(["./app", "--two words"], exit_code, fault_delivery="events")


def told(listen: bool = False) -> Story:
    """The story of one enclave that pages and of one that is smaller, ended both.

    In the large one a second thread stays inside until it is kicked, and comes back once.
    """
    story = Story(listen=listen)
    large, small = story.enclave(threads=2), story.enclave(4)
    bystander = large.thread(1)
    story.touch(large, rounds=2)
    bystander.load(large.data(0))
    bystander.exit()
    story.touch(small)
    story.touch(large)
    for made in (small, large):
        made.process.exit()
    return story


def enclave_summary(number: int, *, busy: int, state: str = "initialized") -> EnclaveSummary:
    """A made-up enclave; the more ``busy``, the larger its numbers."""
    counts = {
        "ecreate": 1,
        "eadd": 607,
        "einit": 1,
        "eaug": busy,
        "eenter": 4 * busy,
        "aex": 45 * busy,
        "fault": 46 * busy,
        "eldu": 41 * busy,
        "ewb": 44 * busy,
        "etrack": 5 * busy,
        "ipi": 4 * busy,
    }
    return EnclaveSummary(
        number=number,
        base=0x7F00_0000_0000,
        size_bytes=4 << 20,
        group="/jobs/a",
        state=state,
        created_s=0.001,
        initialized_s=None if state == "building" else 0.025,
        released_s=1.5,
        mrenclave=None if state == "building" else f"{number:02x}" * 32,
        pages_added=607,
        pages_touched=301,
        resident_bytes=0,
        peak_resident_bytes=254 * 4096,
        faults={
            "minor": 0,
            "major": 41 * busy,
            "augment": busy,
            "busy": 4 * busy,
            "refused": 0,
        },
        evictions=44 * busy,
        reloads=41 * busy,
        ewb=54 * busy,
        etrack=5 * busy,
        ipi=4 * busy,
        eenter=4 * busy,
        eexit=4 * busy,
        aex=45 * busy,
        eresume=45 * busy,
        fault_s=46 * busy * 21e-6,
        estimate=estimate(counts, COST_PROFILES["sgx2-server"]),
    )


def made_up(*enclaves: EnclaveSummary, exit_code: int = 0) -> RunSummary:
    """A made-up run."""
    total = dict.fromkeys(COST_PROFILES["sgx2-server"].prices, 0)
    for enclave in enclaves:
        for item in enclave.estimate.items:
            total[item.price.event] += item.count
    return RunSummary(
        command=("./app", "--two words"),
        exit_code=exit_code,
        wall_s=1.875,
        supervisor_s=0.8125,
        program_s=0.0625,
        enclaves=enclaves,
        groups=(GroupSummary("/", None, 1 << 20, 0), GroupSummary("/jobs/a", 1 << 20, 1 << 20, 9)),
        platform=PlatformSummary(
            epc_bytes=98_041_856,
            peak_epc_bytes=1 << 20,
            processors=2,
            profile="sgx2-server",
            engine="native",
            pager="userfaultfd",
            fault_delivery="events",
            defects=(),
            reclaim_s=0.5,
            counters={"held": {"reg": 0}, "batches": 12},
        ),
        estimate=estimate(total, COST_PROFILES["sgx2-server"]),
        injected={"power_losses": 1, "refused_inits": 0, "ticks": 1234},
        began="2026-01-02T03:04:05+00:00",
        version="1.2.3",
        options=("--epc", "93.5MiB"),
    )
