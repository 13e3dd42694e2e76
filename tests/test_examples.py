"""The examples serve real clients: each runs as a program of its own, with the installed package, and is driven over
TCP by plain blocking sockets. What they owe their clients is the same on aiopoll as on Trio's own epoll.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT = 45  # seconds: what takes longer hangs
MIB = 1024 * 1024


def socket_buffer_max(direction: str) -> int:
    return int(Path(f"/proc/sys/net/ipv4/tcp_{direction}mem").read_text().split()[2])


# bytes: what the sockets of two connections, one behind the other, can hold, and then some
MORE_THAN_FITS_ON_THE_WAY = 2 * (socket_buffer_max("r") + socket_buffer_max("w")) + 8 * MIB


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    return request.param


class Server:
    def __init__(self, process: subprocess.Popen[str], address: tuple[str, int]) -> None:
        self.process = process
        self.address = address
        self.stderr = ""

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=TIMEOUT)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def has_aio_ring(self) -> bool:
        return "/[aio]" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        _, self.stderr = self.process.communicate(timeout=TIMEOUT)


def command(example: str, *options: str) -> list[str]:
    # -I: neither the checkout nor the environment says what is imported. -X dev: what is left open is complained about.
    return [sys.executable, "-I", "-X", "dev", str(EXAMPLES / example), *options]


@contextlib.contextmanager
def running(example: str, *options: str) -> Iterator[Server]:
    """An example that serves; at the end it is told to stop, unless it has been, and must have stopped properly."""
    with subprocess.Popen(
        command(example, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(2 * TIMEOUT, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            listening = re.fullmatch(r"listening on (127\.0\.0\.\d+):(\d+)\n", line)
            if listening is None:
                process.kill()
                pytest.fail(f"{example} said {line!r}; {process.communicate()[1]}")
            server = Server(process, (listening[1], int(listening[2])))
            yield server
            if process.returncode is None:
                server.stop()
            assert server.process.returncode == 0
        finally:
            watchdog.cancel()
            process.kill()
    # outside of the block above, so that a failure there is not hidden by this one
    assert server.stderr == ""


def read_to_end(sock: socket.socket) -> bytes:
    chunks = []
    while chunk := sock.recv(MIB):
        chunks.append(chunk)
    return b"".join(chunks)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"the stream ended after {len(data)} of {count} bytes"
        data += chunk
    return data


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    """Close so that the other side gets a reset, as if this one had vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def noise(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


def echoes_everything(sock: socket.socket, data: bytes) -> bool:
    """Whether ``data``, sent and ended while the answer is read, comes back whole and is then ended too."""
    with sock, ThreadPoolExecutor(1) as executor:
        sent = executor.submit(send_and_end, sock, data)
        answer = read_to_end(sock)
        sent.result()
    return answer == data


def assert_end_or_reset(sock: socket.socket) -> None:
    try:
        data = sock.recv(1)
    except ConnectionResetError:
        return
    assert data == b""


def assert_descriptors_return_to(server: Server, count: int) -> None:
    """What clients left behind is let go of. Each round trip gives the server a tick to do so."""
    deadline = time.monotonic() + TIMEOUT
    while server.descriptors() > count:
        assert time.monotonic() < deadline, f"{server.descriptors()} descriptors are open, {count} were before"
        with server.connect() as sock:
            assert echoes_everything(sock, b"anyone there?")


@pytest.mark.parametrize("options", [[], ["--io-manager", "aiopoll"], ["--io-manager", "auto"]])
def test_examples_use_aiopoll_by_default(options: list[str]) -> None:
    with running("echo_server.py", *options) as server:
        assert server.has_aio_ring()


def test_examples_use_epoll_on_request() -> None:
    with running("echo_server.py", "--io-manager", "epoll") as server:
        assert not server.has_aio_ring()


def test_examples_listen_where_they_are_told() -> None:
    with socket.create_server(("127.0.0.7", 0)) as placeholder:
        address = placeholder.getsockname()
    with running("echo_server.py", "--host", address[0], "--port", str(address[1])) as server:
        assert server.address == address
        assert echoes_everything(server.connect(), b"here?")


@pytest.mark.parametrize("example", ["echo_server.py", "tcp_proxy.py", "chat_server.py", "main_job.py"])
def test_unknown_manager_is_refused_with_the_names(example: str) -> None:
    refusal = subprocess.run(
        command(example, "--io-manager", "select"), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert refusal.returncode == 2
    for name in ("aiopoll", "epoll", "auto"):
        assert name in refusal.stderr
    assert "Traceback" not in refusal.stderr


# Echo server


def test_echo_returns_every_byte_to_many_clients_at_once(io_manager: str) -> None:
    clients = 24
    with running("echo_server.py", "--io-manager", io_manager) as server:
        socks = [server.connect() for _ in range(clients)]
        data = [noise(number, MIB // 2 + number) for number in range(clients)]
        with ThreadPoolExecutor(clients) as executor:
            assert all(executor.map(echoes_everything, socks, data, timeout=TIMEOUT))


def test_echo_answers_round_by_round(io_manager: str) -> None:
    with running("echo_server.py", "--io-manager", io_manager) as server, server.connect() as sock:
        for size in (1, 2, 100, 65536, 3):
            data = noise(size, size)
            sock.sendall(data)
            assert read_exactly(sock, size) == data


def test_echo_ends_after_the_client_has_ended_and_not_before(io_manager: str) -> None:
    with running("echo_server.py", "--io-manager", io_manager) as server, server.connect() as sock:
        sock.sendall(b"first")
        assert read_exactly(sock, 5) == b"first"
        send_and_end(sock, b"last")
        assert read_to_end(sock) == b"last"


def test_echo_serves_others_while_one_does_not_read(io_manager: str) -> None:
    data = noise(0, MORE_THAN_FITS_ON_THE_WAY)
    with (
        running("echo_server.py", "--io-manager", io_manager) as server,
        server.connect() as slow,
        ThreadPoolExecutor(1) as executor,
    ):
        sent = executor.submit(send_and_end, slow, data)
        for number in range(20):
            assert echoes_everything(server.connect(), noise(number, 1000))
        assert not sent.done()  # so it was held up all the time
        assert read_to_end(slow) == data
        sent.result()


def test_echo_survives_clients_that_vanish(io_manager: str) -> None:
    with running("echo_server.py", "--io-manager", io_manager) as server:
        before = server.descriptors()
        for _ in range(30):
            reset(server.connect())  # perhaps before it was accepted
            idle, busy = server.connect(), server.connect()
            idle.sendall(b"x")
            read_exactly(idle, 1)
            reset(idle)  # while the server waits to receive
            busy.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    busy.send(bytes(MIB))
            reset(busy)  # while the server has more to send than fits
        assert_descriptors_return_to(server, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_echo_ends_on_a_signal(io_manager: str, number: signal.Signals) -> None:
    with running("echo_server.py", "--io-manager", io_manager) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(5)]
        for sock in socks:
            sock.sendall(b"x")
            read_exactly(sock, 1)
        server.stop(number)
        for sock in socks:
            assert_end_or_reset(sock)
        with pytest.raises(ConnectionRefusedError):
            server.connect()


# TCP proxy


@contextlib.contextmanager
def proxied(io_manager: str) -> Iterator[tuple[Server, socket.socket, socket.socket]]:
    """A proxy, a client of it, and what the target sees of that client."""
    with (
        socket.create_server(("127.0.0.1", 0)) as target,
        running("tcp_proxy.py", "--io-manager", io_manager, "--target", target_of(target)) as server,
        server.connect() as client,
    ):
        target.settimeout(TIMEOUT)
        upstream, _ = target.accept()
        upstream.settimeout(TIMEOUT)
        with upstream:
            yield server, client, upstream


def target_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()
    return f"{host}:{port}"


def test_proxy_passes_on_both_directions_at_once(io_manager: str) -> None:
    data = noise(1, 4 * MIB), noise(2, 5 * MIB)
    with proxied(io_manager) as (_, client, upstream), ThreadPoolExecutor(4) as executor:
        executor.submit(send_and_end, client, data[0])
        executor.submit(send_and_end, upstream, data[1])
        at_upstream = executor.submit(read_to_end, upstream)
        at_client = executor.submit(read_to_end, client)
        assert at_upstream.result(TIMEOUT) == data[0]
        assert at_client.result(TIMEOUT) == data[1]


def test_proxy_passes_on_an_end_alone(io_manager: str) -> None:
    for first, second in ((0, 1), (1, 0)):
        with proxied(io_manager) as (_, *ends):
            send_and_end(ends[first], b"question")
            assert read_to_end(ends[second]) == b"question"
            ends[second].sendall(b"half of the answer, ")  # the other direction goes on
            assert read_exactly(ends[first], 20) == b"half of the answer, "
            send_and_end(ends[second], b"and the rest")
            assert read_to_end(ends[first]) == b"and the rest"


def test_proxy_passes_on_a_reset(io_manager: str) -> None:
    for first, second in ((0, 1), (1, 0)):
        with proxied(io_manager) as (_, *ends):
            ends[first].sendall(b"part of the story")
            assert read_exactly(ends[second], 17) == b"part of the story"
            reset(ends[first])
            with pytest.raises(ConnectionResetError):
                ends[second].recv(1)


def test_proxy_slows_down_the_sender_for_a_slow_reader_only(io_manager: str) -> None:
    data = noise(0, MORE_THAN_FITS_ON_THE_WAY)
    with proxied(io_manager) as (_, client, upstream), ThreadPoolExecutor(1) as executor:
        sent = executor.submit(send_and_end, client, data)
        for number in range(20):  # against the stream that is held up
            answer = noise(number, 1000)
            upstream.sendall(answer)
            assert read_exactly(client, 1000) == answer
        assert not sent.done()
        assert read_to_end(upstream) == data
        sent.result()


def test_proxy_resets_the_client_when_the_target_is_not_there(io_manager: str) -> None:
    with socket.create_server(("127.0.0.7", 0)) as placeholder:
        target = target_of(placeholder)
    with running("tcp_proxy.py", "--io-manager", io_manager, "--target", target) as server:
        for _ in range(2):  # the proxy goes on
            with pytest.raises(ConnectionResetError), server.connect() as client:  # the reset may be the first answer
                client.recv(1)
        server.stop()
        complaints, server.stderr = server.stderr.splitlines(), ""
    assert len(complaints) == 2
    assert all(complaint.startswith("no connection to the target: ") for complaint in complaints)


def test_proxy_before_an_echo_server_serves_many_clients(io_manager: str) -> None:
    clients = 24
    manager = "--io-manager", io_manager
    with (
        running("echo_server.py", *manager) as echo,
        running("tcp_proxy.py", *manager, "--target", "{}:{}".format(*echo.address)) as server,
    ):
        before = server.descriptors()
        socks = [server.connect() for _ in range(clients)]
        data = [noise(number, MIB // 4 + number) for number in range(clients)]
        with ThreadPoolExecutor(clients) as executor:
            assert all(executor.map(echoes_everything, socks, data, timeout=TIMEOUT))
        for _ in range(30):
            vanishing = server.connect()
            vanishing.sendall(bytes(1000))
            reset(vanishing)
        assert_descriptors_return_to(server, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_proxy_ends_on_a_signal(io_manager: str, number: signal.Signals) -> None:
    with proxied(io_manager) as (server, client, upstream):
        client.sendall(b"x")
        read_exactly(upstream, 1)
        server.stop(number)
        assert_end_or_reset(client)
        assert_end_or_reset(upstream)


def test_proxy_refuses_a_target_that_is_none() -> None:
    refusal = subprocess.run(
        command("tcp_proxy.py", "--target", "nowhere"), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert refusal.returncode == 2
    assert "'nowhere' is not HOST:PORT" in refusal.stderr


# Chat server


class Chatter:
    """A client that speaks lines; its own arrival has been announced when it is made."""

    def __init__(self, server: Server, nick: str) -> None:
        self.sock = server.connect()
        self.buffer = b""
        self.nick = nick
        welcome = self.hear()
        assert re.fullmatch(r"\* welcome, guest\d+", welcome)
        self.say(f"/nick {nick}")
        assert self.hear() == f"* {welcome.split()[-1]} is now {nick}"

    def say(self, line: str) -> None:
        self.sock.sendall(f"{line}\n".encode())

    def hear(self) -> str:
        while b"\n" not in self.buffer:
            data = self.sock.recv(65536)
            assert data, f"{self.nick}: the server hung up after {self.buffer!r}"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def hear_until(self, line: str) -> None:
        while self.hear() != line:
            continue

    def assert_hung_up_on(self) -> None:
        assert self.buffer + read_to_end(self.sock) == b""


@contextlib.contextmanager
def chatting(io_manager: str, *nicks: str) -> Iterator[tuple[Server, list[Chatter]]]:
    """A chat server and clients that all have heard of each other."""
    with running("chat_server.py", "--io-manager", io_manager) as server:
        chatters = [Chatter(server, nick) for nick in nicks]
        try:
            for chatter in chatters[:-1]:
                chatter.hear_until(f"* guest{len(nicks)} is now {nicks[-1]}")
            yield server, chatters
        finally:
            for chatter in chatters:
                chatter.sock.close()


def test_chat_passes_a_line_to_everybody_else(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob", "eve") as (_, [ada, bob, eve]):
        ada.say("hello")
        assert bob.hear() == eve.hear() == "ada: hello"
        bob.say("hi, Ada \N{WAVING HAND SIGN}")
        # the first that ada hears: her own line did not come back to her
        assert ada.hear() == eve.hear() == "bob: hi, Ada \N{WAVING HAND SIGN}"


def test_chat_nicks_are_unique_and_can_be_changed(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (_, [ada, bob]):
        bob.say("/nick ada")
        assert bob.hear() == "* ada is taken"
        bob.say("/nick not a nick")
        assert bob.hear() == "* a nick is 1 to 20 letters, digits and underscores"
        bob.say("/nick robert")
        assert ada.hear() == bob.hear() == "* bob is now robert"
        bob.say("/who")
        assert bob.hear() == "* here: ada, robert"
        bob.say("it is me")
        assert ada.hear() == "robert: it is me"


def test_chat_quit_says_goodbye_and_hangs_up(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (_, [ada, bob]):
        start = time.monotonic()
        bob.say("/quit")
        assert bob.hear() == "* bye"
        bob.assert_hung_up_on()
        assert time.monotonic() - start < 4  # and not after the 5 seconds that one who does not listen is given
        assert ada.hear() == "* bob has left"
        ada.say("/who")
        assert ada.hear() == "* here: ada"


def test_chat_client_that_ends_is_heard_out_and_told_all(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (_, [ada, bob]):
        send_and_end(bob.sock, b"/who\nlast words\nwithout a newline")
        assert ada.hear() == "bob: last words"
        assert ada.hear() == "bob: without a newline"
        assert ada.hear() == "* bob has left"
        assert bob.hear() == "* here: ada, bob"
        bob.assert_hung_up_on()


def test_chat_lines_may_come_in_pieces(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (_, [ada, bob]):
        bob.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"o", b"ne\r", b"\ntwo\nth", b"ree\n"):
            bob.sock.sendall(piece)
        assert [ada.hear() for _ in range(3)] == ["bob: one", "bob: two", "bob: three"]


def test_chat_hangs_up_on_a_line_without_end(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (_, [ada, bob]):
        bob.say("x" * 4096)
        assert ada.hear() == "bob: " + "x" * 4096
        bob.sock.sendall(b"x" * 4097)
        assert bob.hear() == "* a line has at most 4096 bytes; bye"
        bob.assert_hung_up_on()
        assert ada.hear() == "* bob has left"


def test_chat_reaches_many_clients(io_manager: str) -> None:
    nicks = [f"n{number}" for number in range(60)]
    with chatting(io_manager, *nicks) as (_, chatters):
        for speaker in chatters[:10]:
            speaker.say("are you all here?")
            for listener in chatters:
                if listener is not speaker:
                    assert listener.hear() == f"{speaker.nick}: are you all here?"


def test_chat_slow_client_holds_up_nobody_and_is_dropped_in_the_end(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob", "slow") as (_, [ada, bob, slow]):
        for number in itertools.count():
            line = f"{number:04000}"
            assert number * len(line) < 2 * MORE_THAN_FITS_ON_THE_WAY, "the server keeps it all"
            ada.say(line)
            if (heard := bob.hear()) == "* slow has left":
                break
            assert heard == f"ada: {line}"
        assert bob.hear() == f"ada: {line}"
        assert ada.hear() == "* slow has left"
        with contextlib.suppress(ConnectionResetError):
            while slow.sock.recv(MIB):
                continue


def test_chat_survives_clients_that_vanish(io_manager: str) -> None:
    with chatting(io_manager, "ada", "bob") as (server, [ada, bob]):
        before = server.descriptors()
        for number in range(20):
            ghost = Chatter(server, f"ghost{number}")
            ghost.say("boo")
            reset(ghost.sock)
            for witness in (ada, bob):
                witness.hear_until(f"* ghost{number} has left")
        ada.say("are they gone?")
        assert bob.hear() == "ada: are they gone?"
        assert server.descriptors() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_chat_ends_on_a_signal(io_manager: str, number: signal.Signals) -> None:
    with chatting(io_manager, "ada", "bob") as (server, [ada, bob]):
        server.stop(number)
        assert_end_or_reset(ada.sock)
        assert_end_or_reset(bob.sock)


# Main job


def run_main_job(*options: str) -> dict[str, str]:
    """The io_statistics that it has printed."""
    job = subprocess.run(command("main_job.py", *options), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert job.stderr == ""
    assert job.returncode == 0
    first, second, third, *statistics = job.stdout.splitlines()
    assert re.fullmatch(r"\d+ clients, \d+ round trips of \d+ bytes each, over TCP to 127\.0\.0\.1:\d+", first)
    served = re.fullmatch(
        r"(\d+) requests served on (\d+) connections in \d+\.\d\d s, (\d+) bytes, every one of them right", second
    )
    assert served is not None
    assert third == "the run's io_statistics:"
    return {
        "requests": served[1],
        "connections": served[2],
        "bytes": served[3],
        **dict(line.split() for line in statistics),
    }


def test_main_job_does_6400_round_trips_on_aiopoll_by_default() -> None:
    counts = run_main_job()
    assert counts["backend"] == "aiopoll"
    assert int(counts["connections"]) == 64
    assert int(counts["requests"]) == 6400
    assert int(counts["bytes"]) == 6400 * 1024
    assert int(counts["polls_submitted"]) > 64
    assert int(counts["submit_calls"]) < int(counts["polls_submitted"])
    assert int(counts["events_taken"]) + int(counts["events_waited"]) > 64


def test_main_job_does_what_it_is_told(io_manager: str) -> None:
    counts = run_main_job("--io-manager", io_manager, "--connections", "7", "--round-trips", "5", "--size", "70000")
    assert counts["backend"] == io_manager
    assert counts["connections"] == "7"
    assert counts["requests"] == "35"
    assert counts["bytes"] == str(35 * 70000)
