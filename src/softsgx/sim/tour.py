"""The paging tour: one page is evicted and loaded again, leaf by leaf.

The tour runs a machine with a signed enclave.  Each line of the result is an event that the machine
reported, or an access whose result the tour asserts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from softsgx.arch import (
    PAGE_BYTES,
    Attributes,
    AttributesFlags,
    EinitToken,
    PageType,
    SecInfo,
    Secs,
    Status,
)
from softsgx.hw import (
    EXECUTE,
    READ,
    WRITE,
    AsynchronousExit,
    Machine,
    MachineConfig,
    PageFault,
    PageInfoArgs,
    PageTables,
)
from softsgx.hw.access import load, store
from softsgx.hw.leaves.aex import interrupt
from softsgx.image import (
    SECINFO_RW,
    SECINFO_RX,
    Blob,
    Plan,
    SignOptions,
    mrsigner,
    sign,
    throwaway_key,
    unsigned_sigstruct,
)
from softsgx.image import measure as measure_plan
from softsgx.runtime import SeededRuntime
from softsgx.trace import Event

__all__ = ["Chapter", "Line", "paging_tour"]

_BASE = 0x7000_0000_0000
_SECRET = b"the launch codes are 0000"
_AEP, _ENCLU_SITE = 0x40_1000, 0x40_2000
_EPC_PAGES = 64


@dataclass(frozen=True)
class Line:
    """One event of a chapter.

    Attributes:
        what: the leaf or the access.
        page: the page that it used.
        result: its status, its fault, or the bytes.
    """

    what: str
    page: str
    result: str


@dataclass
class Chapter:
    """A part of the tour.

    Attributes:
        title: the heading.
        notice: what the reader should look for.
        lines: the events, in order.
    """

    title: str
    notice: str
    lines: list[Line] = field(default_factory=list)


class _Tour:
    """The machine, the enclave's pages, and the chapters so far."""

    def __init__(self, seed: int) -> None:
        self.chapters: list[Chapter] = []
        self.hw = Machine(
            MachineConfig.with_epc(_EPC_PAGES * PAGE_BYTES, processors=2),
            SeededRuntime(seed),  # keys too follow from the seed
            tracer=self.hear,
        )
        self.leaves, section = self.hw.leaves, self.hw.config.sections[0]
        self.secs, self.va, *self.free = (section.page(n) for n in range(_EPC_PAGES))
        self.names: dict[int, str] = {self.secs: "SECS", self.va: "VA page"}
        self.tables = PageTables()
        self.at: dict[int, int] = {}

    def chapter(self, title: str, notice: str) -> None:
        self.chapters.append(Chapter(title, notice))

    def hear(self, event: Event) -> None:
        """Add a line for an event of the machine."""
        if isinstance(event, AsynchronousExit):
            line = Line("AEX", f"TCS {event.tcs - _BASE:#x}", "left")
        else:
            target, result = getattr(event, "page", 0), getattr(event, "result", "")
            where = self.names.get(target & -PAGE_BYTES, f"{target:#x}" if target else "")
            if _BASE <= target < _BASE + (1 << 40):
                where = f"offset {target - _BASE:#x}"
            line = Line(getattr(event, "leaf", "").upper(), where, result)
        self.chapters[-1].lines.append(line)

    def tell(self, what: str, page: str, result: str) -> None:
        """Add a line for something other than a leaf."""
        self.chapters[-1].lines.append(Line(what, page, result))

    def build(self, plan: Plan) -> None:
        """Build the enclave of ``plan``: ECREATE, EADD, EEXTEND, EINIT; signed by a new key."""
        leaves = self.leaves
        secs = Secs(
            size=plan.size,
            base=_BASE,
            ssa_frame_size=plan.ssa_frame_size,
            attributes=Attributes(flags=AttributesFlags.MODE64BIT, xfrm=3),
        )
        leaves.ecreate(PageInfoArgs(srcpge=secs.pack(), secinfo=SecInfo()), self.secs)
        leaves.epa(int(PageType.VA), self.va)
        for page in plan.pages():
            epc = self.free.pop(0)
            self.names[epc] = f"page {page.offset:#x}"
            self.at[page.offset] = epc
            info = PageInfoArgs(
                _BASE + page.offset, bytes(page.data), SecInfo(flags=page.flags), self.secs
            )
            leaves.eadd(info, epc)
            for chunk in range(16):
                if page.mask >> chunk & 1:
                    leaves.eextend(self.secs, epc + 256 * chunk)
            self.tables.map(_BASE + page.offset, epc, READ | WRITE | EXECUTE)
        sigstruct = sign(unsigned_sigstruct(measure_plan(plan), SignOptions()), throwaway_key())
        digest = mrsigner(sigstruct)
        self.hw.launch_key_hash[:] = [
            int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8)
        ]
        _expect(leaves.einit(sigstruct, self.secs, EinitToken()), Status.SUCCESS)


