"""A system for tests of the driver: machine, core, driver, processes, and an enclave to touch.

The enclave of :func:`launch` has a TCS and its SSA frames first, then data pages whose bytes tell
them apart; nothing of it is measured, so that building one is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from errno import errorcode
from functools import cache
from typing import Any

from tests.support.hw import make_machine, signed

from softsgx.arch import (
    PAGE_BYTES,
    Attributes,
    AttributesFlags,
    PageType,
    SecInfoFlags,
    Secs,
    SigStruct,
    Tcs,
)
from softsgx.defects import Defect
from softsgx.driver import ERESTARTSYS, Driver, Enclave, EnclaveFile
from softsgx.hw import EpcPage, Machine
from softsgx.image import MASK_NONE, Data, Plan, Run, measure
from softsgx.paging import BackingFile, EpcCore, Group, MemoryBacking, Policy
from softsgx.runtime import InlineRuntime, Runtime
from softsgx.trace import Event, Tracer
from softsgx.userland import SoftProcess, SoftThread

BASE = 0x7000_0000_0000
RW = int(SecInfoFlags.R | SecInfoFlags.W)
RWX = int(SecInfoFlags.RWX)
SSA_OFFSET, DATA_OFFSET = PAGE_BYTES, 3 * PAGE_BYTES
SECINFO_TCS = PageType.TCS << 8
SECINFO_RW = PageType.REG << 8 | RW
SECINFO_RWX = PageType.REG << 8 | RWX


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that a call is refused with, ``ok`` when it is not."""
    try:
        call()
    except OSError as error:
        number = error.errno or 0
        return "ERESTARTSYS" if number == ERESTARTSYS else errorcode[number]
    return "ok"


def pattern(number: int) -> bytes:
    """4096 bytes that differ from those of every other ``number``."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


@dataclass
class System:
    """One machine with an operating system; ``SYSTEM.process()`` gives processes."""

    epc_pages: int = 64
    runtime: Runtime = field(default_factory=InlineRuntime)
    processors: int = 2
    defects: frozenset[Defect] = frozenset()
    policy: Policy | None = None
    root: Group | None = None
    backing: Callable[[int], BackingFile] = lambda _pages: MemoryBacking()
    ksgxd: bool = False
    listen: bool = False
    tracer: Tracer | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        tracer = self.events.append if self.listen else self.tracer
        self.machine: Machine = make_machine(
            epc_pages=self.epc_pages,
            runtime=self.runtime,
            processors=self.processors,
            tracer=tracer,
            **self.config,
        )
        self.core = EpcCore(
            self.machine,
            self.runtime,
            policy=self.policy,
            root=self.root,
            dirty=(),
            defects=self.defects,
            tracer=tracer,
        )
        self.driver = self.load_driver()
        if self.ksgxd:
            self.core.start()

    def load_driver(self) -> Driver:
        """Another driver on the same core."""
        return Driver(
            self.core,
            self.runtime,
            defects=self.defects,
            backing=lambda pages: self.backing(pages),
            tracer=self.events.append if self.listen else self.tracer,
        )

    def process(self, **options: object) -> SoftProcess:
        """A new process."""
        return SoftProcess(self.machine, self.driver, **options)  # type: ignore[arg-type]

    def check_invariants(self) -> None:
        """Check every count there is."""
        self.machine.check_invariants()
        self.core.check_invariants()
        self.driver.check_invariants()

    def evict(self, enclave: Enclave) -> None:
        """Evict everything that can leave, by reclaiming until nothing more does."""
        for _round in range(1000):
            before = self.core.counters.reclaimed
            self.core.reclaim(force=True)
            if self.core.counters.reclaimed == before:
                break
        assert not enclave.resident_pages, f"{enclave.resident_pages} pages would not leave"

    def epcm(self, addr: int) -> EpcPage:
        """The EPCM entry of an EPC page."""
        page = self.machine.page_at(addr)
        assert page is not None
        return page

    @property
    def free_pages(self) -> int:
        """Free EPC pages."""
        return self.core.free_pages


def secs_bytes(
    size: int, base: int = BASE, *, flags: int = AttributesFlags.MODE64BIT, **fields: object
) -> bytes:
    """A SECS that ECREATE takes."""
    attributes = Attributes(flags=int(flags), xfrm=3)
    return Secs(size=size, base=base, ssa_frame_size=1, attributes=attributes, **fields).pack()


@cache
def _sigstruct(plan: Plan, flags: int) -> bytes:
    secs = Secs(size=plan.size, attributes=Attributes(flags=flags, xfrm=3))
    return signed(measure(plan), secs).pack()


def sigstruct_for(plan: Plan, flags: int = AttributesFlags.MODE64BIT, **fields: Any) -> bytes:
    """A SIGSTRUCT for a plan, signed with the session's key; made once."""
    if not fields:
        return _sigstruct(plan, int(flags))
    secs = Secs(size=plan.size, attributes=Attributes(flags=int(flags), xfrm=3))
    return signed(measure(plan), secs, **fields).pack()


