"""hypercorn's trio worker, started from the command line with one worker process and with several, serves an ASGI
application and a Quart-Trio application on aiopoll, without and with TLS; and it stops as it should, also in the middle
of requests. All that the application does for it is ``trio_aiopoll.install()``; without, it is the model. Under
``python -m trio_aiopoll run`` it need not do that either.

The clients are plain blocking sockets; the application reports what befalls it as datagrams to the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import queue
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio
import trio_websocket
import trustme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 60  # seconds: what takes longer hangs
MIB = 1024 * 1024

REPORT = """
import json, os, socket
if os.environ["IO_MANAGER"] == "aiopoll":
    import trio_aiopoll
    trio_aiopoll.install()
import trio

reports = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
reports.connect(("127.0.0.1", int(os.environ["REPORTS"])))


def report(event):
    reports.send(f"{event} {os.getpid()}".encode())


def statistics():
    found = trio.lowlevel.current_statistics().io_statistics
    work = found.polls_submitted + found.transfers if found.backend == "aiopoll" else 0
    return {"pid": os.getpid(), "backend": found.backend, "work": work}
"""

ASGI = """
from report import report, statistics
import json, trio


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
        report("started")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        report("stopped")
        await send({"type": "lifespan.shutdown.complete"})
        return

    async def answer(body, more=False):
        await send({"type": "http.response.body", "body": body, "more_body": more})

    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/statistics":
        await answer(json.dumps(statistics()).encode())
    elif scope["path"] == "/download":
        try:
            for number in range(1024):
                await answer(bytes([number % 251]) * 65536, more=True)
        finally:
            report("download-ends")
        await answer(b"")
    elif scope["path"] == "/echo":
        more = True
        await answer(b"", more=True)
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    report("disconnected")
                    return
                more = message["more_body"]
                await answer(message["body"], more)
        except trio.Cancelled:
            report("cancelled")
            raise
