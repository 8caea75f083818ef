"""ENCLS[EINIT]: close an enclave's measurement and let it run."""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    SIGSTRUCT_HEADER,
    SIGSTRUCT_HEADER2,
    VENDOR_INTEL,
    AttributesFlags,
    EinitToken,
    PageType,
    SigStruct,
    Status,
)
from softsgx.hw.checks import svn_beyond
from softsgx.hw.faults import GeneralProtection, PageFault
from softsgx.hw.keys import derive, launch_hash, launch_token_key
from softsgx.hw.operands import Ref, misaligned
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secrets import cmac
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.signature import HARDCODED_PADDING, mrsigner_of, signature_valid

__all__ = ["einit"]

_EXPONENT = 3
_TOKEN_VALID = 1


def einit(cpu: LogicalProcessor, rbx: Ref | SigStruct, rcx: int, rdx: Ref | EinitToken) -> Status:
    """Initialise the enclave whose SECS is at ``rcx``, if signature and launch policy allow it.

    Args:
        cpu: the processor it runs on.
        rbx: SIGSTRUCT, 4096-byte aligned.
        rcx: the SECS, 4096-byte aligned.
        rdx: EINITTOKEN, 512-byte aligned; all zero when the signer itself may launch.

    Returns:
        ``SUCCESS``.  Unchanged otherwise: ``INVALID_SIG_STRUCT`` (form), ``UNMASKED_EVENT``
        (an event is pending: deliver it and repeat), ``INVALID_SIGNATURE``,
        ``INVALID_MEASUREMENT`` (not the enclave that was signed, or that the token is for),
        ``INVALID_ATTRIBUTE`` (SECS is not as signed, or asks for the launch key without the right
        to it), ``INVALID_EINITTOKEN`` (the signer may not launch, or the token is not valid),
        ``INVALID_CPUSVN`` (the token is of a later microcode).

    Raises:
        GeneralProtection: an operand is misaligned, the enclave is initialised, or another leaf
            holds the page or the measurement.
        PageFault: ``rcx`` is no EPC page, or holds no SECS.

    Source:
        SDM vol. 3D, "EINIT", Operation.  The order among codes is implementation-specific; this
        is the printed one.
    """
    # Operands
    if misaligned(rbx, PAGE_BYTES) or rcx % PAGE_BYTES or misaligned(rdx, EinitToken.ALIGN):
        raise GeneralProtection
    secs = cpu.resolve(rcx)
    sig, token = cpu.load(SigStruct, rbx), cpu.load(EinitToken, rdx)

    # A failure that the machine was asked for
    outcome = cpu.hw.einit_outcome
    if isinstance(outcome, Status):
        return outcome
    if outcome is not None:
        raise outcome

    # Checks of SIGSTRUCT alone
    if not _well_formed(sig):
        return Status.INVALID_SIG_STRUCT
    if cpu.event_pending:
        return Status.UNMASKED_EVENT
    if not signature_valid(sig):
        return Status.INVALID_SIGNATURE

    hw = cpu.hw
    with hw.leaf_locks() as locks:
        # Locks, and the checks that come between them
        if not locks.shared(secs):
            raise GeneralProtection
        if not secs.valid_as(PageType.SECS):
            raise PageFault(rcx)
        enclave = secs.owner
        if not enclave.flags & AttributesFlags.KSS and any(sig.isv_family_id + sig.isv_ext_prod_id):
            return Status.INVALID_SIG_STRUCT
        if not locks.measure(enclave):
            raise GeneralProtection
        hw.point("EINIT")

        # Checks
        if enclave.initialized:
            raise GeneralProtection
        return _check_and_commit(cpu, enclave, sig, token)


def _well_formed(sig: SigStruct) -> bool:
    return (
        sig.header == SIGSTRUCT_HEADER
        and sig.vendor in (0, VENDOR_INTEL)
        and sig.header2 == SIGSTRUCT_HEADER2
        and sig.exponent == _EXPONENT
        and not any(sig.reserved1 + sig.reserved2 + sig.reserved3 + sig.reserved4)
    )


