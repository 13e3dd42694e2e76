"""``bench``: what aiopoll changes here, in a minute."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

import trio_aiopoll
from trio_aiopoll._probe import probe

from ._contestants import EchoContestant, FailedError, WaitsContestant
from ._load import raise_descriptor_limit
from ._terminal import Terminal, bar, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    Round = dict[str, float]

_BASELINE: Final = "epoll"
_ROUND: Final = 0.25
_ROUNDS_MIN: Final = 3
_SIZE: Final = 64
_BAR: Final = 24
_DESCRIPTORS: Final = 4096
_TITLES: Final = {"epoll": "Trio on epoll", "aiopoll": "Trio on aiopoll", "uvloop": "asyncio on uvloop"}


@dataclass(frozen=True)
class Case:
    """``enter`` makes a contestant of a rival's name and the CPU to run on."""

    title: str
    operation: str
    rivals: tuple[str, ...]
    enter: Callable[[str, int], Any]


@dataclass
class Outcome:
    """What came of a case: of each rival the rounds, of which the i-th are neighbours in time, or why it has none."""

    case: Case
    rounds: defaultdict[str, list[Round]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, str] = field(default_factory=dict)


def _enter_waits(rival: str, cpu: int, *, ready: int) -> WaitsContestant:
    return WaitsContestant(rival, cpu, ready)


def _enter_echo(rival: str, cpu: int, *, connections: int) -> EchoContestant:
    return EchoContestant(rival, cpu, connections, _SIZE)


def _cases(has_uvloop: bool) -> list[Case]:
    managers = ("epoll", "aiopoll")
    servers = (*managers, "uvloop") if has_uvloop else managers
    return [
        *(
            Case(f"wait, read, write: {ready} ready at once", "wait", managers, partial(_enter_waits, ready=ready))
            for ready in (1, 64)
        ),
        *(
            Case(
                f"TCP echo, {_SIZE} bytes: {connections} connection{'s' if connections > 1 else ''}",
                "request",
                servers,
                partial(_enter_echo, connections=connections),
            )
            for connections in (1, 16, 128, 512)
        ),
    ]


