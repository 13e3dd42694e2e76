"""System calls of one wait, counted by strace; and of a tick in which nothing is to be done."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from . import wait_cycle
from ._managers import MANAGERS, runner
from ._model import Benchmark, Metric, RivalFailed
from ._processes import child_command, cpus, run_aside
from ._sockets import silent_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._model import Contestant, Sample
    from ._watch import Watch

# what the tasks do themselves
NOT_OURS = ("read", "write")


def measure(manager: str, watch: Watch, count: int, *, ready: int) -> int:
    return wait_cycle.measure(manager, watch, count, ready=ready) if ready else measure_idle(manager, count)


def measure_idle(manager: str, count: int) -> int:
    """Ticks of a task that has work to do while another waits."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, sockets[0])
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(count):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    with silent_sockets(1) as sockets:
        runner(manager)(main)
    return count


def count_calls(rival: str, parameters: Mapping[str, Any], count: int) -> tuple[int, Counter[str]]:
    """The operations done and {system call: how often}, over the whole life of a child."""
    with tempfile.NamedTemporaryFile("r") as table:
        command = child_command("once", "system_calls", rival, parameters, count)
        answer = run_aside(["strace", "-f", "-qq", "-c", "-U", "calls,name", "-o", table.name, *command], cpus()[0])
        rows = re.findall(r"^\s*(\d+) (\w+)$", table.read(), re.MULTILINE)
    return int(answer), Counter({name: int(calls) for calls, name in rows if name != "total"})


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    if shutil.which("strace") is None:
        raise RivalFailed("strace is not installed")

    def run_round() -> Sample:
        few = max(1, 2000 // (parameters["ready"] or 1))
        few_operations, few_calls = count_calls(rival, parameters, few)
        operations, calls = count_calls(rival, parameters, 3 * few)
        calls.subtract(few_calls)
        made = {name: calls[name] / (operations - few_operations) for name in calls if name not in NOT_OURS}
        return {
            "all": sum(made.values()),
            "arm": made.get("epoll_ctl", 0) + made.get("io_submit", 0),
            "look or sleep": made.get("epoll_wait", 0) + made.get("io_getevents", 0),
        }

    yield run_round


BENCHMARK = Benchmark(
    title="system calls",
    rivals=MANAGERS,
    cases={
        "one wait, 1 ready": {"ready": 1},
        "one wait, 64 ready": {"ready": 64},
        "one tick with nothing to do": {"ready": 0},
    },
    metrics={name: Metric("calls") for name in ("all", "arm", "look or sleep")},
    enter=enter,
    max_rounds=1,
)
