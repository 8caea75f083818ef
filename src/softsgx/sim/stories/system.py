"""The system that stories run on: machine, core, driver, processes, and an enclave.

The enclave of :func:`launch` has a TCS and its SSA frames first, then data pages, each with
different bytes.  Its pages are not measured, so that building it is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from errno import errorcode
from functools import cache, partial
from typing import Any, cast

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, PageType, SecInfoFlags, Secs, Tcs
from softsgx.defects import Defect
from softsgx.driver import ERESTARTSYS, Driver, Enclave, EnclaveFile
from softsgx.driver.page import EnclavePage
from softsgx.hw import EpcPage, GeneralProtection, Leaves, Machine, MachineConfig, PageStore
from softsgx.hw.optimised import OPTIMISED, PLAIN
from softsgx.image import (
    MASK_NONE,
    Data,
    Plan,
    Run,
    SignOptions,
    sign_plan,
    throwaway_key,
)
from softsgx.image.sign import MASK_64
from softsgx.paging import Backing, EpcCore, Group, Hardware, MemoryBacking, Policy
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
    """Return the name of the errno that a call fails with; ``ok``: it succeeds."""
    try:
        call()
    except OSError as error:
        number = error.errno or 0
        return "ERESTARTSYS" if number == ERESTARTSYS else errorcode[number]
    return "ok"


def pattern(number: int) -> bytes:
    """Return 4096 bytes that differ from those of every other ``number``."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


class _RefusingLeaves:
    """The leaves of a machine; the first calls of some of them end with #GP(0).

    Args:
        leaves: the machine's.
        refusals: how many calls of each leaf are refused; counted down.
    """

    def __init__(self, leaves: Leaves, refusals: Mapping[str, int]) -> None:
        self._leaves, self._left = leaves, dict(refusals)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        leaf: Callable[..., Any] = getattr(self._leaves, name)
        return partial(self._call, name, leaf) if name in self._left else leaf

    def _call(self, name: str, leaf: Callable[..., Any], *operands: Any) -> Any:
        if not self._left[name]:
            return leaf(*operands)
        self._left[name] -= 1
        raise GeneralProtection


@dataclass(frozen=True)
class _RefusingHardware:
    """The part of a machine that core and driver use, with leaves that refuse."""

    config: MachineConfig
    leaves: Leaves
    launch_key_hash: list[int]


