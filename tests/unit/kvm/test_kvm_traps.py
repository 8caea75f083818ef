"""Trapped leaves: the host decides which enclaves a guest may create and launch.

Method: ECREATE and EINIT as the guest's kernel executes them, beside the same leaves on the host.
"""

from __future__ import annotations

from hashlib import sha256
from struct import unpack

import pytest
from tests.support.driver import (
    BASE,
    RW,
    Launched,
    build,
    launch,
    plan_for,
    secs_bytes,
    sigstruct_for,
)
from tests.support.guests import GuestHost, GuestSystem

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    EinitToken,
    Encls,
    KeyName,
    KeyRequest,
    MiscSelect,
    Msr,
    PageInfo,
    SecInfo,
    Secs,
    SgxFeature,
    SigStruct,
    Status,
)
from softsgx.defects import Defect
from softsgx.hw import Fault, PageInfoArgs, rdmsr, wrmsr
from softsgx.image import Plan
from softsgx.kvm import Guest
from softsgx.kvm.leaves import exiting_bitmap
from softsgx.runtime import Script, SeededRuntime

MODE64, PROVISION = int(AttributesFlags.MODE64BIT), int(AttributesFlags.PROVISIONKEY)


def ecreate(guest: GuestSystem, secs: bytes | bytearray) -> str:
    """ECREATE on a free page of the guest."""
    page = guest.core.alloc(None, reclaim=False)
    try:
        guest.guest.leaves.ecreate(PageInfoArgs(0, secs, SecInfo(), 0), page.addr)
    except Fault as fault:
        guest.core.free(page)
        return str(fault)
    guest.core.remove(page)
    return "created"


@pytest.mark.parametrize("provisioning", [False, True])
def test_the_provisioning_key_is_for_guests_that_were_given_it(provisioning: bool) -> None:
    host = GuestHost()
    guest = host.guest(provisioning=provisioning)
    secs = secs_bytes(2 * PAGE_BYTES, flags=MODE64 | PROVISION)
    assert ecreate(guest, secs) == ("created" if provisioning else "#GP(0)")
    assert ecreate(guest, secs_bytes(2 * PAGE_BYTES)) == "created"
    assert bool(guest.guest.config.attributes & PROVISION) == provisioning


@pytest.mark.parametrize(
    ("changes", "secs"),
    [
        ({"miscselect": MiscSelect(0)}, {"miscselect": 1, "ssa_frame_size": 1}),
        ({"xfrm": 3}, {"xfrm": 7}),
        ({"attributes": AttributesFlags.MODE64BIT}, {"flags": MODE64 | 2}),
        ({"max_size_64": 20}, {"size": 1 << 21}),
    ],
)
def test_a_guest_gets_what_its_cpuid_says_and_no_more(
    changes: dict[str, object], secs: dict[str, int]
) -> None:
    host = GuestHost()
    guest, other = host.guest(config=changes), host.guest(name="other", provisioning=True)
    wanted = Secs.unpack(
        secs_bytes(secs.get("size", 2 * PAGE_BYTES), flags=secs.get("flags", MODE64))
    )
    wanted.miscselect = secs.get("miscselect", 0)
    wanted.attributes.xfrm = secs.get("xfrm", 3)
    assert ecreate(guest, wanted.pack()) == "#GP(0)"
    assert ecreate(other, wanted.pack()) == "created"


@pytest.mark.parametrize("defect", [False, True])
def test_the_secs_that_was_checked_is_the_one_that_is_used(defect: bool) -> None:
    """B27: another processor of the guest asks for the provisioning key after the check."""
    script = Script(
        ("create", "ECREATE trapped" if defect else "ECREATE"), ("change", "end"), strict=False
    )
    runtime = SeededRuntime(0, policy=script)

    def main() -> int:
        host = GuestHost(
            runtime=runtime, defects=frozenset({Defect.GUEST_SECS_READ_TWICE} if defect else ())
        )
        guest = host.guest()
        secs = bytearray(secs_bytes(2 * PAGE_BYTES))
        bad = secs_bytes(2 * PAGE_BYTES, flags=MODE64 | PROVISION)
        page = guest.core.alloc(None, reclaim=False)
        guest.guest.leaves.eremove(page.addr)  # so that it is there, and ECREATE runs in one go

        def create() -> None:
            guest.guest.leaves.ecreate(PageInfoArgs(0, secs, SecInfo(), 0), page.addr)

        def change() -> None:
            secs[:] = bad

        tasks = [runtime.spawn(create, "create"), runtime.spawn(change, "change")]
        for task in tasks:
            task.join()
        flags = host.epcm(guest.page(page.addr)).owner.flags
        guest.core.remove(page)
        return flags

    assert runtime.run(main) & PROVISION == (PROVISION if defect else 0)