def _cpus() -> tuple[int, int]:
    """The CPU of who is measured, and that of who makes the load."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def hold(case: Case, cpu: int, seconds: float, progress: Callable[[float], object]) -> Outcome:
    """Let the rivals take turns on that CPU, round by round, for so many seconds, and for three rounds at least.

    ``progress`` is told how many seconds have passed.
    """
    outcome = Outcome(case)
    began = time.monotonic()
    with ExitStack() as stack:
        contestants: dict[str, Any] = {}
        for rival in case.rivals:
            try:
                contestants[rival] = stack.enter_context(case.enter(rival, cpu))
            except FailedError as failure:
                outcome.failed[rival] = str(failure)
        done, longest = 0, 0.0
        while contestants and (done < _ROUNDS_MIN or time.monotonic() + longest < began + seconds):
            start = time.monotonic()
            samples: dict[str, Round] = {}
            for rival, contestant in list(contestants.items()):
                progress(time.monotonic() - began)
                try:
                    samples[rival] = contestant.round(_ROUND)
                except FailedError as failure:
                    outcome.failed[rival] = str(failure)
                    outcome.rounds.pop(rival, None)
                    del contestants[rival]
            for rival, sample in samples.items():
                outcome.rounds[rival].append(sample)
            longest = max(longest, time.monotonic() - start)
            done += 1
    return outcome


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def _ratios(outcome: Outcome, rival: str, metric: str) -> tuple[float, float, float] | None:
    """Quartiles of the rounds' ratios to the baseline's rounds next to them."""
    if rival not in outcome.rounds or _BASELINE not in outcome.rounds:
        return None
    pairs = zip(outcome.rounds[rival], outcome.rounds[_BASELINE], strict=True)
    return _quartiles([own[metric] / base[metric] for own, base in pairs])


def _si(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _rows(terminal: Terminal, outcome: Outcome) -> list[list[str]]:
    has_latency = any("p50" in rounds[0] for rounds in outcome.rounds.values())
    operation = outcome.case.operation
    heading = ["", f"CPU a {operation}", f"{operation}s/s", *(["p50", "p99"] if has_latency else []), "CPU, ratio", ""]
    rows = [[terminal.style(cell, "dim") for cell in heading]]
    for rival in outcome.case.rivals:
        if rival in outcome.failed:
            continue
        rounds = outcome.rounds[rival]
        median = {metric: statistics.median(each[metric] for each in rounds) for metric in rounds[0]}
        row = [_TITLES[rival], _si(median["cpu"]), f"{median['rate']:,.0f}"]
        if has_latency:
            row += [_si(median["p50"]), _si(median["p99"])]
        ratios = _ratios(outcome, rival, "cpu")
        if ratios is None:
            row += ["", ""]
        elif rival == _BASELINE:
            row += ["1", terminal.style(bar(1, 1, _BAR), "dim")]
        else:
            low, middle, high = ratios
            colour = "green" if high < 1 else "yellow" if low > 1 else "cyan"
            row += [f"{middle:.2f} ({low:.2f}-{high:.2f})", terminal.style(bar(middle, 1, _BAR), colour)]
        rows.append(row)
    return rows


def _print(terminal: Terminal, outcome: Outcome) -> None:
    count = max((len(rounds) for rounds in outcome.rounds.values()), default=0)
    terminal.print(terminal.style(outcome.case.title, "bold") + terminal.style(f"  ({count} rounds)", "dim"))
    if outcome.rounds:
        rows = _rows(terminal, outcome)
        for line in table(rows, "<" + ">" * (len(rows[0]) - 2) + "<"):
            terminal.print("  " + line)
    for rival, why in outcome.failed.items():
        terminal.print("  " + terminal.style(f"{_TITLES[rival]} could not take part: {why}", "red"))
    terminal.print()


def _report(environment: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    cases = []
    for outcome in outcomes:
        rivals = {}
        for rival, rounds in outcome.rounds.items():
            ratios = {metric: _ratios(outcome, rival, metric) for metric in rounds[0]}
            rivals[rival] = {"rounds": rounds, f"ratios to {_BASELINE}": ratios}
        cases.append({"title": outcome.case.title, "rivals": rivals, "failed": outcome.failed})
    return {"environment": environment, "cases": cases}


def _environment() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "trio": trio.__version__,
        "trio_aiopoll": trio_aiopoll.__version__,
        "load_average": os.getloadavg()[0],
    }


def bench(options: argparse.Namespace) -> int:
    result = probe()
    if not result.available:
        print(f"{options.parser.prog}: {result.reason}", file=sys.stderr)
        return 1
    environment = _environment()
    raise_descriptor_limit(_DESCRIPTORS)
    measured, loading = _cpus()
    os.sched_setaffinity(0, {loading})
    terminal, progress_line = Terminal(), Terminal(sys.stderr)
    if not options.json:
        terminal.print(
            terminal.style(f"trio_aiopoll {trio_aiopoll.__version__}", "bold")
            + f" · Trio {trio.__version__} · Python {platform.python_version()} · Linux {platform.release()}"
        )
        terminal.print(
            "Rivals take turns. Less CPU is better; its ratio to Trio on epoll is the median of neighbouring"
        )
        terminal.print("rounds, with quartiles. The bar is that ratio.")
        if measured == loading:
            terminal.print(terminal.style("There is one CPU only, which server and load share.", "yellow"))
        if environment["load_average"] > 0.5:
            load = f"The machine is busy (load average {environment['load_average']:.1f}): expect a wide spread."
            terminal.print(terminal.style(load, "yellow"))
        terminal.print()
    cases = _cases(importlib.util.find_spec("uvloop") is not None)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for place, case in enumerate(cases):
        left = max(0.0, options.seconds - (time.monotonic() - began)) / (len(cases) - place)

        def show(passed: float, case: Case = case, place: int = place, left: float = left) -> None:
            share = (place + min(1.0, passed / left if left else 1.0)) / len(cases)
            rest = max(0.0, options.seconds - (time.monotonic() - began))
            progress_line.transient(f"{bar(share, 1, 20):·<20} {rest:3.0f} s left   {case.title}")

        outcomes.append(hold(case, measured, left, show))
        progress_line.transient("")
        if not options.json:
            _print(terminal, outcomes[-1])
    if options.json:
        print(json.dumps(_report(environment, outcomes), indent=2))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise ValueError
    return value


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="what aiopoll changes here, measured in a minute",
        description="Compares aiopoll with stock Trio, and with asyncio on uvloop where that is installed: tasks that "
        "wait for a byte and pass it on, and a TCP echo server under load from another process. The rivals take turns "
        "round by round, and ratios are those of neighbouring rounds, so that what else goes on here hits all alike.",
        epilog="Exit code: 0; 1, aiopoll does not work here, or a rival failed.",
    )
    parser.add_argument("--seconds", type=_seconds, default=60.0, help="how long to measure, 1 to 3600 (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, with every round in it")
    parser.set_defaults(command=bench, parser=parser)
