"""Reference pages made from the code: the commands' parsers, and the events of every layer.

Docstrings may describe several names in one entry (``base, size: its range``).  Sphinx takes the
last word of such an entry as the name and the others as its type; here each name is a name.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from softsgx.cli import VERBS, command_of, parser_of
from softsgx.trace import Event

_NAMES = re.compile(r":(ivar|param) (\w+(?:, \w+)+):")
_OPTION = re.compile(r"(--[a-z]\S*)")
EVENT_MODULES = {
    "hw": "softsgx.hw.events",
    "paging": "softsgx.paging.events",
    "driver": "softsgx.driver.events",
    "kvm": "softsgx.kvm.events",
    "cgroup": "softsgx.cgroup.events",
}


class Commands(SphinxDirective):
    """A section for each verb: usage, options, examples."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        return [self._section(verb) for verb in VERBS]

    def _section(self, verb: str) -> nodes.section:
        parser = parser_of(verb)
        title = f"softsgx {verb}"
        section = nodes.section(ids=[nodes.make_id(title)], names=[title])
        section += nodes.title(text=title)
        section += nodes.paragraph(text=parser.description or "")
        section += _verbatim(parser.format_usage().removeprefix("usage: "))
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if _shown(action)]
            if actions:
                section += nodes.rubric(text=(group.title or "").capitalize())
                section += _options(parser, actions)
        for part in (parser.epilog or "").split("\n\n"):
            indented = any(line.startswith(" ") for line in part.splitlines())
            section += _verbatim(part) if indented else nodes.paragraph(text=part)
        self.env.note_dependency(str(import_module(command_of(verb).__name__).__file__))
        return section


def _verbatim(text: str) -> nodes.literal_block:
    return nodes.literal_block(text=text.strip("\n"), language="text")


def _shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and "--help" not in action.option_strings


def _options(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> nodes.Node:
    formatter = parser._get_formatter()
    listed = nodes.definition_list()
    for action in actions:
        term = nodes.term()
        term += nodes.literal(text=formatter._format_action_invocation(action))
        text = formatter._expand_help(action) if action.help else ""
        if action.choices is not None:
            text += f" (one of {', '.join(map(str, action.choices))})"
        definition = nodes.definition("", _marked(_OPTION.sub(r"``\1``", text)))
        listed += nodes.definition_list_item("", term, definition)
    return listed


class Events(SphinxDirective):
    """A table of every event: its name in text, when it happens, its fields."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        heads = ("event", "class", "when", "fields")
        table = nodes.table(classes=["softsgx-events"])
        group = nodes.tgroup(cols=len(heads))
        table += group
        group += [nodes.colspec(colwidth=width) for width in (20, 20, 40, 20)]
        group += nodes.thead("", _row([nodes.paragraph(text=head) for head in heads]))
        body = nodes.tbody()
        group += body
        for event in _events():
            summary = (event.__doc__ or "").partition("\n")[0]
            names = ", ".join(field.name for field in fields(event))
            body += _row(
                [
                    nodes.paragraph("", "", nodes.literal(text=event.NAME)),
                    nodes.paragraph("", "", nodes.literal(text=event.__name__)),
                    _marked(summary),
                    nodes.paragraph(
                        "", "", nodes.literal(text=names) if names else nodes.Text("–")
                    ),
                ]
            )
        return [table]


def _events() -> Iterator[type[Event]]:
    for module in EVENT_MODULES.values():
        for made in vars(import_module(module)).values():
            if isinstance(made, type) and made.__module__ == module and issubclass(made, Event):
                yield made


def _marked(text: str) -> nodes.paragraph:
    """Return a paragraph in which text between double backquotes is literal."""
    parts = enumerate(text.split("``"))
    return nodes.paragraph(
        "", "", *(nodes.literal(text=part) if odd % 2 else nodes.Text(part) for odd, part in parts)
    )


def _row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", cell) for cell in cells))


def _join_names(
    app: Sphinx, what: str, name: str, made: object, options: object, lines: list[str]
) -> None:
    """Join the names of an entry by commas alone, so that Sphinx sees one name and no type."""
    for index, line in enumerate(lines):
        found = _NAMES.match(line)
        if found is not None:
            names = found[2].replace(", ", ",")
            lines[index] = f":{found[1]} {names}:{line[found.end() :]}"


def _space_names(app: Sphinx, doctree: nodes.document) -> None:
    """Put a space after the commas of such an entry."""
    for comma in list(doctree.findall(addnodes.literal_strong)):
        if comma.astext() == ",":
            comma.replace_self(nodes.Text(", "))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("softsgx-commands", Commands)
    app.add_directive("softsgx-events", Events)
    # After Napoleon, which turns sections into fields.
    app.connect("autodoc-process-docstring", _join_names, priority=600)
    app.connect("doctree-read", _space_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
