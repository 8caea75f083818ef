"""The driver: two devices, and every enclave that was opened through them.

It can be unloaded while the core goes on serving others, and loaded again.

Source:
    sgx_drv_init(), sgx_open(), arch/x86/kernel/cpu/sgx/driver.c; sgx_set_attribute(), main.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EBUSY, ENODEV
from itertools import count
from types import MappingProxyType

from softsgx.arch import EinitToken, SgxFeature
from softsgx.defects import Defect
from softsgx.driver.enclave import UNPRIVILEGED, Enclave
from softsgx.driver.file import EnclaveFile, ProvisionFile
from softsgx.driver.task import Task
from softsgx.driver.uapi import refuse
from softsgx.paging import BackingFile, EpcCore, Group, memory_backing
from softsgx.runtime import Runtime
from softsgx.trace import Event, Tracer

__all__ = ["Driver"]


def _group_of(task: Task) -> Group:
    return task.group


def _node_of(task: Task) -> int:
    return 0


class Driver:
    """A loaded driver.

    Args:
        core: the EPC core of the machine.
        runtime: locks, waiting.
        group_of: who pays for what a task makes the driver allocate.
        node_of: NUMA node of the processor that a task runs on.
        tracer: receives events; ``None`` costs nothing.
        defects: those to switch on; it has the broken forms of package ``driver``.
        launch_control: whether to write the launch key hash of the signer before each EINIT, as
            Linux does; without, EINIT takes what the hash of the machine allows.
        backing: makes the backing file of an enclave of so many pages; ``BackingError`` is ENOMEM.
        unprivileged: attributes that need no permission.
        tokens: by MRENCLAVE, the EINITTOKEN that INIT gives to EINIT.  Linux's driver gives an
            empty one; Intel's earlier driver took it from its caller.

    Attributes:
        lives: receives only what is told of the lives of enclaves (made, initialized, killed,
            released): few enough to listen always.

    Raises:
        OSError: ENODEV: the machine has no SGX, or a launch key hash that cannot be written.
    """

    def __init__(
        self,
        core: EpcCore,
        runtime: Runtime,
        *,
        group_of: Callable[[Task], Group] = _group_of,
        node_of: Callable[[Task], int] = _node_of,
        tracer: Tracer | None = None,
        defects: frozenset[Defect] = frozenset(),
        launch_control: bool = True,
        backing: Callable[[int], BackingFile] = memory_backing,
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
        self.lives: Tracer | None = None
        self._group_of, self._node_of = group_of, node_of
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
        """Open ``/dev/sgx_provision``; who may is for whoever has the file system to say.

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

    def closed(self, file: EnclaveFile | ProvisionFile) -> None:
        """A file has lost its last reference."""
        with self._latch:
            del self._files[file]

    def announce(self, event: Event) -> None:
        """Tell of an enclave's life."""
        if self.lives is not None:
            self.lives(event)
        if self.tracer is not None:
            self.tracer(event)

    def destroyed(self, enclave: Enclave) -> None:
        """An enclave is gone."""
        with self._latch:
            del self._enclaves[enclave]

    # --- the module -----------------------------------------------------------------------------

    def unload(self) -> None:
        """Remove the devices; the core goes on.

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

    # --- what others ask ------------------------------------------------------------------------

    @property
    def enclaves(self) -> list[Enclave]:
        """Every enclave that is not gone, oldest first."""
        return list(self._enclaves)

    def victims(self, group: Group | None = None) -> list[EnclaveFile]:
        """Return the enclaves that could be killed for their memory, the largest first.

        Args:
            group: only those that were created by this group; all when ``None``.
        """
        files = [file for file in list(self._files) if isinstance(file, EnclaveFile)]
        alive = [file for file in files if file.enclave.created and not file.enclave.dead]
        chosen = [file for file in alive if group is None or file.enclave.group is group]
        return sorted(chosen, key=lambda file: file.enclave.resident_pages, reverse=True)

    def charge(self, task: Task | None) -> tuple[Group | None, int]:
        """Return who pays for what ``task`` needs, and the NUMA node it runs on."""
        if task is None:
            return None, 0
        group_of, node_of = self._group_of, self._node_of
        return group_of(task), node_of(task)

    def next_pid(self) -> int:
        """Return a number for a simulated process."""
        return next(self._pids)

    def check_invariants(self) -> None:
        """Compare every enclave's counts with a recount; call while nothing runs."""
        for enclave in self.enclaves:
            enclave.check_invariants()
