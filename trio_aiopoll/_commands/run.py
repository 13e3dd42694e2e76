"""``run``: an unmodified program, with aiopoll as the I/O manager of its runs."""

from __future__ import annotations

import atexit
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from trio_aiopoll import _environment, _selection
from trio_aiopoll._probe import probe
from trio_aiopoll._tick_recorder import TickRecorder

from . import _program, _spawned

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_NAME: Final = "run"
_WITH_VALUE: Final = ("--io-manager", "--record-ticks")
_UNAVAILABLE: Final = 125  # as of env(1) and timeout(1), if they fail themselves


def split_off_program(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Part the arguments into ours and, if the command is ``run``, the program's, which argparse must not look at."""
    if not arguments or arguments[0] != _NAME:
        return list(arguments), None
    place = 1
    while place < len(arguments):
        argument = arguments[place]
        if argument == "--":
            return list(arguments[:place]), list(arguments[place + 1 :])
        if not argument.startswith("-") or argument.startswith("-m"):
            break
        place += 2 if argument in _WITH_VALUE else 1
    return list(arguments[:place]), list(arguments[place:])


def _parse_program(parser: argparse.ArgumentParser, program: Sequence[str]) -> tuple[bool, str, list[str]]:
    """Whether it is a module, its name, and its arguments."""
    if not program:
        parser.error("which program? SCRIPT or -m MODULE is missing")
    first, *rest = program
    if not first.startswith("-m"):
        return False, first, rest
    if first != "-m":
        return True, first[2:], rest
    if not rest:
        parser.error("argument -m: expected the name of a module")
    return True, rest[0], rest[1:]


def _choose(parser: argparse.ArgumentParser, argument: str | None) -> str:
    if argument is not None:
        return argument
    name = _environment.IO_MANAGER.get() or "aiopoll"
    if name not in _selection.NAMES:
        known = ", ".join(_selection.NAMES)
        parser.error(f"{_environment.IO_MANAGER.name}={name!r} is not known; use one of {known}, or unset it")
    return name


def _record_ticks(path: str) -> None:
    recorders: list[TickRecorder] = []

    def record() -> TickRecorder:
        recorders.append(TickRecorder())
        return recorders[-1]

    with open(path, "w"):  # a bad path is better found out before the program has done its work
        pass

    process_id = os.getpid()

    def write() -> None:
        if os.getpid() == process_id:  # not in forked children
            with open(path, "w") as file:
                json.dump({"runs": [recorder.as_dict() for recorder in recorders]}, file)

    _selection.additional_instruments.append(record)
    atexit.register(write)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    parser: argparse.ArgumentParser = options.parser
    is_module, name, arguments = _parse_program(parser, program)
    io_manager = _choose(parser, options.io_manager)
    if io_manager == "aiopoll":
        result = probe()
        if not result.available:
            print(f"{parser.prog}: {result.reason}", file=sys.stderr)
            return _UNAVAILABLE
    # In the environment, so that processes which the program starts choose likewise.
    os.environ[_environment.IO_MANAGER.name] = io_manager
    if options.debug:
        os.environ[_environment.DEBUG.name] = "1"
    if options.top:
        os.environ[_environment.TOP.name] = "1"
    if options.record_ticks is not None:
        try:
            _record_ticks(options.record_ticks)
        except OSError as error:
            parser.error(f"argument --record-ticks: {error}")
    _spawned.follow()
    sys.argv[1:] = arguments
    try:
        load: Any = _program.find_module if is_module else _program.find_script
        found = load(name)
    except _program.NotFoundError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    found.run()
    return 0


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        _NAME,
        usage="%(prog)s [options] (SCRIPT | -m MODULE) [ARGS ...]",
        help="run an unmodified program on aiopoll",
        description="Runs a program as 'python SCRIPT ARGS' and 'python -m MODULE ARGS' would, with aiopoll as the I/O "
        "manager of every Trio run in it that does not choose another. Processes that it starts by multiprocessing "
        "follow, and so do others that import trio_aiopoll.",
        epilog="Exit code: the program's; 2, the arguments make no sense or there is no such script; 125, aiopoll does "
        "not work here ('check' tells why).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--io-manager",
        choices=_selection.NAMES,
        help=f"default: what {_environment.IO_MANAGER.name} says, otherwise aiopoll",
    )
    parser.add_argument("--debug", action="store_true", help="explain for each wait which lane it takes, on stderr")
    parser.add_argument("--top", action="store_true", help="let 'python -m trio_aiopoll top PID' look into the runs")
    parser.add_argument("--record-ticks", metavar="FILE", help="write to FILE, as JSON, what each tick of each run did")
    parser.set_defaults(parser=parser)
