"""``check``: does aiopoll work here; if not, why not and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import trio

import trio_aiopoll
from trio_aiopoll import _ring_ffi
from trio_aiopoll._environment import IO_MANAGER
from trio_aiopoll._probe import ProbeResult, aio_budget, probe
from trio_aiopoll._selection import NAMES
from trio_aiopoll._trio_compat import REPLACED, missing_names, missing_names_for_sockets

from ._terminal import Terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

State = Literal["ok", "warning", "failed"]

_MARKS: Final[dict[State, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failed": ("FAILED", "red"),
}
_FIRST_KERNEL: Final = (4, 19)
_FIXED_KERNEL: Final = (5, 16)
_RING_CHARGE: Final = 256
_RING_POLLS: Final = 512
_SECCOMP_FILTER: Final = "2"


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing; ``advice`` is what to do about it, if anything."""

    name: str
    state: State
    value: str
    advice: str | None = None


def _kernel() -> Finding:
    value = f"{platform.system()} {platform.release()}, {platform.machine()}"
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    if match is None:
        return Finding("kernel", "warning", value, "its version is unknown; Linux 4.19 or later is needed")
    version = int(match[1]), int(match[2])
    if version < _FIRST_KERNEL:
        return Finding("kernel", "failed", value, "use Linux 4.19 or later")
    if version < _FIXED_KERNEL:
        advice = (
            "make sure that this kernel has the fix 'aio: keep poll requests on waitqueue until completed' of Linux "
            "5.16, which stable kernels have got in December 2021; without it a wake-up may be lost"
        )
        return Finding("kernel", "warning", value, advice)
    return Finding("kernel", "ok", value)


