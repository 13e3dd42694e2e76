"""Guarantee: no event is lost, none is delivered twice, and none reaches a wait that it was not meant for.

That is so whatever the order of wait, wake-up, cancel, close and reuse of the file descriptor's number. Trio's own
epoll manager is the model that must give the same answers; whether a file is ready, poll(2) says.
"""

from __future__ import annotations

import os
import queue
import random
import select
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PATIENCE = 60  # seconds after which something is taken for lost


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    manager: str = request.param
    return manager


def is_ready(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))


def fill(fd: int) -> None:
    while is_ready(fd, select.POLLOUT):
        os.write(fd, bytes(4096))


def drain(fd: int) -> None:
    while is_ready(fd, select.POLLIN):
        os.read(fd, 1 << 20)


#########################
# Random interleavings
#########################


@dataclass(eq=False)
class Wait:
    """A task that waits once, and how its wait has to end."""

    fd: int
    events: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    waiting: bool = True
    expected: str | None = None
    outcome: str | None = None

    async def run(self) -> None:
        wait = trio.lowlevel.wait_readable if self.events == select.POLLIN else trio.lowlevel.wait_writable
        try:
            with self.scope:
                await wait(self.fd)
                assert is_ready(self.fd, self.events), "woken, but the file is not ready"
                self.outcome = "woken"
        except trio.ClosedResourceError:
            self.outcome = "closed"
        if self.scope.cancelled_caught:
            self.outcome = "cancelled"

    def end(self, expected: str) -> None:
        if self.waiting:
            self.waiting, self.expected = False, expected


class Files:
    """One end of a pair of sockets or of a pipe, under a number that outlives the file, and the waits for it."""

    def __init__(self, choose: random.Random, keep: int | None = None) -> None:
        if choose.random() < 0.3:
            near, far = os.pipe() if choose.random() < 0.5 else os.pipe()[::-1]
        else:
            near, far = (sock.detach() for sock in socket.socketpair())
        if keep is None:
            self.near = near
        else:
            self.near = os.dup2(near, keep)
            os.close(near)
        self.far = far
        os.set_blocking(self.near, False)
        os.set_blocking(self.far, False)
        self.waits: dict[int, Wait] = {}


@pytest.mark.parametrize("seed", range(8))
def test_every_wait_ends_as_it_must_in_any_order_of_events(io_manager: str, seed: int) -> None:
    choose = random.Random(seed)
    ended: dict[str, int] = {"woken": 0, "cancelled": 0, "closed": 0}
    counts = {"steps": 0}

    async def main() -> None:
        files = [Files(choose) for _ in range(12)]
        unchecked: list[Wait] = []

        def look() -> None:
            """What the tick that has just been must have done."""
            for one in files:
                for wait in one.waits.values():
                    if wait.waiting and is_ready(wait.fd, wait.events):
                        wait.end("woken")

        def close(index: int, *, quietly: bool, same_number: bool) -> None:
            one = files[index]
            if not quietly:
                trio.lowlevel.notify_closing(one.near)
            for wait in one.waits.values():
                wait.end("closed")
            os.close(one.far)
            if not same_number:
                os.close(one.near)
            files[index] = Files(choose, keep=one.near if same_number else None)

        async with trio.open_nursery() as nursery:
            for _ in range(4000):
                counts["steps"] += 1
                index = choose.randrange(len(files))
                one = files[index]
                waiting = any(wait.waiting for wait in one.waits.values())
                # woken, say, but the task has yet to run: what woke it has to stay as it is
                ending = any(not wait.waiting and wait.outcome is None for wait in one.waits.values())
                action = choose.choice(
                    ["wait"] * 6 + ["send"] * 3 + ["cancel"] * 3 + ["fill", "drain", "close", "tick", "check"]
                )
                if action == "wait":
                    events = choose.choice([select.POLLIN, select.POLLOUT])
                    before = one.waits.get(events)
                    if before is None or before.outcome is not None:
                        wait = one.waits[events] = Wait(one.near, events)
                        unchecked.append(wait)
                        nursery.start_soon(wait.run)
                        for _ in range(2):  # in the first it begins to wait, in the second the manager looks
                            await trio.lowlevel.checkpoint()
                        look()
                elif action == "send":
                    if is_ready(one.far, select.POLLOUT):
                        os.write(one.far, b"x")
                elif action == "cancel":
                    for wait in list(one.waits.values()):
                        if choose.random() < 0.7:
                            wait.scope.cancel()
                            wait.end("cancelled")
                elif action == "fill" and not (waiting or ending):
                    fill(one.near)
                elif action == "drain":
                    drain(one.far)
                    if not (waiting or ending):
                        drain(one.near)
                elif action == "close" and not ending:
                    # without waits, nobody needs to be told
                    close(index, quietly=not waiting and choose.random() < 0.3, same_number=choose.random() < 0.7)
                elif action == "tick":
                    await trio.lowlevel.checkpoint()
                    look()
                elif action == "check":
                    await wait_all_tasks_blocked()
                    look()
                    await wait_all_tasks_blocked()
                    for wait in unchecked:
                        assert wait.outcome == wait.expected, f"in step {counts['steps']}: {wait}"
                        if wait.outcome is not None:
                            ended[wait.outcome] += 1
                    unchecked = [wait for wait in unchecked if wait.outcome is None]
            nursery.cancel_scope.cancel()
        for one in files:
            trio.lowlevel.notify_closing(one.near)
            os.close(one.near)
            os.close(one.far)

    trio.run(main, io_manager=io_manager)
    assert all(ended.values()), ended


