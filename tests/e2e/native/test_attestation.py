"""Programs that attest locally and seal: EREPORT and EGETKEY of C enclaves that page.

Goal: only the target enclave accepts a report; keys depend only on the inputs that the manual
names, also when pages were evicted meanwhile; refusals and faults have the manual's order.
Method: enclaves built by ``softsgx.image.csource`` run in an EPC of a third of one of them, and
page all they have out before each leaf; the test holds the keys and computes the MACs.

Source:
    SDM vol. 3D, "EREPORT", "EGETKEY", Operation; table "Key Derivation".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.native.attestation import (
    EPC_BYTES,
    KEY,
    RAW,
    REPORT,
    SENTINEL,
    Asked,
    Enclave,
    Ended,
    Session,
    build,
    file_name,
    mac_of,
    reloads,
    session,
)
from tests.support.native import needs_tracing

from softsgx.arch import (
    PAGE_BYTES,
    Attributes,
    AttributesFlags,
    Enclu,
    KeyName,
    KeyPolicy,
    KeyRequest,
    Pfec,
    Report,
    SigStruct,
    Status,
    TargetInfo,
    Vector,
)
from softsgx.cli import main
from softsgx.errors import SoftSgxError
from softsgx.image.csource import Compiler, build_enclave, find_compiler

F = AttributesFlags
P = KeyPolicy
MASK_64 = (1 << 64) - 1
MIN_RELOADS = 100


def compiler() -> Compiler | None:
    try:
        return find_compiler()
    except SoftSgxError:
        return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("attestation"), find_compiler())


@pytest.fixture(scope="module")
def running(host: Path) -> Iterator[Session]:
    """One program for all tests that need no other machine."""
    with session(host) as started:
        yield started


class Loader:
    """Loads enclaves and unloads them after the test."""

    def __init__(self, running: Session) -> None:
        self._running = running
        self.loaded: list[Enclave] = []

    def __call__(self, name: str) -> Enclave:
        self.loaded.append(self._running.load(name))
        return self.loaded[-1]


@pytest.fixture
def load(running: Session) -> Iterator[Loader]:
    loader = Loader(running)
    yield loader
    for enclave in loader.loaded:
        enclave.unload()


def sealing(enclave: Enclave, **fields: object) -> KeyRequest:
    """The request of a careful program: its own version, this processor's."""
    report = enclave.report(TargetInfo())
    defaults: dict[str, object] = {
        "key_name": KeyName.SEAL,
        "key_policy": P.MRENCLAVE,
        "isv_svn": report.isv_svn,
        "cpusvn": report.cpusvn,
        "attribute_mask": Attributes(flags=MASK_64, xfrm=0),
    }
    return KeyRequest(**{**defaults, **fields})


# --- reports ------------------------------------------------------------------------------------


def test_a_report_is_verified_by_its_target_and_by_no_other_enclave(load: Loader) -> None:
    alice, bob = load("alice"), load("bob")
    report = alice.report(bob.target(), bytes(range(1, 65)))
    assert report.report_data == bytes(range(1, 65))
    assert bob.verifies(report)
    assert load("bob").verifies(report)  # every instance of that enclave
    assert not alice.verifies(report)
    assert not load("stranger").verifies(report)
    assert not load("debug").verifies(report)


def test_a_debug_enclave_cannot_verify_what_was_meant_for_the_same_code_without_debug(
    load: Loader,
) -> None:
    alice, debug = load("alice"), load("debug")
    assert alice.target().measurement == debug.target().measurement
    report = load("bob").report(alice.target())
    assert alice.verifies(report)
    assert not debug.verifies(report)


