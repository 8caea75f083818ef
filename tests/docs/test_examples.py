"""Examples with a prompt, in docstrings and on pages, print what they show."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from tests.docs.pages import Block, blocks
from tests.docs.test_pages import PAGES, ROOT

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PROMPT = ">>> "


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples that write files do so in a directory of their own."""
    monkeypatch.chdir(tmp_path)


MODULES = [
    path.relative_to(ROOT) for path in ROOT.glob("src/**/*.py") if PROMPT in path.read_text()
]


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_examples_of_a_docstring_hold(path: Path) -> None:
    name = ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")
    failed, tried = doctest.testmod(import_module(name), optionflags=OPTIONS)
    assert tried > 0
    assert failed == 0


EXAMPLES = [
    block for page in PAGES for block in blocks(ROOT / page) if block.text.startswith(PROMPT)
]


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.where)
def test_the_examples_of_a_page_hold(block: Block) -> None:
    examples = doctest.DocTestParser().get_doctest(
        block.text, {}, block.page.name, str(block.page), block.line
    )
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(examples)
    assert result.attempted > 0
    assert result.failed == 0
