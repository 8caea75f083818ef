"""The driver: its two devices, and every enclave that was opened through them.

It can be unloaded and loaded again; meanwhile the core still serves guests.

Source:
    sgx_drv_init(), sgx_open(), arch/x86/kernel/cpu/sgx/driver.c; sgx_set_attribute(), main.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EBUSY, ENODEV
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING

from softsgx import compiled
from softsgx.arch import SgxFeature
from softsgx.defects import Defect
from softsgx.driver import fault, optimised
from softsgx.driver.enclave import UNPRIVILEGED, Enclave
from softsgx.driver.file import EnclaveFile, ProvisionFile
from softsgx.driver.mm import Mm
from softsgx.driver.page import EnclavePage
from softsgx.driver.task import first_node, own_group
from softsgx.driver.uapi import refuse
from softsgx.paging import Backing, EnclaveSwap, EpcCore, FlatBacking, Group, memory_backing
from softsgx.paging.optimised import CompiledSwap, PlainCore, PlainSwap
from softsgx.runtime import Runtime
from softsgx.trace import Event, Tracer

if TYPE_CHECKING:
    from softsgx.arch import EinitToken
    from softsgx.driver.task import Task

__all__ = ["Driver"]


class Driver:
    """A loaded driver.

    Args:
        core: the EPC core of the machine.
        runtime: locks, waiting.
        group_of: returns the group that is charged for the EPC pages of a task.
        node_of: NUMA node of the processor that a task runs on.
        tracer: receives events; ``None``: events are not made.
        defects: the defects to switch on; those of package ``driver`` have an effect.
        launch_control: whether to write the launch key hash of the signer before each EINIT, as
            Linux does; otherwise EINIT checks the hash that the machine has.
        backing: makes the backing file of an enclave from its size in pages; ``BackingError`` is
            ENOMEM.
        unprivileged: attributes that need no permission.
        tokens: EINITTOKEN for EINIT by MRENCLAVE.  Linux's driver passes an empty one; Intel's
            earlier driver took it from its caller.

    Attributes:
        page_type: class of the pages of enclaves.
        handle_fault: handles a fault on one.

    Raises:
        OSError: ENODEV: the machine has no SGX, or a launch key hash that cannot be written.
    """

    __slots__ = (
        "_compiled",
        "_enclaves",
        "_files",
        "_group_of",
        "_latch",
        "_lifecycle_listeners",
        "_loaded",
        "_node_of",
        "_numbers",
        "_openings",
        "_optimised",
        "_pids",
        "backing",
        "core",
        "defects",
        "handle_fault",
        "launch_control",
        "launch_lock",
        "page_type",
        "runtime",
        "sgx2",
        "tokens",
        "tracer",
        "unprivileged",
    )

    def __init__(
        self,
        core: EpcCore,
        runtime: Runtime,
        *,
        group_of: Callable[[Task], Group] = own_group,
        node_of: Callable[[Task], int] = first_node,
        tracer: Tracer | None = None,
        defects: frozenset[Defect] = frozenset(),
        launch_control: bool = True,
        backing: Callable[[int], Backing] = memory_backing,
        unprivileged: int = UNPRIVILEGED,
        tokens: Mapping[bytes, EinitToken] = MappingProxyType({}),
    ) -> None:
        config = core.hw.config
        if not config.features & SgxFeature.SGX1:
            refuse(ENODEV, "the machine has no SGX")
        if launch_control and not config.launch_control:
            refuse(ENODEV, "the machine's launch key hash cannot be written (no SGX_LC)")
        self.core, self.runtime, self.tracer = core, runtime, tracer
        self.defects = defects
        self.sgx2 = bool(config.features & SgxFeature.SGX2)
        self.launch_control, self.launch_lock = launch_control, runtime.lock("launch key hash")
        self.backing, self.unprivileged, self.tokens = backing, unprivileged, tokens
        self._lifecycle_listeners: list[Tracer] = []
        self._group_of, self._node_of = group_of, node_of
        self._optimised = core.optimised and tracer is None and not defects
        self._compiled = self._optimised and core.compiled
        self.page_type: type[EnclavePage] = EnclavePage
        self.handle_fault = fault.handle
        if self._compiled:
            self.page_type, self.handle_fault = optimised.CompiledPage, optimised.fast_handle
        elif self._optimised:
            self.page_type, self.handle_fault = optimised.PlainPage, optimised.handle
            from softsgx.driver.plain_batch import evict_together  # not with the compiled core

            assert isinstance(core, PlainCore), "an optimised core of another class"
            core.evict_together(evict_together)
        self._openings, self._numbers, self._pids = count(1), count(1), count(1)
        self._latch = runtime.latch()
        self._loaded = True
        self._files: dict[EnclaveFile | ProvisionFile, None] = {}
        self._enclaves: dict[Enclave, None] = {}

    # --- devices --------------------------------------------------------------------------------

    def new_number(self) -> int:
        """Return the number of an enclave that was just created."""
        return next(self._numbers)

    def open(self, task: Task) -> EnclaveFile:
        """Open ``/dev/sgx_enclave``: one new, empty enclave.

        Raises:
            OSError: ENODEV: the driver is not loaded.
        """
        self._require_loaded()
        enclave = Enclave(self, next(self._openings))
        file = EnclaveFile(self, enclave)
        with self._latch:
            self._enclaves[enclave] = None
            self._files[file] = None
        return file

    def open_provision(self, task: Task) -> ProvisionFile:
        """Open ``/dev/sgx_provision``; the caller checks the file's permissions.

        Raises:
            OSError: ENODEV: the driver is not loaded.
        """
        self._require_loaded()
        file = ProvisionFile(self)
        with self._latch:
            self._files[file] = None
        return file

    def is_provision(self, file: object) -> bool:
        """Return whether ``file`` is an open ``/dev/sgx_provision`` of this driver."""
        return isinstance(file, ProvisionFile) and file in self._files

    def _require_loaded(self) -> None:
        if not self._loaded:
            refuse(ENODEV, "the driver is not loaded")

    def forget_file(self, file: EnclaveFile | ProvisionFile) -> None:
        """Forget a file without references."""
        with self._latch:
            del self._files[file]

    def trace_lifecycle(self, event: Event) -> None:
        """Send an event of an enclave's life cycle to the listeners and to the tracer."""
        for listener in self._lifecycle_listeners:
            listener(event)
        if self.tracer is not None:
            self.tracer(event)

    def forget_enclave(self, enclave: Enclave) -> None:
        """Forget an enclave that was destroyed."""
        with self._latch:
            del self._enclaves[enclave]

    # --- the module -----------------------------------------------------------------------------

    def unload(self) -> None:
        """Remove the devices; the core keeps running.

        Raises:
            OSError: EBUSY: a file is open or mapped, or a reclaim batch still has an enclave.
        """
        with self._latch:
            if self._files or self._enclaves:
                refuse(EBUSY, f"{len(self._files)} files, {len(self._enclaves)} enclaves in use")
            self._loaded = False

    def load(self) -> None:
        """Make the devices available again after :meth:`unload`."""
        self._loaded = True

    @property
    def loaded(self) -> bool:
        """Whether the devices can be opened."""
        return self._loaded

    # --- enclaves -------------------------------------------------------------------------------

    def add_lifecycle_listener(self, listener: Tracer) -> None:
        """Send the events of enclaves' life cycles (create, init, kill, release) to ``listener``.

        Other events are not made for it.
        """
        self._lifecycle_listeners.append(listener)

    @property
    def enclaves(self) -> list[Enclave]:
        """Every enclave that is not destroyed, oldest first."""
        return list(self._enclaves)

    def victims(self, group: Group | None = None) -> list[EnclaveFile]:
        """Return the files of the enclaves that can be killed for their memory, largest first.

        Args:
            group: only enclaves that are charged to this group; all when ``None``.
        """
        files = [file for file in list(self._files) if isinstance(file, EnclaveFile)]
        alive = [file for file in files if file.enclave.created and not file.enclave.dead]
        chosen = [file for file in alive if group is None or file.enclave.group is group]
        return sorted(chosen, key=lambda file: file.enclave.resident_pages, reverse=True)

    def group_and_node(self, task: Task | None) -> tuple[Group | None, int]:
        """Return the group that ``task`` is charged to, and the NUMA node it runs on."""
        if task is None:
            return None, 0
        group_of, node_of = self._group_of, self._node_of
        return group_of(task), 0 if node_of is first_node else node_of(task)

    @property
    def mm_type(self) -> type[Mm]:
        """The class of address spaces."""
        return optimised.PlainMm if self._optimised and not self._compiled else Mm

    def swap_type(self, backing: Backing) -> type[EnclaveSwap]:
        """Return the class of the swapping of an enclave with this backing."""
        plain = self._optimised and isinstance(backing, FlatBacking)
        if not plain:
            return EnclaveSwap
        return CompiledSwap if self._compiled else PlainSwap

    def next_pid(self) -> int:
        """Return a number for a simulated process."""
        return next(self._pids)

    def check_invariants(self) -> None:
        """Check every enclave; call it while no task runs."""
        for enclave in self.enclaves:
            enclave.check_invariants()


if compiled.speedups is not None:
    compiled.speedups.bind("Driver", Driver)
