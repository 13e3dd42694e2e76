"""python -m benchmarks [NAME ...]: run the benchmarks, all of them by default."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _report
from ._contest import hold
from ._processes import raise_fd_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._model import Benchmark

NAMES = (
    "wait_cycle",
    "instructions",
    "system_calls",
    "start_stop",
    "to_thread",
    "churn",
    "cancel_storm",
    "scale",
    "memory",
    "connection_memory",
    "ping_pong",
    "tcp_echo",
    "tls_echo",
    "flood",
    "http",
)


def load(names: Sequence[str]) -> dict[str, Benchmark]:
    return {name: importlib.import_module(f"benchmarks.{name}").BENCHMARK for name in names}


class Progress:
    """What goes on, on stderr: in one line on a terminal, elsewhere a line a case."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()

    def start(self, what: str) -> None:
        self._what = what
        self._done += 1
        self.rounds(0)

    def rounds(self, done: int) -> None:
        if self._live:
            print(f"\r\033[K{self._line(done)}", end="", file=sys.stderr, flush=True)

    def finish(self, done: int, note: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self._live else ''}{self._line(done)}{note}", file=sys.stderr, flush=True)

    def _line(self, done: int) -> str:
        elapsed = time.monotonic() - self._started
        return f"[{elapsed:4.0f} s, {self._done} of {self._total}] {self._what}: {done} rounds"


def run(
    benchmarks: Mapping[str, Benchmark],
    rivals: Sequence[str],
    cases_with: str,
    budget: float,
    results: dict[str, dict[str, Any]],
    keep: Callable[[], object],
) -> None:
    """Fill ``results``, {benchmark: {case: summary}}; ``keep`` is called after each case.

    What one case leaves of its time the later ones get.
    """
    todo = [
        (name, label)
        for name, benchmark in benchmarks.items()
        for label in benchmark.cases
        if cases_with.lower() in label.lower()
    ]
    progress = Progress(len(todo))
    deadline = time.monotonic() + budget
    weight_left = sum(benchmarks[name].weight for name, _ in todo)
    for name, label in todo:
        benchmark = benchmarks[name]
        seconds = max(0.0, deadline - time.monotonic()) * benchmark.weight / weight_left
        weight_left -= benchmark.weight
        progress.start(f"{name}, {label}")
        outcome = hold(name, benchmark, benchmark.cases[label], rivals or benchmark.rivals, seconds, progress.rounds)
        results.setdefault(name, {})[label] = _report.summarize(benchmark, outcome)
        keep()
        failed = "; ".join(f"{rival} failed: {why}" for rival, why in outcome.failed.items())
        progress.finish(max(map(len, outcome.rounds.values()), default=0), f"; {failed}" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Runs the benchmarks; see README.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--budget", type=float, default=1200, metavar="SECONDS", help="time to spend (default: 1200)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json, results.md and charts there")
    parser.add_argument(
        "--rivals",
        default=[],
        type=lambda text: text.split(";"),
        metavar="A;B",
        help="who takes part, e.g. 'stock;aiopoll'",
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose label contains this")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    raise_fd_limit()
    benchmarks = load(arguments.names or NAMES)
    if arguments.list:
        for name, benchmark in benchmarks.items():
            print(f"{name:14} {benchmark.title} ({len(benchmark.cases)} cases)")
        return
    results: dict[str, Any] = {"environment": _report.environment(), "benchmarks": {}}
    output: Path | None = arguments.output
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        """What has been measured so far is not lost if we are stopped."""
        if output is not None:
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (output / "results.md").write_text(_report.markdown(results, benchmarks))

    run(benchmarks, arguments.rivals, arguments.case, arguments.budget, results["benchmarks"], keep)
    if output is None:
        print(_report.markdown(results, benchmarks))
        return
    try:
        from ._charts import draw
    except ImportError as error:
        print(f"no charts: {error}", file=sys.stderr)
        return
    for name, cases in results["benchmarks"].items():
        draw(name, benchmarks[name], cases, output)


if __name__ == "__main__":
    main()
