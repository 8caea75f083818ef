"""A host with guests for tests: each guest has its own core, driver and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.driver import System

from softsgx.cgroup import Hierarchy
from softsgx.defects import Defect
from softsgx.driver import Driver, Enclave
from softsgx.hw import EpcPage
from softsgx.kvm import Guest, VepcDevice, VepcPage
from softsgx.paging import EpcCore, Fifo, Group, MemoryBacking, Policy
from softsgx.runtime import InlineRuntime, Runtime
from softsgx.trace import Event, Tracer
from softsgx.userland import SoftProcess


@dataclass
class GuestSystem:
    """A guest with an operating system in it; to an actor of ``programs.py``, a system."""

    host: GuestHost
    guest: Guest
    policy: Policy | None = None
    listen: bool = False
    tracer: Tracer | None = None
    ksgxd: bool = False
    defects: frozenset[Defect] = frozenset()
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = self.host.runtime
        tracer = self.events.append if self.listen else self.tracer
        self.core = self.boot()
        self.driver = Driver(
            self.core,
            self.runtime,
            backing=lambda _pages: MemoryBacking(),
            tracer=tracer,
        )

    def boot(self, *, dirty: Sequence[int] | None = ()) -> EpcCore:
        """A core for this guest, which knows nothing of any before."""
        core = EpcCore(
            self.guest,
            self.runtime,
            policy=self.policy,
            dirty=dirty,
            tracer=self.events.append if self.listen else self.tracer,
        )
        if self.ksgxd:
            core.start()
        return core

    @property
    def machine(self) -> Guest:
        """What its processes run on."""
        return self.guest

    @property
    def epc_pages(self) -> int:
        """Pages of its virtual EPC."""
        return self.core.epc_pages

    @property
    def free_pages(self) -> int:
        """Pages that its own core has free."""
        return self.core.free_pages

    def process(self, **options: object) -> SoftProcess:
        """A new process in the guest."""
        return SoftProcess(self.guest, self.driver, **options)  # type: ignore[arg-type]

    def page(self, addr: int) -> VepcPage:
        """What the host has of a page, by its address in the guest."""
        page = self.guest.page_at(addr)
        assert page is not None, f"nobody touched {addr:#x}"
        return page

    def secs(self, enclave: Enclave) -> VepcPage:
        """The page of an enclave's SECS."""
        assert enclave.swap.secs is not None
        return self.page(enclave.swap.secs.addr)

    def data(self, enclave: Enclave, index: int) -> VepcPage:
        """The page of an enclave's page, by its index."""
        epc = enclave.pages[index].epc
        assert epc is not None, f"the guest has evicted page {index}"
        return self.page(epc.addr)

    def check_invariants(self) -> None:
        """Check every count in it."""
        self.guest.check_invariants()
        self.core.check_invariants()
        self.driver.check_invariants()


@dataclass
class GuestHost:
    """One machine: native enclaves and guests in one EPC, with groups."""

    epc_pages: int = 64
    runtime: Runtime = field(default_factory=InlineRuntime)
    processors: int = 2
    ksgxd: bool = False
    kill: bool = False
    defects: frozenset[Defect] = frozenset()
    backing: Any = lambda _pages: MemoryBacking()
    policy: Policy | None = None
    tracer: Tracer | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.tree = Hierarchy(
            self.epc_pages, self.runtime, victims=lambda: list(self.victims), kill=self.kill
        )
        self.victims: list[Any] = []
        self.system = System(
            epc_pages=self.epc_pages,
            runtime=self.runtime,
            processors=self.processors,
            ksgxd=self.ksgxd,
            root=self.tree.root,
            policy=self.policy,
            tracer=self.tracer,
            config=self.config,
        )
        self.device = VepcDevice(
            self.core, backing=lambda pages: self.backing(pages), defects=self.defects
        )
        self.guests: list[GuestSystem] = []

    @property
    def core(self) -> EpcCore:
        """The host's."""
        return self.system.core

    def guest(
        self,
        epc_pages: int | Sequence[int] = 24,
        *,
        name: str = "",
        group: Group | None = None,
        policy: Policy | None = None,
        listen: bool = False,
        ksgxd: bool = False,
        **options: Any,
    ) -> GuestSystem:
        """A new guest with an operating system in it."""
        events: list[Event] = []
        guest = Guest(
            self.system.machine,
            self.device,
            name or f"guest{len(self.guests)}",
            epc_pages=epc_pages,
            group=group,
            tracer=self.tracer or self.events.append,
            leaf_tracer=events.append if listen else self.tracer,
            **{"processors": 2} | options,
        )
        made = GuestSystem(
            self,
            guest,
            policy=policy,
            listen=listen,
            tracer=self.tracer,
            ksgxd=ksgxd,
            events=events,
        )
        self.guests.append(made)
        return made

    def epcm(self, page: VepcPage) -> EpcPage:
        """The EPCM entry of a resident page of a guest."""
        assert page.epc is not None, f"{page!r} is evicted"
        return self.system.epcm(page.epc.addr)

    def evict(self, *pages: VepcPage) -> None:
        """Reclaim these pages of guests and no others, as one batch would."""
        for page in pages:
            assert page.epc is not None, f"{page!r} is evicted already"
            assert page.get() and page.prepare(), f"{page!r} cannot be prepared"
        for page in pages:
            assert page.block(), f"{page!r} cannot be blocked"
        for page in pages:
            epc = page.epc
            assert epc is not None
            assert self.core.unmark_reclaimable(epc)
            assert page.write(), f"{page!r} cannot be written"
            self.core.free(epc)
            page.put()

    def evict_all(self) -> None:
        """Reclaim until nothing more leaves."""
        for _round in range(1000):
            before = self.core.counters.reclaimed
            self.core.reclaim(force=True)
            if self.core.counters.reclaimed == before:
                break

    def check_invariants(self) -> None:
        """Check every count there is, and VIRTCHILDCNT of every SECS."""
        self.system.check_invariants()
        self.tree.check_invariants()
        for guest in self.guests:
            guest.check_invariants()
        pages = [
            page
            for made in self.guests
            for vepc in made.guest.vepcs
            for page in vepc.pages.values()
        ]
        for page in [*pages, *self.device.zombies]:
            if page.epc is not None and page.evicted_children:
                virtual = self.epcm(page).owner.virt_children
                assert virtual == page.evicted_children + page.deferred_edecvirtchild, (
                    f"{page!r}: VIRTCHILDCNT {virtual}, {page.evicted_children} evicted"
                )
        held = self.core.counters.held.get("vepc", 0)
        zombies = sum(page.epc is not None for page in self.device.zombies)
        resident = sum(made.guest.resident for made in self.guests)
        assert held >= resident and held <= resident + zombies, f"{held} held, {resident} resident"


FIFO = Fifo()
