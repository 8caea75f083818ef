"""What the commands advise is accepted by their own parsers.

``tests/unit/report/test_verdict.py`` has the same for the verdict on a run.
"""

from __future__ import annotations

import importlib
import re
import shlex
from inspect import getsource
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import group_name_ok
from softsgx.cli import parser_of
from softsgx.cli._program import config_of, group_of
from softsgx.errors import SoftSgxError
from softsgx.plan import planner, sentence
from softsgx.plan.sentence import exact_size
from softsgx.report import plan_text, tables

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=3).map("/".join) | st.sampled_from(
    [
        "a//b",
        "..",
        "a/../b",
        "misc.x",
        "a\nb",
        "-x",
        "a=b",
        "two words",
        "it's",
        "$HOME",
        "max",
    ]
)

doctor = importlib.import_module("softsgx.engines.native.doctor")

#: Options of container engines and of the shell.
FOREIGN = {"--cap-add", "--security-opt"}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", text))


def options_of(command: str) -> set[str]:
    return set(parser_of(command)._option_string_actions)


@given(path=paths.filter(lambda path: path.strip("/") not in ("", "--")))
def test_run_advises_a_limit_for_each_group_that_can_exist(path: str) -> None:
    args = parser_of("run").parse_args([f"--group={path}", "--", "./app"])
    with pytest.raises(SoftSgxError) as refused:
        group_of(args, config_of(args))
    message = str(refused.value)
    if not all(map(group_name_ok, path.strip("/").split("/"))):
        assert "add --limit" not in message and "not a path" in message
        return
    advised = message.partition("; add ")[2]
    for option, size in zip(
        advised.removesuffix(" for no limit").split(", or --limit"), ("SIZE", "max"), strict=True
    ):
        text = option if option.startswith("--limit") else f"--limit{option}"
        words = [word.replace("SIZE", "16MiB") for word in shlex.split(text)] + ["--", "./app"]
        again = parser_of("run").parse_args(words)
        config = config_of(again)
        assert group_of(again, config) == path.strip("/"), size


@given(pages=st.integers(25, 1 << 24))
def test_run_accepts_the_sizes_that_plan_recommends(pages: int) -> None:
    text = exact_size(pages * PAGE_BYTES)
    args = parser_of("run").parse_args(["--epc", text, "--", "./app"])
    assert sum(config_of(args).section_bytes()) == pages * PAGE_BYTES
    assert parser_of("plan").parse_args(["--epc", text.replace(" ", ""), "x"]).epc[0] == (
        pages * PAGE_BYTES
    )


@pytest.mark.parametrize("module", [planner, sentence, plan_text, tables])
def test_options_that_plan_and_reports_name_are_those_of_a_command(module: ModuleType) -> None:
    assert options_in(getsource(module)) <= options_of("plan") | options_of("run")


def test_options_that_findings_name_are_those_of_run_or_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each finding as on a machine that lacks what it is about, with the text for that."""
    monkeypatch.setattr(doctor, "_finding", lambda name, _ok, *, needed, good, bad: (good, bad))
    texts = [
        text
        for finding in [*doctor._needed(traceable=False), *doctor._improving()]
        for text in (finding if isinstance(finding, tuple) else (finding.text,))
    ]
    named = set[str]().union(*map(options_in, texts))
    assert "--cap-add" in named and named <= options_of("run") | FOREIGN
    commands = set(re.findall(r"softsgx ([a-z]+)", " ".join(texts)))
    for command in commands:
        assert parser_of(command).prog.endswith(command)
