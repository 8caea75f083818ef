"""EREPORT, EGETKEY and EVERIFYREPORT2, as an enclave uses them.

Goal: which enclave can verify a report or gets a key, and each refusal in its order.  Method: real
enclaves that real entries went into; calls that would succeed are broken row by row.

Source:
    SDM vol. 3D, "EREPORT", "EGETKEY", Operation; "EVERIFYREPORT2".
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
from tests.support.hw import (
    Built,
    PageSpec,
    build_enclave,
    enter,
    launch_hash,
    make_machine,
    reg,
    secs_of,
    tcs,
)
from tests.support.paging import GP
from tests.support.scenes import state_of

from softsgx.arch import (
    Attributes,
    AttributesFlags,
    KeyName,
    KeyPolicy,
    KeyRequest,
    Pfec,
    Report,
    ReportMacStruct,
    Status,
    TargetInfo,
)
from softsgx.hw import GeneralProtection, LogicalProcessor, Machine, PageFault
from softsgx.hw.secrets import cmac
from softsgx.layout import Structure

F, K, S = AttributesFlags, KeyName, Status
FLAGS = F.MODE64BIT | F.PROVISIONKEY | F.EINITTOKENKEY | F.KSS
SIZE = 0x10000
TCS_AT, IN, OUT, DATA = 0x1000, 0x3000, 0x4000, 0x6000
NEWER = b"\2" + bytes(15)
BASES = (0x7000_0000_0000, 0x7100_0000_0000)
CONFIG_ID = bytes(range(64))


class Scene:
    """An enclave with a processor inside, which runs one ENCLU leaf."""

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        number: int = 0,
        flags: int = FLAGS,
        code: bytes = b"one",
        **fields: Any,
    ) -> None:
        self.machine = make_machine() if machine is None else machine
        kss: dict[str, Any] = {"config_id": CONFIG_ID, "config_svn": 5} if flags & F.KSS else {}
        pages: list[PageSpec] = [
            reg(code), tcs(ossa=0x2000), reg(), reg(), reg(), reg(rights=1), reg(rights=2 | 1),
        ]  # fmt: skip
        self.built: Built = build_enclave(
            self.machine,
            pages,
            secs=secs_of(SIZE, BASES[number], flags=flags, **kss),
            isv_svn=4,
            isv_prod_id=9,
            **fields,
        )
        self.cpu: LogicalProcessor = enter(self.built, TCS_AT, number)
        self.base = self.built.base
        self.operands: dict[str, int] = {}
        self.leaf = ""

    @property
    def secs(self) -> Any:
        return self.built.enclave

    def put(self, offset: int, value: Structure | bytes) -> int:
        """Store into the enclave and return the linear address."""
        data = value if isinstance(value, bytes) else value.pack()
        page = self.built.page(offset & ~0xFFF)
        self.machine.store.write(page, offset % 4096, data)
        return self.base + offset

    def call(self, leaf: str, **operands: int) -> object:
        return outcome(partial(getattr(self.cpu.enclu, leaf), *operands.values()))

    def run(self) -> object:
        return self.call(self.leaf, **self.operands)

    # --- what enclaves do -------------------------------------------------------------------

    def target_info(self) -> TargetInfo:
        """The TARGETINFO that names this enclave."""
        secs = self.secs
        return TargetInfo(
            measurement=secs.mrenclave,
            attributes=Attributes(flags=secs.flags, xfrm=secs.xfrm),
            config_svn=secs.config_svn,
            miscselect=secs.miscselect,
            config_id=secs.config_id,
        )

    def report(self, target: TargetInfo, data: bytes = bytes(64)) -> Report:
        ends = self.call(
            "ereport",
            rbx=self.put(IN, target),
            rcx=self.put(DATA, data),
            rdx=self.base + OUT,
        )
        assert ends is None, f"EREPORT ended as {ends!r}"
        return Report.unpack(self.built.read(OUT, Report.SIZE))

    def key(self, request: KeyRequest) -> bytes:
        ends = self.call("egetkey", rbx=self.put(IN, request), rcx=self.base + OUT)
        assert ends is S.SUCCESS, f"EGETKEY ended as {ends!r}"
        return self.built.read(OUT, 16)

    def verifies(self, report: Report) -> bool:
        key = self.key(KeyRequest(key_name=K.REPORT, key_id=report.key_id))
        return cmac(key, report.pack()[:384]) == report.mac


def outcome(run: Callable[[], object]) -> object:
    """How an ENCLU leaf ends: its code, ``None``, GP, or a page fault's kind and address."""
    try:
        return run()
    except GeneralProtection:
        return GP
    except PageFault as fault:
        kind = "#PF" if fault.code & Pfec.U else "#PF of the supervisor"
        return (f"{kind} SGX" if fault.code & Pfec.SGX else kind, fault.address)


