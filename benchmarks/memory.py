"""Memory of one task that waits for its own socket."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from ._managers import MANAGERS, check_waits, runner
from ._model import Benchmark, Metric
from ._processes import child_command, cpus, run_aside
from ._sockets import silent_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant, Sample
    from ._watch import Watch


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def measure(manager: str, watch: Watch, count: int, *, read: str, waiting: bool) -> float:
    """Bytes a task by which memory grows when ``count`` tasks start and wait, or just sleep."""
    size: Callable[[], int] = {"rss": resident_bytes, "tracemalloc": traced_bytes}[read]
    if read == "tracemalloc":
        tracemalloc.start()

    async def wait(fd: int) -> None:
        if waiting:
            await trio.lowlevel.wait_readable(fd)
        else:
            await trio.sleep_forever()

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            gc.collect()
            before = size()
            for sock in sockets:
                nursery.start_soon(wait, sock.fileno())
            await trio.testing.wait_all_tasks_blocked()
            check_waits()
            gc.collect()
            grown = size() - before
            nursery.cancel_scope.cancel()
        return grown

    with silent_sockets(count) as sockets:
        grown: int = runner(manager)(main)
    return grown / count


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    def run_round() -> Sample:
        sample: Sample = {}
        for read in ("rss", "tracemalloc"):
            both = []
            for waiting in (True, False):
                command = child_command(
                    "once", "memory", rival, {"read": read, "waiting": waiting}, parameters["waits"]
                )
                both.append(json.loads(run_aside(command, cpus()[0])))
            sample[read] = both[0]
            sample[f"{read}, wait alone"] = both[0] - both[1]
        return sample

    yield run_round


BENCHMARK = Benchmark(
    title="memory of one waiting task",
    rivals=MANAGERS,
    cases={f"{waits:,} waits": {"waits": waits} for waits in (10_000,)},
    metrics={name: Metric("bytes") for name in ("rss", "rss, wait alone", "tracemalloc", "tracemalloc, wait alone")},
    enter=enter,
    max_rounds=2,
)
