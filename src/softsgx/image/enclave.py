"""The content of an enclave file, in one form for all formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from softsgx.arch import SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image.plan import Plan, Run

__all__ = ["EnclaveImage", "Variant", "plan_of"]


@dataclass(frozen=True)
class Variant:
    """One of several descriptions of the same enclave in one file.

    Attributes:
        name: its name in the file, a metadata version.
        plan: the plan that it describes; None when the reader cannot read it.
        problem: the reason why the plan is missing, else empty.
        facts: pairs of name and value for output, in the file's order.
        layout: rows for output: name, attributes, pages, offset, flags, what a loader does with it.
    """

    name: str
    plan: Plan | None
    problem: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    layout: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class EnclaveImage:
    """An enclave file, reduced to the data that a loader needs.

    Attributes:
        name: the file.
        format: ``sgxs``, ``sdk``, ``oe``, ``selftest`` or ``raw``.
        plan: the pages and the measured fields of SECS.
        sigstruct: the SIGSTRUCT in the file or beside it, or None.
        sigstruct_from: the place where the reader found ``sigstruct``.
        variants: all descriptions in the file, the chosen one included.
        chosen: the name of the variant that ``plan`` is.
        notes: hints for the user, one sentence each.
        attributes: ATTRIBUTES.FLAGS and XFRM that the file asks for outside its SIGSTRUCT, or None.
    """

    name: str
    format: str
    plan: Plan
    sigstruct: SigStruct | None = None
    sigstruct_from: str = ""
    variants: tuple[Variant, ...] = ()
    chosen: str = ""
    notes: tuple[str, ...] = ()
    attributes: tuple[int, int] | None = None
    facts: tuple[tuple[str, str], ...] = field(default=())


def plan_of(
    name: str,
    size: int,
    runs: Sequence[Run],
    *,
    ssa_frame_size: int = 1,
    base: int | None = None,
) -> Plan:
    """Return the plan; an error of the plan names the file ``name``."""
    try:
        return Plan(size, tuple(runs), ssa_frame_size, base)
    except SoftSgxError as error:
        raise SoftSgxError(f"{name}: {str(error).removeprefix('plan: ')}") from error