def test_each_guest_has_a_launch_key_hash_of_its_own() -> None:
    host = GuestHost(epc_pages=80)
    mine, other = host.guest(), host.guest(name="other")
    kernel, others = mine.guest.kernel, other.guest.kernel
    plan = plan_for(1)
    sigstruct = sigstruct_for(plan)
    digest = unpack("<4Q", sha256(SigStruct.unpack(sigstruct).modulus).digest())
    before = list(host.system.machine.launch_key_hash)
    for number, part in enumerate(digest):
        wrmsr(kernel, Msr.IA32_SGXLEPUBKEYHASH0 + number, part)
    assert rdmsr(kernel, Msr.IA32_SGXLEPUBKEYHASH0) == digest[0]
    assert rdmsr(others, Msr.IA32_SGXLEPUBKEYHASH0) == before[0]
    assert host.system.machine.launch_key_hash == before
    outcomes = []
    for guest in (mine, other):
        process = guest.process()
        fd = build(process, plan, init=False)
        enclave = process.enclave_file(fd).enclave
        assert enclave.swap.secs is not None
        outcomes.append(
            guest.guest.leaves.einit(
                SigStruct.unpack(sigstruct), enclave.swap.secs.addr, EinitToken()
            )
        )
    assert outcomes == [Status.SUCCESS, Status.INVALID_EINITTOKEN]


def test_a_launch_enclave_in_a_guest_gets_the_key_that_its_guests_hash_allows() -> None:
    """Linux's driver refuses launch enclaves, so the guest's leaves initialise this one."""
    host = GuestHost(epc_pages=80)
    guest = host.guest()
    flags = AttributesFlags.MODE64BIT | AttributesFlags.EINITTOKENKEY
    plan = plan_for(2)
    process = guest.process()
    fd = build(process, plan, flags=flags, init=False)
    sigstruct = SigStruct.unpack(sigstruct_for(plan, flags))
    guest.guest.launch_key_hash[:] = unpack("<4Q", sha256(sigstruct.modulus).digest())
    secs = process.enclave_file(fd).enclave.swap.secs
    assert secs is not None
    assert guest.guest.leaves.einit(sigstruct, secs.addr, EinitToken()) is Status.SUCCESS
    made = Launched(process, fd, BASE, plan.size, 1, 2)
    process.mmap(fd, BASE, plan.size, RW)
    thread = made.thread()
    thread.store(made.data(0), KeyRequest(key_name=KeyName.EINITTOKEN).pack())

    def request() -> Status:
        return thread.run(lambda cpu: cpu.enclu.egetkey(made.data(0), made.data(1)))

    assert request() is Status.SUCCESS
    key = thread.load(made.data(1), 16)
    assert any(key)
    host.system.machine.launch_key_hash[:] = [1, 2, 3, 4]
    assert request() is Status.SUCCESS, "the host launches enclaves of other signers meanwhile"
    guest.guest.launch_key_hash[0] ^= 1
    assert request() is Status.INVALID_ATTRIBUTE


def test_launches_on_the_host_and_in_guests_do_not_disturb_each_other() -> None:
    """The host stands in EINIT with its signer's hash while the guest launches with its own."""
    runtime = SeededRuntime(0, policy=Script(("host", "EINIT"), ("guest", "end"), strict=False))

    def main() -> None:
        host = GuestHost(epc_pages=80, runtime=runtime)
        guest = host.guest()
        guest.guest.launch_key_hash[:] = [1, 2, 3, 4]
        built: list[object] = []
        tasks = [
            runtime.spawn(lambda: built.append(launch(host.system.process(), 1)), "host"),
            runtime.spawn(lambda: built.append(launch(guest.process(), 1)), "guest"),
        ]
        for task in tasks:
            task.join()
        assert len(built) == 2

    runtime.run(main)


def test_leaves_that_the_guests_cpuid_does_not_list_are_refused() -> None:
    host = GuestHost()
    guest = host.guest(config={"features": SgxFeature.SGX1})
    page = guest.core.alloc(None, reclaim=False)
    with pytest.raises(Fault, match="GP"):
        guest.guest.leaves.eaug(PageInfoArgs(BASE, 0, 0, page.addr), page.addr)
    guest.core.free(page)


def test_the_bitmap_has_what_the_host_must_see() -> None:
    host = GuestHost()
    like_host = host.guest(provisioning=True).guest
    restricted = host.guest(name="restricted").guest
    bitmaps = [
        exiting_bitmap(host.system.machine.config, guest.config)
        for guest in (like_host, restricted)
    ]
    assert [bitmap >> Encls.ECREATE & 1 for bitmap in bitmaps] == [0, 1]
    assert [bitmap >> Encls.EINIT & 1 for bitmap in bitmaps] == [1, 1]
    for leaf in (Encls.EWB, Encls.ETRACK, Encls.EAUG, Encls.EMODT):
        assert not bitmaps[1] >> leaf & 1, leaf
    for number in (0x10, 0x11, 0x12, 0x13, 0x18, 63):
        assert bitmaps[1] >> number & 1, number


# --- by registers ---------------------------------------------------------------------------------

PAGEINFO, SECS, SECINFO, SIGSTRUCT, TOKEN, OUT = range(0x1_0000, 0x1_6000, 0x1000)


