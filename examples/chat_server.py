"""A chat server on AIO polls, for clients that speak lines of text, such as ``nc`` and ``telnet``.

    python examples/chat_server.py --port 7009

A line goes to everybody else in the room. ``/nick NAME`` changes one's name, ``/who`` lists who is there, and ``/quit``
leaves; so does a client that sends no more. Its first line on standard output says where it listens. SIGINT (Ctrl-C)
and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import dataclass

import trio

import trio_aiopoll

LINE_MAX = 4096  # bytes
QUEUE_MAX = 1000  # lines that wait for one client; one that falls further behind is dropped
GOODBYE_SECONDS = 5  # for a leaving client to take the lines that still wait for it


class LineTooLong(Exception):
    pass


class LineReader:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = bytearray()

    async def read_line(self) -> str | None:
        """The printable text of the next line, None after the last."""
        searched = 0
        while (end := self.buffer.find(b"\n", searched)) < 0:
            if len(self.buffer) > LINE_MAX:
                raise LineTooLong
            searched = len(self.buffer)
            data = await self.stream.receive_some()
            if not data:
                end = searched
                break
            self.buffer += data
        if end > LINE_MAX:
            raise LineTooLong
        if not self.buffer:
            return None
        line = printable(self.buffer[:end])
        del self.buffer[: end + 1]
        return line


def printable(line: bytearray) -> str:
    return "".join(filter(str.isprintable, line.decode(errors="replace")))


@dataclass(eq=False)
class Client:
    nick: str
    queue: trio.MemorySendChannel[str]
    connection: trio.CancelScope

    def tell(self, line: str) -> None:
        """Queue a line. Never waits, so that nobody is held up by somebody who does not read."""
        try:
            self.queue.send_nowait(line)
        except trio.WouldBlock:
            self.connection.cancel()


class Room:
    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self.guests = 0

    def tell_all(self, line: str, but: Client | None = None) -> None:
        for client in self.clients.values():
            if client is not but:
                client.tell(line)

    def enter(self, queue: trio.MemorySendChannel[str], connection: trio.CancelScope) -> Client:
        self.guests += 1
        while f"guest{self.guests}" in self.clients:
            self.guests += 1
        client = Client(f"guest{self.guests}", queue, connection)
        self.clients[client.nick] = client
        client.tell(f"* welcome, {client.nick}")
        self.tell_all(f"* {client.nick} is here", but=client)
        return client

    def leave(self, client: Client) -> None:
        del self.clients[client.nick]
        self.tell_all(f"* {client.nick} has left")

    def rename(self, client: Client, nick: str) -> None:
        if not re.fullmatch(r"\w{1,20}", nick):
            client.tell("* a nick is 1 to 20 letters, digits and underscores")
        elif nick in self.clients:
            client.tell(f"* {nick} is taken")
        else:
            self.tell_all(f"* {client.nick} is now {nick}")
            self.clients[nick] = self.clients.pop(client.nick)
            client.nick = nick

    def on_line(self, client: Client, line: str) -> bool:
        """Whether the client stays."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            client.tell("* bye")
            return False
        if command == "/nick":
            self.rename(client, argument.strip())
        elif command == "/who":
            client.tell(f"* here: {', '.join(sorted(self.clients))}")
        elif command.startswith("/"):
            client.tell("* commands: /nick NAME, /who, /quit")
        elif line.strip():
            self.tell_all(f"{client.nick}: {line}", but=client)
        return True

    async def listen_to(self, client: Client, stream: trio.SocketStream) -> None:
        lines = LineReader(stream)
        try:
            while (line := await lines.read_line()) is not None and self.on_line(client, line):
                # A client may send a thousand lines at once: let those who are told empty their queues meanwhile.
                await trio.lowlevel.checkpoint()
        except LineTooLong:
            client.tell(f"* a line has at most {LINE_MAX} bytes; bye")
        except trio.BrokenResourceError:
            client.connection.cancel()

    async def speak_to(
        self, stream: trio.SocketStream, queue: trio.MemoryReceiveChannel[str], connection: trio.CancelScope
    ) -> None:
        try:
            async for line in queue:
                lines = [line]
                for _ in range(queue.statistics().current_buffer_used):
                    lines.append(queue.receive_nowait())
                await stream.send_all("".join(f"{line}\n" for line in lines).encode())
        except trio.BrokenResourceError:
            connection.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        sender, receiver = trio.open_memory_channel[str](QUEUE_MAX)
        async with trio.open_nursery() as nursery:
            client = self.enter(sender, nursery.cancel_scope)
            nursery.start_soon(self.speak_to, stream, receiver, nursery.cancel_scope)
            try:
                await self.listen_to(client, stream)
            finally:
                self.leave(client)
                sender.close()
            nursery.cancel_scope.deadline = trio.current_time() + GOODBYE_SECONDS


def address_of(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve(host: str, port: int) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, Room().serve, listeners)
            print("listening on", *map(address_of, listeners), flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat server.")
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
