"""A platform: machine, EPC core, groups, driver and guests; only this module knows all of them.

::

    with Platform(epc="16MiB") as platform:
        process = platform.process(group="jobs/a")

No task runs before ``with`` (or :meth:`Platform.start`), and all have ended after it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from softsgx import kvm, userland
from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import EpcCgroup, Hierarchy, Victim
from softsgx.driver import Driver, EnclaveFile, first_node
from softsgx.errors import SoftSgxError
from softsgx.host.config import PlatformConfig, check_pages, configured_size
from softsgx.hw import Machine, PageStore, Ram
from softsgx.hw.optimised import OPTIMISED
from softsgx.paging import Backing, EpcCore, FileBacking, FlatBacking, Group, MemoryBacking
from softsgx.paging.optimised import FAST_CORE
from softsgx.runtime import InlineRuntime, Runtime
from softsgx.trace import Event, Tracer

if TYPE_CHECKING:
    from softsgx.host.guest import GuestPlatform

__all__ = ["Platform"]


class Platform:
    """A machine with its operating-system half.

    Args:
        config: its description; or give the fields as keywords.
        runtime: runs its tasks; an :class:`~softsgx.runtime.InlineRuntime` with the configured
            seed when ``None``.
        store: holds the bytes of resident pages; ``None``: in memory.
        ram: ordinary memory of the machine; ``None``: an empty one.
        make_backing: makes an enclave's backing file instead of the configured kind; its argument
            is the enclave's size in pages.
        tracer: receives every event of every layer.
        optimised: whether the optimised implementations of hot leaves and of paging may run; their
            effects are those of the readable ones.

    Attributes:
        machine: the processor and its EPC.
        core: the paging core.
        cgroups: the tree of groups.
        guests: guests that were not removed, oldest first.
        driver: the loaded driver; ``None``: it is unloaded.

    Raises:
        SoftSgxError: the configuration is invalid.
    """

    def __init__(
        self,
        config: PlatformConfig | None = None,
        *,
        runtime: Runtime | None = None,
        store: PageStore | None = None,
        ram: Ram | None = None,
        make_backing: Callable[[int], Backing] | None = None,
        tracer: Tracer | None = None,
        optimised: bool = True,
        **keywords: Any,
    ) -> None:
        self.config = config.but(**keywords) if config else PlatformConfig.of(**keywords)
        self.runtime: Runtime = InlineRuntime(self.config.seed) if runtime is None else runtime
        self._listeners: list[Tracer] = [] if tracer is None else [tracer]
        self._tracer = self._emit if self._listeners else None
        self._backing = make_backing or self._configured_backing
        self.machine = Machine(
            self.config.machine(),
            self.runtime,
            store=store,
            ram=ram,
            tracer=self._tracer,
            optimised=OPTIMISED if optimised else None,
        )
        self.cgroups = Hierarchy(
            sum(section.pages for section in self.machine.config.sections),
            self.runtime,
            tracer=self._tracer,
            request_reclaim=self._request_reclaim,
            victims=self._victims,
            kill=self.config.kill,
            defects=self.config.defects,
        )
        for path in self.config.groups:
            self.cgroups.make(path).max_pages = self.config.group_max_pages(path)
        plain = optimised and self._tracer is None and not self.config.defects
        core = FAST_CORE if plain and not self.runtime.interleaves else EpcCore
        self.core: EpcCore = core(
            self.machine,
            self.runtime,
            policy=self.config.paging_policy(),
            tracer=self._tracer,
            root=self.cgroups.root,
            dirty=None if self.config.sanitize else (),
            defects=self.config.defects,
        )
        self.driver: Driver | None = None
        self.guests: list[GuestPlatform] = []
        self._started = False

    @cached_property
    def vepc(self) -> kvm.VepcDevice:
        """The device of guests' virtual EPC."""
        return kvm.VepcDevice(self.core, backing=self._backing, defects=self.config.defects)

    # --- start and stop -------------------------------------------------------------------------

    def start(self) -> None:
        """Start ksgxd and load the driver."""
        assert not self._started, "the platform is started twice"
        self.core.start()
        self.core.wait_sanitized()
        self._started = True
        self.load("driver")

    def stop(self) -> None:
        """Stop ksgxd, in guests as well; enclaves that are still open stay as they are."""
        for guest in self.guests:
            guest.stop()
        if self._started:
            self.core.stop()
            self._started = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def load(self, module: str) -> None:
        """Load a module; ``"driver"`` is the only one.

        Raises:
            OSError: EEXIST: it is loaded; ENODEV: the machine lacks a feature that it needs.
        """
        self._require_driver(module)
        if self.driver is not None:
            raise OSError(errno.EEXIST, "the driver is loaded")
        node = self.machine.config.cpu_nodes[0]
        self.driver = Driver(
            self.core,
            self.runtime,
            node_of=first_node if not node else lambda task: node,
            tracer=self._tracer,
            defects=self.config.defects,
            backing=self._backing,
            launch_control=self.config.launch_control,
            tokens=self.config.read_tokens(),
        )

    def unload(self, module: str) -> None:
        """Unload a module; the core keeps running.

        Raises:
            OSError: EBUSY: an enclave is open; ENOENT: it is not loaded.
        """
        self._require_driver(module)
        if self.driver is None:
            raise OSError(errno.ENOENT, "the driver is not loaded")
        self.driver.unload()
        self.driver = None

    @staticmethod
    def _require_driver(module: str) -> None:
        if module != "driver":
            raise SoftSgxError(f"module {module!r}: unknown; give driver, the only module")

    def power_loss(self) -> None:
        """Lose power (suspend or reset): the EPC is lost, evicted pages cannot be loaded again."""
        self.machine.power_transition()
        self.vepc.power_lost()

    # --- processes and guests -------------------------------------------------------------------

    def process(
        self, name: str = "", *, group: str = "/", may_provision: bool = True
    ) -> userland.SoftProcess:
        """Return a new simulated process.

        Args:
            name: in messages and schedules.
            group: path of the group that its EPC is charged to; made if it does not exist.
            may_provision: whether it may open ``/dev/sgx_provision``.
        """
        if self.driver is None:
            raise OSError(errno.ENODEV, "the driver is not loaded")
        charged = self.cgroups.make(group) if group.strip("/") else self.cgroups.root
        return userland.SoftProcess(
            self.machine, self.driver, group=charged, name=name, may_provision=may_provision
        )

    def guest(
        self,
        name: str,
        *,
        epc: int | str | tuple[int | str, ...],
        processors: int = 1,
        ballast: int | str = 0,
        group: str = "/",
        provisioning: bool = False,
        tracer: Tracer | None = None,
    ) -> GuestPlatform:
        """Return a new guest with an operating system in it; its pages are charged to a group.

        Args:
            name: in messages and schedules.
            epc: size of its virtual EPC, which may exceed the machine's; a sequence gives one
                section each.
            processors: number of its processors.
            ballast: resident EPC that the host never evicts.
            group: path of the group that its EPC is charged to; made if it does not exist.
            provisioning: whether its enclaves may have the provisioning key.
            tracer: receives the events in the guest; events of the host go to the platform's.

        Raises:
            SoftSgxError: an argument is invalid.
        """
        from softsgx.host.guest import GuestPlatform, check_ballast

        sizes = epc if isinstance(epc, tuple) else (epc,)
        pages = [configured_size(size, f"guest {name}: epc") // PAGE_BYTES for size in sizes]
        if min(pages) < 1 or processors < 1:
            raise SoftSgxError(
                f"guest {name}: epc = {epc!r}, processors = {processors}: too small; give at least"
                " one page a section, and one processor"
            )
        check_pages(f"guest {name}: epc = {epc!r}", sum(pages), self.machine.config)
        charged = self.cgroups.make(group) if group.strip("/") else self.cgroups.root
        guests = [made.guest for made in self.guests]
        made = GuestPlatform(
            kvm.Guest(
                self.machine,
                self.vepc,
                name,
                epc_pages=pages,
                processors=processors,
                group=charged,
                ballast_pages=check_ballast(name, ballast, charged, guests, self.machine.config),
                provisioning=provisioning,
                tracer=self._tracer,
                leaf_tracer=tracer,
            ),
            policy=self.config.paging_policy(),
            backing=self._backing,
            tracer=tracer,
        )
        self.guests.append(made)
        if self._started:
            made.start()
        return made

    def remove_guest(self, guest: GuestPlatform) -> None:
        """End a guest: close its virtual EPCs and free all its EPC."""
        guest.stop()
        guest.guest.destroy()
        self.guests.remove(guest)

    def check(self) -> None:
        """Check all counts against raw state; call it while no task runs.

        Raises:
            AssertionError: a count is wrong, or a page is not in exactly one place.
        """
        self.machine.check_invariants()
        self.core.check_invariants()
        self.cgroups.check_invariants()
        if self.driver is not None:
            self.driver.check_invariants()
        for guest in self.guests:
            guest.check()

    # --- callbacks of the parts -----------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    def _configured_backing(self, pages: int) -> Backing:
        limit = self.config.backing_limit_pages()
        if self.config.backing == "file":
            return FileBacking(limit, directory=self.config.backing_directory)
        return FlatBacking(limit) if self.core.optimised else MemoryBacking(limit)

    def _request_reclaim(self, group: Group) -> None:
        self.core.request_reclaim(group)

    def _victims(self) -> Iterator[Victim]:
        from softsgx.host.guest import GuestVictim

        if self.driver is not None:
            for file in self.driver.victims():
                yield _EnclaveVictim(file)
        for guest in self.guests:
            yield GuestVictim(guest.guest)


class _EnclaveVictim:
    """An enclave as the cgroup's out-of-memory handling sees it."""

    def __init__(self, file: EnclaveFile) -> None:
        self._file = file
        self.name = repr(file.enclave)

    def pages_in(self, group: EpcCgroup) -> int:
        """Return its resident pages if its creator is charged below ``group``, else 0."""
        payer = self._file.enclave.group
        below = isinstance(payer, EpcCgroup) and group in payer.ancestry()
        return self._file.enclave.resident_pages if below else 0

    def kill(self) -> None:
        """Take its EPC away."""
        self._file.kill()
