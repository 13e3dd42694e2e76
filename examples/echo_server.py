"""A TCP echo server on AIO polls: it sends back whatever a client sends, and ends when the client has ended.

    python examples/echo_server.py --port 7007

Its first line on standard output says where it listens. SIGINT (Ctrl-C) and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys

import trio

import trio_aiopoll


async def echo(stream: trio.SocketStream) -> None:
    # What we do not read because we cannot send, TCP makes the client keep: a slow reader holds up nobody but itself.
    with contextlib.suppress(trio.BrokenResourceError):  # the client has vanished, and so has the reason to go on
        async for data in stream:
            await stream.send_all(data)


def address_of(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(host: str, port: int) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, echo, listeners)
            print("listening on", *map(address_of, listeners), flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="A TCP echo server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: one that is free)")
    parser.add_argument("--io-manager", choices=["aiopoll", "epoll", "auto"], default="aiopoll")
    options = parser.parse_args()
    try:
        trio_aiopoll.run(serve, options.host, options.port, io_manager=options.io_manager)
    except trio_aiopoll.UnavailableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
