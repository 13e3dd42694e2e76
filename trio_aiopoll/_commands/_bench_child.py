"""The process that is measured: ``waits RIVAL READY`` or ``echo RIVAL``.

It is run as a script, and imports of trio_aiopoll only what its rival needs, so that stock Trio is stock Trio.

``echo`` prints its port and then serves. ``waits`` prints a line when it is ready; then, for each line that it reads, a
number of seconds, it waits for that long and prints what it took: the number of waits, CPU and wall clock in seconds.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOST = "127.0.0.1"
BACKLOG = 4096


def run_trio(rival: str, main: Callable[[], Awaitable[None]]) -> None:
    if rival == "epoll":
        trio.run(main)
    else:
        import trio_aiopoll

        trio_aiopoll.run(main, io_manager=rival)


def say(line: object) -> None:
    print(line, flush=True)


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def serve_on_trio() -> None:
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, echo, 0, host=HOST, backlog=BACKLOG)
        listeners: list[trio.SocketListener] = await nursery.start(serve)
        say(listeners[0].socket.getsockname()[1])


async def serve_on_asyncio() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(client, HOST, 0, backlog=BACKLOG)
    say(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class Waits:
    """Pairs of tasks that pass a byte to and fro: who is woken up reads it and writes it to the other.

    So at every tick as many sockets are ready as there are pairs, and each had been waited for before it was.
    """

    def __init__(self, ready: int) -> None:
        self._pairs = [socket.socketpair() for _ in range(ready)]
        self._count = 0
        self._passes_on = True

    async def _player(self, own: int, other: int) -> None:
        wait, read, write = trio.lowlevel.wait_readable, os.read, os.write
        while True:
            await wait(own)
            read(own, 1)
            self._count += 1
            if self._passes_on:
                write(other, b"x")

    async def _round(self, seconds: float) -> list[float]:
        self._count, self._passes_on = 0, True
        cpu, wall = time.thread_time(), time.perf_counter()
        for left, _ in self._pairs:
            os.write(left.fileno(), b"x")
        await trio.sleep(seconds)
        self._passes_on = False
        result = [self._count, time.thread_time() - cpu, time.perf_counter() - wall]
        await trio.testing.wait_all_tasks_blocked(0.001)  # the last bytes have come to rest
        return result

    async def main(self) -> None:
        for pair in self._pairs:
            for sock in pair:
                sock.setblocking(False)
        async with trio.open_nursery() as nursery:
            for left, right in self._pairs:
                # What is written at one end is read at the other, so a task's own end is where it also writes.
                nursery.start_soon(self._player, left.fileno(), left.fileno())
                nursery.start_soon(self._player, right.fileno(), right.fileno())
            await trio.testing.wait_all_tasks_blocked()
            astray = getattr(trio.lowlevel.current_statistics().io_statistics, "epoll_lane_waits", 0)
            if astray:
                raise RuntimeError(f"{astray} waits found no room in the host's AIO budget (fs.aio-max-nr)")
            say("ready")
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                say(json.dumps(await self._round(float(line))))
            nursery.cancel_scope.cancel()


def main(kind: str, rival: str, *rest: str) -> None:
    if kind == "waits":
        import trio.testing  # noqa: F401

        run_trio(rival, Waits(int(rest[0])).main)
    elif rival == "uvloop":
        uvloop: Any = importlib.import_module("uvloop")
        uvloop.run(serve_on_asyncio())
    else:
        run_trio(rival, serve_on_trio)


if __name__ == "__main__":
    main(*sys.argv[1:])
