"""The load on an echo server: connections that each send a message, and the next one when it has come back."""

from __future__ import annotations

import resource
import select
import socket
import time
from dataclasses import dataclass
from typing import Final

HOST: Final = "127.0.0.1"
_STUCK_AFTER: Final = 20.0


@dataclass(frozen=True)
class Result:
    """Of one round.

    Attributes:
      requests: how many messages came back.
      seconds: how long it took.
      latencies: of each message, in seconds, in ascending order.
    """

    requests: int
    seconds: float
    latencies: list[float]


def raise_descriptor_limit(wanted: int) -> None:
    """Allow so many descriptors, or as many as may be had, here and in children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


class Load:
    """Connections to the port.

    Raises:
      OSError: they cannot be made.
    """

    def __init__(self, port: int, connections: int, size: int) -> None:
        self._message = bytes(size)
        self._sockets: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        try:
            for _ in range(connections):
                sock = socket.create_connection((HOST, port), timeout=_STUCK_AFTER)
                self._sockets[sock.fileno()] = sock
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
                self._epoll.register(sock, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._epoll.close()
        for sock in self._sockets.values():
            sock.close()

    def run(self, seconds: float) -> Result:
        """Keep every connection busy for so long, and then wait until the last message is back.

        Raises:
          ConnectionError: the server hung up.
          TimeoutError: it does not answer.
        """
        size, message, sockets, clock = len(self._message), self._message, self._sockets, time.perf_counter
        sent: dict[int, float] = {}
        missing: dict[int, int] = {}
        latencies: list[float] = []
        began = now = clock()
        end = began + seconds
        for fd, sock in sockets.items():
            sock.send(message)
            sent[fd], missing[fd] = clock(), size
        while missing:
            ready = self._epoll.poll(_STUCK_AFTER)
            if not ready:
                raise TimeoutError(f"{len(missing)} messages have not come back for {_STUCK_AFTER:.0f} s")
            for fd, _ in ready:
                sock = sockets[fd]
                data = sock.recv(65536)
                if not data:
                    raise ConnectionError("the server has closed a connection")
                missing[fd] -= len(data)
                if missing[fd]:
                    continue
                now = clock()
                latencies.append(now - sent[fd])
                if now < end:
                    sent[fd], missing[fd] = now, size
                    sock.send(message)
                else:
                    del missing[fd]
        latencies.sort()
        return Result(len(latencies), now - began, latencies)
