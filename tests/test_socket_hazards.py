"""What could go wrong because an operation is performed later in its tick than it was called: each case was once a bug,
or a doubt, and is held against stock Trio where it has something to say."""

from __future__ import annotations

import errno
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

import trio_aiopoll
from trio_aiopoll import _io_manager, _trio_compat
from trio_aiopoll._ring import READABLE, key_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

MANAGERS = ("epoll", "aiopoll")
PATIENCE = 20
RUNS = 20  # Trio runs the tasks of a tick in one order or the other


def run(main: Callable[[], Awaitable[Any]], manager: str = "aiopoll") -> Any:
    async def patient_main() -> Any:
        with trio.fail_after(PATIENCE):
            return await main()

    return trio.run(patient_main, io_manager=manager)  # type: ignore[call-arg]


async def together(*functions: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What came of each, all begun in the same tick."""
    results: list[Any] = [None] * len(functions)

    async def note(i: int) -> None:
        await trio.lowlevel.checkpoint()
        try:
            results[i] = await functions[i]()
        except OSError as error:
            results[i] = type(error)

    async with trio.open_nursery() as nursery:
        for i in range(len(functions)):
            nursery.start_soon(note, i)
    return results


def crowd(count: int = 8) -> list[Callable[[], Awaitable[Any]]]:
    """So many that sends are left to the tick."""
    return [trio.lowlevel.checkpoint] * count


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_number_that_passes_on_in_the_same_tick_takes_no_operation_with_it(manager: str) -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        c, d = trio.socket.socketpair()
        with b, d:

            async def end_blocks() -> None:
                with a, c:
                    pass
                strangers = [*socket.socketpair(), *socket.socketpair()]
                for stranger in strangers:
                    stranger.setblocking(False)
                    stranger.send(b"of others")
                await trio.testing.wait_all_tasks_blocked()
                for stranger in strangers:
                    with stranger:
                        assert stranger.recv(100) == b"of others"
                scope.cancel()  # on stock Trio, too, who waits for such a socket waits for ever

            with trio.CancelScope() as scope:
                await together(lambda: a.recv(65536), lambda: c.send(b"not for them"), end_blocks, *crowd())

    for _ in range(RUNS):
        run(main, manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_datagram_goes_to_whom_its_socket_was_connected_when_it_was_sent(manager: str) -> None:
    async def main() -> None:
        def bound() -> socket.socket:
            sock = socket.socket(type=socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            return sock

        with bound() as first, bound() as second, trio.socket.socket(type=socket.SOCK_DGRAM) as sender:
            await sender.connect(first.getsockname())
            called = []

            async def send() -> None:
                called.append("send")
                await sender.send(b"datagram")

            async def connect() -> None:
                called.append("connect")
                await sender.connect(second.getsockname())

            await together(send, connect, *crowd())
            receiver, other = (first, second) if called[0] == "send" else (second, first)
            assert receiver.recv(100) == b"datagram"
            with pytest.raises(BlockingIOError):
                other.recv(100)

    for _ in range(RUNS):
        run(main, manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_what_a_duplicate_sends_does_not_overtake(manager: str) -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:

            async def send_by_duplicate() -> None:
                with a.dup() as duplicate:
                    await duplicate.send(b"2" * 5000)

            order: list[str] = []

            async def first() -> None:
                order.append("1")
                await a.send(b"1")

            async def second() -> None:
                order.append("2")
                await send_by_duplicate()

            await together(first, second, *crowd())
            received = (await b.recv(65536)).decode()
            assert received == "".join({"1": "1", "2": "2" * 5000}[name] for name in order)

    for _ in range(RUNS):
        run(main, manager)


@pytest.mark.parametrize("cancel_first", [False, True])
def test_a_receive_that_the_kernel_refused_to_poll_still_excludes_a_second_one(cancel_first: bool) -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        manager: Any = _trio_compat.GLOBAL_RUN_CONTEXT.runner.io_manager
        polls, key = manager._polls, key_of(a.fileno(), READABLE)

        class Refusing:
            """What the C core answers while the budget is spent and the rings are full."""

            def __getattr__(self, name: str) -> Any:
                return getattr(polls, name)

            def tick(self, keys: list[int], timeout: float) -> list[int]:
                others = [other for other in keys if other != key]
                refused = [-((key << 12 | errno.EAGAIN) + 1)] if len(others) < len(keys) else []
                return refused + polls.tick(others, 0 if refused else timeout)

        manager._polls = Refusing()
        try:
            with a, b:
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()
                    received = []

                    async def first() -> None:
                        with scope:
                            received.append(await a.recv(65536))

                    nursery.start_soon(first)
                    await trio.testing.wait_all_tasks_blocked()
                    with pytest.raises(trio.BusyResourceError):
                        await a.recv(65536)
                    if cancel_first:
                        scope.cancel()
                        await trio.testing.wait_all_tasks_blocked()
                        scope = trio.CancelScope()
                        nursery.start_soon(first)
                        await trio.testing.wait_all_tasks_blocked()
                    await b.send(b"data")
                assert received == [b"data"]
        finally:
            manager._polls = polls

    run(main)


def test_control_c_does_not_come_between_a_task_and_the_schedule() -> None:
    """A signal that comes right after a task has made itself runnable, in its own code, is not that task's business."""

    class RunQueue(deque[Any]):
        armed = False

        def append(self, task: object) -> None:
            super().append(task)
            if RunQueue.armed and sys._getframe(1).f_code.co_name == "at_once":
                RunQueue.armed = False
                signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            runner: Any = _trio_compat.GLOBAL_RUN_CONTEXT.runner
            runner.runq = RunQueue(runner.runq)
            RunQueue.armed = True
            await a.send(b"x")
            assert not RunQueue.armed
            with pytest.raises(KeyboardInterrupt):
                await trio.lowlevel.checkpoint()
            assert await b.recv(1) == b"x"

    try:
        run(main)
    finally:
        RunQueue.armed = False


def test_control_c_while_the_tick_receives_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    armed = [False]

    def interrupted(*arguments: Any) -> None:
        if armed[0]:
            armed[0] = False
            signal.raise_signal(signal.SIGINT)
        _trio_compat.make_runnable(*arguments)

    monkeypatch.setattr(_io_manager, "make_runnable", interrupted)

    async def main() -> bool:
        a, b = trio.socket.socketpair()
        with a, b:
            await b.send(b"data")
            received = []

            async def receive() -> None:
                received.append(await a.recv(65536))

            async def shut_down() -> None:
                armed[0] = bool(_trio_compat.GLOBAL_RUN_CONTEXT.runner.io_manager._batch)  # type: ignore[attr-defined]
                interrupted.append(armed[0])
                a.shutdown(socket.SHUT_WR)

            interrupted: list[bool] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(shut_down)
                with trio.CancelScope(shield=True):
                    while not (received and interrupted):
                        try:
                            await trio.lowlevel.checkpoint()
                        except KeyboardInterrupt:
                            continue
            assert received == [b"data"]
            return interrupted[0]

    assert any(run(main) for _ in range(RUNS))


def test_a_slow_tick_has_later_sends_done_at_once() -> None:
    async def main() -> None:
        pairs = [trio.socket.socketpair() for _ in range(8)]
        manager: Any = _trio_compat.GLOBAL_RUN_CONTEXT.runner.io_manager

        async def send_to_all(slow: bool = False) -> int:
            async def send(sock: trio.socket.SocketType) -> None:
                await trio.lowlevel.checkpoint()
                done = time.monotonic() + 0.05
                while slow and sock is pairs[0][0] and time.monotonic() < done:
                    pass
                await sock.send(b"x")

            before = manager.statistics().transfers
            async with trio.open_nursery() as nursery:
                for sock, _ in pairs:
                    nursery.start_soon(send, sock)
            return int(manager.statistics().transfers - before)

        while True:  # for the machine may itself be slow, or stand still until it is all over
            while not await send_to_all():
                pass
            await send_to_all(slow=True)
            if not await send_to_all():
                break
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main)