def test_a_changed_byte_of_a_report_is_noticed_wherever_it_is(load: Loader) -> None:
    alice, bob = load("alice"), load("bob")
    report = alice.report(bob.target(), bytes(range(64)))
    key = bob.report_key(report.key_id)
    raw = report.pack()
    assert mac_of(report, key) == report.mac
    for place in range(384):
        changed = Report.unpack(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert mac_of(changed, key) != report.mac
    # The MAC does not cover KEYID; another KEYID is another key.
    for place in (0, 31):
        other = bytearray(report.key_id)
        other[place] ^= 0x80
        assert mac_of(report, bob.report_key(bytes(other))) != report.mac


@pytest.mark.parametrize("name", ["alice", "bob", "stranger", "newer", "debug", "kss product"])
def test_a_report_says_of_an_enclave_what_its_files_say(
    name: str, load: Loader, host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = host.with_name(file_name(name))
    sigstruct = SigStruct.unpack(path.with_suffix(".sig").read_bytes())
    assert main(["measure", "--json", str(path)]) == 0
    measured = json.loads(capsys.readouterr().out)

    report = load(name).report(TargetInfo())
    assert report.mrenclave.hex() == measured["mrenclave"] == sigstruct.enclave_hash.hex()
    assert report.mrsigner.hex() == measured["mrsigner"]
    assert report.attributes.flags == sigstruct.attributes.flags | F.INIT
    assert report.attributes.xfrm == sigstruct.attributes.xfrm
    assert report.miscselect == sigstruct.miscselect
    assert report.isv_prod_id == sigstruct.isv_prod_id
    assert report.isv_svn == sigstruct.isv_svn
    assert report.isv_family_id == sigstruct.isv_family_id
    assert report.isv_ext_prod_id == sigstruct.isv_ext_prod_id
    assert report.report_data == bytes(64)
    for number in (1, 2, 3, 4):
        assert not any(getattr(report, f"reserved{number}"))


# --- sealing keys -------------------------------------------------------------------------------


def test_a_key_by_mrenclave_is_the_same_in_every_instance_and_in_no_other_enclave(
    load: Loader,
) -> None:
    alice = load("alice")
    key = alice.seal(P.MRENCLAVE)
    assert alice.seal(P.MRENCLAVE) == key
    assert load("alice").seal(P.MRENCLAVE) == key
    assert load("stranger").seal(P.MRENCLAVE) == key  # the same code, whoever signed it
    assert load("bob").seal(P.MRENCLAVE) != key
    assert alice.seal(P.MRENCLAVE, b"\1" * 32) != key
    # What C asks for by the names of fields is what the manual's layout says.
    request = sealing(alice)
    assert alice.key(request) == (Status.SUCCESS, key)


def test_a_key_by_mrsigner_is_the_signers_for_one_product(load: Loader) -> None:
    key = load("alice").seal(P.MRSIGNER)
    assert load("bob").seal(P.MRSIGNER) == key
    assert load("stranger").seal(P.MRSIGNER) != key
    assert load("product").seal(P.MRSIGNER) != key
    assert load("debug").seal(P.MRSIGNER) != key


def test_a_newer_version_gets_the_keys_of_an_older_one_but_not_the_other_way_round(
    load: Loader,
) -> None:
    old, new = load("alice"), load("newer")
    request = sealing(old, key_policy=P.MRSIGNER)
    status, key = old.key(request)
    assert status == Status.SUCCESS
    assert new.key(request) == (Status.SUCCESS, key)
    newer = sealing(new, key_policy=P.MRSIGNER)
    status, key_of_new = new.key(newer)
    assert status == Status.SUCCESS
    assert key_of_new != key
    assert old.key(newer) == (Status.INVALID_ISVSVN, SENTINEL)


def test_keys_are_equal_exactly_where_the_manuals_facts_are(load: Loader) -> None:
    """All requests of a small lifecycle; DEBUG is in every key, whatever the mask says."""
    names = ("alice", "bob", "stranger", "product", "debug")
    signer, product = {"stranger": "other"}, {"product": 8}
    code, debug = {"bob": 2}, {"debug": F.DEBUG}
    keys: dict[tuple[object, ...], bytes] = {}
    for name in names:
        enclave = load(name)
        request = sealing(enclave)
        for policy, svn, key_id, mask in itertools.product(
            (0, P.MRENCLAVE, P.MRSIGNER, P.MRENCLAVE | P.MRSIGNER), (0, 3), (0, 1), (0, F.DEBUG)
        ):
            request.key_policy, request.isv_svn = policy, svn
            request.key_id = bytes([key_id] * 32)
            request.attribute_mask = Attributes(flags=mask, xfrm=0)
            status, key = enclave.key(request)
            assert status == Status.SUCCESS
            facts = (
                policy,
                svn,
                key_id,
                mask,
                product.get(name, 7),
                debug.get(name, 0),
                code.get(name, 1) if policy & P.MRENCLAVE else None,
                signer.get(name, "project") if policy & P.MRSIGNER else None,
            )
            assert keys.setdefault(facts, key) == key, facts
    assert len(set(keys.values())) == len(keys)


def test_key_separation_adds_and_drops_what_its_policies_name(load: Loader) -> None:
    one, other = load("kss"), load("kss product")

    def keys(policy: int) -> list[bytes]:
        found = []
        for enclave in (one, other):
            status, key = enclave.key(sealing(enclave, key_policy=P.MRSIGNER | policy))
            assert status == Status.SUCCESS
            found.append(key)
        return found

    assert len(set(keys(0))) == 2  # their products differ
    assert len(set(keys(P.NOISVPRODID))) == 1
    assert len(set(keys(P.NOISVPRODID | P.ISVFAMILYID))) == 2
    assert len(set(keys(P.NOISVPRODID | P.ISVEXTPRODID))) == 2
    assert len(set(keys(P.NOISVPRODID | P.CONFIGID))) == 1  # both have none


# --- refusals -----------------------------------------------------------------------------------

BEYOND = bytes([2]) + bytes(15)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"isv_svn": 4}, Status.INVALID_ISVSVN),
        ({"cpusvn": BEYOND}, Status.INVALID_CPUSVN),
        ({"cpusvn": BEYOND, "isv_svn": 4}, Status.INVALID_CPUSVN),
        ({"key_name": KeyName.PROVISION}, Status.INVALID_ATTRIBUTE),
        ({"key_name": KeyName.PROVISION_SEAL, "cpusvn": BEYOND}, Status.INVALID_ATTRIBUTE),
        ({"key_name": KeyName.EINITTOKEN}, Status.INVALID_ATTRIBUTE),
        ({"key_name": 5}, Status.INVALID_KEYNAME),
    ],
)
def test_a_refused_request_has_its_code_and_writes_nothing(
    fields: dict[str, object], status: Status, load: Loader
) -> None:
    alice = load("alice")
    assert alice.key(sealing(alice, **fields)) == (status, SENTINEL)
    assert alice.key(sealing(alice))[0] == Status.SUCCESS


