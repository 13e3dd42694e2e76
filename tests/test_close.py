"""Guarantee: when notify_closing returns, or the task of a cancelled wait goes on, the kernel holds the file no more.

A poll in flight holds its file open, so a socket that is closed too early sends no EOF and a listener keeps its port.
Each test does this many times and counts the tries in which close() had not had its full effect in the very same step.
Trio's own epoll manager is the model that must give the same answers.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    # Begins a wait on the socket and ends it in one way; calls `check` as soon as the file has to be free.
    EndWait: TypeAlias = Callable[[socket.socket, bool, Callable[[], None]], Awaitable[None]]

TRIES = {"epoll": 40, "aiopoll": 1000}
# Nobody else on this machine binds ports of this address.
ADDRESS = f"127.{77 + os.getpid() % 100}.{os.getpid() // 256 % 256}.{1 + os.getpid() % 254}"


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    manager: str = request.param
    return manager


@pytest.fixture(params=["free", "pinned", "pinned and the CPU busy"])
def cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the test may run: anywhere, on one CPU only, on one CPU that another process wants for itself."""
    before = os.sched_getaffinity(0)
    hog = None
    try:
        if request.param != "free":
            os.sched_setaffinity(0, {min(before)})
        if request.param == "pinned and the CPU busy":
            hog = subprocess.Popen(
                [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE, text=True
            )
            assert hog.stdout is not None
            assert hog.stdout.readline() == "\n"
        yield
    finally:
        if hog is not None:
            hog.kill()
            hog.communicate()
        os.sched_setaffinity(0, before)


#########################
# The ways in which a wait ends
#########################


async def _expect_closed(wait: Callable[[Any], Awaitable[None]], sock: socket.socket) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await wait(sock)


async def end_by_notify_closing(sock: socket.socket, both: bool, check: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_closed, trio.lowlevel.wait_readable, sock)
        if both:
            nursery.start_soon(_expect_closed, trio.lowlevel.wait_writable, sock)
        await wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(sock)
        check()


async def _wait_in(
    scope: trio.CancelScope, sock: socket.socket, both: bool, check: Callable[[], None] = lambda: None
) -> None:
    async def wait_to_be_cancelled(wait: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await wait(sock)
        except trio.Cancelled:
            if sock.fileno() != -1:  # of two, the first to go on closes: the other's wait has to be over as well
                check()
            raise

    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_to_be_cancelled, trio.lowlevel.wait_readable)
            if both:
                nursery.start_soon(wait_to_be_cancelled, trio.lowlevel.wait_writable)
    assert scope.cancelled_caught


async def end_by_cancel(sock: socket.socket, both: bool, check: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_wait_in, scope, sock, both, check)
        await wait_all_tasks_blocked()
        scope.cancel()


async def end_by_deadline(sock: socket.socket, both: bool, check: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_wait_in, scope, sock, both, check)
        await wait_all_tasks_blocked()
        # Soon, and then nobody is left to run: the loop goes to sleep, and runs the task in the tick that it wakes in.
        scope.deadline = trio.current_time() + 20e-6


async def end_by_cancel_then_notify_closing(sock: socket.socket, both: bool, check: Callable[[], None]) -> None:
    """notify_closing answers for waits that were cancelled a moment ago and whose tasks have not gone on yet."""
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_wait_in, scope, sock, both)
        await wait_all_tasks_blocked()
        scope.cancel()
        trio.lowlevel.notify_closing(sock)
        check()


WAYS = [end_by_notify_closing, end_by_cancel, end_by_deadline, end_by_cancel_then_notify_closing]


#########################
# Raw sockets
#########################


