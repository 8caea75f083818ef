"""Guests in the assembled platform: one call makes one, and it shares EPC and groups."""

from __future__ import annotations

import pytest
from tests.support.driver import launch, pattern

from softsgx.errors import SoftSgxError
from softsgx.host import Platform
from softsgx.kvm import GuestStoppedError, VepcEvicted
from softsgx.trace import Event


def test_guests_and_native_enclaves_share_one_epc() -> None:
    events: list[Event] = []
    with Platform(epc="256KiB", tracer=events.append) as platform:
        guests = [platform.guest(name, epc="256KiB") for name in "abc"]
        made = [launch(guest.process(), 40) for guest in guests]
        native = launch(platform.process(), 20)
        for number in range(40):
            for enclave in made:
                thread = enclave.thread()
                assert thread.load(enclave.data(number), 8) == pattern(number)[:8]
                thread.exit()
        assert native.thread(1, tcs=0).load(native.data(9), 8) == pattern(9)[:8]
        platform.check()
        assert {e.guest for e in events if isinstance(e, VepcEvicted)} == {"a", "b", "c"}
        for guest in list(platform.guests):
            platform.remove_guest(guest)
        native.process.exit()
        platform.check()
        assert platform.core.free_pages == 64


def test_a_guest_is_charged_to_the_group_it_names() -> None:
    with Platform(epc="1MiB", groups={"guests": {"max": "128KiB"}}) as platform:
        guest = platform.guest("a", epc=("512KiB", "512KiB"), group="guests/a")
        made = launch(guest.process(), 60)
        thread = made.thread()
        for number in range(60):
            thread.load(made.data(number))
        assert platform.cgroups.find("guests").peak_pages <= 32
        assert guest.guest.evicted_pages() > 20
        thread.exit()
        platform.check()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"epc": "4KiB"}, r"give at least 25 \(100KiB\)"),
        ({"epc": "112KiB", "processors": 0}, "one processor"),
        ({"epc": "2MiB", "ballast": "1000KiB"}, "leaves fewer than 25 of 256 EPC pages"),
        (
            {"epc": "2MiB", "ballast": "100KiB", "group": "small"},
            "not below the limit of /small, 25 pages",
        ),
        ({"epc": "112KiB", "ballast": "128KiB"}, "a ballast of 32 pages exceeds its EPC of 28"),
        ({"epc": "many"}, "not a size"),
    ],
)
def test_impossible_guests_are_refused(options: dict[str, object], complaint: str) -> None:
    with (
        Platform(epc="1MiB", groups={"small": {"max": "100KiB"}}) as platform,
        pytest.raises(SoftSgxError, match=complaint),
    ):
        platform.guest("a", **options)  # type: ignore[arg-type]


def test_ballasts_of_all_guests_count() -> None:
    with Platform(epc="256KiB") as platform:
        platform.guest("a", epc="256KiB", ballast="120KiB")
        with pytest.raises(SoftSgxError, match="with the 30 pages of other guests"):
            platform.guest("b", epc="256KiB", ballast="80KiB")


def test_the_last_resort_may_be_a_guest() -> None:
    with Platform(epc="256KiB", groups={"g": {"max": "160KiB"}}, kill=True) as platform:
        fat = platform.guest("fat", epc="256KiB", ballast="152KiB", group="g/fat")
        made = launch(fat.process(), 40)
        thread = made.thread()
        for number in range(40):
            thread.load(made.data(number))
        thread.exit()
        process = platform.process(group="g/native")
        native = launch(process, 20)
        assert fat.guest.stopped == "killed for its EPC"
        with pytest.raises(GuestStoppedError, match="fat"):
            made.thread()
        assert native.thread(1, tcs=0).load(native.data(3), 8) == pattern(3)[:8]
        platform.cgroups.check_invariants()


def test_one_guest_loses_power_and_the_platform_does_not() -> None:
    with Platform(epc="512KiB") as platform:
        one, two = (platform.guest(name, epc="256KiB") for name in "ab")
        made, other = launch(one.process(), 4), launch(two.process(), 4)
        one.power_loss()
        assert one.guest.stopped is None
        assert other.thread().load(other.data(2), 8) == pattern(2)[:8]
        again = launch(one.process(), 4)
        assert again.thread().load(again.data(2), 8) == pattern(2)[:8]
        assert made.fd >= 0
