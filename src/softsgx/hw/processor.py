"""A logical processor: registers, mode, TLB, and which enclave it is in.

Source:
    SDM vol. 3D, "Enclave Code Debug…", tables of processor-internal registers (CR_*); "Access
    control requirements" for what a TLB miss checks (``access.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from softsgx import compiled
from softsgx.arch import (
    PAGE_BYTES,
    ConflictCode,
    Pfec,
    SecInfo,
    Status,
    VmExitReason,
    is_canonical,
    page_of,
    split_pages,
)
from softsgx.arch import PageInfo as PageInfoBytes
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection, PageFault, VmExit
from softsgx.hw.operands import Buffer, PageInfoArgs, Ref
from softsgx.hw.space import EXECUTE, READ, WRITE, AddressSpace, DirectMap
from softsgx.layout import Structure
from softsgx.ondemand import dataclass, field
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.hw.leaves.enclu import EncluLeaves
    from softsgx.hw.machine import Machine
    from softsgx.hw.secs import ResidentSecs

__all__ = [
    "EnclaveMode",
    "LogicalProcessor",
    "Registers",
    "SavedOutsideState",
    "Segment",
    "SsaFrame",
    "Translation",
]

S = TypeVar("S", bound=Structure)
T = TypeVar("T")


@dataclass(slots=True)
class Registers:
    """The architectural state that entry and exit touch.

    Attributes:
        xcr0: XCR0.
        xsave: the state that XSAVE would store, non-compacted form, with XCR0 as it is outside:
            entry narrows XCR0, and components beyond it keep their values here.  Where it is
            shorter than a component's place, that component is in its initial state.
    """

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 0x202
    fs_base: int = 0
    gs_base: int = 0
    xcr0: int = 3
    xsave: bytes = bytes(576)


@dataclass(frozen=True, slots=True)
class Segment:
    """What entry checks of a segment register; flat and usable by default.

    Attributes:
        base: 0 for FS and GS, whose bases are in :class:`Registers`.
        limit: offset of its last byte.
        expand_down: an expand-down data segment.
        big: the D/B bit.
    """

    base: int = 0
    limit: int = 0xFFFF_FFFF
    selector: int = 0
    usable: bool = True
    expand_down: bool = False
    big: bool = True


@dataclass(slots=True)
class Translation:
    """One TLB entry: where a linear page is, and what may be done with it.

    Attributes:
        physical: page address.
        rights: kinds of access that were asked for and granted.
        page: the EPC page for a direct enclave access; ``None`` for ordinary memory.
        abort: the abort page stands in for EPC: loads give ones, stores vanish.
        epcm_rights: R/W/X of the EPCM entry when the translation was made.
    """

    physical: int
    rights: int
    page: EpcPage | None = None
    abort: bool = False
    epcm_rights: int = 0


class SsaFrame(NamedTuple):
    """The SSA frame that the next asynchronous exit fills, by physical pages.

    Attributes:
        gpr: page whose end is GPRSGX with MISC below it: CR_GPR_PA.
        xsave: pages of the XSAVE area, in order: CR_XSAVE_PAGE_n.
    """

    gpr: EpcPage
    xsave: tuple[EpcPage, ...]


class SavedOutsideState(NamedTuple):
    """SavedOutsideState state that exit restores: CR_SAVE_*.

    Attributes:
        tf: RFLAGS.TF; ``None`` when the thread opted in to debugging, which leaves TF alone.
    """

    fs: Segment
    fs_base: int
    gs: Segment
    gs_base: int
    xcr0: int
    tf: int | None
    ssp: int
    u_cet: int


@dataclass(slots=True)
class EnclaveMode:
    """What a processor keeps while it is inside an enclave.

    Attributes:
        secs: CR_ACTIVE_SECS, with its ``enclave``; neither can leave while a child is resident.
        tcs: CR_TCS_PA.
        tcs_linaddr: CR_TCS_LA.
        entry_epoch: the enclave's epoch at entry; see ``tracking.py``.
        frame: the cached SSA frame.
        cet_slot: page and offset of its CET save slot, ``None`` in an enclave without CET:
            CR_CET_SAVE_AREA_PA.
        outside: what exit restores.
    """

    secs: EpcPage
    enclave: ResidentSecs
    tcs: EpcPage
    tcs_linaddr: int
    entry_epoch: int
    frame: SsaFrame
    cet_slot: tuple[EpcPage, int] | None
    outside: SavedOutsideState


class ProcessorMode:
    """The fields of a processor that each fault reads, at places that C code knows.

    A class attribute of that name in a derived class, such as a default, would hide the field.
    """

    __slots__ = ("hw", "inside")

    hw: Machine
    inside: EnclaveMode | None


@dataclass
class LogicalProcessor(ProcessorMode):
    """One logical processor of a machine.

    Attributes:
        hw: its machine.
        index: its place among the processors of its machine or guest.
        regs: registers; an engine loads and stores them around leaves.
        space: the address space in force (CR3).
        cpl: current privilege level.
        mode64: IA32_EFER.LMA and CS.L; otherwise 32-bit protected mode.
        compatibility_mode: not ``mode64``, but under IA32_EFER.LMA.
        cr0_ts, cr0_ne, paging: CR0.TS, CR0.NE, CR0.PG.
        cr4_osfxsr, cr4_osxsave, cr4_cet: CR4 bits.
        real_mode: real, virtual-8086 or system-management mode.
        in_tsx: inside a transaction.
        vmx_operation: VMXON was done (ENCLV needs it).
        vmx_nonroot: it runs a guest.
        epc_virtualization: the guest runs with "EPC virtualization extensions": conflicts become
            VM exits.
        encls_exiting, enclv_exiting: exiting bitmaps, bit n for leaf n; -1 stands for the
            control being off.
        event_pending: an unmasked event that EINIT notices.
        cs, ds, es, ss, fs, gs: segment registers; all but FS and GS matter in 32-bit mode only.
        cr2: the address of the last page fault that was delivered.
        ssp, u_cet: shadow-stack pointer and IA32_U_CET, in force with CR4.CET.
        inside: enclave mode; ``None`` outside.
        tlb: translations by linear page.
        busy: held for one ENCLU or one memory access, and by a task that interrupts the
            processor: an interrupt waits for the end of the instruction.
        name: in schedules; ``cpu`` and the index by default.
        enclu_leaves: makes ``enclu``.
        enclu: the ENCLU leaves bound to this processor.
    """

    hw: Machine
    index: int
    enclu_leaves: Callable[[LogicalProcessor], EncluLeaves] = field(repr=False)
    regs: Registers = field(default_factory=Registers)
    space: AddressSpace = field(default_factory=DirectMap)
    cpl: int = 0
    mode64: bool = True
    compatibility_mode: bool = False
    cr0_ts: bool = False
    cr0_ne: bool = True
    paging: bool = True
    cr4_osfxsr: bool = True
    cr4_osxsave: bool = True
    cr4_cet: bool = False
    real_mode: bool = False
    in_tsx: bool = False
    vmx_operation: bool = False
    vmx_nonroot: bool = False
    epc_virtualization: bool = False
    encls_exiting: int = -1
    enclv_exiting: int = -1
    event_pending: bool = False
    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    ss: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    cr2: int = 0
    ssp: int = 0
    u_cet: int = 0
    inside: EnclaveMode | None = field(default_factory=NoneType)
    tlb: dict[int, Translation] = field(default_factory=dict)
    busy: Lock = field(init=False, repr=False)
    enclu: EncluLeaves = field(init=False, repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"cpu{self.index}"
        self.busy = self.hw.runtime.lock(self.name)
        self.enclu = self.enclu_leaves(self)

    @property
    def launch_key_hash(self) -> list[int]:
        """IA32_SGXLEPUBKEYHASH0–3 as this processor has them."""
        return self.hw.launch_key_hash

    def handle_vm_exit(self, exit: VmExit, retry: Callable[[], T]) -> T:
        """Let the hypervisor handle the VM exit of an ENCLU or an access.

        Args:
            exit: why the instruction ended; nothing architectural has changed, and the processor
                is not busy.
            retry: executes the instruction once more.

        Raises:
            VmExit: this processor has no hypervisor; its caller is one.
        """
        raise exit

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """Translate ``linaddr`` to a physical address: segmentation, then paging.

        Raises:
            GeneralProtection: not canonical, or in 32-bit mode beyond the segment's limit.
            PageFault: ordinary, from paging.
        """
        if self.mode64:
            if linaddr >> 47 and not is_canonical(linaddr):
                raise GeneralProtection
        elif linaddr > (self.cs if access == EXECUTE else self.ds).limit:
            raise GeneralProtection
        return self.space.translate(linaddr, access, user=user)

    def resolve(self, linaddr: int) -> EpcPage:
        """Return the EPC page that holds ``linaddr``: the manual's "resolves within an EPC".

        Raises:
            GeneralProtection: not canonical.
            PageFault: ordinary, from paging; or with the SGX bit, when it is no EPC.
        """
        # The kernel's own mapping needs no walk; all OS code takes this path.
        physical = linaddr & -PAGE_BYTES
        if type(self.space) is not DirectMap:
            physical = page_of(self.translate(linaddr, READ, user=self.cpl == 3))
        page = self.hw.pages.get(physical)
        if page is not None:
            return page
        page = self.hw.page_at(physical)
        if page is None:
            raise PageFault(linaddr, Pfec.P | Pfec.SGX | (Pfec.U if self.cpl == 3 else 0))
        return page

    def read(self, ref: Ref, size: int) -> Buffer:
        """Return ``size`` bytes of ordinary memory; an object gives its own."""
        if type(ref) is not int:
            assert len(ref) == size, f"operand of {len(ref)} bytes, the leaf reads {size}"  # type: ignore[arg-type]
            return ref  # type: ignore[return-value]
        parts = [
            self.hw.ram_read(self.translate(at, READ, user=self.cpl == 3), length)
            for at, length in split_pages(ref, size)
        ]
        return b"".join(parts)

    def write(self, ref: Ref, data: Buffer) -> None:
        """Store ``data`` to ordinary memory, or into the object's first bytes."""
        if type(ref) is not int:
            memoryview(ref)[: len(data)] = data  # type: ignore[arg-type]
            return
        done = 0
        for at, length in split_pages(ref, len(data)):
            physical = self.translate(at, WRITE, user=self.cpl == 3)
            self.hw.ram_write(physical, bytes(data[done : done + length]))
            done += length

    def probe_write(self, ref: Ref, size: int) -> None:
        """Raise the page fault that :meth:`write` would raise; nothing changes."""
        if type(ref) is int:
            for at, _length in split_pages(ref, size):
                self.translate(at, WRITE, user=self.cpl == 3)

    def load(self, kind: type[S], ref: Ref | S) -> S:
        """Return a structure from memory; an object of that kind stands for itself."""
        if isinstance(ref, kind):
            return ref
        return kind.unpack(self.read(ref, kind.SIZE))  # type: ignore[arg-type]

    def page_info(self, ref: Ref | PageInfoArgs) -> PageInfoArgs:
        """Return PAGEINFO from memory, or as it was given."""
        if type(ref) is PageInfoArgs:
            return ref
        info = self.load(PageInfoBytes, ref)  # type: ignore[arg-type]
        return PageInfoArgs(info.linaddr, info.srcpge, info.secinfo, info.secs)

    def sec_info(self, ref: Ref | SecInfo) -> SecInfo:
        """Return SECINFO from memory, or as it was given."""
        return self.load(SecInfo, ref)

    def conflict_exception(self, linaddr: int) -> NoReturn:
        """End a leaf that found an EPC page locked and has no code for it.

        Raises:
            VmExit: in a guest with EPC virtualization: EPC_PAGE_CONFLICT_EXCEPTION.
            GeneralProtection: otherwise.
        """
        if self.epc_virtualization:
            raise VmExit(
                VmExitReason.SGX_CONFLICT,
                ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION,
                guest_physical=self.space.paging_address(linaddr),
                guest_linear=linaddr,
            )
        raise GeneralProtection

    def conflict_error(self, linaddr: int) -> Status:
        """End a leaf that found an EPC page locked and may say so: EPC_PAGE_CONFLICT.

        Raises:
            VmExit: in a guest with EPC virtualization: EPC_PAGE_CONFLICT_ERROR.
        """
        if self.epc_virtualization:
            raise VmExit(
                VmExitReason.SGX_CONFLICT,
                ConflictCode.EPC_PAGE_CONFLICT_ERROR,
                error=Status.EPC_PAGE_CONFLICT,
                guest_physical=self.space.paging_address(linaddr),
                guest_linear=linaddr,
            )
        return Status.EPC_PAGE_CONFLICT

    def tracking_exit(self, code: ConflictCode, context: int) -> None:
        """In a guest with EPC virtualization, leave for a tracking conflict; else return.

        Raises:
            VmExit: SGX_CONFLICT with the enclave's ENCLAVECONTEXT.
        """
        if self.epc_virtualization:
            raise VmExit(VmExitReason.SGX_CONFLICT, code, guest_physical=context)

    def flush_tlb(self) -> None:
        """Drop every translation, as each enclave entry and exit does."""
        self.tlb.clear()


if compiled.speedups is not None:
    compiled.speedups.bind("ProcessorMode", ProcessorMode)
