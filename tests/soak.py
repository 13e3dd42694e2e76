"""Thousands of connections on aiopoll, with random closes, cancels, timeouts, reused descriptors; nothing may be lost.

    python tests/soak.py --seconds 300 --connections 2000 --seed 1

(or ``python -m tests.soak`` with the same options).

Each connection (TCP, unix socket or pipe) carries a stream in which every byte is known in advance, so a byte that is
lost, repeated or strays in from an earlier user of the descriptor shows at once. While the bytes flow, waits are
cancelled and time out, either end closes in the middle, and the next connections take the freed descriptor numbers.

Ends with a line "0 lost" and status 0. Status 1: something was lost, was left open or held, or hung; what, it says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gc
import os
import random
import resource
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
import trio.testing

CHECKOUT: Final = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # "python -m" would find the sources here, where nothing is built, before the package that is installed
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]


import trio_aiopoll  # noqa: E402, F401

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HANG: Final = 30.0  # seconds without a byte on a connection that has something to say
REPORT_EVERY: Final = 5.0
# what a stream is made of; of a prime length, so that it lines up with no buffer
PATTERN: Final = random.Random(0).randbytes(65521)
IDLE_RINGS_MAX: Final = 4  # POOL_IDLE_MAX in _pool.h


class Lost(Exception):
    """What must not happen has happened."""


def expected(offset: int, length: int) -> bytes:
    start = offset % len(PATTERN)
    repeats = (start + length) // len(PATTERN) + 1
    return (PATTERN * repeats)[start : start + length]


class Connection:
    """Both ends of a one-way stream, and how far each has come."""

    def __init__(self, kind: str, reader: int, writer: int, seed: int) -> None:
        self.kind = kind
        self.reader = reader
        self.writer = writer
        self.seed = seed  # where in the pattern it starts: no two streams are the same
        self.sent = 0
        self.received = 0
        self.writer_open = True


class Soak:
    def __init__(self, seconds: float, connections: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.end = time.monotonic() + seconds
        self.connections = connections
        self.open = 0
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self.end

    ################
    # Connections
    ################

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        kind = self.random.choice(["tcp", "unix", "unix", "pipe"])
        if kind == "pipe":
            reader, writer = os.pipe()
        elif kind == "unix":
            reader, writer = (end.detach() for end in socket.socketpair())
        else:
            reader, writer = await self.tcp()
        self.counts[kind] += 1
        for fd in (reader, writer):
            os.set_blocking(fd, False)
        connection = Connection(kind, reader, writer, self.random.randrange(len(PATTERN)))
        self.open += 1
        try:
            yield connection
        finally:
            self.open -= 1
            self.close(connection.reader)
            if connection.writer_open:
                self.close(connection.writer)

    async def tcp(self) -> tuple[int, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        try:
            client = socket.socket()
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(listener.getsockname())
            await self.wait(listener.fileno(), "read", "a connection to accept")
            accepted, _ = listener.accept()
        finally:
            trio.lowlevel.notify_closing(listener)
            listener.close()
        # a port in TIME_WAIT is not to be had again for a minute
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await self.wait(client.fileno(), "write", "a connection to be made")
        return accepted.detach(), client.detach()

    def close(self, fd: int) -> None:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)

    ################
    # Waits
    ################

    async def wait(self, fd: int, direction: str, what: str) -> None:
        """A wait that must end, and is cancelled and begun anew on its way now and then."""
        wait = trio.lowlevel.wait_readable if direction == "read" else trio.lowlevel.wait_writable
        while self.random.random() < 0.2:
            with trio.move_on_after(self.random.choice([0, 1e-6, 1e-4, 1e-3])) as scope:
                self.counts["waits"] += 1
                await wait(fd)
            if not scope.cancelled_caught:
                return
            self.counts["timeouts"] += 1
        self.counts["waits"] += 1
        with trio.move_on_after(HANG) as scope:
            await wait(fd)
        if scope.cancelled_caught:
            raise Lost(f"{what} did not come within {HANG:.0f} s")

    async def send(self, connection: Connection, length: int) -> None:
        while connection.sent < length:
            chunk = expected(
                connection.seed + connection.sent, min(self.random.randint(1, 20000), length - connection.sent)
            )
            try:
                connection.sent += os.write(connection.writer, chunk)
            except BlockingIOError:
                await self.wait(connection.writer, "write", f"room for byte {connection.sent}")
            except (BrokenPipeError, ConnectionResetError):
                return
            if self.random.random() < 0.3:
                await trio.sleep(self.random.random() * 0.002)
        connection.writer_open = False
        self.close(connection.writer)

    async def receive(self, connection: Connection, length: int) -> None:
        while True:
            try:
                data = os.read(connection.reader, self.random.randint(1, 30000))
            except BlockingIOError:
                await self.wait(connection.reader, "read", f"byte {connection.received} of {length}")
                continue
            if not data:
                break
            if data != expected(connection.seed + connection.received, len(data)):
                raise Lost(f"the bytes from {connection.received} on are not those that were sent")
            connection.received += len(data)
            self.counts["bytes"] += len(data)
        if connection.received != length:
            raise Lost(f"{length} bytes were sent, {connection.received} received")
        self.counts["streams to the end"] += 1

    ################
    # What happens to a connection
    ################

    async def serve(self) -> None:
        while not self.time_is_up:
            async with self.connection() as connection:
                what = [self.whole, self.whole, self.cancelled, self.closed, self.contended, self.idle, self.idle]
                await self.random.choice(what)(connection)

    def length(self) -> int:
        return int(10 ** (self.random.random() * 4.8))

    async def whole(self, connection: Connection) -> None:
        length = self.length()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, connection, length)
            nursery.start_soon(self.receive, connection, length)

    async def cancelled(self, connection: Connection) -> None:
        """In the middle of it all both sides are cancelled."""
        with trio.move_on_after(self.random.random() * 0.01):
            await self.whole(connection)
        self.counts["cancels"] += 1

    async def closed(self, connection: Connection) -> None:
        """The reader's end is closed while somebody waits for it, and the writer hears of it at once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.expect_closed, connection.reader)
            await trio.sleep(self.random.random() * 0.01)
            replacement = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            trio.lowlevel.notify_closing(connection.reader)
            os.dup2(replacement, connection.reader)  # closes it; the number stays taken, for connection() to close
            os.close(replacement)
            if connection.kind == "tcp":
                await self.expect_broken(connection.writer)
            else:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    os.write(connection.writer, b"x")
                    raise Lost("the other end was closed, but is held open")
        self.counts["closes"] += 1

    async def expect_closed(self, fd: int, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with trio.move_on_after(HANG):
            try:
                await trio.lowlevel.wait_readable(fd)
            except trio.ClosedResourceError:
                return
            raise Lost("a file was readable that nobody had written to")
        raise Lost("a wait for a file that was closed did not end")

    async def expect_broken(self, fd: int) -> None:
        with trio.move_on_after(HANG):
            while True:
                try:
                    os.write(fd, b"x")
                except (BrokenPipeError, ConnectionResetError):
                    return
                await trio.sleep(0.001)  # TCP has to ask the other end
        raise Lost("the other end was closed, but is held open")

    async def contended(self, connection: Connection) -> None:
        """A second task may not wait for the same, and the first is not disturbed by it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.expect_readable, connection.reader)
            with contextlib.suppress(trio.BusyResourceError):
                await trio.lowlevel.wait_readable(connection.reader)
                raise Lost("two tasks could wait for the same")
            os.write(connection.writer, b"x")
        self.counts["contended"] += 1

    async def expect_readable(self, fd: int, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with trio.move_on_after(HANG) as scope:
            await trio.lowlevel.wait_readable(fd)
        if scope.cancelled_caught:
            raise Lost("a byte that was sent did not come")

    async def idle(self, connection: Connection) -> None:
        """Nothing comes, so the wait times out; and it has not spoilt the file for later."""
        with trio.move_on_after(2 * self.random.random()) as scope:
            await trio.lowlevel.wait_readable(connection.reader)
        if not scope.cancelled_caught:
            raise Lost("a file was readable that nobody had written to")
        self.counts["timeouts"] += 1
        await self.whole(connection)

    ################
    # The whole
    ################

    async def report(self, cancel_scope: trio.CancelScope) -> None:
        with cancel_scope:
            while True:
                await trio.sleep(REPORT_EVERY)
                statistics = trio.lowlevel.current_statistics().io_statistics
                print(
                    f"{max(0.0, self.end - time.monotonic()):6.0f} s to go: {self.open} open, "
                    f"{self.counts['waits']} waits, {self.counts['bytes'] / 1e6:.0f} MB, "
                    f"{statistics.polls_in_flight} polls in flight in {statistics.rings} rings",
                    flush=True,
                )

    async def main(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        alone = trio.lowlevel.current_statistics().io_statistics
        async with trio.open_nursery() as nursery:
            reporting = trio.CancelScope()
            nursery.start_soon(self.report, reporting)
            async with trio.open_nursery() as servers:
                for _ in range(self.connections):
                    servers.start_soon(self.serve)
            reporting.cancel()
        statistics = trio.lowlevel.current_statistics().io_statistics
        self.counts["polls cancelled"] = statistics.cancels
        self.counts["polls"] = statistics.polls_submitted
        if statistics.backend != "aiopoll":
            raise Lost("the run was not on aiopoll")
        if (statistics.tasks_waiting_read, statistics.tasks_waiting_write) != (
            alone.tasks_waiting_read,
            alone.tasks_waiting_write,
        ) or statistics.polls_in_flight > alone.polls_in_flight:
            raise Lost(f"all connections are closed, and yet: {statistics}")


################
# The process
################


def open_files() -> dict[str, str]:
    """What each descriptor of this process stands for."""
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            files[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return files


def rings_held() -> int:
    """How many AIO rings this process has, in use or not: its part of the host's AIO budget."""
    return sum(line.rstrip().endswith("/[aio] (deleted)") for line in Path("/proc/self/maps").read_text().splitlines())


def check_nothing_is_left(before: dict[str, str]) -> None:
    gc.collect()
    left = {fd: file for fd, file in open_files().items() if before.get(fd) != file}
    if left:
        raise Lost(f"descriptors left open: {left}")
    give_up = time.monotonic() + HANG
    while (rings := rings_held()) > IDLE_RINGS_MAX:  # a thread of the C core is giving them back
        if time.monotonic() > give_up:
            raise Lost(f"{rings} AIO rings are kept")
        time.sleep(0.01)


def causes(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from causes(inner)
    else:
        yield error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=2000, help="how many at a time")
    parser.add_argument("--seed", type=int, default=None, help="of the random choices; timing plays its part, too")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and 3 * options.connections + 50 > hard:
        parser.error(f"{options.connections} connections need more descriptors than the limit allows ({hard})")
    print(f"{options.connections} connections for {options.seconds:g} s, seed {seed}", flush=True)

    faulthandler.dump_traceback_later(options.seconds + 4 * HANG, exit=True)  # if it hangs as a whole
    soak = Soak(options.seconds, options.connections, seed)
    trio.run(trio.sleep, 0, io_manager="aiopoll")  # what the first run opens for good does not count
    before = open_files()
    try:
        trio.run(soak.main, io_manager="aiopoll")
        check_nothing_is_left(before)
    except BaseException as error:
        if not any(isinstance(cause, Lost) for cause in causes(error)):
            raise
        for cause in causes(error):
            print(f"LOST: {cause!r}")
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        print(", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items())))
    print("0 lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