def test_what_had_to_wait_is_done_before_its_task_runs() -> None:
    async def main() -> None:
        pairs = [trio.socket.socketpair() for _ in range(8)]
        received: list[bytes] = []

        async def receive(sock: trio.socket.SocketType) -> None:
            received.append(await sock.recv(65536))

        async with trio.open_nursery() as nursery:
            for _, far in pairs:
                nursery.start_soon(receive, far)
            await trio.testing.wait_all_tasks_blocked()
            statistics: Any = trio.lowlevel.current_statistics().io_statistics
            assert statistics.tasks_waiting_read == 8 + 1
            before = statistics.transfers
            for near, _ in pairs:
                near._sock.send(b"data")  # type: ignore[attr-defined]
        assert received == [b"data"] * 8
        assert trio.lowlevel.current_statistics().io_statistics.transfers - before == 8  # type: ignore[attr-defined]
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_who_is_woken_by_somebody_else_loses_no_data(is_first: bool) -> None:
    """Stock Trio has an internal error then."""

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            received: list[bytes] = []
            tasks: list[trio.lowlevel.Task] = []

            async def receive() -> None:
                tasks.append(trio.lowlevel.current_task())
                received.append(await a.recv(65536))

            for with_data in (True, False):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(receive)
                    await trio.testing.wait_all_tasks_blocked()
                    for step in (is_first, not is_first):
                        if step:
                            trio.lowlevel.reschedule(tasks[-1])
                        elif with_data:
                            b._sock.send(b"data")  # type: ignore[attr-defined]
                    if not with_data:
                        await trio.testing.wait_all_tasks_blocked()
                        b._sock.send(b"data")  # type: ignore[attr-defined]
            assert received == [b"data"] * 2
            b._sock.send(b"more")  # type: ignore[attr-defined]
            assert await a.recv(65536) == b"more"

    run(main)


