"""Guarantee: every kind of file that epoll can wait for works, and what epoll refuses is refused in the same way.

Each kind is waited for in each direction, woken, cancelled and closed under its waiters, on both managers: what Trio's
own epoll manager does is the model.
"""

from __future__ import annotations

import ctypes
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import tty
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PATIENCE: Final = 30
libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass
class File:
    """A file that is not ready for reading, and how to change that."""

    fd: int
    make_readable: Callable[[], object] | None = None
    make_unreadable: Callable[[], object] | None = None  # None: it stays readable
    is_writable: bool = False
    make_unwritable: Callable[[], object] | None = None
    make_writable: Callable[[], object] | None = None
    hang_up: Callable[[], object] | None = None
    is_open: bool = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self.fd)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def poll(fd: int, events: int) -> bool:
    poller = select.poll()
    poller.register(fd, events)
    return bool(poller.poll(0))


def fill(fd: int, size: int = 1024) -> None:
    os.set_blocking(fd, False)
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    while poller.poll(100):  # ms, in which TCP may move on what looked like a full buffer
        os.write(fd, b"x" * size)


def drain(fd: int) -> None:
    while poll(fd, select.POLLIN):
        os.read(fd, 65536)


#########################
# The kinds
#########################


def other_end(stack: ExitStack, fd: int) -> FileIO:
    return stack.enter_context(FileIO(fd, "r+"))


def connected(stack: ExitStack, near: socket.socket, far: socket.socket, *, fills: bool = True) -> File:
    stack.enter_context(far)
    fd = near.detach()
    return File(
        fd,
        make_readable=lambda: far.send(b"x"),
        make_unreadable=lambda: drain(fd),
        is_writable=True,
        make_unwritable=(lambda: fill(fd)) if fills else None,
        make_writable=lambda: drain(far.fileno()),
        hang_up=far.close if near.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET) else None,
    )


def tcp(stack: ExitStack) -> File:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return connected(stack, near, far)


def tcp_listener(stack: ExitStack) -> File:
    listener = socket.create_server(("127.0.0.1", 0))
    fd = listener.fileno()
    address = listener.getsockname()
    accepting = socket.socket(fileno=os.dup(listener.detach()))
    stack.enter_context(accepting)
    return File(
        fd,
        make_readable=lambda: stack.enter_context(socket.create_connection(address)),
        make_unreadable=lambda: accepting.accept()[0].close(),
    )


def unix_stream(stack: ExitStack) -> File:
    return connected(stack, *socket.socketpair())


def unix_datagram(stack: ExitStack) -> File:
    return connected(stack, *socket.socketpair(type=socket.SOCK_DGRAM))


def unix_seqpacket(stack: ExitStack) -> File:
    return connected(stack, *socket.socketpair(type=socket.SOCK_SEQPACKET))


def udp(stack: ExitStack) -> File:
    near, far = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
    for sock in (near, far):
        sock.bind(("127.0.0.1", 0))
    near.connect(far.getsockname())
    far.connect(near.getsockname())
    return connected(stack, near, far, fills=False)


def netlink(stack: ExitStack) -> File:
    usersock = 2  # NETLINK_USERSOCK, on which processes talk to each other
    near, far = (socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, usersock) for _ in range(2))
    for sock in (near, far):
        sock.bind((0, 0))
    far.connect(near.getsockname())
    return connected(stack, near, far, fills=False)


def pipe_reader(stack: ExitStack) -> File:
    reader, writer = os.pipe()
    far = other_end(stack, writer)
    return File(reader, lambda: far.write(b"x"), lambda: drain(reader), hang_up=far.close)


def pipe_writer(stack: ExitStack) -> File:
    reader, writer = os.pipe()
    far = other_end(stack, reader)
    return File(
        writer,
        is_writable=True,
        make_unwritable=lambda: fill(writer, 4096),
        make_writable=lambda: drain(far.fileno()),
        hang_up=far.close,
    )


def fifo_both_ways(stack: ExitStack) -> File:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    return File(
        fd,
        make_readable=lambda: os.write(fd, b"x"),
        make_unreadable=lambda: drain(fd),
        is_writable=True,
        make_unwritable=lambda: fill(fd, 4096),
        make_writable=lambda: drain(fd),
    )


def pty_master(stack: ExitStack) -> File:
    master, slave = pty.openpty()
    tty.setraw(slave)
    far = other_end(stack, slave)
    return File(
        master,
        make_readable=lambda: far.write(b"x"),
        make_unreadable=lambda: drain(master),
        is_writable=True,
        hang_up=far.close,
    )


