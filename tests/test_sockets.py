"""Guarantee: socket operations have Trio's semantics, also when many of them are performed at once at the next tick.

Each test runs on stock Trio, too, whose answers are the right ones. A crowd of tasks that are runnable in the same tick
makes it worth while to perform their operations together. What happens to a socket in the very tick in which something
else happens to it is in test_socket_programs.py.
"""

from __future__ import annotations

import array
import contextlib
import copy
import errno
import gc
import inspect
import os
import queue
import random
import resource
import signal
import socket
import struct
import sys
import threading
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

import trio_aiopoll

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import FrameType

    import outcome
    from trio.socket import SocketType

PATIENCE: Final = 30.0  # seconds; what takes longer hangs
MANAGERS: Final = {
    "epoll": "epoll",
    "aiopoll": "aiopoll",
    "aiopoll without fast sockets": lambda: trio_aiopoll.AiopollIOManager(fast_sockets=False),
}
CROWD: Final = 8
WHOLE: Final = 65536  # what a SocketStream asks for


class InOrder(random.Random):
    """Trio runs the tasks of a tick in the order in which they were started."""

    def random(self) -> float:
        return 1.0

    def shuffle(self, x: Any) -> None:
        x.reverse()  # Trio takes them from the end


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", InOrder())


@pytest.fixture(params=list(MANAGERS))
def io_manager(request: pytest.FixtureRequest) -> Any:
    return MANAGERS[request.param]


@pytest.fixture(params=[0, CROWD], ids=["alone", "in a crowd"])
def crowd(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def run(io_manager: Any, main: Callable[[], Awaitable[Any]], **options: Any) -> Any:
    async def patient_main() -> Any:
        if "clock" in options:
            return await main()
        with trio.fail_after(PATIENCE):
            return await main()

    return trio.run(patient_main, io_manager=io_manager, **options)


async def ticks(number: int) -> None:
    for _ in range(number):
        await trio.lowlevel.checkpoint()


def gather(nursery: trio.Nursery, size: int, number: int = 50) -> None:
    for _ in range(size):
        nursery.start_soon(ticks, number)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.002)


def tcp_pair() -> tuple[SocketType, SocketType]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return trio.socket.from_stdlib_socket(near), trio.socket.from_stdlib_socket(far)


def left_in(sock: SocketType) -> bytes:
    found = b""
    with suppress(BlockingIOError, ConnectionResetError):
        while data := os.read(sock.fileno(), WHOLE):
            found += data
    return found


def discard(*pairs: tuple[SocketType, SocketType]) -> None:
    """Close them outside of a run."""
    for pair in pairs:
        for sock in pair:
            sock._sock.close()  # type: ignore[attr-defined]


def fill(sock: SocketType) -> int:
    total = 0
    with suppress(BlockingIOError):
        while True:
            total += os.write(sock.fileno(), bytes(4096))
    return total


##############################
# Checkpoints
##############################


async def receive_next(stream: trio.SocketStream) -> object:
    return await stream.__anext__()