def test_whose_wait_is_taken_over_takes_nothing_along_if_it_is_cancelled_just_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reschedule = trio.lowlevel.reschedule

    async def main() -> bool:
        """Whether a wait was taken over, by a receive that began before it in the same tick."""
        a, b = trio.socket.socketpair()
        with a, b:
            await b.send(b"x")
            await a.recv(65536)
            came: list[object] = []
            scope = trio.CancelScope()

            async def receive() -> None:
                try:
                    came.append(await a.recv(65536))
                except trio.BusyResourceError:
                    came.append("not received")

            async def wait() -> None:
                with scope:
                    try:
                        await trio.lowlevel.wait_readable(a)
                    except trio.BusyResourceError:
                        came.append("ousted")

            def cancel_and_reschedule(*arguments: Any) -> None:
                scope.cancel()
                reschedule(*arguments)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(wait)
                with monkeypatch.context() as patch:
                    patch.setattr(trio.lowlevel, "reschedule", cancel_and_reschedule)
                    await trio.testing.wait_all_tasks_blocked()
                assert came in (["ousted"], ["not received"])
                scope.cancel()
                await b.send(b"data")
            if came == ["not received"]:
                return False
            assert came == ["ousted", b"data"]
            return True

    taken_over = [run(main) for _ in range(RUNS)]
    assert any(taken_over)


