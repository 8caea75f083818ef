"""What loses power loses its pages: S3 to S5 and reset, and what survives them.

Goal: after a power transition nothing evicted before can come back, whatever software rebuilds,
while sealing keys, which enclaves rely on across boots, are the same.  A restart of software alone
(kexec) changes nothing, and two rounds of EREMOVE clean up after it.

Source:
    SDM vol. 3D, "Intel SGX Interactions with S-States".
"""

from __future__ import annotations

from functools import partial

import pytest
from tests.support.hw import build_enclave, make_machine
from tests.support.inhabited import DATA, Inhabited
from tests.support.paging import GP, Bench, Pf, outcome, pattern

from softsgx.arch import PAGE_BYTES, Attributes, KeyName, KeyRequest, PageType, RdInfo, Status
from softsgx.hw import PowerLost
from softsgx.hw.secrets import PagingKey
from softsgx.trace import Event

P, Q = DATA[0], DATA[1]


@pytest.fixture
def e() -> Inhabited:
    return Inhabited()


def test_every_epcm_entry_is_invalid_and_every_byte_is_gone() -> None:
    bench = Bench()
    secs = bench.secs()
    for kind in ("REG", "TCS", "TRIM", "VA"):
        bench.kind(kind, secs)
    bench.machine.power_transition()
    assert list(bench.machine.valid_pages()) == []
    assert len(bench.store) == 0
    assert all(page.lock == 0 for page in bench.machine.pages.values())
    bench.machine.check_invariants()


def test_every_processor_is_outside_with_an_empty_tlb(e: Inhabited) -> None:
    e.enter(0)
    e.enter(1)
    assert e.read(0, P) == pattern(0)[:8]
    e.hw.power_transition()
    for cpu in e.hw.cpus:
        assert cpu.inside is None and not cpu.tlb


def test_the_enclave_cannot_be_entered_and_its_memory_is_the_abort_page(e: Inhabited) -> None:
    e.hw.power_transition()
    assert outcome(partial(e.enter, 0)) == Pf(e.base + e.tcs(0), user=True)
    assert e.read(0, P) == b"\xff" * 8


def test_leaves_see_free_pages_where_the_enclave_was(e: Inhabited) -> None:
    addr, secs = e.built.epc(P), e.built.secs
    e.hw.power_transition()
    assert e.block(P) == Status.PG_INVLD
    assert e.track() == Pf(secs)
    assert outcome(partial(e.leaves.etrackc, addr)) == Status.PG_INVLD
    assert outcome(partial(e.leaves.erdinfo, RdInfo(), addr)) == Status.PG_INVLD
    assert e.ewb(P) == Pf(addr)
    assert e.remove(P) == Status.SUCCESS


def test_an_evicted_page_first_misses_its_va_page_then_its_secs_then_its_key(e: Inhabited) -> None:
    e.evict(P)
    blob = e.blobs[P]
    e.hw.power_transition()
    free = next(page.addr for page in e.hw.pages.values() if page.addr not in (e.va, blob.secs))
    load = partial(e.leaves.eldu, blob.args(), free, blob.slot)
    assert outcome(load) == Pf(blob.slot)
    e.leaves.epa(int(PageType.VA), e.va)
    assert outcome(load) == Pf(blob.secs)
    again = Inhabited()  # the same enclave, on a machine of its own
    assert again.built.secs == blob.secs
    again.hw.page_at(blob.secs)
    page = e.hw.page_at(blob.secs)
    assert page is not None
    page.fill(PageType.SECS)
    page.enclave = again.enclave
    assert outcome(load) == Status.MAC_COMPARE_FAIL


def test_a_va_tree_is_lost_with_its_root() -> None:
    bench = Bench()
    root, tree = bench.va(), bench.va()
    blob = bench.evict(tree, root)
    version = bench.slot_value(root)
    bench.machine.power_transition()
    bench.leaves.epa(int(PageType.VA), root)
    slots = bench.page(root).slots
    assert slots is not None
    slots[0] = version  # more than any software could do
    assert bench.load(blob, bench.free()) == Status.MAC_COMPARE_FAIL


def test_a_measurement_in_progress_is_lost() -> None:
    machine = make_machine()
    build_enclave(machine, init=False)
    assert machine.measurements
    machine.power_transition()
    assert not machine.measurements


def test_the_listener_hears_of_it() -> None:
    events: list[Event] = []
    machine = make_machine(tracer=events.append)
    machine.power_transition()
    assert events == [PowerLost()]


