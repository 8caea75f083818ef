"""Stories of release: files, address spaces and enclaves that end at the same time."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.driver import MAP_FIXED, PROT_READ
from softsgx.driver.enclave import CHECK_SCHED_PAGES
from softsgx.runtime import Script
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import BASE, build, plan_for

_MAP_SHARED = 1


@story(
    Defect.MM_WITHOUT_ENCLAVE_REFERENCE,
    holds="An enclave exists until the last address space that is registered with it has ended.",
    # The address space has unlinked its entry and waits for walkers; the file is closed meanwhile.
    policy=Script(("exit", "acquire encl1.srcu grace period"), ("close", "end"), strict=False),
)
def an_address_space_ends_while_the_file_is_closed(scene: Scene) -> None:
    """One task ends an address space and waits for walkers; another one closes the last file."""
    _close_and_exit(scene)


@story(
    Defect.MM_ENTRY_DROPPED_TWICE,
    holds="An enclave is released once, and all its EPC pages are free then.",
    seeds=40,
)
def both_the_file_and_the_address_space_drop_the_entry(scene: Scene) -> None:
    """One task ends an address space while another one closes the last file of its enclave."""
    _close_and_exit(scene)


def _close_and_exit(scene: Scene) -> None:
    system = scene.system()
    process = system.process()
    fd = build(process, plan_for(1))
    other = system.process()  # stays registered after it has unmapped the enclave
    process.enclave_file(fd).mmap(other.mm, BASE, PAGE_BYTES, PROT_READ, MAP_FIXED | _MAP_SHARED)
    other.munmap(BASE, PAGE_BYTES)
    scene.together(close=lambda: process.close(fd), exit=other.mm.exit)
    lost = system.epc_pages - system.free_pages
    scene.claim(not lost, f"{lost} EPC pages are in use and no enclave exists")


@story(
    Defect.RELEASE_WITHOUT_RESCHED,
    holds="Other tasks run while a large enclave is released.",
)
def no_other_task_runs_while_a_large_enclave_is_released(scene: Scene) -> None:
    """The file of an enclave of more than 4096 pages is closed while another task can run."""
    pages = CHECK_SCHED_PAGES + 8
    system = scene.system(epc_pages=pages + 64)
    process = system.process()
    fd = build(process, plan_for(pages))
    ran: list[str] = []
    scene.runtime.spawn(lambda: ran.append("other"), "other")
    process.close(fd)
    scene.claim(bool(ran), "the release has ended and the other task has not run")
