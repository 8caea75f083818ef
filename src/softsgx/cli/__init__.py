"""The command ``softsgx``: one module for each verb, named in ``VERBS``.

A verb's module has a docstring, which is its help, ``NAME``, ``configure(parser)`` and
``run(args) -> int``.  Exit status 0: fine; 1: found something; 2: bad input.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EPIPE
from importlib import import_module
from typing import Any, Protocol, TextIO, cast

import softsgx
from softsgx import compiled
from softsgx.cli._common import discard, tell
from softsgx.cli._help import HelpFormatter
from softsgx.cli._signals import EndedBySignal
from softsgx.errors import SoftSgxError

__all__ = ["VERBS", "Command", "command_of", "main", "parser_of", "whole_parser"]

_DESCRIPTION = """\
SGX without the hardware: read, measure, sign and run enclaves on a software machine with a finite,
encrypted Enclave Page Cache.

softsgx is an emulation: it protects nothing from the owner of the machine it runs on.  Never
give an enclave that runs here a secret that the machine's owner must not know."""

_EPILOG = """\
examples:
  softsgx build enclave.c --host host.c   an enclave from C, and the program that uses it
  softsgx run --epc 16MiB -- ./app        run a program that uses SGX
  softsgx top                             faults and evictions of running programs, live
  softsgx record -o app.trace -- ./app    record which pages it uses
  softsgx plan app.trace                  how much EPC does it need?  record makes the trace
  softsgx inspect enclave.signed.so       what is in it: pages, threads, signature
  softsgx measure enclave.signed.so       its MRENCLAVE, and whether its signature fits
  softsgx load enclave.signed.so          do the driver and EINIT accept it?
  softsgx sign --new-key key.pem enclave.sgxs
                                          make a key, sign with it, write enclave.sig
  softsgx defects run B11                 a known defect of Linux, and the schedule that shows it

exit status: 0 success, 1 a check failed or something was found, 2 bad input.
softsgx VERB --help explains a verb."""


class Command(Protocol):
    """The interface of a verb's module."""

    NAME: str
    __doc__: str | None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the verb; return the exit status."""


VERBS: Mapping[str, str] = {
    "tour": "Show how one page is evicted from the EPC and loaded again, leaf by leaf.",
    "build": "Build an enclave from C: compile, lay out, measure, sign.",
    "run": "Run a program that uses SGX, unmodified, on a machine without SGX.",
    "top": "Show running programs live: enclaves, page faults, evictions, EPC, limits.",
    "record": "Record which pages of enclaves an unmodified program uses, and when.",
    "plan": "Predict how much EPC recorded programs need, and the slowdown with less.",
    "doctor": "Show what this machine allows, and which engine and pager programs would use.",
    "inspect": "Show what is in an enclave file: pages, threads, signature, metadata.",
    "measure": "Measure an enclave file, and say whether its signature matches.",
    "sign": "Sign an enclave file, in one step, or in two steps with a key on another machine.",
    "load": "Load an enclave file through the driver, and say whether EINIT accepts it.",
    "defects": "List, explain and run the known defects of Linux's SGX code.",
    "explore": "Find races: run small scenarios under many schedules and check everything.",
}
"""The verbs, each with the first line of its module's docstring."""


_OUTPUT_FAILURES = frozenset({EDQUOT, EFBIG, EIO, ENOSPC, EPIPE})


