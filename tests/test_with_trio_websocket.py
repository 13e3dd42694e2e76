"""trio-websocket, server and client, works on aiopoll without and with TLS; peers vanish, close or say nothing."""

from __future__ import annotations

import functools
import os
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
import trio_websocket
import trustme

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

TIMEOUT = 60  # seconds: what takes longer hangs


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture(params=["without TLS", "with TLS"])
def tls(request: pytest.FixtureRequest, contexts: Any) -> Any:
    return contexts if request.param == "with TLS" else (None, None)


def run(function: Callable[..., Awaitable[None]], *arguments: Any, work: int = 1) -> None:
    """Run it on aiopoll, with at least so many polls and transfers, and nobody left who waits."""

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()  # Trio has a task of its own that comes to wait
        before = trio.lowlevel.current_statistics().io_statistics
        assert before.backend == "aiopoll"
        with trio.fail_after(TIMEOUT):
            await function(*arguments)
        after = trio.lowlevel.current_statistics().io_statistics
        assert after.polls_submitted + after.transfers - before.polls_submitted - before.transfers >= work
        assert after.tasks_waiting_read == before.tasks_waiting_read
        assert after.tasks_waiting_write == before.tasks_waiting_write

    trio.run(main, io_manager="aiopoll")


class Server:
    """Serves a handler, and tells where and how to reach it."""

    def __init__(self, nursery: trio.Nursery, tls: tuple[ssl.SSLContext | None, ssl.SSLContext | None]) -> None:
        self.nursery = nursery
        self.server_context, self.client_context = tls
        self.port = 0

    async def serve(self, handler: Callable[[trio_websocket.WebSocketRequest], Awaitable[None]]) -> None:
        serve = functools.partial(
            trio_websocket.serve_websocket, handler, "127.0.0.1", 0, ssl_context=self.server_context
        )
        self.port = (await self.nursery.start(serve)).port

    def connect(self) -> Any:
        return trio_websocket.open_websocket(
            "localhost", self.port, "/", use_ssl=False if self.client_context is None else self.client_context
        )


async def echo(request: trio_websocket.WebSocketRequest) -> None:
    websocket = await request.accept()
    with pytest.raises(trio_websocket.ConnectionClosed):  # noqa: PT012
        while True:
            await websocket.send_message(await websocket.get_message())


def test_every_message_comes_back_to_each_of_many_clients(tls: Any) -> None:
    async def converse(server: Server, number: int) -> None:
        async with server.connect() as websocket:
            for size in (0, 1, 125, 126, 65535, 65536, 300_000):
                for message in (bytes([number]) * size, f"{number % 10}" * size, os.urandom(size)):
                    await websocket.send_message(message)
                    assert await websocket.get_message() == message
            await websocket.ping(b"are you there")

    async def main() -> None:
        async with trio.open_nursery() as serving:
            server = Server(serving, tls)
            await server.serve(echo)
            async with trio.open_nursery() as nursery:
                for number in range(12):
                    nursery.start_soon(converse, server, number)
            serving.cancel_scope.cancel()

    run(main, work=100)


@pytest.mark.parametrize("vanishing", ["client", "server"])
def test_peer_that_vanishes_ends_the_waits_of_the_other(vanishing: str, tls: Any) -> None:
    async def main() -> None:
        accepted: trio.MemorySendChannel[Any]
        accepted, connections = trio.open_memory_channel(1)
        ended = trio.Event()

        async def handler(request: trio_websocket.WebSocketRequest) -> None:
            websocket = await request.accept()
            await accepted.send(websocket)
            if vanishing == "client":
                with pytest.raises(trio_websocket.ConnectionClosed):
                    await websocket.get_message()
                ended.set()
            else:
                await trio.sleep_forever()

        async with trio.open_nursery() as serving:
            server = Server(serving, tls)
            await server.serve(handler)
            async with server.connect() as websocket:
                other = await connections.receive()

                async def wait() -> None:
                    with pytest.raises(trio_websocket.ConnectionClosed):
                        await websocket.get_message()
                    if vanishing == "server":
                        ended.set()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked()
                    stream = (websocket if vanishing == "client" else other)._stream
                    sock = getattr(stream, "transport_stream", stream).socket
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()
                    await ended.wait()
            serving.cancel_scope.cancel()

    run(main)


def test_close_arrives_with_code_and_reason(tls: Any) -> None:
    async def main() -> None:
        async def handler(request: trio_websocket.WebSocketRequest) -> None:
            websocket = await request.accept()
            await websocket.aclose(4321, "enough")

        async with trio.open_nursery() as serving:
            server = Server(serving, tls)
            await server.serve(handler)
            async with server.connect() as websocket:
                with pytest.raises(trio_websocket.ConnectionClosed) as raised:
                    await websocket.get_message()
                assert raised.value.reason is not None
                assert (raised.value.reason.code, raised.value.reason.reason) == (4321, "enough")
            serving.cancel_scope.cancel()

    run(main)


def test_wait_for_a_message_that_is_cancelled_loses_none(tls: Any) -> None:
    async def main() -> None:
        count = 300

        async def handler(request: trio_websocket.WebSocketRequest) -> None:
            websocket = await request.accept()
            for number in range(count):
                await websocket.send_message(str(number))
                await trio.lowlevel.checkpoint()
            with pytest.raises(trio_websocket.ConnectionClosed):
                await websocket.get_message()

        async with trio.open_nursery() as serving:
            server = Server(serving, tls)
            await server.serve(handler)
            async with server.connect() as websocket:
                received: list[str] = []
                step = 0
                while len(received) < count:
                    step += 1
                    with trio.move_on_after(step % 7 / 100_000):
                        received.append(await websocket.get_message())
                assert received == [str(number) for number in range(count)]
            serving.cancel_scope.cancel()

    run(main)


def test_server_that_says_nothing_is_given_up(tls: Any) -> None:
    async def main() -> None:
        async with trio.open_nursery() as serving:

            async def silent(stream: trio.SocketStream) -> None:
                async for _ in stream:
                    pass

            (listener,) = await serving.start(functools.partial(trio.serve_tcp, silent, 0, host="127.0.0.1"))
            server = Server(serving, tls)
            server.port = listener.socket.getsockname()[1]
            with trio.move_on_after(0.05) as scope:
                async with server.connect():
                    pass
            assert scope.cancelled_caught
            serving.cancel_scope.cancel()

    run(main)
