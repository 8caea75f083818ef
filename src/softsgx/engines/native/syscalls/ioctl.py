"""ioctl on enclaves: the driver serves the command, then the engine follows what it changed.

A created enclave gets its list of forbidden instructions and a filter on its descriptor.  An
initialized one gets a filter on its code, so that its system calls stop and become #UD.  After a
change of EPCM entries, address spaces that map the enclave are brought up to date.

Source:
    sgx_ioctl(), arch/x86/kernel/cpu/sgx/ioctl.c; do_vfs_ioctl(), fs/ioctl.c;
    SDM vol. 3D, "Illegal Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from errno import EIO, ENOMEM, ENOTTY

from softsgx.arch import SgxFeature
from softsgx.driver import AddPages, BadAddress, EnclaveFile, Ioctl, RestrictPermissions
from softsgx.engines.native import recording
from softsgx.engines.native.shortages import Shortages
from softsgx.engines.native.syscalls.descriptors import DeviceDescriptors
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.tracing.bpf import build_guard
from softsgx.engines.native.tracing.filters import add_filter, watch_devices
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.engines.native.x86.forbidden import ForbiddenCode
from softsgx.hw import Machine

__all__ = ["EnclaveIoctls"]

#: Every filter makes each system call slower; enclaves beyond this number have none.
_MOST_GUARDED = 64

_TYPE, _SGX_TYPE = 0xFF00, 0xA400
#: FIBMAP, FIONREAD, FIOQSIZE; FS_IOC_* that get and set flags and attributes; FS_IOC_RESVSP and the
#: like, which change the size of a file.
_OF_REGULAR_FILES = frozenset(
    {
        *(0x0001, 0x541B, 0x5460),
        *(0x8008_6601, 0x4008_6602, 0x801C_581F, 0x401C_5820),
        *(0x4030_5828, 0x4030_5829, 0x4030_582A, 0x4030_582B, 0x4030_5839),
    }
)


class EnclaveIoctls:
    """See the module.

    Args:
        machine: the machine, which says what code of an enclave may execute.
        registry: which descriptors are devices.
        descriptors: adds filters on descriptors.
        shortages: reports ioctls that fail for lack of memory.
        around_init: is entered while EINIT runs.
        cpuid_faults: the processor makes CPUID fault, so it need not be replaced.
        xcr0: state components that this processor has enabled.
        areas: layouts of XSAVE areas, the machine's and this processor's.
        recorder: records uses of pages; ``None``: nothing does.
    """

    def __init__(
        self,
        machine: Machine,
        registry: Registry,
        descriptors: DeviceDescriptors,
        shortages: Shortages,
        *,
        around_init: Callable[[], AbstractContextManager[None]],
        cpuid_faults: bool,
        xcr0: int,
        areas: AreaLayouts,
        recorder: recording.Recorder | None = None,
    ) -> None:
        self._config = machine.config
        self._registry, self._descriptors, self._shortages = registry, descriptors, shortages
        self._around_init, self._recorder = around_init, recorder
        self._cpuid_faults, self._xcr0, self._areas = cpuid_faults, xcr0, areas

    def ioctl(self, thread: ProgramThread) -> int | None:
        """Do the ioctl of ``thread``; return ``None`` if its descriptor is no device.

        Commands of other types, as FIOCLEX, are the kernel's, but for those that the kernel answers
        for regular files and passes to a device.
        """
        regs = thread.regs
        if regs.rsi & _TYPE != _SGX_TYPE:
            asks = regs.rsi & 0xFFFF_FFFF in _OF_REGULAR_FILES
            device = (
                self._registry.of_descriptor(thread.tid, regs.rdi & 0xFFFF_FFFF) if asks else None
            )
            return None if device is None else -ENOTTY
        device = self._registry.of_descriptor(thread.tid, regs.rdi & 0xFFFF_FFFF)
        if device is None:
            return None
        unwatched = watch_devices(thread)  # it may have received the descriptor
        if unwatched:
            return unwatched
        file, command = device.file, regs.rsi & 0xFFFF_FFFF
        if not isinstance(file, EnclaveFile):
            return -ENOTTY
        initializes = command == Ioctl.ENCLAVE_INIT
        try:
            with self._around_init() if initializes else nullcontext():
                result = file.ioctl(thread, command, regs.rdx)
        except OSError as error:
            result = -(error.errno or EIO)
            if result == -ENOMEM:
                self._shortages.report(thread, "an ioctl fails", error.strerror or "")
        if command == Ioctl.ENCLAVE_CREATE and result == 0:
            self._forbid(device, file)
            if self._recorder is not None:
                base, size = file.enclave.base, file.enclave.size
                self._recorder.enclave_created(device.memory, base, size, thread.process.pid)
            self._descriptors.guard(thread, regs.rdi & 0xFFFF_FFFF)
        if command == Ioctl.ENCLAVE_ADD_PAGES and self._recorder is not None:
            self._record_added(thread, device, file, self._recorder)
        removes = command == Ioctl.ENCLAVE_REMOVE_PAGES and file.enclave.created
        if removes and self._recorder is not None:  # also where it has failed behind some pages
            self._recorder.pages_removed(device.memory, file.enclave.pages)
        if initializes and result == 0:
            _guard(thread, file)
        if command in (Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, Ioctl.ENCLAVE_MODIFY_TYPES):
            self._refresh(thread, file, regs.rdx)
        return result

    def _record_added(
        self, thread: ProgramThread, device: Device, file: EnclaveFile, recorder: recording.Recorder
    ) -> None:
        """Record the pages that ADD_PAGES has added, also where it has failed behind them."""
        try:
            request = AddPages.unpack(thread.memory.read(thread.regs.rdx, AddPages.SIZE))
        except BadAddress:
            return
        if request.count:
            recorder.pages_added(device.memory, file.enclave.base + request.offset, request.count)

    def _forbid(self, device: Device, file: EnclaveFile) -> None:
        """Name the instructions that code of a new enclave may not execute as this machine does."""
        xfrm = file.enclave.xfrm
        forbidden = ForbiddenCode(
            cpuid=not self._cpuid_faults,
            time=not self._config.features & SgxFeature.SGX2,
            state=xfrm != self._xcr0 or bool(xfrm & self._areas.moved),
        )
        device.memory.forbidden = forbidden or None

    def _refresh(self, thread: ProgramThread, file: EnclaveFile, argument: int) -> None:
        """EPCM entries of a range have changed: bring the address spaces up to date."""
        size = RestrictPermissions.SIZE
        try:
            request = RestrictPermissions.unpack(thread.memory.read(argument, size))
        except BadAddress:
            return  # the driver could not read it either, and did nothing
        start = file.enclave.base + request.offset
        device = self._registry.of_file(file)
        for page_table in device.memory.users:
            page_table.refresh_range(start, start + request.length)
            page_table.pager.flush()


def _guard(thread: ProgramThread, file: EnclaveFile) -> None:
    """Let system calls of the enclave's code stop, so that they can be #UD."""
    enclave, guarded = file.enclave, thread.process.guarded
    place = enclave.base, enclave.size
    if place in guarded or len(guarded) >= _MOST_GUARDED:
        return
    guarded.add(place)
    add_filter(thread, build_guard(*place))
