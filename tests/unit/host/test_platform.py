"""The assembled platform: parts fit, the driver comes and goes, limits reach the core."""

from __future__ import annotations

import errno

import pytest

from softsgx.errors import SoftSgxError
from softsgx.host import Platform
from softsgx.trace import Event


def test_a_platform_is_consistent_from_start_to_stop() -> None:
    with Platform(epc="1MiB") as platform:
        platform.check()
        assert platform.core.free_pages == 256


def test_the_driver_can_go_only_when_nobody_has_it_open() -> None:
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
        with pytest.raises(SoftSgxError, match="only driver"):
            platform.load("kvm")


def test_groups_are_made_with_their_limits() -> None:
    platform = Platform(epc="1MiB", groups={"jobs/a": {"max": "64KiB"}})
    assert platform.cgroups.find("jobs/a").max_pages == 16
    assert platform.cgroups.find("jobs").max_pages is None


def test_the_same_seed_gives_the_same_secrets_and_another_one_others() -> None:
    keys = [Platform(epc="1MiB", seed=seed).machine.secrets.device_key for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


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
