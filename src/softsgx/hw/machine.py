"""The machine: EPC sections, the EPCM, the package's secrets, its logical processors.

``softsgx.hw`` alone reads and writes the bytes of EPC pages.  Software uses:

* ``machine.leaves``: ENCLS and ENCLV leaves as typed functions for OS code in this process;
* ``softsgx.hw.dispatch``: the same leaves by registers, over a processor's address space;
* ``machine.cpus``: logical processors, with ENCLU, accesses and asynchronous exits;
* ``machine.config``: what CPUID reports.

Invariants: no version is used twice under one paging key; ``ResidentSecs.children`` is the number
of valid pages whose ``secs`` names it; a page lock is held for the duration of one leaf at most.
:meth:`Machine.check_invariants` compares.

Source:
    SDM vol. 3D, chapters "Introduction to Intel SGX" to "SGX Instruction References".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from softsgx.arch import (
    FEATURE_CONTROL_READY,
    PAGE_BYTES,
    EpcAddr,
    FeatureControl,
    PageType,
    Status,
    page_of,
)
from softsgx.hw.config import EpcSection, MachineConfig
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import Fault
from softsgx.hw.leaves import Leaves
from softsgx.hw.leaves.enclu import EncluLeaves
from softsgx.hw.locks import LatchedLeafLocks, LeafLocks
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secrets import Secrets
from softsgx.hw.space import Ram
from softsgx.hw.xsave import XsaveLayout
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from hashlib import _Hash

    from softsgx.hw.leaves.registry import OptimisedLeaves
    from softsgx.hw.secs import Crossings, ResidentSecs
    from softsgx.hw.store import PageStore

__all__ = ["Machine"]


class Machine:
    """One SGX package.

    Args:
        config: sections, features, processors.
        runtime: where leaves may be interleaved, and the source of randomness.
        store: where the bytes of resident pages live.
        ram: ordinary memory; an empty one when ``None``.
        tracer: receives an event for each leaf; ``None`` for none, at no cost.
        optimised: second implementations of hot leaves (``softsgx.hw.optimised``), which run where
            the runtime does not interleave and there is no tracer; ``None``: the readable ones.

    Attributes:
        pages: EPC pages that were ever used, by physical address; :meth:`page_at` makes more.
        point: ``runtime.point``; every leaf calls it once, while it holds its page locks.
        latch: makes a commit atomic on real threads; never held across a point.
        leaf_locks: makes the scope that takes page locks for one leaf and releases them at its end.
        virtual_cpus: processors of guests, each the state that its VMCS keeps; they are not in
            ``cpus``, but enter enclaves on them.
        kernel: the processor that ``leaves`` run on: CPL 0, direct map, never inside an enclave.
        xsave: where XSAVE components are, by XFRM.
        measurements: SHA-256 of enclaves between ECREATE and EINIT, by EID.
        crossings: how often each enclave was entered and left, by EID.
        launch_key_hash: IA32_SGXLEPUBKEYHASH0–3.
        features: CPUID.12H.0:EAX.
        feature_control: IA32_FEATURE_CONTROL.
        cpusvn: CR_CPUSVN.
        microcode_svn: CPUSVN of the loaded microcode; EUPDATESVN adopts it once it is newer.
        einit_outcome: an error that every EINIT returns instead of its result; ``None``: none.
        entropy_failures: how many EUPDATESVN find too little entropy.
    """

    __slots__ = (
        "_bases",
        "_eids",
        "_sections",
        "config",
        "cpus",
        "cpusvn",
        "crossings",
        "einit_outcome",
        "entropy_failures",
        "feature_control",
        "features",
        "kernel",
        "latch",
        "launch_key_hash",
        "leaf_locks",
        "leaves",
        "measurements",
        "microcode_svn",
        "optimised",
        "pages",
        "point",
        "ram",
        "runtime",
        "secrets",
        "store",
        "tracer",
        "virtual_cpus",
        "xsave",
    )

    def __init__(
        self,
        config: MachineConfig,
        runtime: Runtime,
        *,
        store: PageStore | None = None,
        ram: Ram | None = None,
        tracer: Tracer | None = None,
        optimised: OptimisedLeaves | None = None,
    ) -> None:
        self.config, self.runtime = config, runtime
        if store is None:
            from softsgx.hw.store import DictStore

            store = DictStore()
        self.store = store
        self.latch = runtime.latch()
        self.leaf_locks: Callable[[], LeafLocks] = (
            partial(LatchedLeafLocks, self.latch) if runtime.concurrent else LeafLocks
        )
        self.point = runtime.point
        self.secrets = Secrets(runtime.random, runtime.entropy)
        self.ram = Ram() if ram is None else ram
        self.features = int(config.features)
        self.feature_control = int(FEATURE_CONTROL_READY)
        if config.launch_control:
            self.feature_control |= FeatureControl.SGX_LAUNCH_CONTROL
        self.launch_key_hash = list(config.launch_key_hash)
        self.cpusvn, self.microcode_svn = config.cpusvn, config.microcode_svn
        self.entropy_failures = 0
        self.einit_outcome: Status | Fault | None = None
        self.pages: dict[int, EpcPage] = {}
        self.measurements: dict[int, _Hash] = {}
        self.crossings: dict[int, Crossings] = {}
        self._sections = sorted(config.sections, key=lambda section: section.base)
        self._bases = [section.base for section in self._sections]
        self._eids = count(1)
        self.xsave = XsaveLayout(config)
        self.optimised = None if runtime.interleaves else optimised
        self.tracer = tracer
        self.cpus: list[LogicalProcessor] = []
        for _number in range(config.processors):
            self.add_processor()
        self.virtual_cpus: list[LogicalProcessor] = []
        self.kernel = LogicalProcessor(self, 0, EncluLeaves)
        self.leaves = Leaves(self.kernel, tracer=tracer, optimised=self.optimised)

    def add_processor(self) -> LogicalProcessor:
        """Return one more logical processor, outside of any enclave."""
        cpu = LogicalProcessor(self, len(self.cpus), partial(EncluLeaves, tracer=self.tracer))
        self.cpus.append(cpu)
        return cpu

    def add_virtual_processors(self, cpus: Iterable[LogicalProcessor]) -> None:
        """Add the processors of a guest, which run its code on this machine."""
        self.virtual_cpus.extend(cpus)

    # --- EPC ------------------------------------------------------------------------------------

    def section_of(self, physical: int) -> EpcSection | None:
        """Return the EPC section that holds a physical address."""
        index = bisect_right(self._bases, physical) - 1
        if index < 0:
            return None
        section = self._sections[index]
        return section if physical < section.base + section.size else None

    def page_at(self, physical: int) -> EpcPage | None:
        """Return the EPC page that holds a physical address, ``None`` outside the EPC."""
        # The kernel's object for a page's address is kept, not an equal one.
        addr = EpcAddr(physical if physical % PAGE_BYTES == 0 else page_of(physical))
        page = self.pages.get(addr)
        if page is None and self.section_of(addr) is not None:
            # setdefault: two threads that ask for one page must get one object.
            page = self.pages.setdefault(addr, EpcPage(addr))
        return page

    def fill_page(self, page: EpcPage, data: bytes) -> None:
        """Store the 4096 bytes of a page; its EPCM entry is complete except for VALID.

        When the store has no room, the page is free again and the error of the store propagates.
        """
        try:
            self.store.fill(page, data)
        except Exception:
            page.clear()
            raise

    def ram_read(self, physical: int, size: int) -> bytes:
        """Read physical memory as software does: EPC reads as ones."""
        if self.section_of(physical) is not None:
            return b"\xff" * size
        return self.ram.read(physical, size)

    def ram_write(self, physical: int, data: bytes) -> None:
        """Write physical memory as software does: EPC ignores the write."""
        if self.section_of(physical) is None:
            self.ram.write(physical, data)

    def ram_discard(self, physical: int) -> None:
        """Free the memory of one ordinary page, which then reads as zero."""
        self.ram.discard(physical)

    def count_child(self, enclave: ResidentSecs, change: int) -> None:
        """Add ``change`` to the CHLDCNT of an enclave."""
        with self.latch:
            enclave.children += change
            assert enclave.children >= 0, f"enclave {enclave.eid} has {enclave.children} children"

    def next_eid(self) -> int:
        """Return an enclave identifier that was never used in this power cycle."""
        return next(self._eids)

    # --- power ----------------------------------------------------------------------------------

    def power_transition(self) -> None:
        """S3, S4, S5 or reset: EPC, EPCM and paging key are lost; seal keys stay.

        Every processor is outside afterwards.  Evicted pages and VA trees can never be loaded
        again, since no version of the new key ever sealed them.

        Source:
            SDM vol. 3D, "Intel SGX Interactions with S-States".
        """
        for page in self.pages.values():
            assert page.lock == 0, f"{page!r} is locked by a leaf while power goes"
            page.clear()
        self.store.clear()
        self.measurements.clear()
        self.crossings.clear()
        self.secrets.power_up()
        self.launch_key_hash[:] = self.config.launch_key_hash
        self._eids = count(1)
        for cpu in (*self.cpus, *self.virtual_cpus):
            cpu.inside = None
            cpu.flush_tlb()
        if self.tracer is not None:
            from softsgx.hw.events import PowerLost

            self.tracer(PowerLost())

    # --- slow recounts, for checkers ------------------------------------------------------------

    def valid_pages(self) -> Iterator[EpcPage]:
        """Yield every page with VALID=1."""
        return (page for page in list(self.pages.values()) if page.valid)

    def enclaves(self) -> Iterator[tuple[EpcPage, ResidentSecs]]:
        """Yield each resident SECS page with its enclave."""
        for page in self.valid_pages():
            if page.pt is PageType.SECS:
                assert page.enclave is not None, f"{page!r} holds no enclave"
                yield page, page.enclave

    def check_invariants(self) -> None:
        """Compare every count with a recount from raw state; call while no leaf runs."""
        children: dict[int, int] = {}
        for page in self.valid_pages():
            assert page.lock == 0 and not page.modification_lock, f"{page!r} is still locked"
            if page.secs is not None:
                assert page.secs.valid, f"{page!r} outlived its SECS"
                children[page.secs.addr] = children.get(page.secs.addr, 0) + 1
        for secs, enclave in self.enclaves():
            counted = children.pop(secs.addr, 0)
            assert enclave.children == counted, f"CHLDCNT {enclave.children}, counted {counted}"
            everyone = (*self.cpus, *self.virtual_cpus)
            inside = [cpu for cpu in everyone if cpu.inside and cpu.inside.secs is secs]
            current = sum(c.inside.entry_epoch == enclave.epoch for c in inside if c.inside)
            assert enclave.cur_count == current, "CUR_CNT differs from the processors inside"
            assert enclave.prev_count == len(inside) - current, "PREV_CNT differs"
            locked = enclave.measurement_lock or enclave.tracking_lock
            assert not locked, "an enclave lock outlived its leaf"
        assert not children, f"children of no SECS: {children}"