def gp() -> Ended:
    return Ended(Vector.GP, 0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"reserved1": b"\1"},
        {"reserved2": bytes(433) + b"\1"},
        {"key_policy": 1 << 6},
        {"key_policy": P.NOISVPRODID},  # without KSS
        {"config_svn": 1},
        {"key_name": 5, "reserved1": b"\1"},  # before the name is looked at
    ],
)
def test_a_malformed_request_is_gp(fields: dict[str, object], load: Loader) -> None:
    alice = load("alice")
    asked = Asked(request=sealing(alice, **fields).pack())
    assert alice.call(KEY, asked) == gp()


def test_a_malformed_target_is_gp(load: Loader) -> None:
    target = TargetInfo(reserved3=bytes(383) + b"\1")
    assert load("alice").call(REPORT, Asked(request=target.pack())) == gp()


# --- operands -----------------------------------------------------------------------------------

_ALIGNMENTS = {
    Enclu.EGETKEY: {"rbx": 512, "rcx": 16},
    Enclu.EREPORT: {"rbx": 512, "rcx": 128, "rdx": 512},
}
OPERANDS = [(leaf, register) for leaf, alignments in _ALIGNMENTS.items() for register in alignments]


class Operands:
    """An enclave, and one of its leaves with operands that are right."""

    def __init__(self, enclave: Enclave, leaf: Enclu) -> None:
        request, data, out = enclave.areas()
        self.enclave, self.leaf = enclave, leaf
        if leaf is Enclu.EGETKEY:
            self.right = {"rbx": request, "rcx": out}
            self.request = sealing(enclave).pack()
        else:
            self.right = {"rbx": request, "rcx": data, "rdx": out}
            self.request = enclave.target().pack()

    def call(self, **wrong: int) -> tuple[int, bytes] | Ended:
        asked = Asked(leaf=self.leaf, request=self.request, data=b"d" * 64)
        for register, address in {**self.right, **wrong}.items():
            setattr(asked, register, address)
        return self.enclave.call(RAW, asked)


@pytest.mark.parametrize("leaf", list(_ALIGNMENTS))
def test_a_leaf_whose_operands_were_paged_out_waits_for_them(leaf: Enclu, load: Loader) -> None:
    operands = Operands(load("alice"), leaf)
    done = operands.call()
    assert not isinstance(done, Ended)
    result, out = done
    # EREPORT leaves RAX as it was, which is its own number.
    assert result == 0
    if leaf is Enclu.EGETKEY:
        assert out == operands.enclave.seal(P.MRENCLAVE) + b"\xee" * 496
    else:
        assert operands.enclave.verifies(Report.unpack(out[: Report.SIZE]))
        assert out[Report.SIZE :] == b"\xee" * 80


@pytest.mark.parametrize(("leaf", "register"), OPERANDS)
def test_a_misaligned_operand_is_gp(leaf: Enclu, register: str, load: Loader) -> None:
    operands = Operands(load("alice"), leaf)
    off = operands.right[register] + _ALIGNMENTS[leaf][register] // 2
    assert operands.call(**{register: off}) == gp()


@pytest.mark.parametrize("where", ["below", "above", "not canonical"])
@pytest.mark.parametrize(("leaf", "register"), OPERANDS)
def test_an_operand_outside_the_enclave_is_gp(
    leaf: Enclu, register: str, where: str, load: Loader
) -> None:
    alice = load("alice")
    operands = Operands(alice, leaf)
    outside = {
        "below": alice.base - PAGE_BYTES,
        "above": alice.base + alice.size,
        "not canonical": 1 << 62,
    }
    assert operands.call(**{register: outside[where]}) == gp()


