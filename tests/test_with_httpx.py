"""httpx, on anyio and in a Trio run, is a client that works on aiopoll: pools, streams, TLS, servers that vanish,
and requests that are cancelled.

The server is a plain one in threads, so that only the client is on aiopoll.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import socket
import ssl
import struct
import threading
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpcore
import httpx
import pytest
import trio
import trio.testing
import trustme

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

TIMEOUT = 60  # seconds: what takes longer hangs


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> Iterator[bytes]:
        if "content-length" in self.headers:
            yield self.rfile.read(int(self.headers["content-length"]))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        digest = hashlib.sha256()
        for data in self.body():
            digest.update(data)
        self.answer(digest.hexdigest().encode())

    def do_GET(self) -> None:
        if self.path.startswith("/bytes/"):
            self.answer(bytes(range(256)) * (int(self.path[7:]) // 256))
        elif self.path == "/stops-half-way":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(bytes(500))
            self.close_connection = True
        elif self.path == "/resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif self.path == "/silent":  # until the client goes away
            self.server.asked.release()
            with contextlib.suppress(ConnectionResetError):
                assert self.connection.recv(1) == b""
            self.server.left.release()
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = threading.Semaphore(0)
        self.left = threading.Semaphore(0)
        self.context: ssl.SSLContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(TIMEOUT)
        if self.context is not None:
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, *_: object) -> None:
        pass  # clients that vanish are wanted here


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    with Server() as server:
        server.context = context
        thread = threading.Thread(target=partial(server.serve_forever, 0.01))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


on_anyio: ContextVar[bool] = ContextVar("on_anyio")

WAYS: dict[str, dict[str, Any]] = {
    "anyio": {"backend": "trio", "backend_options": {"io_manager": "aiopoll"}},
    "anyio, backend of its own": {"backend": "aiopoll"},
}


@pytest.fixture(params=[*WAYS, "trio"])
def run(request: pytest.FixtureRequest) -> Any:
    """Runs a function on aiopoll, from where httpx finds anyio or Trio, and sees to it that it really waited there."""

    async def main(function: Any, arguments: tuple[Any, ...]) -> object:
        await trio.testing.wait_all_tasks_blocked()  # Trio has a task of its own that comes to wait
        on_anyio.set(request.param != "trio")
        before = trio.lowlevel.current_statistics().io_statistics
        assert before.backend == "aiopoll"
        with anyio.fail_after(TIMEOUT):
            result = await function(*arguments)
        after = trio.lowlevel.current_statistics().io_statistics
        assert after.polls_submitted + after.transfers > before.polls_submitted + before.transfers
        assert after.tasks_waiting_read == before.tasks_waiting_read
        return result

    def run_it(function: Any, *arguments: Any) -> object:
        if request.param == "trio":
            return trio.run(main, function, arguments, io_manager="aiopoll")
        return anyio.run(main, function, arguments, **WAYS[request.param])

    return run_it


def url(server: Server, path: str) -> str:
    scheme = "http" if server.context is None else "https"
    return f"{scheme}://127.0.0.1:{server.server_port}{path}"


def new_client(**options: Any) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(**options)
    if on_anyio.get():
        transport._pool._network_backend = httpcore.AnyIOBackend()  # in a Trio run it would choose its Trio layer
    return httpx.AsyncClient(transport=transport, timeout=TIMEOUT)


async def exchange(server: Server, verify: ssl.SSLContext | bool) -> None:
    sent = os.urandom(200_000)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(sent), 7000):
            yield sent[start : start + 7000]

    async def one(client: httpx.AsyncClient, number: int) -> None:
        answer = await client.post(url(server, "/digest"), content=sent if number % 2 else chunks())
        assert answer.text == hashlib.sha256(sent).hexdigest()
        async with client.stream("GET", url(server, f"/bytes/{number * 25600}")) as stream:
            received = b"".join([data async for data in stream.aiter_raw()])
        assert received == bytes(range(256)) * (number * 100)

    limits = httpx.Limits(max_connections=10)  # fewer than tasks, which have to wait for one another
    async with (
        new_client(verify=verify, limits=limits) as client,
        anyio.create_task_group() as tasks,
    ):
        for number in range(20):
            tasks.start_soon(one, client, number)


def test_every_byte_arrives_in_many_requests_over_a_pool(run: Any) -> None:
    with serving() as server:
        run(exchange, server, True)


def test_every_byte_arrives_over_tls(run: Any) -> None:
    authority = trustme.CA()
    server_context, client_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    authority.configure_trust(client_context)
    with serving(server_context) as server:
        run(exchange, server, client_context)


def test_server_that_vanishes_is_an_error_and_the_client_goes_on(run: Any) -> None:
    async def main(server: Server) -> None:
        async with new_client() as client:
            for _ in range(5):
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(url(server, "/stops-half-way"))
                with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                    await client.get(url(server, "/resets"))
                assert len((await client.get(url(server, "/bytes/25600"))).content) == 25600

    with serving() as server:
        run(main, server)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))

        async def connect_to_nobody() -> None:
            async with new_client() as client:
                with pytest.raises(httpx.ConnectError):
                    await client.get(f"http://127.0.0.1:{closed.getsockname()[1]}/")

        run(connect_to_nobody)


def test_request_that_is_cancelled_or_times_out_closes_its_connection(run: Any) -> None:
    async def main(server: Server) -> None:
        async with new_client() as client:

            async def ask_in_vain() -> None:
                await client.get(url(server, "/silent"))

            for _ in range(3):
                async with anyio.create_task_group() as tasks:
                    for _ in range(5):
                        tasks.start_soon(ask_in_vain)
                    for _ in range(5):
                        assert await anyio.to_thread.run_sync(server.asked.acquire, True, TIMEOUT)
                    tasks.cancel_scope.cancel()
                for _ in range(5):
                    assert await anyio.to_thread.run_sync(server.left.acquire, True, TIMEOUT)
                with pytest.raises(httpx.ReadTimeout):
                    await client.get(url(server, "/silent"), timeout=httpx.Timeout(TIMEOUT, read=0.01))
                assert await anyio.to_thread.run_sync(server.left.acquire, True, TIMEOUT)
                assert len((await client.get(url(server, "/bytes/25600"))).content) == 25600

    with serving() as server:
        run(main, server)
