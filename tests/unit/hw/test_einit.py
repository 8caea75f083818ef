"""EINIT: what a signer and a launch policy let run.

Goal: each refusal with its code, the printed order of any two, and that a refusal leaves the
enclave to be tried again.  Method: a call that would succeed, with and without a token, is broken
row by row.

Source:
    SDM vol. 3D, "EINIT", Operation.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.checks import Check, assert_refused
from tests.support.hw import (
    build_enclave,
    launch_hash,
    make_machine,
    reg,
    secs_of,
    sign_sigstruct,
    signed,
)
from tests.support.paging import GP, OUTSIDE
from tests.support.scenes import CallScene, check, memory, operand, pairs, put, rows

from softsgx.arch import Attributes, AttributesFlags, EinitToken, Status
from softsgx.hw import GeneralProtection
from softsgx.hw.keys import derive, launch_token_key
from softsgx.hw.secrets import cmac
from softsgx.hw.signature import HARDCODED_PADDING, mrsigner_of

F = AttributesFlags
FLAGS = int(F.MODE64BIT)
Row = Check[Any]


NOBODY = [1, 2, 3, 4]
"""IA32_SGXLEPUBKEYHASH of a launch enclave whose key nobody here has."""


class Scene(CallScene):
    """An enclave before EINIT, whose SIGSTRUCT and token are sealed at the last moment.

    So whatever a row changes, only its own rule fails.

    Attributes:
        with_token: launch by token, because the signer is not the launch enclave's.
        bad_signature, bad_mac: spoil the seal.
    """

    def __init__(self, *, with_token: bool = False, flags: int = FLAGS, **config: Any) -> None:
        machine = make_machine(**config)
        source = secs_of(0x4000, flags=flags)
        built = build_enclave(machine, [reg(b"code")], secs=source, init=False)
        self.mrenclave = machine.measurements[built.enclave.eid].digest()
        sig = signed(self.mrenclave, source, isv_svn=3, isv_prod_id=4)
        super().__init__(
            machine, "einit", {"rbx": sig, "rcx": built.secs, "rdx": EinitToken()}, built
        )
        self.with_token, self.bad_signature, self.bad_mac = with_token, False, False
        machine.launch_key_hash[:] = NOBODY if with_token else launch_hash()
        if with_token:
            self.operands["rdx"] = EinitToken(
                valid=1,
                attributes=Attributes(flags=flags, xfrm=3),
                mrenclave=self.mrenclave,
                mrsigner=mrsigner_of(sig),
                cpusvn_le=machine.cpusvn,
                isv_prod_id_le=1,
                isv_svn_le=2,
                masked_attributes_le=Attributes(flags=F.INIT | F.EINITTOKENKEY),
                key_id=b"\7" * 32,
            )

    def seal(self) -> None:
        """Sign and MAC what stands there."""
        sigstruct = sign_sigstruct(self.operands["rbx"])
        self.operands["rbx"] = sigstruct.replace(q2=bytes(384)) if self.bad_signature else sigstruct
        token = self.operands["rdx"]
        if self.with_token:
            launcher = b"".join(v.to_bytes(8, "little") for v in self.machine.launch_key_hash)
            key = derive(self.machine, launch_token_key(self.machine, token, launcher))
            token.mac = bytes(16) if self.bad_mac else cmac(key, token.pack()[:192])

    def run(self) -> object:
        self.seal()
        return super().run()


def sig(**fields: object) -> Any:
    def violate(call: Scene) -> None:
        call.operands["rbx"] = call.operands["rbx"].replace(**fields)

    return violate


def token(**fields: object) -> Any:
    def violate(call: Scene) -> None:
        for name, value in fields.items():
            setattr(call.operands["rdx"], name, value)

    return violate


def not_the_launcher(call: Scene) -> None:
    call.machine.launch_key_hash[:] = NOBODY


def wants_launch_key(call: Scene) -> None:
    """SECS and SIGSTRUCT agree on EINITTOKENKEY, and the signer is not Intel's."""
    call.enclave.flags |= int(F.EINITTOKENKEY)
    mask = call.operands["rbx"].attribute_mask
    attributes = Attributes(flags=call.enclave.flags, xfrm=3)
    sig(attributes=attributes, attribute_mask=mask)(call)
    not_the_launcher(call)


def secs_type(call: Scene) -> None:
    call.operands["rcx"] = call.built.epc(0) + call.operands["rcx"] % 4096


def initialize(call: Scene) -> None:
    call.enclave.flags |= int(F.INIT)


def gone(call: Scene) -> None:
    call.page().valid = False


