"""The memory half of the native engine's faults: the fast forms against the readable ones.

Goal: a fault, an eviction and what lies between them have the same effects in each implementation.
Method: for each, a machine whose pages are in a memory file, which this process maps itself, with a
real userfaultfd.  All execute the same random steps; after each, page tables, store, memory file,
pager and paging must agree, and so must the bytes that this process reads and its kernel's page
table.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from tests.model.test_random_programs import CORES
from tests.support.hw import RepeatingRuntime
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, PageType
from softsgx.driver import FaultResult, Mm
from softsgx.engines.native import abi, libc
from softsgx.engines.native.memory.memory_file import EnclaveMemory, User, python_runs, runs
from softsgx.engines.native.memory.mprotect import MprotectPager
from softsgx.engines.native.memory.page_table import EnclavePageTable, Pager, hide_unmapped
from softsgx.engines.native.memory.plain_table import PlainPageTable
from softsgx.engines.native.memory.store import NativeStore, StoredPage
from softsgx.engines.native.memory.uffd import UffdPager, open_userfaultfd
from softsgx.hw import EpcPage, MachineCheck, PageFault
from softsgx.image import MASK_NONE, Data, Plan, Run
from softsgx.paging import FlatBacking, MemoryBacking
from softsgx.sim.stories.system import System, build, layout_runs, pattern
from softsgx.userland import SoftProcess

pytestmark = needs_tracing

READ, WRITE, EXECUTE = 1, 2, 4
BASE, APART, SIZE = 0x3000_001C_0000, 0x10_0000_0000, 64 * PAGE_BYTES  # the last of 2 MiB
KINDS = ((3, 12), (1, 4), (5, 6), (7, 6))
"""Rights, and how many data pages have them."""
EPC_PAGES = 34
ENCLU = b"\x0f\x01\xd7"

Implementation = bool | str
IMPLEMENTATIONS: list[Implementation] = [False, True]
if compiled.speedups is not None:
    IMPLEMENTATIONS.append("compiled")


class ReadableStore(NativeStore):
    """Without the short cut for a page that becomes usable."""

    def mapped(
        self, page: EpcPage, memory: EnclaveMemory, linaddr: int, user: User | None = None
    ) -> None:
        record = self.record(page)
        if record in self._leaving:
            self._leaving.remove(record)
        record.memory, record.linaddr = memory, linaddr
        record.maps += 1
        self.refresh(page)


class ReadableTable(EnclavePageTable):
    """Asks the store and the pager for each step."""

    def test_and_clear_accessed(self, linaddr: int) -> bool:
        page = self.page(linaddr)
        if page is None:
            return False
        used = linaddr in self._used
        self._used.discard(linaddr)
        shown = self._store.is_shown(page)
        return bool(shown and self.pager.test_and_clear_accessed(linaddr)) or used


TABLES: dict[Implementation, type[EnclavePageTable]] = {
    False: ReadableTable,
    True: PlainPageTable,
    "compiled": EnclavePageTable,
}


class Note:
    """A pager of another address space, which notes what it is told."""

    name = "note"

    def __init__(self, base: int) -> None:
        self.base, self.log = base, list[object]()

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def note(first: int, *arguments: Any) -> bool:
            rest = [
                part - self.base if part > self.base else part
                for part in arguments[-1:]
                if isinstance(part, int)
            ]
            self.log.append((name, first - self.base, rest))
            return False

        return note


class Site:
    """One implementation, with its own range of addresses."""

    def __init__(self, number: int, implementation: Implementation, pager: str) -> None:
        self.base, self.compiled = BASE + number * APART, implementation == "compiled"
        self.runtime = RepeatingRuntime(seed=7)
        self.store = NativeStore() if implementation else ReadableStore()
        self.system = System(
            epc_pages=EPC_PAGES,
            runtime=self.runtime,
            core_type=CORES[implementation],
            backing=lambda _pages: FlatBacking() if implementation else MemoryBacking(),
            store=self.store,
        )
        self.running, self.calls, self.errors = False, list[object](), list[Exception]()
        self.pagemap = -1
        self.memory = EnclaveMemory(self._memory_file())
        self.memory.forbidden = lambda data: [4] if data[3:5] == b"\x0f\xa2" else []
        self.pager: Pager = self._pager(pager)
        make = TABLES[implementation]
        self.process = SoftProcess(
            self.system.machine,
            self.system.driver,
            make_mm=lambda process: self.system.driver.mm_type(
                self.system.runtime,
                self._table(make, 0, self.pager, lambda: self.mm),
                owner=process,
            ),
        )
        self.mm = self.process.mm
        self.table: Any = self.mm.ptes
        self.note = Note(self.base)
        self.other = self._table(make, 1, self.note, lambda: self.child)
        self.memory.users.append(cast(User, self.table))
        self._launch()
        self.child = self.mm.fork(self.other, name="child")

    def _memory_file(self) -> int:
        self.file = os.memfd_create("sgx_enclave", os.MFD_ALLOW_SEALING)
        return os.dup(self.file)

    def _pager(self, kind: str) -> Pager:
        def prot_at(linaddr: int) -> int | None:
            vma = self.mm.find(linaddr)
            return None if vma is None else vma.prot

        if kind == "mprotect":
            return MprotectPager(self._inject, prot_at)
        flags = abi.O_CLOEXEC | abi.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
        uffd = libc.syscall(abi.SYS_USERFAULTFD, flags)
        open_userfaultfd(uffd)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        return UffdPager(
            uffd,
            os.dup(self.pagemap),
            self._inject,
            lambda: self.running,
            prot_at,
            self.errors.append,
        )

    def _table(
        self, make: type[EnclavePageTable], index: int, pager: Any, mm: Callable[[], Mm]
    ) -> EnclavePageTable:
        return make(
            index,
            self.store,
            self.system.machine.pages,
            pager,
            memory_at=lambda at: self.memory if mm().find(at) is not None else None,
            mapped_in=lambda start, end: [
                (vma.start, vma.end, self.memory) for vma in mm().vmas(start, end)
            ],
            is_readable=lambda _at: False,
            kick_all=lambda: None,
            installed=lambda page: self.calls.append(("installed", page.addr)),
        )

    def _inject(self, calls: list[tuple[int, ...]]) -> None:
        for number, start, *rest in calls:
            self.calls.append((number, start - self.base, *rest))
            libc.syscall(number, start, *rest)

    def _launch(self) -> None:
        runs = list(layout_runs(0))
        self.rights: list[int] = []
        for rights, pages in KINDS:
            at = (3 + len(self.rights)) * PAGE_BYTES
            texts = [pattern(len(self.rights) + number) for number in range(pages)]
            texts[0] = ENCLU + b"\x0f\xa2".ljust(PAGE_BYTES - 3, b"\x90")
            texts[1] = bytes(PAGE_BYTES)
            data = Data(memoryview(b"".join(texts)))
            runs.append(Run(at, pages, PageType.REG << 8 | rights, data, MASK_NONE))
            self.rights += [rights] * pages
        fd = build(self.process, Plan(SIZE, tuple(runs)), base=self.base)
        at = self.base
        for rights, pages in ((3, 3), *KINDS):
            self.process.mmap(fd, at, pages * PAGE_BYTES, rights)
            real = self.pager.map_prot(rights)
            flags = abi.MAP_SHARED | abi.MAP_FIXED_NOREPLACE
            assert (
                libc.syscall(abi.SYS_MMAP, at, pages * PAGE_BYTES, real, flags, self.file, at) == at
            )
            self.pager.mapped(at, at + pages * PAGE_BYTES, rights, {})
            at += pages * PAGE_BYTES
        self.process.enclave_file(fd).memory = self.memory
        self.enclave = self.system.driver.enclaves[0]

    def close(self) -> None:
        libc.syscall(abi.SYS_MUNMAP, self.base, SIZE)
        self.pager.close()
        for descriptor in (self.file, self.pagemap):
            if descriptor >= 0:
                os.close(descriptor)
        self.memory.close()

    # --- steps ------------------------------------------------------------------------------------

    def address(self, number: int) -> int:
        return self.base + (3 + number) * PAGE_BYTES

    def page(self, number: int) -> Any:
        return self.enclave.pages[3 + number]

    def epcm(self, number: int) -> EpcPage | None:
        epc = self.page(number).epc
        return None if epc is None else self.system.machine.page_at(epc.addr)

    def hide(self) -> None:
        """Hide the pages that no page table maps, as it is done before a thread continues."""
        if self.compiled:
            assert compiled.speedups is not None
            compiled.speedups.hide_unmapped(self.store)
        else:
            self.store.hide_unmapped()

    def do(self, what: str, number: int, value: int) -> object:
        for kind in (self._use, self._page_out, self._change, self._misuse):
            try:
                result = kind(what, number, value)
            except (PageFault, MachineCheck) as error:
                return type(error)
            if result is not NotImplemented:
                return result
        return None

    def _use(self, what: str, number: int, value: int) -> object:
        """What threads do."""
        at = self.address(number)
        entry = self.table.entry(at)
        match what:
            case "fault" if entry is None or value == 0:
                before, access = self.enclave.counts.fault_ns, WRITE if value % 4 == 1 else READ
                result = self.mm.fault(at + value, access, self.process)
                counted = self.enclave.counts.fault_ns > before
                return result, counted or result is FaultResult.SEGV
            case "child" if self.child.alive and self.other.entry(at) is None:
                return self.child.fault(at, READ, self.process)
            case "load" | "store":
                needed = READ if what == "load" else WRITE
                vma = self.mm.find(at)
                assert vma is not None
                if needed & ~(self.table.rights(at) & vma.prot):
                    return None
                if isinstance(self.pager, MprotectPager):
                    self.table.touched(at, needed)
                if what == "load":
                    return ctypes.string_at(at + value, 1)
                return ctypes.memset(at + value * 8, value, 1) - at
            case "leaf":
                return self.table.translate(at, READ, user=True) - (entry or (0, 0))[0]
            case _:
                pass
        return NotImplemented

    def _page_out(self, what: str, number: int, value: int) -> object:
        """What the supervisor does between uses."""
        page = self.page(number)
        match what:
            case "reclaim":
                batch = self.system.core.reclaim(force=value % 2 == 0)
                return batch.scanned, batch.freed
            case "evict" if page.epc is not None:
                return self.system.core.evict(page.epc)
            case "age":
                return page.age()
            case "go on":
                self.runtime.run_pending()
                self.hide()
                self.pager.flush()
            case "run":
                self.running = value % 2 == 0
            case "join" if self.other not in self.memory.users:
                self.memory.users.append(self.other)
            case _:
                pass
        return NotImplemented

    def _change(self, what: str, number: int, value: int) -> object:
        """Changes of rights and of EPCM entries."""
        at, page = self.address(number), self.epcm(number)
        match what:
            case "mprotect":
                prot = self.rights[number] & (READ if value % 3 == 0 else 7)
                self.process.mprotect(at, PAGE_BYTES, prot)
                libc.syscall(abi.SYS_MPROTECT, at, PAGE_BYTES, self.pager.map_prot(prot))
                shown = self.memory.within(at, at + PAGE_BYTES)
                self.pager.mapped(at, at + PAGE_BYTES, prot, shown)
            case "rights" if page is not None:
                page.rwx = self.rights[number] & (READ, READ | EXECUTE, 7)[value % 3]
                self.table.refresh(at)
                self.other.refresh(at)
            case "pending" | "modified" if page is not None:
                setattr(page, what, value % 2 == 0)
                self.store.refresh(page)
            case _:
                pass
        return NotImplemented

    def _misuse(self, what: str, number: int, value: int) -> object:
        """What seldom happens."""
        at, page = self.address(number), self.epcm(number)
        match what:
            case "poison" if page is not None and value % 8 == 0:
                self.system.core.poison(page.addr)
                self.store.poison(page)
            case "mark":
                self.table.mark(at)
            case "write" if page is not None:
                self.store.write(page, value * 8, bytes([value]))
            case "kick":
                self.table.kick()
            case "zap":
                self.table.zap(at)
            case "zap pages":
                self.table.zap_pages(
                    [self.address(each) for each in range(number, number + value % 4)]
                )
            case "age pages":
                return self.table.test_and_clear_pages(
                    [self.address(each) for each in range(max(0, number - value % 16), number)]
                )
            case _:
                pass
        return NotImplemented

    # --- state ------------------------------------------------------------------------------------

    def stored(self, number: int) -> StoredPage:
        """What the store knows of a resident page."""
        page = self.epcm(number)
        assert page is not None
        return self.store.record(page)

    def _stored(self, record: StoredPage) -> object:
        assert record.page.stored is record
        where = None if record.memory is None else record.linaddr - self.base
        data = None if record.data is None else bytes(record.data)
        return where, record.maps, record.rights, data, record.poisoned

    def check(self) -> None:
        """Page tables, the file and the list of those that leave are what the records say."""
        records, tables = self.store._pages, (self.table, self.other)
        leaving = {record.page.addr for record in self.store._leaving}
        assert len(leaving) == len(self.store._leaving)
        for record in records:
            addr, maps = record.page.addr, 0
            for table in tables:
                mapped = [at for at in table._entries if table._entries[at] is record]
                assert mapped in ([], [record.linaddr])
                maps += len(mapped)
            assert record.maps == maps
            assert (addr in leaving) is (record.rights != 0 and not maps)
            assert record.data is None or (not record.rights and any(record.data))
        shown = {record.linaddr: record.rights for record in records if record.rights}
        assert shown == self.memory.pages
        for table in tables:
            assert set(table._prots) <= set(table._entries)

    def state(self) -> dict[str, object]:
        base, store, memory = self.base, self.store, self.memory
        core, enclave, machine = self.system.core, self.enclave, self.system.machine

        seen: dict[str, object] = {
            "entries": [
                {at - base: table.entry(at) for at in table._entries}
                for table in (self.table, self.other)
            ],
            "used": [{at - base for at in table._used} for table in (self.table, self.other)],
            "prots": [
                {at - base: table._prots[at] for at in table._prots}
                for table in (self.table, self.other)
            ],
            "table marks": {at - base for at in self.table._marked},
            "stored": {record.page.addr: self._stored(record) for record in store._pages},
            "leaving": [record.page.addr for record in store._leaving],
            "file": {at - base: rights for at, rights in memory.pages.items()},
            "marks": {at - base: marks for at, marks in memory.marked.items()},
            "bytes": {at - base: os.pread(self.file, PAGE_BYTES, at) for at in memory.pages},
            "calls": self.calls,
            "note": self.note.log,
            "errors": [str(error) for error in self.errors],
            "lru": [page.addr for page in core.root.lru],
            "records": {addr: repr(page) for addr, page in core._pool.records.items()},
            "epcm": {
                addr: (repr(page)[:28], page.linaddr and page.linaddr - base, page.bepoch)
                for addr, page in machine.pages.items()
            },
            "counters": core.counters.as_dict(),
            "counts": (replace(enclave.counts, fault_ns=0), enclave.refusal, enclave.references),
            "users": (self.mm.users, self.mm.mmap_lock._readers, self.child.users),
            "free": core.free_pages,
        }
        pager: Any = self.pager
        seen["watched"] = {at - base for at in pager._watched}
        if isinstance(pager, UffdPager):
            fetches: Any = pager._fetches
            seen["present"] = {  # without bit 56, which tells how the kernel counts mappings
                at - base: bytes(flag & 0xFE for flag in pager._present[at])
                for at in pager._present
            }
            seen["fetches"] = (
                {at - base: rights for at, rights in fetches.rights.items()},
                {at - base for at in fetches._taken},
                {at - base for at in fetches.due},
            )
            words = os.pread(self.pagemap, 8 * (SIZE // PAGE_BYTES), base // PAGE_BYTES * 8)
            seen["kernel"] = [  # present, write-protected
                int.from_bytes(words[at : at + 8], "little") >> 57 & 0x41
                for at in range(0, len(words), 8)
            ]
        else:
            seen["pager"] = {at - base: rights for at, rights in pager._shown.items()}
        return seen


@contextmanager
def sites(pager: str) -> Iterator[list[Site]]:
    made: list[Site] = []
    try:
        for number, implementation in enumerate(IMPLEMENTATIONS):
            made.append(Site(number, implementation, pager))
        yield made
    finally:
        for site in made:
            site.close()


STEPS = (
    ["fault"] * 14 + ["load", "store"] * 6 + ["go on"] * 8 + ["reclaim"] * 3 + ["evict"] * 4
    + ["age", "leaf", "write", "mark", "rights", "mprotect", "child", "zap"] * 2
    + ["zap pages", "age pages", "age pages"]
    + ["pending", "modified", "kick", "run", "poison"]
)  # fmt: skip


def compare(made: list[Site], where: object) -> None:
    for site in made:
        site.check()
    readable, *others = (site.state() for site in made)
    for other in others:
        assert other.keys() == readable.keys(), where
        for name, value in other.items():
            assert value == readable[name], (name, where)


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("seed", range(8))
def test_faults_and_evictions_have_the_same_effects(pager: str, seed: int) -> None:
    choices = random.Random(seed)
    pages = sum(count for _rights, count in KINDS)
    joins = choices.randrange(150, 500)  # until then, the file has one user
    with sites(pager) as made:
        compare(made, "start")
        for step in range(400):
            what, number, value = (
                choices.choice(STEPS),
                choices.randrange(pages),
                choices.randrange(256),
            )
            if step == joins:
                what = "join"
            if what == "child" and step < joins:
                continue
            results = [site.do(what, number, value) for site in made]
            assert results.count(results[0]) == len(results), (step, what, number, results)
            compare(made, (step, what, number, value))


@pytest.mark.parametrize("way", ["zap", "evict"])
@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_pages_with_marks_leave_with_their_own_bytes(pager: str, way: str) -> None:
    with sites(pager) as made:
        code = next(at for at, rights in enumerate(made[0].rights) if rights == 7)
        for what, value in [("fault", 0), ("rights", 1), ("mark", 0), (way, 0), ("kick", 0)]:
            for site in made:
                site.do(what, code, value)
                assert what != "mark" or site.memory.marked
            compare(made, what)
        assert not any(site.memory.marked for site in made)


@pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd")
@pytest.mark.parametrize("pages", [1, 3])
def test_pages_that_are_marked_while_threads_are_kept_from_them_leave_with_their_own_bytes(
    pages: int,
) -> None:
    """A guard may find a thread that has ended, and what follows from its end marks a page."""
    with sites("userfaultfd") as made:
        first = next(at for at, rights in enumerate(made[0].rights) if rights == 7)
        for site in made:
            for number in range(first, first + pages):
                site.do("fault", number, 0)
                site.do("zap", number, 0)
            pager, last, calls = cast(Any, site.pager), site.address(first + pages - 1), [0]
            record = site.stored(first + pages - 1)

            def running(site: Site = site, last: int = last, calls: list[int] = calls) -> bool:
                calls[0] += 1
                site.memory.mark(last + 8)
                return False

            pager._running = running
            assert not site.memory.marked
            own = bytearray(site.memory.read(last, PAGE_BYTES))
            own[8:9] = ENCLU[:1]  # what a mark replaces
            site.hide()
            assert calls[0] and not site.memory.marked
            assert record.data == bytes(own)
            pager._running = lambda: False
        compare(made, "hidden")


def test_adjacent_pages_are_one_run() -> None:
    chosen = random.Random(1)
    top = (1 << 47) // PAGE_BYTES
    for first in (0, 5, 1 << 40, top - 20):
        for count in range(12):
            pages = [
                PAGE_BYTES * at for at in sorted(chosen.sample(range(first, first + 20), count))
            ]
            assert runs(pages) == python_runs(pages)
    assert runs([PAGE_BYTES, 2 * PAGE_BYTES, 4 * PAGE_BYTES]) == [
        (PAGE_BYTES, 3 * PAGE_BYTES),
        (4 * PAGE_BYTES, 5 * PAGE_BYTES),
    ]


@pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd")
@pytest.mark.parametrize("other", [0, 1, 3])
def test_pages_where_another_file_is_mapped_keep_what_the_pager_knows_of_them(other: int) -> None:
    with sites("userfaultfd") as made:
        first = next(at for at, rights in enumerate(made[0].rights) if rights == 7)
        hidden = [first, first + 1, first + 3]
        for site in made:
            for number in hidden:
                site.do("fault", number, 0)
                site.do("zap", number, 0)
            at = site.address(first + other)
            others = (at, at + PAGE_BYTES, cast(EnclaveMemory, None))
            usual, site.table._mapped_in = site.table._mapped_in, lambda low, high, at=others: [at]
            hide_unmapped(site.store)
            site.table._mapped_in = usual
            known = cast(Any, site.pager)._fetches.rights
            assert [page - first for page in hidden if site.address(page) in known] == [other]
