"""Tasks that pass tokens on: each waits until its socket is readable, reads the token and passes it to the next task.

So the same number of sockets is ready at every tick, every wait has been armed before its socket gets ready, and
nothing but waits, reads and writes is going on.
"""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio
import trio.testing

from ._managers import check_waits, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._watch import Watch

TOKEN = b"x"


class Place(NamedTuple):
    sock: socket.socket
    pass_on: Callable[[], object]
    """Sends a token to the next place."""


def pairs(count: int) -> list[Place]:
    """``count`` connected pairs; the places of a pair are neighbours in the list."""
    places = []
    for _ in range(count):
        for sock in socket.socketpair():
            sock.setblocking(False)
            places.append(Place(sock, partial(os.write, sock.fileno(), TOKEN)))
    return places


def circle(order: Sequence[int]) -> list[Place]:
    """Datagram sockets of which each sends to the one that comes next in ``order``, a permutation of their indices."""
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in order]
    for sock in sockets:
        sock.bind("")  # the kernel finds a name
    names = [sock.getsockname() for sock in sockets]
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [Place(sock, partial(sock.sendto, TOKEN, names[after[index]])) for index, sock in enumerate(sockets)]


def cost_of_passing(sender: Place, receiver: Place) -> float:
    """CPU time of one token's passing when nobody waits for it, in seconds."""
    pass_on, into, spent = sender.pass_on, receiver.sock.fileno(), 0.0
    at_once, times = 8, 500
    for _ in range(times):
        start = time.thread_time()
        for _ in range(at_once):
            pass_on()
        spent += time.thread_time() - start
        for _ in range(at_once):
            os.read(into, 1)
    start = time.thread_time()
    for _ in range(times):
        time.thread_time()
    reading_the_clock = time.thread_time() - start
    return (spent - reading_the_clock) / (at_once * times)


def measure_passing(
    manager: str,
    watch: Watch,
    places: Sequence[Place],
    starters: Sequence[int],
    passes: int,
    neighbours: tuple[int, int],
) -> None:
    """Have a token sent from each of the ``starters``, indices into ``places``; stop after ``passes`` waits.

    The watch is run. What the passing would have cost if nobody had waited is taken off it, and found out between the
    two ``neighbours``. In the end the sockets are closed.
    """
    try:
        cost = cost_of_passing(*(places[index] for index in neighbours))
        _pass_tokens(manager, watch, places, starters, passes)
        watch.discount(cost * passes)
    finally:
        for place in places:
            place.sock.close()


def _pass_tokens(manager: str, watch: Watch, places: Sequence[Place], starters: Sequence[int], passes: int) -> None:
    left = passes
    finished = trio.Event()

    async def player(place: Place) -> None:
        nonlocal left
        fd, pass_on = place.sock.fileno(), place.pass_on
        while True:
            await trio.lowlevel.wait_readable(fd)
            os.read(fd, 1)
            left -= 1
            if left == 0:
                watch.stop()
                finished.set()
            pass_on()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(player, place)
            await trio.testing.wait_all_tasks_blocked()
            check_waits()
            watch.start()
            for index in starters:
                places[index].pass_on()
            await finished.wait()
            nursery.cancel_scope.cancel()

    runner(manager)(main)
