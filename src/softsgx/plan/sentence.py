"""The answer of a plan in one sentence.

A limit has the units of the software that enforces it: Kubernetes' device plugin takes
``sgx.intel.com/epc`` in bytes, with the suffixes of quantities; the misc cgroup controller takes
``misc.max`` of ``sgx_epc`` in bytes.  Both count EPC pages of all kinds, SECS and VA pages
included, and so does this limit.

Source:
    Intel device plugins for Kubernetes, SGX plugin; Kubernetes, "Resource units";
    Documentation/admin-guide/cgroup-v2.rst, "Misc"; the EPC cgroup series, v17.
"""

from __future__ import annotations

from collections.abc import Sequence

from softsgx.plan.result import SizeResult, Slowdown
from softsgx.sizes import parse_size, size_text

__all__ = ["exact_size", "percent", "recommendation_text"]


def recommendation_text(
    best: SizeResult | None,
    results: Sequence[SizeResult],
    target: float,
    limit_bytes: int | None,
) -> str:
    """Return the recommendation.

    Args:
        best: the smallest size that meets the target; ``None``: none does.
        results: every size that was replayed, ascending.
        target: the acceptable slowdown.
        limit_bytes: a limit of a group that meets the target as well; ``None``: none is given.
    """
    if best is None:
        return _none(results, target)
    if best.slowdown is None:
        text = f"{exact_size(best.epc_bytes)} of EPC hold all pages that are used again"
    else:
        text = (
            f"{exact_size(best.epc_bytes)} of EPC keep the slowdown under {percent(target)}"
            f" (predicted {_band(best.slowdown)})"
        )
    if best is results[0]:
        text += ", and less was not tried"
    elif not results[results.index(best) - 1].certain:
        text += "; less may be enough, but the trace is not precise enough"
    if limit_bytes is not None:
        quantity = f"{limit_bytes >> 20}Mi"
        text += f"; Kubernetes: sgx.intel.com/epc: {quantity}; misc.max: sgx_epc {limit_bytes}"
    return text + "."


def _none(results: Sequence[SizeResult], target: float) -> str:
    largest = results[-1]
    size = exact_size(largest.epc_bytes)
    if not largest.possible:
        return f"No size up to {size} is enough: every page was needed at once; try a larger EPC."
    if not largest.certain:
        return f"The trace is not precise enough for any size up to {size}; try a larger EPC."
    if largest.slowdown is None:
        return f"{largest.loads:,} pages are loaded again even with {size}; try a larger EPC."
    return (
        f"No size up to {size} keeps the slowdown under {percent(target)}: there it is"
        f" {_band(largest.slowdown)}; try a larger EPC."
    )


def _band(slowdown: Slowdown) -> str:
    low, typical, high = map(percent, (slowdown.low, slowdown.typical, slowdown.high))
    return typical if low == high else f"{typical}, band {low} to {high}"


def percent(slowdown: float) -> str:
    """Return the time that a slowdown adds, in percent, for display.

    >>> percent(1.1), percent(1.0042), percent(3.5)
    ('10 %', '0.42 %', '250 %')
    """
    value = (slowdown - 1) * 100
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def exact_size(size: int) -> str:
    """Return a size for display; :func:`parse_size` returns the same number of bytes.

    >>> exact_size(98041856), exact_size(1472 << 10)
    ('93.5 MiB', '1472 KiB')
    """
    text = size_text(size)
    if parse_size(text) == size:
        return text
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} bytes"