def paging_tour(seed: int = 0) -> list[Chapter]:
    """Run the tour: load an enclave, evict a page under a running thread, tamper, reload.

    Args:
        seed: of the machine's keys; the same seed gives the same lines.
    """
    tour = _Tour(seed)
    leaves, hw = tour.leaves, tour.hw
    cpu = hw.cpus[1]
    cpu.space, cpu.cpl = tour.tables, 3
    cpu.regs.rip = _ENCLU_SITE

    blob = Blob().data(b"\x0f\x01\xd7", flags=SECINFO_RX, label="code")
    blob.data(_SECRET, flags=SECINFO_RW, label="data")
    data = PAGE_BYTES
    tcs = blob.thread(oentry=0, stack_pages=1, nssa=1)
    plan = blob.plan()

    tour.chapter(
        "An enclave is built",
        "Each EADD puts a page into the EPC and into the measurement; EEXTEND hashes 256 bytes. "
        "EINIT compares the digest with the signed one.",
    )
    tour.build(plan)

    tour.chapter(
        "A thread enters and uses its data",
        "Inside, the access is checked against the EPCM at a TLB miss; from outside the same page "
        "reads as all ones.",
    )
    cpu.enclu.eenter(_BASE + tcs, _AEP)
    assert load(cpu, _BASE + data, len(_SECRET)) == _SECRET
    tour.tell("load", f"offset {data:#x}", repr(_SECRET.decode()))
    store(cpu, _BASE + data, b"THE")
    tour.tell("store", f"offset {data:#x}", "'THE'")
    outside = hw.cpus[0]
    outside.space = tour.tables
    assert load(outside, _BASE + data, 4) == b"\xff" * 4
    tour.tell("load from outside", f"offset {data:#x}", "ff ff ff ff")

    page, slot = tour.at[data], tour.va
    contents, pcmd = bytearray(PAGE_BYTES), bytearray(128)

    def evict() -> Status:
        return leaves.ewb(PageInfoArgs(0, contents, pcmd, 0), page, slot)

    tour.chapter(
        "EWB refuses the page while a TLB may hold it",
        "The page must be blocked, and each thread that was inside at the ETRACK must have left "
        "the enclave. The running thread still uses its old translation.",
    )
    _expect(evict(), Status.PAGE_NOT_BLOCKED)
    _expect(leaves.eblock(page), Status.SUCCESS)
    _expect(evict(), Status.NOT_TRACKED)
    _expect(leaves.etrack(tour.secs), Status.SUCCESS)
    _expect(evict(), Status.NOT_TRACKED)
    store(cpu, _BASE + data + 4, b"LAUNCH")
    tour.tell("store", f"offset {data:#x}", "'LAUNCH', through the stale TLB entry")

    tour.chapter(
        "An interrupt makes the thread exit, and EWB evicts the page",
        "The asynchronous exit flushes the TLB and saves the registers in the enclave. EWB then "
        "encrypts the page, puts its version into a VA slot, and frees the EPC page.",
    )
    interrupt(cpu)
    _expect(evict(), Status.SUCCESS)
    assert _SECRET[10:] not in contents
    tour.tell("ciphertext", "main memory", contents[:16].hex(" "))

    tour.chapter(
        "ELDU detects changes in main memory",
        "The MAC covers the page's bytes, its address and its version. A refused ELDU leaves the "
        "slot as it was.",
    )
    home = leaves.eldu

    def reload(linaddr: int = _BASE + data) -> Status:
        return home(PageInfoArgs(linaddr, contents, pcmd, tour.secs), page, slot)

    contents[100] ^= 1
    _expect(reload(), Status.MAC_COMPARE_FAIL)
    contents[100] ^= 1
    _expect(reload(_BASE + data + PAGE_BYTES), Status.MAC_COMPARE_FAIL)

    tour.chapter(
        "The thread touches the page, faults, and the page is loaded",
        "The resumed thread faults on the page: the EPCM entry is invalid. ELDU decrypts, checks "
        "and empties the slot, so that the same image can never be loaded again.",
    )
    cpu.regs.rip = _ENCLU_SITE
    cpu.enclu.eresume(_BASE + tcs, _AEP)
    fault = _fault(lambda: load(cpu, _BASE + data, 1))
    tour.tell("load", f"offset {data:#x}", str(fault))
    interrupt(cpu)
    _expect(reload(), Status.SUCCESS)
    twin = tour.free.pop(0)
    again = home(PageInfoArgs(_BASE + data, contents, pcmd, tour.secs), twin, slot)
    _expect(again, Status.MAC_COMPARE_FAIL)

    tour.chapter("The thread resumes", "The page has the bytes that the thread stored.")
    cpu.regs.rip = _ENCLU_SITE
    cpu.enclu.eresume(_BASE + tcs, _AEP)
    kept = load(cpu, _BASE + data, len(_SECRET))
    assert kept == b"THE LAUNCH" + _SECRET[10:]
    tour.tell("load", f"offset {data:#x}", repr(kept.decode()))
    cpu.enclu.eexit(_AEP)
    hw.check_invariants()
    return tour.chapters


def _expect(status: Status, wanted: Status) -> None:
    assert status is wanted, f"{status!r} where the tour shows {wanted!r}"


def _fault(action: Callable[[], object]) -> PageFault:
    try:
        action()
    except PageFault as fault:
        return fault
    raise AssertionError("an access to an evicted page did not fault")
