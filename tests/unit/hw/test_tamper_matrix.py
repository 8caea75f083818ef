"""An evicted page is loaded unchanged or not at all, after every change by the operating system.

Goal: every tampered, replayed, moved or foreign page is refused with the code the manual gives,
nothing changes, and the untouched page still loads afterwards.  Method: every bit of the metadata,
of the address and of the slot, every byte of the ciphertext; every mixture of two pages, two
versions, two enclaves, two machines; every type under which a page could be passed off.

Source:
    SDM vol. 3D, "EWB", "ELDB/ELDU", Operation: what TMP_HEADER and the tag cover.
"""

from __future__ import annotations

from itertools import product

import pytest
from tests.support.paging import BASE, GP, Bench, Blob, Pf, pattern

from softsgx.arch import PAGE_BYTES, PageType, Pcmd, Status
from softsgx.hw import Leaves
from softsgx.runtime import InlineRuntime

MAC_FAIL = Status.MAC_COMPARE_FAIL
KINDS = ("REG", "TCS", "SECS", "VA")
CHILD_NUMBERS = {1, 2, 4, 5, 6}


@pytest.fixture(params=["readable", "fast"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """A bench whose leaves are the readable ones or, where there are, the fast ones."""
    made = Bench()
    made.leaves = made.machine.leaves if request.param == "fast" else Leaves(made.cpu)
    return made


class Evicted:
    """An evicted page of a kind, its enclave, and a place to load it to."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench, self.kind = bench, kind
        self.secs = bench.secs()
        victim = bench.kind(kind, self.secs)
        self.bytes = bench.content(victim) if kind in ("REG", "TCS") else b""
        self.blob = bench.evict(victim)
        self.there = bench.free()
        self.before = bench.snapshot()
        assert self.refused_as() == Status.SUCCESS, "the page as it was evicted must load"
        self.evict_again()

    def evict_again(self) -> None:
        """Bring the page back to where it was before the load that worked."""
        slot = self.blob.slot
        self.blob = self.bench.evict(self.there, slot)
        self.before = self.bench.snapshot()

    def refused_as(self, blob: Blob | None = None, leaf: str = "eldu") -> object:
        """Load ``blob``, or the untouched page; return how that ends."""
        return self.bench.load(self.blob if blob is None else blob, self.there, leaf)

    def expect(self, status: object, blob: Blob, what: object) -> None:
        """Load ``blob``; see it refused as ``status``, with nothing changed."""
        got = self.refused_as(blob)
        assert got == status, f"{what}: {got!r}"
        assert not self.bench.page(self.there).valid, what

    def untouched_page_still_loads(self) -> None:
        """Nothing has changed, and the right inputs still work."""
        assert self.bench.snapshot() == self.before
        assert self.refused_as() == Status.SUCCESS
        if self.bytes:
            assert self.bench.content(self.there) == self.bytes


def ends_for_type(number: int, kind: str, secs: int) -> object:
    """How a load ends whose PCMD says page type ``number`` and whose PAGEINFO says ``secs``."""
    if number == PageType[kind]:
        return MAC_FAIL
    if number in CHILD_NUMBERS:
        return MAC_FAIL if secs else Pf(0)
    if number in (0, 3):
        return GP if secs else MAC_FAIL
    return GP


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_the_metadata_is_covered_but_the_enclave_id(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    for byte, bit in product(range(128), range(8)):
        if 64 <= byte < 72:  # ENCLAVEID: a hint for software, used by nobody
            continue
        blob = page.blob.copy()
        blob.pcmd[byte] ^= 1 << bit
        status: object = MAC_FAIL
        if byte == 1:  # the page type decides what else is looked at before the MAC
            status = ends_for_type(int(PageType[kind]) ^ 1 << bit, kind, blob.secs)
        page.expect(status, blob, (byte, bit))
    page.untouched_page_still_loads()


@pytest.mark.parametrize("kind", KINDS)
def test_any_enclave_id_in_the_metadata_is_accepted(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    for byte in range(64, 72):
        page.blob.pcmd[byte] ^= 0xFF
        assert page.refused_as() == Status.SUCCESS
        page.evict_again()


@pytest.mark.parametrize("flag", ["rwx", "pending", "modified", "pr"])
def test_a_restriction_cannot_be_lifted_while_a_page_is_away(bench: Bench, flag: str) -> None:
    bits = {"rwx": 1, "pending": 8, "modified": 16, "pr": 32}[flag]
    secs = bench.secs()
    victim = bench.child(secs, rwx=1)
    if flag != "rwx":
        setattr(bench.page(victim), flag, True)
    blob, there = bench.evict(victim), bench.free()
    forged = blob.copy()
    forged.pcmd[0] ^= 7 ^ 1 if flag == "rwx" else bits
    assert bench.load(forged, there) == MAC_FAIL
    assert bench.load(blob, there) == Status.SUCCESS


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_the_ciphertext_is_covered(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    blob = page.blob.copy()
    for byte in range(PAGE_BYTES):
        blob.srcpge[byte] ^= 1 << byte % 8
        page.expect(MAC_FAIL, blob, byte)
        blob.srcpge[byte] ^= 1 << byte % 8
    page.untouched_page_still_loads()


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_the_linear_address_is_covered(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    for bit in range(64):
        blob = page.blob.copy()
        blob.linaddr ^= 1 << bit
        page.expect(MAC_FAIL, blob, bit)
    page.untouched_page_still_loads()


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_the_version_is_covered(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    slots = bench.page(page.blob.slot).slots
    assert slots is not None
    index = page.blob.slot % PAGE_BYTES // 8
    version = slots[index]
    for bit in range(64):
        slots[index] = version ^ 1 << bit
        page.expect(MAC_FAIL, page.blob, bit)
    slots[index] = 0
    page.expect(MAC_FAIL, page.blob, "empty slot")
    slots[index] = version
    page.untouched_page_still_loads()


@pytest.mark.parametrize("leaf", ["eldu", "eldb", "elduc", "eldbc"])
def test_every_mixture_of_two_pages_of_one_enclave_is_refused(bench: Bench, leaf: str) -> None:
    secs = bench.secs()
    one, other = (bench.evict(bench.child(secs)) for _ in range(2))
    there = bench.free()
    before = bench.snapshot()
    for picks in product((one, other), repeat=4):
        if len({id(pick) for pick in picks}) == 1:
            continue
        text, metadata, slot, where = picks
        mixed = Blob(text.srcpge, metadata.pcmd, slot.slot, where.linaddr, secs)
        assert bench.load(mixed, there, leaf) == MAC_FAIL
    assert bench.snapshot() == before
    assert bench.load(one, there, leaf) == Status.SUCCESS
    assert bench.load(other, bench.free(), leaf) == Status.SUCCESS


def test_a_page_cannot_move_to_another_enclave(bench: Bench) -> None:
    mine, theirs = bench.secs(), bench.secs()  # identical but for their EIDs
    blob, there = bench.evict(bench.child(mine, linaddr=BASE)), bench.free()
    bench.evict(bench.child(theirs, linaddr=BASE))
    stolen = blob.copy()
    stolen.secs = theirs
    stolen.pcmd[64:72] = bench.enclave(theirs).eid.to_bytes(8, "little")
    before = bench.snapshot()
    assert bench.load(stolen, there) == MAC_FAIL
    assert bench.snapshot() == before
    assert bench.load(blob, there) == Status.SUCCESS


def test_a_page_cannot_join_an_enclave_that_took_its_secs_page(bench: Bench) -> None:
    secs = bench.secs()
    blob = bench.evict(bench.child(secs))
    assert bench.leaves.eremove(secs) == Status.SUCCESS
    page = bench.page(secs)
    heir = bench.secs()
    page.fill(PageType.SECS)  # the same EPC page, another enclave
    page.enclave = bench.enclave(heir)
    assert bench.load(blob, bench.free()) == MAC_FAIL


def test_an_older_image_of_a_page_never_loads(bench: Bench) -> None:
    secs, slot = bench.secs(), bench.slot()
    addr = bench.child(secs, linaddr=BASE)
    images: list[Blob] = []
    for version in range(5):
        bench.store.write(bench.page(addr), 0, bytes([version]) * 64)
        images.append(bench.evict(addr, slot).copy())
        addr = bench.free()
        for old in images[:-1]:
            assert bench.load(old, addr) == MAC_FAIL
        assert bench.load(images[-1], addr) == Status.SUCCESS
        assert bench.content(addr)[:64] == bytes([version]) * 64
        for replay in images:  # the slot is empty: not even the newest loads twice
            assert bench.load(replay, bench.free()) == MAC_FAIL


def test_an_older_image_does_not_load_from_the_slots_of_others(bench: Bench) -> None:
    secs = bench.secs()
    blobs = [bench.evict(bench.child(secs)) for _ in range(8)]
    there = bench.free()
    for blob, other in product(blobs, blobs):
        if blob is not other:
            moved = blob.copy()
            moved.slot = other.slot
            assert bench.load(moved, there) == MAC_FAIL


def test_an_older_image_of_a_va_page_never_loads(bench: Bench) -> None:
    secs, home = bench.secs(), bench.va()
    va, child = bench.va(), bench.child(secs)
    blob = bench.evict(child, va + 8)
    old_tree = bench.evict(va, home)
    replay = old_tree.copy()
    new_va = bench.free()
    assert bench.load(old_tree, new_va) == Status.SUCCESS
    blob.slot = new_va + 8
    there = bench.free()
    assert bench.load(blob, there) == Status.SUCCESS
    used_tree = bench.evict(new_va, home)  # its slot is empty now
    assert bench.load(replay, bench.free()) == MAC_FAIL, "would restore a used version"
    assert bench.load(used_tree, bench.free()) == Status.SUCCESS


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_cannot_be_passed_off_as_another_type(bench: Bench, kind: str) -> None:
    page = Evicted(bench, kind)
    for number, secs in product(range(256), (0, page.secs)):
        if number == PageType[kind] and secs == page.blob.secs:
            continue
        blob = page.blob.copy()
        blob.pcmd[1], blob.secs = number, secs
        status = ends_for_type(number, kind, secs)
        if number == PageType[kind]:
            status = GP if secs else Pf(0)
        page.expect(status, blob, (number, secs))
    page.untouched_page_still_loads()


def test_a_va_page_cannot_be_forged_from_a_page_the_enclave_wrote(bench: Bench) -> None:
    secs = bench.secs()
    versions = b"".join(i.to_bytes(8, "little") for i in range(8, 8 * 513, 8))
    blob = bench.evict(bench.child(secs, linaddr=0, content=versions))
    blob.pcmd[0:8] = (PageType.VA << 8).to_bytes(8, "little")
    blob.secs = 0
    assert bench.load(blob, bench.free()) == MAC_FAIL


def test_a_page_of_another_machine_never_loads() -> None:
    here, elsewhere = (Bench(runtime=InlineRuntime(seed)) for seed in (1, 2))
    blobs: list[Blob] = []
    for bench in (here, elsewhere):
        secs = bench.secs()
        blobs.append(bench.evict(bench.child(secs, content=pattern(3))))
    mine, theirs = blobs
    assert (mine.slot, mine.linaddr, mine.secs) == (theirs.slot, theirs.linaddr, theirs.secs)
    assert here.slot_value(mine.slot) == elsewhere.slot_value(theirs.slot)
    assert bytes(mine.srcpge) != bytes(theirs.srcpge), "two machines have one paging key"
    before = here.snapshot()
    assert here.load(theirs, here.free()) == MAC_FAIL
    assert here.snapshot() == before
    assert here.load(mine, here.free()) == Status.SUCCESS


def rebuild(bench: Bench, blob: Blob, version: int, eid: int) -> None:
    """Recreate what a blob needs after a loss of power, better than any software could."""
    bench.page(blob.slot).fill(PageType.VA)
    slots = bench.page(blob.slot).slots
    assert slots is not None
    slots[blob.slot % PAGE_BYTES // 8] = version
    fresh = bench.page(bench.secs())
    page = bench.page(blob.secs)
    page.fill(PageType.SECS)
    page.enclave = fresh.owner
    page.owner.eid = eid
    fresh.clear()


def test_a_page_from_before_a_power_transition_never_loads(bench: Bench) -> None:
    secs = bench.secs()
    eid = bench.enclave(secs).eid
    blob = bench.evict(bench.child(secs))
    version = bench.slot_value(blob.slot)
    bench.machine.power_transition()
    assert bench.load(blob, bench.free()) == Pf(blob.slot)
    rebuild(bench, blob, version, eid)
    before = bench.snapshot()
    assert bench.load(blob, bench.free()) == MAC_FAIL
    assert bench.snapshot() == before


def test_two_evictions_of_equal_pages_have_nothing_in_common(bench: Bench) -> None:
    secs = bench.secs()
    one, other = (
        bench.evict(bench.child(secs, linaddr=BASE, content=bytes(PAGE_BYTES))) for _ in range(2)
    )
    equal = sum(a == b for a, b in zip(one.srcpge, other.srcpge, strict=True))
    assert equal < 100, "the key stream was used twice"
    assert Pcmd.unpack(one.pcmd).mac != Pcmd.unpack(other.pcmd).mac


def test_a_refused_load_leaves_no_plaintext_to_be_seen(bench: Bench) -> None:
    secs = bench.secs()
    secret = b"a secret that never leaves".ljust(PAGE_BYTES, b"\x55")
    blob, there = bench.evict(bench.child(secs, content=secret)), bench.free()
    blob.linaddr ^= 1 << 12  # the ciphertext is right, its place is not
    pages = len(bench.store)
    assert bench.load(blob, there) == MAC_FAIL
    assert len(bench.store) == pages
    assert bench.machine.ram_read(there, PAGE_BYTES) == b"\xff" * PAGE_BYTES
    bench.leaves.epa(3, there)
    slots = bench.page(there).slots
    assert slots is not None and list(slots) == [0] * 512
