"""What cannot be waited for raises the same exception as on stock Trio, in the task that waits for it, and the rest of
the run goes on. Stock Trio is asked each time what that exception is.
"""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_aiopoll  # noqa: F401  (teaches trio.run the argument io_manager)

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 30  # seconds: what takes longer hangs
MISREPORTED = "must be called from async context"


@pytest.fixture(params=["wait_readable", "wait_writable"])
def wait_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def wait_on(wait_name: str, thing: Any) -> Any:
    return getattr(trio.lowlevel, wait_name)(thing)


class Fileno:
    def __init__(self, result: object) -> None:
        self.result = result

    def fileno(self) -> object:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class FilenoOfSomethingElse:
    def fileno(self) -> int:
        return self.no_such_attribute  # type: ignore[attr-defined,no-any-return]


class NoMethod:
    fileno = 3


# Each makes one thing that cannot be waited for; what it opens is closed with the stack.


def closed_descriptor(_: ExitStack) -> int:
    descriptor = os.open("/", os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def closed_python_socket(_: ExitStack) -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def closed_trio_socket(_: ExitStack) -> trio.socket.SocketType:
    sock = trio.socket.socket()
    sock.close()
    return sock


def closed_file(_: ExitStack) -> Any:
    with tempfile.TemporaryFile() as file:
        return file


def regular_file(stack: ExitStack) -> Any:
    return stack.enter_context(tempfile.TemporaryFile())


def regular_file_descriptor(stack: ExitStack) -> int:
    return stack.enter_context(tempfile.TemporaryFile()).fileno()


def directory(stack: ExitStack) -> int:
    descriptor = os.open("/", os.O_RDONLY)
    stack.callback(os.close, descriptor)
    return descriptor


def dev_null(stack: ExitStack) -> Any:
    return stack.enter_context(open(os.devnull, "r+b", buffering=0))


def path_only_descriptor(stack: ExitStack) -> int:
    descriptor = os.open("/", os.O_PATH)
    stack.callback(os.close, descriptor)
    return descriptor


def always(thing: object) -> Callable[[ExitStack], object]:
    return lambda _: thing


BAD: dict[str, Callable[[ExitStack], Any]] = {
    "closed descriptor": closed_descriptor,
    "closed socket": closed_python_socket,
    "closed Trio socket": closed_trio_socket,
    "closed file": closed_file,
    "regular file": regular_file,
    "descriptor of a regular file": regular_file_descriptor,
    "directory": directory,
    "/dev/null": dev_null,
    "O_PATH descriptor": path_only_descriptor,
    "-1": always(-1),
    "INT_MIN": always(-(2**31)),
    "far below INT_MIN": always(-(2**70)),
    "above any limit": always(2**31 - 1),
    "INT_MAX + 1": always(2**31),
    "2 ** 32": always(2**32),
    "2 ** 63": always(2**63),
    "2 ** 70": always(2**70),
    "None": always(None),
    "str": always("3"),
    "bytes": always(b"3"),
    "float": always(3.0),
    "list": always([3]),
    "object": always(object()),
    "fileno is not a method": always(NoMethod()),
    "fileno returns str": always(Fileno("3")),
    "fileno returns float": always(Fileno(3.0)),
    "fileno returns None": always(Fileno(None)),
    "fileno returns -1": always(Fileno(-1)),
    "fileno returns 2 ** 70": always(Fileno(2**70)),
    "fileno raises AttributeError": always(Fileno(AttributeError("no such thing"))),
    "fileno looks for what is not there": always(FilenoOfSomethingElse()),
    "fileno raises OSError": always(Fileno(OSError(5, "broken"))),
    "fileno raises KeyError": always(Fileno(KeyError("broken"))),
}


@pytest.fixture(params=list(BAD))
def make_bad(request: pytest.FixtureRequest) -> Callable[[ExitStack], Any]:
    return BAD[request.param]


class Outcome:
    """What became of a wait on something bad, in a run with another task that waits for a message meanwhile."""

    def __init__(self, io_manager: str, wait_name: str, make_bad: Callable[[ExitStack], Any], times: int = 1) -> None:
        self.errors: list[BaseException] = []
        self.message = b""
        trio.run(self.main, wait_name, make_bad, times, io_manager=io_manager)

    async def main(self, wait_name: str, make_bad: Callable[[ExitStack], Any], times: int) -> None:
        left, right = trio.socket.socketpair()
        with ExitStack() as stack, left, right, trio.fail_after(TIMEOUT):
            thing = make_bad(stack)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.receive, left)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(times):
                    nursery.start_soon(self.wait, wait_name, thing)
                    await trio.testing.wait_all_tasks_blocked()
                    assert self.message == b""
                assert len(self.errors) == times, "the wait goes on"
                await right.send(b"the run goes on")

    async def receive(self, sock: trio.socket.SocketType) -> None:
        self.message = await sock.recv(100)

    async def wait(self, wait_name: str, thing: object) -> None:
        task = trio.lowlevel.current_task()
        try:
            await wait_on(wait_name, thing)
        except Exception as error:
            assert trio.lowlevel.current_task() is task
            self.errors.append(error)
        else:
            raise AssertionError("there was nothing to wait for")

    def error(self) -> BaseException:
        assert self.message == b"the run goes on"
        [error] = self.errors
        return error