def by_registers(guest: GuestSystem, leaf: int, rbx: int = 0, rcx: int = 0, rdx: int = 0) -> int:
    """Execute ENCLS; return RAX."""
    regs = guest.guest.kernel.regs
    regs.rax, regs.rbx, regs.rcx, regs.rdx = leaf, rbx, rcx, rdx
    regs.rip, regs.rflags = 0x5000, 0x8D7
    guest.guest.encls()
    assert regs.rip == 0x5003
    return regs.rax


def test_trapped_leaves_end_as_instructions_do() -> None:
    host = GuestHost(epc_pages=60)
    guest = host.guest()
    write, regs = guest.guest.ram_write, guest.guest.kernel.regs
    secs = guest.core.alloc(None, reclaim=False).addr
    write(SECS, secs_bytes(2 * PAGE_BYTES))
    write(SECINFO, SecInfo().pack())
    write(PAGEINFO, PageInfo(srcpge=SECS, secinfo=SECINFO).pack())
    assert by_registers(guest, Encls.ECREATE, PAGEINFO, secs) == Encls.ECREATE
    assert regs.rflags & 0x8D5 == 0x8D5, "ECREATE reports nothing"
    assert host.epcm(guest.page(secs)).owner.context == secs

    sigstruct = sigstruct_for(Plan(2 * PAGE_BYTES, ()))
    write(SIGSTRUCT, sigstruct)
    assert by_registers(guest, Encls.EINIT, SIGSTRUCT, secs, TOKEN) == Status.INVALID_EINITTOKEN
    assert regs.rflags & 0x8D5 == 0x40, "ZF, and no other"
    digest = unpack("<4Q", sha256(SigStruct.unpack(sigstruct).modulus).digest())
    guest.guest.launch_key_hash[:] = digest
    assert by_registers(guest, Encls.EINIT, SIGSTRUCT, secs, TOKEN) == Status.SUCCESS
    assert regs.rflags & 0x8D5 == 0
    assert by_registers(guest, Encls.EREMOVE, rcx=secs) == Status.SUCCESS
    assert guest.guest.counters.trapped >= 3


def test_leaves_by_registers_meet_the_host_as_typed_ones_do() -> None:
    host = GuestHost(epc_pages=60)
    guest = host.guest()
    made = launch(guest.process(), 2)
    page = guest.data(made.enclave, 3)
    host.evict(page)
    assert by_registers(guest, Encls.EBLOCK, rcx=page.gpa) == Status.SUCCESS
    assert by_registers(guest, Encls.EBLOCK, rcx=page.gpa) == Status.BLKSTATE
    assert guest.guest.kernel.regs.rflags & 0x8D5 == 1, "in CF"
    secs = guest.secs(made.enclave).gpa
    made.thread().load(made.data(1))
    assert by_registers(guest, Encls.ETRACK, rcx=secs) == Status.SUCCESS
    assert by_registers(guest, Encls.ETRACK, rcx=secs) == Status.PREV_TRK_INCMPL
    assert guest.guest.kernel.regs.rflags & 0x8D5 == 0x40


@pytest.mark.parametrize(
    ("changes", "leaf", "fault"),
    [
        ({}, Encls.ERDINFO, "#GP(0)"),
        ({}, Encls.ELDUC, "#GP(0)"),
        ({}, 0x40, "#GP(0)"),
        ({"features": SgxFeature.SGX1}, Encls.EAUG, "#GP(0)"),
        ({"features": SgxFeature(0)}, Encls.EREMOVE, "#UD"),
        ({"features": SgxFeature(0)}, Encls.ECREATE, "#UD"),
    ],
)
def test_features_that_the_guests_cpuid_does_not_list_do_not_exist(
    changes: dict[str, object], leaf: int, fault: str
) -> None:
    guest = GuestHost()
    made = Guest(guest.system.machine, guest.device, "g", epc_pages=16, config=changes)
    regs = made.kernel.regs
    regs.rax, regs.rcx = leaf, made.config.sections[0].base
    with pytest.raises(Fault) as seen:
        made.encls()
    assert str(seen.value) == fault
    assert regs.rax == leaf and regs.rip == 0


def test_misaligned_operands_of_a_trapped_leaf_are_refused() -> None:
    guest = GuestHost(epc_pages=60).guest()
    secs = guest.core.alloc(None, reclaim=False).addr
    guest.guest.ram_write(SECS, secs_bytes(2 * PAGE_BYTES))
    for info in (PageInfo(srcpge=SECS + 8, secinfo=SECINFO), PageInfo(srcpge=SECS, secinfo=8)):
        guest.guest.ram_write(PAGEINFO, info.pack())
        with pytest.raises(Fault, match="GP"):
            by_registers(guest, Encls.ECREATE, PAGEINFO, secs)
    with pytest.raises(Fault, match="GP"):
        by_registers(guest, Encls.ECREATE, PAGEINFO + 8, secs)
