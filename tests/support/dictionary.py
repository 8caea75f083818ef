"""The expected behaviour of the hardware, in dictionaries: the reference of the state machine test.

It follows the manual's text, not the epochs of ``hw``: a page is tracked when each thread that was
inside at the first ETRACK after its block has left since.  Every ``expect_*`` returns how a leaf or
an access must end; every ``do_*`` records that it has succeeded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from tests.support.paging import GP, Pf

from softsgx.arch import PAGE_BYTES, PageType, Status

__all__ = ["NEEDS_ETRACK", "UNKNOWN", "Blob", "Child", "Dictionary", "Enc", "Thread"]

NEEDS_ETRACK, UNKNOWN = "no ETRACK yet", "tracked or not: the manual does not say"
R, W = 1, 2


@dataclass(eq=False)
class Child:
    """A page of an enclave, resident or not; ``content`` is ``None`` where no one looks."""

    eid: int
    offset: int
    pt: PageType
    rwx: int
    content: bytearray | None
    blocked: bool = False
    pending: bool = False
    modified: bool = False
    pr: bool = False
    mark: str | frozenset[int] = UNKNOWN

    def copy(self) -> Child:
        """Return the page as it is now, for a blob."""
        content = None if self.content is None else bytearray(self.content)
        return Child(
            *(self.eid, self.offset, self.pt, self.rwx, content),
            pending=self.pending,
            modified=self.modified,
            pr=self.pr,
        )


@dataclass
class Blob:
    """An evicted page; it stays known after a load, to be replayed."""

    what: Child | int | dict[int, int]  # a child, the EID of a SECS, the slots of a VA page
    version: int
    power: int
    srcpge: bytes
    pcmd: bytes
    linaddr: int
    slot: int

    @property
    def eid(self) -> int | None:
        """The enclave whose SECS it needs; ``None`` when it needs none."""
        return self.what.eid if isinstance(self.what, Child) else None


@dataclass
class Thread:
    """A TCS as the enclave sees it."""

    offset: int
    cssa: int = 0
    active: bool = False


@dataclass
class Enc:
    """An enclave; ``secs`` is ``None`` while its SECS is away."""

    eid: int
    base: int
    secs: int | None
    threads: list[Thread]
    inside: dict[int, tuple[int, Thread]] = field(default_factory=dict)  # cpu: (entry, thread)
    cycle: frozenset[int] = frozenset()  # who was inside at the last ETRACK
    pte: dict[int, int] = field(default_factory=dict)

    def entries(self) -> frozenset[int]:
        """Serial numbers of the entries that have not been left."""
        return frozenset(entry for entry, _ in self.inside.values())


@dataclass
class Cached:
    """A TLB entry: kinds of access that were granted, and the page's rights at the miss."""

    child: Child
    granted: int
    rights: int


