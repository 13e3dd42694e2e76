"""A run that was told to, answers whoever asks for its statistics; ``python -m trio_aiopoll top`` asks.

It listens on a Unix socket in the abstract namespace: nothing is left behind on a disk, whatever ends the process. Only
the same user and root are answered. There is no thread and no timer: until somebody asks, this is one task of the run
that waits for a connection. The answer comes from the run's own thread, so it costs one tick and is exact, and if none
comes, the run is stuck in a task, which is worth knowing too.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import struct
import threading
import time
from typing import Any, Final

import trio

from ._tick_recorder import plain_statistics

logger: Final = logging.getLogger("trio_aiopoll")

_NAMES_MAX: Final = 1000
_ANSWER_WITHIN: Final = 1.0
_PAUSE: Final = 1.0
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


def address_prefix(pid: int) -> str:
    """What the names of the sockets of that process begin with; a number follows."""
    return f"\0trio_aiopoll/{pid}/"


def peer_of(sock: Any) -> tuple[int, int]:
    """The process id and the user id of who is at the other end; of a server, of who called listen()."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def is_trusted(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        for number in itertools.count():
            try:
                listener.bind(address_prefix(os.getpid()) + str(number))
                break
            except OSError:
                if number == _NAMES_MAX:
                    raise
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


class StatisticsServer(trio.abc.Instrument):
    """Starts the server in the run whose instrument it is, and then takes itself off."""

    def after_io_wait(self, timeout: float) -> None:
        # The first tick comes before there is a nursery for system tasks.
        root = trio.lowlevel.current_root_task()
        if root is not None and root.child_nurseries:
            trio.lowlevel.remove_instrument(self)
            trio.lowlevel.spawn_system_task(_serve, name="trio_aiopoll's statistics server")


async def _serve() -> None:
    try:
        listener = trio.socket.from_stdlib_socket(_listen())
    except OSError as error:
        logger.warning("the run's statistics cannot be asked for: %s", error)
        return
    began = time.monotonic()
    with listener:
        while True:
            try:
                client, _ = await listener.accept()
                with client:
                    if is_trusted(peer_of(client)[1]):
                        with trio.move_on_after(_ANSWER_WITHIN):
                            await client.send(_answer(began), socket.MSG_NOSIGNAL)
            except Exception as error:  # in a system task it would be the end of the run
                logger.warning("the run's statistics could not be told: %r", error)
                await trio.sleep(_PAUSE)


def _answer(began: float) -> bytes:
    answer = {
        "pid": os.getpid(),
        "thread": threading.current_thread().name,
        "seconds": time.monotonic() - began,
        "statistics": plain_statistics(trio.lowlevel.current_statistics()),
    }
    return json.dumps(answer).encode()