#########################
# Late completions
#########################


async def _expect_asleep(fd: int, wake: Callable[[], object]) -> None:
    """Wait for a file that is not ready: the wait must sleep until `wake` makes it ready, and then end."""
    woken = False

    async def wait() -> None:
        nonlocal woken
        await trio.lowlevel.wait_readable(fd)
        woken = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not woken, "an earlier wait's event has woken a later wait"
        wake()
    assert woken


async def _wait_in(scope: trio.CancelScope, fd: int) -> None:
    with scope:
        await trio.lowlevel.wait_readable(fd)


@pytest.mark.parametrize("ready_first", [True, False], ids=["ready, then cancelled", "cancelled, then ready"])
@pytest.mark.parametrize("then", ["drained", "replaced by another file", "closed and its number reused"])
def test_the_event_of_a_cancelled_wait_wakes_no_later_wait(io_manager: str, then: str, ready_first: bool) -> None:
    async def main() -> None:
        for _ in range(500):
            sock, peer = socket.socketpair()
            fd = sock.detach()
            scope = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_in, scope, fd)
                await wait_all_tasks_blocked()
                steps: list[Callable[[], object]] = [lambda peer=peer: peer.send(b"x"), scope.cancel]
                for step in steps if ready_first else steps[::-1]:
                    step()
            assert scope.cancelled_caught
            if then == "drained":
                assert os.read(fd, 2) == b"x"
            else:
                if then == "closed and its number reused":
                    trio.lowlevel.notify_closing(fd)
                    os.close(fd)
                peer.close()
                sock, peer = socket.socketpair()
                if sock.fileno() != fd:
                    os.dup2(sock.fileno(), fd)
                    sock.close()
                else:
                    sock.detach()
            await _expect_asleep(fd, lambda peer=peer: peer.send(b"y"))
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
            peer.close()

    trio.run(main, io_manager=io_manager)


def test_a_wait_cancelled_while_another_thread_makes_its_file_ready_leaves_nothing_behind(io_manager: str) -> None:
    """The kernel's event and our cancel are under way at once, on two CPUs; either may win."""
    requests: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()

    def send_on_request() -> None:
        while (peer := requests.get()) is not None:
            peer.send(b"x")

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            sock, peer = socket.socketpair()
            with sock, peer:
                for _ in range(2000):
                    scope = trio.CancelScope()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_wait_in, scope, sock.fileno())
                        await wait_all_tasks_blocked()
                        requests.put(peer)
                        scope.cancel()
                    assert sock.recv(2) == b"x"  # blocks until the thread has sent it
                    await _expect_asleep(sock.fileno(), lambda: peer.send(b"y"))
                    assert sock.recv(2) == b"y"
                trio.lowlevel.notify_closing(sock)

    thread = threading.Thread(target=send_on_request)
    thread.start()
    try:
        trio.run(main, io_manager=io_manager)
    finally:
        requests.put(None)
        thread.join()


