"""The settings of an SDK enclave's layout: threads, stacks, heap.

Source:
    Intel SGX SDK, sdk/sign_tool/SignTool/manage_metadata.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from softsgx.arch import MiscSelect, Xfrm
from softsgx.errors import SoftSgxError
from softsgx.image.load import ssa_frame_pages, xsave_bytes
from softsgx.image.sdk.metadata import Elrange

__all__ = ["SdkLayout"]

_MOST_THREADS = 1 << 12
_MOST_PAGES = 1 << 31
_LARGEST_SSA_FRAME = 4
_STATES = Xfrm.X87 | Xfrm.SSE | Xfrm.AVX | Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM


@dataclass(frozen=True, kw_only=True)
class SdkLayout:
    """The settings of an SDK configuration file about memory; all sizes in pages.

    Attributes:
        threads: TCS pages that are added and measured (TCSNum).
        threads_max: the most threads with run-time paging (TCSMaxNum); None for ``threads``.
        threads_pool: threads beside the first that always exist (TCSMinPool).  With run-time paging
            the runtime removes the others after EINIT and adds them when it needs them.
        stack_min: pages of each stack that every loader adds.
        stack_max: pages of each stack.
        heap_min: pages that always exist.
        heap_init: pages at start, those of ``heap_min`` included; None for ``heap_max``.
        heap_max: the most pages; more than ``heap_init`` needs run-time paging.
        reserved_min: as ``heap_min``, for memory that the enclave may load code into.
        reserved_init: as ``heap_init``.
        reserved_max: as ``heap_max``.
        reserved_executable: whether reserved memory has X.
        user_region: pages that the enclave's own code manages by run-time paging.
        unbound: whether every thread may use every TCS.
        xfrm: every XFRM bit that a loader may set; it determines the size of SSA frames.
        ssa_frame_size: pages; None for as many as ``xfrm`` and ``miscselect`` need.
        miscselect: MISCSELECT.
        misc_mask: the bits of MISCSELECT that EINIT compares.
        aex_notify: whether every thread has TCS.FLAGS.AEXNOTIFY.
        elrange: an enclave range that is larger than the image, or None.
        versions: versions of the block for run-time paging and of the other block; None for those
            that the SDK of the library writes.
    """

    threads: int = 1
    threads_max: int | None = None
    threads_pool: int = 1
    stack_min: int = 2
    stack_max: int = 64
    heap_min: int = 1
    heap_init: int | None = None
    heap_max: int = 4096
    reserved_min: int = 0
    reserved_init: int | None = None
    reserved_max: int = 0
    reserved_executable: bool = False
    user_region: int = 0
    unbound: bool = True
    xfrm: int = int(_STATES)
    ssa_frame_size: int | None = None
    miscselect: int = 0
    misc_mask: int = 0xFFFF_FFFF
    aex_notify: bool = False
    elrange: Elrange | None = None
    versions: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other.

        Raises:
            SoftSgxError: it names the first contradiction.
        """
        heap_init, reserved_init = self.heap_at_start, self.reserved_at_start
        ordered = (
            ("stack", 0 < self.stack_min <= self.stack_max < _MOST_PAGES),
            ("heap", 0 <= self.heap_min <= heap_init <= self.heap_max < _MOST_PAGES),
            (
                "reserved memory",
                0 <= self.reserved_min <= reserved_init <= self.reserved_max < _MOST_PAGES,
            ),
            ("user region", 0 <= self.user_region < _MOST_PAGES),
            ("threads", 0 < self.threads <= self.most_threads <= _MOST_THREADS),
            ("thread pool", 0 <= self.threads_pool <= _MOST_THREADS),
            ("SSA frame size", 0 < self.frame_pages <= _LARGEST_SSA_FRAME),
        )
        for name, ok in ordered:
            if not ok:
                raise SoftSgxError(
                    f"sign: {name}: values out of order or range; give positive ones, with "
                    "minimum <= start <= maximum"
                )
        if self.user_region and not self.miscselect & self.misc_mask & MiscSelect.EXINFO:
            raise SoftSgxError(
                "sign: a user region needs run-time paging; set bit 0 of MISCSELECT and of its mask"
            )

    @property
    def heap_at_start(self) -> int:
        """Return the heap's pages at start."""
        return self.heap_max if self.heap_init is None else self.heap_init

    @property
    def reserved_at_start(self) -> int:
        """Return the pages of reserved memory at start."""
        return self.reserved_max if self.reserved_init is None else self.reserved_init

    @property
    def most_threads(self) -> int:
        """Return how many threads there may be with run-time paging."""
        return self.threads if self.threads_max is None else self.threads_max

    @property
    def pool(self) -> int:
        """Return how many threads beside the first are always there."""
        return min(self.threads_pool, self.threads - 1)

    @property
    def frame_pages(self) -> int:
        """Return the pages of an SSA frame."""
        return self.ssa_frame_size or ssa_frame_pages(self.xfrm, self.miscselect)

    @property
    def xsave_bytes(self) -> int:
        """Return the bytes of the largest XSAVE area."""
        return xsave_bytes(self.xfrm)

    @property
    def is_dynamic(self) -> bool:
        """Return whether anything comes or goes by run-time paging."""
        return not (
            self.heap_min == self.heap_at_start == self.heap_max
            and self.stack_min == self.stack_max
            and self.reserved_min == self.reserved_at_start == self.reserved_max
            and self.most_threads == self.pool + 1
        )

    def blocks(self) -> tuple[bool, bool]:
        """Return whether a signer writes a block for run-time paging, and one for runtimes without.

        Run-time paging needs MISCSELECT.EXINFO, to learn where an enclave faulted.  When the mask
        leaves that open, both kinds of runtime can load the enclave.
        """
        if self.user_region:
            return True, False
        if not self.is_dynamic or not self.miscselect & MiscSelect.EXINFO:
            return False, True
        return True, not self.misc_mask & MiscSelect.EXINFO
