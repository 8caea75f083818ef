"""Pages in any state, for tests of the leaves that block, evict, load and remove them.

Building leaves allow only histories that make sense; the checks of a paging leaf are about states
that do not.  So a :class:`Bench` writes EPCM entries directly, keeping the one invariant that
counts (CHLDCNT), and the leaf under test is the only leaf that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from softsgx.arch import (
    CHILD_TYPES,
    PAGE_BYTES,
    Attributes,
    AttributesFlags,
    ConflictCode,
    PageInfo,
    PageType,
    Pfec,
    Secs,
    Status,
    VmExitReason,
)
from softsgx.hw import (
    DEFAULT_EPC_BASE,
    DictStore,
    EpcPage,
    GeneralProtection,
    Leaves,
    LogicalProcessor,
    Machine,
    MachineConfig,
    PageFault,
    PageInfoArgs,
    VmExit,
)
from softsgx.hw.optimised import OPTIMISED
from softsgx.hw.secs import ResidentSecs
from softsgx.runtime import InlineRuntime, Runtime
from softsgx.trace import Tracer

EPC_PAGES = 64
OUTSIDE = 0x7000_0000  # ordinary memory, no EPC
BASE, SIZE = 0x10_0000, 0x10_0000  # of every enclave

PAGEINFO_AT, PCMD_AT, RDINFO_AT, SRCPGE_AT = 0x1_0000, 0x1_0080, 0x1_0100, 0x1_1000
_EPCM_FIELDS = ("pt", "rwx", "linaddr", "blocked", "pending", "modified", "pr", "bepoch")
OPERANDS_AT, OPERANDS_BYTES = PAGEINFO_AT, 0x2000


@dataclass(frozen=True)
class Pf:
    """#PF with the SGX bit, CR2 = ``address``; ``user`` for an ENCLU leaf (CPL 3)."""

    address: int
    user: bool = False


@dataclass(frozen=True)
class PlainPf:
    """#PF from paging: no SGX bit."""

    address: int


@dataclass(frozen=True)
class Exit:
    """VM exit SGX_CONFLICT."""

    code: ConflictCode
    error: int
    guest_physical: int
    guest_linear: int


GP = "#GP(0)"


def outcome(run: Callable[[], object]) -> object:
    """Return how a leaf ends: its status, ``None``, :data:`GP`, :class:`Pf`, :class:`Exit`."""
    try:
        return run()
    except GeneralProtection:
        return GP
    except PageFault as fault:
        return _page_fault(fault)
    except VmExit as leave:
        return _vm_exit(leave)


def _page_fault(fault: PageFault) -> Pf | PlainPf:
    if not fault.code & Pfec.SGX:
        return PlainPf(fault.address)
    # The EPCM refuses only what paging has allowed.
    assert fault.code & Pfec.P, f"SGX without P: {fault}"
    assert not fault.code & (Pfec.RSVD | Pfec.PK), str(fault)
    return Pf(fault.address, bool(fault.code & Pfec.U))


def _vm_exit(leave: VmExit) -> Exit:
    assert leave.reason is VmExitReason.SGX_CONFLICT, f"exit reason {leave.reason}"
    code = ConflictCode(leave.code)
    return Exit(code, leave.error, leave.guest_physical, leave.guest_linear)


@dataclass
class Blob:
    """What the operating system keeps of one evicted page."""

    srcpge: bytearray
    pcmd: bytearray
    slot: int
    linaddr: int = 0
    secs: int = 0

    def copy(self) -> Blob:
        """Return an independent copy, as a replaying operating system keeps one."""
        return Blob(
            bytearray(self.srcpge), bytearray(self.pcmd), self.slot, self.linaddr, self.secs
        )

    def args(self) -> PageInfoArgs:
        """Return the PAGEINFO that loads it."""
        return PageInfoArgs(self.linaddr, self.srcpge, self.pcmd, self.secs)


