"""The parsers below atheris, a fuzzer that watches branches: ``pip install --group fuzz`` first.

    python -m tests.soak.parsers_atheris CORPUS -max_total_time=600 -seed=1

The first byte of an input names the parser.  Valid inputs are written into CORPUS, an existing
directory, before it starts; options are libFuzzer's.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Fuzz until a fault or until the options say so; does not return."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["softsgx"]):
        parsers: Any = import_module("tests.soak.parsers")
    names = list(parsers.PARSERS)

    def one_input(data: bytes) -> None:
        if data:
            name = names[data[0] % len(names)]
            _, fault, _ = parsers.try_one(parsers.PARSERS[name], bytes(data[1:]))
            if fault:
                print(parsers.Fault(name, fault, bytes(data[1:])).text())
                raise AssertionError(fault)

    corpus = next((Path(word) for word in sys.argv[1:] if not word.startswith("-")), None)
    if corpus is not None:
        for index, name in enumerate(names):
            for nth, seed in enumerate(parsers.SEEDS[name]()):
                (corpus / f"{name.replace(' ', '-')}-{nth}").write_bytes(bytes([index]) + seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
