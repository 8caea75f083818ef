"""RDMSR and WRMSR for the registers that SGX uses.

Any other register raises #GP(0).

Source:
    SDM vol. 4, "Model-Specific Registers"; vol. 3D, "Intel SGX Launch Control Configuration",
    "Owner Epoch".
"""

from __future__ import annotations

from softsgx.arch import FEATURE_CONTROL_READY, FeatureControl, Msr, SgxFeature
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor

__all__ = ["rdmsr", "wrmsr"]

_HASH = range(Msr.IA32_SGXLEPUBKEYHASH0, Msr.IA32_SGXLEPUBKEYHASH3 + 1)
_OWNER = range(Msr.MSR_SGXOWNER0, Msr.MSR_SGXOWNER1 + 1)
_HASH_WRITABLE = FeatureControl.LOCK | FeatureControl.SGX_LAUNCH_CONTROL
_MASK_64 = (1 << 64) - 1
_OWNER_BYTES = 8


def rdmsr(cpu: LogicalProcessor, msr: int) -> int:
    """Return the 64 bits of a model-specific register.

    Raises:
        GeneralProtection: not at CPL 0, or there is no such register, or it cannot be read.
    """
    hw = cpu.hw
    if cpu.cpl:
        raise GeneralProtection
    if msr == Msr.IA32_FEATURE_CONTROL:
        return int(hw.feature_control)
    if not hw.config.features & SgxFeature.SGX1:
        raise GeneralProtection
    if msr in _HASH and hw.config.launch_control:
        return cpu.launch_key_hash[msr - _HASH.start]
    if msr == Msr.IA32_SGX_SVN_STATUS:
        # No authenticated code module was launched: not locked, SINIT SVN 0.
        return 0
    raise GeneralProtection


def wrmsr(cpu: LogicalProcessor, msr: int, value: int) -> None:
    """Write a model-specific register.

    IA32_FEATURE_CONTROL takes writes until its LOCK is set.  IA32_SGXLEPUBKEYHASHn can be written
    iff there is SGX1 and FEATURE_CONTROL is locked with launch control enabled.  The owner epoch
    is write-only and no longer changes once SGX is enabled.  IA32_SGX_SVN_STATUS is read-only.

    Modelled: of IA32_FEATURE_CONTROL only the three bits that SGX uses exist.

    Args:
        cpu: the processor; the registers belong to its package.
        msr: the register's address.
        value: 64 bits.

    Raises:
        GeneralProtection: not at CPL 0, or there is no such register, it cannot be written now,
            or the value has reserved bits.
    """
    hw = cpu.hw
    assert 0 <= value <= _MASK_64, f"WRMSR of {value:#x}, which is no 64-bit value"
    if cpu.cpl:
        raise GeneralProtection
    sgx = bool(hw.config.features & SgxFeature.SGX1)
    if msr == Msr.IA32_FEATURE_CONTROL:
        known = int(FeatureControl.LOCK)
        if sgx:
            known |= FeatureControl.SGX_ENABLE
        if sgx and hw.config.launch_control:
            known |= FeatureControl.SGX_LAUNCH_CONTROL
        if hw.feature_control & FeatureControl.LOCK or value & ~int(known):
            raise GeneralProtection
        hw.feature_control = value
    elif msr in _HASH and sgx and hw.feature_control & _HASH_WRITABLE == _HASH_WRITABLE:
        cpu.launch_key_hash[msr - _HASH.start] = value
    elif msr in _OWNER and sgx:
        if hw.feature_control & FEATURE_CONTROL_READY != FEATURE_CONTROL_READY:
            at = (msr - _OWNER.start) * _OWNER_BYTES
            epoch = bytearray(hw.secrets.owner_epoch)
            epoch[at : at + _OWNER_BYTES] = value.to_bytes(_OWNER_BYTES, "little")
            hw.secrets.owner_epoch = bytes(epoch)
    else:
        raise GeneralProtection