# --- EREPORT and EGETKEY together ------------------------------------------------------------


def two_enclaves(machine: Machine) -> tuple[Scene, Scene]:
    return Scene(machine, number=0), Scene(machine, number=1, code=b"two", flags=F.MODE64BIT)


def test_exactly_the_target_can_verify_a_report() -> None:
    one, two = two_enclaves(make_machine())
    report = one.report(two.target_info(), b"\5" * 64)
    assert report.report_data == b"\5" * 64
    assert two.verifies(report)
    assert not one.verifies(report)
    assert one.verifies(one.report(one.target_info()))


def test_a_report_says_what_secs_says() -> None:
    one = Scene()
    report, secs = one.report(TargetInfo()), one.secs
    assert report.cpusvn == one.machine.cpusvn
    for name in ("mrenclave", "mrsigner", "config_id", "config_svn", "isv_svn", "isv_prod_id",
                 "isv_family_id", "isv_ext_prod_id", "miscselect", "cet_attributes"):  # fmt: skip
        assert getattr(report, name) == getattr(secs, name), name
    assert (report.attributes.flags, report.attributes.xfrm) == (secs.flags, secs.xfrm)
    assert (report.isv_svn, report.isv_prod_id, report.config_svn) == (4, 9, 5)


@pytest.mark.parametrize("field", ["measurement", "config_id"])
def test_a_report_for_another_target_does_not_verify(field: str) -> None:
    one, two = two_enclaves(make_machine())
    target = two.target_info()
    changed = bytearray(getattr(target, field))
    changed[-1] ^= 1
    assert not two.verifies(one.report(target.replace(**{field: bytes(changed)})))


def test_a_changed_report_does_not_verify() -> None:
    one, two = two_enclaves(make_machine())
    data = one.report(two.target_info()).pack()
    for at in (0, 16, 48, 64, 128, 256, 320, 383, 416):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert not two.verifies(Report.unpack(changed)), at


def test_a_report_of_another_power_cycle_still_verifies_through_its_key_id() -> None:
    machine = make_machine()
    one, two = two_enclaves(machine)
    report = one.report(two.target_info())
    machine.secrets.report_key_id = b"\1" * 32
    assert two.verifies(report)
    assert one.report(two.target_info()).mac != report.mac


# --- who gets which key ----------------------------------------------------------------------


def seal(policy: int = KeyPolicy.MRENCLAVE, **fields: object) -> KeyRequest:
    return KeyRequest(key_name=K.SEAL, key_policy=int(policy), **fields)


def test_seal_keys_follow_the_policy() -> None:
    one, two = two_enclaves(make_machine())
    both = Attributes(flags=0)
    for policy, same in ((KeyPolicy.MRENCLAVE, False), (KeyPolicy.MRSIGNER, True)):
        request = seal(policy, attribute_mask=both)
        assert (one.key(request) == two.key(request)) is same


def test_seal_keys_survive_a_power_cycle_and_a_new_place() -> None:
    machine = make_machine()
    request = seal(KeyPolicy.MRENCLAVE | KeyPolicy.MRSIGNER, key_id=b"\1" * 32)
    before = Scene(machine).key(request)
    machine.power_transition()
    assert Scene(machine).key(request) == before
    assert Scene(make_machine(seed=77)).key(request) != before