@pytest.mark.parametrize("manager", MANAGERS)
def test_who_is_cancelled_with_data_at_hand_leaves_it_to_the_next(manager: str) -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            for _ in range(100):
                received: list[bytes] = []

                async def receive(scope: trio.CancelScope, received: list[bytes] = received) -> None:
                    with scope:
                        received.append(await a.recv(65536))

                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()
                    nursery.start_soon(receive, scope)
                    await trio.testing.wait_all_tasks_blocked()
                    b._sock.send(b"data")  # type: ignore[attr-defined]
                    scope.cancel()
                assert not received
                assert a._sock.recv(65536) == b"data"  # type: ignore[attr-defined]

    run(main, manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_the_instruments_of_a_run_come_and_go(manager: str) -> None:
    class Counting(trio.abc.Instrument):
        steps = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.steps += 1

    class Broken(trio.abc.Instrument):
        @property
        def before_task_step(self) -> Any:  # type: ignore[override]
            raise ZeroDivisionError

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            await a.send(b"x")
            await b.recv(65536)
            counting = Counting()
            with pytest.raises(KeyError):
                trio.lowlevel.remove_instrument(counting)
            with pytest.raises(ZeroDivisionError):
                trio.lowlevel.add_instrument(Broken())
            for _ in range(2):
                counting.steps = 0
                trio.lowlevel.add_instrument(counting)
                trio.lowlevel.add_instrument(counting)
                await trio.lowlevel.checkpoint()
                assert counting.steps == 1
                await a.send(b"x")
                await b.recv(65536)
                trio.lowlevel.remove_instrument(counting)
                steps = counting.steps
                assert steps >= 3
                await trio.lowlevel.checkpoint()
                assert counting.steps == steps
            instruments: Any = _trio_compat.GLOBAL_RUN_CONTEXT.runner.instruments  # type: ignore[attr-defined]
            assert instruments["_all"] == {}

    run(main, manager)


def test_without_the_names_that_sockets_need_they_stay_as_they_are(tmp_path: Path) -> None:
    program = """
import trio._socket
del trio._socket._SocketType.is_readable
import trio, trio_aiopoll
assert trio_aiopoll._trio_compat.missing_names_for_sockets == ("trio._socket._SocketType.is_readable",)

async def main():
    a, b = trio.socket.socketpair()
    assert type(a) is trio._socket._SocketType
    await a.send(b"x")
    assert await b.recv(65536) == b"x"
    statistics = trio.lowlevel.current_statistics().io_statistics
    assert statistics.backend == "aiopoll" and statistics.transfers == 0

trio.run(main, io_manager="aiopoll")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path)


@pytest.mark.parametrize("when", ["before trio_aiopoll is imported", "before the run", "in the run"])
@pytest.mark.parametrize(
    "method",
    [
        *("socket.recv", "socket.send", "socket._nonblocking_helper"),
        *("SocketStream.receive_some", "SocketStream.send_all", "SocketStream.__anext__"),
    ],
)
@pytest.mark.parametrize("kind", ["function", "copied", "partial", "proxy", "unwilling"])
def test_what_somebody_has_put_into_a_class_of_trio_is_called(
    tmp_path: Path, when: str, method: str, kind: str
) -> None:
    program = f"""
import functools
import types
import trio
import trio._socket

holder, _, name = {method!r}.partition(".")
holder = trio._socket._SocketType if holder == "socket" else trio.SocketStream
calls = []

def put():
    original = getattr(holder, name)
    counted = calls
    called = name

    @functools.wraps(original)
    async def counting(*args, **kwargs):
        counted.append(called)
        return await original(*args, **kwargs)

    class Proxy:
        # it passes on what it is asked, as tracers' wrappers do, even whether it is equal
        def __getattr__(self, name):
            return getattr(original, name)

        def __eq__(self, other):
            return original == other

        __hash__ = None

        def __get__(self, instance, owner=None):
            return counting.__get__(instance, owner) if instance is not None else self

    class Unwilling(Proxy):
        def __getattr__(self, name):
            raise RuntimeError(name)

    # as decorators make them that generate code
    copied = types.FunctionType(counting.__code__, original.__globals__, closure=counting.__closure__)
    kinds = dict(
        function=counting,
        copied=copied,
        partial=functools.partialmethod(counting),
        proxy=Proxy(),
        unwilling=Unwilling(),
    )
    setattr(holder, name, kinds[{kind!r}])

if {when!r}.startswith("before trio_aiopoll"):
    put()
import trio_aiopoll
from trio_aiopoll._commands import check
is_named = "import trio_aiopoll before" in (check._trio().advice or "")
assert is_named == {when!r}.startswith("before trio_aiopoll")
if {when!r} == "before the run":
    put()

async def main():
    if {when!r} == "in the run":
        put()
    a, b = trio.socket.socketpair()
    near, far = trio.SocketStream(a), trio.SocketStream(b)
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"x")
            assert await far.receive_some() == b"x"
            nursery.start_soon(near.send_all, b"x")
            assert await far.__anext__() == b"x"
    assert len(calls) >= 10, calls

trio.run(main, io_manager="aiopoll")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path)


@pytest.mark.parametrize("made", ["socket", "stream"])
@pytest.mark.parametrize("manager", MANAGERS)
def test_a_constructor_that_is_wrapped_between_runs_may_keep_the_dict(
    monkeypatch: pytest.MonkeyPatch, manager: str, made: str
) -> None:
    labels: list[object] = []

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            labels.append(getattr(a if made == "socket" else trio.SocketStream(a), "label", None))

    run(main, manager)
    stock: Any = _trio_compat.StockSocket if made == "socket" else trio.SocketStream
    original = stock.__init__

    def init(self: Any, socket: Any) -> None:
        kept = vars(self)
        original(self, socket)
        kept["label"] = "mine"

    monkeypatch.setattr(stock, "__init__", init)
    run(main, manager)
    assert labels == [None, "mine"]