def test_bad_input_raises_what_stock_trio_raises_in_the_task_that_waits(
    wait_name: str, make_bad: Callable[[ExitStack], Any]
) -> None:
    stock = Outcome("epoll", wait_name, make_bad).error()
    ours = Outcome("aiopoll", wait_name, make_bad).error()
    assert type(ours) is type(stock)
    if isinstance(stock, OSError):
        assert isinstance(ours, OSError)
        assert ours.errno == stock.errno
    assert MISREPORTED not in str(ours)


def test_bad_input_is_as_bad_the_second_time(wait_name: str, make_bad: Callable[[ExitStack], Any]) -> None:
    """Stock Trio takes the second wait on a negative descriptor for a second waiter: what failed still counts there."""
    outcome = Outcome("aiopoll", wait_name, make_bad, times=3)
    assert outcome.message == b"the run goes on"
    first = Outcome("epoll", wait_name, make_bad).error()
    assert [type(error) for error in outcome.errors] == 3 * [type(first)]


def test_bad_input_leaves_nothing_waiting(wait_name: str, make_bad: Callable[[ExitStack], Any]) -> None:
    async def main() -> None:
        before = trio.lowlevel.current_statistics().io_statistics
        with ExitStack() as stack, pytest.raises(Exception):  # noqa: B017, PT011
            await wait_on(wait_name, make_bad(stack))
        after = trio.lowlevel.current_statistics().io_statistics
        for name in ("tasks_waiting_read", "tasks_waiting_write", "epoll_lane_waits"):
            assert getattr(after, name) == getattr(before, name)

    trio.run(main, io_manager="aiopoll")


@pytest.mark.parametrize("thing", [-1, 2**31 - 1, "3", None, Fileno("3"), Fileno(AttributeError("gone"))], ids=repr)
def test_notify_closing_of_bad_input_fails_if_and_only_if_it_does_on_stock_trio(thing: Any) -> None:
    def failure(io_manager: str) -> BaseException | None:
        async def main() -> BaseException | None:
            try:
                trio.lowlevel.notify_closing(thing)
            except Exception as error:
                return error
            return None

        result: BaseException | None = trio.run(main, io_manager=io_manager)
        return result

    ours = failure("aiopoll")
    assert type(ours) is type(failure("epoll"))
    assert MISREPORTED not in str(ours)


# A descriptor that was good the last time


def close_behind_our_back(descriptor: int) -> None:
    os.close(descriptor)


def reopen_as_regular_file(descriptor: int) -> None:
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)


def reopen_as_dev_null(descriptor: int) -> None:
    with open(os.devnull, "r+b", buffering=0) as file:
        os.dup2(file.fileno(), descriptor)


@pytest.mark.parametrize("change", [close_behind_our_back, reopen_as_regular_file, reopen_as_dev_null])
def test_socket_that_changes_behind_our_back_raises_what_stock_trio_raises(
    wait_name: str, change: Callable[[int], None]
) -> None:
    def failure(io_manager: str) -> BaseException:
        async def main() -> BaseException:
            left, right = socket.socketpair()
            descriptor = left.detach()
            with right, trio.fail_after(TIMEOUT):
                right.send(b"x")
                await wait_on(wait_name, descriptor)
                change(descriptor)
                try:
                    with pytest.raises(OSError) as raised:  # noqa: PT011
                        await wait_on(wait_name, descriptor)
                finally:
                    if change is not close_behind_our_back:
                        os.close(descriptor)
                return raised.value

        result: BaseException = trio.run(main, io_manager=io_manager)
        return result

    stock, ours = failure("epoll"), failure("aiopoll")
    assert isinstance(stock, OSError)
    assert isinstance(ours, OSError)
    assert (type(ours), ours.errno) == (type(stock), stock.errno)