def test_the_machine_works_after_it(e: Inhabited) -> None:
    e.hw.power_transition()
    again = Inhabited(machine=e.hw)
    again.enter(0)
    again.write(0, P, b"new life")
    again.exit(0)
    again.evict(P)
    assert again.eldu(P) == Status.SUCCESS
    again.enter(0)
    assert again.read(0, P) == b"new life"
    again.hw.check_invariants()


# --- keys --------------------------------------------------------------------------------------

REQUEST_AT, KEY_AT = DATA[2], DATA[3]


def key_of(e: Inhabited, name: KeyName) -> bytes:
    """Let the enclave ask for a key; return it."""
    request = KeyRequest(
        key_name=int(name), key_policy=1, attribute_mask=Attributes(flags=-1 % 2**64)
    )
    e.enter(0)
    e.write(0, REQUEST_AT, request.pack())
    cpu = e.cpu(0)
    assert cpu.enclu.egetkey(e.base + REQUEST_AT, e.base + KEY_AT) == Status.SUCCESS
    key = e.read(0, KEY_AT, 16)
    e.exit(0)
    return key


def test_seal_keys_survive_and_report_keys_too_for_the_same_key_id(e: Inhabited) -> None:
    before = [key_of(e, name) for name in (KeyName.SEAL, KeyName.REPORT)]
    e.hw.power_transition()
    again = Inhabited(machine=e.hw)
    assert [key_of(again, name) for name in (KeyName.SEAL, KeyName.REPORT)] == before


def test_another_machine_has_other_seal_keys() -> None:
    keys = {key_of(Inhabited(machine=make_machine(seed=seed)), KeyName.SEAL) for seed in range(3)}
    assert len(keys) == 3


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(key, version) of every page that any machine seals; keys are kept, so ids are theirs."""
    seen: list[tuple[int, int]] = []
    keys: list[PagingKey] = []
    original = PagingKey.next_version

    def spy(key: PagingKey) -> int:
        version = original(key)
        keys.append(key)
        seen.append((id(key), version))
        return version

    monkeypatch.setattr(PagingKey, "next_version", spy)
    return seen


def test_no_version_is_used_twice_under_one_key(sealed: list[tuple[int, int]]) -> None:
    bench = Bench()
    bench.leaves = type(bench.leaves)(bench.cpu)  # the readable leaves
    for _ in range(3):
        secs = bench.secs()
        addr = bench.child(secs)
        for _ in range(20):
            blob = bench.evict(addr)
            assert bench.load(blob, addr) == Status.SUCCESS
        bench.evict(bench.va())
        bench.machine.power_transition()
        bench._slots = 0
    assert len(sealed) == 63
    assert len(set(sealed)) == 63
    assert all(version > 0 and version % 8 == 0 for _, version in sealed)
    assert len({key for key, _ in sealed}) == 3, "the paging key outlived the power"


def test_identifiers_are_not_reused_while_the_power_lasts() -> None:
    bench = Bench()
    seen = set()
    for _ in range(10):
        secs = bench.secs()
        seen.add(bench.enclave(secs).eid)
        assert outcome(partial(bench.leaves.eremove, secs)) == Status.SUCCESS
    assert len(seen) == 10


# --- a restart of software alone ---------------------------------------------------------------


def test_two_rounds_of_eremove_clean_an_epc_that_software_left_behind(e: Inhabited) -> None:
    other = e.another(e.base + 0x10_0000)
    e.evict(P)
    other.evict(Q)
    addresses = [page.addr for page in e.hw.valid_pages()]
    first = [outcome(partial(e.leaves.eremove, addr)) for addr in addresses]
    assert set(first) == {Status.SUCCESS, Status.CHILD_PRESENT}
    assert {page.pt for page in e.hw.valid_pages()} == {PageType.SECS}
    second = [outcome(partial(e.leaves.eremove, addr)) for addr in addresses]
    assert set(second) == {Status.SUCCESS}
    assert list(e.hw.valid_pages()) == []
    e.hw.check_invariants()


def test_stale_valid_pages_refuse_to_be_filled(e: Inhabited) -> None:
    assert outcome(partial(e.leaves.epa, 3, e.built.epc(P))) == Pf(e.built.epc(P))
    assert outcome(partial(e.leaves.epa, 2, e.built.epc(P))) == GP
    assert e.page(P).valid
    assert e.built.read(P, PAGE_BYTES) == pattern(0)
