"""Stories of system calls: mappings, ranges, and the errors of ioctls."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.driver import MAP_FIXED, MAP_PRIVATE, PROT_READ
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import (
    BASE,
    SECINFO_RW,
    errno_of,
    launch,
    leave_free,
    plan_for,
    secs_bytes,
    sigstruct_for,
)

_SIZE = 16 * PAGE_BYTES
_FLAGS = 0x14
"""ATTRIBUTES: MODE64BIT and PROVISIONKEY."""


def _expect(scene: Scene, call: str, errno: str, wanted: str) -> None:
    scene.claim(errno == wanted, f"{call} gives {errno}, not {wanted}")


@story(
    Defect.PAGE_RANGE_OVERFLOW,
    holds="A range whose end is beyond 2^64 is refused with EINVAL.",
)
def a_range_that_wraps_round_is_accepted(scene: Scene) -> None:
    """RESTRICT_PERMISSIONS gets the last page of the address space and a length of two pages."""
    made = launch(scene.system().process(), 4, size=_SIZE)
    process, offset = made.process, (1 << 64) - PAGE_BYTES
    errno = errno_of(lambda: process.restrict(made.fd, offset, 2 * PAGE_BYTES, PROT_READ))
    _expect(scene, "RESTRICT_PERMISSIONS", errno, "EINVAL")


@story(
    Defect.MMAP_BEYOND_ENCLAVE,
    holds="An initialized enclave is mapped only inside its range.",
)
def a_mapping_reaches_beyond_the_enclave(scene: Scene) -> None:
    """The page behind an enclave is mapped from the enclave's file."""
    made = launch(scene.system().process(), 1)
    process, end = made.process, made.base + made.size
    errno = errno_of(lambda: process.mmap(made.fd, end, PAGE_BYTES, PROT_READ))
    _expect(scene, "mmap", errno, "EACCES")


@story(
    Defect.MAP_PRIVATE_ACCEPTED,
    holds="A private mapping of an enclave is refused with EINVAL.",
)
def an_enclave_is_mapped_privately(scene: Scene) -> None:
    """A page of an enclave is mapped with MAP_PRIVATE."""
    made = launch(scene.system().process(), 1)
    flags = MAP_PRIVATE | MAP_FIXED
    errno = errno_of(lambda: made.process.mmap(made.fd, BASE, PAGE_BYTES, PROT_READ, flags))
    _expect(scene, "mmap", errno, "EINVAL")


@story(
    Defect.EMPTY_ADD_PAGES_ACCEPTED,
    holds="ADD_PAGES of length 0 is refused with EINVAL.",
)
def adding_nothing_succeeds(scene: Scene) -> None:
    """ADD_PAGES is called with length 0."""
    process = scene.system().process()
    fd = process.open()
    process.create(fd, secs_bytes(_SIZE))
    errno = errno_of(lambda: process.add_pages(fd, 0, b"", SECINFO_RW))
    _expect(scene, "ADD_PAGES", errno, "EINVAL")


@story(
    Defect.CREATE_NOT_RESTARTED,
    holds="A CREATE that a signal interrupts is restarted.",
)
def a_signal_during_create_is_not_restarted(scene: Scene) -> None:
    """All EPC pages are in use, a signal is pending, and CREATE would have to reclaim."""
    system = scene.system(epc_pages=16)
    process = system.process()
    launch(process, 20)
    leave_free(system, 0)
    fd = process.open()
    process.signal = True
    errno = errno_of(lambda: process.create(fd, secs_bytes(_SIZE, 0)))
    _expect(scene, "CREATE", errno, "ERESTARTSYS")


@story(
    Defect.ALLOWED_ATTRIBUTES_RESET_BY_CREATE,
    holds="PROVISION before CREATE takes effect.",
)
def permission_given_before_create_is_forgotten(scene: Scene) -> None:
    """PROVISION is called before CREATE; the enclave has PROVISIONKEY, and INIT is called."""
    process = scene.system().process()
    fd, plan = process.open(), plan_for(0)
    process.provision(fd, process.open_provision())
    process.create(fd, secs_bytes(plan.size, flags=_FLAGS))
    for run in plan.runs:
        data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
        process.add_pages(fd, run.offset, data, run.flags, measure=False)
    errno = errno_of(lambda: process.init(fd, sigstruct_for(plan, _FLAGS)))
    _expect(scene, "INIT", errno, "ok")
