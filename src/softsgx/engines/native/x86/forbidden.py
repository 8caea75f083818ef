"""Instructions of enclave code that this machine would execute otherwise than the enclave's.

- CPUID, where the machine cannot make it fault: it is #UD in every enclave.
- RDTSC and RDTSCP on a machine without SGX2: #UD.
- XGETBV, XSAVE, XSAVEOPT, XSAVEC, XRSTOR, when XCR0 of this machine is not the enclave's XFRM, or
  components of XSAVE areas are elsewhere: they are executed by software.

Deviation: an instruction whose bytes lie in two pages is not found, nor is one in a page that the
enclave may write; and what XFRM forbids beside these, such as AVX instructions where it lacks AVX,
is executed by this machine.

Source:
    SDM vol. 3D, "Illegal Instructions", "RDTSC and RDTSCP Instructions", EENTER.
"""

from __future__ import annotations

from softsgx.engines.native.x86.rewrite import cpuid_sites, in_step
from softsgx.engines.native.x86.state import decode_state
from softsgx.ondemand import dataclass

__all__ = ["ForbiddenCode"]

_TIME = (b"\x0f\x31", b"\x0f\x01\xf9")
_STATE = (b"\x0f\x01\xd0", b"\x0f\xae", b"\x0f\xc7")
_MOST_PREFIXES = 3

_known: dict[tuple[ForbiddenCode, int, int], list[int]] = {}


@dataclass(frozen=True, slots=True)
class ForbiddenCode:
    """Finds them in a page of code.

    Attributes:
        cpuid, time, state: which of the groups above.
    """

    cpuid: bool
    time: bool
    state: bool

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return self.cpuid or self.time or self.state

    def __call__(self, code: bytes) -> list[int]:
        """Return the offset of the byte behind 0F of each; the same pages come again and again."""
        patterns = (*(_TIME if self.time else ()), *(_STATE if self.state else ()))
        if not self.cpuid and all(code.find(pattern) < 0 for pattern in patterns):
            return []
        key = self, hash(code), len(code)
        known = _known.get(key)
        if known is None:
            known = _known[key] = self._find(code)
        return known

    def _find(self, code: bytes) -> list[int]:
        found = [at + 1 for at in cpuid_sites(code)] if self.cpuid else []
        if self.time:
            found += [
                at + 1 for pattern in _TIME for at in _all(code, pattern) if in_step(code, at)
            ]
        if self.state:
            found += [
                at + 1 for pattern in _STATE for at in _all(code, pattern) if _is_state(code, at)
            ]
        return sorted(found)


def _is_state(code: bytes, at: int) -> bool:
    """Return whether 0F at ``at`` belongs to an XGETBV, XSAVE or XRSTOR, prefixes or not."""
    for start in range(max(0, at - _MOST_PREFIXES), at + 1):
        insn = decode_state(code[start : start + 15])
        if insn is not None and start + insn.opcode_at == at + 1 and in_step(code, start):
            return True
    return False


def _all(code: bytes, pattern: bytes) -> list[int]:
    found, at = [], code.find(pattern)
    while at >= 0:
        found.append(at)
        at = code.find(pattern, at + 1)
    return found
