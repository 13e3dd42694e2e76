"""TLS over Trio's streams is the same on aiopoll as on Trio's own epoll: both sides, over SSLListener and by hand, also
when the other side vanishes, is not trusted, says nothing, or ends without saying so.
"""

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
import trustme

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    SSLStream: TypeAlias = trio.SSLStream[trio.SocketStream]

TIMEOUT = 60  # seconds: what takes longer hangs
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the server, and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    for context in (server, client):  # or a missing farewell would be overlooked
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture(params=["aiopoll", "epoll"])
def run(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a test on that manager, and sees to it that its waits were there and that none is left."""

    async def main(function: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        await trio.testing.wait_all_tasks_blocked()  # Trio has a task of its own that comes to wait
        before = trio.lowlevel.current_statistics().io_statistics
        assert before.backend == request.param
        with trio.fail_after(TIMEOUT):
            await function(*arguments)
        after = trio.lowlevel.current_statistics().io_statistics
        if request.param == "aiopoll":
            assert after.polls_submitted + after.transfers > before.polls_submitted + before.transfers
        assert after.tasks_waiting_read == before.tasks_waiting_read
        assert after.tasks_waiting_write == before.tasks_waiting_write

    def run_it(function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        trio.run(main, function, arguments, io_manager=request.param)

    return run_it


async def connected(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, *, https_compatible: bool = False
) -> tuple[SSLStream, SSLStream]:
    """Both ends of a connection over loopback, the server's first, before the handshake."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        server = await listener.accept()
    return (
        trio.SSLStream(server, server_context, server_side=True, https_compatible=https_compatible),
        trio.SSLStream(client, client_context, server_hostname="localhost", https_compatible=https_compatible),
    )


async def shaken_hands(*contexts: ssl.SSLContext, **options: bool) -> tuple[SSLStream, SSLStream]:
    server, client = await connected(*contexts, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        nursery.start_soon(client.do_handshake)
    return server, client


def reset(stream: SSLStream) -> None:
    """Close so that the other side gets a reset, as if this one had vanished."""
    sock = stream.transport_stream.socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = await stream.receive_some()
        assert chunk, f"the stream ended after {len(data)} of {count} bytes"
        data += chunk
    return bytes(data)


def test_listener_serves_many_clients_every_byte(run: Any, contexts: Any) -> None:
    server_context, client_context = contexts

    async def echo(stream: SSLStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def client(address: tuple[str, int]) -> None:
        sent = os.urandom(300_000)
        stream = await trio.open_ssl_over_tcp_stream(*address, ssl_context=client_context)
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, sent)
            assert await receive_exactly(stream, len(sent)) == sent
            nursery.cancel_scope.cancel()

    async def main() -> None:
        async with trio.open_nursery() as server:
            serve = functools.partial(trio.serve_ssl_over_tcp, echo, 0, server_context, host="127.0.0.1")
            (listener,) = await server.start(serve)
            assert isinstance(listener, trio.SSLListener)
            port = listener.transport_listener.socket.getsockname()[1]
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(client, ("localhost", port))
            server.cancel_scope.cancel()

    run(main)


def test_both_directions_at_once(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await shaken_hands(*contexts)
        sent = {server: os.urandom(4 * MIB), client: os.urandom(4 * MIB)}

        async def send(stream: SSLStream) -> None:
            await stream.send_all(sent[stream])

        async def receive(stream: SSLStream, expected: bytes) -> None:
            assert await receive_exactly(stream, len(expected)) == expected

        async with server, client, trio.open_nursery() as nursery:
            nursery.start_soon(send, server)
            nursery.start_soon(send, client)
            nursery.start_soon(receive, server, sent[client])
            nursery.start_soon(receive, client, sent[server])

    run(main)


def test_farewell_is_an_end_of_file(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await shaken_hands(*contexts)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            assert await server.receive_some() == b""
            nursery.start_soon(server.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await client.receive_some()

    run(main)


@pytest.mark.parametrize("https_compatible", [False, True])
def test_end_without_farewell_is_an_error_unless_one_is_lenient(
    https_compatible: bool, run: Any, contexts: Any
) -> None:
    async def main() -> None:
        server, client = await shaken_hands(*contexts, https_compatible=https_compatible)
        await client.send_all(b"x")
        await client.transport_stream.aclose()
        assert await server.receive_some() == b"x"
        if https_compatible:
            assert await server.receive_some() == b""
        else:
            with pytest.raises(trio.BrokenResourceError):
                await server.receive_some()
        await trio.aclose_forcefully(server)

    run(main)


def test_side_that_vanishes_breaks_the_stream_of_who_waits_for_it(run: Any, contexts: Any) -> None:
    async def main() -> None:
        for vanishing in (0, 1):
            pair = await shaken_hands(*contexts)
            left = pair[1 - vanishing]

            async def wait(stream: SSLStream = left) -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()

            async def flood(stream: SSLStream = left) -> None:
                with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                    while True:
                        await stream.send_all(bytes(MIB))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                nursery.start_soon(flood)
                await trio.testing.wait_all_tasks_blocked()
                reset(pair[vanishing])
            await trio.aclose_forcefully(left)

    run(main)


def test_certificate_that_is_not_trusted_is_an_error_on_both_sides(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await connected(contexts[0], ssl.create_default_context())

        async def refused() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await server.do_handshake()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            with pytest.raises(trio.BrokenResourceError) as raised:
                await client.do_handshake()
            assert isinstance(raised.value.__cause__, ssl.SSLCertVerificationError)
            await trio.aclose_forcefully(client)  # without which the server would wait for more
        await trio.aclose_forcefully(server)

    run(main)


def test_handshake_with_one_who_says_nothing_is_cancelled_and_its_connection_closed(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await connected(*contexts)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            await trio.testing.wait_all_tasks_blocked()
            assert await server.transport_stream.receive_some()  # and no answer
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(client)
        assert await server.transport_stream.receive_some() == b""
        await trio.aclose_forcefully(server)

    run(main)


def test_cancelled_receive_loses_nothing(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await shaken_hands(*contexts)
        sent, received = os.urandom(200_000), bytearray()

        async def send() -> None:
            for start in range(0, len(sent), 1000):
                await client.send_all(sent[start : start + 1000])
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            step = 0
            while len(received) < len(sent):
                step += 1
                with trio.move_on_after(step % 7 / 100_000):
                    received += await server.receive_some(777)
        assert received == sent
        for stream in (server, client):
            await trio.aclose_forcefully(stream)

    run(main)


def test_unwrapped_stream_goes_on_in_the_clear(run: Any, contexts: Any) -> None:
    async def main() -> None:
        server, client = await shaken_hands(*contexts)
        plain: dict[str, trio.SocketStream] = {}

        async def unwrap(name: str, stream: SSLStream) -> None:
            plain[name], rest = await stream.unwrap()
            assert rest == b""

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unwrap, "server", server)
            nursery.start_soon(unwrap, "client", client)
        async with plain["server"] as left, plain["client"] as right, trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, b"in the clear")
            assert await receive_exactly(right, 12) == b"in the clear"

    run(main)
