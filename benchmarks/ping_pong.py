"""The latency of one connection: a client that never sleeps, on another CPU, and one task that answers."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio

from . import tcp_echo
from ._load import under_load
from ._managers import MANAGERS, runner
from ._model import Benchmark, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant


async def answer(stream: trio.SocketStream) -> None:
    """With nothing of Trio between us and the socket but the wait."""
    fd = stream.socket.fileno()
    while True:
        await trio.lowlevel.wait_readable(fd)
        data = os.read(fd, 65536)
        if not data:
            break
        os.write(fd, data)


def serve(manager: str, announce: Callable[[int], object], *, api: str) -> None:
    if api == "SocketStream":
        tcp_echo.serve(manager, announce)
        return

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host=tcp_echo.HOST)
        announce(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(answer, listeners)

    runner(manager)(main)


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    with under_load("ping_pong", rival, parameters, (1, 1, 64), lambda: f"closed {round_seconds} spin") as run_round:
        run_round()
        yield run_round


BENCHMARK = Benchmark(
    title="ping-pong: one connection",
    rivals=(*MANAGERS, "aiopoll:busy_poll=50e-6"),
    cases={api: {"api": api} for api in ("wait_readable", "SocketStream")},
    metrics={
        "p50": Metric("us"),
        "p99": Metric("us"),
        "p99.9": Metric("us"),
        "cpu": Metric("us"),
        "throughput": Metric("1/s", "higher"),
    },
    enter=enter,
)