def _eof(peer: socket.socket) -> bool:
    """Whether nothing but EOF follows what the peer has to read now."""
    try:
        while peer.recv(65536, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return False
    return True


def _fill(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    full = select.poll()
    full.register(sock, select.POLLOUT)
    while full.poll(0):
        sock.send(b"x" * 4096, socket.MSG_DONTWAIT)


def _listen(address: tuple[str, int]) -> socket.socket | None:
    """A new listener there, or None if the port is in use."""
    listener = socket.socket()
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener


def _rebind(listener: socket.socket) -> socket.socket | None:
    address = listener.getsockname()
    listener.close()
    return _listen(address)


def _cancels() -> int:
    return getattr(trio.lowlevel.current_statistics().io_statistics, "cancels", 0)


@pytest.mark.parametrize("both", [False, True], ids=["one direction", "both directions"])
@pytest.mark.parametrize("end_wait", WAYS)
@pytest.mark.usefixtures("cpu")
def test_the_peer_of_a_closed_socket_sees_eof_at_once(io_manager: str, end_wait: EndWait, both: bool) -> None:
    tries = TRIES[io_manager]

    async def main() -> None:
        held = checked = 0
        cancels_before = _cancels()
        for _ in range(tries):
            sock, peer = socket.socketpair()

            def check(sock: socket.socket = sock, peer: socket.socket = peer) -> None:
                nonlocal held, checked
                checked += 1
                sock.close()
                held += not _eof(peer)

            with peer:
                if both:
                    _fill(sock)
                await end_wait(sock, both, check)
        assert checked == tries
        assert held == 0, f"{held} of {tries} peers saw no EOF"
        if io_manager == "aiopoll":
            assert _cancels() - cancels_before >= tries * (1 + both), "the polls were not in flight: nothing was tested"

    trio.run(main, io_manager=io_manager)


@pytest.mark.parametrize("end_wait", WAYS)
def test_so_it_is_with_more_waits_than_one_ring_holds_while_others_wake(io_manager: str, end_wait: EndWait) -> None:
    tries = TRIES[io_manager] // 4
    crowd_size = 1200

    async def main() -> None:
        held = woken = 0
        crowd = [socket.socketpair() for _ in range(crowd_size)]

        async def serve(sock: socket.socket) -> None:
            nonlocal woken
            while True:
                await trio.lowlevel.wait_readable(sock)
                assert sock.recv(2) == b"x"
                woken += 1

        async with trio.open_nursery() as nursery:
            for sock, _ in crowd:
                nursery.start_soon(serve, sock)
            await wait_all_tasks_blocked()
            if io_manager == "aiopoll":
                assert trio.lowlevel.current_statistics().io_statistics.rings > 2
            for i in range(tries):
                sock, peer = socket.socketpair()

                def check(i: int = i, sock: socket.socket = sock, peer: socket.socket = peer) -> None:
                    nonlocal held
                    sock.close()
                    held += not _eof(peer)
                    crowd[i * 7 % crowd_size][1].send(b"x")

                with peer:
                    crowd[(i * 7 + 3) % crowd_size][1].send(b"x")
                    await end_wait(sock, False, check)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for pair in crowd:
            for sock in pair:
                sock.close()
        assert held == 0, f"{held} of {tries} peers saw no EOF"
        assert woken == 2 * tries

    trio.run(main, io_manager=io_manager)


@pytest.mark.parametrize("end_wait", WAYS)
@pytest.mark.usefixtures("cpu")
def test_the_port_of_a_closed_listener_can_be_bound_again_at_once(io_manager: str, end_wait: EndWait) -> None:
    tries = TRIES[io_manager]

    async def main() -> None:
        busy = checked = 0
        cancels_before = _cancels()
        listener: socket.socket | None = None
        for _ in range(tries):
            if listener is None:
                listener = socket.create_server((ADDRESS, 0))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            old, listener = listener, None

            def check(old: socket.socket = old) -> None:
                nonlocal busy, checked, listener
                checked += 1
                listener = _rebind(old)
                busy += listener is None

            await end_wait(old, False, check)
        if listener is not None:
            listener.close()
        assert checked == tries
        assert busy == 0, f"{busy} of {tries} ports were still in use"
        if io_manager == "aiopoll":
            assert _cancels() - cancels_before >= tries, "the polls were not in flight: nothing was tested"

    trio.run(main, io_manager=io_manager)


#########################
# Trio's sockets
#########################


async def _receive_nothing(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def _send_for_ever(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"x" * 1_000_000)


@pytest.mark.parametrize("how", ["close", "aclose"])
@pytest.mark.parametrize("both", [False, True], ids=["one direction", "both directions"])
@pytest.mark.usefixtures("cpu")
def test_a_stream_closed_under_its_readers_and_writers_sends_eof_at_once(io_manager: str, both: bool, how: str) -> None:
    tries = TRIES[io_manager]

    async def main() -> None:
        held = 0
        for _ in range(tries):
            sock, peer = socket.socketpair()
            with peer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                sock.setblocking(False)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_receive_nothing, stream)
                    if both:
                        nursery.start_soon(_send_for_ever, stream)
                    await wait_all_tasks_blocked()
                    if how == "close":
                        stream.socket.close()
                    else:
                        await stream.aclose()
                    held += not _eof(peer)
        assert held == 0, f"{held} of {tries} peers saw no EOF"

    trio.run(main, io_manager=io_manager)


async def _accept_nothing(listener: trio.SocketListener) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


@pytest.mark.parametrize("how", ["close under accept", "aclose under accept", "cancel accept, close", "serve, cancel"])
@pytest.mark.usefixtures("cpu")
def test_the_port_of_a_closed_trio_listener_can_be_bound_again_at_once(io_manager: str, how: str) -> None:
    tries = TRIES[io_manager]

    async def main() -> None:
        busy = 0
        raw: socket.socket | None = None
        for _ in range(tries):
            if raw is None:
                raw = socket.create_server((ADDRESS, 0))
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            address = raw.getsockname()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(raw))
            async with trio.open_nursery() as nursery:
                if how.endswith("under accept"):
                    nursery.start_soon(_accept_nothing, listener)
                elif how == "serve, cancel":  # closes the listener itself
                    nursery.start_soon(partial(trio.serve_listeners, trio.aclose_forcefully, [listener]))
                else:
                    nursery.start_soon(listener.accept)
                await wait_all_tasks_blocked()
                if how == "aclose under accept":
                    await listener.aclose()
                elif how == "close under accept":
                    listener.socket.close()
                else:
                    nursery.cancel_scope.cancel()
            listener.socket.close()
            raw = _listen(address)
            busy += raw is None
        if raw is not None:
            raw.close()
        assert busy == 0, f"{busy} of {tries} ports were still in use"

    trio.run(main, io_manager=io_manager)
