"""The filter stops exactly the system calls that concern SGX.

Method: a small interpreter of classic BPF runs the filter on made-up calls.
"""

from __future__ import annotations

import struct

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.bpf import (
    build_descriptor_guard,
    build_device_filter,
    build_filter,
    build_guard,
)

TRACE, ALLOW = abi.SECCOMP_RET_TRACE, abi.SECCOMP_RET_ALLOW
I386 = 0x4000_0003


def verdict(number: int, *arguments: int, arch: int = abi.AUDIT_ARCH_X86_64) -> int:
    return interpret(build_filter(), number, *arguments, arch=arch)


def verdict_with_devices(number: int, *arguments: int, arch: int = abi.AUDIT_ARCH_X86_64) -> int:
    """Return the more severe verdict of both filters, which is the smaller number."""
    verdicts = (
        interpret(bpf, number, *arguments, arch=arch)
        for bpf in (build_filter(), build_device_filter())
    )
    return min(verdicts)


def interpret(
    bpf: bytes,
    number: int,
    *arguments: int,
    arch: int = abi.AUDIT_ARCH_X86_64,
    pointer: int = 0x1234,
    looks_at: int = 64,
) -> int:
    """Return the verdict of a filter that may load the first ``looks_at`` bytes of its data."""
    six = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number, arch, pointer, *six)
    program = list(struct.iter_unpack("<HBBI", bpf))
    at = accumulator = 0
    while True:
        code, true, false, k = program[at]
        at += 1
        match code:
            case 0x20:
                assert k < looks_at
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x05:
                at += k
            case 0x54:
                accumulator &= k
            case 0x15:
                at += true if accumulator == k else false
            case 0x06:
                return int(k)
            case _:
                pytest.fail(f"instruction {code:#x}")


@pytest.mark.parametrize(
    "number",
    [
        *(
            2,
            4,
            6,
            21,
            89,
            203,
            204,
            257,
            262,
            267,
            269,
            332,
            437,
            439,
        ),
        0x53584702,
    ],
)
def test_calls_that_name_files_stop(number: int) -> None:
    assert verdict(number) == TRACE


@pytest.mark.parametrize("number", [5, 10, 11, 25, 32, 33, 59, 149, 292, 322, 325, 329])
def test_calls_on_descriptors_and_mappings_stop_once_there_is_a_device(number: int) -> None:
    assert verdict(number) == ALLOW
    assert verdict_with_devices(number) == TRACE


@pytest.mark.parametrize("number", [59, 322])
def test_execve_stops_without_a_device_on_demand(number: int) -> None:
    assert interpret(build_filter(executions=True), number) == TRACE


@pytest.mark.parametrize("number", [0, 1, 3, 12, 13, 15, 28, 39, 56, 60, 202, 231, 318, 1000])
def test_other_calls_run_untouched(number: int) -> None:
    assert verdict_with_devices(number) == ALLOW


def test_a_filter_does_not_look_at_arguments_of_calls_that_it_always_allows() -> None:
    """Else the kernel runs it for each of them."""
    for bpf in (build_filter(), build_device_filter()):
        for number in (0, 1, 3, 39, 45, 46, 47, 202, 232):
            assert interpret(bpf, number, looks_at=8) == ALLOW


@pytest.mark.parametrize(
    ("command", "expected"),
    [(0x4008A400, TRACE), (0xC030A401, TRACE), (0x5401, ALLOW), (0xA401 << 8, ALLOW), (0, ALLOW)],
)
def test_only_sgx_ioctls_stop(command: int, expected: int) -> None:
    assert verdict(abi.SYS_IOCTL, 3, command) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (abi.MAP_SHARED, TRACE),
        (abi.MAP_PRIVATE, TRACE),
        (abi.MAP_PRIVATE | abi.MAP_ANONYMOUS, ALLOW),
        (abi.MAP_SHARED | abi.MAP_ANONYMOUS, ALLOW),
        (abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED, TRACE),
        (abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED_NOREPLACE, ALLOW),
    ],
)
def test_anonymous_memory_that_replaces_nothing_is_not_looked_at(flags: int, expected: int) -> None:
    assert verdict_with_devices(abi.SYS_MMAP, 0, 4096, abi.PROT_READ, flags, 3) == expected


@pytest.mark.parametrize(
    ("prot", "flags", "expected"),
    [
        (abi.PROT_READ, abi.MAP_PRIVATE, ALLOW),
        (abi.PROT_READ, abi.MAP_PRIVATE | abi.MAP_FIXED, ALLOW),
        (abi.PROT_READ | abi.PROT_EXEC, abi.MAP_PRIVATE | abi.MAP_FIXED, TRACE),
        (abi.PROT_READ | abi.PROT_EXEC, abi.MAP_PRIVATE | abi.MAP_ANONYMOUS, ALLOW),
        (abi.PROT_READ, abi.MAP_SHARED, TRACE),
        (abi.PROT_READ, abi.MAP_TYPE, TRACE),
        (abi.PROT_READ | abi.PROT_EXEC, abi.MAP_SHARED | abi.MAP_ANONYMOUS, ALLOW),
    ],
)
def test_without_a_device_code_and_shared_files_are_looked_at(
    prot: int, flags: int, expected: int
) -> None:
    assert verdict(abi.SYS_MMAP, 0, 4096, prot, flags, 3) == expected


