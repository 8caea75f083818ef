"""Known defects of Linux's SGX code, B1–B36 and L1–L13, and what can be shown of each.

Those of the driver can be switched on by name here, those of the core in
:data:`softsgx.paging.CORE_DEFECTS`; limits and guests have theirs.  Without a name the code
behaves as fixed.  :data:`DEFECTS` is the whole list, with why a few cannot be expressed.

Source:
    ``docs/sources.md``: the commits and threads; "latent" ones were found by reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFECTS", "DRIVER_DEFECTS", "Defect"]

Home = Literal["driver", "paging", "cgroup", "kvm", "none"]


@dataclass(frozen=True, slots=True)
class Defect:
    """One known defect.

    Attributes:
        symptom: what goes wrong.
        home: the package in which its name switches it on; ``none`` when it cannot be expressed.
        how: what the broken form does; why it cannot be expressed, for ``none``.
    """

    symptom: str
    home: Home
    how: str


DEFECTS: dict[str, Defect] = {
    "B1": Defect(
        "ELDU faults under concurrent oversubscription",
        "paging",
        "a fault truncates a PCMD page that a batch already holds for a neighbour",
    ),
    "B2": Defect(
        "as B1",
        "driver",
        "backing is reserved in one critical section, the page marked in the next one",
    ),
    "B3": Defect("stale PCMD after write-out", "paging", "a cleared PCMD is not marked dirty"),
    "B4": Defect("evicted bytes lost", "paging", "backing is marked dirty before EWB wrote it"),
    "B5": Defect(
        "corruption is hard to see",
        "none",
        "the fix is a check; here it is an assertion that is always on",
    ),
    "B6": Defect("backing never shrinks", "paging", "backing pages are kept after ELDU"),
    "B7": Defect(
        "backing charged to the root memory group",
        "none",
        "ordinary memory is not charged to anybody here",
    ),
    "B8": Defect(
        "crash when a page is made",
        "driver",
        "EAUG takes it that the SECS is resident",
    ),
    "B9": Defect(
        "SIGBUS when EPC is tight",
        "driver",
        "EAUG without a VA page is refused instead of repeated",
    ),
    "B10": Defect(
        "a page is inaccessible for ever",
        "driver",
        "a page is not marked while its mappings are removed without the lock",
    ),
    "B11": Defect(
        "spurious SIGBUS",
        "driver",
        "the thread that is second to make a page is refused",
    ),
    "B12": Defect("machine check", "paging", "a poisoned page stays on its list and is evicted"),
    "B13": Defect(
        "use after free at exit",
        "driver",
        "address spaces hold no reference to the enclaves they are registered with",
    ),
    "B14": Defect(
        "reference dropped twice",
        "driver",
        "an exiting address space drops its entry although the file's release has dropped it",
    ),
    "B15": Defect("wrong free count", "paging", "the free count is changed without a lock"),
    "B16": Defect("free count double", "paging", "pages are counted at set-up and when sanitized"),
    "B17": Defect(
        "allocation never returns", "paging", "the node walk waits for a node without EPC"
    ),
    "B18": Defect("false warning at shutdown", "paging", "a stopped sanitizing counts as failed"),
    "B19": Defect(
        "nobody else runs while a huge enclave is released",
        "driver",
        "the release never lets others run",
    ),
    "B20": Defect(
        "crash on machines without SGX",
        "none",
        "a sysfs attribute; there is no sysfs here",
    ),
    "B21": Defect("bad range accepted", "driver", "offset plus length wraps round"),
    "B22": Defect(
        "mapping beyond the enclave", "driver", "mmap does not look at the enclave's range"
    ),
    "B23": Defect(
        "EPC page leaked or freed twice",
        "none",
        "there is no broken form to keep: freeing and removing a page are two calls of the core",
    ),
    "B24": Defect(
        "a new address space maps a page that is being evicted",
        "driver",
        "the walk over address spaces is not repeated when one was added",
    ),
    "B25": Defect(
        "page lost when backing fails", "paging", "backing is fetched after the PTEs went"
    ),
    "B26": Defect("VA slot leaked", "paging", "the slot stays taken after a failed EWB"),
    "B27": Defect("a guest gets the provisioning key", "kvm", "the guest's SECS is read twice"),
    "B28": Defect(
        "fault handled without the mmap lock",
        "none",
        "of the out-of-tree driver's own page walk, which has no counterpart",
    ),
    "B29": Defect("CREATE is not restarted", "driver", "a signal gives EINTR"),
    "B30": Defect(
        "the process hangs", "driver", "a page that EREMOVE refuses is fatal, not leaked"
    ),
    "B31": Defect("EPC page leaked", "driver", "the SECS page is not freed when ECREATE fails"),
    "B32": Defect("copy-on-write of enclave pages", "driver", "MAP_PRIVATE is accepted"),
    "B33": Defect(
        "deadlock at munmap",
        "none",
        "needs a notifier that runs inside munmap; ours runs at the end of an address space only",
    ),
    "B34": Defect(
        "VA page leaked at the end",
        "none",
        "bookkeeping of the out-of-tree driver's VA eviction; the VA tree here is another design",
    ),
    "B35": Defect("ADD_PAGES of nothing succeeds", "driver", "length 0 is accepted; EINTR as B29"),
    "B36": Defect("lower groups are never reclaimed", "cgroup", "each walk starts at the top"),
    "L1": Defect("page lost, EPC page in two places", "paging", "a page whose EWB failed is freed"),
    "L2": Defect("page lost", "paging", "a failed ELDU destroys PCMD, content and slot"),
    "L3": Defect(
        "EPC leaked at the end of an enclave",
        "driver",
        "a page whose EEXTEND failed stays counted as a child",
    ),
    "L4": Defect("VA pages without bound", "paging", "one is made at each multiple of 512 pages"),
    "L5": Defect("ksgxd believes memory plentiful", "paging", "poisoned pages count as free"),
    "L6": Defect("machine check", "paging", "a page poisoned in a batch is evicted"),
    "L7": Defect("allocation never returns", "paging", "reclaim goes on while every page is young"),
    "L8": Defect("misc.peak too high", "cgroup", "peaks are raised by charges that then fail"),
    "L9": Defect(
        "a processor spins",
        "driver",
        "a fault that cannot be served yet is repeated at once, without waiting",
    ),
    "L10": Defect(
        "a cold page stays for several scans",
        "driver",
        "the first address space that used a page ends the look at accessed bits",
    ),
    "L11": Defect(
        "no reclaim ahead of the limit", "cgroup", "a successful charge never queues work"
    ),
    "L12": Defect(
        "a guest's page faults for ever", "kvm", "a page that exists is not mapped again"
    ),
    "L13": Defect(
        "PROVISION is lost",
        "driver",
        "CREATE resets the allowed attributes",
    ),
}

DRIVER_DEFECTS: dict[str, str] = {
    name: defect.how for name, defect in DEFECTS.items() if defect.home == "driver"
}
"""Those that :class:`~softsgx.driver.Driver` takes, and what the broken form does."""
