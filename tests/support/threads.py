"""A processor at the border of an enclave: scenes for the leaves that cross it.

The enclave is built by real leaves but for EINIT, whose effect on entry is one bit; a
:class:`Border` is one call of EENTER or ERESUME that would succeed, for ``tests.support.checks``
to break, and the ways to go on from there.
"""

from __future__ import annotations

from copy import copy
from dataclasses import astuple, dataclass, field
from typing import Any

from tests.support.hw import (
    Built,
    PageSpec,
    build_enclave,
    make_machine,
    map_enclave,
    secs_of,
)
from tests.support.scenes import state_of

from softsgx.arch import (
    GPRSGX_BYTES,
    PAGE_BYTES,
    AttributesFlags,
    ExInfo,
    GprSgx,
    PageType,
    Pfec,
    Tcs,
)
from softsgx.hw import (
    ControlProtection,
    DeviceNotAvailable,
    EpcPage,
    Fault,
    GeneralProtection,
    LogicalProcessor,
    Machine,
    PageFault,
    PageTables,
    TsxAbort,
    UndefinedOpcode,
    VmExit,
    aex,
)
from softsgx.hw.secs import ResidentSecs
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = [
    "AEP",
    "CET_PAGE",
    "CODE",
    "DATA",
    "ENCLU_AT",
    "FS",
    "GP",
    "GS",
    "NSSA",
    "RAM",
    "SSA",
    "TCS",
    "Border",
    "UserPf",
    "ended",
    "poke_tcs",
]

BASE64, BASE32 = 0x7000_0000_0000, 0x1000_0000
SIZE = 0x4_0000
CODE, DATA, TCS, SSA = 0x0, 0x1000, 0x4000, 0x5000
CET_PAGE = 0x3_0000
FS, GS = 0x2000, 0x3000
ENCLU_AT, AEP = 0x40_0000, 0x40_1000
RAM = 0x20_0000  # linear address of ordinary memory that the process has
NSSA = 3


@dataclass(frozen=True)
class UserPf:
    """#PF of a user's access; ``sgx`` tells the EPCM's from paging's."""

    address: int
    access: str = "r"
    sgx: bool = True


GP = "#GP(0)"
_OTHERS: dict[type[BaseException], str] = {
    GeneralProtection: GP,
    UndefinedOpcode: "#UD",
    DeviceNotAvailable: "#NM",
    ControlProtection: "#CP",
    TsxAbort: "abort",
}


def ended(run: Any) -> object:
    """Return how an instruction of the user ends: its result, or its fault by name."""
    try:
        return run()
    except PageFault as fault:
        return _page_fault(fault)
    except VmExit as leave:
        return ("exit", leave.reason, leave.code)
    except (Fault, TsxAbort) as fault:
        return _OTHERS[type(fault)]


def _page_fault(fault: PageFault) -> UserPf:
    code = Pfec(fault.code)
    assert code & Pfec.U, f"a user's fault without U/S: {fault}"
    if code & Pfec.SGX:
        assert code & Pfec.P and not code & (Pfec.RSVD | Pfec.PK), str(fault)
    access = "w" if code & Pfec.W else "x" if code & Pfec.I else "r"
    return UserPf(fault.address, access, bool(code & Pfec.SGX))


def poke_tcs(machine: Machine, page: EpcPage, **fields: int) -> None:
    """Write fields of a TCS behind the processor's back."""
    for name, value in fields.items():
        size = 4 if name in ("cssa", "nssa", "fs_limit", "gs_limit") else 8
        machine.store.write(page, Tcs.OFFSETS[name], value.to_bytes(size, "little"))


