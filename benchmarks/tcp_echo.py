"""An echo server under load from another process."""

from __future__ import annotations

import asyncio
import functools
import statistics
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import trio

from ._load import under_load
from ._managers import is_manager, runner
from ._model import BASELINE, Benchmark, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from ._model import Contestant

    Announce = Callable[[int], object]

HOST = "127.0.0.1"
BACKLOG = 4096


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


# aiopoll with the streams as they are in stock Trio: only the operations of the sockets underneath are performed by the
# tick.
SOCKETS_ONLY = "aiopoll sockets"


def keep_streams_stock() -> None:
    """Have a method in Trio's class that is not its own, though the same, so that its streams stay as they are."""
    method: Any = trio.SocketStream.receive_some
    same = FunctionType(method.__code__, method.__globals__, argdefs=method.__defaults__)
    trio.SocketStream.receive_some = same  # type: ignore[method-assign]


def serve_trio(manager: str, announce: Announce, *, with_stock_streams: bool = False) -> None:
    async def main() -> None:
        if with_stock_streams:
            keep_streams_stock()
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host=HOST, backlog=BACKLOG))
            announce(listeners[0].socket.getsockname()[1])

    runner(manager)(main)


async def echo_asyncio(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve_asyncio_streams(announce: Announce) -> None:
    server = await asyncio.start_server(echo_asyncio, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class EchoProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast("asyncio.Transport", transport).write

    def data_received(self, data: bytes) -> None:
        self._write(data)


async def serve_asyncio_protocol(announce: Announce) -> None:
    server = await asyncio.get_running_loop().create_server(EchoProtocol, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def split_rival(rival: str) -> tuple[Callable[[Coroutine[Any, Any, object]], object], str]:
    """What runs a rival that is not a manager of Trio, and the API that it stands for."""
    loop, _, api = rival.partition(" ")
    if loop == "uvloop":
        import uvloop

        return uvloop.run, api
    if loop == "asyncio":
        return asyncio.run, api
    raise ValueError(f"there is no rival {rival!r}")


def serve(rival: str, announce: Announce) -> None:
    if is_manager(rival):
        serve_trio(rival, announce)
        return
    if rival == SOCKETS_ONLY:
        serve_trio("aiopoll", announce, with_stock_streams=True)
        return
    run, api = split_rival(rival)
    serve_with = {"streams": serve_asyncio_streams, "protocol": serve_asyncio_protocol}.get(api)
    if serve_with is None:
        raise ValueError(f"there is no rival {rival!r}")
    run(serve_with(announce))


@functools.cache
def throughput_of_stock(connections: int, active: int, size: int) -> float:
    """Requests a second that stock Trio serves in the closed loop."""
    with under_load("tcp_echo", BASELINE, {}, (connections, active, size), lambda: "closed 0.5") as run_round:
        run_round()
        return statistics.median(run_round()["throughput"] for _ in range(3))


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    shape = (parameters["connections"], parameters["active"], parameters["size"])
    command = f"closed {round_seconds}"
    if "share" in parameters:
        command = f"open {round_seconds} {parameters['share'] * throughput_of_stock(*shape):.0f}"
    with under_load("tcp_echo", rival, {}, shape, lambda: command) as run_round:
        run_round()
        yield run_round


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for loop, more in (("closed", {}), ("open at 0.6 of stock", {"share": 0.6})):
        for size in (64, 16384):
            for connections, active in ((1, 1), (16, 16), (128, 128), (1000, 1000), (1000, 100), (8000, 1000)):
                label = f"{loop}, {connections} connections, "
                label += f"{connections - active} idle, " if active < connections else ""
                shape = {"connections": connections, "active": active, "size": size}
                cases[label + f"{size} B"] = {**shape, **more}
    return cases


BENCHMARK = Benchmark(
    title="TCP echo server",
    rivals=(
        "stock",
        SOCKETS_ONLY,
        "aiopoll",
        "aiopoll:fast_sockets=False",
        "asyncio streams",
        "uvloop streams",
        "uvloop protocol",
    ),
    cases=_cases(),
    metrics={
        "cpu": Metric("us"),
        "throughput": Metric("1/s", "higher"),
        "p50": Metric("us"),
        "p99": Metric("us"),
        "p99.9": Metric("us"),
        "fairness": Metric("Jain", "higher"),
        "least": Metric("of mean", "higher"),
        "load_cpu": Metric("CPUs"),
    },
    enter=enter,
    baselines=("stock", "uvloop streams"),
    round_seconds=0.3,
    weight=1.6,
)
