"""Actors that use enclaves at random, and a dictionary with the expected content of their memory.

An actor is a process with a thread on its own processor.  It uses only its own share of the pages
of an enclave.  So each of its pages holds the last value that it stored, with all actions of other
actors, or the step fails in a way that it allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from errno import EAGAIN, EBUSY, ENOMEM

from tests.support.driver import BASE, RW, Launched, System, launch, pattern

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.driver import FaultResult
from softsgx.userland import Signal, SoftProcess

REG, TRIM = PageType.REG << 8, PageType.TRIM << 8
PENDING, MODIFIED, PR = 8, 16, 32
R = 1
HOLES = 6
TRIES = 400
BASES = (BASE, 0x6000_0000_0000, 0x5000_0000_0000)


@dataclass
class Share:
    """One actor's pages of one enclave: the model.

    Attributes:
        made: the enclave.
        scratch: a page for SECINFO, whose content does not matter.
        pages: what each page must hold, by number.
        unsettled: pages whose removal or restriction was given up.  Their types and rights are
            unknown, and an access may raise SIGSEGV, so no other step uses them.
        lost: killed or without power.
    """

    made: Launched
    scratch: int
    pages: dict[int, bytearray] = field(default_factory=dict)
    unsettled: set[int] = field(default_factory=set)
    lost: bool = False

    def give_up(self, page: int) -> None:
        """A step that changes ``page`` was given up, perhaps in the middle."""
        del self.pages[page]
        self.unsettled.add(page)


@dataclass
class Actor:
    """Somebody who uses enclaves.

    Args:
        system: where.
        process: as whom.
        cpu: the processor that is its own.
        tolerant: whether a step may fail for want of memory; it is tried again and then skipped.

    Attributes:
        operations: steps that were done; of a visit, its accesses.
    """

    system: System
    process: SoftProcess
    cpu: int
    tolerant: bool = False
    shares: list[Share] = field(default_factory=list)
    operations: int = 0

    # --- enclaves -------------------------------------------------------------------------------

    def launch(self, pages: int, *, threads: int = 1, actors: int = 1) -> Share | None:
        """Build an enclave whose data pages belong to ``actors``; this one is the first."""
        taken = {share.made.base for share in self.shares}
        base = next((base for base in BASES if base not in taken), None)
        if base is None:
            return None
        size = max(32, 1 << (3 * threads + actors * (pages + HOLES)).bit_length()) * PAGE_BYTES
        try:
            made = launch(self.process, actors * pages, threads=threads, size=size, base=base)
        except OSError as error:
            if not self.tolerant or error.errno != ENOMEM:
                raise
            for fd in [fd for fd in list(self.process._files) if fd not in self._open()]:
                self.process.close(fd)
            return None
        return self.join(made, 0, actors)

    def _open(self) -> set[int]:
        return {share.made.fd for share in self.shares}

    def join(self, made: Launched, number: int, actors: int) -> Share:
        """Take a share of an enclave."""
        mine = [page for page in range(made.data_pages) if page % actors == number]
        scratch, *rest = mine
        share = Share(made, scratch, {page: bytearray(pattern(page)) for page in rest})
        self.shares.append(share)
        return share

    def drop(self, share: Share) -> None:
        """Unmap and close an enclave."""
        self.process.munmap(share.made.base, share.made.size)
        self.process.close(share.made.fd)
        self.shares.remove(share)

    # --- steps ----------------------------------------------------------------------------------

    def inside(self, share: Share, step: Callable[[], None]) -> bool:
        """Enter, do a step, leave; again where memory was short, but the step only once.

        Returns:
            Whether the step was done; not if the enclave is lost, or memory stays short.
        """
        done = False
        for _try in range(TRIES):
            try:
                self._enter(share)
                try:
                    if not done:
                        step()
                        done = True
                finally:
                    self._leave()
                break
            except Signal as signal:
                if share.lost:
                    break
                if not self.tolerant or signal.name != "SIGBUS":
                    raise
                self.system.runtime.yield_now()
        return done

    def _enter(self, share: Share) -> None:
        self.thread = self.process.thread(self.cpu)
        # Actors of one enclave use the TCS of their processor's number.
        tcs = share.made.tcs(self.cpu if share.made.threads > 1 else 0)
        self.thread.enter(tcs)

    def _leave(self) -> None:
        try:
            if self.thread.inside:
                self.thread.exit()
        except Signal:
            self.thread.abandon()
            raise

    def store(self, share: Share, page: int, slot: int, value: int) -> None:
        """Store 8 bytes."""
        data, at = value.to_bytes(8, "little"), slot * 8

        def step() -> None:
            self.thread.store(share.made.data(page) + at, data)
            share.pages[page][at : at + 8] = data

        self.inside(share, step)

    def load(self, share: Share, page: int, slot: int) -> None:
        """Load 8 bytes and compare."""
        at = slot * 8

        def step() -> None:
            seen = self.thread.load(share.made.data(page) + at)
            wanted = bytes(share.pages[page][at : at + 8])
            assert seen == wanted, f"page {page} of {share.made.enclave}: {seen!r}, not {wanted!r}"

        self.inside(share, step)

    def visit(self, share: Share, seed: int, accesses: int) -> None:
        """Load and store 8 bytes at random places, many times for one entry, and compare."""
        rng, pages = random.Random(seed), list(share.pages.items())

        def step() -> None:
            for _ in range(accesses):
                page, wanted = pages[int(rng.random() * len(pages))]
                at, value = int(rng.random() * 512) * 8, rng.getrandbits(65)
                addr = share.made.data(page) + at
                if value & 1:
                    data = (value >> 1).to_bytes(8, "little")
                    self.thread.store(addr, data)
                    wanted[at : at + 8] = data
                else:
                    seen, there = self.thread.load(addr), wanted[at : at + 8]
                    assert seen == there, f"page {page} of {share.made.enclave}: {seen!r}"
                self.operations += 1

        self.inside(share, step)

    def read_all(self, share: Share) -> None:
        """Load every page whole and compare."""
        for page, wanted in share.pages.items():

            def step(page: int = page, wanted: bytearray = wanted) -> None:
                seen = self.thread.load(share.made.data(page), PAGE_BYTES)
                assert seen == wanted, f"page {page} of {share.made.enclave} differs"

            self.inside(share, step)

    def augment(self, share: Share, page: int, *, copy: int | None = None) -> None:
        """Make a page by accepting it, or by copying another one into it."""
        made = share.made
        addr, scratch = made.data(page), made.data(share.scratch)

        def step() -> None:
            if copy is None:
                status = self.thread.eaccept(addr, REG | RW | PENDING, scratch)
                content = bytearray(PAGE_BYTES)
            else:
                status = self.thread.eacceptcopy(addr, made.data(copy), RW, scratch)
                content = bytearray(share.pages[copy])
            assert status is Status.SUCCESS, f"accepting page {page}: {status!r}"
            share.pages[page] = content

        self.inside(share, step)

    def remove(self, share: Share, page: int) -> None:
        """Trim, accept, remove."""
        made = share.made
        removed = (
            self.change(share, page, lambda offset: self._modify(made, offset))
            and self.accept(share, page, TRIM | MODIFIED)
            and self.change(share, page, lambda offset: self._remove(made, offset))
        )
        if removed:
            del share.pages[page]
        else:
            share.give_up(page)

    def _modify(self, made: Launched, offset: int) -> None:
        self.process.modify_types(made.fd, offset, PAGE_BYTES, PageType.TRIM)

    def _remove(self, made: Launched, offset: int) -> None:
        self.process.remove_pages(made.fd, offset, PAGE_BYTES)

    def restrict(self, share: Share, page: int) -> None:
        """Take W away, accept, take it back."""
        made, scratch = share.made, share.made.data(share.scratch)

        def ioctl(offset: int) -> None:
            self.process.restrict(made.fd, offset, PAGE_BYTES, R)

        restored = (
            self.change(share, page, ioctl)
            and self.accept(share, page, REG | R | PR)
            and self.inside(share, lambda: self.thread.emodpe(made.data(page), RW, scratch))
        )
        if not restored:
            share.give_up(page)

    def change(self, share: Share, page: int, ioctl: Callable[[int], None]) -> bool:
        """Do an ioctl on a page until it is neither busy nor to be tried again.

        A process has no claim, so its ioctls return EAGAIN as long as another thread holds one.

        Returns:
            Whether the ioctl has succeeded.
        """
        for _try in range(TRIES):
            try:
                ioctl(share.made.offset(page))
            except OSError as error:
                if share.lost:
                    return False
                if error.errno not in (EAGAIN, EBUSY) and not self.tolerant:
                    raise
                self.system.runtime.yield_now()
                self.system.core.reclaim()
            else:
                return True
        assert self.tolerant, f"page {page} stays busy"
        return False

    def accept(self, share: Share, page: int, flags: int) -> bool:
        """EACCEPT; the page is as ``flags`` say.  Returns whether it was accepted."""
        made = share.made

        def step() -> None:
            status = self.thread.eaccept(made.data(page), flags, made.data(share.scratch))
            assert status is Status.SUCCESS, f"accepting page {page}: {status!r}"

        return self.inside(share, step)

    def remap(self, share: Share) -> None:
        """Unmap the data pages and map them again."""
        made = share.made
        start = made.data(0)
        self.process.munmap(start, made.base + made.size - start)
        self.process.mmap(made.fd, start, made.base + made.size - start, RW)

    def fork(self, share: Share, page: int) -> None:
        """Let a child look at a page and go."""
        child = self.process.fork()
        mine, self.process = self.process, child
        try:
            self.load(share, page, 1)
        finally:
            self.process = mine
            child.exit()

    # --- a random one ---------------------------------------------------------------------------

    def step(self, kind: str, number: int, value: int) -> None:
        """Do one step, the rest of whose choices come from two numbers."""
        if not self.shares:
            return
        share = self.shares[number % len(self.shares)]
        data = [page for page in share.pages if page < share.made.data_pages]
        grown = [page for page in share.pages if page >= share.made.data_pages]
        number //= len(self.shares)
        match kind:
            case "store" | "load" | "fork" | "restrict" | "copy" | "visit" if not share.pages:
                return
            case "visit":
                self.visit(share, value, 1 + number % 100)
                return
            case "store":
                self.store(share, list(share.pages)[number % len(share.pages)], value % 512, value)
            case "load":
                self.load(share, list(share.pages)[number % len(share.pages)], value % 512)
            case "augment" | "copy":
                page = self._hole(share, number)
                source = data[value % len(data)] if kind == "copy" and data else None
                if page is not None:
                    self.augment(share, page, copy=source)
            case "remove" if grown:
                self.remove(share, grown[number % len(grown)])
            case "restrict":
                self.restrict(share, list(share.pages)[number % len(share.pages)])
            case "fork":
                self.fork(share, list(share.pages)[number % len(share.pages)])
            case "remap" if share.made.threads == 1:
                self.remap(share)
        self.operations += 1

    def _hole(self, share: Share, number: int) -> int | None:
        """Return a hole of this actor's: each has its own range behind the data pages."""
        first = share.made.data_pages + share.scratch * HOLES
        used = share.pages.keys() | share.unsettled
        holes = [page for page in range(first, first + HOLES) if page not in used]
        inside = [page for page in holes if share.made.offset(page) < share.made.size]
        return inside[number % len(inside)] if inside else None


