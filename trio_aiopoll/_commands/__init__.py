"""The command line: ``python -m trio_aiopoll check|run|bench|top``, one module each.

A command's module has ``add_to``, which describes it to argparse, and the function that does it, which returns the exit
code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING

import trio_aiopoll

from . import bench, check, run, top

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code.

    Raises:
      SystemExit: code 2, the arguments make no sense; code 0, it was asked for help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trio_aiopoll",
        description="Trio programs on Linux AIO polls: does it work here, how to use it, what it changes.",
        epilog="'COMMAND --help' tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"trio_aiopoll {trio_aiopoll.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (check, run, bench, top):
        command.add_to(commands)
    arguments, program = run.split_off_program(arguments)
    options = parser.parse_args(arguments)
    if program is not None:
        return run.run(options, program)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code
