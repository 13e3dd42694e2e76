"""Connections that are made, used once and closed, both ends in one process."""

from __future__ import annotations

import ipaddress
from functools import partial
from typing import TYPE_CHECKING

import trio

from ._managers import MANAGERS, runner
from ._model import Benchmark

if TYPE_CHECKING:
    from ._watch import Watch

SERVER = "127.0.0.1"


async def echo_once(stream: trio.SocketStream) -> None:
    async with stream:
        await stream.send_all(await stream.receive_some(1))
        await stream.receive_some(1)  # the end


def measure(manager: str, watch: Watch, count: int, *, clients: int) -> int:
    async def client(port: int, number: int) -> None:
        # every client has its address, or else they would soon be out of ports
        address = str(ipaddress.ip_address("127.0.1.1") + number)
        for _ in range(count):
            sock = trio.socket.socket()
            await sock.bind((address, 0))
            await sock.connect((SERVER, port))
            async with trio.SocketStream(sock) as stream:
                await stream.send_all(b"x")
                await stream.receive_some(1)

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host=SERVER)
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as server:
            await server.start(partial(trio.serve_listeners, echo_once, listeners))
            watch.start()
            async with trio.open_nursery() as nursery:
                for number in range(clients):
                    nursery.start_soon(client, port, number)
            watch.stop()
            server.cancel_scope.cancel()

    runner(manager)(main)
    return count * clients


BENCHMARK = Benchmark(
    title="churn: one connection made, used once and closed",
    rivals=MANAGERS,
    cases={"1 client": {"clients": 1}, "16 clients": {"clients": 16}},
    measure=measure,
    weight=1.5,
)
