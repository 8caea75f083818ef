"""Whether the EPC was big enough for a run, and what to try next."""

from __future__ import annotations

from enum import StrEnum

from softsgx.arch import PAGE_BYTES
from softsgx.host import least_bytes, limit_option
from softsgx.ondemand import dataclass
from softsgx.report.summary import RunSummary
from softsgx.sizes import parse_size, size_text

__all__ = ["Fit", "Verdict", "verdict"]

_PAGING = ("fault", "eldu", "ewb", "etrack", "ipi")
#: Below this share of the time on silicon, paging does not matter to most users.
_LITTLE = 0.01


class Fit(StrEnum):
    """How the EPC, and the limits of groups, fitted the enclaves."""

    NO_ENCLAVE = "no-enclave"
    """No enclave was created."""
    FITS = "fits"
    """No page was evicted."""
    NEARLY = "nearly"
    """Pages were evicted; none came back, or loading them is under 1 % of the time on silicon."""
    SMALL = "small"
    """Pages were evicted and loaded again, and it cost time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """See the module.

    Attributes:
        fit: see :class:`Fit`.
        limited_by: paths of the groups whose limit made pages leave; empty if it was the EPC's
            size, or if none left.
        evictions, reloads: of pages of enclaves.
        touched, added: pages of enclaves that were used, and that were added before EINIT.
        here: time spent in page faults as a share of the run under softsgx.
        silicon: estimated time of page faults and paging as a share of the run on silicon: the
            program's processor time here and the estimate of all its SGX events.
        next_option: option of ``softsgx run`` to try next, as a shell reads it; ``None`` without an
            enclave, and where ``run`` accepts no smaller EPC that would make pages leave.
    """

    fit: Fit
    limited_by: tuple[str, ...]
    evictions: int
    reloads: int
    touched: int
    added: int
    here: float
    silicon: float
    next_option: str | None

    @property
    def text(self) -> str:
        """The verdict for people, in one sentence or two."""
        if self.fit is Fit.NO_ENCLAVE:
            return "No enclave was created."
        advice = ""
        if self.next_option is not None:
            advice = f" To see what less costs, try {self.next_option}."
        used = f"{self.touched:,} pages were touched, {self.added:,} were added"
        what = "limit of " + ", ".join(self.limited_by) if self.limited_by else "EPC"
        if self.fit is Fit.FITS:
            return f"The {what} was big enough: no page left it; {used}.{advice}"
        counts = f"{self.evictions:,} pages left it, {self.reloads:,} came back"
        if self.fit is Fit.NEARLY:
            return f"The {what} was nearly big enough: {counts}; {used}.{advice}"
        return (
            f"The {what} was too small: {counts}; {used}. Page faults took "
            f"{_percent(self.here)} of the run here; on silicon paging would take about "
            f"{_percent(self.silicon)} (estimated). "
            f"Try {self.next_option}."
        )


def verdict(run: RunSummary) -> Verdict:
    """Return the verdict on a run."""
    evictions = sum(enclave.evictions for enclave in run.enclaves)
    reloads = sum(enclave.reloads for enclave in run.enclaves)
    fault_s = sum(enclave.fault_s for enclave in run.enclaves)
    paging = sum(item.typical for item in run.estimate.items if item.price.event in _PAGING)
    paging_s = paging / run.estimate.profile.hertz
    silicon = _share(paging_s, run.program_s + run.estimate.seconds)
    # A limit that refuses a charge makes a page of its group leave.
    limiting = [group for group in run.groups if group.refused and group.max_bytes is not None]
    if not run.enclaves:
        fit = Fit.NO_ENCLAVE
    elif not evictions:
        fit = Fit.FITS
    elif not reloads or silicon < _LITTLE:
        fit = Fit.NEARLY
    else:
        fit = Fit.SMALL
    limited = tuple(group.path for group in limiting) if evictions else ()
    option = None
    if fit is Fit.SMALL and limited:
        group = limiting[0]
        size = max(2 * (group.max_bytes or 0), _least(run))
        option = limit_option(group.path, _size_option(size))
    elif fit is Fit.SMALL:
        option = f"--epc {_size_option(2 * run.platform.epc_bytes)}"
    elif fit is not Fit.NO_ENCLAVE:
        option = _smaller_option(run)
    here = min(1.0, _share(fault_s, run.wall_s))  # threads may fault at the same time
    touched = sum(enclave.pages_touched for enclave in run.enclaves)
    added = sum(enclave.pages_added for enclave in run.enclaves)
    return Verdict(fit, limited, evictions, reloads, touched, added, here, silicon, option)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %"


def _least(run: RunSummary) -> int:
    return least_bytes(run.platform.profile)


def _smaller_option(run: RunSummary) -> str | None:
    """Return the option for half of the EPC pages that were in use, or as few as ``run`` takes."""
    peak = run.platform.peak_epc_bytes
    half = -(-peak // (2 * PAGE_BYTES)) * PAGE_BYTES
    size = max(half, _least(run))
    return f"--epc {_size_option(size)}" if size < peak else None


def _size_option(size: int) -> str:
    """Return a size of whole pages as the command line reads it."""
    text = size_text(size)
    return (text if parse_size(text) == size else f"{size // 1024}KiB").replace(" ", "")