def _probe_in_child(probing: Callable[[], ProbeResult]) -> ProbeResult:
    """Probe in a process of its own, since a sandbox may kill who makes the system calls."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            result = probing()
            os.write(writer, json.dumps([result.available, result.reason]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return ProbeResult(*json.loads(answer))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"aiopoll is not available: a process that uses AIO polls is killed by {name}"
        if -code == signal.SIGSYS:
            reason += "; a seccomp filter does that: allow the io_* calls of Linux AIO there"
        return ProbeResult(False, reason)
    return ProbeResult(False, f"aiopoll is not available: the process that tried it ended with status {code}")


def _polls(result: ProbeResult) -> Finding:
    if result.available:
        return Finding("AIO polls", "ok", "submitted, cancelled, waited for")
    return Finding("AIO polls", "failed", "do not work", result.reason)


def _budget() -> Finding:
    budget = aio_budget()
    if budget is None:
        return Finding("AIO budget", "warning", "unknown", "mount /proc to see fs.aio-nr and fs.aio-max-nr")
    used, most = budget
    free = max(0, most - used)
    rings = free // _RING_CHARGE
    value = f"{used:,} used, {free:,} free of {most:,}: room for {rings * _RING_POLLS:,} polls"
    advice = (
        f"a run needs {_RING_CHARGE} of it for each {_RING_POLLS} waits, and waits beyond the budget are slower; "
        "raise it on the host: sysctl -w fs.aio-max-nr=1048576"
    )
    if rings == 0:
        return Finding("AIO budget", "failed", value, advice)
    if free < most / 4:
        return Finding("AIO budget", "warning", value, advice)
    return Finding("AIO budget", "ok", value)


def _seccomp(works: bool) -> Finding:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if status.get("Seccomp") != _SECCOMP_FILTER:
        return Finding("seccomp", "ok", "no filter" if "Seccomp" in status else "unknown to this kernel")
    if works:
        return Finding("seccomp", "ok", "a filter is in force, and lets AIO through")
    advice = (
        "if it is what forbids AIO, allow io_setup, io_submit, io_getevents, io_cancel and io_destroy in it, as "
        "Docker's default profile does"
    )
    return Finding("seccomp", "warning", "a filter is in force", advice)


def _python() -> Finding:
    value = f"{platform.python_implementation()} {platform.python_version()}"
    if hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled():
        return Finding("Python", "failed", f"{value} without its GIL", "run with PYTHON_GIL=1")
    return Finding("Python", "ok", value)


def _trio() -> Finding:
    if missing_names:
        advice = "use a version of Trio that trio_aiopoll supports, or a newer trio_aiopoll"
        return Finding("Trio", "failed", f"{trio.__version__} lacks {', '.join(missing_names)}", advice)
    if missing_names_for_sockets:
        value = f"{trio.__version__} lacks {', '.join(missing_names_for_sockets)}: its sockets stay as they are"
        advice = "for fast sockets, use another version of Trio"
        if any(name.endswith(REPLACED) for name in missing_names_for_sockets):
            advice = "for fast sockets, import trio_aiopoll before what replaces methods of Trio's, or do without that"
        return Finding("Trio", "warning", value, advice)
    return Finding("Trio", "ok", f"{trio.__version__}, with all private names that are used")


def _c_core() -> Finding:
    name = os.path.basename(_ring_ffi.__file__)
    kind = "built for the stable ABI" if ".abi3." in name else "built for this Python"
    return Finding("C core", "ok", f"{name}, {kind}; cffi {importlib.metadata.version('cffi')}")


def _environment() -> Iterator[Finding]:
    name = IO_MANAGER.get()
    if name and name not in NAMES:
        advice = f"runs without the argument io_manager fail; use one of {', '.join(NAMES)}, or unset it"
        yield Finding(IO_MANAGER.name, "warning", repr(name), advice)
    elif name:
        yield Finding(IO_MANAGER.name, "ok", name)


def findings() -> tuple[ProbeResult, list[Finding]]:
    result = _probe_in_child(probe)
    return result, [
        _kernel(),
        _polls(result),
        _budget(),
        _seccomp(result.available),
        _python(),
        _trio(),
        _c_core(),
        *_environment(),
    ]


def _print(result: ProbeResult, found: list[Finding]) -> None:
    terminal = Terminal()
    terminal.print(terminal.style(f"trio_aiopoll {trio_aiopoll.__version__}", "bold"))
    terminal.print()
    column = max(len(finding.name) for finding in found) + 2
    for finding in found:
        mark, colour = _MARKS[finding.state]
        marked = terminal.style(f"{mark:8}", colour, *(() if finding.state == "ok" else ("bold",)))
        terminal.print(f"  {finding.name:{column}}{marked} {finding.value}")
        if finding.advice is not None:
            indent = " " * (column + 11)
            for line in textwrap.wrap(finding.advice, max(terminal.width, 60) - len(indent) - 1):
                terminal.print(terminal.style(indent + line, "dim"))
    terminal.print()
    if result.available:
        terminal.print(terminal.style("aiopoll works here.", "green", "bold"))
        terminal.print(
            'Use it: trio.run(main, io_manager="aiopoll"), or run a program as it is: python -m trio_aiopoll run SCRIPT'
        )
    else:
        terminal.print(terminal.style("aiopoll does not work here.", "red", "bold"))
        terminal.print('Programs that ask for io_manager="auto" use epoll here; those that ask for "aiopoll" fail.')


def check(options: argparse.Namespace) -> int:
    result, found = findings()
    if options.json:
        report: dict[str, Any] = {
            "version": trio_aiopoll.__version__,
            "available": result.available,
            "reason": result.reason,
            "findings": [asdict(finding) for finding in found],
        }
        print(json.dumps(report, indent=2))
    else:
        _print(result, found)
    return 0 if result.available else 1


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="does aiopoll work here, and if not, why not",
        description="Uses AIO polls for real, and looks at all they depend on: kernel, budget, sandbox, Trio, build.",
        epilog="Exit code: 0, aiopoll works here; 1, it does not.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(command=check)