def tcs_bytes(*, nssa: int = 2, ossa: int = SSA_OFFSET) -> bytes:
    """A TCS page."""
    return Tcs(ossa=ossa, nssa=nssa, fs_limit=0xFFF, gs_limit=0xFFF).pack()


def layout_runs(data_pages: int, *, threads: int = 1, rights: int = RW) -> tuple[Run, ...]:
    """TCS and SSA pages of each thread, then data pages; unmeasured."""
    runs = []
    for thread in range(threads):
        at = thread * 3 * PAGE_BYTES
        tcs = tcs_bytes(ossa=at + PAGE_BYTES)
        runs.append(Run(at, 1, SECINFO_TCS, Data(memoryview(tcs)), MASK_NONE))
        runs.append(Run(at + PAGE_BYTES, 2, SECINFO_RW, mask=MASK_NONE))
    start = threads * 3 * PAGE_BYTES
    if data_pages:
        data = b"".join(pattern(number) for number in range(data_pages))
        flags = PageType.REG << 8 | rights
        runs.append(Run(start, data_pages, flags, Data(memoryview(data)), MASK_NONE))
    return tuple(runs)


def plan_for(
    data_pages: int, *, threads: int = 1, size: int | None = None, rights: int = RW
) -> Plan:
    """The plan of :func:`launch`."""
    end = (3 * threads + data_pages) * PAGE_BYTES
    wanted = max(2 * PAGE_BYTES, 1 << (end - 1).bit_length())
    return Plan(
        wanted if size is None else size, layout_runs(data_pages, threads=threads, rights=rights)
    )


@dataclass
class Launched:
    """An enclave that a process has built and mapped.

    Attributes:
        process: whose.
        fd: its descriptor.
        base: where.
        size: bytes.
        threads: how many TCS it has.
        data_pages: data pages.
    """

    process: SoftProcess
    fd: int
    base: int
    size: int
    threads: int
    data_pages: int

    @property
    def file(self) -> EnclaveFile:
        """The open file."""
        return self.process.enclave_file(self.fd)

    @property
    def enclave(self) -> Enclave:
        """The driver's enclave."""
        return self.file.enclave

    def data(self, number: int) -> int:
        """Address of a data page, or of the holes behind the last one."""
        return self.base + (3 * self.threads + number) * PAGE_BYTES

    def offset(self, number: int) -> int:
        """Offset of a data page."""
        return self.data(number) - self.base

    def tcs(self, thread: int = 0) -> int:
        """Address of a TCS."""
        return self.base + thread * 3 * PAGE_BYTES

    def thread(self, cpu: int = 0, *, tcs: int | None = None) -> SoftThread:
        """A thread that has entered."""
        thread = self.process.thread(cpu)
        thread.enter(self.tcs(cpu if tcs is None else tcs))
        return thread


def build(
    process: SoftProcess,
    plan: Plan,
    *,
    base: int = BASE,
    flags: int = AttributesFlags.MODE64BIT,
    init: bool = True,
) -> int:
    """Build an enclave of a plan whose pages are not measured; return its descriptor."""
    fd = process.open()
    process.create(fd, secs_bytes(plan.size, base, flags=flags))
    for run in plan.runs:
        data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
        process.add_pages(fd, run.offset, data, run.flags, measure=False)
    if init:
        process.init(fd, sigstruct_for(plan, flags))
    return fd


def launch(
    process: SoftProcess,
    data_pages: int = 4,
    *,
    threads: int = 1,
    size: int | None = None,
    base: int = BASE,
    rights: int = RW,
    flags: int = AttributesFlags.MODE64BIT,
) -> Launched:
    """Build, initialise and map an enclave."""
    plan = plan_for(data_pages, threads=threads, size=size, rights=rights)
    fd = build(process, plan, base=base, flags=flags)
    made = Launched(process, fd, base, plan.size, threads, data_pages)
    process.mmap(fd, base, 3 * threads * PAGE_BYTES, RW)
    if made.data(0) < base + plan.size:
        process.mmap(fd, made.data(0), base + plan.size - made.data(0), rights)
    return made


def unsigned(sigstruct: bytes, **fields: object) -> bytes:
    """A SIGSTRUCT with fields changed after it was signed."""
    return SigStruct.unpack(sigstruct).replace(**fields).pack()
