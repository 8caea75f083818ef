"""Known defects of Linux's virtual EPC that can be switched on by name."""

from __future__ import annotations

__all__ = ["KVM_DEFECTS"]

KVM_DEFECTS: dict[str, str] = {
    "B27": "the SECS of a trapped ECREATE is read twice: once to be checked, once to be used",
    "L12": "a fault on a page that is there already inserts no entry, so it faults for ever",
}
"""Name to what goes wrong."""
