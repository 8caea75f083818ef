"""Accesses replayed through the real EPC core: the readable replay.

:class:`~softsgx.paging.EpcCore` allocates, charges, ages, reclaims and loads; the cgroup hierarchy
limits.  The machine under it executes no leaf: which pages are resident does not depend on a leaf's
effect on content and EPCM, so each leaf returns SGX_SUCCESS.  An access sets the accessed bit of
its page, except for the first access to a page, which makes the page: ADD_PAGES writes it without
page tables.

ksgxd has its own processor: after each access that has faulted, it runs until it sleeps.

Deviation: a trace has no instructions, so the thread of an access has no claim
(:mod:`softsgx.paging.claims`); in an EPC of a few dozen pages a run may fault less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from softsgx.arch import PAGE_BYTES, Status
from softsgx.cgroup import EpcCgroup, Hierarchy
from softsgx.hw import Leaves, MachineConfig
from softsgx.paging import (
    BackingPage,
    EnclaveSwap,
    EpcBusy,
    EpcCore,
    Group,
    LeastRecentlyUsed,
    NoEpc,
    Reservation,
    SgxEpcPage,
    SwapEntry,
)
from softsgx.plan.scene import (
    ENDS,
    GOES,
    MOST_PAGES,
    MOST_WAITS,
    Counts,
    Epc,
    Scene,
    SceneEnclave,
    paths_of,
)
from softsgx.runtime import InlineRuntime

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CoreReplay"]

_BASE = 0x7000_0000_0000


class _EffectlessLeaves(Leaves):
    """Leaves that succeed and do nothing."""

    def __init__(self) -> None:
        def succeed(*_operands: object) -> Status:
            return Status.SUCCESS

        self.eblock = self.eremove = self.etrack = succeed
        self.ewb = self.eldu = succeed
        self.epa = lambda *_operands: None


class _Hardware:
    """A machine without content."""

    def __init__(self, config: MachineConfig) -> None:
        self.config, self.leaves = config, _EffectlessLeaves()


_NO_CONTENT = bytearray(PAGE_BYTES)


class _EmptyPage:
    """A backing page without content of its own: no leaf writes to it."""

    __slots__ = ("data", "index")

    def __init__(self, index: int) -> None:
        self.index, self.data = index, _NO_CONTENT

    def part(self, start: int, size: int) -> memoryview:
        """As :meth:`BackingPage.part`."""
        return memoryview(self.data)[start : start + size]

    def mark_dirty(self) -> None:
        """As :meth:`BackingPage.mark_dirty`."""

    def unpin(self) -> None:
        """As :meth:`BackingPage.unpin`."""


class _EmptyBacking:
    """A backing file without content."""

    def pin(self, index: int, *, create: bool) -> BackingPage:
        """As :meth:`BackingFile.pin`."""
        return _EmptyPage(index)

    def truncate(self, index: int) -> None:
        """As :meth:`BackingFile.truncate`."""

    def pages(self) -> int:
        """As :meth:`BackingFile.pages`."""
        return 0

    def close(self) -> None:
        """As :meth:`BackingFile.close`."""


class _Pin:
    """A reference to an enclave that exists until the replay ends."""

    def get(self) -> bool:
        """As :meth:`Pin.get`."""
        return True

    def put(self) -> None:
        """As :meth:`Pin.put`."""


class _Page:
    """A page of an enclave, a :class:`~softsgx.paging.Reclaimable`.

    Attributes:
        accessed: the accessed bit in its page-table entry.
        epc: its EPC page; ``None`` while it is evicted, or before it is made.
        entry: its place in backing storage while it is evicted.
    """

    __slots__ = ("_enclave", "_reservation", "accessed", "entry", "epc", "index")

    def __init__(self, enclave: _Enclave, index: int) -> None:
        self._enclave, self.index = enclave, index
        self.accessed = False
        self.epc: SgxEpcPage | None = None
        self.entry: SwapEntry | None = None
        self._reservation: Reservation | None = None

    def get(self) -> bool:
        """Enclaves live as long as the replay."""
        return True

    def put(self) -> None:
        """Enclaves live as long as the replay."""

    def age(self) -> bool:
        """Test and clear the accessed bit."""
        young, self.accessed = self.accessed, False
        return not young

    def prepare(self) -> bool:
        """Reserve a VA slot."""
        self._reservation = self._enclave.swap.prepare(self.index)
        return self._reservation is not None

    def block(self) -> bool:
        """Remove the PTE, with its accessed bit."""
        self.accessed = False
        assert self.epc is not None, "a page in a batch is not resident"
        return self._enclave.swap.block(self.epc)

    def write(self) -> bool:
        """EWB."""
        epc, reservation = self.epc, self._reservation
        assert epc is not None and reservation is not None, "a page in a batch is not prepared"
        self.entry, self._reservation = self._enclave.swap.write(epc, reservation), None
        assert self.entry is not None, "EWB without effect has failed"
        self.epc = None
        return True


class _Enclave:
    """One enclave: the driver's work for it, without address spaces.

    Each method that allocates may raise :class:`EpcBusy`.  The caller waits and calls it again; the
    method continues with what it had done.
    """

    def __init__(self, core: EpcCore, enclave: SceneEnclave, group: Group) -> None:
        self._core, self._group = core, group
        self._size = 1 << max(enclave.pages - 1, 1).bit_length()
        self._lock = core.runtime.lock("enclave")
        self.swap = self._new_swap()
        self._promised = 0
        self._made = 0
        self.loads = 0
        self.pages = [_Page(self, index) for index in range(enclave.pages)]
        self._by_index = dict(enumerate(self.pages))

    def _new_swap(self) -> EnclaveSwap:
        return EnclaveSwap(
            self._core,
            _EmptyBacking(),
            pages=self._size,
            base=_BASE,
            lock=self._lock,
            pin=_Pin(),
            kick=lambda: None,
            group=self._group,
        )

    def remove(self, page: _Page) -> None:
        """Remove a page, if the enclave has it: EREMOVE, or the end of what was evicted.

        Deviation: Linux loads an evicted page before EREMOVE; an enclave that gives a page up has
        used it just before, by EACCEPT.
        """
        if page.epc is not None:
            taken = self._core.unmark_reclaimable(page.epc)
            assert taken, "a page is removed while a batch has it"
            self._core.remove(page.epc)
            page.epc = None
            self.swap.child_removed()
            self.swap.shrink()
        elif page.entry is not None:
            self.swap.drop(page.entry)
            page.entry = None
        else:
            return
        page.accessed = False
        self._made -= 1
        self._promised -= 1

    def end(self) -> None:
        """Free the SECS and the VA pages of an enclave that has no pages any more."""
        self.swap.destroy()
        self.swap = self._new_swap()
        self._promised = 0

    def _promise(self, pages: int) -> None:
        """Allocate VA slots until ``pages`` pages have one, the SECS included."""
        while self._promised < pages:
            self.swap.grow_locked()
            self._promised += 1

    def _create(self) -> None:
        """ECREATE."""
        self._promise(1)
        if not self.swap.secs_may_leave:
            secs = self._core.alloc(None, reclaim=False, group=self._group, kind="secs")
            self.swap.set_secs(secs)
            self.swap.secs_may_leave = True

    def make(self, page: _Page) -> None:
        """Make a page, which becomes the youngest: EADD or EAUG."""
        self._create()
        self.swap.load_secs()
        # Deviation: for EAUG, Linux allocates the page before the VA page.  In this order a call
        # that is repeated allocates nothing twice.
        self._promise(self._made + 2)
        page.epc = self._core.alloc(page, reclaim=False, group=self._group)
        self._made += 1
        self.swap.child_added()
        self._core.mark_reclaimable(page.epc)

    def load(self, page: _Page) -> None:
        """Load a page, and those that the policy wants ahead while EPC pages are free."""
        self._reload(page)
        policy = self._core.policy
        for index in policy.neighbours(page.index, len(self.pages)):
            other = self._by_index.get(index)
            if other is None or other.entry is None:
                continue
            try:
                self._reload(other)
            except (EpcBusy, NoEpc):
                break

    def _reload(self, page: _Page) -> None:
        entry = page.entry
        assert entry is not None, "a page that is loaded is not evicted"
        page.epc = self.swap.load(entry, page, group=self._group)
        page.entry = None
        self.loads += 1
        self._core.mark_reclaimable(page.epc)


class CoreReplay:
    """A replay; each call of :meth:`run` continues it.

    Args:
        scene: the enclaves; its accesses are not used.
        epc: the host.

    Attributes:
        any_thread: ``False``: the tasks of its runtime belong to the thread that made it.
    """

    any_thread = False

    def __init__(self, scene: Scene, epc: Epc) -> None:
        self._runtime = InlineRuntime()
        config = MachineConfig.with_epc(epc.pages * PAGE_BYTES)
        self._tree = Hierarchy(epc.pages, self._runtime, request_reclaim=self._request)
        self._paths = paths_of(scene, epc)
        self._groups = [self._group(path) for path in self._paths]
        limits = {"/" + path.strip("/"): pages for path, pages in epc.limits.items()}
        for path, group in zip(self._paths, self._groups, strict=True):
            if path in limits:
                group.max_pages = limits[path]
        self.core = EpcCore(
            _Hardware(config), self._runtime, policy=epc.policy, root=self._tree.root, dirty=()
        )
        self.core.start()
        self._runtime.run_pending()
        self._enclaves = [
            _Enclave(self.core, enclave, self._group(enclave.group)) for enclave in scene.enclaves
        ]
        self._pages = [page for enclave in self._enclaves for page in enclave.pages]
        self._owners = [enclave for enclave in self._enclaves for _page in enclave.pages]
        # Exact LRU uses every access; other policies use accessed bits.
        self._exact = isinstance(epc.policy, LeastRecentlyUsed)
        self._accesses = self._made = 0
        self.possible = True

    def _group(self, path: str) -> EpcCgroup:
        return self._tree.make(path) if path.strip("/") else self._tree.root

    def _request(self, group: Group) -> None:
        self.core.request_reclaim(group)

    def run(self, pages: Iterable[int]) -> None:
        """Make accesses, each a dense page number."""
        mark = self.core.mark_accessed if self._exact else None
        every, owners = self._pages, self._owners
        for number in pages:
            if not self.possible:
                return
            if number >= GOES:
                self._go(number & MOST_PAGES - 1, ends=bool(number & ENDS))
                continue
            page = every[number]
            if page.epc is not None:
                page.accessed = True
            elif page.entry is not None:
                if not self._until_done(owners[number].load, page, accessed=True):
                    return
            elif self._until_done(owners[number].make, page, accessed=False):
                self._made += 1
            else:
                return
            self._accesses += 1
            if mark is not None and page.epc is not None:
                mark(page.epc)

    def _go(self, number: int, *, ends: bool) -> None:
        """A page leaves its enclave, and perhaps the enclave ends."""
        owner = self._owners[number]
        owner.remove(self._pages[number])
        if ends:
            owner.end()

    def _until_done(self, step: Callable[[_Page], None], page: _Page, *, accessed: bool) -> bool:
        """Call ``step`` until it needs to wait no more; then let ksgxd run until it sleeps.

        Args:
            step: makes or loads ``page``.
            page: the page.
            accessed: whether an instruction has faulted, and accesses it at once.

        Returns:
            ``False``: no page can be allocated at all.
        """
        for _try in range(MOST_WAITS):
            try:
                step(page)
            except EpcBusy as busy:
                self.core.wait_for_page(busy)
            except NoEpc:
                break
            else:
                page.accessed = accessed
                self._runtime.run_pending()
                return True
        self.possible = False
        return False

    def counts(self) -> Counts:
        """Return the counts so far."""
        counters = self.core.counters
        return Counts(
            self.possible,
            self._accesses,
            self._made,
            sum(enclave.loads for enclave in self._enclaves),
            counters.ewb_first + counters.va_out,
            counters.secs_in,
            tuple(enclave.loads for enclave in self._enclaves),
            tuple(group.peak_pages for group in self._groups),
        )

    def resident(self) -> np.ndarray[Any, Any]:
        """Return whether each page is in the EPC now."""
        import numpy as np

        return np.fromiter((page.epc is not None for page in self._pages), bool)

    def order(self) -> list[list[int]]:
        """Return the pages on each group's LRU list, oldest first; a SECS is -1 - its enclave."""
        numbers: dict[object, int] = {page: at for at, page in enumerate(self._pages)}
        for at, enclave in enumerate(self._enclaves):
            numbers[enclave.swap._secs_page] = -1 - at
        return [
            [numbers[page.owner] for page in group.lru if page.owner in numbers]
            for group in self._groups
        ]

    def close(self) -> None:
        """End ksgxd."""
        self.core.stop()
        self._runtime.close()