"""


class Server:
    def __init__(self, process: subprocess.Popen[str], reports: socket.socket, folder: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self._new_lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._reports = reports
        self.folder = folder
        self.address = ("127.0.0.1", 0)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._new_lines.put(line)
        self._new_lines.put(None)

    @property
    def stderr(self) -> str:
        self._reader.join(TIMEOUT)
        return "".join(self.lines)

    def wait_until_running(self, workers: int) -> None:
        for _ in range(workers):
            while True:
                line = self._new_lines.get(timeout=TIMEOUT)
                assert line is not None, self.stderr
                found = re.search(r"Running on https?://127\.0\.0\.1:(\d+)", line)
                if found:
                    self.address = ("127.0.0.1", int(found[1]))
                    break

    def expect(self, *events: str) -> set[int]:
        """Wait until the workers have reported these events, in any order; which workers it were."""
        waiting, pids = sorted(events), set()
        while waiting:
            event, pid = self._reports.recv(1000).decode().split()
            assert event in waiting, f"{event}, when waiting for {waiting}"
            waiting.remove(event)
            pids.add(int(pid))
        return pids

    def processes(self) -> set[int]:
        """Of the session that the server leads: itself, its workers, and what else multiprocessing starts."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.process.pid and fields[0] != "Z":
                        found.add(int(entry.name))
        return found

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=TIMEOUT)

    def ask(self, path: str, body: bytes | None = None, connection: http.client.HTTPConnection | None = None) -> bytes:
        asking = connection or http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        asking.request("GET" if body is None else "POST", path, body)
        response = asking.getresponse()
        assert response.status == 200
        answer = response.read()
        if connection is None:
            asking.close()
        return answer

    def statistics(self, connection: http.client.HTTPConnection | None = None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/statistics", connection=connection))
        return found

    def statistics_of_all(self, workers: int) -> dict[int, dict[str, Any]]:
        """Ask until all the workers have answered."""
        found: dict[int, dict[str, Any]] = {}
        for _ in range(5000):
            answer = self.statistics()
            found[answer["pid"]] = answer
            if len(found) == workers:
                return found
        raise AssertionError(f"only {len(found)} of {workers} workers answer")

    def wait_for_end(self, processes: set[int]) -> int:
        """Wait until these processes are gone; the exit code of the server."""
        handles = []
        try:
            for pid in processes - {self.process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    handles.append(os.pidfd_open(pid))
            code = self.process.wait(TIMEOUT)
            for handle in handles:
                assert select.select([handle], [], [], TIMEOUT)[0], "a process is left behind"
        finally:
            for handle in handles:
                os.close(handle)
        assert self.processes() == set()
        return code


@pytest.fixture(params=["aiopoll", "epoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def serve(tmp_path: Path, io_manager: str) -> Iterator[Callable[..., contextlib.AbstractContextManager[Server]]]:
    reports = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    reports.bind(("127.0.0.1", 0))
    reports.settimeout(TIMEOUT)

    @contextlib.contextmanager
    def serving(application: str, workers: int, *options: str, unmodified: bool = False) -> Iterator[Server]:
        (tmp_path / "report.py").write_text(REPORT)
        (tmp_path / "application.py").write_text(textwrap.dedent(application))
        command = [str(Path(sys.executable).with_name("hypercorn"))]
        if unmodified:
            command = [sys.executable, "-m", "trio_aiopoll", "run", "--io-manager", io_manager, "-m", "hypercorn"]
        command += ["--worker-class", "trio", "--workers", str(workers)]
        process = subprocess.Popen(
            [*command, "--bind", "127.0.0.1:0", *options, "application:app"],
            cwd=tmp_path,
            env={
                **os.environ,
                "REPORTS": str(reports.getsockname()[1]),
                "IO_MANAGER": "" if unmodified else io_manager,
            },
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        server = Server(process, reports, tmp_path)
        try:
            server.wait_until_running(workers)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(TIMEOUT)
            assert process.stderr is not None

            process.stderr.close()

    with reports:
        yield serving


def reset(sock: socket.socket | trio.socket.SocketType) -> None:
    """Close so that the other side gets a reset, as if this one had vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def start_chunked(sock: socket.socket, path: str = "/echo") -> None:
    """Begin a request whose end is for later; on return the application works on it."""
    sock.sendall(f"POST {path} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n".encode())
    received = b""
    while b"first" not in received:
        chunk = sock.recv(MIB)
        assert chunk, received
        received += chunk


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    while chunk := sock.recv(MIB):
        received += chunk
    return received


# With several workers, hypercorn kills the others as soon as the first has stopped.
def assert_stopped_properly(server: Server, code: int) -> None:
    assert code == 0, server.stderr
    assert "Traceback" not in server.stderr
    with socket.socket() as sock:  # the port is free again
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(server.address)
        sock.listen()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_serves_on_aiopoll_and_sigterm_ends_all_of_them(workers: int, serve: Any, io_manager: str) -> None:
    clients, size = 24, 300_000
    with serve(ASGI, workers) as server:
        pids = server.expect(*workers * ["started"])
        assert len(pids) == workers
        before = server.statistics_of_all(workers)
        assert set(before) == pids
        assert {found["backend"] for found in before.values()} == {io_manager}

        def client(number: int) -> None:
            body = bytes([number]) * size
            assert server.ask("/echo", body) == body

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(client, range(clients)))
        assert server.ask("/download") == b"".join(bytes([number % 251]) * 65536 for number in range(1024))
        server.expect("download-ends")
        after = server.statistics_of_all(workers)
        work = sum(after[pid]["work"] - before[pid]["work"] for pid in pids)
        assert work > clients if io_manager == "aiopoll" else work == 0

        processes = server.processes()
        assert processes >= {server.process.pid, *pids}
        server.process.terminate()
        assert server.expect("stopped") <= pids
        code = server.wait_for_end(processes)
        assert_stopped_properly(server, code)


def test_unmodified_application_is_served_by_every_worker_on_aiopoll(serve: Any, io_manager: str) -> None:
    with serve(ASGI, 2, unmodified=True) as server:
        pids = server.expect("started", "started")
        found = server.statistics_of_all(2)
        assert {pid: of_one["backend"] for pid, of_one in found.items()} == dict.fromkeys(pids, io_manager)
        assert server.ask("/echo", bytes(100_000)) == bytes(100_000)
        processes = server.processes()
        server.process.terminate()
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))


def test_clients_that_vanish_are_noticed_and_leave_nothing_behind(serve: Any, io_manager: str) -> None:
    with serve(ASGI, 1, "--keep-alive", "1") as server:
        (pid,) = server.expect("started")
        connection = http.client.HTTPConnection(*server.address, timeout=TIMEOUT)
        server.statistics(connection)
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        for _ in range(10):
            for leave in (reset, socket.socket.close):
                sock = server.connect()
                start_chunked(sock)
                leave(sock)
                server.expect("disconnected")
            sock = server.connect()
            sock.sendall(b"GET /download HTTP/1.1\r\nhost: test\r\n\r\n")
            assert sock.recv(1000)
            reset(sock)
            server.expect("download-ends")
        assert server.statistics(connection)["backend"] == io_manager
        # hypercorn closes some of these connections only when it would close an idle one.
        give_up = time.monotonic() + TIMEOUT
        while len(os.listdir(f"/proc/{pid}/fd")) > descriptors:
            assert time.monotonic() < give_up
            server.statistics(connection)
        connection.close()
        processes = server.processes()
        server.process.terminate()
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))


def test_request_in_flight_is_finished_after_sigterm(serve: Any) -> None:
    with serve(ASGI, 1) as server, contextlib.ExitStack() as stack:
        server.expect("started")
        processes = server.processes()
        busy = [stack.enter_context(server.connect()) for _ in range(8)]
        for sock in busy:
            start_chunked(sock)
        idle = http.client.HTTPConnection(*server.address, timeout=TIMEOUT)
        stack.callback(idle.close)
        server.statistics(idle)
        server.process.terminate()
        assert idle.sock.recv(1) == b""  # hypercorn closes this when it has begun to stop
        for sock in busy:
            sock.sendall(b"4\r\nlast\r\n0\r\n\r\n")
        for sock in busy:
            assert read_to_end(sock).endswith(b"4\r\nlast\r\n0\r\n\r\n")
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))


def test_request_that_does_not_end_is_cancelled_when_the_time_of_grace_is_over(serve: Any) -> None:
    with serve(ASGI, 1, "--graceful-timeout", "1") as server, server.connect() as sock:
        server.expect("started")
        processes = server.processes()
        start_chunked(sock)
        server.process.terminate()
        server.expect("cancelled")
        assert read_to_end(sock) in (b"", b"0\r\n\r\n")
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))


def test_worker_that_is_killed_takes_the_others_with_it_as_hypercorn_wants(serve: Any) -> None:
    with serve(ASGI, 3) as server, server.connect() as sock:
        pids = server.expect("started", "started", "started")
        processes = server.processes()
        start_chunked(sock)
        os.kill(pids.pop(), signal.SIGKILL)
        server.wait_for_end(processes)  # what its exit code is depends on who ends first
        with contextlib.suppress(ConnectionResetError):
            assert read_to_end(sock) == b""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_options(authority: trustme.CA, tmp_path: Path) -> list[str]:
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate.pem"))
    return ["--keyfile", str(tmp_path / "key.pem"), "--certfile", str(tmp_path / "certificate.pem")]


def test_tls_with_http_2_and_http_1(serve: Any, io_manager: str, authority: trustme.CA, tls_options: list[str]) -> None:
    context, context_of_httpx = ssl.create_default_context(), ssl.create_default_context()
    authority.configure_trust(context)
    authority.configure_trust(context_of_httpx)
    with serve(ASGI, 2, *tls_options) as server:
        pids = server.expect("started", "started")
        url = f"https://127.0.0.1:{server.address[1]}"
        with socket.create_connection(server.address, timeout=TIMEOUT) as sock:
            sock.sendall(b"this is no TLS")
            with contextlib.suppress(ConnectionResetError):
                read_to_end(sock)  # an alert perhaps, and then the end
        with httpx.Client(http2=True, verify=context_of_httpx, timeout=TIMEOUT) as client:
            body = os.urandom(300_000)
            answer = client.post(f"{url}/echo", content=body)
            assert (answer.http_version, answer.content) == ("HTTP/2", body)
            found = client.get(f"{url}/statistics").json()
            assert found["pid"] in pids
            assert found["backend"] == io_manager
            assert (found["work"] > 2) == (io_manager == "aiopoll")
        with context.wrap_socket(server.connect(), server_hostname="127.0.0.1") as vanishing:
            start_chunked(vanishing)
            reset(vanishing)
            server.expect("disconnected")
        processes = server.processes()
        server.process.terminate()
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))


QUART = """
from report import report, statistics
import hashlib
import quart, quart_trio, trio

app = quart_trio.QuartTrio(__name__)


@app.before_serving
async def before():
    report("started")


@app.after_serving
async def after():
    report("stopped")


@app.get("/statistics")
async def show_statistics():
    return statistics()


@app.post("/digest")
async def digest():
    found = hashlib.sha256()
    async for data in quart.request.body:
        found.update(data)
    return found.hexdigest()


@app.get("/count")
async def count():
    forever = "forever" in quart.request.args

    async def numbers():
        try:
            number = 0
            while number < 1000 or forever:
                yield f"{number} "
                number += 1
                if number % 100 == 0:
                    await trio.sleep(0.001)
        finally:
            report("count-ends")
    return numbers()


@app.websocket("/echo")
async def echo():
    try:
        while True:
            await quart.websocket.send(await quart.websocket.receive())
    finally:
        report("websocket-ends")
"""


def test_quart_trio_application(serve: Any, io_manager: str) -> None:
    sent = os.urandom(3 * MIB)

    async def use_websockets() -> None:
        async def converse(number: int) -> None:
            async with trio_websocket.open_websocket(*server.address, "/echo", use_ssl=False) as websocket:
                for step in range(20):
                    message = f"{number} {step}" * 100 if step % 2 else bytes([number, step]) * 30_000
                    await websocket.send_message(message)
                    assert await websocket.get_message() == message

        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(converse, number)
            async with trio.open_nursery() as nursery:
                stream = await trio.open_tcp_stream(*server.address)
                websocket = await trio_websocket.wrap_client_stream(nursery, stream, "test", "/echo")
                await websocket.send_message("and one that vanishes")
                assert await websocket.get_message() == "and one that vanishes"
                nursery.cancel_scope.cancel()
            reset(stream.socket)

    with serve(QUART, 2) as server:
        pids = server.expect("started", "started")
        found = server.statistics_of_all(2)
        assert set(found) == pids
        assert {of_one["backend"] for of_one in found.values()} == {io_manager}
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: server.ask("/digest", sent).decode(), range(8)))
        assert answers == 8 * [hashlib.sha256(sent).hexdigest()]
        assert server.ask("/count").split() == [str(number).encode() for number in range(1000)]
        server.expect("count-ends")
        with server.connect() as sock:
            sock.sendall(b"GET /count?forever=1 HTTP/1.1\r\nhost: test\r\n\r\n")
            assert sock.recv(1000)
            reset(sock)
        server.expect("count-ends")
        trio.run(use_websockets)
        server.expect(*11 * ["websocket-ends"])
        after = server.statistics_of_all(2)
        work = sum(after[pid]["work"] - found[pid]["work"] for pid in pids)
        assert work > 200 if io_manager == "aiopoll" else work == 0
        processes = server.processes()
        server.process.terminate()
        server.expect("stopped")
        assert_stopped_properly(server, server.wait_for_end(processes))
