"""Guarantee: in guest mode the host may do anything while the I/O thread sleeps in get_events, is about to, or wakes.

Two hosts: a loop of a few lines, which can stop Trio's I/O thread just before and just after it asks the kernel, and
asyncio.
"""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing
from trio._core._io_epoll import EpollIOManager  # the model

import trio_aiopoll
from trio_aiopoll._ring import Polls, RingLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import outcome

TIMEOUT: Final = 30.0
# The numbers of io_getevents, epoll_wait and epoll_pwait: what an I/O thread sleeps in.
_SLEEPS: Final = {"x86_64": ("208", "232", "281"), "aarch64": ("4", "22")}

pytestmark = pytest.mark.skipif(platform.machine() not in _SLEEPS, reason="no numbers of the system calls for here")


##############################
# A host
##############################


class Gate:
    """A place in the I/O thread where it can be made to stop."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(TIMEOUT)


class Host:
    """A host loop that does nothing but what the test tells it to. ``before`` and ``after`` stop Trio's I/O thread."""

    def __init__(self, io_manager: str) -> None:
        self.jobs: queue.Queue[Callable[[], object]] = queue.Queue()
        self.before, self.after = Gate(), Gate()
        self.outcome: outcome.Outcome[Any] | None = None
        self.io_thread: int | None = None  # while it is between the gates
        host = self
        base: Any = {"aiopoll": trio_aiopoll.AiopollIOManager, "epoll": EpollIOManager}[io_manager]

        class Gated(base):  # type: ignore[misc]
            def get_events(self, timeout: float) -> Any:
                if timeout <= 0:
                    return super().get_events(timeout)
                host.before.pass_through()
                host.io_thread = threading.get_native_id()
                try:
                    return super().get_events(timeout)
                finally:
                    host.io_thread = None
                    host.after.pass_through()

        self.make_io_manager = Gated

    def start(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        trio.lowlevel.start_guest_run(
            async_fn,
            *args,
            run_sync_soon_threadsafe=self.jobs.put,
            done_callback=self._done,
            io_manager=self.make_io_manager,
        )

    def _done(self, outcome: outcome.Outcome[Any]) -> None:
        self.outcome = outcome

    def run_until(self, condition: Callable[[], object]) -> None:
        give_up = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < give_up, "the guest run hangs"
            with suppress(queue.Empty):
                self.jobs.get(timeout=0.0002)()

    def io_thread_sleeps(self) -> bool:
        tid = self.io_thread
        if tid is None:
            return False
        call = Path(f"/proc/self/task/{tid}/syscall").read_text().split()[0]
        return call in _SLEEPS[platform.machine()] and self.io_thread == tid and self.jobs.empty()

    def run_until_asleep(self) -> None:
        self.run_until(self.io_thread_sleeps)

    def finish(self) -> Any:
        self.before.open()
        self.after.open()
        self.run_until(lambda: self.outcome is not None)
        assert self.outcome is not None
        return self.outcome.unwrap()


@pytest.fixture(params=["epoll", "aiopoll"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(request.param)
    yield host
    host.before.open()
    host.after.open()


def socketpair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


class Readers:
    """A guest: tasks that read numbered bytes, each in a scope that the host may cancel. ``stop`` ends it."""

    def __init__(self, count: int) -> None:
        self.pairs = [socketpair() for _ in range(count)]
        self.sent = [0] * count
        self.received = [0] * count
        self.cancelled = [0] * count
        self.closed = [0] * count
        self.scopes: list[trio.CancelScope | None] = [None] * count
        self.stop = trio.Event()
        self.nursery: trio.Nursery | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as self.nursery:
            for i in range(len(self.pairs)):
                self.nursery.start_soon(self.read, i, self.pairs[i][0])
            await self.stop.wait()
            self.nursery.cancel_scope.cancel()

    async def read(self, i: int, sock: socket.socket) -> None:
        while sock.fileno() >= 0:
            with trio.CancelScope() as scope:
                self.scopes[i] = scope
                try:
                    await trio.lowlevel.wait_readable(sock)
                except trio.ClosedResourceError:
                    break
                got = sock.recv(1)  # BlockingIOError: it was woken for nothing
                assert got == bytes([self.received[i] % 256])
                self.received[i] += 1
            if scope.cancelled_caught:
                self.cancelled[i] += 1
                await trio.lowlevel.checkpoint()  # the scope that encloses us may be cancelled too
        self.closed[i] += 1

    def send(self, i: int) -> None:
        self.pairs[i][1].send(bytes([self.sent[i] % 256]))
        self.sent[i] += 1

    def cancel(self, i: int) -> None:
        scope = self.scopes[i]
        assert scope is not None
        scope.cancel()

    def replace(self, i: int) -> None:
        """Close a socket under its reader and read from another, which will often get the same number."""
        a, b = self.pairs[i]
        trio.lowlevel.notify_closing(a)
        a.close()
        assert_eof(b)
        b.close()
        a, _ = self.pairs[i] = socketpair()
        self.sent[i] = self.received[i] = 0
        assert self.nursery is not None
        self.nursery.start_soon(self.read, i, a)

    def all_received(self) -> bool:
        return self.received == self.sent

    def close(self) -> None:
        for a, b in self.pairs:
            a.close()
            assert_eof(b)
            b.close()


def assert_eof(peer: socket.socket) -> None:
    try:
        while peer.recv(100):
            pass
    except ConnectionResetError:
        pass  # it was closed with unread data
    except BlockingIOError:
        raise AssertionError("the closed socket is held open") from None


##############################
# While the I/O thread sleeps
##############################


def test_a_wait_is_cancelled_and_its_file_let_go_of_while_the_io_thread_sleeps(host: Host) -> None:
    scope = trio.CancelScope()

    async def main() -> str:
        a, b = socketpair()
        with scope:
            await trio.lowlevel.wait_readable(a)
        assert scope.cancelled_caught
        a.close()
        assert_eof(b)
        b.close()
        return "done"

    host.start(main)
    host.run_until_asleep()
    scope.cancel()
    assert host.finish() == "done"


@pytest.fixture(params=["on any CPU", "on one CPU"])
def affinity(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.sched_getaffinity(0)

    def set_for_all_threads(cpus: set[int]) -> None:
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cpus)

    if request.param == "on one CPU":
        set_for_all_threads({min(before)})
    yield
    set_for_all_threads(before)


@pytest.mark.usefixtures("affinity")
def test_the_peer_of_a_socket_closed_by_the_host_sees_eof_at_once(host: Host) -> None:
    """1,000 of 1,000, each while the I/O thread sleeps."""
    readers = Readers(4)
    host.start(readers.run)
    for n in range(1000):
        host.run_until_asleep()
        readers.replace(n % 4)
    readers.stop.set()
    host.finish()
    assert sum(readers.closed) == 1000
    readers.close()


@pytest.mark.usefixtures("affinity")
def test_many_sockets_closed_at_once_by_the_host_are_let_go_of(host: Host) -> None:
    """The first wakes the I/O thread, the others meet it on its way back, or before it sleeps again."""
    readers = Readers(100)
    host.start(readers.run)
    for _ in range(10):
        host.run_until_asleep()
        for i in range(100):
            readers.replace(i)
    readers.stop.set()
    host.finish()
    assert readers.closed == [10] * 100
    readers.close()


def test_a_listener_closed_by_the_host_frees_its_port_at_once(host: Host) -> None:
    async def main(listener: socket.socket) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(listener)

    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    host.start(main, listener)
    host.run_until_asleep()
    trio.lowlevel.notify_closing(listener)
    listener.close()
    with socket.socket() as other:
        other.bind(address)  # without SO_REUSEADDR
        other.listen()
    host.finish()


def test_a_deadline_moved_by_the_host_is_kept(host: Host) -> None:
    scope = trio.CancelScope()

    async def main() -> float:
        a, b = socketpair()
        with a, b:
            with scope:
                await trio.lowlevel.wait_readable(a)
            assert scope.cancelled_caught
            trio.lowlevel.notify_closing(a)
        return trio.current_time()

    host.start(main)
    host.run_until_asleep()
    scope.deadline = trio.current_time() + 3600
    host.run_until_asleep()
    scope.deadline = deadline = trio.current_time() + 0.05
    ended = host.finish()
    assert deadline <= ended < deadline + TIMEOUT


def test_a_deadline_taken_back_by_the_host_does_not_expire(host: Host) -> None:
    scope = trio.CancelScope()
    b: list[socket.socket] = []
    deadlines: list[float] = []

    async def main() -> bytes:
        a, peer = socketpair()
        b.append(peer)
        scope.deadline = deadline = trio.current_time() + 0.2
        deadlines.append(deadline)
        with a, scope:
            await trio.lowlevel.wait_readable(a)
        assert not scope.cancelled_caught
        return b"done"

    host.start(main)
    host.run_until_asleep()
    scope.deadline = float("inf")
    host.run_until(lambda: trio.current_time() > deadlines[0])
    host.run_until_asleep()
    b[0].send(b"x")
    assert host.finish() == b"done"
    b[0].close()


def test_a_task_rescheduled_by_the_host_goes_on(host: Host) -> None:
    parked: list[trio.lowlevel.Task] = []

    async def main() -> object:
        readers = Readers(3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readers.run)
            parked.append(trio.lowlevel.current_task())
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            readers.stop.set()
        readers.close()
        return "done"

    host.start(main)
    host.run_until_asleep()
    trio.lowlevel.reschedule(parked[0])
    assert host.finish() == "done"


def test_a_system_task_spawned_by_the_host_can_wait(host: Host) -> None:
    done = trio.Event()
    a, b = socketpair()

    async def system_task() -> None:
        await trio.lowlevel.wait_readable(a)
        assert a.recv(10) == b"x"
        done.set()

    host.start(done.wait)
    host.run_until_asleep()
    trio.lowlevel.spawn_system_task(system_task)
    host.run_until_asleep()
    b.send(b"x")
    host.finish()
    a.close()
    b.close()


def test_other_threads_can_wake_the_run_while_the_io_thread_sleeps(host: Host) -> None:
    done = trio.Event()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        for _ in range(20):
            assert await trio.to_thread.run_sync(trio.from_thread.run_sync, lambda: 5) == 5
        await done.wait()

    host.start(main)
    host.run_until(lambda: tokens)
    host.run_until_asleep()
    tokens[0].run_sync_soon(done.set)
    host.finish()


##############################
# On the way to sleep and back
##############################


@contextmanager
def with_an_event_in_hand(host: Host, readers: Readers, i: int) -> Iterator[None]:
    """The I/O thread has asked the kernel and knows that a socket is readable, but Trio does not yet."""
    host.run_until_asleep()
    host.after.shut()
    readers.send(i)
    host.run_until(host.after.reached.is_set)
    yield
    host.after.open()


@contextmanager
def before_going_to_sleep(host: Host, readers: Readers, i: int) -> Iterator[None]:
    """Trio has decided to sleep, and the I/O thread has not yet asked the kernel."""
    host.run_until_asleep()
    host.before.shut()
    readers.send(i)
    host.run_until(host.before.reached.is_set)
    yield
    host.before.open()


SITUATIONS: Final = [with_an_event_in_hand, before_going_to_sleep]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_cancel_at_that_moment_loses_no_data(host: Host, situation: Any) -> None:
    readers = Readers(3)
    host.start(readers.run)
    for n in range(30):
        with situation(host, readers, 0):
            readers.cancel(0)
            readers.cancel(1)
        host.run_until(lambda n=n: readers.received[0] == readers.cancelled[1] == n + 1)  # type: ignore[misc]
    readers.stop.set()
    host.finish()
    readers.close()


def test_an_event_of_a_cancelled_wait_does_not_wake_the_next_one(host: Host) -> None:
    readers = Readers(2)
    host.start(readers.run)
    for _ in range(30):
        with with_an_event_in_hand(host, readers, 0):
            readers.cancel(0)
            readers.pairs[0][0].recv(1)  # the task, which waits again after its cancellation, finds nothing
            readers.received[0] += 1
        host.run_until_asleep()
        readers.send(0)
        host.run_until(readers.all_received)
    readers.stop.set()
    host.finish()
    assert readers.cancelled[0] == 30
    readers.close()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_close_at_that_moment_lets_go_of_the_file_and_leaves_nothing_to_its_number(
    host: Host, situation: Any
) -> None:
    readers = Readers(3)
    host.start(readers.run)
    for n in range(30):
        with situation(host, readers, 0):
            number = readers.pairs[0][0].fileno()
            readers.replace(0)
            readers.replace(1)
            assert number in {a.fileno() for a, _ in readers.pairs[:2]} | {b.fileno() for _, b in readers.pairs[:2]}
        host.run_until_asleep()
        assert readers.received[:2] == [0, 0]
        assert readers.closed[:2] == [n + 1, n + 1]
    for i in range(3):
        readers.send(i)
    host.run_until(readers.all_received)
    readers.stop.set()
    host.finish()
    readers.close()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_new_tasks_at_that_moment_get_to_wait(host: Host, situation: Any) -> None:
    readers = Readers(1)
    done: list[bytes] = []

    async def system_task(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        done.append(sock.recv(10))

    host.start(readers.run)
    for n in range(10):
        a, b = socketpair()
        with situation(host, readers, 0):
            trio.lowlevel.spawn_system_task(system_task, a)
        host.run_until_asleep()
        b.send(b"x")
        host.run_until(lambda n=n: len(done) == n + 1)  # type: ignore[misc]
        trio.lowlevel.notify_closing(a)
        a.close()
        assert_eof(b)
        b.close()
    readers.stop.set()
    host.finish()
    assert done == [b"x"] * 10
    readers.close()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_deadline_moved_at_that_moment_is_kept(host: Host, situation: Any) -> None:
    readers = Readers(2)
    host.start(readers.run)
    for n in range(10):
        with situation(host, readers, 0):
            scope = readers.scopes[1]
            assert scope is not None
            scope.deadline = trio.current_time()
        host.run_until(lambda n=n: readers.cancelled[1] == n + 1)  # type: ignore[misc]
    readers.stop.set()
    host.finish()
    readers.close()


##############################
# All at once
##############################


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_host_does_nothing_is_lost_or_delivered_twice(host: Host, seed: int) -> None:
    chance = random.Random(seed)
    readers = Readers(12)
    everybody = range(len(readers.pairs))

    def act() -> None:
        i = chance.choice(everybody)
        actions: dict[str, Callable[[int], object]] = {
            "send": readers.send,
            "cancel": readers.cancel,
            "send and cancel": lambda i: (readers.send(i), readers.cancel(i)),
            "cancel and send": lambda i: (readers.cancel(i), readers.send(i)),
            "replace": readers.replace,
            "send and replace": lambda i: (readers.send(i), readers.replace(i)),
            "expire": lambda i: setattr(readers.scopes[i], "deadline", trio.current_time()),
        }
        actions[chance.choice([*actions, "send"])](i)

    host.start(readers.run)
    host.run_until_asleep()
    for _ in range(800):
        how = chance.randrange(6)
        if how == 0:
            with with_an_event_in_hand(host, readers, chance.choice(everybody)):
                for _ in range(chance.randrange(4)):
                    act()
        elif how == 1:
            with before_going_to_sleep(host, readers, chance.choice(everybody)):
                for _ in range(chance.randrange(4)):
                    act()
        elif how == 2:
            host.run_until_asleep()
            act()
        elif how == 3:  # the I/O thread is somewhere
            act()
        elif how == 4:
            with suppress(queue.Empty):
                host.jobs.get_nowait()()
            act()
        else:  # a thread that is not the host's makes it readable at the same moment
            i = chance.choice(everybody)
            thread = threading.Thread(target=readers.send, args=(i,))
            thread.start()
            readers.cancel(i)
            thread.join()
    host.run_until(readers.all_received)
    for i in everybody:
        readers.send(i)
    host.run_until(readers.all_received)
    host.run_until_asleep()
    readers.stop.set()
    host.finish()
    readers.close()


def test_an_event_and_a_cancel_at_the_same_moment_thousands_of_times(host: Host) -> None:
    """From two threads, with nothing to keep them apart but chance."""
    readers = Readers(1)
    host.start(readers.run)
    host.run_until_asleep()
    go, stop = threading.Semaphore(0), threading.Event()

    def send() -> None:
        while go.acquire(timeout=TIMEOUT) and not stop.is_set():
            readers.send(0)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for n in range(3000):
            go.release()
            for _ in range(n % 50):
                pass
            readers.cancel(0)
            host.run_until(lambda n=n: readers.received[0] == n + 1)  # type: ignore[misc]
    finally:
        stop.set()
        go.release()
        sender.join()
    readers.stop.set()
    host.finish()
    readers.close()


##############################
# Other hosts, and none
##############################


@pytest.mark.parametrize("io_manager", ["epoll", "aiopoll"])
def test_a_guest_of_asyncio_whose_host_meddles_all_the_time(io_manager: str) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def client(listener: trio.SocketListener, number: int) -> None:
        stream = await trio.testing.open_stream_to_socket_listener(listener)
        async with stream:
            for n in range(20):
                message = b"%d:%d" % (number, n)
                await stream.send_all(message)
                received = b""
                while len(received) < len(message):
                    received += await stream.receive_some()
                assert received == message

    async def guest(readers: Readers) -> int:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as servers:
                servers.start_soon(readers.run)
                listeners = await servers.start(trio.serve_tcp, echo, 0)
                async with trio.open_nursery() as clients:
                    for number in range(20):
                        clients.start_soon(client, listeners[0], number)
                assert await trio.to_thread.run_sync(lambda: 5) == 5
                readers.stop.set()
                servers.cancel_scope.cancel()
        return 5

    async def meddle(readers: Readers) -> None:
        chance = random.Random(0)
        while True:
            await asyncio.sleep(0)
            i = chance.randrange(4)
            if readers.scopes[i] is not None and not readers.stop.is_set():
                chance.choice([readers.cancel, readers.send, readers.replace])(i)

    async def host() -> int:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        readers = Readers(4)
        trio.lowlevel.start_guest_run(
            guest,
            readers,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: done.set_result(outcome.unwrap()),
            io_manager=io_manager,
        )
        meddler = asyncio.create_task(meddle(readers))
        try:
            return await asyncio.wait_for(done, TIMEOUT)
        finally:
            meddler.cancel()

    assert asyncio.run(host()) == 5


ABANDONED: Final = """
import gc, queue, socket, sys, threading, time, warnings
import trio, trio_aiopoll

how = sys.argv[1]
jobs = queue.Queue()
sockets = [socket.socketpair() for _ in range(20)]
asleep = threading.Event()

class Announcing(trio_aiopoll.AiopollIOManager):
    def get_events(self, timeout):
        if timeout > 0:
            asleep.set()
        return super().get_events(timeout)

async def main():
    async with trio.open_nursery() as nursery:
        for a, _ in sockets:
            nursery.start_soon(trio.lowlevel.wait_readable, a)

trio.lowlevel.start_guest_run(
    main, run_sync_soon_threadsafe=jobs.put, done_callback=print, io_manager=Announcing
)
while not asleep.is_set():
    try:
        jobs.get(timeout=0.01)()
    except queue.Empty:
        pass
if how == "exit":
    sys.exit()
# the I/O thread comes back, and nobody is there to take what it brings
sockets[0][1].send(b"x")
job = jobs.get()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    del job, jobs
    for _ in range(3):
        gc.collect()
assert any("abandoned" in str(warning.message) for warning in caught), caught
# it has let go of everything, and the next run works
for a, b in sockets:
    a.close()
    b.setblocking(False)
    try:
        b.recv(1)
    except ConnectionResetError:
        pass
trio.run(trio.sleep, 0.01, io_manager="aiopoll")
"""


@pytest.mark.parametrize("how", ["collected", "exit"])
def test_an_abandoned_guest_run_neither_crashes_nor_hangs(how: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", ABANDONED, how], cwd=tmp_path, timeout=60, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_polls_finalised_before_their_run_answer_as_closed_ones() -> None:
    # what the collector does to an abandoned run, in the worse of its two orders
    a, b = socket.socketpair()
    with a, b:
        polls = Polls()
        assert polls.tick([a.fileno() * 2], 0) == []
        polls.__del__()
        polls.cancel([a.fileno() * 2])
        with pytest.raises(RingLost) as caught:
            polls.tick([a.fileno() * 2], 0)
        assert caught.value.errno == errno.ESHUTDOWN
        polls.set_busy_poll(1e-6)
        assert not polls.catch_up()
        assert polls.statistics().in_flight == 0
        polls.close()
        polls.destroy()
        polls.__del__()
