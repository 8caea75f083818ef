"""Known defects of Linux's SGX code, and which of them can be switched on.

softsgx has the fixed behaviour.  A component that is given a :class:`Defect` behaves as the broken
kernel did, at one place: for tests that must find the defect, and for people who study it.

Source:
    ``docs/sources.md``: the commits and threads.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

__all__ = ["Defect"]

_Package = Literal["cgroup", "driver", "kvm", "paging"]
_UNCONFIRMED = "No fix is known."


class Defect(StrEnum):
    """One known defect; its value is the identifier that users give: ``"B12"``.

    ``B1`` to ``B36`` were fixed at some time or never merged; ``L1`` to ``L13`` were found by
    reading and are unconfirmed upstream.

    Attributes:
        symptom: what goes wrong.
        package: the package that can behave so; ``None``: softsgx cannot express the defect.
        explanation: what the broken form does; where ``package`` is ``None``, why softsgx cannot
            express it.
        fix: what the kernel, or the driver that had it, does since; with the commit where one is
            known.
    """

    symptom: str
    package: _Package | None
    explanation: str
    fix: str

    def __new__(
        cls,
        identifier: str,
        symptom: str,
        package: _Package | None,
        explanation: str,
        fix: str = _UNCONFIRMED,
    ) -> Defect:
        """Return the member with its attributes."""
        member = str.__new__(cls, identifier)
        member._value_ = identifier
        member.symptom, member.package = symptom, package
        member.explanation, member.fix = explanation, fix
        return member

    @property
    def can_be_switched_on(self) -> bool:
        """Whether a component has the broken form."""
        return self.package is not None

    PCMD_PAGE_TRUNCATED_WHILE_SHARED = (
        "B1",
        "ELDU faults under concurrent oversubscription",
        "paging",
        "A fault truncates a PCMD page that a reclaim batch already holds for a neighbour.",
        "Linux truncates a PCMD page only if no page that shares it is being reclaimed.",
    )
    BACKING_RESERVED_BEFORE_MARK = (
        "B2",
        "as B1",
        "driver",
        "Backing is reserved in one critical section, the page is marked in the next one.",
        "Linux fetches backing in the critical section that marks the page.",
    )
    CLEARED_PCMD_NOT_DIRTY = (
        "B3",
        "stale PCMD after write-out",
        "paging",
        "A cleared PCMD is not marked dirty.",
        "Linux marks the page dirty when it clears a PCMD.",
    )
    BACKING_DIRTIED_BEFORE_EWB = (
        "B4",
        "evicted bytes lost",
        "paging",
        "Backing is marked dirty before EWB has written it.",
        "Linux marks backing dirty after EWB, apart from dropping its reference.",
    )
    BACKING_NOT_CHECKED = (
        "B5",
        "corruption is hard to see",
        None,
        "The fix is a check; here it is an assertion that is always on.",
        "Linux warns if a PCMD page is not zero after its truncation.",
    )
    BACKING_KEPT_AFTER_ELDU = (
        "B6",
        "backing never shrinks",
        "paging",
        "Backing pages are kept after ELDU.",
        "Linux truncates the content, and an empty PCMD page, at ELDU (08999b2489b4).",
    )
    BACKING_CHARGED_TO_ROOT_MEMCG = (
        "B7",
        "backing charged to the root memory group",
        None,
        "softsgx charges ordinary memory to no group.",
        "Linux charges backing to the memory group of a process of the enclave (0c9782e204d3).",
    )
    EAUG_ASSUMES_RESIDENT_SECS = (
        "B8",
        "crash when a page is made",
        "driver",
        "EAUG assumes that the SECS is resident.",
        "Linux loads the SECS under the enclave's lock before EAUG (c6c2adcba50c).",
    )
    EAUG_WITHOUT_VA_PAGE_REFUSED = (
        "B9",
        "SIGBUS when EPC is tight",
        "driver",
        "EAUG without a VA page is refused instead of repeated.",
        "Linux returns NOPAGE when no VA page can be allocated now, so that the fault is repeated.",
    )
    PAGE_NOT_BUSY_WHILE_ZAPPED = (
        "B10",
        "a page stays inaccessible",
        "driver",
        "A page is not marked busy while its mappings are removed without the lock.",
        "Patches of 2024, not merged in the versions read, mark the page busy while the"
        " lock is dropped.",
    )
    CONCURRENT_EAUG_REFUSED = (
        "B11",
        "spurious SIGBUS",
        "driver",
        "The thread that comes second to make a page is refused.",
        "Patches of 2024, not merged in the versions read, let the loser return NOPAGE.",
    )
    POISONED_PAGE_STAYS_ON_LRU = (
        "B12",
        "machine check",
        "paging",
        "A poisoned page stays on its LRU list and is evicted.",
        "Linux takes a poisoned page off its list in arch_memory_failure() (ed16618c380c, 2025).",
    )
    MM_WITHOUT_ENCLAVE_REFERENCE = (
        "B13",
        "use after free at exit",
        "driver",
        "Address spaces hold no reference to the enclaves they are registered with.",
        "Linux takes a reference for each address space that is registered (2ade0d60939b, v5.11).",
    )
    MM_ENTRY_DROPPED_TWICE = (
        "B14",
        "reference dropped twice",
        "driver",
        "An exiting address space drops its entry although the file's release has dropped it.",
        "Linux keeps an explicit flag for whether it has found the entry.",
    )
    FREE_COUNT_WITHOUT_LOCK = (
        "B15",
        "wrong free count",
        "paging",
        "The free count is changed without a lock.",
        "Linux counts free pages atomically (ac5d272a0ad0, v5.16).",
    )
    FREE_PAGES_COUNTED_TWICE = (
        "B16",
        "free count double",
        "paging",
        "Pages are counted free at set-up and again when they are sanitized.",
        "Linux counts a page when it is freed after sanitizing, and at no other time.",
    )
    NODE_WALK_WITHOUT_END = (
        "B17",
        "allocation never returns",
        "paging",
        "The walk over nodes ends only on the processor's node, which may have no EPC.",
        "Linux starts the walk at a node that has EPC.",
    )
    STOPPED_SANITIZE_REPORTED = (
        "B18",
        "false warning at shutdown",
        "paging",
        "Stopping ksgxd while it sanitizes is reported as a failure.",
        "Linux returns the number of dirty pages only if ksgxd is not stopping.",
    )
    RELEASE_WITHOUT_RESCHED = (
        "B19",
        "no other thread runs while a huge enclave is released",
        "driver",
        "The release never yields the processor.",
        "Linux reschedules after every 4096 pages, with the lock dropped.",
    )
    SYSFS_GROUP_WITHOUT_SGX = (
        "B20",
        "crash on machines without SGX",
        None,
        "The defect is in a sysfs attribute; softsgx has no sysfs.",
        "Linux hides the attribute where there is no EPC.",
    )
    PAGE_RANGE_OVERFLOW = (
        "B21",
        "bad range accepted",
        "driver",
        "Offset plus length wraps round.",
        "Linux checks offset plus length for overflow.",
    )
    MMAP_BEYOND_ENCLAVE = (
        "B22",
        "mapping beyond the enclave",
        "driver",
        "mmap does not check the enclave's range.",
        "Linux checks the bounds of a mapping once the enclave is initialized.",
    )
    EREMOVE_IN_GENERIC_FREE = (
        "B23",
        "EPC page leaked or freed twice",
        None,
        "Freeing and removing a page are two calls of the core, so there is no broken form.",
        "Linux separates EREMOVE of an enclave's page from freeing an EPC page.",
    )
    MM_WALK_NOT_REPEATED = (
        "B24",
        "a new address space maps a page that is being evicted",
        "driver",
        "The walk over address spaces is not repeated when one was added.",
        "Linux repeats the walk when mm_list_version has changed.",
    )
    BACKING_FETCHED_AFTER_BLOCK = (
        "B25",
        "page lost when backing fails",
        "paging",
        "Backing is fetched after the page was blocked.",
        "Linux fetches backing before it removes mappings, and skips the page on an error.",
    )
    VA_SLOT_LEAKED_BY_FAILED_EWB = (
        "B26",
        "VA slot leaked",
        "paging",
        "The VA slot stays taken after a failed EWB.",
        "Linux frees the slot when EWB fails.",
    )
    GUEST_SECS_READ_TWICE = (
        "B27",
        "a guest gets the provisioning key",
        "kvm",
        "The SECS of a trapped ECREATE is read twice: once to check it, once to use it.",
        "KVM copies the SECS before it checks it.",
    )
    FAULT_WITHOUT_MMAP_LOCK = (
        "B28",
        "fault handled without the mmap lock",
        None,
        "The defect is in the out-of-tree driver's own page walk, which has no counterpart here.",
        "The out-of-tree driver takes the mmap lock.",
    )
    CREATE_NOT_RESTARTED = (
        "B29",
        "CREATE is not restarted",
        "driver",
        "A signal gives EINTR.",
        "The driver returns ERESTARTSYS.",
    )
    EREMOVE_FAILURE_FATAL = (
        "B30",
        "the process hangs",
        "driver",
        "A page that EREMOVE refuses is fatal, not leaked.",
        "The driver reports the page and leaks it.",
    )
    SECS_LEAKED_BY_FAILED_ECREATE = (
        "B31",
        "EPC page leaked",
        "driver",
        "The SECS page is not freed when ECREATE fails.",
        "The driver frees the page when ECREATE fails.",
    )
    MAP_PRIVATE_ACCEPTED = (
        "B32",
        "copy-on-write of enclave pages",
        "driver",
        "MAP_PRIVATE is accepted.",
        "The driver refuses MAP_PRIVATE with EINVAL.",
    )
    MMU_NOTIFIER_DEADLOCK = (
        "B33",
        "deadlock at munmap",
        None,
        "The defect needs a notifier that runs inside munmap; here it runs only at the end of an"
        " address space.",
        "The out-of-tree driver's callback takes no lock.",
    )
    VA_PAGE_LEAKED_AT_RELEASE = (
        "B34",
        "VA page leaked at the end",
        None,
        "The defect is in the out-of-tree driver's VA eviction; the VA tree here is another"
        " design.",
        "The out-of-tree driver frees the VA page at the enclave's release.",
    )
    EMPTY_ADD_PAGES_ACCEPTED = (
        "B35",
        "ADD_PAGES of nothing succeeds",
        "driver",
        "Length 0 is accepted; EINTR as B29.",
        "Linux returns EINVAL for length 0, and ERESTARTSYS when interrupted.",
    )
    GROUP_WALK_STARTS_AT_TOP = (
        "B36",
        "lower groups are never reclaimed",
        "cgroup",
        "Each walk for reclaim starts at the top, so a busy parent absorbs them all.",
        "The EPC cgroup series keeps a cursor for each root from version 16 on.",
    )
    PAGE_FREED_AFTER_FAILED_EWB = (
        "L1",
        "page lost, EPC page in two places",
        "paging",
        "A page whose EWB failed is freed.",
    )
    PAGE_DESTROYED_BY_FAILED_ELDU = (
        "L2",
        "page lost",
        "paging",
        "A failed ELDU destroys PCMD, content and VA slot.",
    )
    CHILD_COUNTED_AFTER_FAILED_EEXTEND = (
        "L3",
        "EPC leaked at the end of an enclave",
        "driver",
        "A page whose EEXTEND failed stays counted as a child.",
    )
    VA_PAGE_EVERY_512_PAGES = (
        "L4",
        "VA pages without bound",
        "paging",
        "A VA page is made at each multiple of 512 pages, whatever room there is.",
    )
    POISONED_PAGES_COUNTED_FREE = (
        "L5",
        "ksgxd believes memory plentiful",
        "paging",
        "Poisoned pages count as free.",
    )
    PAGE_POISONED_IN_BATCH_EVICTED = (
        "L6",
        "machine check",
        "paging",
        "A page that is poisoned while a batch has it is evicted.",
    )
    DIRECT_RECLAIM_WITHOUT_END = (
        "L7",
        "allocation never returns",
        "paging",
        "Direct reclaim does not end while every page is young.",
    )
    PEAK_RAISED_BY_REFUSED_CHARGE = (
        "L8",
        "misc.peak too high",
        "cgroup",
        "Peaks are raised below the level that refuses the charge.",
    )
    FAULT_REPEATED_WITHOUT_WAITING = (
        "L9",
        "a processor spins",
        "driver",
        "A fault that cannot be served yet is repeated at once, without waiting.",
    )
    ACCESSED_BITS_OF_FIRST_MM_ONLY = (
        "L10",
        "a cold page stays for several scans",
        "driver",
        "The first address space that used a page ends the look at accessed bits.",
    )
    NO_RECLAIM_AHEAD_OF_LIMIT = (
        "L11",
        "no reclaim ahead of the limit",
        "cgroup",
        "A successful charge never queues work.",
    )
    RESIDENT_VEPC_PAGE_NOT_MAPPED = (
        "L12",
        "a guest's page faults without end",
        "kvm",
        "A fault on a page that exists inserts no entry.",
    )
    ALLOWED_ATTRIBUTES_RESET_BY_CREATE = (
        "L13",
        "PROVISION is lost",
        "driver",
        "CREATE resets the allowed attributes.",
    )