def _check_and_commit(
    cpu: LogicalProcessor, enclave: ResidentSecs, sig: SigStruct, token: EinitToken
) -> Status:
    """Compare SECS with SIGSTRUCT and EINITTOKEN; commit.  The locks are held."""
    hw = cpu.hw
    mrenclave = hw.measurements[enclave.eid].copy().digest()
    mrsigner = mrsigner_of(sig)
    launcher = launch_hash(cpu.launch_key_hash)

    if sig.enclave_hash != mrenclave:
        return Status.INVALID_MEASUREMENT
    if enclave.flags & AttributesFlags.EINITTOKENKEY and mrsigner != launcher:
        return Status.INVALID_ATTRIBUTE
    if not _as_signed(enclave, sig, cet=hw.config.cet):
        return Status.INVALID_ATTRIBUTE
    if token.valid & _TOKEN_VALID:
        refused = _check_token(cpu, enclave, token, mrenclave, mrsigner, launcher)
        if refused:
            return refused
    elif mrsigner != launcher:
        return Status.INVALID_EINITTOKEN

    # Commit
    enclave.mrenclave, enclave.mrsigner = mrenclave, mrsigner
    enclave.isv_family_id, enclave.isv_ext_prod_id = sig.isv_family_id, sig.isv_ext_prod_id
    enclave.isv_prod_id, enclave.isv_svn = sig.isv_prod_id, sig.isv_svn
    enclave.padding = HARDCODED_PADDING
    # Last: a leaf that sees INIT sees all of the above.
    enclave.flags |= int(AttributesFlags.INIT)
    del hw.measurements[enclave.eid]
    return Status.SUCCESS


def _as_signed(enclave: ResidentSecs, sig: SigStruct, *, cet: bool) -> bool:
    """Return whether SECS has what the signer asked for, wherever a mask bit is set.

    INIT is still 0 in SECS, so a signer who asks for it never gets an enclave.
    """
    mask = sig.attribute_mask
    return not (
        (enclave.flags ^ sig.attributes.flags) & mask.flags
        or (enclave.xfrm ^ sig.attributes.xfrm) & mask.xfrm
        or (enclave.miscselect ^ sig.miscselect) & sig.misc_mask
        or (cet and (enclave.cet_attributes ^ sig.cet_attributes) & sig.cet_attributes_mask)
    )


def _check_token(
    cpu: LogicalProcessor,
    enclave: ResidentSecs,
    token: EinitToken,
    mrenclave: bytes,
    mrsigner: bytes,
    launcher: bytes,
) -> Status:
    """Return ``SUCCESS`` when a launch enclave of this machine allowed this very enclave."""
    hw = cpu.hw
    debug = AttributesFlags.DEBUG
    if token.masked_attributes_le.flags & debug and not enclave.flags & debug:
        return Status.INVALID_EINITTOKEN
    if not _token_reserved_ok(token, cet=hw.config.cet):
        return Status.INVALID_EINITTOKEN
    if svn_beyond(token.cpusvn_le, hw.cpusvn):
        return Status.INVALID_CPUSVN
    key = derive(hw, launch_token_key(hw, token, launcher))
    if cmac(key, token.pack()[: EinitToken.MACED_BYTES]) != token.mac:
        return Status.INVALID_EINITTOKEN
    if (token.mrenclave, token.mrsigner) != (mrenclave, mrsigner):
        return Status.INVALID_MEASUREMENT
    # Printed with a code name that does not exist.
    if (token.attributes.flags, token.attributes.xfrm) != (enclave.flags, enclave.xfrm):
        return Status.INVALID_ATTRIBUTE
    return Status.SUCCESS


def _token_reserved_ok(token: EinitToken, *, cet: bool) -> bool:
    if token.valid & ~_TOKEN_VALID or (token.cet_masked_attributes_le and not cet):
        return False
    return not any(token.reserved1 + token.reserved2 + token.reserved3 + token.reserved4)
