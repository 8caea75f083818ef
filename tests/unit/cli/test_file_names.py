"""A name that no file can have is refused in one line by each command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.enclave_files import raw_file

from softsgx.cli import main
from softsgx.image import open_image

LONG = "a" * 256


@pytest.mark.parametrize(
    "command",
    [
        ["build", f"{LONG}.c"],
        ["build", "--host", f"{LONG}.c", "enclave.c"],
        ["build", "-o", LONG, "enclave.c"],
        ["sign", "--new-key", "key.pem", LONG],
        ["sign", "--new-key", "key.pem", "-o", LONG, "enclave.raw"],
        ["inspect", LONG],
        ["measure", LONG],
        ["load", LONG],
        ["run", "--json", LONG, "--", "true"],
        ["run", "--report", LONG, "--", "true"],
        ["run", "--config", LONG, "--", "true"],
    ],
    ids=lambda command: " ".join(command).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long_is_refused_in_one_line(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enclave.raw").write_bytes(raw_file())
    (tmp_path / "enclave.c").write_text("long ecall(void) { return 0; }\n")
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("softsgx: ")


def test_an_image_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 253)  # its signature's would have too many letters
    path.write_bytes(raw_file())
    assert open_image(path).sigstruct is None
