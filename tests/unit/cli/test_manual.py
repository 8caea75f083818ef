"""Man pages and completion have every verb and option that the parsers have."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from softsgx.cli import VERBS, parser_of

pytest.importorskip("shtab")
pytest.importorskip("argparse_manpage")
TOOL = Path(__file__).parents[3] / "tools" / "manual.py"


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manual", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(manual: ModuleType) -> dict[str, str]:
    return dict(manual.man_pages())


def options(verb: str) -> list[str]:
    return [name for action in parser_of(verb)._actions for name in action.option_strings]


def test_there_is_a_page_for_each_verb(pages: dict[str, str]) -> None:
    assert set(pages) == {"man/softsgx.1", *(f"man/softsgx-{verb}.1" for verb in VERBS)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_has_every_option_and_the_examples(pages: dict[str, str], verb: str) -> None:
    page = pages[f"man/softsgx-{verb}.1"].replace("\\-", "-")
    assert [name for name in options(verb) if name not in page and name != "--help"] == []
    assert f"softsgx {verb}" in page.partition(".SH NOTES")[2]


def test_no_section_of_a_page_is_empty(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        _head, *sections = page.split("\n.SH ")
        empty = [section for section in sections if not section.partition("\n")[2].strip()]
        assert empty == [], name


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_groff_has_nothing_to_say_about_a_page(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        done = subprocess.run(
            ["groff", "-man", "-Tascii", "-ww", "-z"],
            input=page,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), name


def test_completion_knows_verbs_and_options_in_every_shell(manual: ModuleType) -> None:
    made = dict(manual.completions())
    assert set(made) == {f"completion/softsgx.{shell}" for shell in manual.SHELLS}
    for text in made.values():
        assert all(verb in text for verb in VERBS)
        assert "enclave-file" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_a_verb(manual: ModuleType) -> None:
    script = dict(manual.completions())["completion/softsgx.bash"]
    ask = "COMP_WORDS=(softsgx ins); COMP_CWORD=1; _shtab_softsgx; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["inspect"], done.stderr
