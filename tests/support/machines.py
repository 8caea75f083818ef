"""One machine and its reference in step: the state machine of ``tests/model/test_hw_machine.py``.

Each rule runs leaves or accesses, sees them end as ``tests.support.dictionary`` says, and compares
everything afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.support.dictionary import Blob, Child, Dictionary, Enc, Thread
from tests.support.hw import PageSpec, build_enclave, make_machine, map_enclave, reg, secs_of, tcs
from tests.support.paging import Pf, pattern
from tests.support.paging import outcome as ends
from tests.support.scenes import state_of

from softsgx.arch import PAGE_BYTES, PageType, RdInfo, SecInfo, Status
from softsgx.hw import DEFAULT_EPC_BASE, Leaves, PageFault, PageInfoArgs
from softsgx.hw.access import load, store
from softsgx.hw.leaves.aex import deliver, interrupt
from softsgx.trace import Tracer

EPC = [DEFAULT_EPC_BASE + i * PAGE_BYTES for i in range(40)]
CPUS, BASE, SIZE = 2, 0x7000_0000_0000, 0x2_0000
SECINFO, TCS_PAGES = 3 * PAGE_BYTES, (4 * PAGE_BYTES, 6 * PAGE_BYTES)
LAYOUT = 8  # pages of a fresh enclave: three of data, SECINFO, two threads of TCS and SSA
NUMBERS = st.integers(0, 1 << 20)
OK = Status.SUCCESS


def pick(choices: list[Any], number: int) -> Any:
    """Return one of ``choices``, which Hypothesis shrinks towards the first."""
    return choices[number % len(choices)]


# What a step needs to make sense.
NEEDS: dict[str, Callable[[Any], bool]] = {
    "build": lambda self: self.room() > LAYOUT + 2 and len(self.enclaves()) < 3,
    "make_va": lambda self: self.room() > 2 and len(self.model.slots) < 4,
    "block_what_somebody_uses": lambda self: bool(self.insiders()),
    "ewb": lambda self: bool(self.model.slots),
    "load_what_can_be_loaded": lambda self: bool(self.room() and self.model.blobs),
    "load_anything_anywhere": lambda self: bool(self.model.blobs and self.model.slots),
    "evict_carefully": lambda self: bool(self.model.slots and self.enclaves()),
    "enter": lambda self: bool(self.model.enclaves),
    "leave": lambda self: bool(self.insiders()),
    "touch": lambda self: bool(self.insiders()),
    "eaug": lambda self: bool(self.room() > 1 and self.enclaves()),
    "accept": lambda self: bool(self.insiders()),
    "extend": lambda self: bool(self.insiders()),
    "start_again": lambda self: not self.model.slots and self.room() > 3,
}


class Machines(RuleBasedStateMachine):
    """The machine under test and its reference, step by step."""

    @initialize(fast=st.booleans())
    def start(self, fast: bool, tracer: Tracer | None = None) -> None:
        self.hw = make_machine(epc_pages=len(EPC), processors=CPUS, tracer=tracer)
        self.leaves: Any = self.hw.leaves if fast else Leaves(self.hw.kernel)
        self.model = Dictionary()
        self.tables: dict[int, Any] = {}
        self.tokens = self.built = 0
        self.build()
        self.make_va(0)

    # --- helpers -----------------------------------------------------------------------------

    def expect(self, expected: object, run: Callable[[], object]) -> bool:
        """Run; see it end as expected, and nothing change if it refused.  ``None``: whatever."""
        before = state_of(self.hw)
        got = ends(run)
        if expected is not None or got not in (Status.SUCCESS, None):
            assert expected is None or got == expected, f"{got!r}, expected {expected!r}"
        if got in (Status.SUCCESS, Status.VA_SLOT_OCCUPIED, None):
            return True
        assert state_of(self.hw) == before, f"{got!r} has changed something"
        return False

    def used(self, number: int) -> int:
        """Return an EPC page, most often one that is in use."""
        choices = sorted(self.model.place) or EPC
        return int(pick(EPC if number % 11 == 7 else choices, number // 11))

    def free(self) -> int:
        return next(addr for addr in EPC if addr not in self.model.place)

    def slot(self, number: int) -> int:
        """Return a VA slot, now and then an occupied one."""
        va = pick(sorted(self.model.slots), number)
        filled = sorted(self.model.slots[va])
        if filled and number % 13 == 5:
            return int(va + 8 * pick(filled, number // 13))
        return int(va + 8 * next(i for i in range(512) if i not in filled))

    def child(self, addr: int) -> Child:
        what = self.model.place[addr]
        assert isinstance(what, Child), f"{addr:#x} holds {what!r}"
        return what

    def linaddr(self, child: Child) -> int:
        return self.model.enclaves[child.eid].base + child.offset

    def room(self) -> int:
        return len(EPC) - len(self.model.place)

    def enclaves(self) -> list[Enc]:
        return [enc for enc in self.model.enclaves.values() if enc.secs is not None]

    def insiders(self) -> list[tuple[int, Enc]]:
        return [(cpu, enc) for enc in self.enclaves() for cpu in sorted(enc.inside)]

    # --- building ----------------------------------------------------------------------------

    @precondition(NEEDS["build"])
    @rule()
    def build(self) -> None:
        contents = []
        for _ in range(3):
            self.tokens += 1
            contents.append(pattern(self.tokens))
        layout = [PageSpec(data=data, measured=False) for data in contents] + [reg()]
        for at in TCS_PAGES:
            layout += [tcs(ossa=at + PAGE_BYTES), reg()]
        # Each has addresses of its own: a TCS is entered through any page tables that lead to it.
        # Not by the number of enclaves: identifiers begin anew after a loss of power.
        base = BASE + SIZE * self.built
        self.built += 1
        built = build_enclave(self.hw, layout, secs=secs_of(SIZE, base))
        eid = built.enclave.eid
        threads = [Thread(offset) for offset in TCS_PAGES]
        enc = self.model.enclaves[eid] = Enc(eid, base, built.secs, threads)
        self.model.place[built.secs] = ("secs", eid)
        for linaddr, addr in built.pages.items():
            offset = linaddr - base
            data = offset < SECINFO
            content = bytearray(contents[offset // PAGE_BYTES]) if data else None
            pt = PageType.TCS if offset in TCS_PAGES else PageType.REG
            rwx = 0 if offset in TCS_PAGES else 3
            self.model.place[addr] = Child(eid, offset, pt, rwx, content)
            enc.pte[offset] = addr
        self.tables[eid] = map_enclave(built)

    @precondition(NEEDS["make_va"])
    @rule(number=NUMBERS)
    def make_va(self, number: int) -> None:
        addr = self.free()
        assert self.expect(None, partial(self.leaves.epa, 3, addr))
        self.model.place[addr], self.model.slots[addr] = "va", {}

    # --- blocking, tracking, removing, looking -----------------------------------------------

    @rule(number=NUMBERS)
    def eblock(self, number: int) -> None:
        self.eblock_at(self.used(number))

    def eblock_at(self, addr: int) -> None:
        if self.expect(self.model.expect_eblock(addr), partial(self.leaves.eblock, addr)):
            self.model.do_mark(addr, block=True)

    @precondition(NEEDS["block_what_somebody_uses"])
    @rule(number=NUMBERS)
    def block_what_somebody_uses(self, number: int) -> None:
        cpu, enc = pick(self.insiders(), number)
        cached = sorted(self.model.tlb[cpu])
        if cached:
            self.eblock_at(enc.pte[pick(cached, number)])

    @rule(number=NUMBERS, by_child=st.booleans())
    def etrack(self, number: int, by_child: bool) -> None:
        self.etrack_at(self.used(number), by_child=by_child)

    def etrack_at(self, addr: int, *, by_child: bool = False) -> None:
        expect = self.model.expect_etrackc if by_child else self.model.expect_etrack
        leaf = self.leaves.etrackc if by_child else self.leaves.etrack
        if self.expect(expect(addr), partial(leaf, addr)):
            what = self.model.place[addr]
            eid = what.eid if isinstance(what, Child) else int(what[1])
            self.model.do_etrack(self.model.enclaves[eid])

    @rule(number=NUMBERS)
    def eremove(self, number: int) -> None:
        addr = self.used(number)
        if self.model.place.get(addr) == "va" and len(self.model.slots) < 2:
            return  # keep a VA page, or nothing more would happen
        if self.expect(self.model.expect_eremove(addr), partial(self.leaves.eremove, addr)):
            self.model.do_eremove(addr)

    @rule(number=NUMBERS)
    def erdinfo(self, number: int) -> None:
        addr, info = self.used(number), RdInfo()
        what = self.model.place.get(addr)
        expected = Status.PG_INVLD if what is None else OK
        self.expect(expected, partial(self.leaves.erdinfo, info, addr))
        if isinstance(what, Child):
            bits = what.rwx | what.pending << 3 | what.modified << 4 | what.pr << 5
            assert info.flags == what.pt << 8 | bits | what.blocked << 63
        elif isinstance(what, tuple):
            assert info.status == bool(self.model.children(what[1]))
        assert self.hw.ram_read(addr, 64) == b"\xff" * 64, "EPC is not ones from outside"

    # --- evicting and loading ----------------------------------------------------------------

    @precondition(NEEDS["ewb"])
    @rule(number=NUMBERS, other=NUMBERS)
    def ewb(self, number: int, other: int) -> None:
        self.ewb_at(self.used(number), self.slot(other))

    def ewb_at(self, addr: int, slot: int) -> None:
        info = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
        what = self.model.place.get(addr)
        done = self.expect(
            self.model.expect_ewb(addr, slot), partial(self.leaves.ewb, info, addr, slot)
        )
        if not done:
            assert info == PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128))
            return
        srcpge, pcmd = bytes(info.srcpge), bytes(info.secinfo)  # type: ignore[arg-type]
        if isinstance(what, Child):
            assert info.linaddr == self.linaddr(what)
            content = bytes(what.content or b"")
            for at in range(0, len(content), 64):
                assert content[at : at + 64] not in srcpge + pcmd, "plaintext got out"
        slots = self.hw.pages[slot & -PAGE_BYTES].slots
        assert slots is not None
        version = slots[slot % PAGE_BYTES // 8]
        self.model.do_ewb(addr, slot, version, info.linaddr, srcpge, pcmd)

    @precondition(NEEDS["load_what_can_be_loaded"])
    @rule(number=NUMBERS, name=st.sampled_from(["eldu", "eldb", "elduc", "eldbc"]))
    def load_what_can_be_loaded(self, number: int, name: str) -> None:
        where = {
            version: va + 8 * index
            for va, slots in sorted(self.model.slots.items())
            for index, version in slots.items()
        }
        blobs = [blob for blob in self.model.blobs if blob.version in where]
        if blobs:
            blob: Blob = pick(blobs, number)
            self.eld(blob, name, self.free(), where[blob.version], self.secs_of(blob))

    @precondition(NEEDS["load_anything_anywhere"])
    @rule(numbers=st.tuples(*[NUMBERS] * 4), name=st.sampled_from(["eldu", "eldbc"]))
    def load_anything_anywhere(self, numbers: tuple[int, int, int, int], name: str) -> None:
        blob: Blob = pick(self.model.blobs, numbers[0])
        addr = self.used(numbers[1]) if numbers[1] % 3 == 0 or not self.room() else self.free()
        slot = blob.slot if numbers[2] % 2 else self.slot(5 + 13 * numbers[2])
        secs = self.used(numbers[3]) if numbers[3] % 3 == 0 else self.secs_of(blob)
        self.eld(blob, name, addr, slot, secs)

    def secs_of(self, blob: Blob) -> int:
        if blob.eid is None:
            return 0
        return self.model.enclaves[blob.eid].secs or EPC[-1]

    def eld(self, blob: Blob, name: str, addr: int, slot: int, secs: int) -> None:
        args = PageInfoArgs(blob.linaddr, blob.srcpge, blob.pcmd, secs)
        expected = self.model.expect_eld(blob, addr, slot, secs)
        run = partial(getattr(self.leaves, name), args, addr, slot)
        if expected is None:  # refused in some way
            assert not self.expect(None, run)
        elif self.expect(expected, run):
            self.model.do_eld(blob, addr, slot, block=name in ("eldb", "eldbc"))
            if isinstance(blob.what, Child):
                self.tables[blob.what.eid].map(self.linaddr(blob.what), addr, 7)

    @precondition(NEEDS["evict_carefully"])
    @rule(number=NUMBERS, out=st.booleans())
    def evict_carefully(self, number: int, out: bool) -> None:
        """Block, track, send everybody out, write back: one page, or all and the SECS."""
        enc: Enc = pick(self.enclaves(), number)
        pages = [
            a for a, c in self.model.place.items() if isinstance(c, Child) and c.eid == enc.eid
        ]
        blocked = [addr for addr in pages if self.model.place[addr].blocked]  # type: ignore[union-attr]
        chosen = (
            pages if out and number % 3 == 0 else [pick(blocked or pages, number)] if pages else []
        )
        if enc.cycle & enc.entries():
            self.everybody_out(enc)  # or ETRACK would be refused
        for addr in chosen:
            self.eblock_at(addr)
        assert enc.secs is not None
        self.etrack_at(enc.secs)
        self.everybody_out(enc)
        for addr in chosen:
            self.ewb_at(addr, self.slot(0))
            assert addr not in self.model.place, "a careful eviction did not work"
        if len(chosen) == len(pages):
            self.ewb_at(enc.secs, self.slot(0))

    def everybody_out(self, enc: Enc) -> None:
        for cpu in sorted(enc.inside):
            self.send_interrupt(cpu, enc)

    # --- threads -----------------------------------------------------------------------------

    @precondition(NEEDS["enter"])
    @rule(number=NUMBERS, cpu=st.integers(0, CPUS - 1), thread=st.integers(0, 1))
    def enter(self, number: int, cpu: int, thread: int) -> None:
        alive = self.enclaves() if number % 8 else []
        enc: Enc = pick(alive or list(self.model.enclaves.values()), number // 8)
        processor = self.hw.cpus[cpu]
        if processor.inside is not None:
            return
        which = enc.threads[thread]
        # A thread that was interrupted is most often resumed, any other entered.
        resume = bool(which.cssa) != (number % 7 == 3)
        processor.space, processor.cpl, processor.regs.rip = self.tables[enc.eid], 3, 0x1000
        expected = self.model.expect_enter(enc, which, resume=resume, ssa=which.offset + PAGE_BYTES)
        leaf = processor.enclu.eresume if resume else processor.enclu.eenter
        before = state_of(self.hw)
        got = ends(partial(leaf, enc.base + which.offset, 0x2000))
        assert got == expected, f"{got!r}, expected {expected!r}"
        if got is None:
            self.model.do_enter(cpu, enc, which, resume=resume)
        else:
            assert state_of(self.hw) == before

    @precondition(NEEDS["leave"])
    @rule(number=NUMBERS, aex=st.booleans())
    def leave(self, number: int, aex: bool) -> None:
        cpu, enc = pick(self.insiders(), number)
        if aex:
            self.send_interrupt(cpu, enc)
        else:
            self.hw.cpus[cpu].enclu.eexit(0x3000)
            self.model.do_leave(cpu, enc, aex=False)

    def send_interrupt(self, cpu: int, enc: Enc) -> None:
        assert interrupt(self.hw.cpus[cpu])
        self.model.do_leave(cpu, enc, aex=True)

    @precondition(NEEDS["touch"])
    @rule(number=NUMBERS, page=st.integers(0, 10), at=st.integers(0, 250), write=st.booleans())
    def touch(self, number: int, page: int, at: int, write: bool) -> None:
        cpu, enc = pick(self.insiders(), number)
        cached = sorted(self.model.tlb[cpu])
        again = page == 10 and bool(cached)
        offset = int(pick(cached, number)) if again else page * PAGE_BYTES
        if offset == SECINFO or offset - PAGE_BYTES in TCS_PAGES:
            return  # SSA frames are written by exits too; nobody keeps track of them
        access = 2 if write else 1
        child = self.model.expect_access(cpu, enc, offset, access)
        processor, linear = self.hw.cpus[cpu], enc.base + offset + 16 * at
        self.tokens += 1
        token = (b"%016d" % self.tokens) if write else b""
        data, fault = b"", None
        try:
            if write:
                store(processor, linear, token)
            else:
                data = load(processor, linear, 16)
        except PageFault as caught:
            fault = caught
        assert (fault is None) == (child is not None), f"{fault} on {child}"
        if fault is not None:
            assert deliver(processor, fault)
            self.model.do_leave(cpu, enc, aex=True)
            return
        assert child is not None and child.content is not None
        self.model.do_access(cpu, child, access)
        if write:
            child.content[16 * at : 16 * at + 16] = token
        else:
            assert data == bytes(child.content[16 * at : 16 * at + 16])

    # --- SGX2 --------------------------------------------------------------------------------

    @precondition(NEEDS["eaug"])
    @rule(number=NUMBERS)
    def eaug(self, number: int) -> None:
        enc: Enc = pick(self.enclaves(), number)
        offset = max(enc.pte) + PAGE_BYTES
        if offset >= SIZE:
            return
        addr = self.free()
        args = PageInfoArgs(enc.base + offset, 0, 0, enc.secs or 0)
        assert self.expect(None, partial(self.leaves.eaug, args, addr))
        self.model.place[addr] = Child(
            enc.eid, offset, PageType.REG, 3, bytearray(PAGE_BYTES), pending=True
        )
        enc.pte[offset] = addr
        self.tables[enc.eid].map(enc.base + offset, addr, 7)

    def data_page(self, number: int) -> tuple[int, Child] | None:
        pages = [
            (addr, child)
            for addr, child in sorted(self.model.place.items())
            if isinstance(child, Child) and child.content is not None
        ]
        return pick(pages, number) if pages else None

    @rule(number=NUMBERS, rights=st.sampled_from([0, 1, 3, 5]))
    def emodpr(self, number: int, rights: int) -> None:
        found = self.data_page(number)
        if found is None:
            return
        addr, child = found
        expected: object = OK
        if child.pending or child.modified:
            expected = Status.PAGE_NOT_MODIFIABLE
        elif child.pt is not PageType.REG:
            return
        if self.expect(expected, partial(self.leaves.emodpr, SecInfo(flags=rights), addr)):
            child.pr, child.rwx = True, child.rwx & rights
            self.model.do_mark(addr)

    @rule(number=NUMBERS)
    def trim(self, number: int) -> None:
        found = self.data_page(number)
        if found is None or found[1].pt is not PageType.REG:
            return
        addr, child = found
        refused = child.pending or child.modified
        expected = Status.PAGE_NOT_MODIFIABLE if refused else OK
        if self.expect(expected, partial(self.leaves.emodt, SecInfo.of(PageType.TRIM), addr)):
            child.pt, child.rwx, child.modified, child.pr = PageType.TRIM, 0, True, False
            self.model.do_mark(addr)

    @precondition(NEEDS["accept"])
    @rule(number=NUMBERS, which=NUMBERS)
    def accept(self, number: int, which: int) -> None:
        cpu, enc = pick(self.insiders(), number)
        changed = [c for c in self.model.children(enc.eid) if c.pending or c.modified or c.pr]
        info = self.model.at(enc, SECINFO)
        if not changed or info is None or info.blocked:
            return
        child: Child = pick(changed, which)
        bits = child.rwx | child.pending << 3 | child.modified << 4 | child.pr << 5
        processor = self.hw.cpus[cpu]
        if self.model.expect_access(cpu, enc, SECINFO, 2) is None:
            return
        store(processor, enc.base + SECINFO, SecInfo(flags=child.pt << 8 | bits).pack())
        self.model.do_access(cpu, info, 2)
        run = partial(processor.enclu.eaccept, enc.base + SECINFO, enc.base + child.offset)
        tracked = True if not (child.modified or child.pr) else self.model.tracked(child)
        before = state_of(self.hw)
        got = ends(run)
        if child.blocked:
            assert got == Pf(enc.base + child.offset, user=True)
        elif tracked is not None:
            assert got == (OK if tracked else Status.NOT_TRACKED)
        if got == OK:
            child.pending = child.modified = child.pr = False
        else:
            assert state_of(self.hw) == before

    @precondition(NEEDS["extend"])
    @rule(number=NUMBERS, which=NUMBERS, rights=st.sampled_from([1, 3, 7]))
    def extend(self, number: int, which: int, rights: int) -> None:
        cpu, enc = pick(self.insiders(), number)
        found = [c for c in self.model.children(enc.eid) if c.content is not None]
        info = self.model.at(enc, SECINFO)
        if not found or info is None or info.blocked:
            return
        child: Child = pick(found, which)
        processor = self.hw.cpus[cpu]
        if self.model.expect_access(cpu, enc, SECINFO, 2) is None:
            return
        store(processor, enc.base + SECINFO, SecInfo.of(PageType.REG, rights).pack())
        self.model.do_access(cpu, info, 2)
        settled = child.pt is PageType.REG and not (
            child.pending or child.modified or child.blocked
        )
        before = state_of(self.hw)
        got = ends(partial(processor.enclu.emodpe, enc.base + SECINFO, enc.base + child.offset))
        assert got == (None if settled else Pf(enc.base + child.offset, user=True))
        if settled:
            child.rwx |= rights
        else:
            assert state_of(self.hw) == before

    # --- power -------------------------------------------------------------------------------

    @rule(number=NUMBERS)
    def lose_power(self, number: int) -> None:
        if number % 9 == 4:
            self.hw.power_transition()
            self.model.do_power()

    @precondition(NEEDS["start_again"])
    @rule()
    def start_again(self) -> None:
        self.make_va(0)

    # --- what holds always -------------------------------------------------------------------

    @invariant()
    def every_epc_page_is_in_one_place_and_as_it_must_be(self) -> None:
        if not hasattr(self, "model"):
            return
        self.hw.check_invariants()
        place = self.model.place
        assert {page.addr for page in self.hw.valid_pages()} == place.keys()
        for page in self.hw.pages.values():
            assert (page.lock, page.modification_lock) == (0, False), f"{page!r} is still held"
            match place.get(page.addr):
                case Child() as child:
                    self.compare(page, child)
                case "va":
                    assert page.pt is PageType.VA and page.slots is not None
                    filled = {i: version for i, version in enumerate(page.slots) if version}
                    assert filled == self.model.slots[page.addr]
                case ("secs", eid):
                    assert page.pt is PageType.SECS and page.owner.eid == eid
                    inside = len(self.model.enclaves[eid].inside)
                    assert page.owner.threads_inside == inside
                case what:
                    assert what is None, f"the reference has {what!r}"
        children = sum(isinstance(what, Child) for what in place.values())
        assert len(self.hw.store) == children  # type: ignore[arg-type]

    def compare(self, page: Any, child: Child) -> None:
        assert page.secs.owner.eid == child.eid
        assert page.linaddr == self.linaddr(child)
        for name in ("pt", "rwx", "blocked", "pending", "modified", "pr"):
            assert getattr(page, name) == getattr(child, name), f"{name} of {page!r}"
        if child.content is not None:
            assert self.hw.store.read(page, 0, PAGE_BYTES) == child.content

    @invariant()
    def every_processor_is_where_the_reference_has_it(self) -> None:
        if hasattr(self, "model"):
            inside = {cpu: enc.eid for cpu, enc in self.insiders()}
            for cpu in self.hw.cpus:
                eid = None if cpu.inside is None else cpu.inside.enclave.eid
                assert inside.get(cpu.index) == eid