def tty_slave(stack: ExitStack) -> File:
    master, slave = pty.openpty()
    tty.setraw(slave)
    far = other_end(stack, master)
    return File(
        slave,
        make_readable=lambda: far.write(b"x"),
        make_unreadable=lambda: drain(slave),
        is_writable=True,
        make_unwritable=lambda: termios.tcflow(slave, termios.TCOOFF),
        make_writable=lambda: termios.tcflow(slave, termios.TCOON),
        hang_up=far.close,
    )


def signalfd(stack: ExitStack) -> File:
    signum = signal.SIGUSR1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    mask = (ctypes.c_ulong * 16)(1 << (signum - 1))
    fd = checked(libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC))
    stack.callback(signal.sigtimedwait, {signum}, 0)  # before it is unblocked
    return File(fd, lambda: signal.pthread_kill(threading.get_ident(), signum), lambda: drain(fd))


def inotify(stack: ExitStack) -> File:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    fd = checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    in_create = 0x100
    checked(libc.inotify_add_watch(fd, bytes(directory), in_create))
    names = iter(range(1000))
    return File(fd, lambda: (directory / str(next(names))).touch(), lambda: drain(fd))


def timerfd(stack: ExitStack) -> File:
    clock_monotonic = 1
    fd = checked(libc.timerfd_create(clock_monotonic, os.O_NONBLOCK | os.O_CLOEXEC))

    def expire() -> None:
        checked(libc.timerfd_settime(fd, 0, struct.pack("qqqq", 0, 0, 0, 1), None))
        while not poll(fd, select.POLLIN):
            os.sched_yield()

    return File(fd, expire, lambda: drain(fd))


def eventfd(stack: ExitStack) -> File:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    return File(
        fd,
        make_readable=lambda: os.eventfd_write(fd, 1),
        make_unreadable=lambda: drain(fd),
        is_writable=True,
        make_unwritable=lambda: os.eventfd_write(fd, 2**64 - 2),
        make_writable=lambda: drain(fd),
    )


def pidfd(stack: ExitStack) -> File:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stack.callback(process.communicate)
    stack.callback(process.kill)
    fd = os.pidfd_open(process.pid)

    def end() -> None:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    return File(fd, end)


def epoll_fd(stack: ExitStack) -> File:
    epoll = select.epoll()
    inner = other_end(stack, os.eventfd(0, os.EFD_NONBLOCK)).fileno()
    epoll.register(inner, select.EPOLLIN)
    fd = os.dup(epoll.fileno())
    epoll.close()
    return File(fd, lambda: os.eventfd_write(inner, 1), lambda: drain(inner))


def message_queue(stack: ExitStack) -> File:
    name = f"/aiopoll-{os.getpid()}-{id(stack)}".encode()
    limits = struct.pack("8q", 0, 4, 16, 0, 0, 0, 0, 0)
    fd = checked(libc.mq_open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600, limits))
    checked(libc.mq_unlink(name))
    buffer = ctypes.create_string_buffer(16)

    def receive_all() -> None:
        while poll(fd, select.POLLIN):
            checked(libc.mq_receive(fd, buffer, ctypes.c_size_t(16), None))

    def send_all() -> None:
        while poll(fd, select.POLLOUT):
            checked(libc.mq_send(fd, b"x", ctypes.c_size_t(1), 0))

    return File(
        fd,
        make_readable=lambda: checked(libc.mq_send(fd, b"x", ctypes.c_size_t(1), 0)),
        make_unreadable=receive_all,
        is_writable=True,
        make_unwritable=send_all,
        make_writable=receive_all,
    )


def passed(kind: Callable[[ExitStack], File]) -> Callable[[ExitStack], File]:
    """The same file, through a descriptor that came over a unix socket."""

    def open_and_pass(stack: ExitStack) -> File:
        sender, receiver = socket.socketpair()
        with sender, receiver:
            file = kind(stack)
            socket.send_fds(sender, [b"x"], [file.fd])
            _, (fd,), _, _ = socket.recv_fds(receiver, 1, 1)
            stack.callback(os.close, file.fd)
            file.fd = fd
        return file

    return open_and_pass


def dev_random(stack: ExitStack) -> File:
    return File(os.open("/dev/random", os.O_RDWR), make_readable=lambda: None)


def mounts(stack: ExitStack) -> File:
    """A regular file to fstat(), but one that epoll takes."""
    return File(os.open("/proc/self/mounts", os.O_RDONLY), make_readable=lambda: None)