# {name: (what takes a socket, whether it needs data to go on)}
OPERATIONS: Final[dict[str, Callable[[SocketType, trio.SocketStream], Awaitable[object]]]] = {
    "recv": lambda sock, stream: sock.recv(10),
    "recv whole": lambda sock, stream: sock.recv(WHOLE),
    "recv nothing": lambda sock, stream: sock.recv(0),
    "recv_into": lambda sock, stream: sock.recv_into(bytearray(10)),
    "recvfrom": lambda sock, stream: sock.recvfrom(10),
    "recvfrom_into": lambda sock, stream: sock.recvfrom_into(bytearray(10)),
    "recvmsg": lambda sock, stream: sock.recvmsg(10),
    "recvmsg_into": lambda sock, stream: sock.recvmsg_into([bytearray(10)]),
    "peek": lambda sock, stream: sock.recv(10, socket.MSG_PEEK),
    "send": lambda sock, stream: sock.send(b"abc"),
    "send nothing": lambda sock, stream: sock.send(b""),
    "send bytearray": lambda sock, stream: sock.send(bytearray(b"abc")),
    "send page": lambda sock, stream: sock.send(bytes(4097)),
    "sendmsg": lambda sock, stream: sock.sendmsg([b"abc"]),
    "receive_some": lambda sock, stream: stream.receive_some(10),
    "receive_some of any size": lambda sock, stream: stream.receive_some(),
    "anext": lambda sock, stream: receive_next(stream),
    "send_all": lambda sock, stream: stream.send_all(b"abc"),
    "send_all nothing": lambda sock, stream: stream.send_all(b""),
    "send_all page": lambda sock, stream: stream.send_all(bytes(4097)),
    "might not block": lambda sock, stream: stream.wait_send_all_might_not_block(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_a_checkpoint(name: str, io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        os.write(far.fileno(), bytes(range(100)))
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.testing.assert_checkpoints():
                await OPERATIONS[name](near, stream)
        near.close()
        far.close()

    run(io_manager, main)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_in_a_cancelled_scope_has_no_effect(name: str, io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        os.write(far.fileno(), b"data")
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.CancelScope() as scope:
                scope.cancel()
                await OPERATIONS[name](near, stream)
            assert scope.cancelled_caught
        assert left_in(near) == b"data"
        assert left_in(far) == b""
        near.close()
        far.close()

    run(io_manager, main)


@pytest.mark.parametrize(
    "name",
    [name for name in OPERATIONS if name.startswith(("recv", "peek", "anext", "receive")) and "nothing" not in name],
)
def test_a_receive_that_is_cancelled_while_it_waits_takes_nothing(name: str, io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.move_on_after(0.003) as scope:
                await OPERATIONS[name](near, stream)
        assert scope.cancelled_caught
        os.write(far.fileno(), b"data")
        assert await near.recv(10) == b"data"
        near.close()
        far.close()

    run(io_manager, main)


class Notes(trio.abc.Instrument):
    """What the scheduler tells of some tasks, by name."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.seen: list[tuple[object, ...]] = []

    def _note(self, what: str, task: trio.lowlevel.Task) -> None:
        if task.name in self.names:
            self.seen.append((what, task.name))

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self._note("scheduled", task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._note("before step", task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._note("after step", task)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._note("exited", task)

    def before_io_wait(self, timeout: float) -> None:
        self.seen.append(("before I/O", timeout == 0))

    def after_io_wait(self, timeout: float) -> None:
        self.seen.append(("after I/O", timeout == 0))


def instrumented(io_manager: Any, late: bool) -> list[tuple[object, ...]]:
    pairs: list[tuple[SocketType, SocketType]] = []
    names = {f"{what} {number}" for number in range(CROWD) for what in ("sender", "receiver", "stream")}
    notes = Notes(names)

    async def send(sock: SocketType) -> None:
        for _ in range(3):
            await sock.send(b"x")

    async def receive(sock: SocketType) -> None:
        for _ in range(3):
            await sock.recv(WHOLE)

    async def echo(sock: SocketType) -> None:
        stream = trio.SocketStream(sock)
        await stream.send_all(b"hello")
        await stream.receive_some()

    async def main() -> None:
        for _ in range(2 * CROWD):
            pairs.append(trio.socket.socketpair())
        for near, far in pairs:
            os.write(near.fileno(), b"123")
            os.write(far.fileno(), b"123")
        await settle()
        if late:
            trio.lowlevel.add_instrument(notes)
        notes.seen.clear()
        async with trio.open_nursery() as nursery:
            for number, (near, far) in enumerate(pairs[:CROWD]):
                nursery.start_soon(send, near, name=f"sender {number}")
                nursery.start_soon(receive, far, name=f"receiver {number}")
            for number, (near, _) in enumerate(pairs[CROWD:]):
                nursery.start_soon(echo, near, name=f"stream {number}")
            await settle()
            nursery.cancel_scope.cancel()
        seen.extend(notes.seen)
        for pair in pairs:
            for sock in pair:
                sock.close()

    seen: list[tuple[object, ...]] = []
    run(io_manager, main, instruments=[] if late else [notes])
    return seen


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "added in mid-run"])
def test_instruments_see_what_they_see_on_stock_trio(io_manager: Any, late: bool) -> None:
    def of_each(seen: list[tuple[object, ...]]) -> dict[object, list[object]]:
        by_task: dict[object, list[object]] = {}
        for what, who in seen:
            by_task.setdefault(who, []).append(what)
        return by_task

    expected, got = instrumented("epoll", late), instrumented(io_manager, late)
    assert of_each(got) == of_each(expected)
    assert got == expected


@pytest.mark.parametrize("cushion", [0.0, 0.01])
@pytest.mark.usefixtures("in_order")
def test_tasks_in_the_middle_of_an_operation_are_not_blocked(io_manager: Any, cushion: float) -> None:
    """Nor does the clock jump: a task whose operation is about to be performed is as good as runnable."""
    order: list[str] = []

    async def talk(near: SocketType, far: SocketType) -> None:
        stream = trio.SocketStream(near)
        for _ in range(5):
            await stream.send_all(b"x")
            assert await far.recv(WHOLE) == b"x"
            await far.send(b"y")
            assert await stream.receive_some() == b"y"
        order.append("talked")

    async def wait() -> None:
        await trio.testing.wait_all_tasks_blocked(cushion)
        order.append("blocked")

    async def main() -> float:
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(wait)
            for _ in range(CROWD):
                nursery.start_soon(talk, *trio.socket.socketpair())
            await trio.sleep(1000)
            return trio.current_time() - began

    assert run(io_manager, main, clock=trio.testing.MockClock(autojump_threshold=0)) == 1000
    assert order == ["talked"] * CROWD + ["blocked"]


##############################
# Data is never lost, doubled or out of order
##############################


def stream_of(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def check_byte_streams(io_manager: Any, kind: str, before: Callable[[], object] = lambda: None) -> None:
    """Every receive may be cancelled at any time, and every send of the socket type too: what they report is true."""
    pairs, size = 24, 200_000
    make = trio.socket.socketpair if kind == "unix" else tcp_pair

    async def send(sock: SocketType, seed: int) -> None:
        choose = random.Random(seed)
        data = stream_of(seed, size)
        done = 0
        while done < size:
            chunk = data[done : done + choose.choice([1, 7, 64, 300, 4096, 4097, 32768, 65536])]
            how = choose.randrange(4)
            with trio.move_on_after(choose.choice([0, 1e-5, 1e-4, 1])) as scope:
                sent = 0
                if how == 0:
                    sent = await sock.send(chunk)
                elif how == 1:
                    sent = await sock.send(bytearray(chunk))
                elif how == 2:
                    sent = await sock.sendmsg([chunk[:3], chunk[3:]])
                else:
                    scope.deadline = float("inf")
                    await trio.SocketStream(sock).send_all(chunk)
                    sent = len(chunk)
            done += sent
        sock.shutdown(trio.socket.SHUT_WR)

    async def receive(sock: SocketType, seed: int) -> None:
        choose = random.Random(-seed)
        stream = trio.SocketStream(sock)
        found = bytearray()
        while True:
            most = choose.choice([1, 50, 4096, WHOLE])
            how = choose.randrange(4)
            with trio.move_on_after(choose.choice([0, 1e-5, 1e-4, 1])) as scope:
                if how == 0:
                    data = await sock.recv(most)
                elif how == 1:
                    buffer = bytearray(most)
                    data = bytes(buffer[: await sock.recv_into(buffer)])
                elif how == 2:
                    data = bytes(await stream.receive_some(most))
                else:
                    data = bytes(await stream.receive_some())
            if scope.cancelled_caught:
                continue
            if not data:
                break
            found += data
        assert bytes(found) == stream_of(seed, size)

    async def main() -> None:
        before()
        async with trio.open_nursery() as nursery:
            for number in range(1, pairs + 1):
                near, far = make()
                nursery.start_soon(send, near, number)
                nursery.start_soon(receive, far, number)
                nursery.start_soon(send, far, 1000 + number)
                nursery.start_soon(receive, near, 1000 + number)

    run(io_manager, main)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_byte_streams_survive_random_sizes_and_cancels(io_manager: Any, kind: str) -> None:
    check_byte_streams(io_manager, kind)


class Refusing:
    """The manager's polls on a host whose AIO budget is spent: none but the manager's own is taken."""

    def __init__(self, polls: Any, keep: int) -> None:
        self._polls = polls
        self._keep = keep
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._polls, name)

    def tick(self, keys: Any, timeout: float) -> list[int]:
        refused = [key for key in keys if key != self._keep]
        if not refused:
            return self._polls.tick(keys, timeout)  # type: ignore[no-any-return]
        self.refused += len(refused)
        taken = self._polls.tick([key for key in keys if key == self._keep], 0)
        return [*taken, *(-((key << 12) | errno.EAGAIN) - 1 for key in refused)]


@pytest.mark.parametrize("fast", [False, True])
def test_so_they_do_when_the_budget_is_spent(fast: bool) -> None:
    manager = trio_aiopoll.AiopollIOManager(fast_sockets=fast)
    polls: list[Refusing] = []

    def spend() -> None:
        polls.append(Refusing(manager._polls, manager._lane_key))
        manager._polls = polls[0]  # type: ignore[assignment]

    check_byte_streams(lambda: manager, "unix", spend)
    assert polls[0].refused > 0


def test_data_that_arrives_together_with_the_cancel_is_returned_or_still_there(io_manager: Any, crowd: int) -> None:
    rounds = 300
    outcomes = set()

    async def receive(sock: SocketType, scope: trio.CancelScope, found: list[bytes], whole: bool) -> None:
        with scope:
            found.append(await sock.recv(WHOLE if whole else 10))

    async def main() -> None:
        near, far = trio.socket.socketpair()
        choose = random.Random(1)
        for number in range(rounds):
            scope, found = trio.CancelScope(), []
            data = bytes([number % 255 + 1])
            steps: list[Callable[[], object]] = [scope.cancel, partial(os.write, far.fileno(), data)]
            async with trio.open_nursery() as nursery:
                gather(nursery, crowd, 3)
                nursery.start_soon(receive, near, scope, found, number % 2 == 0)
                await ticks(choose.randrange(4))
                choose.shuffle(steps)
                steps[0]()
                await ticks(choose.randrange(2))
                steps[1]()
            outcomes.add(bool(found))
            assert b"".join(found) + left_in(near) == data
        near.close()
        far.close()

    run(io_manager, main)
    assert outcomes == {False, True}


def test_a_cancelled_send_all_has_sent_a_beginning(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        data = stream_of(1, 1 << 20)
        near, far = trio.socket.socketpair()
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.CancelScope() as scope:

                async def read_some_then_cancel() -> None:
                    await settle()
                    found.extend(await far.recv(WHOLE))
                    found.extend(await far.recv(WHOLE))
                    await ticks(3)
                    scope.cancel()

                found = bytearray()
                nursery.start_soon(read_some_then_cancel)
                await trio.SocketStream(near).send_all(data)
            assert scope.cancelled_caught
        near.close()
        found += left_in(far)
        assert 2 * WHOLE <= len(found) < len(data)
        assert found == data[: len(found)]
        far.close()

    run(io_manager, main)


@pytest.mark.parametrize("size", [1, 4096, 4097, 32768, 65536, 1 << 20])
def test_a_message_of_any_size_arrives_whole(io_manager: Any, size: int, crowd: int) -> None:
    async def receive(stream: trio.SocketStream, data: bytes) -> None:
        found = bytearray()
        async for chunk in stream:
            assert type(chunk) is bytes
            found += chunk
        assert found == data

    async def send(stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(1 + crowd):
                for near, far in (trio.socket.socketpair(), tcp_pair()):
                    data = stream_of(number, size)
                    nursery.start_soon(send, trio.SocketStream(near), data)
                    nursery.start_soon(receive, trio.SocketStream(far), data)

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_sends_of_a_tick_by_whatever_method_keep_their_order(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        sends = [
            partial(near.send, b"1"),
            partial(near.sendmsg, [b"2"]),
            partial(near.send, b"3"),
            partial(near.send, bytearray(b"4")),
            partial(trio.SocketStream(near).send_all, b"5"),
            partial(near.send, b"6", socket.MSG_DONTWAIT),
            partial(near.send, bytes([55]) * 4097),
            partial(near.send, b"8"),
            partial(near.send, memoryview(b"9")),
        ]
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            for send in sends:
                nursery.start_soon(send)
        assert left_in(far) == b"123456" + b"7" * 4097 + b"89"

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_what_is_sent_is_what_the_buffer_held_at_the_call(io_manager: Any, crowd: int) -> None:
    async def overwrite(*buffers: bytearray) -> None:
        for buffer in buffers:
            buffer[:] = b"after!"

    async def main() -> None:
        near, far = trio.socket.socketpair()
        buffers = [bytearray(b"before") for _ in range(4)]
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.start_soon(near.send, buffers[0])
            nursery.start_soon(near.send, memoryview(buffers[1]).toreadonly())
            nursery.start_soon(trio.SocketStream(near).send_all, memoryview(buffers[2]))
            nursery.start_soon(near.sendmsg, [buffers[3]])
            nursery.start_soon(overwrite, *buffers)
        assert left_in(far) == b"before" * 4

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_a_partial_send_reports_what_was_sent(io_manager: Any, crowd: int) -> None:
    async def send(near: SocketType, far: SocketType, size: int) -> None:
        sent = await near.send(bytes(size))
        found = left_in(far)
        assert 0 < sent <= size
        assert len(found) == sent

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(1 + crowd):
                nursery.start_soon(send, *trio.socket.socketpair(), 1 << 22)
            for _ in range(1 + crowd):
                nursery.start_soon(send, *trio.socket.socketpair(), 3)

    run(io_manager, main)


##############################
# Errors
##############################


@pytest.mark.parametrize("whole", [False, True])
def test_a_reset_is_raised_once_and_then_there_is_the_end(io_manager: Any, crowd: int, whole: bool) -> None:
    async def meet_reset(waits: bool) -> None:
        near, far = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if not waits:
            far.close()
            await trio.lowlevel.wait_readable(near)
        async with trio.open_nursery() as nursery:

            async def close() -> None:
                await ticks(5)
                far.close()

            nursery.start_soon(close)
            with pytest.raises(ConnectionResetError) as caught:
                await near.recv(WHOLE if whole else 10)
        assert caught.value.errno == errno.ECONNRESET
        assert await near.recv(WHOLE if whole else 10) == b""
        with pytest.raises(BrokenPipeError):
            await near.send(b"x")
        stream = trio.SocketStream(near)
        with pytest.raises(trio.BrokenResourceError) as broken:
            await stream.send_all(b"x")
        assert isinstance(broken.value.__cause__, BrokenPipeError)
        assert await stream.receive_some() == b""
        near.close()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(1 + crowd):
                nursery.start_soon(meet_reset, False)
                nursery.start_soon(meet_reset, True)

    run(io_manager, main)


# What a program may hand over by mistake, and what it may hand over although few do.
CALLS: Final[list[Callable[[SocketType, trio.SocketStream], Awaitable[object]]]] = [
    lambda sock, stream: sock.recv(-1),
    lambda sock, stream: sock.recv("10"),  # type: ignore[arg-type]
    lambda sock, stream: sock.recv(1.5),  # type: ignore[arg-type]
    lambda sock, stream: sock.recv(None),  # type: ignore[arg-type]
    lambda sock, stream: sock.recv(1 << 80),
    lambda sock, stream: sock.recv(True),
    lambda sock, stream: sock.recv(WHOLE, 1 << 80),
    lambda sock, stream: sock.recv(WHOLE, "x"),  # type: ignore[arg-type]
    lambda sock, stream: sock.recv(),
    lambda sock, stream: sock.recv(WHOLE, 0, 0),  # type: ignore[call-arg]
    lambda sock, stream: sock.recv(WHOLE, socket.MSG_DONTWAIT),
    lambda sock, stream: sock.recv(WHOLE, socket.MSG_OOB),
    lambda sock, stream: sock.recv(WHOLE, socket.MSG_ERRQUEUE),
    lambda sock, stream: sock.send("text"),  # type: ignore[arg-type]
    lambda sock, stream: sock.send(None),  # type: ignore[arg-type]
    lambda sock, stream: sock.send(),
    lambda sock, stream: sock.send(b"x", "flag"),  # type: ignore[arg-type]
    lambda sock, stream: sock.send(b"x", 0, 0),  # type: ignore[call-arg]
    lambda sock, stream: sock.send(b"x", socket.MSG_OOB),
    lambda sock, stream: sock.send(b"x", socket.MSG_MORE),
    lambda sock, stream: sock.send(b"x", socket.MSG_EOR),
    lambda sock, stream: sock.send(array.array("i", [1, 2])),
    lambda sock, stream: sock.send(memoryview(b"abcdef")[::2]),
    lambda sock, stream: sock.sendto(b"x", ("127.0.0.1", 9)),
    lambda sock, stream: sock.sendto(b"x"),  # type: ignore[call-arg]
    lambda sock, stream: sock.recv_into(b"immutable"),  # type: ignore[arg-type]
    lambda sock, stream: sock.recv_into(bytearray(10), 20),
    lambda sock, stream: sock.recv_into(bytearray(0)),
    lambda sock, stream: sock.accept(),
    lambda sock, stream: stream.receive_some(0),
    lambda sock, stream: stream.receive_some(-1),
    lambda sock, stream: stream.receive_some("x"),  # type: ignore[arg-type]
    lambda sock, stream: stream.receive_some(1.0),  # type: ignore[arg-type]
    lambda sock, stream: stream.receive_some(1 << 80),
    lambda sock, stream: stream.receive_some(max_bytes=3),
    lambda sock, stream: stream.receive_some(None),
    lambda sock, stream: stream.receive_some(True),
    lambda sock, stream: stream.send_all("text"),  # type: ignore[arg-type]
    lambda sock, stream: stream.send_all(None),  # type: ignore[arg-type]
    lambda sock, stream: stream.send_all(7),  # type: ignore[arg-type]
    lambda sock, stream: stream.send_all(array.array("i", [1, 2])),
    lambda sock, stream: stream.send_all(memoryview(b"abcdef")[::2]),
    lambda sock, stream: stream.send_all(memoryview(bytes(12)).cast("i")),
    lambda sock, stream: stream.send_all(data=b"by name"),
]


def answers(io_manager: Any, state: str, crowd: int) -> list[object]:
    """What each call answers, whether it was a checkpoint, and what there is then in the sockets."""
    found: list[object] = [None] * len(CALLS)

    async def call(number: int, near: SocketType, stream: trio.SocketStream, far: SocketType) -> None:
        answer: object = "blocks"
        try:
            with trio.move_on_after(0.1):
                answer = repr(await CALLS[number](near, stream))
        except Exception as error:
            answer = (type(error), error.args, type(error.__cause__), type(error.__context__))
        rest = [left_in(sock) if sock.fileno() != -1 else None for sock in (near, far)] if state != "reset" else None
        found[number] = (number, answer, rest)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            for number in range(len(CALLS)):
                near, far = tcp_pair() if state == "tcp" else trio.socket.socketpair()
                stream = trio.SocketStream(near)
                if state != "closed":
                    os.write(far.fileno(), b"hello")
                if state == "closed":
                    near.close()
                elif state == "stream closed":
                    await stream.aclose()
                elif state == "reset":
                    os.write(near.fileno(), b"unread")
                    far.close()
                nursery.start_soon(call, number, near, stream, far)

    run(io_manager, main)
    return found


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("state", ["open", "tcp", "closed", "stream closed", "reset"])
def test_unusual_calls_are_answered_as_on_stock_trio(io_manager: Any, state: str, crowd: int) -> None:
    expected, got = answers("epoll", state, crowd), answers(io_manager, state, crowd)
    assert [pair for pair in zip(expected, got, strict=True) if pair[0] != pair[1]] == []


def of_the_same_class(sock: SocketType) -> SocketType:
    return type(sock)(sock._sock)  # type: ignore[attr-defined, call-arg, no-any-return]


def of_a_subclass(sock: SocketType) -> SocketType:
    return type("Subclass", (type(sock),), {})(sock._sock)  # type: ignore[attr-defined, no-any-return]


def made_bare(sock: SocketType) -> SocketType:
    kind: Any = type(sock)
    made = kind.__new__(kind)
    made._sock, made._did_shutdown_SHUT_WR = sock._sock, False  # type: ignore[attr-defined]
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [of_the_same_class, of_a_subclass, made_bare, copy.copy])
def test_a_socket_that_is_made_by_the_class_of_another_works(io_manager: Any, make: Callable[[Any], Any]) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        with near, far:
            made = make(near)
            await made.send(b"there")
            assert await far.recv(WHOLE) == b"there"
            await far.send(b"back")
            assert await made.recv(WHOLE) == b"back"
            stream = trio.SocketStream(made)
            await stream.send_all(b"there")
            assert await far.recv(WHOLE) == b"there"
            await far.send(b"back")
            assert await stream.receive_some() == b"back"
            assert not made.did_shutdown_SHUT_WR
            made.shutdown(socket.SHUT_WR)
            assert made.did_shutdown_SHUT_WR

    run(io_manager, main)


@pytest.mark.parametrize("with_keywords", [{"bufsize": WHOLE}, {"max_bytes": WHOLE}, {"data": b"x"}, {"flags": 0}])
def test_recv_and_send_take_no_keywords_as_on_stock_trio(io_manager: Any, with_keywords: dict[str, Any]) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        with near, far:
            await far.send(b"hello")
            for operation in (near.recv, near.send):
                for arguments in ((), (WHOLE if operation == near.recv else b"x",)):
                    with pytest.raises(TypeError, match="keyword argument"):
                        await operation(*arguments, **with_keywords)
            assert left_in(near) == b"hello"
            assert left_in(far) == b""

    run(io_manager, main)


def test_recv_and_send_refuse_keywords_when_they_are_called() -> None:
    async def main() -> None:
        sock: Any = trio.socket.socket()
        with sock:
            for operation in (sock.recv, sock.send):
                with pytest.raises(TypeError, match="keyword argument"):
                    operation(flags=0)  # which is not awaited

    run("aiopoll", main)


##############################
# What a program may do to sockets and streams
##############################


def test_a_method_that_was_replaced_is_called(io_manager: Any, crowd: int) -> None:
    """As test doubles do."""

    async def recv(*args: object) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"double"

    async def send(data: bytes) -> int:
        await trio.lowlevel.checkpoint()
        sent.append(bytes(data))
        return len(data)

    sent: list[bytes] = []

    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.cancel_scope.deadline = trio.current_time() + 1  # no call of the real one returns
            near.recv = recv  # type: ignore[method-assign, assignment]
            near.send = send  # type: ignore[method-assign, assignment]
            assert await stream.receive_some() == b"double"
            assert await stream.__anext__() == b"double"
            assert await near.recv(WHOLE) == b"double"
            await stream.send_all(b"x")
        assert sent == [b"x"]
        assert left_in(far) == b""
        near.close()
        far.close()

    run(io_manager, main)


def test_a_method_of_a_stream_that_was_replaced_is_called(io_manager: Any, crowd: int) -> None:
    async def receive_some(max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"double"

    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        os.write(far.fileno(), b"from the socket")
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            stream.receive_some = receive_some  # type: ignore[method-assign]
            assert await stream.__anext__() == b"double"
        near.close()
        far.close()

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_every_method_makes_a_coroutine_that_can_be_a_task(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        os.write(far.fileno(), b"12345")
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            for method in (partial(stream.receive_some, 1), partial(stream.send_all, b"x"), partial(near.recv, 1)):
                nursery.start_soon(method)
            nursery.start_soon(stream.__anext__)
        for function in (stream.receive_some, stream.send_all, stream.__anext__, near.recv, near.send):
            assert inspect.iscoroutinefunction(function)
        near.close()
        far.close()

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_a_task_in_an_operation_can_be_looked_into(io_manager: Any, crowd: int) -> None:
    """As debuggers do, right after the call and while it waits; by another way, to the very bottom."""

    async def main() -> None:
        near, far = trio.socket.socketpair()
        stream = trio.SocketStream(near)
        fill(near)

        def look() -> None:
            for task in nursery.child_tasks:
                if task.name.startswith("operation"):
                    frames = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
                    assert frames[0] in ("receive_next", "send_all")
                    seen.append(frames)

        async def look_soon() -> None:
            look()

        seen: list[list[str]] = []
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.start_soon(receive_next, stream, name="operation 1")
            nursery.start_soon(stream.send_all, b"x", name="operation 2")
            nursery.start_soon(look_soon)
            await ticks(5)
            look()
            nursery.cancel_scope.cancel()
        assert len(seen) == 4
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.start_soon(near.recv, 10, 0, name="operation 1")
            nursery.start_soon(stream.send_all, bytearray(10), name="operation 2")
            await ticks(5)
            for task in nursery.child_tasks:
                if task.name.startswith("operation"):
                    names = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
                    # who yields to Trio: Trio's own, a wait, or the operation whose turn comes with the tick
                    assert names[-1] in ("_real_async_yield", "_async_yield", "wait", "send"), names
            nursery.cancel_scope.cancel()
        near.close()
        far.close()

    run(io_manager, main)


def test_the_socket_of_a_stream_may_be_exchanged(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        (near, far), (other, other_far) = trio.socket.socketpair(), trio.socket.socketpair()
        stream = trio.SocketStream(near)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            await stream.send_all(b"1")
            assert await far.recv(WHOLE) == b"1"
            await far.send(b"2")
            assert await stream.__anext__() == b"2"
            stream.socket = other
            await stream.send_all(b"4")
            assert await other_far.recv(WHOLE) == b"4"
            await other_far.send(b"5")
            assert await stream.receive_some() == b"5"
        for sock in (near, far, other, other_far):
            sock.close()

    run(io_manager, main)


def test_sockets_and_streams_look_as_on_stock_trio() -> None:
    def look(io_manager: Any) -> list[object]:
        async def main() -> list[object]:
            sock, peer = trio.socket.socketpair()
            stream = trio.SocketStream(sock)
            found = [
                type(sock).__name__,
                type(sock).__qualname__,
                type(sock).__module__,
                isinstance(sock, trio.socket.SocketType),
                type(peer.dup()) is type(sock),
                isinstance(stream, trio.SocketStream),
                type(stream).__name__,
                sorted(name for name in dir(sock) if not name.startswith("_")),
                sorted(name for name in dir(stream) if not name.startswith("_")),
                repr(sock).split(" ")[0],
            ]
            sock.close()
            peer.close()
            return found

        return run(io_manager, main)  # type: ignore[no-any-return]

    assert look("aiopoll") == look("epoll")


def test_a_run_on_another_manager_finds_trios_classes_as_they_were() -> None:
    """It pays nothing for the aiopoll runs before it; one that lives on in another thread stays fast meanwhile."""

    async def look() -> tuple[list[type], list[object]]:
        sock, peer = trio.socket.socketpair()
        classes = [type(sock), type(trio.SocketStream(sock))]
        sock.close()
        peer.close()
        return classes, [socket_class.__init__, trio.SocketStream.__init__]

    async def look_again_and_again() -> None:
        while not enough.is_set():
            seen.append((await look())[0])
            looked.release()
            await trio.to_thread.run_sync(go_on.acquire)

    socket_class: Any = trio.socket.SocketType
    socket_class = run("epoll", look)[0][0]
    untouched = run("epoll", look)
    ours = run("aiopoll", look)[0]
    assert run("epoll", look) == untouched
    assert run(None, look) == untouched
    seen: list[list[type]] = []
    enough, looked, go_on = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
    thread = threading.Thread(target=run, args=("aiopoll", look_again_and_again))
    thread.start()
    for _ in range(3):
        looked.acquire()
        assert run("epoll", look)[0] == untouched[0]
        go_on.release()
    looked.acquire()
    enough.set()
    go_on.release()
    thread.join()
    assert seen == [ours] * 4
    assert run("epoll", look) == untouched


@pytest.mark.parametrize("name", ["receive_some", "send_all", "__anext__"])
def test_the_signature_and_the_types_of_a_method_are_those_of_stock_trio(name: str) -> None:
    async def look() -> list[object]:
        sock, peer = trio.socket.socketpair()
        method: Any = getattr(trio.SocketStream(peer), name)
        found = [
            inspect.signature(method),
            method.__qualname__,
            method.__doc__,
            inspect.iscoroutinefunction(method),
            inspect.unwrap(method.__func__).__annotations__,
        ]
        sock.close()
        peer.close()
        return found

    assert run("aiopoll", look) == run("epoll", look)


def test_a_socket_goes_on_from_one_run_to_the_next(io_manager: Any, crowd: int) -> None:
    """On whatever manager, also when the run before it was cancelled in the middle of an operation."""

    async def begin() -> tuple[SocketType, SocketType]:
        near, far = trio.socket.socketpair()
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            for sock in (near, far):
                nursery.start_soon(sock.recv, WHOLE)
            await ticks(2)
            nursery.cancel_scope.cancel()
        return near, far

    async def go_on() -> None:
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            stream = trio.SocketStream(near)
            await stream.send_all(b"ping")
            assert await far.recv(WHOLE) == b"ping"
            await far.send(b"pong")
            assert await stream.receive_some() == b"pong"
            nursery.start_soon(near.recv, WHOLE)
            await ticks(2)
            nursery.cancel_scope.cancel()

    near, far = run(io_manager, begin)
    for other in (*MANAGERS.values(), *MANAGERS.values()):
        run(other, go_on)
    discard((near, far))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_datagrams_keep_their_boundaries(io_manager: Any, kind: socket.SocketKind, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair(type=kind)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            for data in (b"one", b"" if kind == socket.SOCK_DGRAM else b"1", b"three", b"truncated", b"last"):
                assert await near.send(data) == len(data)
            assert await far.recv(WHOLE) == b"one"
            assert await far.recv(WHOLE) == (b"" if kind == socket.SOCK_DGRAM else b"1")
            assert await far.recv(WHOLE) == b"three"
            assert await far.recv(5) == b"trunc"
            assert await far.recv(WHOLE) == b"last"
        near.close()
        far.close()

    run(io_manager, main)


def test_udp_answers_go_to_who_asked(io_manager: Any, crowd: int) -> None:
    async def serve(sock: SocketType) -> None:
        while True:
            data, address = await sock.recvfrom(WHOLE)
            await sock.sendto(data[::-1], address)

    async def ask(address: object, number: int) -> None:
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
            await sock.connect(address)
            for step in range(10):
                question = bytes([number, step]) * (step * 50)
                assert await sock.send(question) == len(question)
                assert await sock.recv(WHOLE) == question[::-1]
            assert await sock.send(b"") == 0
            assert await sock.recv(WHOLE) == b""

    async def main() -> None:
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as server:
            await server.bind(("127.0.0.1", 0))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, server)
                async with trio.open_nursery() as askers:
                    for number in range(1 + crowd):
                        askers.start_soon(ask, server.getsockname(), number)
                nursery.cancel_scope.cancel()

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_a_datagram_goes_to_whom_its_socket_was_connected_when_it_was_sent(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        socks = [trio.socket.socket(type=trio.socket.SOCK_DGRAM) for _ in range(3)]
        sender, first, second = socks
        for sock in socks:
            await sock.bind(("127.0.0.1", 0))
        await sender.connect(first.getsockname())
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.start_soon(sender.send, b"to the first")
            nursery.start_soon(sender.connect, second.getsockname())
        await sender.send(b"to the second")
        assert await second.recv(WHOLE) == b"to the second"
        with trio.fail_after(1):
            assert await first.recv(WHOLE) == b"to the first"
        for sock in socks:
            sock.close()

    run(io_manager, main)


@pytest.mark.usefixtures("in_order")
def test_a_pending_error_is_told_to_who_came_first(io_manager: Any, crowd: int) -> None:
    """And not to who asked for SO_ERROR in the same tick, but later: the reader would take it for a clean end."""

    async def receive(sock: SocketType) -> None:
        with pytest.raises(ConnectionResetError):
            await sock.recv(WHOLE)

    async def ask(sock: SocketType) -> None:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

    async def main() -> None:
        near, far = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        await trio.lowlevel.wait_readable(near)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            nursery.start_soon(receive, near)
            nursery.start_soon(ask, near)
        near.close()

    run(io_manager, main)


def test_a_refused_datagram_raises_once(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with socket.socket(type=socket.SOCK_DGRAM) as gone:
                gone.bind(("127.0.0.1", 0))
                address = gone.getsockname()
            with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
                await sock.connect(address)
                await sock.send(b"x")
                with pytest.raises(ConnectionRefusedError):
                    await sock.recv(WHOLE)
                with trio.move_on_after(0.01) as scope:
                    await sock.recv(WHOLE)
                assert scope.cancelled_caught

    run(io_manager, main)


def test_descriptors_are_passed_in_order_with_the_bytes_and_none_leaks(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        reader, writer = os.pipe()
        before = len(os.listdir("/proc/self/fd"))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))]
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd, 200)
            await near.send(b"before")
            assert await far.recv(WHOLE) == b"before"
            await near.sendmsg([b"with"], rights)
            await near.send(b"after")
            data, ancillary, flags, _ = await far.recvmsg(4, socket.CMSG_SPACE(4))
            assert (data, flags) == (b"with", 0)
            [(_, _, descriptors)] = ancillary
            (passed,) = struct.unpack("i", descriptors)
            os.write(writer, b"through")
            assert os.read(passed, 10) == b"through"
            os.close(passed)
            assert await far.recv(WHOLE) == b"after"
            for receive in (partial(far.recv, WHOLE), trio.SocketStream(far).receive_some):
                await near.sendmsg([b"unasked"], rights)
                assert await receive() == b"unasked"
        assert len(os.listdir("/proc/self/fd")) == before
        for sock in (near, far):
            sock.close()
        os.close(reader)
        os.close(writer)

    run(io_manager, main)


@pytest.mark.parametrize("blocking", [False, True, 5.0])
def test_a_socket_of_the_standard_library_can_be_given_over(io_manager: Any, crowd: int, blocking: object) -> None:
    async def main() -> None:
        plain, peer = socket.socketpair()
        plain.settimeout(blocking if isinstance(blocking, float) else None if blocking else 0.0)
        near = trio.socket.from_stdlib_socket(plain)
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.move_on_after(0.005) as scope:
                await near.recv(WHOLE)
            assert scope.cancelled_caught
            peer.send(b"x")
            assert await near.recv(WHOLE) == b"x"
            await near.send(b"y")
            assert peer.recv(10) == b"y"
        near.close()
        peer.close()

    run(io_manager, main)


@pytest.mark.parametrize("default", [0.5, None])
def test_the_default_timeout_of_sockets_does_not_matter(io_manager: Any, crowd: int, default: float | None) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)

    async def main() -> None:
        near, far = trio.socket.socketpair()
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd)
            with trio.move_on_after(0.005) as scope:
                await near.recv(WHOLE)
            assert scope.cancelled_caught
            fill(near)
            with trio.move_on_after(0.005) as scope:
                await near.send(b"x")
            assert scope.cancelled_caught
        near.close()
        far.close()

    try:
        run(io_manager, main)
    finally:
        socket.setdefaulttimeout(before)


##############################
# Signals, forks, hosts
##############################


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("interrupts", ["the main task", "another"])
def test_an_interrupt_loses_no_data(io_manager: Any, interrupts: str) -> None:
    pairs: list[tuple[SocketType, SocketType]] = []
    found: dict[int, bytes] = {}
    sent: dict[int, int] = {}

    async def receive(number: int) -> None:
        found[number] = await pairs[number][0].recv(WHOLE)

    async def send(number: int) -> None:
        sent[number] = await pairs[number][0].send(b"answer")

    async def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        for _ in range(2 * CROWD):
            pairs.append(trio.socket.socketpair())
            os.write(pairs[-1][1].fileno(), b"data")
        async with trio.open_nursery() as nursery:
            for number in range(CROWD):
                nursery.start_soon(receive, number)
                nursery.start_soon(send, CROWD + number)
            if interrupts == "another":
                nursery.start_soon(interrupt)
            else:
                await trio.lowlevel.checkpoint()
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        trio.run(main, io_manager=io_manager)
    assert caught.group_contains(KeyboardInterrupt) or caught.errisinstance(KeyboardInterrupt)
    for number in range(CROWD):
        assert found.get(number, b"") + left_in(pairs[number][0]) == b"data"
        _, far = pairs[CROWD + number]
        assert left_in(far) == b"answer"[: sent.get(CROWD + number, 0)]
    discard(*pairs)


LIBRARY: Final = tuple(str(Path(module.__file__ or "").parent) for module in (trio, trio_aiopoll))


def interrupted_at(io_manager: Any, line: int) -> tuple[str, int] | None:
    """Run senders and receivers, with Control-C at so many lines of socket code from the start; where that was."""
    pairs: list[tuple[SocketType, SocketType]] = []
    lines = 0
    where = None

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(LIBRARY) or (name.startswith(LIBRARY[0]) and "socket" not in Path(name).name):
            return None
        return trace_lines

    def trace_lines(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines, where
        lines += event == "line"
        if lines == line and event == "line":
            where = frame.f_code.co_filename, frame.f_lineno
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace_lines

    async def act(number: int) -> None:
        sock = pairs[number][0]
        stream = trio.SocketStream(sock)
        acts = [
            partial(sock.send, b"x"),
            partial(sock.recv, WHOLE),
            partial(stream.send_all, b"x"),
            stream.receive_some,
        ]
        await acts[number % 4]()

    async def interfere() -> None:
        """Where others have begun something."""
        pairs[0][0].shutdown(socket.SHUT_WR)
        with trio.move_on_after(0):
            await pairs[2][0].recv_into(bytearray(1))

    async def main() -> None:
        for number in range(CROWD):
            pairs.append(trio.socket.socketpair())
            if number < CROWD // 2:
                os.write(pairs[number][1].fileno(), b"data")
        await settle()
        try:
            async with trio.open_nursery() as nursery:
                for number in range(CROWD):
                    nursery.start_soon(act, number)
                nursery.start_soon(interfere)
                sys.settrace(trace)
                await ticks(2)
                for _, far in pairs:
                    os.write(far.fileno(), b"data")
        finally:
            sys.settrace(None)
        # one that Trio has kept for later
        await trio.lowlevel.checkpoint()

    gc.disable()  # or an earlier run is collected in the middle of this one, and its lines count
    try:
        run(io_manager, main)
    except BaseException as error:
        errors = [error]
        while any(isinstance(one, BaseExceptionGroup) for one in errors):
            errors = [part for one in errors for part in getattr(one, "exceptions", (one,))]
        assert {type(one) for one in errors} == {KeyboardInterrupt}, (where, error)  # noqa: PT017
        assert where is not None
    else:
        assert where is None
    finally:
        sys.settrace(None)
        gc.enable()
        discard(*pairs)
    return where


@pytest.mark.usefixtures("in_order")
@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else traces")
def test_an_interrupt_at_any_line_does_no_damage(io_manager: Any) -> None:
    line = 1
    while interrupted_at(io_manager, line):
        line += 1
    assert line > 50


@pytest.mark.parametrize("is_released", [False, True])
def test_a_blocked_send_sends_what_its_memoryview_shows_when_it_can(io_manager: Any, is_released: bool) -> None:
    """It is read anew, as on stock Trio; and whoever releases it in the middle is told."""

    async def main() -> tuple[list[object], bytes]:
        pairs = [trio.socket.socketpair() for _ in range(CROWD)]
        near, far = pairs[0]
        data = bytearray(b"old!")
        view = memoryview(data)
        outcome: list[object] = []
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += near._sock.send(bytes(4096))  # type: ignore[attr-defined]

        async def send() -> None:
            try:
                outcome.append(await near.send(view))
            except ValueError as error:
                outcome.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for sock, _ in pairs[1:]:
                nursery.start_soon(sock.send, b"x")
            await settle()
            if is_released:
                view.release()
            data[:] = b"new."
            while filled:
                filled -= len(far._sock.recv(filled))  # type: ignore[attr-defined]
        rest = b"" if is_released else await far.recv(WHOLE)
        for pair in pairs:
            for sock in pair:
                sock.close()
        return outcome, rest

    expected = run("epoll", main)
    assert expected[1] == (b"" if is_released else b"new.")
    assert run(io_manager, main) == expected


@pytest.mark.usefixtures("in_order")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("goes_on", [False, True], ids=["child exits", "child goes on with the run"])
def test_what_was_begun_before_a_fork_is_done_once(io_manager: Any, goes_on: bool) -> None:
    """Stock Trio has done it before another task can fork."""
    children: list[int] = []
    found: list[bytes] = []

    async def fork() -> None:
        child = os.fork()
        if child:
            children.append(child)
            os.waitpid(child, 0)  # noqa: ASYNC222
        elif not goes_on:
            os._exit(0)

    async def receive(sock: SocketType) -> None:
        found.append(await sock.recv(WHOLE))

    async def main() -> None:
        pairs = [trio.socket.socketpair() for _ in range(2 * CROWD)]
        for number, (_, far) in enumerate(pairs):
            if number % 2:
                os.write(far.fileno(), b"question")
        try:
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    for number, (near, _) in enumerate(pairs):
                        if number % 2:
                            nursery.start_soon(receive, near)
                        else:
                            nursery.start_soon(near.send, b"answer")
                    nursery.start_soon(fork)
        finally:
            if not children:
                os._exit(0)  # the child
        assert found == [b"question"] * CROWD
        assert [left_in(far) for _, far in pairs[::2]] == [b"answer"] * CROWD
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(io_manager, main)


def run_as_guest(io_manager: Any, main: Callable[[Callable[[Callable[[], object]], None]], Awaitable[Any]]) -> Any:
    """Run on a host of a few lines; ``main`` gets what makes the host do something between two ticks."""
    jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
    results: list[outcome.Outcome[Any]] = []

    def done(result: outcome.Outcome[Any]) -> None:
        results.append(result)
        jobs.put(None)

    async def patient_main() -> Any:
        with trio.fail_after(PATIENCE):
            return await main(jobs.put)

    trio.lowlevel.start_guest_run(
        patient_main, run_sync_soon_threadsafe=jobs.put, done_callback=done, io_manager=io_manager
    )
    while (job := jobs.get(timeout=2 * PATIENCE)) is not None:
        job()
    return results[0].unwrap()


HOST_DOES: Final[dict[str, Callable[[SocketType, SocketType, trio.CancelScope], object]]] = {
    "cancels": lambda near, far, scope: scope.cancel(),
    "reads": lambda near, far, scope: left_in(near),
    "sends": lambda near, far, scope: os.write(far.fileno(), b"more"),
    "shuts down": lambda near, far, scope: near.shutdown(socket.SHUT_RDWR),
    "closes the peer": lambda near, far, scope: discard((far, far)),
}


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("does", HOST_DOES)
@pytest.mark.parametrize("has_data", [False, True], ids=["no data", "data"])
def test_what_the_host_does_between_two_ticks_has_the_effect_of_stock_trio(
    does: str, has_data: bool, io_manager: Any, crowd: int
) -> None:
    def outcomes(io_manager: Any) -> list[object]:
        async def attempt(ended: list[object], scope: trio.CancelScope, act: Callable[[], Awaitable[object]]) -> None:
            with scope:
                try:
                    ended.append(await act())
                except BaseException as error:
                    ended.append(type(error))
                    if not isinstance(error, Exception):
                        raise

        async def main(host: Callable[[Callable[[], object]], None]) -> list[object]:
            ended: list[list[object]] = [[] for _ in range(5)]
            async with trio.open_nursery() as nursery:
                gather(nursery, crowd, 10)
                for number in range(5):
                    near, far = trio.socket.socketpair()
                    if has_data:
                        os.write(far.fileno(), b"data")
                    stream, scope = trio.SocketStream(near), trio.CancelScope()
                    act = [
                        partial(near.recv, WHOLE),
                        partial(near.recv, 10),
                        stream.receive_some,
                        partial(near.send, b"x"),
                        partial(stream.send_all, b"x"),
                    ][number]
                    nursery.start_soon(attempt, ended[number], scope, act)
                    nursery.start_soon(trio.lowlevel.checkpoint)
                    keep.append((near, far))
                    todo.append(partial(HOST_DOES[does], near, far, scope))

                async def tell() -> None:
                    for job in todo:
                        host(job)

                nursery.start_soon(tell)
                await settle()
                nursery.cancel_scope.cancel()
            return [*ended, [[left_in(sock) if sock.fileno() != -1 else None for sock in pair] for pair in keep]]

        keep: list[tuple[SocketType, SocketType]] = []
        todo: list[Callable[[], object]] = []
        answer: list[object] = run_as_guest(io_manager, main)
        discard(*keep)
        return answer

    assert outcomes(io_manager) == outcomes("epoll")


##############################
# Buffers and objects
##############################


@pytest.mark.usefixtures("in_order")
def test_a_buffer_is_held_only_while_the_operation_is(io_manager: Any, crowd: int) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        async with trio.open_nursery() as nursery:
            gather(nursery, crowd, 100)
            for act in (near.recv_into, near.recvfrom_into):
                buffer = bytearray(10)
                await far.send(b"x")
                await act(buffer)  # type: ignore[operator]
                buffer.clear()  # BufferError if it were held
                buffer = bytearray(10)
                with trio.move_on_after(0.003):
                    await act(buffer)  # type: ignore[operator]
                buffer.clear()
            fill(near)
            for act in (near.send, trio.SocketStream(near).send_all):
                buffer = bytearray(10)
                with trio.move_on_after(0.003):
                    await act(buffer)  # type: ignore[operator]
                buffer.clear()
                data = bytes(range(200))
                references = sys.getrefcount(data)
                with trio.move_on_after(0.003):
                    await act(data)  # type: ignore[operator]
                await ticks(2)
                assert sys.getrefcount(data) == references
        near.close()
        far.close()

    run(io_manager, main)


@pytest.mark.parametrize("way", ["returned", "cancelled", "closed", "reset", "cancelled at once", "closed at once"])
def test_an_operation_that_has_ended_keeps_nothing_alive(io_manager: Any, crowd: int, way: str) -> None:
    references: dict[str, weakref.ref[Any]] = {}

    class Thing:
        pass

    async def act(near: SocketType, what: str) -> None:
        thing = Thing()
        references[f"thing {what}"] = weakref.ref(thing)
        references[f"task {what}"] = weakref.ref(trio.lowlevel.current_task())
        stream = trio.SocketStream(near)
        references[f"stream {what}"] = weakref.ref(stream)
        try:
            if what == "send":
                await stream.send_all(b"x" * 100)
            else:
                await stream.receive_some()
        except BaseException as error:
            references[f"error {what}"] = weakref.ref(error)
            if not isinstance(error, Exception):
                raise

    async def main() -> None:
        for what in ("send", "receive"):
            near, far = trio.socket.socketpair()
            references[f"near {what}"], references[f"far {what}"] = weakref.ref(near), weakref.ref(far)
            if what == "send" and way != "returned":
                fill(near)
            async with trio.open_nursery() as nursery:
                gather(nursery, crowd, 5)
                nursery.start_soon(act, near, what)
                await ticks(1)
                if "at once" not in way:
                    await settle()
                if way == "returned" and what == "receive":
                    os.write(far.fileno(), b"x")
                elif way == "reset":
                    os.write(near.fileno(), b"x") if what == "receive" else None
                    far.close()
                elif "closed" in way:
                    near.close()
                elif "cancelled" in way:
                    nursery.cancel_scope.cancel()
            near.close()
            far.close()
        del near, far, nursery
        await ticks(2)
        assert len(references) >= 10
        assert {name for name, reference in references.items() if reference() is not None} == set()

    gc.collect()
    gc.disable()
    try:
        run(io_manager, main)
    finally:
        gc.enable()


##############################
# Fairness
##############################


@pytest.mark.parametrize("floods", [1, CROWD])
def test_a_socket_that_always_has_data_starves_neither_others_nor_deadlines(io_manager: Any, floods: int) -> None:
    async def send(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(bytes(WHOLE))

    async def receive(stream: trio.SocketStream) -> None:
        async for _ in stream:
            flooded[0] += 1

    flooded = [0]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(floods):
                near, far = trio.socket.socketpair()
                nursery.start_soon(send, trio.SocketStream(near))
                nursery.start_soon(receive, trio.SocketStream(far))
            near, far = trio.socket.socketpair()
            for step in range(100):  # in a turn of its own each, and no more turns of the others than it takes
                before = flooded[0]
                await near.send(b"ping")
                assert await far.recv(10) == b"ping"
                assert await far.send(b"pong") == 4
                assert await near.recv(WHOLE) == b"pong"
                assert flooded[0] - before <= 20 * floods, step
            began = trio.current_time()
            with trio.move_on_after(0.02):
                await near.recv(WHOLE)
            before = flooded[0]
            with trio.move_on_at(began):  # has passed
                await near.recv(WHOLE)
            assert flooded[0] - before <= 5 * floods
            nursery.cancel_scope.cancel()
        assert flooded[0] > 100

    run(io_manager, main)


##############################
# A descriptor's number passes to another socket
##############################


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("let_go", ["close", "detach"])
@pytest.mark.parametrize("has_data", [False, True], ids=["no data", "data"])
def test_an_operation_never_touches_a_later_socket_of_the_same_number(
    io_manager: Any, crowd: int, let_go: str, has_data: bool
) -> None:
    """Which is opened in the same tick."""
    acts: list[Callable[[SocketType], Awaitable[object]]] = [
        lambda sock: sock.recv(WHOLE),
        lambda sock: sock.recv(10),
        lambda sock: trio.SocketStream(sock).receive_some(),
        lambda sock: sock.send(b"x"),
        lambda sock: trio.SocketStream(sock).send_all(b"x"),
    ]

    def outcomes(io_manager: Any) -> list[object]:
        ended: dict[int, object] = {}

        async def attempt(number: int, sock: SocketType) -> None:
            try:
                ended[number] = await acts[number](sock)
            except Exception as error:
                ended[number] = (type(error), getattr(error, "errno", None))

        async def replace(socks: list[SocketType], later: list[tuple[socket.socket, socket.socket]]) -> None:
            for sock in socks:
                number = sock.fileno()
                if let_go == "close":
                    sock.close()
                else:
                    trio.lowlevel.notify_closing(sock)
                    os.close(sock.detach())
                near, far = socket.socketpair()
                if near.fileno() != number:
                    assert far.fileno() == number
                    near, far = far, near
                near.setblocking(False)
                far.setblocking(False)
                far.send(b"of another")
                later.append((near, far))

        async def main() -> None:
            pairs = [trio.socket.socketpair() for _ in acts]
            later: list[tuple[socket.socket, socket.socket]] = []
            if has_data:
                for _, far in pairs:
                    os.write(far.fileno(), b"data")
            async with trio.open_nursery() as nursery:
                gather(nursery, crowd, 10)
                for number, (near, _) in enumerate(pairs):
                    nursery.start_soon(attempt, number, near)
                nursery.start_soon(replace, [near for near, _ in pairs], later)
                await settle()
                nursery.cancel_scope.cancel()
            for near, far in later:
                assert near.recv(100) == b"of another"
                with pytest.raises(BlockingIOError):
                    far.recv(100)
                near.close()
                far.close()
            for _, far in pairs:
                ended[100 + len(ended)] = left_in(far)
                far.close()

        run(io_manager, main)
        return sorted(ended.items(), key=lambda item: item[0])  # type: ignore[return-value]

    assert outcomes(io_manager) == outcomes("epoll")


##############################
# Many
##############################


@pytest.fixture
def descriptors() -> Iterator[int]:
    """How many may be opened, the limit having been raised as far as it goes."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield before[1] - 200
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("pairs", [300, 2500])
def test_so_many_operations_of_one_tick_are_each_cancelled_closed_or_done(
    io_manager: Any, pairs: int, descriptors: int
) -> None:
    pairs = min(pairs, descriptors // 2)

    def outcomes(io_manager: Any) -> list[object]:
        ended: list[object] = [None] * pairs

        async def attempt(number: int, sock: SocketType, scope: trio.CancelScope) -> None:
            stream = trio.SocketStream(sock)
            acts = [
                stream.receive_some,
                partial(stream.send_all, b"x"),
                partial(sock.recv, WHOLE),
                partial(sock.recv, 2),
            ]
            with scope:
                try:
                    ended[number] = await acts[number % 4]()
                except BaseException as error:
                    ended[number] = type(error)
                    if not isinstance(error, Exception):
                        raise

        async def main() -> list[object]:
            opened = [trio.socket.socketpair() for _ in range(pairs)]
            scopes = [trio.CancelScope() for _ in opened]
            choose = random.Random(1)
            for _, far in opened:
                if choose.random() < 0.5:
                    os.write(far.fileno(), b"data")
            async with trio.open_nursery() as nursery:
                for number, (near, _) in enumerate(opened):
                    nursery.start_soon(attempt, number, near, scopes[number])

                async def interfere() -> None:
                    for number, (near, far) in enumerate(opened):
                        dice = choose.randrange(6)
                        if dice == 0:
                            near.close()
                        elif dice == 1:
                            scopes[number].cancel()
                        elif dice == 2:
                            os.write(far.fileno(), b"more")

                nursery.start_soon(interfere)
                await settle()
                nursery.cancel_scope.cancel()
            rest = [left_in(sock) if sock.fileno() != -1 else None for pair in opened for sock in pair]
            for pair in opened:
                for sock in pair:
                    sock.close()
            return rest

        return [ended, run(io_manager, main)]

    expected, got = outcomes("epoll"), outcomes(io_manager)
    # what is written after a receive was begun may be received by it: then it had not been performed
    ended_differently = [pair for pair in zip(expected[0], got[0], strict=True) if pair[0] != pair[1]]  # type: ignore[call-overload]
    assert all((one, other) == (b"data", b"datamore") for one, other in ended_differently)
    whole = [
        b"".join(x for x in (end, rest) if isinstance(x, bytes)) for end, rest in zip(got[0], got[1][::2], strict=True)
    ]  # type: ignore[index]
    model = [
        b"".join(x for x in (end, rest) if isinstance(x, bytes))
        for end, rest in zip(expected[0], expected[1][::2], strict=True)
    ]  # type: ignore[index]
    assert whole == model
    assert got[1][1::2] == expected[1][1::2]  # type: ignore[index]


def test_whole_receives_of_one_tick_are_each_given_their_own_data(io_manager: Any) -> None:
    pairs = 200

    async def receive(number: int, sock: SocketType) -> None:
        data = await sock.recv(WHOLE)
        assert data == stream_of(number, WHOLE)[: len(data)]
        received[number] = data

    received: dict[int, bytes] = {}

    async def main() -> None:
        opened = [trio.socket.socketpair() for _ in range(pairs)]
        for number, (_, far) in enumerate(opened):
            assert os.write(far.fileno(), stream_of(number, WHOLE)) == WHOLE
        async with trio.open_nursery() as nursery:
            for number, (near, _) in enumerate(opened):
                nursery.start_soon(receive, number, near)
        for number, (near, far) in enumerate(opened):
            assert received[number] + left_in(near) == stream_of(number, WHOLE)
            near.close()
            far.close()
        # of the caller alone: nothing writes to it afterwards
        assert all(received[number] == stream_of(number, len(received[number])) for number in received)

    run(io_manager, main)


@pytest.mark.parametrize("pairs", [300, 2500])
def test_so_many_connections_at_once_are_each_served(io_manager: Any, pairs: int, descriptors: int) -> None:
    pairs = min(pairs, descriptors // 2)

    async def echo(sock: SocketType) -> None:
        stream = trio.SocketStream(sock)
        async for data in stream:
            await stream.send_all(data)

    async def ask(sock: SocketType, number: int) -> None:
        stream = trio.SocketStream(sock)
        for step in range(3):
            question = b"%d %d" % (number, step)
            await stream.send_all(question)
            assert await stream.receive_some() == question
        answered.append(number)
        sock.shutdown(trio.socket.SHUT_WR)

    answered: list[int] = []

    async def main() -> None:
        with ExitStack() as stack:
            async with trio.open_nursery() as nursery:
                for number in range(pairs):
                    near, far = trio.socket.socketpair()
                    stack.enter_context(near)
                    stack.enter_context(far)
                    nursery.start_soon(echo, far)
                    nursery.start_soon(ask, near, number)

    run(io_manager, main)
    assert sorted(answered) == list(range(pairs))


##############################
# Trio's own checks of a stream
##############################


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_streams_pass_trios_checks(io_manager: Any, kind: str) -> None:
    async def make() -> tuple[trio.SocketStream, trio.SocketStream]:
        near, far = trio.socket.socketpair() if kind == "unix" else tcp_pair()
        return trio.SocketStream(near), trio.SocketStream(far)

    async def make_clogged() -> tuple[trio.SocketStream, trio.SocketStream]:
        near, far = await make()
        for stream in (near, far):
            with trio.move_on_after(0.02):
                while True:
                    await stream.send_all(bytes(WHOLE))
        return near, far

    async def main() -> None:
        await trio.testing.check_half_closeable_stream(make, make_clogged if kind == "unix" else None)

    run(io_manager, main)
