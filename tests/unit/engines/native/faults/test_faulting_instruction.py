"""The kind of an access follows from the instruction that faulted, as far as it is there.

Goal: no fault is repeated that the first look can judge.  Method: the code of an enclave is a
dictionary of pages, of which some are holes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.arch import PAGE_BYTES
from softsgx.engines.native.faults.faulting_instruction import access_at, again, repeat, resolved
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.hw import EXECUTE, READ, WRITE

PAGE = 0x7000_0000_0000
NEXT = PAGE + PAGE_BYTES
LOAD = bytes.fromhex("488b0425")  # mov rax, [disp32]
STORE = bytes.fromhex("48890425")  # mov [disp32], rax


def thread(code: bytes, *, before_next: int, there: tuple[int, ...] = (PAGE, NEXT)) -> Any:
    """A thread in an enclave, at code that begins so many bytes before the second page."""
    rip = NEXT - before_next
    memory = bytearray(2 * PAGE_BYTES)
    memory[rip - PAGE : rip - PAGE + len(code)] = code

    def visible(address: int, size: int) -> bytes:
        end = address
        while end < address + size and end & -PAGE_BYTES in there:
            end += 1
        return bytes(memory[address - PAGE : end - PAGE])

    device = SimpleNamespace(memory=SimpleNamespace(own_code=visible))
    image = SimpleNamespace(device_at=lambda _address: device)
    regs = SimpleNamespace(rip=rip, rsp=0, rdi=0)
    return cast(ProgramThread, SimpleNamespace(regs=regs, image=image))


@pytest.mark.parametrize("before", range(1, 8))
@pytest.mark.parametrize("there", [(PAGE,), (PAGE, NEXT)], ids=["hole", "shown"])
def test_an_instruction_that_runs_into_a_page_is_fetched_from_it(
    before: int, there: tuple[int, ...]
) -> None:
    code = STORE + NEXT.to_bytes(8, "little")[:4]
    assert access_at(thread(code, before_next=before, there=there), NEXT) == EXECUTE


@pytest.mark.parametrize(("opcode", "access"), [(LOAD, READ), (STORE, WRITE)])
@pytest.mark.parametrize("there", [(PAGE,), (PAGE, NEXT)], ids=["hole", "shown"])
def test_an_instruction_that_ends_before_a_page_can_only_have_touched_it(
    opcode: bytes, access: int, there: tuple[int, ...]
) -> None:
    code = opcode + (NEXT & 0xFFFF_FFFF).to_bytes(4, "little")
    assert access_at(thread(code, before_next=len(code), there=there), NEXT) == access


def test_an_instruction_whose_own_bytes_are_gone_cannot_be_judged() -> None:
    code = STORE + bytes(4)
    gone = thread(code, before_next=4, there=(PAGE,))
    assert access_at(gone, PAGE + 8) is None
    assert access_at(thread(code, before_next=4, there=()), NEXT) is None


OFTEN = 30_000


def repeating(*, watched: bool) -> Any:
    """A thread whose page is there; ``watched``: each fault only tells of its use."""
    image = SimpleNamespace(
        page_table=SimpleNamespace(
            reshow=lambda _page: None, touched=lambda _page, _access: watched
        ),
    )
    return SimpleNamespace(image=image, regs=SimpleNamespace(rip=PAGE + 8), spurious=(0, (0, 0)))


def test_faults_that_tell_of_use_never_count_as_repeated() -> None:
    stopped = repeating(watched=True)
    assert all(repeat(stopped, NEXT, READ) for _ in range(OFTEN))


def test_an_instruction_whose_bytes_always_come_back_is_repeated_without_end() -> None:
    stopped = repeating(watched=False)
    for _ in range(OFTEN):
        assert again(stopped)
        resolved(stopped)


def test_a_fault_that_nothing_explains_ends_the_repetition() -> None:
    stopped = repeating(watched=False)
    assert not all(repeat(stopped, NEXT, READ) for _ in range(OFTEN))