KINDS: Final[dict[str, Callable[[ExitStack], File]]] = {
    "TCP socket": tcp,
    "TCP listener": tcp_listener,
    "unix stream socket": unix_stream,
    "unix datagram socket": unix_datagram,
    "unix seqpacket socket": unix_seqpacket,
    "UDP socket": udp,
    "netlink socket": netlink,
    "pipe, read end": pipe_reader,
    "pipe, write end": pipe_writer,
    "FIFO opened O_RDWR": fifo_both_ways,
    "pty master": pty_master,
    "tty": tty_slave,
    "signalfd": signalfd,
    "inotify": inotify,
    "timerfd": timerfd,
    "eventfd": eventfd,
    "pidfd": pidfd,
    "epoll fd": epoll_fd,
    "message queue": message_queue,
    "socket passed by SCM_RIGHTS": passed(unix_stream),
    "tty passed by SCM_RIGHTS": passed(tty_slave),
    "eventfd passed by SCM_RIGHTS": passed(eventfd),
    "/dev/random": dev_random,
    "/proc/self/mounts": mounts,
}


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    manager: str = request.param
    return manager


@pytest.fixture(params=list(KINDS))
def file(request: pytest.FixtureRequest) -> Iterator[File]:
    with ExitStack() as stack:
        one = KINDS[request.param](stack)
        yield one
        one.close()


Wait: Final = {"readable": trio.lowlevel.wait_readable, "writable": trio.lowlevel.wait_writable}


class Waiter:
    """A task that waits once for a file."""

    def __init__(self, fd: int, direction: str) -> None:
        self.wait, self.fd = Wait[direction], fd
        self.outcome = "asleep"
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self.scope:
                await self.wait(self.fd)
                self.outcome = "woken"
        except trio.ClosedResourceError:
            self.outcome = "closed"
        if self.scope.cancelled_caught:
            self.outcome = "cancelled"


async def start(nursery: trio.Nursery, fd: int, direction: str) -> Waiter:
    waiter = Waiter(fd, direction)
    nursery.start_soon(waiter.run)
    await wait_all_tasks_blocked()
    return waiter


def run(main: Callable[[], Awaitable[None]], io_manager: str) -> None:
    async def patient_main() -> None:
        with trio.fail_after(PATIENCE):
            await main()

    trio.run(patient_main, io_manager=io_manager)


#########################
# The tests
#########################


def test_a_wait_for_reading_sleeps_until_the_file_is_readable(io_manager: str, file: File) -> None:
    if file.make_readable is None:
        pytest.skip("never readable")
    make_readable, always_ready = file.make_readable, poll(file.fd, select.POLLIN)

    async def main() -> None:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                waiter = await start(nursery, file.fd, "readable")
                if not always_ready:
                    assert waiter.outcome == "asleep"
                    make_readable()
            assert waiter.outcome == "woken"
            await Wait["readable"](file.fd)  # at once, because it is still readable
            if file.make_unreadable is None:
                break
            file.make_unreadable()
        trio.lowlevel.notify_closing(file.fd)

    run(main, io_manager)


def test_a_wait_for_writing_sleeps_until_the_file_is_writable(io_manager: str, file: File) -> None:
    async def main() -> None:
        for _ in range(3):
            if not file.is_writable:
                async with trio.open_nursery() as nursery:
                    waiter = await start(nursery, file.fd, "writable")
                    assert waiter.outcome == "asleep"
                    nursery.cancel_scope.cancel()
                continue
            await Wait["writable"](file.fd)
            if file.make_unwritable is not None:
                assert file.make_writable is not None
                file.make_unwritable()
                async with trio.open_nursery() as nursery:
                    waiter = await start(nursery, file.fd, "writable")
                    assert waiter.outcome == "asleep"
                    file.make_writable()
                assert waiter.outcome == "woken"
        trio.lowlevel.notify_closing(file.fd)

    run(main, io_manager)


def test_waits_in_both_directions_do_not_disturb_each_other(io_manager: str, file: File) -> None:
    if file.make_readable is None or poll(file.fd, select.POLLIN):
        pytest.skip("never readable, or always")
    make_readable = file.make_readable
    writable = poll(file.fd, select.POLLOUT)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            reader = await start(nursery, file.fd, "readable")
            writer = await start(nursery, file.fd, "writable")
            assert reader.outcome == "asleep"
            assert writer.outcome == ("woken" if writable else "asleep")
            make_readable()
            while reader.outcome == "asleep":
                await trio.lowlevel.checkpoint()
            assert reader.outcome == "woken"
            assert writer.outcome == ("woken" if writable else "asleep")
            nursery.cancel_scope.cancel()
        trio.lowlevel.notify_closing(file.fd)

    run(main, io_manager)


