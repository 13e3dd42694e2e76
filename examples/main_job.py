"""The main job of this package, in one process: an echo over TCP whose every wait is an AIO poll.

    python examples/main_job.py

Starts an echo server and many clients on the loopback interface, has each client make its round trips, compares every
byte that comes back, and prints what the run's I/O manager counted. Exits with an error if a byte is wrong.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys

import trio

import trio_aiopoll


class Tally:
    """What the server has served."""

    connections = 0
    requests = 0
    bytes = 0


async def receive_exactly(stream: trio.SocketStream, count: int) -> bytes:
    """``count`` bytes, fewer only if the stream ends before."""
    data = bytearray()
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            break
        data += more
    return bytes(data)


async def echo(stream: trio.SocketStream, size: int, tally: Tally) -> None:
    """Answer requests of ``size`` bytes each."""
    tally.connections += 1
    while request := await receive_exactly(stream, size):
        await stream.send_all(request)
        tally.requests += 1
        tally.bytes += len(request)


async def make_round_trips(number: int, port: int, round_trips: int, size: int) -> None:
    noise = random.Random(number)  # no two connections send the same
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        for round_trip in range(round_trips):
            request = noise.randbytes(size)
            await stream.send_all(request)
            if await receive_exactly(stream, size) != request:
                raise AssertionError(f"connection {number}: the answer to request {round_trip} is wrong")
        await stream.send_eof()
        if await stream.receive_some() != b"":
            raise AssertionError(f"connection {number}: the server sent more than it was asked for")


async def main_job(connections: int, round_trips: int, size: int) -> None:
    tally = Tally()
    async with trio.open_nursery() as server:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.start_soon(trio.serve_listeners, lambda stream: echo(stream, size, tally), [listener])
        host, port = listener.socket.getsockname()
        print(f"{connections} clients, {round_trips} round trips of {size} bytes each, over TCP to {host}:{port}")
        start = trio.current_time()
        async with trio.open_nursery() as clients:
            for number in range(connections):
                clients.start_soon(make_round_trips, number, port, round_trips, size)
        seconds = trio.current_time() - start
        statistics = trio.lowlevel.current_statistics().io_statistics
        server.cancel_scope.cancel()
    if (tally.connections, tally.requests) != (connections, connections * round_trips):
        raise AssertionError(f"{tally.requests} requests served on {tally.connections} connections")
    print(
        f"{tally.requests} requests served on {tally.connections} connections in {seconds:.2f} s, "
        f"{tally.bytes} bytes, every one of them right"
    )
    print("the run's io_statistics:")
    for name in inspect.get_annotations(type(statistics)):
        print(f"  {name:<20} {getattr(statistics, name):>10}")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="An echo over TCP whose every wait is an AIO poll.")
    parser.add_argument("--connections", type=positive, default=64, help="clients (default: %(default)s)")
    parser.add_argument("--round-trips", type=positive, default=100, help="requests of each (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=1024, help="bytes of a request (default: %(default)s)")
    parser.add_argument("--io-manager", choices=["aiopoll", "epoll", "auto"], default="aiopoll")
    options = parser.parse_args()
    try:
        trio_aiopoll.run(
            main_job, options.connections, options.round_trips, options.size, io_manager=options.io_manager
        )
    except trio_aiopoll.UnavailableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