def test_a_debug_enclave_never_gets_production_keys() -> None:
    machine = make_machine()
    request = seal(KeyPolicy.MRSIGNER, attribute_mask=Attributes(flags=0))
    production = Scene(machine, number=0)
    debug = Scene(machine, number=1, flags=FLAGS | F.DEBUG)
    assert production.key(request) != debug.key(request)


def test_every_key_name_is_another_key() -> None:
    scene = Scene()
    keys = {scene.key(KeyRequest(key_name=name, key_policy=KeyPolicy.MRSIGNER)) for name in KeyName}
    assert len(keys) == len(KeyName)


def test_an_older_isv_svn_may_be_asked_for_and_is_another_key() -> None:
    scene = Scene()
    assert len({scene.key(seal(isv_svn=svn)) for svn in range(5)}) == 5


# --- refusals --------------------------------------------------------------------------------


def egetkey(request: KeyRequest, **config: Any) -> Scene:
    scene = Scene(**config)
    scene.leaf = "egetkey"
    scene.operands = {"rbx": scene.put(IN, request), "rcx": scene.base + OUT + 16}
    return scene


def ereport(target: TargetInfo | None = None) -> Scene:
    scene = Scene()
    scene.leaf = "ereport"
    scene.operands = {
        "rbx": scene.put(IN, TargetInfo() if target is None else target),
        "rcx": scene.put(DATA, b"\1" * 64),
        "rdx": scene.base + OUT,
    }
    return scene


def verify(**fields: object) -> Scene:
    scene = Scene()
    scene.leaf = "everifyreport2"
    struct = ReportMacStruct(type=0x81, cpusvn=scene.machine.cpusvn, **fields)
    scene.operands = {"rbx": scene.put(IN, seal_tee_report(scene.machine, struct))}
    return scene


def seal_tee_report(machine: Machine, report: ReportMacStruct) -> ReportMacStruct:
    key = machine.secrets.tee_report_key
    return report.replace(mac=hmac.digest(key, report.pack()[:224], "sha256"))