def command_of(verb: str) -> Command:
    """Return the module of a verb."""
    return cast(Command, import_module(f"softsgx.cli.{verb}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status, 128 + n where signal n ends the command.

    Args:
        argv: the words behind the command's name; ``None``: those of this process.  Then a signal
            that ends the command also ends the process.
    """
    return _with_room(_main, argv)


def _with_room(function: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Call a function; its frames, and those of what it calls, are in one piece of memory.

    CPython has its frames in pieces of 16 KiB.  A loop at the end of one takes the next piece from
    the kernel at each call, and gives it back at each return: nested imports did so hundreds of
    times.  A frame that does not fit gets a larger piece, and this one says that it is large.
    """
    return function(argv)


_FRAME_WORDS = 128 * 1024 // 8
"""A frame of so many, and what CPython adds, has a piece of twice the size: half is left."""
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=_FRAME_WORDS)


def _main(argv: Sequence[str] | None) -> int:
    _complete_standard_files()
    try:
        words = sys.argv[1:] if argv is None else argv
        parser, _verbs = _parser(_wanted(words))
        with _uncollected() if argv is None else nullcontext():
            args = parser.parse_args(words)
        if not hasattr(args, "command"):
            parser.print_help()
            return 2
        args.words = list(words)
        return _run(args)
    except KeyboardInterrupt:
        number = int(signal.SIGINT)
    except EndedBySignal as ended:
        number = ended.number
    finally:
        _end_output(sys.stderr, 2)
    return 128 + number if argv is not None else _end_by(number)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without collections of garbage, and leave what is imported out of later ones.

    Modules stay until the process ends.  To look at all of them again and again took a tenth of the
    start and of the end of a command.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _run(args: argparse.Namespace) -> int:
    command: Command = args.command
    try:
        status = command.run(args)
        sys.stdout.flush()
    except SoftSgxError as error:
        tell(f"softsgx: {error}")
        return error.exit_status
    except OSError as error:
        # An error of a file has its name; an error of standard output has none.
        if error.errno not in _OUTPUT_FAILURES or error.filename is not None:
            raise
        _end_output(sys.stdout, 1)
        if not isinstance(error, BrokenPipeError):  # the reader has closed the pipe: no error
            tell(f"softsgx: standard output: {error.strerror}")
        return 1
    return status


def _complete_standard_files() -> None:
    """Open /dev/null for each closed standard file, or other files would get its number.

    execve closes these descriptors in programs that the command runs.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _end_output(file: TextIO, descriptor: int) -> bool:
    """Flush an output; return whether that has failed.

    After a failure the rest is discarded, or the interpreter would fail on it at its exit.
    """
    try:
        file.flush()
    except OSError:
        discard(descriptor)
        return True
    return False


def _end_by(number: int) -> int:
    """End this process by a signal; return an exit status if the signal does not end it."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number  # the first process of a process namespace survives it


class _VerbParser(argparse.ArgumentParser):
    """The parser of one verb, whose module is imported when it is used."""

    verb = ""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """As the base class has it."""
        self.complete()
        return super().parse_known_args(*arguments, **named)

    def complete(self) -> None:
        """Add what the verb's module has to say."""
        if self.verb:
            command = command_of(self.verb)
            self.epilog = (command.__doc__ or "").partition("\n")[2].strip("\n")
            command.configure(self)
            self.set_defaults(command=command)
            self.verb = ""


def _wanted(argv: Sequence[str]) -> Iterable[str]:
    """Return the verbs to make parsers of, which takes a millisecond for all."""
    first = argv[0] if argv else ""
    return (first,) if first in VERBS else VERBS


def _parser(names: Iterable[str]) -> tuple[argparse.ArgumentParser, Mapping[str, _VerbParser]]:
    """Return the parser of the command line with some verbs, and theirs by name."""
    parser = argparse.ArgumentParser(
        prog="softsgx",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    version = f"softsgx {softsgx.__version__}, {compiled.description}"
    parser.add_argument("--version", action="version", version=version)
    return parser, _add_verbs(parser, names)


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with every verb."""
    parser, verbs = _parser(VERBS)
    for verb in verbs.values():
        verb.complete()
    return parser


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb, as ``softsgx VERB`` has it."""
    parser = argparse.ArgumentParser(prog="softsgx", formatter_class=HelpFormatter)
    found = _add_verbs(parser, (verb,))[verb]
    found.complete()
    return found


def _add_verbs(parser: argparse.ArgumentParser, names: Iterable[str]) -> Mapping[str, _VerbParser]:
    """Add the verbs' parsers; return them by name."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=_VerbParser)
    for name in names:
        summary = VERBS[name]
        verb = verbs.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            formatter_class=HelpFormatter,
        )
        verb.verb = name
    return verbs.choices
