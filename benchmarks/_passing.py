"""Tasks that pass tokens on: each waits until its socket is readable, reads the token and passes it to the next task.

So the same number of sockets is ready at every tick, every wait has been armed before its socket gets ready, and
nothing but waits, reads and writes is going on.
"""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
import trio.testing
from trio._core._run import GLOBAL_RUN_CONTEXT

from ._managers import check_waits, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._watch import Watch

TOKEN = b"x"


class Place(NamedTuple):
    sock: socket.socket
    pass_on: Callable[[], object]
    """Sends a token to the next place."""
    receiver: int
    """The descriptor of that place's socket."""


def pairs(count: int) -> list[Place]:
    """``count`` connected pairs; the places of a pair are neighbours in the list."""
    places = []
    for _ in range(count):
        pair = socket.socketpair()
        for sock, other in (pair, pair[::-1]):
            sock.setblocking(False)
            places.append(Place(sock, partial(os.write, sock.fileno(), TOKEN), other.fileno()))
    return places


def circle(order: Sequence[int]) -> list[Place]:
    """Datagram sockets of which each sends to the one that comes next in ``order``, a permutation of their indices."""
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in order]
    for sock in sockets:
        sock.bind("")  # the kernel finds a name
    names = [sock.getsockname() for sock in sockets]
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        Place(sock, partial(sock.sendto, TOKEN, names[after[index]]), sockets[after[index]].fileno())
        for index, sock in enumerate(sockets)
    ]


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

    async def player(fd: int, pass_on: Callable[[], object]) -> None:
        nonlocal left
        while True:
            await trio.lowlevel.wait_readable(fd)
            os.read(fd, 1)
            left -= 1
            if left == 0:
                watch.stop()
                finished.set()
            pass_on()

    async def main() -> None:
        pass_on = [place.pass_on for place in places]
        if manager == "free":
            ready_of = GLOBAL_RUN_CONTEXT.runner.io_manager
            pass_on = [_announcing(place, ready_of) for place in places]
        async with trio.open_nursery() as nursery:
            for index, place in enumerate(places):
                nursery.start_soon(player, place.sock.fileno(), pass_on[index])
            await trio.testing.wait_all_tasks_blocked()
            check_waits()
            watch.start()
            for index in starters:
                pass_on[index]()
            await finished.wait()
            nursery.cancel_scope.cancel()

    runner(manager)(main)


def _announcing(place: Place, manager: Any) -> Callable[[], object]:
    """Pass on, and tell a manager `FreeWaits` who is ready then."""
    pass_on, receiver = place.pass_on, place.receiver

    def pass_on_and_tell() -> None:
        pass_on()
        manager.ready.append(receiver)

    return pass_on_and_tell