@pytest.mark.parametrize("direction", ["readable", "writable"])
def test_a_wait_can_be_cancelled_and_begun_again(io_manager: str, file: File, direction: str) -> None:
    if direction == "writable" and file.make_unwritable is not None:
        file.make_unwritable()
    if poll(file.fd, select.POLLIN if direction == "readable" else select.POLLOUT):
        pytest.skip("always ready")
    make_ready = file.make_readable if direction == "readable" else file.make_writable

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                waiter = await start(nursery, file.fd, direction)
                waiter.scope.cancel()
                await wait_all_tasks_blocked()
                assert waiter.outcome == "cancelled"
            waiter = await start(nursery, file.fd, direction)
            assert waiter.outcome == "asleep"
            if make_ready is None or (direction == "writable" and file.make_unwritable is None):
                nursery.cancel_scope.cancel()
            else:
                make_ready()
        trio.lowlevel.notify_closing(file.fd)

    run(main, io_manager)


@pytest.mark.parametrize("direction", ["readable", "writable"])
def test_only_one_task_may_wait_in_each_direction(io_manager: str, file: File, direction: str) -> None:
    if direction == "writable" and file.make_unwritable is not None:
        file.make_unwritable()
    if poll(file.fd, select.POLLIN if direction == "readable" else select.POLLOUT):
        pytest.skip("always ready")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            waiter = await start(nursery, file.fd, direction)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await Wait[direction](file.fd)
            assert waiter.outcome == "asleep"
            trio.lowlevel.notify_closing(file.fd)
        assert waiter.outcome == "closed"

    run(main, io_manager)


def test_notify_closing_wakes_all_waiters_and_leaves_the_file_free(io_manager: str, file: File) -> None:
    readable, writable = poll(file.fd, select.POLLIN), poll(file.fd, select.POLLOUT)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            reader = await start(nursery, file.fd, "readable")
            writer = await start(nursery, file.fd, "writable")
            trio.lowlevel.notify_closing(file.fd)
            file.close()
        assert reader.outcome == ("woken" if readable else "closed")
        assert writer.outcome == ("woken" if writable else "closed")

        # whatever comes next under this number is a file like any other
        reader_end, writer_end = os.pipe()
        with FileIO(os.dup2(reader_end, file.fd)) as successor:
            async with trio.open_nursery() as nursery:
                waiter = await start(nursery, successor.fileno(), "readable")
                assert waiter.outcome == "asleep"
                os.write(writer_end, b"x")
            assert waiter.outcome == "woken"
            trio.lowlevel.notify_closing(successor)
        for fd in {reader_end, writer_end} - {file.fd}:
            os.close(fd)

    run(main, io_manager)


@pytest.mark.parametrize("direction", ["readable", "writable"])
def test_a_hangup_wakes_waits_in_either_direction(io_manager: str, file: File, direction: str) -> None:
    if file.hang_up is None:
        pytest.skip("has no other end that could hang up")
    hang_up = file.hang_up
    if direction == "writable" and file.make_unwritable is not None:
        file.make_unwritable()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Wait[direction], file.fd)
            await wait_all_tasks_blocked()
            hang_up()
        trio.lowlevel.notify_closing(file.fd)

    run(main, io_manager)


#########################
# What epoll refuses
#########################


def regular_file(path: Path) -> int:
    return os.open(path / "file", os.O_RDWR | os.O_CREAT)


def directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def dev_urandom(_: Path) -> int:
    return os.open("/dev/urandom", os.O_RDWR)


def dev_null(_: Path) -> int:
    return os.open("/dev/null", os.O_RDWR)


def dev_zero(_: Path) -> int:
    return os.open("/dev/zero", os.O_RDWR)


def memfd(_: Path) -> int:
    return os.memfd_create("file")


@pytest.mark.parametrize("direction", ["readable", "writable"])
@pytest.mark.parametrize("kind", [regular_file, directory, dev_null, dev_urandom, dev_zero, memfd])
def test_a_file_that_epoll_refuses_raises_permission_error(
    io_manager: str, kind: Callable[[Path], int], direction: str, tmp_path: Path
) -> None:
    async def main() -> None:
        fd = kind(tmp_path)
        try:
            for _ in range(2):
                with pytest.raises(PermissionError):
                    await Wait[direction](fd)
            trio.lowlevel.notify_closing(fd)
            with pytest.raises(PermissionError):
                await Wait[direction](fd)
        finally:
            os.close(fd)

    run(main, io_manager)


@pytest.mark.parametrize("direction", ["readable", "writable"])
@pytest.mark.parametrize(
    ("fd", "error"),
    [(-1, ValueError), (1 << 20, OSError), (1 << 40, OverflowError), (None, RuntimeError), (object(), RuntimeError)],
    ids=repr,
)
def test_what_is_no_file_raises_what_epoll_raises(
    io_manager: str, fd: Any, error: type[Exception], direction: str
) -> None:
    async def main() -> None:
        with pytest.raises(error):
            await Wait[direction](fd)

    run(main, io_manager)
