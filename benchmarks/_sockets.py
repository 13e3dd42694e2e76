"""Sockets that are never readable, at one descriptor each."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def silent_sockets(count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in range(count)]
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()