STEPS = ("store", "store", "load", "load", "augment", "copy", "remove", "restrict", "fork", "remap")
"""Kinds of steps, the common ones twice."""

VISITS = (*STEPS, *["visit"] * 10)
"""The same for long runs: most accesses share an entry with others."""


def run_steps(actor: Actor, seed: int, count: int, kinds: Sequence[str] = STEPS) -> None:
    """Let an actor do ``count`` random steps, then read everything back."""
    rng = random.Random(seed)
    for _ in range(count):
        actor.step(rng.choice(kinds), rng.getrandbits(24), rng.getrandbits(40))
    for share in list(actor.shares):
        if not share.lost:
            actor.read_all(share)


def storm(system: System, seed: int, rounds: int) -> None:
    """Evict whatever there is, in bursts."""
    rng = random.Random(f"storm {seed}")
    for _ in range(rounds):
        for _burst in range(rng.randrange(12)):
            system.core.reclaim(force=True)
        for _pause in range(rng.randrange(30)):
            system.runtime.yield_now()


def touch(actor: Actor, process: SoftProcess, seed: int, count: int) -> None:
    """Fault at random places of the actor's enclaves, which must never harm anybody."""
    rng = random.Random(f"touch {seed}")
    for _ in range(count):
        for share in list(actor.shares):
            made = share.made
            pages = made.data_pages + HOLES
            addr = made.data(rng.randrange(-2, pages))
            result = process.mm.fault(addr, R, process)
            assert result in (FaultResult.NOPAGE, FaultResult.RETRY), f"touching gave {result}"
        actor.system.runtime.yield_now()