def test_who_is_ousted_cannot_be_cancelled_by_a_finalizer_meanwhile(tmp_path: Path) -> None:
    program = """
import gc, sys
import trio, trio.testing, trio_aiopoll

async def main():
    a, b = trio.socket.socketpair()
    await b.send(b"x")
    await a.recv(65536)
    scope = trio.CancelScope()
    armed = False

    async def receive():
        try:
            assert await a.recv(65536) == b"data"
        except trio.BusyResourceError:
            pass  # the other one was first

    async def wait():
        with scope:
            try:
                await trio.lowlevel.wait_readable(a._sock)
            except trio.BusyResourceError:
                pass

    class Garbage:
        # makes more of it, until it is collected while the tick performs
        def __init__(self):
            self.me = self

        def __del__(self):
            nonlocal armed
            if armed and sys._getframe(1).f_code.co_name in ("perform_transfers", "_oust"):
                armed = False
                scope.cancel()
            if armed:
                Garbage()

    async def arm():
        nonlocal armed
        gc.collect()
        armed = True
        gc.set_threshold(1)
        Garbage()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(wait)
        nursery.start_soon(arm)
        await trio.testing.wait_all_tasks_blocked()
        armed = False
        gc.set_threshold(700)
        await b.send(b"data")

for _ in range(40):
    trio.run(main, io_manager="aiopoll")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path)


@pytest.mark.parametrize("manager", MANAGERS)
def test_who_is_given_another_coroutine_while_it_sleeps_goes_on_by_that(manager: str) -> None:
    """As `greenback.bestow_portal` does."""
    sent = []

    class Coroutine:
        def __init__(self, coroutine: Any) -> None:
            self.coroutine = coroutine

        def send(self, value: object) -> object:
            sent.append(value)
            return self.coroutine.send(value)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.coroutine, name)

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            task: Any = None

            async def receive() -> None:
                nonlocal task
                task = trio.lowlevel.current_task()
                for _ in range(3):
                    assert await a.recv(65536) == b"x"

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                await b.send(b"x")
                await trio.testing.wait_all_tasks_blocked()
                task.coro = Coroutine(task.coro)
                await b.send(b"x")
                await trio.testing.wait_all_tasks_blocked()
                assert len(sent) >= 1
                await b.send(b"x")

    run(main, manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_coroutine_that_is_detached_and_dropped_ends_at_once(manager: str) -> None:
    ended = []

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:

            async def leave() -> None:
                try:
                    for _ in range(2):
                        assert await a.recv(65536) == b"x"
                    await trio.lowlevel.permanently_detach_coroutine_object(outcome.Value(None))
                finally:
                    ended.append("ended")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                for _ in range(2):
                    await trio.testing.wait_all_tasks_blocked()
                    await b.send(b"x")
            await trio.lowlevel.checkpoint()
            assert ended == ["ended"]

    run(main, manager)


def test_without_fast_sockets_nothing_is_left_to_the_tick() -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            await together(*[lambda: a.send(b"x")] * 8)
            assert await b.recv(65536) == b"x" * 8
        assert trio.lowlevel.current_statistics().io_statistics.transfers == 0  # type: ignore[union-attr]

    trio.run(main, io_manager=lambda: trio_aiopoll.AiopollIOManager(fast_sockets=False))  # type: ignore[call-arg]


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_receive_that_fails_although_nothing_is_readable_fails_at_once(manager: str) -> None:
    """Also after receives that were alone in their ticks and had to wait."""

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b, trio.socket.socket() as listener:
            await listener.bind(("127.0.0.1", 0))
            listener.listen()
            for _ in range(20):
                async with trio.open_nursery() as nursery:

                    async def receive() -> None:
                        assert await a.recv(65536) == b"x"

                    nursery.start_soon(receive)
                    await trio.testing.wait_all_tasks_blocked()
                    b._sock.send(b"x")  # type: ignore[attr-defined]
                with pytest.raises(OSError, match="not connected"):
                    await listener.recv(65536)

    run(main, manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_method_that_was_bound_before_a_test_double_came_still_works(manager: str) -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            recv, send = a.recv, a.send

            async def double(*_: object) -> bytes:
                await trio.lowlevel.checkpoint()
                return b"double"

            called = []

            async def send_first() -> None:
                called.append(b"1")
                await a.send(b"1")

            async def put_double_and_send() -> None:
                called.append(b"2")
                a.recv = double  # type: ignore[assignment]
                await a.send(b"2")

            await together(send_first, put_double_and_send, *crowd())
            assert await b.recv(65536) == b"".join(called)
            assert await a.recv(65536) == b"double"
            await send(b"3")
            await b.send(b"4")
            assert await recv(65536) == b"4"

    for _ in range(RUNS):
        run(main, manager)
