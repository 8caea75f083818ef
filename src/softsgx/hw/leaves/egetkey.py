"""ENCLU[EGETKEY]: a key that belongs to an enclave, its signer or its place."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    KeyName,
    KeyPolicy,
    KeyRequest,
    Status,
)
from softsgx.hw.access import enclave_operand
from softsgx.hw.checks import svn_beyond
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.keys import (
    derive,
    einit_token_key,
    launch_hash,
    provision_key,
    provision_seal_key,
    report_key,
    seal_key,
)
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.space import READ, WRITE

__all__ = ["egetkey"]

_KEY_BYTES = 16
_KEYS = {int(name): name for name in KeyName}
_COLUMNS = {
    KeyName.SEAL: seal_key,
    KeyName.REPORT: report_key,
    KeyName.EINITTOKEN: einit_token_key,
    KeyName.PROVISION: provision_key,
    KeyName.PROVISION_SEAL: provision_seal_key,
}


def egetkey(cpu: LogicalProcessor, rbx: int, rcx: int) -> Status:
    """Write the 16-byte key that KEYREQUEST asks for.

    Args:
        cpu: the processor, inside an enclave.
        rbx: KEYREQUEST, 512-byte aligned.
        rcx: where the key goes, 16-byte aligned.

    Returns:
        ``SUCCESS``.  Nothing written otherwise: ``INVALID_ATTRIBUTE`` (the enclave may not have
        this key), ``INVALID_CPUSVN``, ``INVALID_ISVSVN`` (of a later version than the platform's,
        or the enclave's own), ``INVALID_KEYNAME``.

    Raises:
        GeneralProtection: an operand is misaligned or outside ELRANGE, KEYREQUEST has reserved
            bits, or asks for key separation without ATTRIBUTES.KSS.
        PageFault: an operand is in no accessible REG page of the enclave.

    Source:
        SDM vol. 3D, "EGETKEY", Operation.
    """
    assert cpu.inside is not None, "EGETKEY outside an enclave"
    secs, hw = cpu.inside.enclave, cpu.hw

    # Operands
    if rbx % KeyRequest.ALIGN or not secs.covers(rbx):
        raise GeneralProtection
    request_page = enclave_operand(cpu, rbx, READ)
    if rcx % _KEY_BYTES or not secs.covers(rcx):
        raise GeneralProtection
    output_page = enclave_operand(cpu, rcx, WRITE)
    hw.point("EGETKEY")
    request = KeyRequest.unpack(hw.store.read(request_page, rbx % PAGE_BYTES, KeyRequest.SIZE))

    # Checks
    if not _request_legal(request, secs, cet=hw.config.cet):
        raise GeneralProtection
    name = _KEYS.get(request.key_name)
    if name is None:
        return Status.INVALID_KEYNAME
    refused = _refusal(cpu, name, secs, request)
    if refused:
        return refused

    # Commit
    key = derive(hw, _COLUMNS[name](hw, secs, request))
    hw.store.write(output_page, rcx % PAGE_BYTES, key)
    return Status.SUCCESS


def _request_legal(request: KeyRequest, secs: ResidentSecs, *, cet: bool) -> bool:
    if any(request.reserved1 + request.reserved2) or request.key_policy & KeyPolicy.RESERVED:
        return False
    if request.cet_attributes_mask and not cet:
        return False
    separated = request.key_policy & KeyPolicy.NEED_KSS or request.config_svn
    return bool(secs.flags & AttributesFlags.KSS) or not separated


def _refusal(
    cpu: LogicalProcessor, name: KeyName, secs: ResidentSecs, request: KeyRequest
) -> Status:
    """Return why the enclave does not get this key, ``SUCCESS`` when it does."""
    hw = cpu.hw
    match name:
        case KeyName.REPORT:
            return Status.SUCCESS
        case KeyName.SEAL:
            pass
        case KeyName.EINITTOKEN:
            if not secs.flags & AttributesFlags.EINITTOKENKEY:
                return Status.INVALID_ATTRIBUTE
            # The text asks for this, the flow does not print it; the code is modelled.
            if secs.mrsigner != launch_hash(cpu.launch_key_hash):
                return Status.INVALID_ATTRIBUTE
        case KeyName.PROVISION | KeyName.PROVISION_SEAL:
            if not secs.flags & AttributesFlags.PROVISIONKEY:
                return Status.INVALID_ATTRIBUTE
    if svn_beyond(request.cpusvn, hw.cpusvn):
        return Status.INVALID_CPUSVN
    if request.isv_svn > secs.isv_svn:
        return Status.INVALID_ISVSVN
    if name is KeyName.SEAL and request.config_svn > secs.config_svn:
        return Status.INVALID_ISVSVN
    return Status.SUCCESS
