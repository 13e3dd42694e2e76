"""A Trio program as a guest of asyncio is on aiopoll, and talks with its host over loopback in both directions; either
may vanish, be cancelled or fail, and the other is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

TIMEOUT = 60  # seconds: what takes longer hangs


def start_by_name(*args: Any, **kwargs: Any) -> None:
    trio.lowlevel.start_guest_run(*args, io_manager="aiopoll", **kwargs)


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    trio_aiopoll.install()
    try:
        yield trio.lowlevel.start_guest_run
    finally:
        trio_aiopoll.uninstall()


@pytest.fixture(params=["by name", "by function", "installed"])
def start(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "installed":
        with installed() as function:
            yield function
    else:
        yield {"by name": start_by_name, "by function": trio_aiopoll.start_guest_run}[request.param]


@contextlib.asynccontextmanager
async def running(
    start: Any, guest: Callable[..., Awaitable[object]], *args: object
) -> AsyncIterator[asyncio.Future[Any]]:
    """The guest, which has to have waited on aiopoll, in a run whose outcome is the future; it is over in the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    scope = trio.CancelScope()

    def done(result: outcome.Outcome[Any]) -> None:
        if isinstance(result, outcome.Error):
            future.set_exception(result.error)
        else:
            future.set_result(result.unwrap())

    async def main() -> object:
        await trio.testing.wait_all_tasks_blocked()  # Trio has a task of its own that comes to wait
        before = trio.lowlevel.current_statistics().io_statistics
        assert before.backend == "aiopoll"
        try:
            with scope, trio.fail_after(TIMEOUT):
                return await guest(*args)
        finally:
            after = trio.lowlevel.current_statistics().io_statistics
            assert after.polls_submitted + after.transfers > before.polls_submitted + before.transfers
            assert after.tasks_waiting_read == before.tasks_waiting_read

    start(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        done_callback=done,
        host_uses_signal_set_wakeup_fd=True,
    )
    try:
        yield future
    finally:
        if not future.done():
            scope.cancel()
            await asyncio.wait([future])


async def echo_of_host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def client_of_guest(address: tuple[str, int]) -> None:
    sent, received = os.urandom(300_000), bytearray()
    async with await trio.open_tcp_stream(*address) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, sent)
        while len(received) < len(sent):
            chunk = await stream.receive_some()
            assert chunk
            received += chunk
    assert received == sent


async def client_of_host(address: tuple[str, int]) -> None:
    sent = os.urandom(300_000)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    answer, _ = await asyncio.gather(reader.readexactly(len(sent)), writer.drain())
    assert answer == sent
    writer.close()
    await writer.wait_closed()


def test_guest_and_host_serve_each_other(start: Any) -> None:
    async def guest(host_address: tuple[str, int], tell: Callable[[object], None], finish: trio.Event) -> None:
        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)

        async with trio.open_nursery() as serving:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            serving.start_soon(trio.serve_listeners, echo, [listener])
            tell(listener.socket.getsockname())
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(client_of_guest, host_address)
            await finish.wait()
            serving.cancel_scope.cancel()

    async def host() -> None:
        async with await asyncio.start_server(echo_of_host, "127.0.0.1", 0) as server:
            address: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            finish = trio.Event()
            arguments = (server.sockets[0].getsockname(), address.set_result, finish)
            async with running(start, guest, *arguments) as run:
                guest_address = await address
                await asyncio.gather(*(client_of_host(guest_address) for _ in range(10)))
                finish.set()
                await run

    asyncio.run(asyncio.wait_for(host(), TIMEOUT))


@pytest.mark.parametrize("vanishing", ["guest", "host"])
def test_side_that_vanishes_is_noticed_by_the_other(vanishing: str) -> None:
    async def guest(address: tuple[str, int]) -> None:
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        if vanishing == "guest":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await stream.aclose()

    async def host() -> None:
        noticed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(1))
            await writer.drain()
            if vanishing == "host":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
                writer.close()
            noticed.set()

        async with (
            await asyncio.start_server(serve, "127.0.0.1", 0) as server,
            running(start_by_name, guest, server.sockets[0].getsockname()) as run,
        ):
            await run
            await noticed.wait()

    asyncio.run(asyncio.wait_for(host(), TIMEOUT))


def test_cancelled_by_its_host_the_guest_lets_go_of_its_connections() -> None:
    async def host() -> None:
        scope = trio.CancelScope()
        accepted: asyncio.Queue[Any] = asyncio.Queue()

        async def guest(address: tuple[str, int]) -> str:
            with scope:
                async with await trio.open_tcp_stream(*address) as stream:
                    await stream.receive_some()
            return "cancelled" if scope.cancelled_caught else "not cancelled"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await accepted.put(None)
            assert await reader.read() == b""
            writer.close()
            await accepted.put(None)

        async with (
            await asyncio.start_server(serve, "127.0.0.1", 0) as server,
            running(start_by_name, guest, server.sockets[0].getsockname()) as run,
        ):
            await accepted.get()
            scope.cancel()
            await accepted.get()
            assert await run == "cancelled"

    asyncio.run(asyncio.wait_for(host(), TIMEOUT))


def test_failure_of_the_guest_reaches_its_host_which_goes_on() -> None:
    async def guest(address: tuple[str, int]) -> None:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            raise KeyError("failure")

    async def host() -> None:
        async with await asyncio.start_server(echo_of_host, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
            for _ in range(3):
                async with running(start_by_name, guest, address) as run:
                    with pytest.raises(KeyError, match="failure"):
                        await run
            async with running(start_by_name, client_of_guest, address) as run:
                await client_of_host(address)
                await run

    asyncio.run(asyncio.wait_for(host(), TIMEOUT))
