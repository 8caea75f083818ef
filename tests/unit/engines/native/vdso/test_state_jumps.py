"""When an instruction on extended state gets a jump, and what happens before it is stored."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.vdso.state_code import find_site
from softsgx.engines.native.vdso.state_jumps import EnclaveSite, StateJumps
from softsgx.engines.native.vdso.stubs import MOST_STATE_STUBS, STATE_STUB_BYTES, Stub, Stubs
from softsgx.engines.native.x86.areas import Move
from softsgx.engines.native.x86.state import StateInsn, decode_state

PAGE, STUBS = 0x7000, 0x10_0000
LOADS, XRSTOR = b"\xb8\xff\xff\xff\xff\xba\xff\xff\xff\xff", b"\x48\x0f\xae\x29"
START = 64
CODE = b"\x90" * START + LOADS + XRSTOR
AT = START + len(LOADS)
MOVES = (Move(5, 64, 832, 1088), Move(6, 512, 896, 1152), Move(7, 1024, 1408, 1664))


class Scene:
    """A thread that has stopped at XRSTOR of its enclave, and what was done, in order."""

    def __init__(self, directory: Path, code: bytes = CODE, insn: bytes = XRSTOR) -> None:
        self.insn = insn
        self.did: list[str] = []
        self.fd = os.open(directory / "memory", os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, STUBS + MOST_STATE_STUBS * STATE_STUB_BYTES)
        self.memory: Any
        self.page_table = SimpleNamespace(
            read_only_code=lambda _at, _size: self.memory, memory_at=lambda _at: self.memory
        )
        self.memory = SimpleNamespace(
            jumps={},
            users=[self.page_table],
            own_code=lambda _at, size: code[:size],
            jump_at=self.jump_at,
        )
        self.image = SimpleNamespace(
            page_table=self.page_table,
            memory_fd=self.fd,
            state_stubs=Stubs(STATE_STUB_BYTES, (STUBS, MOST_STATE_STUBS)),
        )
        self.enclave = SimpleNamespace(base=0x4000, size=0x8000, xfrm=3)
        config = SimpleNamespace(xsave_bytes=lambda _xfrm: 576)
        cpu = SimpleNamespace(
            inside=SimpleNamespace(enclave=self.enclave), hw=SimpleNamespace(config=config)
        )
        self.thread: Any = SimpleNamespace(
            image=self.image,
            regs=UserRegs(rip=PAGE + AT),
            cpu=cpu,
            areas=SimpleNamespace(moves=MOVES),
        )

    def jump_at(self, address: int, jump: bytes) -> None:
        assert len(jump) == 5 and jump[:1] == b"\xe9"
        target = address + 5 + int.from_bytes(jump[1:], "little", signed=True)
        self.did.append(f"jump {address:#x} to stub {(target - STUBS) // STATE_STUB_BYTES}")
        self.memory.jumps[address] = 5

    def stop(self, *, usable: bool = True) -> list[str]:
        """Return what the stop has caused."""
        self.did.clear()
        jumps = StateJumps(usable, True, lambda _thread: self.did.append("others stopped"))
        jumps.stopped_at(self.thread, cast(StateInsn, decode_state(self.insn)))
        return self.did


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    made = Scene(tmp_path)
    yield made
    os.close(made.fd)


def test_other_threads_are_stopped_before_a_jump_is_stored(scene: Scene) -> None:
    assert scene.stop() == ["others stopped", f"jump {PAGE + START:#x} to stub 0"]
    (stub,) = scene.image.state_stubs
    site = find_site(CODE, AT, PAGE)
    assert site is not None
    code, labels = site.stub(STUBS, 3, range(0x4000, 0xC000), 576, MOVES, True)
    assert stub == Stub(EnclaveSite(site, 3, range(0x4000, 0xC000), 576, MOVES, True), labels)
    assert os.pread(scene.fd, len(code), STUBS) == code


def test_a_jump_that_is_there_is_left_alone(scene: Scene) -> None:
    scene.stop()
    assert scene.stop() == []


def test_a_page_that_comes_back_gets_the_same_stub(scene: Scene) -> None:
    scene.stop()
    scene.memory.jumps.clear()
    assert scene.stop() == ["others stopped", f"jump {PAGE + START:#x} to stub 0"]
    assert len(scene.image.state_stubs) == 1


@pytest.mark.parametrize("change", [{"xfrm": 7}, {"size": 0x4000}, {"base": 0}])
def test_another_enclave_at_the_address_gets_a_stub_of_its_own(
    scene: Scene, change: dict[str, int]
) -> None:
    scene.stop()
    scene.memory.jumps.clear()
    scene.enclave.__dict__.update(change)
    assert scene.stop() == ["others stopped", f"jump {PAGE + START:#x} to stub 1"]


def test_there_are_no_more_stubs_than_places(scene: Scene) -> None:
    for number in range(MOST_STATE_STUBS):
        scene.enclave.size = 0x8000 + 0x1000 * number
        scene.memory.jumps.clear()
        assert scene.stop()
    scene.enclave.size = 0x1000
    scene.memory.jumps.clear()
    assert scene.stop() == []
    assert scene.image.state_stubs.plain == {PAGE + AT}


def test_code_that_others_map_has_no_jumps(scene: Scene) -> None:
    scene.memory.users.append(object())
    assert scene.stop() == []
    assert not scene.image.state_stubs.plain, "they may unmap it"


@pytest.mark.parametrize(("xfrm", "moves"), [(3, MOVES), (7, MOVES), (0xE7, ())])
def test_components_that_xfrm_has_not_may_be_elsewhere(
    tmp_path: Path, xfrm: int, moves: tuple[Move, ...]
) -> None:
    xsave = b"\x48\x0f\xae\x21"
    scene = Scene(tmp_path, CODE[: START + len(LOADS)] + xsave, xsave)
    scene.enclave.xfrm, scene.thread.areas.moves = xfrm, moves
    assert scene.stop() == ["others stopped", f"jump {PAGE + START:#x} to stub 0"]


def test_what_cannot_save_components_that_are_elsewhere_always_stops(tmp_path: Path) -> None:
    xsave = b"\x48\x0f\xae\x31"  # XSAVEOPT
    scene = Scene(tmp_path, CODE[: START + len(LOADS)] + xsave, xsave)
    scene.enclave.xfrm = 0xE7
    assert scene.stop() == []
    assert scene.image.state_stubs.plain == {PAGE + AT}


def test_there_are_none_where_they_are_not_allowed(scene: Scene) -> None:
    assert scene.stop(usable=False) == []


def test_code_without_constants_is_looked_at_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path, CODE[:START] + b"\x90" * len(LOADS) + XRSTOR)
    looks = 0
    own_code = scene.memory.own_code

    def counted(at: int, size: int) -> bytes:
        nonlocal looks
        looks += 1
        return cast(bytes, own_code(at, size))

    scene.memory.own_code = counted
    assert scene.stop() == [] and scene.stop() == []
    assert looks == 1
    os.close(scene.fd)


def test_code_far_from_the_vdso_has_no_jump(scene: Scene) -> None:
    scene.image.state_stubs = Stubs(STATE_STUB_BYTES, (STUBS + (1 << 31), MOST_STATE_STUBS))
    assert scene.stop() == []
