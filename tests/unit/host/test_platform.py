"""The assembled platform: parts fit, the driver comes and goes, limits reach the core."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count

import pytest
from tests.support.paging import Blob

from softsgx.arch import PAGE_BYTES, PageType, Status
from softsgx.errors import SoftSgxError
from softsgx.host import Platform
from softsgx.hw import DEFAULT_EPC_BASE, PageInfoArgs
from softsgx.runtime import InlineRuntime, Runtime, SeededRuntime, ThreadsRuntime
from softsgx.trace import Event


def test_a_platform_is_consistent_from_start_to_stop() -> None:
    with Platform(epc="1MiB") as platform:
        platform.check()
        assert platform.core.free_pages == 256


def test_the_driver_can_be_unloaded_only_when_no_file_is_open() -> None:
    with Platform(epc="1MiB") as platform:
        process = platform.process()
        process.open()
        with pytest.raises(OSError, match="in use") as busy:
            platform.unload("driver")
        assert busy.value.errno == errno.EBUSY
        process.exit()
        platform.unload("driver")
        with pytest.raises(OSError, match="not loaded") as gone:
            platform.process()
        assert gone.value.errno == errno.ENODEV
        platform.load("driver")
        platform.process().open()


def test_the_driver_is_loaded_once_and_nothing_else_is() -> None:
    with Platform(epc="1MiB") as platform:
        with pytest.raises(OSError, match="is loaded"):
            platform.load("driver")
        with pytest.raises(SoftSgxError, match="the only module"):
            platform.load("kvm")


def test_groups_are_made_with_their_limits() -> None:
    platform = Platform(epc="1MiB", groups={"jobs/a": {"max": "128KiB"}})
    assert platform.cgroups.find("jobs/a").max_pages == 32
    assert platform.cgroups.find("jobs").max_pages is None


def test_the_same_seed_gives_the_same_secrets_and_another_one_others() -> None:
    keys = [Platform(epc="1MiB", seed=seed).machine.secrets.device_key for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def _evicted(platform: Platform) -> tuple[Blob, ...]:
    """Return what a machine writes of a page of zeros and of the VA page with its version."""
    leaves, free = platform.machine.leaves, count(DEFAULT_EPC_BASE, PAGE_BYTES)
    page, slots, above = (next(free) for _ in range(3))
    for addr in (page, slots, above):
        leaves.epa(int(PageType.VA), addr)
    blobs = []
    for addr, slot in ((page, slots), (slots, above)):
        blob = Blob(bytearray(PAGE_BYTES), bytearray(128), slot)
        assert leaves.ewb(PageInfoArgs(0, blob.srcpge, blob.pcmd, 0), addr, slot) == Status.SUCCESS
        blobs.append(blob)
    return tuple(blobs)


def test_two_runs_of_one_machine_never_seal_under_the_same_paging_key() -> None:
    first, second = (Platform(epc="1MiB", seed=1) for _ in range(2))
    (a, _), (b, slots) = _evicted(first), _evicted(second)
    # The same page with the same version: with one key, two pages of one key stream.
    assert a.srcpge != b.srcpge
    assert first.machine.secrets.report_key_id != second.machine.secrets.report_key_id
    # The second run's slots, with all its versions, are where they were; the page is the first's.
    leaves = second.machine.leaves
    leaves.eldu(slots.args(), DEFAULT_EPC_BASE + PAGE_BYTES, slots.slot)
    assert leaves.eldu(a.args(), DEFAULT_EPC_BASE, a.slot) == Status.MAC_COMPARE_FAIL
    assert leaves.eldu(b.args(), DEFAULT_EPC_BASE, b.slot) == Status.SUCCESS


@pytest.mark.parametrize("runtime", [InlineRuntime, ThreadsRuntime])
def test_keys_of_a_power_cycle_follow_from_no_seed(runtime: Callable[[int], Runtime]) -> None:
    first, second = (Platform(epc="1MiB", runtime=runtime(1)) for _ in range(2))
    assert _evicted(first)[0].srcpge != _evicted(second)[0].srcpge


def test_a_schedule_repeats_what_is_written_byte_for_byte() -> None:
    first, second = (Platform(epc="1MiB", runtime=SeededRuntime(1)) for _ in range(2))
    assert _evicted(first) == _evicted(second)


def test_what_a_machine_has_sealed_can_be_unsealed_on_it_by_every_version() -> None:
    secrets = Platform().machine.secrets
    kept = (secrets.device_key.hex(), secrets.seal_fuses.hex(), secrets.owner_epoch.hex())
    assert kept == (
        "cd072cd8be6f9f62ac4c09c28206e7e3",
        "5594aa6b342f5d0a3a5e4842fab428f7",
        "0" * 32,
    )
    assert secrets.derive(b"facts").hex() == "ac74b1a0d9b6ee412fd237a7e3a2a055"


def test_every_layer_tells_the_one_listener() -> None:
    heard: list[Event] = []
    with Platform(epc="1MiB", tracer=heard.append, sanitize=True):
        pass
    names = {type(event).__name__ for event in heard}
    assert {"LeafDone", "Sanitized"} <= names