def pattern(seed: int) -> bytes:
    """Return 4096 bytes that differ from those of every other ``seed``."""
    return b"".join((seed << 32 | i).to_bytes(8, "little") for i in range(PAGE_BYTES // 8))


@dataclass
class Bench:
    """A small machine and direct ways to put its pages into a state."""

    runtime: Runtime = field(default_factory=InlineRuntime)
    processors: int = 4
    tracer: Tracer | None = None

    def __post_init__(self) -> None:
        self.store = DictStore()
        self.machine = Machine(
            MachineConfig.with_epc(EPC_PAGES * PAGE_BYTES, processors=self.processors),
            self.runtime,
            store=self.store,
            tracer=self.tracer,
            optimised=OPTIMISED,
        )
        self.cpu = self.machine.kernel
        self.leaves = Leaves(self.cpu)
        self._next = 0
        self._slots = 0
        self._slot_page = 0

    # --- pages -------------------------------------------------------------------------------

    def free(self) -> int:
        """Return a page that nobody was given yet."""
        self._next += 1
        assert self._next <= EPC_PAGES, "the bench has no EPC page left"
        return DEFAULT_EPC_BASE + (self._next - 1) * PAGE_BYTES

    def page(self, addr: int) -> EpcPage:
        """Return the page at an EPC address."""
        page = self.machine.page_at(addr)
        assert page is not None, f"{addr:#x} is no EPC page"
        return page

    def secs(self, **fields: Any) -> int:
        """Return a resident SECS of an initialised enclave."""
        flags = AttributesFlags.INIT | AttributesFlags.MODE64BIT
        secs = Secs(
            size=SIZE,
            base=BASE,
            ssa_frame_size=1,
            attributes=Attributes(flags=flags, xfrm=3),
            mrenclave=bytes(range(32)),
            **fields,
        )
        addr = self.free()
        page = self.page(addr)
        page.fill(PageType.SECS)
        page.enclave = ResidentSecs(secs, self.machine.next_eid(), addr)
        return addr

    def enclave(self, secs: int) -> ResidentSecs:
        """Return the enclave whose SECS is at ``secs``."""
        enclave = self.page(secs).enclave
        assert enclave is not None, f"no SECS at {secs:#x}"
        return enclave

    def child(
        self,
        secs: int,
        pt: PageType = PageType.REG,
        rwx: int = 3,
        *,
        linaddr: int | None = None,
        content: bytes | None = None,
        **flags: bool,
    ) -> int:
        """Return a resident child page; its content tells its address apart."""
        addr = self.free()
        page = self.page(addr)
        where = BASE + (addr - DEFAULT_EPC_BASE) if linaddr is None else linaddr
        page.fill(pt, rwx=rwx, secs=self.page(secs), linaddr=where)
        for name, value in flags.items():
            setattr(page, name, value)
        self.store.fill(page, pattern(addr) if content is None else content)
        self.enclave(secs).children += 1
        return addr

    def va(self) -> int:
        """Return an empty VA page."""
        addr = self.free()
        self.page(addr).fill(PageType.VA)
        return addr

    def slot(self) -> int:
        """Return an empty VA slot nobody was given yet."""
        if self._slots % 512 == 0:
            self._slot_page = self.va()
        self._slots += 1
        return self._slot_page + (self._slots - 1) % 512 * 8

    def slot_value(self, slot: int) -> int:
        """Return the version in a slot."""
        slots = self.page(slot).slots
        assert slots is not None, f"{slot:#x} is in no VA page"
        return slots[slot % PAGE_BYTES // 8]

    def kind(self, kind: str, secs: int) -> int:
        """Return a fresh page of a type by name: a child of ``secs``, ``SECS`` or ``VA``."""
        if kind == "SECS":
            return self.secs()
        return self.va() if kind == "VA" else self.child(secs, PageType[kind])

    def content(self, addr: int) -> bytes:
        """Return the bytes of a resident child page."""
        return self.store.read(self.page(addr), 0, PAGE_BYTES)

    # --- histories ---------------------------------------------------------------------------

    def make_evictable(self, addr: int) -> None:
        """Block and track a child page by writing its EPCM entry; nothing for other types."""
        page = self.page(addr)
        if page.pt in CHILD_TYPES:
            page.blocked = True
            page.bepoch = page.owner.epoch
            page.owner.epoch += 1

    def evict(self, addr: int, slot: int | None = None) -> Blob:
        """Evict a page by EWB and return what the operating system keeps of it."""
        self.make_evictable(addr)
        secs = self.page(addr).secs
        blob = Blob(bytearray(PAGE_BYTES), bytearray(128), self.slot() if slot is None else slot)
        info = PageInfoArgs(0, blob.srcpge, blob.pcmd, 0)
        status = self.leaves.ewb(info, addr, blob.slot)
        assert status in (Status.SUCCESS, Status.VA_SLOT_OCCUPIED), f"EWB: {status!r}"
        blob.linaddr, blob.secs = info.linaddr, 0 if secs is None else secs.addr
        return blob

    def load(self, blob: Blob, addr: int, leaf: str = "eldu") -> object:
        """Load a blob by ELDU or a sibling; return how that ends."""
        return outcome(lambda: getattr(self.leaves, leaf)(blob.args(), addr, blob.slot))

    # --- what must not change ----------------------------------------------------------------

    def snapshot(self) -> object:
        """Return everything a leaf could change: EPCM, SECS, slots, bytes, locks, operands."""
        pages = {addr: self._state(page) for addr, page in sorted(self.machine.pages.items())}
        return (
            {addr: state for addr, state in pages.items() if state},
            self.machine.ram_read(OPERANDS_AT, OPERANDS_BYTES),
            dict(self.machine.measurements),
            len(self.store),
        )

    def _state(self, page: EpcPage) -> dict[str, object]:
        state: dict[str, object] = {"lock": page.lock, "modification_lock": page.modification_lock}
        if not page.valid:  # the other fields of an invalid entry mean nothing
            return state if page.lock or page.modification_lock else {}
        state.update((name, getattr(page, name)) for name in _EPCM_FIELDS)
        state["secs"] = None if page.secs is None else page.secs.addr
        state["slots"] = None if page.slots is None else tuple(page.slots)
        if page.enclave is not None:
            state["enclave"] = {
                name: getattr(page.enclave, name) for name in ResidentSecs.__slots__
            }
        if page.secs is not None:
            state["bytes"] = self.store.read(page, 0, PAGE_BYTES)
        return state


@dataclass
class Call:
    """The operands of EWB and ELD* in memory, so that alignment can be wrong.

    ``rbx`` may be misaligned; PAGEINFO is written where it should be.
    """

    cpu: LogicalProcessor
    leaf: str
    rcx: int
    rdx: int
    rbx: int = PAGEINFO_AT
    linaddr: int = 0
    srcpge: int = SRCPGE_AT
    pcmd: int = PCMD_AT
    secs: int = 0

    def store(self) -> None:
        """Put PAGEINFO where RBX says it is."""
        info = PageInfo(linaddr=self.linaddr, srcpge=self.srcpge, secinfo=self.pcmd, secs=self.secs)
        self.cpu.hw.ram_write(PAGEINFO_AT, info.pack())

    def run(self) -> object:
        """Execute the leaf."""
        return outcome(lambda: getattr(Leaves(self.cpu), self.leaf)(self.rbx, self.rcx, self.rdx))


def in_guest(cpu: LogicalProcessor) -> None:
    """Let ``cpu`` run a guest with EPC virtualization extensions."""
    cpu.vmx_operation = cpu.vmx_nonroot = cpu.epc_virtualization = True
