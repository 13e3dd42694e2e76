"""Guarantee: a reused file descriptor number never inherits anything from the file that had it before.

Not even where the earlier file was closed behind Trio's back, without notify_closing: what is known about a number then
belongs to a file that is gone. Each new file has to sleep while it is not ready and to wake when it is.
"""

from __future__ import annotations

import ctypes
import os
import pty
import select
import signal
import socket
import struct
import tempfile
import threading
import tty
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # Opens a file that is not readable, and says how to make it readable.
    Kind: TypeAlias = Callable[[ExitStack], tuple[int, Callable[[], object]]]

PATIENCE: Final = 30  # seconds
libc: Final = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


#########################
# The files
#########################


def unix_socket(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    near, far = socket.socketpair()
    stack.enter_context(far)
    return near.detach(), lambda: far.send(b"x")


def tcp_socket(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = stack.enter_context(listener.accept()[0])
    return near.detach(), lambda: far.send(b"x")


def pipe(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    reader, writer = os.pipe()
    stack.callback(os.close, writer)
    return reader, lambda: os.write(writer, b"x")


def fifo_both_ways(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    stack.callback(os.close, writer)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK), lambda: os.write(writer, b"x")


def tty_slave(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    stack.callback(os.close, master)
    return slave, lambda: os.write(master, b"x")


def pty_master(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    stack.callback(os.close, slave)
    return master, lambda: os.write(slave, b"x")


def eventfd(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    twin = os.dup(fd)
    stack.callback(os.close, twin)
    return fd, lambda: os.eventfd_write(twin, 1)


def timerfd(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    clock_monotonic = 1
    fd = checked(libc.timerfd_create(clock_monotonic, os.O_NONBLOCK))
    twin = os.dup(fd)
    stack.callback(os.close, twin)
    return fd, lambda: checked(libc.timerfd_settime(twin, 0, struct.pack("qqqq", 0, 0, 0, 1), None))


def inotify(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    fd = checked(libc.inotify_init1(os.O_NONBLOCK))
    in_create = 0x100
    checked(libc.inotify_add_watch(fd, bytes(directory), in_create))
    return fd, lambda: (directory / "new").touch()


def signalfd(stack: ExitStack) -> tuple[int, Callable[[], object]]:
    signum = signal.SIGUSR1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    stack.callback(signal.sigtimedwait, {signum}, 0)  # called first: nothing may be pending when it is unblocked
    mask = (ctypes.c_ulong * 16)(1 << (signum - 1))
    fd = checked(libc.signalfd(-1, mask, os.O_NONBLOCK))
    return fd, lambda: signal.pthread_kill(threading.get_ident(), signum)


KINDS: Final[list[Kind]] = [
    unix_socket,
    tcp_socket,
    pipe,
    fifo_both_ways,
    tty_slave,
    pty_master,
    eventfd,
    timerfd,
    inotify,
    signalfd,
]


#########################
# The tests
#########################


class Waiter:
    def __init__(self) -> None:
        self.woken = False
        self.scope = trio.CancelScope()

    async def run(self, fd: int) -> None:
        with self.scope:
            await trio.lowlevel.wait_readable(fd)
            self.woken = True


async def leave_idle(_: int, __: Callable[[], object]) -> None:
    """The number was never waited for."""


async def leave_after_wake(fd: int, make_readable: Callable[[], object]) -> None:
    """A wait has come and gone."""
    make_readable()
    await trio.lowlevel.wait_readable(fd)


async def leave_after_cancel(fd: int, _: Callable[[], object]) -> None:
    """A wait has slept for some time and was cancelled."""
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter.run, fd)
        await wait_all_tasks_blocked()
        waiter.scope.cancel()


def replace(fd: int, open_next: Kind, stack: ExitStack, *, notify: bool) -> Callable[[], object]:
    """Close the file and put another in its place, under the same number."""
    new, make_readable = open_next(stack)
    if notify:
        trio.lowlevel.notify_closing(fd)
    os.close(fd)
    os.dup2(new, fd)
    os.close(new)
    return make_readable


async def expect_file_to_work(fd: int, make_readable: Callable[[], object], cushion: float = 0.0) -> None:
    for turn in ("cancelled", "woken"):
        waiter = Waiter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter.run, fd)
            await wait_all_tasks_blocked(cushion)
            assert not waiter.woken, "woken, but the file is not ready"
            with pytest.raises(trio.BusyResourceError):
                await trio.lowlevel.wait_readable(fd)
            if turn == "cancelled":
                waiter.scope.cancel()
            else:
                make_readable()
        assert waiter.woken == (turn == "woken")
    assert is_readable(fd)
    await trio.lowlevel.wait_readable(fd)


def run(main: Callable[[], Awaitable[None]], io_manager: str) -> None:
    async def patient_main() -> None:
        with trio.fail_after(PATIENCE):
            await main()

    trio.run(patient_main, io_manager=io_manager)


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    manager: str = request.param
    return manager


@pytest.mark.parametrize("notify", [True, False], ids=["notify_closing", "closed behind Trio's back"])
@pytest.mark.parametrize("leave", [leave_idle, leave_after_wake, leave_after_cancel])
@pytest.mark.parametrize("first", [unix_socket, tcp_socket, pipe, fifo_both_ways, eventfd, signalfd])
def test_whatever_comes_next_under_a_number_works(
    io_manager: str, first: Kind, leave: Callable[[int, Callable[[], object]], Awaitable[None]], notify: bool
) -> None:
    async def main() -> None:
        for open_next in KINDS:
            if open_next is first is signalfd:
                continue  # what made the first one readable makes the next one readable, too
            with ExitStack() as stack:
                fd, make_readable = first(stack)
                await leave(fd, make_readable)
                if first is signalfd:
                    signal.sigtimedwait({signal.SIGUSR1}, 0)
                make_readable = replace(fd, open_next, stack, notify=notify)
                await expect_file_to_work(fd, make_readable)
                trio.lowlevel.notify_closing(fd)
                os.close(fd)

    run(main, io_manager)


def test_a_number_that_goes_from_hand_to_hand_always_works(io_manager: str) -> None:
    """All kinds in turn under one number, and nobody ever tells Trio."""

    async def main() -> None:
        with ExitStack() as stack:
            fd, make_readable = unix_socket(stack)
            for open_next in [*KINDS, *KINDS[:-1][::-1]]:
                # that long, so that a second look which the manager may take at long waits comes in between
                await expect_file_to_work(fd, make_readable, cushion=0.1)
                make_readable = replace(fd, open_next, stack, notify=False)
            await expect_file_to_work(fd, make_readable)
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

    run(main, io_manager)


@pytest.mark.parametrize("notify", [True, False], ids=["notify_closing", "closed behind Trio's back"])
@pytest.mark.parametrize("leave", [leave_idle, leave_after_wake, leave_after_cancel])
@pytest.mark.parametrize("first", [unix_socket, pipe, eventfd])
@pytest.mark.parametrize("path", ["file", ".", "/dev/null"])
def test_what_epoll_refuses_raises_permission_error_under_a_number_that_was_fine(
    io_manager: str,
    first: Kind,
    leave: Callable[[int, Callable[[], object]], Awaitable[None]],
    notify: bool,
    path: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()

    def open_next(_: ExitStack) -> tuple[int, Callable[[], object]]:
        return os.open(tmp_path / path, os.O_RDONLY), lambda: None

    async def main() -> None:
        with ExitStack() as stack:
            fd, make_readable = first(stack)
            await leave(fd, make_readable)
            replace(fd, open_next, stack, notify=notify)
            for _ in range(2):
                with pytest.raises(PermissionError):
                    await trio.lowlevel.wait_readable(fd)
                with pytest.raises(PermissionError):
                    await trio.lowlevel.wait_writable(fd)
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

    run(main, io_manager)


@pytest.mark.parametrize("open_next", [None, *KINDS])
@pytest.mark.parametrize("first", [unix_socket, pipe, eventfd])
def test_a_wait_whose_file_is_closed_behind_trios_back_can_still_be_cancelled(
    io_manager: str, first: Kind, open_next: Kind | None, request: pytest.FixtureRequest
) -> None:
    """It may sleep for ever, as on stock Trio, but nothing that happens to the number's next file may wake it."""
    if io_manager == "aiopoll" and first is not eventfd and open_next is signalfd:
        reason = "taken for a wait for the signalfd itself, which must not be missed; see verify() in _polls.c"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    async def main() -> None:
        with ExitStack() as stack:
            fd, _ = first(stack)
            waiter = Waiter()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(waiter.run, fd)
                await wait_all_tasks_blocked()
                if open_next is None:
                    os.close(fd)
                else:
                    make_readable = replace(fd, open_next, stack, notify=False)
                    # longer than any second look that the manager may take
                    await wait_all_tasks_blocked(0.1)
                    make_readable()
                await wait_all_tasks_blocked()
                assert not waiter.woken
                waiter.scope.cancel()
            assert not waiter.woken
            if open_next is not None:
                await trio.lowlevel.wait_readable(fd)  # the next file, which is still ready
                trio.lowlevel.notify_closing(fd)
                os.close(fd)

    run(main, io_manager)