def held(call: Scene) -> None:
    call.page().lock = -1


def debug(call: Scene) -> None:
    call.enclave.flags |= int(F.DEBUG)


def of_secs(**fields: object) -> Any:
    def violate(call: Scene) -> None:
        for name, value in fields.items():
            setattr(call.enclave, name, value)

    return violate


S = Status
NO_EPC = frozenset({"RCX outside the EPC"})
FORM = S.INVALID_SIG_STRUCT
HEADERS = [
    check(3, "HEADER", sig(header=bytes(16)), FORM),
    check(3, "VENDOR", sig(vendor=0x8087), FORM),
    check(3, "HEADER2", sig(header2=bytes(16)), FORM),
    check(3, "EXPONENT", sig(exponent=65537), FORM),
    check(3, "reserved at 44", sig(reserved1=bytes(83) + b"\1"), FORM),
    check(3, "reserved at 910", sig(reserved2=b"\0\1"), FORM),
    check(3, "reserved at 992", sig(reserved3=b"\1" + bytes(15)), FORM),
    check(3, "reserved at 1028", sig(reserved4=bytes(11) + b"\1"), FORM),
]
COMMON = [
    check(1, "RBX misaligned", memory("rbx", 0x1_0800), GP),
    check(1, "RCX misaligned", operand("rcx", lambda rcx: rcx + 64), GP),
    check(1, "RDX misaligned", memory("rdx", 0x1_0100), GP),
    check(2, "RCX outside the EPC", operand("rcx", lambda rcx: OUTSIDE + rcx % 4096), "rcx"),
    HEADERS[0],
    check(4, "event pending", put(cpu__event_pending=True), S.UNMASKED_EVENT),
    check(5, "signature", put(bad_signature=True), S.INVALID_SIGNATURE),
    check(6, "RCX held exclusively", held, GP, hides=NO_EPC),
    check(7, "RCX holds a REG page", secs_type, "rcx", hides=NO_EPC | {"RCX held exclusively"}),
    check(7, "SECS not in use", gone, "rcx", hides=NO_EPC),
    check(8, "ISVFAMILYID without KSS", sig(isv_family_id=b"\1" * 16), FORM),
    check(9, "measurement held", of_secs(measurement_lock=True), GP),
    check(9, "initialised", initialize, GP),
    check(10, "another measurement", sig(enclave_hash=b"\1" * 32), S.INVALID_MEASUREMENT),
    check(11, "launch key for anybody", wants_launch_key, S.INVALID_ATTRIBUTE),
    check(12, "another ATTRIBUTES", debug, S.INVALID_ATTRIBUTE),
    check(12, "another XFRM", of_secs(xfrm=7), S.INVALID_ATTRIBUTE),
    check(13, "another MISCSELECT", of_secs(miscselect=1), S.INVALID_ATTRIBUTE),
]
WITHOUT_TOKEN = [
    *COMMON,
    check(15, "signer not the launcher", not_the_launcher, S.INVALID_EINITTOKEN),
]
BAD = S.INVALID_EINITTOKEN
DEBUG_LE = Attributes(flags=F.DEBUG)
# The comparisons of ATTRIBUTES come first for SIGSTRUCT and last for the token.
WITH_TOKEN = [
    *(row for row in COMMON if row.step in (1, 5, 10, 13)),
    check(16, "debug launcher of a production enclave", token(masked_attributes_le=DEBUG_LE), BAD),
    check(17, "token reserved bit", token(valid=3), BAD),
    check(17, "token reserved at 4", token(reserved1=b"\1" + bytes(43)), BAD),
    check(17, "token reserved at 96", token(reserved2=b"\1" + bytes(31)), BAD),
    check(17, "token reserved at 160", token(reserved3=b"\1" + bytes(31)), BAD),
    check(17, "token reserved at 213", token(reserved4=bytes(22) + b"\1"), BAD),
    check(17, "CET in the token without CET", token(cet_masked_attributes_le=1), BAD),
    check(18, "token of later microcode", token(cpusvn_le=b"\2" * 16), S.INVALID_CPUSVN),
    check(19, "token MAC", put(bad_mac=True), BAD),
    check(20, "token of another enclave", token(mrenclave=bytes(32)), S.INVALID_MEASUREMENT),
    check(20, "token of another signer", token(mrsigner=bytes(32)), S.INVALID_MEASUREMENT),
    check(
        21, "token of other attributes", token(attributes=Attributes(flags=FLAGS)),
        S.INVALID_ATTRIBUTE,
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", rows([*WITHOUT_TOKEN, *HEADERS[1:]]))
def test_einit_without_a_token_refuses_with_the_manuals_outcome(row: Row) -> None:
    assert_refused(Scene(), row)


@pytest.mark.parametrize("row", rows(WITH_TOKEN))
def test_einit_with_a_token_refuses_with_the_manuals_outcome(row: Row) -> None:
    assert_refused(Scene(with_token=True), row)


@pytest.mark.parametrize(("first", "later"), pairs(WITHOUT_TOKEN))
def test_the_earlier_of_two_failing_checks_decides(first: Row, later: Row) -> None:
    assert_refused(Scene(), first, later)


@pytest.mark.parametrize(("first", "later"), pairs([r for r in WITH_TOKEN if r.step >= 16]))
def test_the_earlier_of_two_failing_token_checks_decides(first: Row, later: Row) -> None:
    assert_refused(Scene(with_token=True), first, later)


def test_a_refused_enclave_can_be_initialised_afterwards() -> None:
    call = Scene()
    right = call.machine.launch_key_hash[:]
    not_the_launcher(call)
    assert call.run() is S.INVALID_EINITTOKEN
    call.machine.launch_key_hash[:] = right
    assert call.run() is S.SUCCESS


def test_an_outcome_that_the_machine_was_asked_for_changes_nothing() -> None:
    call = Scene()
    call.machine.einit_outcome = S.INVALID_MEASUREMENT
    assert call.run() is S.INVALID_MEASUREMENT
    call.machine.einit_outcome = GeneralProtection()
    assert call.run() == GP
    call.machine.einit_outcome = None
    assert call.run() is S.SUCCESS


@pytest.mark.parametrize("with_token", [False, True])
def test_success_writes_the_identity_and_nothing_else(with_token: bool) -> None:
    call = Scene(with_token=with_token)
    assert call.run() is S.SUCCESS
    secs, sigstruct = call.enclave, call.operands["rbx"]
    assert secs.flags == FLAGS | F.INIT and secs.initialized
    assert (secs.mrenclave, secs.mrsigner) == (call.mrenclave, mrsigner_of(sigstruct))
    assert (secs.isv_prod_id, secs.isv_svn) == (4, 3)
    assert secs.padding == HARDCODED_PADDING
    assert call.machine.measurements == {}
    assert call.page().lock == 0 and not secs.measurement_lock
    assert call.run() == GP, "EINIT is once in a life"


def test_a_debug_launcher_may_launch_a_debug_enclave() -> None:
    call = Scene(with_token=True, flags=FLAGS | F.DEBUG)
    token(masked_attributes_le=DEBUG_LE)(call)
    assert call.run() is S.SUCCESS


def test_operands_in_memory_are_the_same() -> None:
    call = Scene(with_token=True)
    call.at = {"rbx": 0x1_0000, "rdx": 0x2_0200}
    assert call.run() is S.SUCCESS


def test_with_kss_the_family_and_extended_product_ids_come_through() -> None:
    flags = FLAGS | F.KSS
    call = Scene(flags=flags)
    sig(isv_family_id=b"\1" * 16, isv_ext_prod_id=b"\2" * 16)(call)
    assert call.run() is S.SUCCESS
    assert (call.enclave.isv_family_id, call.enclave.isv_ext_prod_id) == (b"\1" * 16, b"\2" * 16)


def test_bits_outside_the_masks_do_not_matter() -> None:
    call = Scene(flags=FLAGS | F.DEBUG)
    mask = Attributes(flags=~int(F.DEBUG) & (1 << 64) - 1, xfrm=(1 << 64) - 1)
    sig(attributes=Attributes(flags=FLAGS, xfrm=3), attribute_mask=mask)(call)
    assert call.run() is S.SUCCESS


def test_a_signer_who_compares_init_gets_no_enclave() -> None:
    call = Scene()
    sig(attributes=Attributes(flags=FLAGS | F.INIT, xfrm=3))(call)
    assert call.run() is S.INVALID_ATTRIBUTE


def test_the_launch_enclaves_signer_may_have_the_launch_key() -> None:
    assert Scene(flags=FLAGS | F.EINITTOKENKEY).run() is S.SUCCESS


def test_with_cet_its_attributes_are_compared_too() -> None:
    for value, ends in ((1, S.SUCCESS), (3, S.INVALID_ATTRIBUTE)):
        call = Scene(flags=FLAGS | F.CET, attributes=F.MODE64BIT | F.CET)
        call.enclave.cet_attributes = 1
        sig(cet_attributes=value, cet_attributes_mask=0xFF)(call)
        assert call.run() is ends