@dataclass
class Border:
    """One call of EENTER or ERESUME, on a processor that is set up for it.

    Attributes:
        leaf: ``eenter``, or ``eresume`` after an interrupt.
        mode64: 64-bit enclave and processor.
        rbx, rcx: the operands, TCS and AEP.
    """

    leaf: str = "eenter"
    mode64: bool = True
    cet: bool = False
    frame_pages: int = 1
    xfrm: int = 3
    flags: int = 0
    miscselect: int = 0
    runtime: Runtime | None = None
    tracer: Tracer | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = dict(self.config)
        if self.cet:
            options["attributes"] = AttributesFlags((1 << 11) - 1) & ~AttributesFlags.INIT
        self.hw: Machine = make_machine(
            processors=3, runtime=self.runtime, tracer=self.tracer, **options
        )
        base = BASE64 if self.mode64 else BASE32
        flags = self.flags | (AttributesFlags.MODE64BIT if self.mode64 else 0)
        fields: dict[str, Any] = {"miscselect": self.miscselect}
        if self.cet:
            flags |= AttributesFlags.CET
            fields["cet_attributes"] = 0x5  # SH_STK_EN, ENDBR_EN
        secs = secs_of(
            SIZE, base, flags=flags, xfrm=self.xfrm, ssa_frame_size=self.frame_pages, **fields
        )
        self.hw.kernel.cr4_cet = self.cet
        self.built: Built = build_enclave(self.hw, self._pages(), secs=secs, init=False)
        self.enclave.flags |= AttributesFlags.INIT
        self.tables: PageTables = map_enclave(self.built)
        self.tables.map(RAM, RAM, 7)
        self.cpu: LogicalProcessor = self.hw.cpus[1]
        self.prepare(self.cpu)
        self.rbx, self.rcx = base + TCS, AEP
        if self.leaf == "eresume":
            self.cpu.enclu.eenter(self.rbx, self.rcx)
            aex(self.cpu, 0xFD)
            self.cpu.regs.rip = ENCLU_AT

    def _pages(self) -> list[PageSpec]:
        page = Tcs(
            ossa=SSA,
            nssa=NSSA,
            oentry=CODE + 0x10,
            ofs_base=FS,
            ogs_base=GS,
            fs_limit=0xFFF,
            gs_limit=0xFFF,
            ocetssa=CET_PAGE if self.cet else 0,
        ).pack()
        pages = [
            PageSpec(rights=5, offset=CODE, data=b"\x90" * PAGE_BYTES),
            PageSpec(offset=DATA),
            PageSpec(PageType.TCS, 0, page, TCS),
        ]
        pages += [
            PageSpec(offset=SSA + number * PAGE_BYTES) for number in range(NSSA * self.frame_pages)
        ]
        if self.cet:
            pages.append(PageSpec(PageType.SS_REST, 3, offset=CET_PAGE))
        return [PageSpec(p.pt, p.rights, p.data, p.offset, measured=False) for p in pages]

    def prepare(self, cpu: LogicalProcessor) -> None:
        """Let a processor run the process outside the enclave, at its ENCLU."""
        cpu.space, cpu.cpl, cpu.mode64, cpu.cr4_cet = self.tables, 3, self.mode64, self.cet
        cpu.regs.rip, cpu.regs.rsp, cpu.regs.rbp = ENCLU_AT, 0x7000, 0x7100
        cpu.regs.fs_base, cpu.regs.gs_base = 0x1234_5000, 0x1235_5000
        cpu.regs.xcr0 = max(self.xfrm, 7)

    @property
    def enclave(self) -> ResidentSecs:
        """Its live state."""
        return self.built.enclave

    @property
    def base(self) -> int:
        """Where it is."""
        return self.built.base

    def page(self, offset: int) -> EpcPage:
        """The EPC page at an offset."""
        return self.built.page(offset)

    @property
    def tcs(self) -> EpcPage:
        """The page of the TCS."""
        return self.page(TCS)

    def poke(self, **fields: int) -> None:
        """Write fields of the TCS behind the processor's back."""
        poke_tcs(self.hw, self.tcs, **fields)

    def peek(self, name: str) -> int:
        """Return a field of the TCS."""
        return int(getattr(Tcs.unpack(self.hw.store.read(self.tcs, 0, PAGE_BYTES)), name))

    def frame(self, index: int) -> int:
        """Offset of an SSA frame."""
        return SSA + index * self.frame_pages * PAGE_BYTES

    def gpr(self, index: int) -> GprSgx:
        """GPRSGX of an SSA frame."""
        end = self.frame(index + 1) - GPRSGX_BYTES
        return GprSgx.unpack(self.built.read(end, GPRSGX_BYTES))

    def poke_gpr(self, index: int, **fields: int) -> None:
        """Write fields of GPRSGX behind the processor's back."""
        page = self.page(self.frame(index + 1) - PAGE_BYTES)
        changed = self.gpr(index).replace(**fields)
        self.hw.store.write(page, PAGE_BYTES - GPRSGX_BYTES, changed.pack())

    def exinfo(self, index: int) -> ExInfo:
        """EXINFO of an SSA frame."""
        end = self.frame(index + 1) - GPRSGX_BYTES - ExInfo.SIZE
        return ExInfo.unpack(self.built.read(end, ExInfo.SIZE))

    def run(self) -> object:
        """Enter, or resume."""
        return ended(lambda: getattr(self.cpu.enclu, self.leaf)(self.rbx, self.rcx))

    def enter(self) -> None:
        """Enter; it must work."""
        self.cpu.enclu.eenter(self.rbx, self.rcx)

    def snapshot(self) -> object:
        """Return the machine's and the processor's state."""
        return [*state_of(self.hw), *self.processor()]

    def processor(self) -> list[object]:
        """Return what an instruction may change of the processor."""
        cpu = self.cpu
        inside = None if cpu.inside is None else (cpu.inside.secs.addr, cpu.inside.tcs_linaddr)
        return [
            astuple(cpu.regs),
            *(cpu.fs, cpu.gs, cpu.cr2, cpu.ssp, cpu.u_cet, inside),
            {page: copy(entry) for page, entry in cpu.tlb.items()},
        ]
