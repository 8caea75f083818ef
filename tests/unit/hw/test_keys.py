"""Key derivation: which facts go into which key.

Goal: each cell of the manual's table.  Method: the table stands here once more, as text whose
cells are looked up for random enclaves and requests, and is compared with the functions.

Source:
    SDM vol. 3D, "EGETKEY", table "Key Derivation"; "EREPORT" and "EINIT".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.hw import make_machine, secs_of

from softsgx.arch import Attributes, EinitToken, KeyRequest, TargetInfo
from softsgx.hw import Machine
from softsgx.hw.keys import (
    KeyDependencies,
    derive,
    einit_token_key,
    launch_token_key,
    provision_key,
    provision_seal_key,
    report_key,
    seal_key,
    target_report_key,
)
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.signature import HARDCODED_PADDING

COLUMNS = ("SEAL", "REPORT/get", "REPORT/make", "TOKEN/get", "TOKEN/init", "PROV", "PROVSEAL")
TABLE = """
key_name            | 4          | 3        | 3        | 0        | 0        | 1    | 2
isv_family_id       | pol4 S     | 0        | 0        | 0        | 0        | 0    | pol4 S
isv_ext_prod_id     | pol5 S     | 0        | 0        | 0        | 0        | 0    | pol5 S
isv_prod_id         | not2 S     | 0        | 0        | S        | TK       | S    | not2 S
isv_svn             | req        | 0        | 0        | req      | TK       | req  | req
owner_epoch         | CR         | CR       | CR       | CR       | CR       | 0    | 0
attributes          | masked     | S        | TI       | masked   | TK       | masked | masked
attribute_mask      | req        | 0        | 0        | 0        | 0        | req  | req
mrenclave           | pol0 S     | S        | TI       | 0        | 0        | 0    | 0
mrsigner            | pol1 S     | 0        | 0        | S        | MSR      | S    | S
key_id              | req        | req      | CR       | req      | TK       | 0    | 0
seal_fuses          | CR         | CR       | CR       | CR       | CR       | 0    | CR
cpusvn              | req        | CR       | CR       | req      | TK       | req  | req
padding             | S          | HARD     | S        | S        | HARD     | S    | S
miscselect          | masked     | S        | TI       | masked   | TK       | masked | masked
misc_mask           | inverse    | 0        | 0        | 0        | 0        | inverse | inverse
key_policy          | req        | 0        | 0        | 0        | 0        | 0    | req
config_id           | pol3 S     | S        | TI       | 0        | 0        | 0    | pol3 S
config_svn          | pol3 req   | S        | TI       | 0        | 0        | 0    | pol3 req
cet_attributes      | masked     | S        | TI       | masked   | TK       | masked | masked
cet_attributes_mask | req        | 0        | 0        | 0        | 0        | 0    | 0
"""

BYTES_16, BYTES_32, BYTES_64 = (st.binary(min_size=n, max_size=n) for n in (16, 32, 64))
U8, U16, U32, U64 = (st.integers(0, (1 << n) - 1) for n in (8, 16, 32, 64))
ATTRIBUTES = st.builds(Attributes, flags=U64, xfrm=U64)
MSR = bytes(range(32))


@st.composite
def enclaves(draw: Callable[..., Any]) -> ResidentSecs:
    attributes = draw(ATTRIBUTES)
    secs = secs_of(
        0x4000,
        flags=attributes.flags,
        xfrm=attributes.xfrm,
        miscselect=draw(U32),
        cet_attributes=draw(U8),
        mrenclave=draw(BYTES_32),
        mrsigner=draw(BYTES_32),
        config_id=draw(BYTES_64),
        config_svn=draw(U16),
        isv_prod_id=draw(U16),
        isv_svn=draw(U16),
    )
    enclave = ResidentSecs(secs, 1, 0)
    enclave.isv_family_id, enclave.isv_ext_prod_id = draw(BYTES_16), draw(BYTES_16)
    enclave.padding = draw(st.sampled_from([HARDCODED_PADDING, b"\5" * 352]))
    return enclave


REQUESTS = st.builds(
    KeyRequest,
    key_policy=U16,
    isv_svn=U16,
    cet_attributes_mask=U8,
    cpusvn=BYTES_16,
    attribute_mask=ATTRIBUTES,
    key_id=BYTES_32,
    misc_mask=U32,
    config_svn=U16,
)
TARGETS = st.builds(
    TargetInfo,
    measurement=BYTES_32,
    attributes=ATTRIBUTES,
    cet_attributes=U8,
    config_svn=U16,
    miscselect=U32,
    config_id=BYTES_64,
)
TOKENS = st.builds(
    EinitToken,
    cpusvn_le=BYTES_16,
    isv_prod_id_le=U16,
    isv_svn_le=U16,
    cet_masked_attributes_le=U8,
    masked_miscselect_le=U32,
    masked_attributes_le=ATTRIBUTES,
    key_id=BYTES_32,
)


class Facts:
    """Everything a cell may name."""

    def __init__(
        self,
        machine: Machine,
        secs: ResidentSecs,
        request: KeyRequest,
        target: TargetInfo,
        token: EinitToken,
    ) -> None:
        self.machine, self.secs = machine, secs
        self.request, self.target, self.token = request, target, token

    def cell(self, field: str, text: str) -> Any:
        condition, _, source = text.rpartition(" ")
        if condition:
            bit = self.request.key_policy >> int(condition[-1]) & 1
            if bool(bit) is not condition.startswith("pol"):
                return blank(field)
        return getattr(self, f"from_{source.lower()}")(field)

    def from_s(self, field: str) -> Any:
        if field == "attributes":
            return Attributes(flags=self.secs.flags, xfrm=self.secs.xfrm)
        return getattr(self.secs, field)

    def from_req(self, field: str) -> Any:
        return getattr(self.request, field)

    def from_ti(self, field: str) -> Any:
        return getattr(self.target, "measurement" if field == "mrenclave" else field)

    def from_tk(self, field: str) -> Any:
        names = {
            "attributes": "masked_attributes_le",
            "miscselect": "masked_miscselect_le",
            "cet_attributes": "cet_masked_attributes_le",
            "key_id": "key_id",
        }
        return getattr(self.token, names.get(field, f"{field}_le"))

    def from_cr(self, field: str) -> Any:
        secrets = self.machine.secrets
        return {
            "owner_epoch": secrets.owner_epoch,
            "seal_fuses": secrets.seal_fuses,
            "key_id": secrets.report_key_id,
            "cpusvn": self.machine.cpusvn,
        }[field]

    def from_msr(self, _field: str) -> bytes:
        return MSR

    def from_hard(self, _field: str) -> bytes:
        return HARDCODED_PADDING

    def from_inverse(self, _field: str) -> int:
        return self.request.misc_mask ^ 0xFFFF_FFFF

    def from_masked(self, field: str) -> Any:
        request, secs = self.request, self.secs
        if field == "attributes":
            # INIT and DEBUG are in every key, whatever the mask says.
            mask = request.attribute_mask
            return Attributes(flags=(mask.flags | 3) & secs.flags, xfrm=mask.xfrm & secs.xfrm)
        if field == "miscselect":
            return request.misc_mask & secs.miscselect
        return request.cet_attributes_mask & secs.cet_attributes

    def columns(self) -> dict[str, KeyDependencies]:
        machine, secs, request = self.machine, self.secs, self.request
        return {
            "SEAL": seal_key(machine, secs, request),
            "REPORT/get": report_key(machine, secs, request),
            "REPORT/make": target_report_key(machine, secs, self.target),
            "TOKEN/get": einit_token_key(machine, secs, request),
            "TOKEN/init": launch_token_key(machine, self.token, MSR),
            "PROV": provision_key(machine, secs, request),
            "PROVSEAL": provision_seal_key(machine, secs, request),
        }


def blank(field: str) -> Any:
    return getattr(KeyDependencies(), field)


def parsed() -> dict[tuple[str, str], str]:
    cells = {}
    for line in TABLE.strip().splitlines():
        field, *texts = (part.strip() for part in line.split("|"))
        for column, text in zip(COLUMNS, texts, strict=True):
            cells[field, column] = text
    return cells


CELLS = parsed()
MACHINE = make_machine(seed=9)
MACHINE.secrets.owner_epoch = b"\3" * 16


@given(enclaves(), REQUESTS, TARGETS, TOKENS)
@settings(max_examples=60, deadline=None)
def test_every_cell_of_the_table_equals_the_manuals(
    secs: ResidentSecs, request: KeyRequest, target: TargetInfo, token: EinitToken
) -> None:
    facts = Facts(MACHINE, secs, request, target, token)
    made = facts.columns()
    for (field, column), text in CELLS.items():
        expected = blank(field) if text in ("0",) else None
        if field == "key_name":
            expected = int(text)
        elif expected is None:
            expected = facts.cell(field, text)
        assert getattr(made[column], field) == expected, f"{field} of {column}: {text}"


def test_the_table_has_every_field_once() -> None:
    assert {field for field, _column in CELLS} == set(KeyDependencies.OFFSETS)
    assert len(CELLS) == len(KeyDependencies.OFFSETS) * len(COLUMNS)


@given(st.sampled_from(sorted(KeyDependencies.OFFSETS)), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_every_fact_changes_the_key(field: str, bit: int) -> None:
    facts = KeyDependencies(key_name=1)
    data = bytearray(facts.pack())
    data[KeyDependencies.OFFSETS[field]] ^= 1 << bit
    assert derive(MACHINE, KeyDependencies.unpack(data)) != derive(MACHINE, facts)


def test_keys_are_the_packages_own_and_16_bytes_long() -> None:
    facts = KeyDependencies(key_name=4)
    other = make_machine(seed=10)
    assert len(derive(MACHINE, facts)) == 16
    assert derive(MACHINE, facts) == derive(MACHINE, facts) != derive(other, facts)
