"""Memory of one idle connection of an echo server, after it has been used."""

from __future__ import annotations

import gc
import json
import os
import socket
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from ._managers import MANAGERS, check_waits, runner
from ._model import Benchmark, Metric
from ._processes import child_command, cpus, run_aside
from .memory import resident_bytes, traced_bytes
from .tcp_echo import BACKLOG, HOST, echo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant, Sample
    from ._watch import Watch

AT_ONCE = 64


def connect(address: tuple[str, int]) -> int:
    """A bare descriptor, which takes none of the memory that is measured."""
    with socket.create_connection(address) as client:
        client.setblocking(False)
        return client.detach()


def measure(manager: str, watch: Watch, count: int, *, read: str, size: int) -> float:
    """Bytes by which memory grows with each of ``count`` connections, which have echoed ``size`` bytes."""
    used: Callable[[], int] = {"rss": resident_bytes, "tracemalloc": traced_bytes}[read]
    message = bytes(size)
    if read == "tracemalloc":
        tracemalloc.start()

    async def main() -> int:
        clients: list[int] = []

        async def add_connections(number: int) -> None:
            """And wait until they are idle."""
            new = [connect(address) for _ in range(number)]
            for client in new:
                os.write(client, message)
            await trio.testing.wait_all_tasks_blocked(0.001)
            for client in new:
                if os.read(client, size + 1) != message:
                    raise RuntimeError("there is no echo, or a wrong one")
            clients.extend(new)

        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=BACKLOG)
            nursery.start_soon(trio.serve_listeners, echo, listeners)
            address = listeners[0].socket.getsockname()
            await add_connections(AT_ONCE)
            gc.collect()
            before = used()
            for _ in range(count // AT_ONCE):
                await add_connections(AT_ONCE)
            check_waits()
            gc.collect()
            grown = used() - before
            for client in clients:
                os.close(client)
            nursery.cancel_scope.cancel()
        return grown

    grown: int = runner(manager)(main)
    return grown / (count // AT_ONCE * AT_ONCE)


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    def run_round() -> Sample:
        sample: Sample = {}
        for read in ("rss", "tracemalloc"):
            words = ("once", "connection_memory", rival, {"read": read, "size": parameters["size"]})
            sample[read] = json.loads(run_aside(child_command(*words, parameters["connections"]), cpus()[0]))
        return sample

    yield run_round


BENCHMARK = Benchmark(
    title="memory of one idle connection",
    rivals=MANAGERS,
    cases={
        f"{connections:,} connections, used for {size} B": {"connections": connections, "size": size}
        for connections in (2_000,)
        for size in (64, 16384)
    },
    metrics={name: Metric("bytes") for name in ("rss", "tracemalloc")},
    enter=enter,
    max_rounds=2,
)