def test_code_is_not_looked_at_where_cpuid_faults() -> None:
    def without_code(prot: int, flags: int) -> int:
        return interpret(build_filter(code=False), abi.SYS_MMAP, 0, 4096, prot, flags, 3)

    assert without_code(abi.PROT_READ | abi.PROT_EXEC, abi.MAP_PRIVATE) == ALLOW
    assert without_code(abi.PROT_READ, abi.MAP_PRIVATE) == ALLOW
    assert without_code(abi.PROT_READ | abi.PROT_EXEC, abi.MAP_SHARED) == TRACE


def test_programs_of_another_architecture_are_let_be() -> None:
    assert verdict_with_devices(abi.SYS_OPENAT, arch=I386) == ALLOW


BASE, SIZE = 0x7FFF_F7E0_0000, 0x20_0000


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        (BASE, TRACE),
        (BASE + SIZE - 1, TRACE),
        (BASE - 1, ALLOW),
        (BASE + SIZE, ALLOW),
        (BASE + (1 << 32), ALLOW),
        (BASE & 0xFFFF_FFFF, ALLOW),
    ],
)
@pytest.mark.parametrize("arch", [abi.AUDIT_ARCH_X86_64, I386])
def test_every_call_of_code_in_a_guarded_range_stops(
    pointer: int, arch: int, expected: int
) -> None:
    assert interpret(build_guard(BASE, SIZE), 39, pointer=pointer, arch=arch) == expected


@pytest.mark.parametrize("number", [0, 39, 56, 257, 1000, abi.SYS_SOFTSGX_EENTER])
def test_everything_means_every_call_that_returns(number: int) -> None:
    assert interpret(build_filter(everything=True), number) == TRACE


@pytest.mark.parametrize("number", [15, 60, 231])
def test_a_call_without_an_end_never_stops(number: int) -> None:
    assert interpret(build_filter(everything=True), number) == ALLOW


@pytest.mark.parametrize("bpf", [build_device_filter(), build_filter(everything=True)])
def test_calls_in_the_programs_name_do_not_stop(bpf: bytes) -> None:
    for number in (abi.SYS_MPROTECT, abi.SYS_MUNMAP):
        assert interpret(bpf, number, 1, 2, 3, 4, 5, abi.OUR_CALL) == ALLOW
        for other in (abi.OUR_CALL ^ 1, abi.OUR_CALL ^ 1 << 63):
            assert interpret(bpf, number, 1, 2, 3, 4, 5, other) == TRACE


@pytest.mark.parametrize(
    ("number", "argument"),
    [
        *(
            (number, 0)
            for number in (0, 1, 8, 16, 17, 18, 19, 20, 74, 75, 187, 277, 295, 296, 327, 328)
        ),
        *[(40, 0), (40, 1), (275, 0), (275, 2), (326, 0), (326, 2)],
    ],
)
def test_calls_that_move_data_of_a_guarded_descriptor_stop(number: int, argument: int) -> None:
    bpf = build_descriptor_guard(7)
    arguments = [9, 9, 9]
    assert interpret(bpf, number, *arguments) == ALLOW
    arguments[argument] = 7
    assert interpret(bpf, number, *arguments) == TRACE


@pytest.mark.parametrize("number", [3, 9, 32, 39, 44, 202])
def test_other_calls_on_a_guarded_descriptor_do_not(number: int) -> None:
    assert interpret(build_descriptor_guard(7), number, 7, 7, 7) == ALLOW


@pytest.mark.parametrize(
    ("command", "expected"),
    [(0, TRACE), (1030, TRACE), (1033, TRACE), (1034, TRACE), (1, ALLOW), (3, ALLOW), (6, ALLOW)],
)
def test_fcntl_stops_where_it_duplicates_or_seals(command: int, expected: int) -> None:
    assert verdict_with_devices(abi.SYS_FCNTL, 3, command) == expected


@pytest.mark.parametrize(
    ("advice", "expected"),
    [(9, TRACE), (20, TRACE), (23, TRACE), (25, TRACE), (4, ALLOW), (8, ALLOW), (14, ALLOW)],
)
def test_advice_stops_where_it_is_rare(advice: int, expected: int) -> None:
    assert verdict_with_devices(abi.SYS_MADVISE, 0x7000_0000, 4096, advice) == expected


def test_every_advice_about_an_enclave_stops() -> None:
    base, size = 0x7F12_3450_0000, 0x10_0000
    bpf = build_guard(base, size)
    for address, expected in [(base, TRACE), (base + size - 4096, TRACE), (base + size, ALLOW)]:
        assert interpret(bpf, abi.SYS_MADVISE, address, 4096, 4) == expected
        assert interpret(bpf, abi.SYS_MUNMAP, address, 4096) == ALLOW
        assert interpret(bpf, abi.SYS_MADVISE, address, 4096, 4, 0, 0, abi.OUR_CALL) == ALLOW
