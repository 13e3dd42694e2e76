"""One wait, and one cancel, as the number of waits in flight grows."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
import trio.testing

from ._managers import WITH_BOUND, check_waits, runner
from ._model import Benchmark
from ._passing import circle, measure_passing
from ._sockets import silent_sockets

if TYPE_CHECKING:
    from ._watch import Watch

AT_ONCE = 64


def measure(manager: str, watch: Watch, count: int, *, in_flight: int, what: str) -> int:
    return {"wait": measure_wait, "cancel": measure_cancel}[what](manager, watch, count, in_flight)


def shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


def measure_wait(manager: str, watch: Watch, count: int, in_flight: int) -> int:
    """64 tokens travel, well apart, along a random way through all sockets."""
    order = shuffled(in_flight)
    starters = [order[i * in_flight // AT_ONCE] for i in range(AT_ONCE)]
    passes = count * AT_ONCE
    measure_passing(manager, watch, circle(order), starters, passes, (order[0], order[1]))
    return passes


def measure_cancel(manager: str, watch: Watch, count: int, in_flight: int) -> int:
    """64 waits, chosen at random, are cancelled at once, and begun anew by their tasks."""
    order = shuffled(in_flight)
    scopes = [trio.CancelScope() for _ in order]

    async def sleeper(index: int, fd: int) -> None:
        while True:
            with scopes[index]:
                await trio.lowlevel.wait_readable(fd)
            scopes[index] = trio.CancelScope()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for index, sock in enumerate(sockets):
                nursery.start_soon(sleeper, index, sock.fileno())
            await trio.testing.wait_all_tasks_blocked()
            check_waits()
            at = 0
            watch.start()
            for _ in range(count):
                for _ in range(AT_ONCE):
                    scopes[order[at]].cancel()
                    at = (at + 1) % in_flight
                # one tick for the tasks to wake and wait again, one to submit
                await trio.lowlevel.cancel_shielded_checkpoint()
                await trio.lowlevel.cancel_shielded_checkpoint()
            watch.stop()
            nursery.cancel_scope.cancel()

    with silent_sockets(in_flight) as sockets:
        runner(manager)(main)
    return count * AT_ONCE


BENCHMARK = Benchmark(
    title="scale: one wait and one cancel, by waits in flight",
    rivals=WITH_BOUND,
    cases={
        f"{what}, {in_flight:,} in flight": {"what": what, "in_flight": in_flight}
        for what in ("wait", "cancel")
        for in_flight in (100, 1_000, 4_000, 16_000)
    },
    measure=measure,
)
