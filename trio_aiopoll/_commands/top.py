"""``top``: a live view of a process, from outside.

What /proc tells costs the process nothing, and is there for any process of the same user: whether it has AIO rings, how
busy it is, how often it sleeps. What the runs know about themselves, they tell if the process was started with
``TRIO_AIOPOLL_TOP=1``; see `trio_aiopoll._statistics_server`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trio_aiopoll._environment import TOP
from trio_aiopoll._statistics_server import address_prefix, is_trusted, peer_of

from ._terminal import Terminal, table

if TYPE_CHECKING:
    import argparse

_ANSWER_WITHIN: Final = 1.0
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")

_PER_SECOND: Final = ("submit_calls", "polls_submitted", "events_taken", "events_waited", "blocking_calls", "cancels")


class _GoneError(Exception):
    """The process does not exist, or not any more."""


@dataclass(frozen=True)
class Process:
    """What /proc says.

    Attributes:
      command: as it was started.
      uptime: seconds.
      cpu: seconds of CPU time, of all threads.
      sleeps: how often its threads have gone to sleep.
      preemptions: how often they were made to wait for a CPU.
      threads: how many there are.
      descriptors: how many are open; None if it belongs to another user.
      rings: AIO rings in its memory, idle ones included; None if it belongs to another user.
    """

    pid: int
    command: str
    uptime: float
    cpu: float
    sleeps: int
    preemptions: int
    threads: int
    descriptors: int | None
    rings: int | None


def look(pid: int) -> Process:
    """Look at a process.

    Raises:
      _GoneError: there is none.
    """
    proc = Path("/proc") / str(pid)
    try:
        stat = (proc / "stat").read_text().rpartition(")")[2].split()
        command = (proc / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        sleeps = preemptions = 0
        for status in proc.glob("task/*/status"):
            for line in _lines_or_none(status):
                name, _, value = line.partition(":")
                sleeps += int(value) if name == "voluntary_ctxt_switches" else 0
                preemptions += int(value) if name == "nonvoluntary_ctxt_switches" else 0
    except (FileNotFoundError, ProcessLookupError):
        raise _GoneError(f"there is no process {pid}") from None
    if stat[0] in "ZX":
        raise _GoneError(f"the process {pid} has ended")
    try:
        descriptors: int | None = len(os.listdir(proc / "fd"))
        rings: int | None = (proc / "maps").read_text().count("/[aio]")
    except PermissionError:
        descriptors = rings = None
    except (FileNotFoundError, ProcessLookupError):
        raise _GoneError(f"the process {pid} has ended") from None
    return Process(
        pid=pid,
        command=command or "?",
        uptime=time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / _TICKS_PER_SECOND,
        cpu=(int(stat[11]) + int(stat[12])) / _TICKS_PER_SECOND,
        sleeps=sleeps,
        preemptions=preemptions,
        threads=int(stat[17]),
        descriptors=descriptors,
        rings=rings,
    )


def _lines_or_none(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
        return []


def _addresses(pid: int) -> list[str]:
    """Where runs of the process listen."""
    shown = address_prefix(pid).replace("\0", "@")
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return sorted({"\0" + name[1:] for name in names if name.startswith(shown)})


def ask(pid: int, address: str) -> dict[str, Any] | None:
    """What the run that listens there says about itself; None if it does not answer in time, or is not to be trusted.

    Raises:
      OSError: nobody listens there any more.
      ValueError: that was no answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_ANSWER_WITHIN)
        asking.connect(address)
        server, user = peer_of(asking)
        if server != pid or not is_trusted(user):
            return None
        answer = b""
        try:
            while part := asking.recv(65536):
                answer += part
        except TimeoutError:
            return None
    run: dict[str, Any] = json.loads(answer)
    return run if run["pid"] == pid else None


@dataclass(frozen=True)
class View:
    """What there is to see at one moment; ``runs`` has for each address the answer, or None if there was none."""

    time: float
    process: Process
    runs: dict[str, dict[str, Any] | None]


def view(pid: int) -> View:
    process = look(pid)
    runs = {}
    for address in _addresses(pid):
        try:
            runs[address] = ask(pid, address)
        except (OSError, ValueError):  # it has just ended
            continue
    return View(time.monotonic(), process, runs)


def _rate(now: float, before: float, seconds: float) -> str:
    return f"{(now - before) / seconds:,.0f}/s"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _show_process(terminal: Terminal, now: Process, before: Process, seconds: float) -> None:
    up = f"   up {_duration(now.uptime)}"
    title = f"{now.pid}  {now.command}"
    room = terminal.width - len(up)
    if len(title) > room:
        title = title[: room - 3] + "..."
    terminal.print(terminal.style(title, "bold") + up)
    facts = [
        f"CPU {100 * (now.cpu - before.cpu) / seconds:.0f} %",
        f"{_rate(now.sleeps, before.sleeps, seconds)} sleeps",
        f"{_rate(now.preemptions, before.preemptions, seconds)} preemptions",
        _count(now.threads, "thread"),
    ]
    if now.rings is None:
        facts.append("the rest is for its user and root to see")
    else:
        facts += [_count(now.descriptors or 0, "descriptor"), _count(now.rings, "AIO ring")]
    terminal.print("  " + " · ".join(facts))