@pytest.mark.parametrize(("leaf", "register"), OPERANDS)
def test_an_operand_on_a_page_of_another_type_is_a_page_fault_of_sgx(
    leaf: Enclu, register: str, load: Loader
) -> None:
    alice = load("alice")
    operands = Operands(alice, leaf)
    write = Pfec.W if register == list(_ALIGNMENTS[leaf])[-1] else Pfec(0)
    code = Pfec.P | Pfec.U | Pfec.SGX | write
    assert operands.call(**{register: alice.tcs + 512}) == Ended(Vector.PF, code, alice.tcs)


@pytest.mark.parametrize(("leaf", "register"), OPERANDS)
def test_an_operand_where_the_enclave_has_no_page_is_a_page_fault(
    leaf: Enclu, register: str, load: Loader
) -> None:
    alice = load("alice")
    nowhere = alice.base + alice.size - PAGE_BYTES
    done = Operands(alice, leaf).call(**{register: nowhere + 512})
    assert isinstance(done, Ended)
    assert (done.vector, done.address) == (Vector.PF, nowhere)
    write = Pfec.W if register == list(_ALIGNMENTS[leaf])[-1] else Pfec(0)
    assert done.code & (Pfec.U | Pfec.W) == Pfec.U | write


def test_where_paging_refuses_an_operand_the_fault_is_not_one_of_sgx(load: Loader) -> None:
    alice = load("alice")
    nowhere = alice.base + alice.size - PAGE_BYTES  # reserved by the host, PROT_NONE
    done = Operands(alice, Enclu.EGETKEY).call(rbx=nowhere)
    assert done == Ended(Vector.PF, Pfec.U, nowhere)


@pytest.mark.parametrize(("leaf", "register"), [(Enclu.EGETKEY, "rcx"), (Enclu.EREPORT, "rdx")])
def test_an_output_that_cannot_be_written_is_a_page_fault(
    leaf: Enclu, register: str, load: Loader
) -> None:
    alice = load("alice")
    done = Operands(alice, leaf).call(**{register: alice.base})  # code
    assert isinstance(done, Ended)
    assert (done.vector, done.address) == (Vector.PF, alice.base)
    # The mapping is not writable either, and what paging says comes first; whether the page
    # was present then is the host's business.
    assert done.code & ~Pfec.P == Pfec.U | Pfec.W


@pytest.mark.parametrize("leaf", list(_ALIGNMENTS))
def test_operands_are_looked_at_in_the_manuals_order(leaf: Enclu, load: Loader) -> None:
    """Each operand's alignment, then its page, before anything of the next one."""
    order = list(_ALIGNMENTS[leaf])
    for first, second in itertools.pairwise(order):
        alice = load("alice")
        operands = Operands(alice, leaf)
        page_fault = operands.call(**{first: alice.tcs, second: operands.right[second] + 1})
        assert isinstance(page_fault, Ended)
        assert (page_fault.vector, page_fault.address) == (Vector.PF, alice.tcs)
        alice = load("alice")
        operands = Operands(alice, leaf)
        assert operands.call(**{first: operands.right[first] + 1, second: alice.tcs}) == gp()


# --- the guide ---------------------------------------------------------------------------------


def test_the_guides_example_of_keys_compiles_without_a_warning(tmp_path: Path) -> None:
    guide = Path(__file__).parents[3] / "docs" / "how-to" / "build.md"
    _, example = guide.read_text().split("## Keys and reports")
    source = tmp_path / "enclave.c"
    block = example.split("```{code-block} c\n:caption: keys.c\n")[1]
    source.write_text(block.split("```")[0])
    chosen = find_compiler()
    assert build_enclave([source], chosen, flags=["-Werror", "-Wextra"]).page_count


# --- machines -----------------------------------------------------------------------------------


def test_keys_are_the_same_in_the_next_run_with_any_epc_and_differ_on_other_machines(
    host: Path, tmp_path: Path
) -> None:
    def secrets(name: str, *options: str, epc: str) -> tuple[bytes, bytes, bytes]:
        told = tmp_path / f"{name}.json"
        with session(host, "--json", str(told), *options, epc=epc) as run:
            alice = run.load("alice")
            sealed = alice.seal(P.MRENCLAVE), alice.seal(P.MRSIGNER)
            return *sealed, alice.report_key(bytes(32))

    first = secrets("first", epc=f"{EPC_BYTES}")
    assert len(set(first)) == 3
    (count,) = reloads(tmp_path / "first.json")
    assert count > MIN_RELOADS
    assert secrets("roomy", "--profile", "sgx2-server", epc="64MiB") == first
    assert secrets("strict", "--strict", epc=f"{EPC_BYTES}") == first
    (tmp_path / "other.toml").write_text("seed = 1\n")
    other = secrets("other", "--config", str(tmp_path / "other.toml"), epc="64MiB")
    assert not set(other) & set(first)
