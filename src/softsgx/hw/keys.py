"""Key derivation: the inputs of each key.

One function for each column of the manual's table, all of them pure; a key is the package's
derivation function over a fixed serialisation of the inputs.

Source:
    SDM vol. 3D, "EGETKEY", table "Key Derivation"; "EREPORT" and "EINIT", TMP_KEYDEPENDENCIES.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softsgx.arch import (
    PADDING_BYTES,
    Attributes,
    EinitToken,
    KeyName,
    KeyPolicy,
    KeyRequest,
    TargetInfo,
)
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.signature import HARDCODED_PADDING
from softsgx.layout import U8, U16, U32, Nested, Raw, Structure, at

if TYPE_CHECKING:
    from softsgx.hw.machine import Machine

__all__ = [
    "KeyDependencies",
    "derive",
    "einit_token_key",
    "launch_hash",
    "launch_token_key",
    "provision_key",
    "provision_seal_key",
    "report_key",
    "seal_key",
    "target_report_key",
]

_REQUIRED_SEALING_FLAGS = 3  # INIT and DEBUG are in every key
_ALL_32 = 0xFFFF_FFFF
_LAUNCH_HASH = struct.Struct("<4Q")


class KeyDependencies(Structure, size=644):
    """The inputs of a key; a field that a column leaves out is zero.

    Deviation: only the set of inputs is architectural; we choose their order.
    """

    key_name: int = at(0, U16)
    key_policy: int = at(2, U16)
    isv_prod_id: int = at(4, U16)
    isv_svn: int = at(6, U16)
    config_svn: int = at(8, U16)
    cet_attributes: int = at(10, U8)
    cet_attributes_mask: int = at(11, U8)
    miscselect: int = at(12, U32)
    misc_mask: int = at(16, U32)
    attributes: Attributes = at(20, Nested(Attributes))
    attribute_mask: Attributes = at(36, Nested(Attributes))
    isv_family_id: bytes = at(52, Raw(16))
    isv_ext_prod_id: bytes = at(68, Raw(16))
    owner_epoch: bytes = at(84, Raw(16))
    seal_fuses: bytes = at(100, Raw(16))
    cpusvn: bytes = at(116, Raw(16))
    mrenclave: bytes = at(132, Raw(32))
    mrsigner: bytes = at(164, Raw(32))
    key_id: bytes = at(196, Raw(32))
    config_id: bytes = at(228, Raw(64))
    padding: bytes = at(292, Raw(PADDING_BYTES))


def launch_hash(registers: Sequence[int]) -> bytes:
    """Return IA32_SGXLEPUBKEYHASH0–3 as the 32 bytes of an MRSIGNER."""
    return _LAUNCH_HASH.pack(*registers)


def derive(hw: Machine, facts: KeyDependencies) -> bytes:
    """Return the 16-byte key of ``facts`` on this package."""
    return hw.secrets.derive(facts.pack())


def seal_key(hw: Machine, secs: ResidentSecs, request: KeyRequest) -> KeyDependencies:
    """EGETKEY, SEAL: seals secrets of an enclave, or of all enclaves of its signer."""
    policy = request.key_policy
    config = policy & KeyPolicy.CONFIGID
    return KeyDependencies(
        key_name=KeyName.SEAL,
        isv_family_id=secs.isv_family_id if policy & KeyPolicy.ISVFAMILYID else bytes(16),
        isv_ext_prod_id=secs.isv_ext_prod_id if policy & KeyPolicy.ISVEXTPRODID else bytes(16),
        isv_prod_id=0 if policy & KeyPolicy.NOISVPRODID else secs.isv_prod_id,
        isv_svn=request.isv_svn,
        owner_epoch=hw.secrets.owner_epoch,
        attributes=_masked_attributes(secs, request),
        attribute_mask=request.attribute_mask,
        mrenclave=secs.mrenclave if policy & KeyPolicy.MRENCLAVE else bytes(32),
        mrsigner=secs.mrsigner if policy & KeyPolicy.MRSIGNER else bytes(32),
        key_id=request.key_id,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=request.cpusvn,
        padding=secs.padding,
        miscselect=request.misc_mask & secs.miscselect,
        misc_mask=~request.misc_mask & _ALL_32,
        key_policy=policy,
        config_id=secs.config_id if config else bytes(64),
        config_svn=request.config_svn if config else 0,
        cet_attributes=request.cet_attributes_mask & secs.cet_attributes,
        cet_attributes_mask=request.cet_attributes_mask,
    )


def report_key(hw: Machine, secs: ResidentSecs, request: KeyRequest) -> KeyDependencies:
    """EGETKEY, REPORT: an enclave verifies reports with it that name it as their target."""
    return KeyDependencies(
        key_name=KeyName.REPORT,
        owner_epoch=hw.secrets.owner_epoch,
        attributes=Attributes(flags=secs.flags, xfrm=secs.xfrm),
        mrenclave=secs.mrenclave,
        key_id=request.key_id,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=hw.cpusvn,
        padding=HARDCODED_PADDING,
        miscselect=secs.miscselect,
        config_id=secs.config_id,
        config_svn=secs.config_svn,
        cet_attributes=secs.cet_attributes,
    )


def target_report_key(hw: Machine, secs: ResidentSecs, target: TargetInfo) -> KeyDependencies:
    """EREPORT: the key that only ``target`` gets from EGETKEY."""
    return KeyDependencies(
        key_name=KeyName.REPORT,
        owner_epoch=hw.secrets.owner_epoch,
        attributes=target.attributes,
        mrenclave=target.measurement,
        key_id=hw.secrets.report_key_id,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=hw.cpusvn,
        padding=secs.padding,
        miscselect=target.miscselect,
        config_id=target.config_id,
        config_svn=target.config_svn,
        cet_attributes=target.cet_attributes,
    )


def einit_token_key(hw: Machine, secs: ResidentSecs, request: KeyRequest) -> KeyDependencies:
    """EGETKEY, EINITTOKEN: a launch enclave computes the MAC of tokens with it."""
    return KeyDependencies(
        key_name=KeyName.EINITTOKEN,
        isv_prod_id=secs.isv_prod_id,
        isv_svn=request.isv_svn,
        owner_epoch=hw.secrets.owner_epoch,
        attributes=_masked_attributes(secs, request),
        mrsigner=secs.mrsigner,
        key_id=request.key_id,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=request.cpusvn,
        padding=secs.padding,
        miscselect=request.misc_mask & secs.miscselect,
        cet_attributes=request.cet_attributes_mask & secs.cet_attributes,
    )


def launch_token_key(hw: Machine, token: EinitToken, launch_mrsigner: bytes) -> KeyDependencies:
    """EINIT: the key of the launch enclave that ``token`` names.

    Args:
        hw: the machine.
        token: the EINITTOKEN.
        launch_mrsigner: IA32_SGXLEPUBKEYHASH as 32 bytes.
    """
    return KeyDependencies(
        key_name=KeyName.EINITTOKEN,
        isv_prod_id=token.isv_prod_id_le,
        isv_svn=token.isv_svn_le,
        owner_epoch=hw.secrets.owner_epoch,
        attributes=token.masked_attributes_le,
        mrsigner=launch_mrsigner,
        key_id=token.key_id,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=token.cpusvn_le,
        padding=HARDCODED_PADDING,
        miscselect=token.masked_miscselect_le,
        cet_attributes=token.cet_masked_attributes_le,
    )


def provision_key(_hw: Machine, secs: ResidentSecs, request: KeyRequest) -> KeyDependencies:
    """EGETKEY, PROVISION: the same for every owner and every package of a kind.

    Deviation: on silicon this key comes from provisioning secrets that Intel knows; here from the
    same device key as all others, so it is the package's own.
    """
    return KeyDependencies(
        key_name=KeyName.PROVISION,
        isv_prod_id=secs.isv_prod_id,
        isv_svn=request.isv_svn,
        attributes=_masked_attributes(secs, request),
        attribute_mask=request.attribute_mask,
        mrsigner=secs.mrsigner,
        cpusvn=request.cpusvn,
        padding=secs.padding,
        miscselect=request.misc_mask & secs.miscselect,
        misc_mask=~request.misc_mask & _ALL_32,
        cet_attributes=request.cet_attributes_mask & secs.cet_attributes,
    )


def provision_seal_key(hw: Machine, secs: ResidentSecs, request: KeyRequest) -> KeyDependencies:
    """EGETKEY, PROVISION_SEAL: seals secrets of a provisioning enclave, for any platform owner."""
    policy = request.key_policy
    config = policy & KeyPolicy.CONFIGID
    return KeyDependencies(
        key_name=KeyName.PROVISION_SEAL,
        isv_family_id=secs.isv_family_id if policy & KeyPolicy.ISVFAMILYID else bytes(16),
        isv_ext_prod_id=secs.isv_ext_prod_id if policy & KeyPolicy.ISVEXTPRODID else bytes(16),
        isv_prod_id=0 if policy & KeyPolicy.NOISVPRODID else secs.isv_prod_id,
        isv_svn=request.isv_svn,
        attributes=_masked_attributes(secs, request),
        attribute_mask=request.attribute_mask,
        mrsigner=secs.mrsigner,
        seal_fuses=hw.secrets.seal_fuses,
        cpusvn=request.cpusvn,
        padding=secs.padding,
        miscselect=request.misc_mask & secs.miscselect,
        misc_mask=~request.misc_mask & _ALL_32,
        key_policy=policy,
        config_id=secs.config_id if config else bytes(64),
        config_svn=request.config_svn if config else 0,
        cet_attributes=request.cet_attributes_mask & secs.cet_attributes,
    )


def _masked_attributes(secs: ResidentSecs, request: KeyRequest) -> Attributes:
    mask = request.attribute_mask
    return Attributes(
        flags=(mask.flags | _REQUIRED_SEALING_FLAGS) & secs.flags, xfrm=mask.xfrm & secs.xfrm
    )
