"""A guest: a virtual machine; the host may evict its EPC pages.

It has the interface of a :class:`~softsgx.hw.Machine` (``config``, ``leaves``, ``cpus``, memory),
so that ``paging`` and ``driver`` run in it unchanged, with their own reclaimer.

This module decides how an instruction of the guest continues after a VM exit or a conflict.  If a
page is not resident, the host loads it and the guest executes the instruction again.  If a leaf
failed while the host worked on the guest's EPC, the guest executes it again.  Conflicts among the
guest's own leaves are reflected to the guest.

Source:
    arch/x86/kvm/vmx/sgx.c; SDM vol. 3D, "VMX Operation and SGX".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    ConflictCode,
    SgxFeature,
    Status,
    VmExitReason,
)
from softsgx.errors import SoftSgxError
from softsgx.hw import (
    DEFAULT_EPC_BASE,
    EnclaveLeft,
    EpcSection,
    GeneralProtection,
    LogicalProcessor,
    Machine,
    MachineConfig,
    VmExit,
    interrupt,
)
from softsgx.kvm import registers
from softsgx.kvm.device import VepcDevice
from softsgx.kvm.events import ConflictResolved, VirtualPowerLost
from softsgx.kvm.leaves import GuestLeaves, exiting_bitmap
from softsgx.kvm.monitor import CONFLICT_CODES, Monitor
from softsgx.kvm.page import VepcPage
from softsgx.kvm.processor import GuestProcessor
from softsgx.kvm.vepc import SGX_IOC_VEPC_REMOVE_ALL, VepcMapping
from softsgx.paging import BackingError, Claim, FaultResult, Group
from softsgx.trace import Tracer

__all__ = ["Guest", "GuestStoppedError"]

T = TypeVar("T")
_SECTION_ALIGN = 1 << 30
_RAM_BITS = 52
_HIDDEN = SgxFeature.ENCLV | SgxFeature.OVERSUB_ENCLS | SgxFeature.EUPDATESVN
_MOST_EXECUTIONS = 100_000
_MOST_SHORTAGES = 32
#: A processor waits while other tasks have claims on pages; on threads they are done after hundreds
#: of its attempts, each after a pause of 50 us.  More is a loop without end.
_MOST_FAULTS = 100_000


class GuestStoppedError(Exception):
    """The guest was stopped; a task that executes its instructions ends with this.

    Attributes:
        guest: its name.
        reason: why it was stopped.
    """

    def __init__(self, guest: str, reason: str) -> None:
        super().__init__(f"guest {guest} was stopped: {reason}")
        self.guest, self.reason = guest, reason


class Guest(Monitor):
    """One virtual machine.

    Args:
        machine: the machine that it runs on.
        device: provides its virtual EPC.
        name: its name, in messages and schedules.
        epc_pages: pages of each of its EPC sections; each section is a separate virtual EPC.
        processors: number of its processors.
        group: the group that its EPC pages are charged to; the root when ``None``.
        ballast_pages: resident pages that the host never evicts.
        provisioning: whether its enclaves may use the provisioning key.
        config: changes to its CPUID, by field of :class:`~softsgx.hw.MachineConfig`.
        tracer: receives the host's events about it.
        leaf_tracer: receives the events of the guest's ENCLS leaves, as the guest sees them.

    Attributes:
        config, leaves, cpus, launch_key_hash: as of a machine.
        kernel: the processor that ``leaves`` run on.
        mappings: its EPC sections, in order.
        ram_base: offset of its memory in the machine's.

    Raises:
        SoftSgxError: the machine has no SGX, the ballast is too large, or there is no backing file.
    """

    def __init__(
        self,
        machine: Machine,
        device: VepcDevice,
        name: str,
        *,
        epc_pages: int | Sequence[int],
        processors: int = 1,
        group: Group | None = None,
        ballast_pages: int = 0,
        provisioning: bool = False,
        config: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        leaf_tracer: Tracer | None = None,
    ) -> None:
        sizes = [epc_pages] if isinstance(epc_pages, int) else list(epc_pages)
        if not machine.config.features & SgxFeature.SGX1:
            raise SoftSgxError(
                f"guest {name}: the machine has no SGX; add SgxFeature.SGX1 to its features"
            )
        if sum(sizes) < ballast_pages:
            raise SoftSgxError(
                f"guest {name}: a ballast of {ballast_pages} pages exceeds its EPC of {sum(sizes)};"
                " give less"
            )
        super().__init__(device.core, name, group=group, ballast_pages=ballast_pages, tracer=tracer)
        self.machine, self.device, self.defects = machine, device, device.defects
        self.config = _guest_config(
            machine.config, sizes, processors, provisioning=provisioning, changes=config or {}
        )
        self.launch_key_hash = list(self.config.launch_key_hash)
        # Above the machine's own memory, and apart from other guests' memory.
        self.ram_base = device.next_number() << _RAM_BITS
        bitmap = exiting_bitmap(machine.config, self.config)
        self.cpus = [GuestProcessor(self, number, bitmap) for number in range(processors)]
        self.kernel = GuestProcessor(self, 0, bitmap)
        self.leaves = GuestLeaves(self, self.kernel, tracer=leaf_tracer)
        self.mappings: list[VepcMapping] = []
        for section in self.config.sections:
            try:
                vepc = device.open(self, base=section.base)
            except BackingError as error:
                raise SoftSgxError(
                    f"guest {name}: {error}; change backing_directory or backing_limit"
                ) from error
            self.mappings.append(vepc.mmap(section.pages))
            vepc.close()  # the mapping references it
        machine.add_virtual_processors(self.cpus)

    # --- a machine ------------------------------------------------------------------------------

    def mapping_of(self, gpa: int) -> VepcMapping | None:
        """Return the EPC section that holds a guest-physical address, ``None`` for memory."""
        for mapping in self.mappings:
            at = gpa - mapping.vepc.base
            if 0 <= at < mapping.pages * PAGE_BYTES:
                return mapping
        return None

    def ram_read(self, physical: int, size: int) -> bytes:
        """Return bytes of its memory; all ones where it is EPC."""
        if self.mapping_of(physical) is not None:
            return b"\xff" * size
        return self.machine.ram_read(physical + self.ram_base, size)

    def ram_write(self, physical: int, data: bytes) -> None:
        """Write to its memory; ignored where it is EPC."""
        if self.mapping_of(physical) is None:
            self.machine.ram_write(physical + self.ram_base, data)

    def ram_discard(self, physical: int) -> None:
        """Free the memory behind one page of its ordinary memory."""
        self.machine.ram_discard(physical + self.ram_base)

    # --- instructions ---------------------------------------------------------------------------

    def execute(self, cpu: LogicalProcessor, leaf: Callable[..., T], *operands: Any) -> T:
        """Execute an ENCLS leaf to its end: again after each VM exit or conflict with the host.

        Raises:
            Fault: the guest's own.
            GuestStoppedError: the guest was stopped.
        """
        pins: list[VepcPage] = []
        name = getattr(leaf, "__name__", "ecreate or einit")
        try:
            for _try in range(_MOST_EXECUTIONS):
                before = self.host_work
                try:
                    self._wait_until_runnable()
                    with self.gate.executing():
                        result = leaf(cpu, *operands)
                except GeneralProtection:
                    if self._should_repeat(name, "#GP(0)", before):
                        continue
                    raise
                except VmExit as exit:
                    if exit.reason is VmExitReason.EPT_VIOLATION:
                        self._handle_ept_violation(exit, pins)
                        continue
                    reflected = self._conflict(name, exit, before)
                    if reflected is None:
                        continue
                    return reflected  # type: ignore[return-value]
                code = result if isinstance(result, Status) else Status.SUCCESS
                if code in CONFLICT_CODES and self._should_repeat(name, code.manual_name, before):
                    continue
                return result
            raise self._stopped_for(f"{name} was executed {_MOST_EXECUTIONS} times without an end")
        finally:
            self._unpin(pins)

    def encls(self, cpu: LogicalProcessor | None = None) -> None:
        """Execute ENCLS by registers; see :func:`softsgx.kvm.registers.encls`.

        Args:
            cpu: a processor of the guest at CPL 0; :attr:`kernel` when ``None``.
        """
        registers.encls(self, self.kernel if cpu is None else cpu)

    def resume(self, cpu: GuestProcessor, exit: VmExit, again: Callable[[], T]) -> T:
        """Handle a VM exit of ENCLU or of a memory access, and execute ``again``.

        Raises:
            EnclaveLeft: the exit was an asynchronous exit of the enclave: the processor continues
                at the AEP, as after any interrupt.
            GuestStoppedError: the guest was stopped.
        """
        if exit.reason is not VmExitReason.EPT_VIOLATION:
            raise exit
        pins: list[VepcPage] = []
        try:
            if cpu.inside is not None:
                interrupt(cpu)
                self._handle_ept_violation(exit, pins, cpu.claim)
                raise EnclaveLeft
            for _try in range(_MOST_EXECUTIONS):
                self._handle_ept_violation(exit, pins, cpu.claim)
                try:
                    result = again()
                except VmExit as next_exit:
                    exit = next_exit
                else:
                    self.host.claims.release(cpu.claim)
                    return result
            raise self._stopped_for(f"page {exit.guest_physical:#x} faults without end")
        finally:
            self._unpin(pins)

    def _wait_until_runnable(self) -> None:
        """Wait while the guest is paused.

        Raises:
            GuestStoppedError: it was stopped.
        """
        if self.paused:
            with self.lock:
                while self.paused:
                    self.changed.wait()
        if self.stopped is not None:
            raise GuestStoppedError(self.name, self.stopped)

    def _handle_ept_violation(
        self, exit: VmExit, pins: list[VepcPage], claim: Claim | None = None
    ) -> None:
        """Make the page resident and map it; ``claim`` is the processor's."""
        self._wait_until_runnable()
        gpa = exit.guest_physical
        mapping = self.mapping_of(gpa)
        if mapping is None:
            return  # ordinary memory is always present: the exit came from a pause
        self.counters.violations += 1
        index = (gpa - mapping.vepc.base) // PAGE_BYTES
        shortages = 0
        for _try in range(_MOST_FAULTS):
            result = mapping.fault(index, pins=pins, claim=claim)
            if result is FaultResult.NOPAGE:
                return
            if result is FaultResult.RETRY:
                continue
            self.reap()
            self._wait_until_runnable()
            # Other processors may wait for the pages that this one has pinned.
            self._unpin(pins)
            shortages += 1
            if shortages > _MOST_SHORTAGES:
                break
            self.runtime.yield_now()
        why = mapping.vepc.refusal or "there are too few EPC pages"
        raise self._stopped_for(f"page {gpa:#x} cannot be loaded: {why}")

    def _stopped_for(self, reason: str) -> GuestStoppedError:
        self.stop(reason)
        return GuestStoppedError(self.name, reason)

    def _unpin(self, pins: list[VepcPage]) -> None:
        if not pins:
            return
        with self.lock:
            for page in pins:
                page.vepc.unpin(page)
        pins.clear()

    # --- conflicts ------------------------------------------------------------------------------

    def _should_repeat(self, leaf: str, what: str, before: int) -> bool:
        """Return whether the guest executes a leaf again after a conflict with another leaf.

        It does if the other leaf may have been the host's.  Returns after the host has finished.
        """
        again = self.host_worked_since(before)
        if again:
            self.counters.again += 1
            with self.lock:
                pass
        if self.tracer is not None:
            self.tracer(ConflictResolved(self.name, leaf, what, "again" if again else "reflect"))
        return again

    def _conflict(self, leaf: str, exit: VmExit, before: int) -> Status | None:
        """Handle SGX_CONFLICT.

        Returns:
            ``None``: execute the leaf again; otherwise the code that the guest sees.

        Raises:
            GeneralProtection: the guest sees this.
            VmExit: the exit has another reason; a guest must not execute the leaf.
        """
        if exit.reason is not VmExitReason.SGX_CONFLICT:
            raise exit
        code = ConflictCode(exit.code)
        if self._should_repeat(leaf, code.name, before):
            return None
        self.counters.reflected += 1
        match code:
            case ConflictCode.TRACKING_REFERENCE_CONFLICT:
                return Status.PREV_TRK_INCMPL
            case ConflictCode.EPC_PAGE_CONFLICT_ERROR:
                return Status(exit.error)
            case ConflictCode.TRACKING_RESOURCE_CONFLICT | ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION:
                raise GeneralProtection

    # --- pause and power ------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop executing: every processor exits; the guest keeps its state."""
        self.paused = True  # every translation from now on is a VM exit, which waits
        self.kick()
        self.quiesce()

    def unpause(self) -> None:
        """Continue after :meth:`pause`."""
        with self.lock:
            self.paused = False
            self.changed.notify_all()

    def power_transition(self) -> None:
        """Put only this guest through S3, S4, S5 or a reset: its EPC is empty afterwards.

        Its processors are outside enclaves, its launch key hash has the reset value.  Pages that
        the guest itself has evicted cannot be loaded again, since the versions were in its EPC.

        Deviation: the paging key is the machine's and stays; so do enclave identifiers and
        versions, which are never used twice.

        Source:
            SDM vol. 3D, "Intel SGX Interactions with S-States".
        """
        was_paused = self.paused
        self.pause()
        remaining = 0
        for _round in range(2):
            remaining = sum(vepc.ioctl(SGX_IOC_VEPC_REMOVE_ALL) for vepc in list(self.vepcs))
        assert not remaining, f"{remaining} SECS pages survive the loss of power of {self.name}"
        self.launch_key_hash[:] = self.config.launch_key_hash
        if self.tracer is not None:
            self.tracer(VirtualPowerLost(self.name))
        if not was_paused:
            self.unpause()

    def destroy(self) -> None:
        """The VMM has ended: unmap its virtual EPCs."""
        if self.stopped is None:
            self.stop("its VMM has ended")
        for mapping in self.mappings:
            mapping.unmap()
        self.mappings = []
        gone = {id(cpu) for cpu in self.cpus}
        cpus = self.machine.virtual_cpus
        cpus[:] = [cpu for cpu in cpus if id(cpu) not in gone]

    # --- counts and checks ----------------------------------------------------------------------

    def unreclaimable(self) -> dict[str, int]:
        """Return how many of its resident pages cannot be evicted now, by reason."""
        reasons: dict[str, int] = {}
        with self.lock, self.host_working():
            for vepc in self.vepcs:
                for page in list(vepc.pages.values()):
                    if page.epc is not None and (reason := vepc.unreclaimable_reason(page)):
                        reasons[reason] = reasons.get(reason, 0) + 1
        return reasons

    def evicted_pages(self) -> int:
        """Return how many of its pages are evicted."""
        return sum(
            page.evicted is not None for vepc in self.vepcs for page in list(vepc.pages.values())
        )

    def check_invariants(self) -> None:
        """Compare every count with its pages; call it while none of its processors runs."""
        pages = [page for vepc in self.vepcs for page in vepc.pages.values()]
        resident = sum(page.epc is not None for page in pages)
        assert resident == self.resident, f"{self.resident} resident, recounted {resident}"
        assert not self.evicting, f"{self.evicting} pages are being evicted, but no batch runs"
        children: dict[int, int] = {}
        for page in pages:
            if page.evicted is not None and page.evicted.secs is not None:
                secs = id(page.evicted.secs)
                children[secs] = children.get(secs, 0) + 1
        for page in pages:
            counted = children.get(id(page), 0)
            assert counted == page.evicted_children, (
                f"{page!r}: {page.evicted_children} evicted children, recounted {counted}"
            )
        for vepc in self.vepcs:
            vepc.check_invariants()


def _guest_config(
    host: MachineConfig,
    sizes: list[int],
    processors: int,
    *,
    provisioning: bool,
    changes: dict[str, Any],
) -> MachineConfig:
    sections, base = [], DEFAULT_EPC_BASE
    for pages in sizes:
        size = pages * PAGE_BYTES
        sections.append(EpcSection(base, size))
        base += -(-size // _SECTION_ALIGN) * _SECTION_ALIGN
    attributes = host.attributes
    if not provisioning:
        attributes &= ~AttributesFlags.PROVISIONKEY
    values: dict[str, Any] = {
        "sections": tuple(sections),
        "processors": processors,
        "features": host.features & ~_HIDDEN,
        "miscselect": host.miscselect,
        "attributes": attributes,
        "xfrm": host.xfrm,
        "max_size_32": host.max_size_32,
        "max_size_64": host.max_size_64,
        "xsave": host.xsave,
        "cpusvn": host.cpusvn,
        "microcode_svn": host.microcode_svn,
        "launch_key_hash": host.launch_key_hash,
        "launch_control": host.launch_control,
    }
    return MachineConfig(**(values | changes))
