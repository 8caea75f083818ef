"""Stories of guests and their virtual EPC."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, AttributesFlags, SecInfo
from softsgx.defects import Defect
from softsgx.hw import PageInfoArgs
from softsgx.kvm import Guest, Monitor, VepcDevice
from softsgx.paging import EpcCore, MemoryBacking
from softsgx.runtime import Script
from softsgx.sim.stories.story import Scene, story
from softsgx.sim.stories.system import System, secs_bytes

_PROVISION = int(AttributesFlags.PROVISIONKEY)


def _device(scene: Scene, system: System) -> VepcDevice:
    return VepcDevice(system.core, backing=lambda _pages: MemoryBacking(), defects=scene.defects)


@story(
    Defect.GUEST_SECS_READ_TWICE,
    holds="A guest without permission for the provisioning key gets no enclave that has it.",
    # The other processor writes between the host's check and ECREATE.
    policy=Script(("create", "ECREATE*"), ("change", "end"), strict=False),
)
def a_guest_changes_its_secs_after_the_check(scene: Scene) -> None:
    """ECREATE of a guest is trapped and its SECS is checked.

    Another processor of the guest then sets PROVISIONKEY in the SECS.
    """
    system = scene.system(epc_pages=64)
    guest = Guest(
        system.machine, _device(scene, system), "guest", epc_pages=24, tracer=scene.tracer
    )
    core = EpcCore(guest, scene.runtime, dirty=())
    secs = bytearray(secs_bytes(2 * PAGE_BYTES))
    changed = secs_bytes(2 * PAGE_BYTES, flags=AttributesFlags.MODE64BIT | _PROVISION)
    page = core.alloc(None, reclaim=False)
    guest.leaves.eremove(page.addr)  # makes the page resident: ECREATE then takes no EPC fault

    def change() -> None:
        secs[:] = changed

    scene.together(
        create=lambda: guest.leaves.ecreate(PageInfoArgs(0, secs, SecInfo(), 0), page.addr),
        change=change,
    )
    backed = guest.page_at(page.addr)
    assert backed is not None and backed.epc is not None, "the guest's SECS is resident"
    flags = system.epcm(backed.epc.addr).owner.flags
    scene.claim(not flags & _PROVISION, "the guest's enclave has PROVISIONKEY")


@story(
    Defect.RESIDENT_VEPC_PAGE_NOT_MAPPED,
    holds="A fault on a resident page of a virtual EPC maps it.",
)
def a_second_mapping_of_a_page_faults_without_end(scene: Scene) -> None:
    """A virtual EPC is mapped twice; the same page is touched through both mappings."""
    system = scene.system(epc_pages=64)
    monitor = Monitor(system.core, "vmm")
    vepc = _device(scene, system).open(monitor)
    first, second = vepc.mmap(8), vepc.mmap(8)
    first.fault(3)
    result = second.fault(3)
    mapped = 3 in second.entries
    scene.claim(mapped, f"the second mapping has no entry, and its fault ends with {result.name}")