class Dictionary:
    """The whole machine.

    Attributes:
        place: what each EPC page that is in use holds: a child, ``("secs", eid)`` or ``"va"``.
        slots: of each VA page, its versions by index; empty ones are absent.
        used: versions of this power cycle.
    """

    def __init__(self) -> None:
        self.place: dict[int, Child | tuple[str, int] | str] = {}
        self.slots: dict[int, dict[int, int]] = {}
        self.enclaves: dict[int, Enc] = {}
        self.tlb: dict[int, dict[int, Cached]] = {}
        self.blobs: list[Blob] = []
        self.used: set[int] = set()
        self.power = 0
        self._entries = count()

    # --- questions ---------------------------------------------------------------------------

    def secs_at(self, addr: int) -> Enc | None:
        """Return the enclave whose SECS is at ``addr``."""
        what = self.place.get(addr)
        return self.enclaves[what[1]] if isinstance(what, tuple) else None

    def children(self, eid: int) -> list[Child]:
        """Return the resident pages of an enclave."""
        pages = self.place.values()
        return [page for page in pages if isinstance(page, Child) and page.eid == eid]

    def at(self, enc: Enc, offset: int) -> Child | None:
        """Return what the process' page tables lead to, if it is this enclave's page there."""
        child = self.place.get(enc.pte.get(offset, -1))
        if isinstance(child, Child) and (child.eid, child.offset) == (enc.eid, offset):
            return child
        return None

    def tracked(self, child: Child) -> bool | None:
        """Return whether all have left that must have; ``None`` if the manual does not say."""
        if isinstance(child.mark, str):
            return None if child.mark == UNKNOWN else False
        return not child.mark & self.enclaves[child.eid].entries()

    # --- leaves of the operating system ------------------------------------------------------

    def expect_eblock(self, addr: int) -> Status:
        """EBLOCK."""
        match self.place.get(addr):
            case None:
                return Status.PG_INVLD
            case Child(blocked=blocked):
                return Status.BLKSTATE if blocked else Status.SUCCESS
            case "va":
                return Status.NOTBLOCKABLE
            case _:
                return Status.PG_IS_SECS

    def do_mark(self, addr: int, *, block: bool = False) -> None:
        """A page was blocked, restricted or retyped now."""
        child = self.place[addr]
        assert isinstance(child, Child)
        child.blocked |= block
        child.mark = NEEDS_ETRACK

    def expect_etrack(self, addr: int) -> object:
        """ETRACK."""
        enc = self.secs_at(addr)
        if enc is None:
            return Pf(addr)
        return Status.PREV_TRK_INCMPL if enc.cycle & enc.entries() else Status.SUCCESS

    def expect_etrackc(self, addr: int) -> object:
        """ETRACKC."""
        match self.place.get(addr):
            case None:
                return Status.PG_INVLD
            case "va":
                return Status.TRACK_NOT_REQUIRED
            case Child(eid=eid):
                secs = self.enclaves[eid].secs
                assert secs is not None
                return self.expect_etrack(secs)
            case _:
                return self.expect_etrack(addr)

    def do_etrack(self, enc: Enc) -> None:
        """A cycle began."""
        enc.cycle = enc.entries()
        for child in self.children(enc.eid):
            if child.mark == NEEDS_ETRACK:
                child.mark = enc.cycle

    def expect_ewb(self, addr: int, slot: int) -> object:
        """EWB; :data:`UNKNOWN` tracking leaves 0 and 11 open, which is ``None``."""
        va = slot & -PAGE_BYTES
        if addr == va:
            return GP
        what = self.place.get(addr)
        if what is None:
            return Pf(addr)
        if self.place.get(va) != "va":
            return Pf(slot)
        if isinstance(what, Child):
            if not what.blocked:
                return Status.PAGE_NOT_BLOCKED
            if not self.tracked(what):
                assert what.mark != UNKNOWN, "a blocked page has a mark"
                return Status.NOT_TRACKED
        elif isinstance(what, tuple) and self.children(what[1]):
            return Status.CHILD_PRESENT
        occupied = slot % PAGE_BYTES // 8 in self.slots[va]
        return Status.VA_SLOT_OCCUPIED if occupied else Status.SUCCESS

    def do_ewb(
        self, addr: int, slot: int, version: int, linaddr: int, srcpge: bytes, pcmd: bytes
    ) -> Blob:
        """A page left; its version is ``version``."""
        assert version and version not in self.used, "a version was used twice"
        self.used.add(version)
        what = self.place.pop(addr)
        kept: Child | int | dict[int, int]
        if isinstance(what, Child):
            kept = what.copy()
        elif isinstance(what, tuple):
            kept = what[1]
            self.enclaves[kept].secs = None
        else:
            kept = self.slots.pop(addr)
        self.slots[slot & -PAGE_BYTES][slot % PAGE_BYTES // 8] = version
        blob = Blob(kept, version, self.power, srcpge, pcmd, linaddr, slot)
        self.blobs.append(blob)
        return blob

    def expect_eld(self, blob: Blob, addr: int, slot: int, secs: int) -> object:
        """ELDU, ELDB, ELDUC, ELDBC of an unmodified blob with any slot and SECS."""
        va = slot & -PAGE_BYTES
        if addr == va:
            return None  # the order of the two locks is not the manual's to say
        if addr in self.place:
            return Pf(addr)
        if self.place.get(va) != "va":
            return Pf(slot)
        if isinstance(blob.what, Child):
            if addr == secs:
                return None
            enc = self.secs_at(secs)
            if enc is None:
                return Pf(secs)
            if enc.eid != blob.eid:
                return Status.MAC_COMPARE_FAIL
        elif secs:
            return GP
        good = self.slots[va].get(slot % PAGE_BYTES // 8) == blob.version
        return Status.SUCCESS if good and blob.power == self.power else Status.MAC_COMPARE_FAIL

    def do_eld(self, blob: Blob, addr: int, slot: int, *, block: bool) -> None:
        """A page came back."""
        del self.slots[slot & -PAGE_BYTES][slot % PAGE_BYTES // 8]
        what = blob.what
        if isinstance(what, Child):
            child = what.copy()
            self.place[addr] = child
            if block:
                child.blocked, child.mark = True, NEEDS_ETRACK
            self.enclaves[child.eid].pte[child.offset] = addr
        elif isinstance(what, int):
            self.place[addr] = ("secs", what)
            enc = self.enclaves[what]
            enc.secs, enc.cycle = addr, frozenset()
        else:
            self.place[addr] = "va"
            self.slots[addr] = dict(what)

    def expect_eremove(self, addr: int) -> Status:
        """EREMOVE."""
        what = self.place.get(addr)
        if isinstance(what, tuple):
            return Status.CHILD_PRESENT if self.children(what[1]) else Status.SUCCESS
        if isinstance(what, Child):
            accepted_trim = what.pt is PageType.TRIM and not what.modified
            if self.enclaves[what.eid].inside and not accepted_trim:
                return Status.ENCLAVE_ACT
        return Status.SUCCESS

    def do_eremove(self, addr: int) -> None:
        """A page went, if there was one."""
        what = self.place.pop(addr, None)
        if isinstance(what, tuple):
            self.enclaves[what[1]].secs = None
        self.slots.pop(addr, None)

    def do_power(self) -> None:
        """Power was lost."""
        self.place.clear()
        self.slots.clear()
        self.tlb.clear()
        self.used.clear()
        self.power += 1
        for enc in self.enclaves.values():
            enc.secs, enc.inside = None, {}

    # --- threads -----------------------------------------------------------------------------

    def expect_enter(self, enc: Enc, thread: Thread, *, resume: bool, ssa: int) -> object:
        """EENTER and ERESUME of an enclave with one SSA frame a thread."""
        tcs = self.at(enc, thread.offset)
        if tcs is None or tcs.blocked or tcs.pending or tcs.modified:
            return Pf(enc.base + thread.offset, user=True)
        if thread.cssa != (1 if resume else 0):
            return GP
        frame = self.at(enc, ssa)
        if frame is None or frame.blocked or frame.pending or frame.modified or frame.rwx & 3 != 3:
            return Pf(enc.base + ssa, user=True)
        return GP if thread.active else None

    def do_enter(self, cpu: int, enc: Enc, thread: Thread, *, resume: bool) -> None:
        """A processor went in."""
        thread.active = True
        thread.cssa -= resume
        enc.inside[cpu] = (next(self._entries), thread)
        self.tlb[cpu] = {}

    def do_leave(self, cpu: int, enc: Enc, *, aex: bool) -> None:
        """A processor went out."""
        _, thread = enc.inside.pop(cpu)
        thread.active = False
        thread.cssa += aex
        self.tlb[cpu] = {}

    def expect_access(self, cpu: int, enc: Enc, offset: int, access: int) -> Child | None:
        """Return the page that a load or store reaches; ``None`` for a fault."""
        cached = self.tlb[cpu].get(offset)
        if cached is not None and cached.granted & access:
            return cached.child
        child = self.at(enc, offset)
        if child is None or child.blocked or child.pending or child.modified:
            return None
        if cached is not None and not cached.rights & access:
            return None  # an entry from before the rights were extended
        return child if child.pt is PageType.REG and child.rwx & access else None

    def do_access(self, cpu: int, child: Child, access: int) -> None:
        """An access was granted."""
        tlb = self.tlb[cpu]
        cached = tlb.setdefault(child.offset, Cached(child, 0, child.rwx))
        cached.granted |= access