CODES: dict[str, tuple[dict[str, object], Status]] = {
    "SEAL of later microcode": ({"key_name": K.SEAL, "cpusvn": NEWER}, S.INVALID_CPUSVN),
    "SEAL of a later ISVSVN": ({"key_name": K.SEAL, "isv_svn": 5}, S.INVALID_ISVSVN),
    "SEAL of a later CONFIGSVN": ({"key_name": K.SEAL, "config_svn": 6}, S.INVALID_ISVSVN),
    "PROVISION of later microcode": ({"key_name": K.PROVISION, "cpusvn": NEWER}, S.INVALID_CPUSVN),
    "PROVISION of a later ISVSVN": ({"key_name": K.PROVISION, "isv_svn": 5}, S.INVALID_ISVSVN),
    "PROVISION_SEAL of a later ISVSVN": (
        {"key_name": K.PROVISION_SEAL, "isv_svn": 5}, S.INVALID_ISVSVN,
    ),
    "EINITTOKEN of later microcode": (
        {"key_name": K.EINITTOKEN, "cpusvn": NEWER}, S.INVALID_CPUSVN,
    ),
    "EINITTOKEN of a later ISVSVN": ({"key_name": K.EINITTOKEN, "isv_svn": 5}, S.INVALID_ISVSVN),
    "no such key": ({"key_name": 5}, S.INVALID_KEYNAME),
    "microcode before ISVSVN": (
        {"key_name": K.SEAL, "cpusvn": NEWER, "isv_svn": 5}, S.INVALID_CPUSVN,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code"), [pytest.param(*value, id=key) for key, value in CODES.items()]
)
def test_egetkey_refuses_with_a_code_and_writes_nothing(
    fields: dict[str, object], code: Status
) -> None:
    scene = egetkey(KeyRequest(**fields))
    before = state_of(scene.machine)
    assert scene.run() is code
    assert state_of(scene.machine) == before


@pytest.mark.parametrize("name", [K.EINITTOKEN, K.PROVISION, K.PROVISION_SEAL])
def test_special_keys_need_their_attribute_before_anything_else(name: KeyName) -> None:
    request = KeyRequest(key_name=name, cpusvn=NEWER, isv_svn=9)
    scene = egetkey(request, flags=F.MODE64BIT)
    assert scene.run() is S.INVALID_ATTRIBUTE


def test_the_launch_key_is_for_the_launch_enclaves_signer_only() -> None:
    scene = egetkey(KeyRequest(key_name=K.EINITTOKEN))
    assert scene.run() is S.SUCCESS
    scene.machine.launch_key_hash[0] ^= 1
    assert scene.run() is S.INVALID_ATTRIBUTE
    scene.machine.launch_key_hash[:] = launch_hash()
    assert scene.run() is S.SUCCESS


def test_a_report_key_depends_on_no_version() -> None:
    request = KeyRequest(key_name=K.REPORT, cpusvn=b"\xff" * 16, isv_svn=0xFFFF)
    assert egetkey(request, flags=F.MODE64BIT).run() is S.SUCCESS


@pytest.mark.parametrize(
    "fields",
    [
        {"reserved1": b"\1"},
        {"reserved2": bytes(433) + b"\1"},
        {"key_policy": 1 << 6},
        {"key_policy": 1 << 15},
        {"cet_attributes_mask": 1},
    ],
    ids=str,
)
def test_reserved_bits_of_keyrequest_fault_before_any_code(fields: dict[str, object]) -> None:
    assert egetkey(KeyRequest(key_name=99, **fields)).run() == GP


@pytest.mark.parametrize(
    "fields", [{"key_policy": bit} for bit in (4, 8, 16, 32)] + [{"config_svn": 1}], ids=str
)
def test_key_separation_needs_kss(fields: dict[str, int]) -> None:
    request = KeyRequest(key_name=K.SEAL, **fields)
    assert egetkey(request).run() is S.SUCCESS
    assert egetkey(request, flags=F.MODE64BIT).run() == GP


TARGET_RESERVED = [
    {"reserved1": b"\1"},
    {"reserved2": bytes(7) + b"\1"},
    {"reserved3": bytes(383) + b"\1"},
    {"cet_attributes": 1},
]


@pytest.mark.parametrize("fields", TARGET_RESERVED, ids=str)
def test_reserved_bits_of_targetinfo_fault(fields: dict[str, object]) -> None:
    scene = ereport(TargetInfo(**fields))
    before = state_of(scene.machine)
    assert scene.run() == GP
    assert state_of(scene.machine) == before


def test_with_cet_its_attributes_are_no_reserved_bits() -> None:
    machine = make_machine(attributes=FLAGS | F.CET)
    scene = Scene(machine)
    plain = scene.report(TargetInfo())
    assert scene.report(TargetInfo(cet_attributes=1)).mac != plain.mac
    request = KeyRequest(key_name=K.SEAL, cet_attributes_mask=0xFF)
    assert scene.key(request) != scene.key(request.replace(cet_attributes_mask=0))


def test_a_later_configsvn_matters_to_seal_keys_only() -> None:
    for name in (K.PROVISION, K.PROVISION_SEAL, K.REPORT):
        assert egetkey(KeyRequest(key_name=name, config_svn=6)).run() is S.SUCCESS


# --- operands: one after the other, each aligned, inside, and a page that may be used -----------

ALIGNS = {
    "ereport": {"rbx": 512, "rcx": 128, "rdx": 512},
    "egetkey": {"rbx": 512, "rcx": 16},
    "everifyreport2": {"rbx": 256},
}
WRITTEN = {("ereport", "rdx"), ("egetkey", "rcx")}
READ_ONLY, NOWHERE = 0x5000, 0x8000
MAKE: dict[str, Callable[[], Scene]] = {
    "ereport": ereport,
    "egetkey": partial(egetkey, seal()),
    "everifyreport2": verify,
}
OPERANDS = [(leaf, register) for leaf, names in ALIGNS.items() for register in names]


def misalign(scene: Scene, register: str) -> object:
    scene.operands[register] += ALIGNS[scene.leaf][register] // 2
    return GP


def leave_elrange(scene: Scene, register: str) -> object:
    scene.operands[register] = scene.base + SIZE + scene.operands[register] % 4096
    return GP


def unmapped(scene: Scene, register: str) -> object:
    scene.operands[register] = scene.base + NOWHERE + scene.operands[register] % 4096
    return ("#PF", scene.operands[register])


def use_tcs(scene: Scene, register: str) -> object:
    scene.operands[register] = scene.base + TCS_AT + scene.operands[register] % 4096
    return ("#PF SGX", scene.operands[register])


BREAKS = [misalign, leave_elrange, unmapped, use_tcs]


@pytest.mark.parametrize(("leaf", "register"), OPERANDS)
@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
def test_an_operand_must_be_aligned_inside_and_usable(
    leaf: str, register: str, break_it: Any
) -> None:
    scene = MAKE[leaf]()
    ends = break_it(scene, register)
    before = state_of(scene.machine)
    assert scene.run() == ends
    assert state_of(scene.machine) == before


@pytest.mark.parametrize("leaf", ["ereport", "egetkey"])
def test_operands_are_looked_at_in_the_order_of_the_registers(leaf: str) -> None:
    for first, later in combinations(ALIGNS[leaf], 2):
        for early, late in ((misalign, use_tcs), (use_tcs, misalign), (use_tcs, use_tcs)):
            scene = MAKE[leaf]()
            ends = early(scene, first)
            late(scene, later)
            assert scene.run() == ends


@pytest.mark.parametrize(("leaf", "register"), sorted(WRITTEN))
def test_output_needs_a_writable_page_and_input_does_not(leaf: str, register: str) -> None:
    scene = MAKE[leaf]()
    scene.operands[register] = scene.base + READ_ONLY
    assert scene.run() == ("#PF SGX", scene.operands[register])
    scene = MAKE[leaf]()
    data = scene.built.read(IN, 512)
    page = scene.built.page(READ_ONLY)
    scene.machine.store.write(page, 0, data)
    scene.operands["rbx"] = scene.base + READ_ONLY
    assert scene.run() in (None, S.SUCCESS)


@pytest.mark.parametrize("state", ["blocked", "pending", "modified"])
def test_a_page_in_transition_is_no_operand(state: str) -> None:
    for leaf, register in OPERANDS:
        scene = MAKE[leaf]()
        at = scene.operands[register]
        setattr(scene.built.page((at - scene.base) & ~0xFFF), state, True)
        # The first operand in that page is the one that faults.
        first = next(
            address for address in scene.operands.values() if address & ~0xFFF == at & ~0xFFF
        )
        assert scene.run() == ("#PF SGX", first)


# --- EVERIFYREPORT2 --------------------------------------------------------------------------


def test_a_report_mac_struct_of_this_package_verifies() -> None:
    assert verify(report_data=b"\1" * 64).run() is S.SUCCESS


@pytest.mark.parametrize("at", [*range(4, 224, 20), 224, 255])
def test_a_changed_report_mac_struct_does_not(at: int) -> None:
    scene = verify()
    byte = scene.built.read(IN + at, 1)[0]
    scene.put(IN + at, bytes([byte ^ 0x80]))
    code = S.INVALID_CPUSVN if 16 <= at < 32 else S.INVALID_REPORTMACSTRUCT
    assert scene.run() is code


@pytest.mark.parametrize(
    "fields",
    [
        {"subtype": 1},
        {"version": 1},
        {"reserved1": b"\1"},
        {"reserved2": b"\1" * 12},
        {"reserved3": b"\1" * 32},
    ],
    ids=str,
)
def test_a_well_sealed_struct_of_another_form_is_refused(fields: dict[str, object]) -> None:
    assert verify(**fields).run() is S.INVALID_REPORTMACSTRUCT


def test_form_comes_before_cpusvn_and_that_before_the_mac() -> None:
    scene = verify()
    struct = ReportMacStruct(type=0x81, cpusvn=NEWER)
    scene.put(IN, struct)
    assert scene.run() is S.INVALID_CPUSVN
    scene.put(IN, struct.replace(type=0))
    assert scene.run() is S.INVALID_REPORTMACSTRUCT
    older = seal_tee_report(scene.machine, struct.replace(cpusvn=bytes(16)))
    scene.put(IN, older)
    assert scene.run() is S.SUCCESS