# Two tasks, one file, one direction


def blocked_socket(stack: ExitStack) -> int:
    left, right = socket.socketpair()
    stack.enter_context(left)
    stack.enter_context(right)
    left.setblocking(False)
    try:
        while True:
            left.send(bytes(65536))
    except BlockingIOError:
        return left.fileno()


def blocked_eventfd(stack: ExitStack) -> int:
    descriptor: int = os.eventfd(0, os.EFD_NONBLOCK)
    stack.callback(os.close, descriptor)
    return descriptor


def full_eventfd(stack: ExitStack) -> int:
    descriptor: int = os.eventfd(0, os.EFD_NONBLOCK)
    stack.callback(os.close, descriptor)
    os.eventfd_write(descriptor, 2**64 - 2)
    return descriptor


def blocked_tty(stack: ExitStack) -> int:
    master, slave = os.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    return slave


BLOCKED = {
    "socket to read": ("wait_readable", blocked_socket, 0),
    "socket to write": ("wait_writable", blocked_socket, 0),
    "eventfd to read": ("wait_readable", blocked_eventfd, 1),
    "eventfd to write": ("wait_writable", full_eventfd, 1),
    "tty to read": ("wait_readable", blocked_tty, 1),
}


@pytest.mark.parametrize("io_manager", ["epoll", "aiopoll"])
@pytest.mark.parametrize("case", list(BLOCKED))
@pytest.mark.parametrize("settled", [True, False], ids=["waiting", "about to wait"])
def test_second_waiter_is_refused_and_the_first_goes_on(io_manager: str, case: str, settled: bool) -> None:
    wait_name, make, on_epoll_lane = BLOCKED[case]
    other_name = {"wait_readable": "wait_writable", "wait_writable": "wait_readable"}[wait_name]
    state = {"first": "waiting", "message": b""}

    async def first(descriptor: int, scope: trio.CancelScope, about_to_wait: trio.Event) -> None:
        about_to_wait.set()
        with scope:
            await wait_on(wait_name, descriptor)
        state["first"] = "cancelled" if scope.cancelled_caught else "woken"

    async def receive(sock: trio.socket.SocketType) -> None:
        state["message"] = await sock.recv(100)

    async def main() -> None:
        left, right = trio.socket.socketpair()
        with ExitStack() as stack, left, right, trio.fail_after(TIMEOUT):
            descriptor = make(stack)
            scope, about_to_wait = trio.CancelScope(), trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, left)
                nursery.start_soon(first, descriptor, scope, about_to_wait)
                await about_to_wait.wait()
                if settled:
                    await trio.testing.wait_all_tasks_blocked()
                    statistics = trio.lowlevel.current_statistics().io_statistics
                    assert getattr(statistics, "epoll_lane_waits", on_epoll_lane) == on_epoll_lane
                for _ in range(2):
                    with pytest.raises(trio.BusyResourceError, match="already reading / writing this fd"):
                        await wait_on(wait_name, descriptor)
                await trio.testing.wait_all_tasks_blocked()
                assert state == {"first": "waiting", "message": b""}
                with trio.move_on_after(0):  # the other direction is free
                    await wait_on(other_name, descriptor)
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert state["first"] == "cancelled"
                with trio.move_on_after(0) as free_again:
                    await wait_on(wait_name, descriptor)
                assert free_again.cancelled_caught
                await right.send(b"the run goes on")

    trio.run(main, io_manager=io_manager)
    assert state == {"first": "cancelled", "message": b"the run goes on"}


@pytest.mark.parametrize("direction", ["wait_readable", "wait_writable"])
def test_wait_outside_of_a_run_is_refused_as_on_stock_trio(direction: str) -> None:
    wait = getattr(trio.lowlevel, direction)

    def refusal() -> str:
        with pytest.raises(RuntimeError) as raised:
            wait(0).send(None)
        return str(raised.value)

    stock = refusal()
    assert MISREPORTED in stock
    trio.run(trio.sleep, 0, io_manager="aiopoll")
    assert refusal() == stock
    with pytest.raises(RuntimeError, match=MISREPORTED):
        trio.lowlevel.notify_closing(0)