@dataclass
class System:
    """One machine with an operating system; ``SYSTEM.process()`` gives processes.

    Attributes:
        epc_pages: size of the EPC.
        runtime: of machine, core and driver.
        processors: number of logical processors.
        defects: the defects of core and driver that are switched on.
        policy: of reclaim; ``None``: Linux's.
        root: of the groups that pages are charged to; ``None``: pages are charged to no group.
        backing: makes the backing of an enclave; its argument is the enclave's size in pages.
        core_type: class of the core.
        ksgxd: whether it runs.
        listen: whether events are kept in ``events``.
        tracer: receives the events, where they are not kept.
        refusals: by name of a leaf, how many of the kernel's first calls end with #GP(0).
        config: further fields of the machine's configuration.
        store: holds the bytes of resident pages; ``None``: in memory.
    """

    epc_pages: int = 64
    runtime: Runtime = field(default_factory=InlineRuntime)
    processors: int = 2
    defects: frozenset[Defect] = frozenset()
    policy: Policy | None = None
    root: Group | None = None
    backing: Callable[[int], Backing] = lambda _pages: MemoryBacking()
    core_type: type[EpcCore] = EpcCore
    ksgxd: bool = False
    listen: bool = False
    tracer: Tracer | None = None
    refusals: Mapping[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    store: PageStore | None = None

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        tracer = self.events.append if self.listen else self.tracer
        self.machine = Machine(
            MachineConfig.with_epc(
                self.epc_pages * PAGE_BYTES, processors=self.processors, **self.config
            ),
            self.runtime,
            store=self.store,
            tracer=tracer,
            optimised=OPTIMISED if self.core_type.compiled else PLAIN,
        )
        self.core = self.core_type(
            self._hardware(),
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

    def _hardware(self) -> Hardware:
        machine = self.machine
        if not self.refusals:
            return machine
        leaves = cast(Leaves, _RefusingLeaves(machine.leaves, self.refusals))
        return _RefusingHardware(machine.config, leaves, machine.launch_key_hash)

    def load_driver(self) -> Driver:
        """Return another driver on the same core."""
        return Driver(
            self.core,
            self.runtime,
            defects=self.defects,
            backing=lambda pages: self.backing(pages),
            tracer=self.events.append if self.listen else self.tracer,
        )

    def process(self, **options: object) -> SoftProcess:
        """Return a new process."""
        return SoftProcess(self.machine, self.driver, **options)  # type: ignore[arg-type]

    def check_invariants(self) -> None:
        """Check the counts of machine, core and driver against their raw state."""
        self.machine.check_invariants()
        self.core.check_invariants()
        self.driver.check_invariants()

    def evict(self, enclave: Enclave) -> None:
        """Run batches until they evict nothing; then no page of ``enclave`` is resident."""
        for _round in range(1000):
            before = self.core.counters.reclaimed
            self.core.reclaim(force=True)
            if self.core.counters.reclaimed == before:
                break
        assert not enclave.resident_pages, f"{enclave.resident_pages} pages are still resident"

    def epcm(self, addr: int) -> EpcPage:
        """Return the EPCM entry of an EPC page."""
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
    """Return a SECS that ECREATE accepts.

    Args:
        size: of the enclave, in bytes.
        base: its linear address.
        flags: of ATTRIBUTES.
        fields: further fields of the SECS.
    """
    attributes = Attributes(flags=int(flags), xfrm=3)
    return Secs(size=size, base=base, ssa_frame_size=1, attributes=attributes, **fields).pack()


@cache
def sigstruct_for(plan: Plan, flags: int = AttributesFlags.MODE64BIT) -> bytes:
    """Return a SIGSTRUCT for a plan, signed with the key of this process; made once."""
    options = SignOptions(attributes=int(flags), attribute_mask=MASK_64, xfrm_mask=MASK_64)
    return sign_plan(plan, throwaway_key(), options).pack()


def tcs_bytes(*, nssa: int = 2, ossa: int = SSA_OFFSET) -> bytes:
    """Return a TCS page."""
    return Tcs(ossa=ossa, nssa=nssa, fs_limit=0xFFF, gs_limit=0xFFF).pack()


def layout_runs(data_pages: int, *, threads: int = 1, rights: int = RW) -> tuple[Run, ...]:
    """Return TCS and SSA pages of each thread, then data pages; unmeasured."""
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
    """Return the plan of :func:`launch`."""
    end = (3 * threads + data_pages) * PAGE_BYTES
    wanted = max(2 * PAGE_BYTES, 1 << (end - 1).bit_length())
    return Plan(
        wanted if size is None else size, layout_runs(data_pages, threads=threads, rights=rights)
    )


@dataclass
class Launched:
    """An enclave that a process has built and mapped.

    Attributes:
        process: the one that has built it.
        fd: the descriptor of its file in that process.
        base: its linear address.
        size: bytes.
        threads: number of its TCS.
        data_pages: number of its data pages.
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
        """Return the address of a data page; numbers above the last one are holes."""
        return self.base + (3 * self.threads + number) * PAGE_BYTES

    def offset(self, number: int) -> int:
        """Return the offset of a data page."""
        return self.data(number) - self.base

    def tcs(self, thread: int = 0) -> int:
        """Return the address of a TCS."""
        return self.base + thread * 3 * PAGE_BYTES

    def thread(self, cpu: int = 0, *, tcs: int | None = None) -> SoftThread:
        """Return a thread that has entered the enclave."""
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
    """Build, initialise and map an enclave.

    Args:
        process: the one that builds it.
        data_pages: number of data pages.
        threads: number of TCS.
        size: of the enclave in bytes; ``None``: the smallest that fits.
        base: its linear address.
        rights: PROT_* of data pages, in their EPCM entries and in the mapping.
        flags: of ATTRIBUTES.
    """
    plan = plan_for(data_pages, threads=threads, size=size, rights=rights)
    fd = build(process, plan, base=base, flags=flags)
    made = Launched(process, fd, base, plan.size, threads, data_pages)
    process.mmap(fd, base, 3 * threads * PAGE_BYTES, RW)
    if made.data(0) < base + plan.size:
        process.mmap(fd, made.data(0), base + plan.size - made.data(0), rights)
    return made


def page_of(made: Launched, number: int) -> EnclavePage:
    """Return the driver's record of a data page."""
    return made.enclave.pages[made.enclave.index_of(made.data(number))]


def begin_eviction(page: EnclavePage) -> bool:
    """Do the first half of an eviction of one page: isolate, prepare, block."""
    assert page.epc is not None and page.epc.lru is not None, "the page is resident"
    lru = page.epc.lru
    while page.epc in lru:
        isolated, _dying = lru.isolate(1)
        if isolated != [page.epc]:
            lru.put_back(isolated[0])
            page.put()
    return page.prepare() and page.block()


def give_up_eviction(page: EnclavePage) -> None:
    """Put a page whose eviction could not begin back on its list."""
    epc = page.epc
    assert epc is not None and epc.lru is not None, "the page is resident"
    epc.lru.put_back(epc)
    page.put()


def end_eviction(system: System, page: EnclavePage) -> bool:
    """Do the second half: write the page out and free its EPC page; ``False``: it stays."""
    epc = page.epc
    assert epc is not None and epc.lru is not None, "the page is resident"
    if not page.write():
        give_up_eviction(page)
        return False
    epc.lru.forget(epc)
    system.core.free(epc)
    page.put()
    return True


def evict(system: System, page: EnclavePage) -> bool:
    """Evict one page; ``False``: it stays resident."""
    return begin_eviction(page) and end_eviction(system, page)


def leave_free(system: System, pages: int) -> None:
    """Reclaim or allocate until ``pages`` EPC pages are free."""
    while system.free_pages < pages:
        system.core.reclaim(force=True)
    while system.free_pages > pages:
        system.core.alloc(None, reclaim=False)