#########################
# Exactly once
#########################


def test_each_of_many_ready_at_once_is_woken_once_while_others_are_cancelled(io_manager: str) -> None:
    """More events than one look takes, round the end of the ring, and some for waits that are cancelled just then."""
    choose = random.Random(1)
    size = 400

    async def main() -> None:
        pairs = [socket.socketpair() for _ in range(size)]
        received = [0] * size
        spurious = 0
        scopes: dict[int, trio.CancelScope] = {}

        async def serve(index: int) -> None:
            nonlocal spurious
            while True:
                with trio.CancelScope() as scope:
                    scopes[index] = scope
                    await trio.lowlevel.wait_readable(pairs[index][0])
                    try:
                        pairs[index][0].recv(1, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        spurious += 1
                    received[index] += 1

        with trio.fail_after(PATIENCE):
            sent = [0] * size
            async with trio.open_nursery() as nursery:
                for index in range(size):
                    nursery.start_soon(serve, index)
                await wait_all_tasks_blocked()
                for _ in range(60):
                    for index in choose.sample(range(size), choose.randrange(size)):
                        pairs[index][1].send(b"x")
                        sent[index] += 1
                    for index in choose.sample(range(size), choose.randrange(size // 4)):
                        scopes[index].cancel()  # the byte is still there for the next wait
                    for _ in range(choose.randrange(3)):
                        await trio.lowlevel.checkpoint()
                    if choose.random() < 0.3:
                        await wait_all_tasks_blocked()
                        assert received == sent
                await wait_all_tasks_blocked()
                assert received == sent
                assert spurious == 0
                nursery.cancel_scope.cancel()
        for pair in pairs:
            for sock in pair:
                sock.close()

    trio.run(main, io_manager=io_manager)


def test_both_directions_of_a_socket_are_woken_each_for_itself(io_manager: str) -> None:
    async def main() -> None:
        sock, peer = socket.socketpair()
        log: list[str] = []

        async def wait(name: str, how: Callable[[Any], Awaitable[None]]) -> None:
            await how(sock)
            log.append(name)

        with sock, peer, trio.fail_after(PATIENCE):
            fill(sock.fileno())
            for turn in range(300):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait, "readable", trio.lowlevel.wait_readable)
                    nursery.start_soon(wait, "writable", trio.lowlevel.wait_writable)
                    await wait_all_tasks_blocked()
                    assert log == []
                    steps = [("readable", lambda: peer.send(b"x")), ("writable", lambda: drain(peer.fileno()))]
                    for name, step in steps if turn % 2 else steps[::-1]:
                        step()
                        await wait_all_tasks_blocked()
                        assert log.pop() == name
                        assert log == []
                drain(sock.fileno())
                fill(sock.fileno())

    trio.run(main, io_manager=io_manager)


def test_waits_on_two_descriptors_of_one_file_are_both_woken(io_manager: str) -> None:
    async def main() -> None:
        sock, peer = socket.socketpair()
        twin = sock.dup()
        with sock, peer, twin, trio.fail_after(PATIENCE):
            for _ in range(300):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.lowlevel.wait_readable, sock)
                    nursery.start_soon(trio.lowlevel.wait_readable, twin)
                    await wait_all_tasks_blocked()
                    peer.send(b"x")
                drain(sock.fileno())

    trio.run(main, io_manager=io_manager)


def test_bytes_from_another_thread_all_arrive_through_waits_cancelled_at_random(io_manager: str) -> None:
    """The events come from another CPU at moments that nobody chose; what is counted is what arrived."""
    choose = random.Random(2)
    total = 20_000
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def write_bytes() -> None:
        for _ in range(total):
            os.write(writer, b"x")
        os.close(writer)

    async def main() -> int:
        received = 0
        with trio.fail_after(PATIENCE):
            while True:
                with trio.move_on_after(choose.choice([0, 1e-6, 1e-5, 1])):
                    await trio.lowlevel.wait_readable(reader)
                    chunk = os.read(reader, 7)
                    if not chunk:
                        return received
                    received += len(chunk)

    thread = threading.Thread(target=write_bytes)
    thread.start()
    try:
        assert trio.run(main, io_manager=io_manager) == total
    finally:
        os.close(reader)
        thread.join()
