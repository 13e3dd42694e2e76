"""Guarantee: a wait that has ended keeps nothing alive, nor does a run that has ended.

What stock Trio frees without the help of the garbage collector, we free without it.
"""

from __future__ import annotations

import gc
import os
import pty
import socket
import ssl
import tempfile
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing
import trustme
from trio._core._io_epoll import EpollIOManager  # the model

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

TIMEOUT: Final = 30.0
IO_MANAGERS: Final = ["epoll", "aiopoll"]


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


class Thing:
    """Something that can be seen to be gone; as large as a buffer, so that a leak would hurt."""

    def __init__(self) -> None:
        self.buffer = bytearray(4096)


class File(Thing):
    """What is waited for: anything with a fileno()."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


class Watched:
    """Weak references by name."""

    def __init__(self) -> None:
        self.references: dict[str, weakref.ref[Any]] = {}

    def watch(self, **things: object) -> None:
        for name, thing in things.items():
            self.references[name] = weakref.ref(thing)

    def alive(self) -> set[str]:
        return {name for name, reference in self.references.items() if reference() is not None}


def socketpair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


##############################
# Waits
##############################


@contextmanager
def readable_later() -> Iterator[tuple[int, Callable[[], object]]]:
    a, b = socketpair()
    yield a.fileno(), lambda: b.send(b"x")
    a.close()
    b.close()


@contextmanager
def pipe_readable_later() -> Iterator[tuple[int, Callable[[], object]]]:
    reader, writer = os.pipe()
    yield reader, lambda: os.write(writer, b"x")
    os.close(reader)
    os.close(writer)


@contextmanager
def eventfd_readable_later() -> Iterator[tuple[int, Callable[[], object]]]:
    fd = os.eventfd(0)
    yield fd, lambda: os.eventfd_write(fd, 1)
    os.close(fd)


@contextmanager
def terminal_readable_later() -> Iterator[tuple[int, Callable[[], object]]]:
    master, slave = pty.openpty()
    yield slave, lambda: os.write(master, b"x\n")
    os.close(master)
    os.close(slave)


FILES: Final = [readable_later, pipe_readable_later, eventfd_readable_later, terminal_readable_later]


async def wait_and_watch(watched: Watched, fd: int) -> None:
    """Wait for an object of our own, with another one in the frame, and keep an eye on these and on the exception."""
    thing, file = Thing(), File(fd)
    watched.watch(thing=thing, file=file, task=trio.lowlevel.current_task())
    try:
        await trio.lowlevel.wait_readable(file)
    except BaseException as error:
        watched.watch(error=error)
        if isinstance(error, trio.Cancelled):
            raise


async def after_readiness(watched: Watched, fd: int, make_ready: Callable[[], object]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_watch, watched, fd)
        await trio.testing.wait_all_tasks_blocked()
        make_ready()


async def after_cancel(watched: Watched, fd: int, _: object) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_watch, watched, fd)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def after_deadline(watched: Watched, fd: int, _: object) -> None:
    with trio.move_on_after(0.01):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_and_watch, watched, fd)


async def after_cancel_before_the_wait(watched: Watched, fd: int, _: object) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_watch, watched, fd)
        nursery.cancel_scope.cancel()


async def after_close(watched: Watched, fd: int, _: object) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_watch, watched, fd)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(fd)


async def after_close_by_an_object(watched: Watched, fd: int, _: object) -> None:
    closed = File(fd)
    watched.watch(closed=closed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_watch, watched, fd)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(closed)


async def after_busy(watched: Watched, fd: int, make_ready: Callable[[], object]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, fd)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as inner:
            inner.start_soon(wait_and_watch, watched, fd)
        assert "error" in watched.references
        make_ready()


async def after_many_waits(watched: Watched, fd: int, make_ready: Callable[[], object]) -> None:
    for _ in range(10):
        await after_cancel(watched, fd, make_ready)
        await after_close(watched, fd, make_ready)
    await after_readiness(watched, fd, make_ready)


WAYS: Final = [
    after_readiness,
    after_cancel,
    after_deadline,
    after_cancel_before_the_wait,
    after_close,
    after_close_by_an_object,
    after_busy,
    after_many_waits,
]


@pytest.mark.parametrize("io_manager", IO_MANAGERS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_a_wait_that_has_ended_keeps_nothing_alive(
    way: Callable[..., Awaitable[None]], file: Any, io_manager: str
) -> None:
    watched = Watched()

    async def main() -> None:
        with trio.fail_after(TIMEOUT), file() as (fd, make_ready):
            await way(watched, fd, make_ready)
            await trio.lowlevel.checkpoint()
            assert watched.references.keys() >= {"thing", "file", "task"}
            assert watched.alive() == set()
            trio.lowlevel.notify_closing(fd)

    trio.run(main, io_manager=io_manager)


def after_a_failed_wait(io_manager: str, wait: str, case: str) -> set[str]:
    class Failing(File):
        def fileno(self) -> int:
            if case == "raises":
                raise OSError("not now")
            return super().fileno()

    watched = Watched()

    async def fail(fd: int) -> None:
        thing, file = Thing(), Thing() if case == "no fileno" else Failing(fd)
        watched.watch(thing=thing, file=file, task=trio.lowlevel.current_task())
        with pytest.raises((OSError, ValueError, RuntimeError)):
            await getattr(trio.lowlevel, wait)(file)

    async def main() -> None:
        with tempfile.TemporaryFile() as regular:
            closed = os.dup(regular.fileno())
            os.close(closed)
            fds = {"closed": closed, "regular file": regular.fileno(), "negative": -1}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail, fds.get(case, 0))
            await trio.lowlevel.checkpoint()
            alive.update(watched.alive())

    alive: set[str] = set()
    trio.run(main, io_manager=io_manager)
    return alive


@pytest.mark.parametrize("wait", ["wait_readable", "wait_writable"])
@pytest.mark.parametrize("case", ["closed", "regular file", "negative", "no fileno", "raises"])
def test_a_wait_that_fails_keeps_alive_no_more_than_on_stock_trio(wait: str, case: str) -> None:
    assert after_a_failed_wait("aiopoll", wait, case) <= after_a_failed_wait("epoll", wait, case)


@pytest.mark.parametrize("wait", ["wait_readable", "wait_writable"])
@pytest.mark.parametrize("case", ["negative", "no fileno", "raises"])
def test_a_wait_that_fails_at_once_keeps_nothing_alive(wait: str, case: str) -> None:
    assert after_a_failed_wait("aiopoll", wait, case) == set()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("again", [False, True], ids=["first wait", "second wait"])
def test_the_exception_of_a_wait_has_the_context_that_it_has_on_stock_trio(file: Any, again: bool) -> None:
    """Nothing of how we decided about the file shows in a traceback, nor hangs on it."""

    def contexts(error: BaseException | None) -> list[type]:
        chain = []
        while error is not None:
            chain.append(type(error))
            error = error.__context__
        return chain

    async def fail(seen: list[list[type]], fd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(fd)
        except BaseException as error:
            seen.append(contexts(error))
            if isinstance(error, trio.Cancelled):
                raise

    async def main() -> list[list[type]]:
        seen: list[list[type]] = []
        with file() as (fd, make_ready):
            if again:
                make_ready()
                await trio.lowlevel.wait_readable(fd)
                os.read(fd, 8)
            for end in (lambda: nursery.cancel_scope.cancel(), lambda: trio.lowlevel.notify_closing(fd)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fail, seen, fd)
                    await trio.testing.wait_all_tasks_blocked()
                    async with trio.open_nursery() as inner:
                        inner.start_soon(fail, seen, fd)  # busy
                    end()
        await fail(seen, -1)
        return seen

    assert trio.run(main, io_manager="aiopoll") == trio.run(main, io_manager="epoll")


@pytest.mark.parametrize("io_manager", IO_MANAGERS)
def test_a_closed_socket_is_gone_with_its_last_reference(io_manager: str) -> None:
    watched = Watched()

    async def receive(sock: trio.socket.SocketType) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await sock.recv(10)

    async def main() -> None:
        for _ in range(3):
            a, b = trio.socket.socketpair()
            watched.watch(a=a, b=b)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, a)
                await trio.testing.wait_all_tasks_blocked()
                a.close()
            b.close()
            del a, b, nursery
            await trio.lowlevel.checkpoint()
            assert watched.alive() == set()

    trio.run(main, io_manager=io_manager)


##############################
# TLS
##############################


@pytest.fixture(scope="module")
def authority() -> tuple[trustme.CA, trustme.LeafCert]:
    authority = trustme.CA()
    return authority, authority.issue_cert("example.org")


@pytest.mark.parametrize("io_manager", IO_MANAGERS)
@pytest.mark.parametrize("end", ["at once", "cancelled", "notify_closing", "distrusted"])
def test_a_tls_context_is_gone_with_its_connection(
    io_manager: str, end: str, authority: tuple[trustme.CA, trustme.LeafCert]
) -> None:
    # not with trio.SSLStream, which refers to itself
    watched = Watched()

    async def retry(operation: Callable[..., Any], sock: ssl.SSLSocket, *args: Any) -> Any:
        while True:
            try:
                return operation(*args)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(sock)

    async def serve(raw: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority[1].configure_cert(context)
        with context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False) as sock:
            watched.watch(server_context=context, server_socket=sock)
            try:
                await retry(sock.do_handshake, sock)
                while data := await retry(sock.recv, sock, 10):
                    sock.send(data)
            except OSError:
                watched.watch(server_failed=context)

    async def end_by_cancel(scope: trio.CancelScope) -> None:
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()

    async def end_by_closing(raw: socket.socket) -> None:
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(raw)

    async def connect(raw: socket.socket, nursery: trio.Nursery) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if end != "distrusted":
            authority[0].configure_trust(context)
        with context.wrap_socket(raw, server_hostname="example.org", do_handshake_on_connect=False) as sock:
            watched.watch(client_context=context, client_socket=sock)
            try:
                await retry(sock.do_handshake, sock)
                sock.send(b"hello")
                assert await retry(sock.recv, sock, 10) == b"hello"
                if end == "cancelled":
                    with trio.CancelScope() as scope:
                        nursery.start_soon(end_by_cancel, scope)
                        await retry(sock.recv, sock, 10)
                if end == "notify_closing":
                    nursery.start_soon(end_by_closing, sock)
                    await retry(sock.recv, sock, 10)
            except (OSError, trio.ClosedResourceError):
                watched.watch(client_failed=context)
            finally:
                trio.lowlevel.notify_closing(sock)

    async def main() -> None:
        with trio.fail_after(TIMEOUT):
            a, b = socketpair()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, a)
                nursery.start_soon(connect, b, nursery)
            del a, b, nursery
            await trio.lowlevel.checkpoint()
            assert ("client_failed" in watched.references) == (end in ("distrusted", "notify_closing"))
            assert watched.alive() == set()

    trio.run(main, io_manager=io_manager)


##############################
# Runs
##############################


def after_a_run(io_manager: str, fails: bool) -> set[str]:
    """What is alive after a run that used its manager and returned, or raised."""
    watched = Watched()
    base: Any = {"epoll": EpollIOManager, "aiopoll": trio_aiopoll.AiopollIOManager}[io_manager]

    def make() -> Any:
        manager = base()
        watched.watch(manager=manager)
        return manager

    async def main() -> Thing:
        a, b = trio.socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_and_watch, watched, a.fileno())
                await trio.testing.wait_all_tasks_blocked()
                await b.send(b"x")
            with trio.move_on_after(0.01):
                await trio.lowlevel.wait_readable(os.eventfd(0))
            watched.watch(socket=a, main_task=trio.lowlevel.current_task())
            result = Thing()
            watched.watch(result=result)
            if fails:
                raise Failure(result)
            return result

    class Failure(Exception):
        pass

    try:
        result = trio.run(main, io_manager=make)
    except Failure as error:
        watched.watch(error=error)
        result = error.args[0]
    assert result.buffer
    del result
    return watched.alive()


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_run_that_has_ended_keeps_alive_no_more_than_stock_trio(fails: bool) -> None:
    after_a_run("aiopoll", fails)
    assert after_a_run("aiopoll", fails) <= after_a_run("epoll", fails)


def garbage_of_waits(io_manager: str, count: int) -> int:
    """What the collector finds after a run with so many waits that end in each way, for a new file each."""

    async def receive_until_closed(sock: trio.socket.SocketType) -> None:
        with suppress(trio.ClosedResourceError):
            await sock.recv(1)

    async def main() -> None:
        for _ in range(count):
            a, b = trio.socket.socketpair()
            with a, b:
                with trio.move_on_after(0):
                    await a.recv(1)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a.recv, 1)
                    await trio.testing.wait_all_tasks_blocked()
                    await b.send(b"x")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a.recv, 1)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(receive_until_closed, a)
                    await trio.testing.wait_all_tasks_blocked()
                    a.close()

    gc.collect()
    trio.run(main, io_manager=io_manager)
    return gc.collect()


def test_waits_leave_no_more_garbage_than_on_stock_trio() -> None:
    per_20_waits = {name: garbage_of_waits(name, 30) - garbage_of_waits(name, 10) for name in IO_MANAGERS}
    assert per_20_waits["aiopoll"] <= per_20_waits["epoll"]