def _show_run(terminal: Terminal, now: dict[str, Any] | None, before: dict[str, Any] | None) -> None:
    terminal.print()
    if now is None:
        terminal.print(terminal.style(f"  a run has not answered for {_ANSWER_WITHIN:.0f} s", "yellow"))
        terminal.print("    It is in a task's step that takes that long, or its host loop does not let it go on.")
        return
    statistics, io = now["statistics"], now["statistics"]["io"]
    backend = terminal.style(io.get("backend", "?"), "cyan")
    terminal.print(f"  {backend} in {now['thread']}, for {_duration(now['seconds'])}")
    rows = [["tasks", f"{statistics['tasks_living']:,} living · {statistics['tasks_runnable']:,} runnable"]]
    if "tasks_waiting_read" in io:
        waits = f"{io['tasks_waiting_read']:,} to read · {io['tasks_waiting_write']:,} to write"
        if "epoll_lane_waits" in io:
            waits += f" · {io['epoll_lane_waits']:,} of them in the epoll lane"
        rows.append(["waits", waits])
    if "polls_in_flight" in io:
        rows.append(
            ["polls", f"{io['polls_in_flight']:,} in flight of {io['capacity']:,}, in {_count(io['rings'], 'ring')}"]
        )
    if before is not None and all(name in io and name in before["statistics"]["io"] for name in _PER_SECOND):
        seconds = now["seconds"] - before["seconds"]
        did = {name: io[name] - before["statistics"]["io"][name] for name in _PER_SECOND}
        if seconds > 0:
            calls, armed = did["submit_calls"], did["polls_submitted"]
            each = f", {armed / calls:.1f} each" if calls else ""
            rows += [
                ["armed", f"{armed / seconds:,.0f}/s in {calls / seconds:,.0f}/s io_submit{each}"],
                [
                    "events",
                    f"{did['events_taken'] / seconds:,.0f}/s from memory · {did['events_waited'] / seconds:,.0f}/s "
                    f"from {did['blocking_calls'] / seconds:,.0f}/s blocking calls",
                ],
                ["cancels", f"{did['cancels'] / seconds:,.0f}/s"],
            ]
    for line in table(rows, "<<"):
        terminal.print("    " + line)


def _show(terminal: Terminal, now: View, before: View) -> None:
    terminal.clear()
    _show_process(terminal, now.process, before.process, now.time - before.time)
    for address, run in now.runs.items():
        _show_run(terminal, run, before.runs.get(address))
    if not now.runs:
        terminal.print()
        if now.process.rings:
            terminal.print("  It has AIO rings, so it runs on aiopoll, or did.")
        elif now.process.rings == 0:
            terminal.print("  It has no AIO rings, so it does not run on aiopoll.")
        terminal.print(terminal.style(f"  To see more, start it with {TOP.name}=1, or by 'run --top'.", "dim"))


def top(options: argparse.Namespace) -> int:
    terminal = Terminal()
    shown = 0
    try:
        before = view(options.pid)
        while options.count is None or shown < options.count:
            time.sleep(options.interval)
            now = view(options.pid)
            if options.json:
                runs = list(now.runs.values())
                print(json.dumps({"time": time.time(), "process": asdict(now.process), "runs": runs}), flush=True)
            else:
                if shown and not terminal.is_interactive:
                    terminal.print()
                _show(terminal, now, before)
            before = now
            shown += 1
    except _GoneError as gone:
        print(f"{options.parser.prog}: {gone}", file=sys.stderr)
        return 0 if shown else 1
    except KeyboardInterrupt:
        return 0
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise ValueError
    return value


def _looks(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "top",
        help="watch a process that runs on aiopoll",
        description="Shows, until it is interrupted, what a process does. Its Trio runs tell about themselves if it "
        f"was started with {TOP.name}=1 in the environment, or by 'run --top'; that costs them one task "
        "that waits, and one tick each time they are asked. Others show only what /proc knows.",
        epilog="Exit code: 0; 1, there is no such process.",
    )
    parser.add_argument("pid", type=int, metavar="PID", help="the process")
    parser.add_argument("--interval", type=_positive, default=1.0, metavar="SECONDS", help="between looks (default: 1)")
    parser.add_argument("--count", type=_looks, metavar="N", help="stop after so many looks")
    parser.add_argument("--json", action="store_true", help="print one JSON object a look instead, each on its line")
    parser.set_defaults(command=top, parser=parser)
