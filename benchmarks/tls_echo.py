"""A TLS echo server under load from another process."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ._load import under_load
from ._managers import is_manager, runner
from ._model import Benchmark, Metric
from .tcp_echo import BACKLOG, HOST, echo_asyncio, split_rival

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant


async def echo(stream: trio.SSLStream[trio.SocketStream]) -> None:
    async for data in stream:
        await stream.send_all(data)


def serve(rival: str, announce: Callable[[int], object], *, certificate: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            serve_tls = partial(trio.serve_ssl_over_tcp, echo, 0, context, host=HOST, https_compatible=True)
            listeners = await nursery.start(partial(serve_tls, backlog=BACKLOG))
            announce(listeners[0].transport_listener.socket.getsockname()[1])

    async def main_on_asyncio() -> None:
        server = await asyncio.start_server(echo_asyncio, HOST, 0, backlog=BACKLOG, ssl=context)
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    if is_manager(rival):
        runner(rival)(main)
    else:
        run, api = split_rival(rival)
        if api != "streams":
            raise ValueError(f"there is no rival {rival!r}")
        run(main_on_asyncio())


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    shape = (parameters["connections"], parameters["connections"], parameters["size"])
    with under_load("tls_echo", rival, {}, shape, lambda: f"closed {round_seconds}", tls=True) as run_round:
        run_round()
        yield run_round


BENCHMARK = Benchmark(
    title="TLS echo server",
    rivals=("stock", "aiopoll", "asyncio streams", "uvloop streams"),
    cases={
        f"{connections} connections, {size} B": {"connections": connections, "size": size}
        for size in (64, 16384)
        for connections in (1, 16, 128, 1000)
    },
    metrics={
        "cpu": Metric("us"),
        "throughput": Metric("1/s", "higher"),
        "p50": Metric("us"),
        "p99": Metric("us"),
        "fairness": Metric("Jain", "higher"),
        "load_cpu": Metric("CPUs"),
    },
    enter=enter,
    baselines=("stock", "uvloop streams"),
    round_seconds=0.3,
    weight=1.6,
)
