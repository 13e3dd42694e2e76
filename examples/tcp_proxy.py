"""A TCP proxy on AIO polls: every connection is passed on to a target, in both directions.

    python examples/tcp_proxy.py --port 7008 --target 127.0.0.1:7007

An end that says it has sent everything is passed on alone, while the other direction goes on; a connection that is
reset is reset on the other side too, so that nobody takes a part for the whole. Its first line on standard output says
where it listens. SIGINT (Ctrl-C) and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import signal
import socket
import struct
import sys
from functools import partial

import trio

import trio_aiopoll


def reset_on_close(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def forward(source: trio.SocketStream, sink: trio.SocketStream, connection: trio.CancelScope) -> None:
    """Pass on what comes from ``source``, and then its end; if either of them breaks, both are reset."""
    try:
        async for data in source:
            await sink.send_all(data)  # a slow sink slows down its source: nothing piles up here
        await sink.send_eof()
    except trio.BrokenResourceError:
        reset_on_close(source)
        reset_on_close(sink)
        connection.cancel()


async def proxy(target: tuple[str, int], client: trio.SocketStream) -> None:
    try:
        server = await trio.open_tcp_stream(*target)
    except OSError as error:
        print(f"no connection to the target: {error}", file=sys.stderr, flush=True)
        reset_on_close(client)
        return
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(forward, client, server, nursery.cancel_scope)
        nursery.start_soon(forward, server, client, nursery.cancel_scope)


def address_of(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(host: str, port: int, target: tuple[str, int]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, partial(proxy, target), listeners)
            print("listening on", *map(address_of, listeners), flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description="A TCP proxy.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: one that is free)")
    parser.add_argument("--target", type=address, required=True, metavar="HOST:PORT", help="where connections go")
    parser.add_argument("--io-manager", choices=["aiopoll", "epoll", "auto"], default="aiopoll")
    options = parser.parse_args()
    try:
        trio_aiopoll.run(serve, options.host, options.port, options.target, io_manager=options.io_manager)
    except trio_aiopoll.UnavailableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
