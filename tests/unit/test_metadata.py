"""The metadata of the project is consistent."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import softsgx

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def cited() -> dict[str, str]:
    """The top-level fields of CITATION.cff that are on one line."""
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    found = (re.fullmatch(r"([\w-]+): (.+)", line) for line in lines)
    return {match[1]: match[2].strip('"') for match in found if match}


def test_there_is_one_version() -> None:
    plugin = ROOT / "plugins" / "pytest-softsgx" / "pyproject.toml"
    assert PROJECT["dynamic"] == ["version"], "the package's own is the only one"
    assert cited()["version"] == softsgx.__version__
    assert tomllib.loads(plugin.read_text())["project"]["version"] == softsgx.__version__


def test_the_citation_has_what_its_format_requires() -> None:
    fields = cited()
    assert fields["cff-version"] == "1.2.0"
    assert {"message", "title"} <= fields.keys()
    assert "\nauthors:\n  - name: " in (ROOT / "CITATION.cff").read_text()
    assert fields["license"] == PROJECT["license"]


def test_each_python_that_is_tested_is_a_classifier() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = re.search(r"python: \[(.*)\]", workflow)
    assert tested is not None
    for version in re.findall(r'"([\d.]+)"', tested[1]):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_image_installs_extras_and_distributions_that_exist() -> None:
    lines = (ROOT / "Containerfile").read_text()
    for extras in re.findall(r"\[([\w,]+)\]", lines):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert (ROOT / "plugins" / "pytest-softsgx").is_dir()
    assert re.search(r'ENTRYPOINT \["softsgx"\]', lines) and "softsgx" in PROJECT["scripts"]
