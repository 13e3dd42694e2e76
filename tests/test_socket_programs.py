"""Whatever tasks do with their sockets in the same tick, each operation ends as it would on stock Trio.

A program is a list of rounds. The actions of a round are taken in one tick, in order, each by a task of its own; then
all comes to rest, and how each action has ended so far is noted. At the end what is left in the sockets is noted too.
The notes of a run on aiopoll must be those of a run on Trio's own epoll manager.

``AIOPOLL_SOCKET_EXAMPLES=5000`` runs that many random programs, different ones each time, and shrinks what fails.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

EXAMPLES: Final = int(os.environ.get("AIOPOLL_SOCKET_EXAMPLES") or 0)
PATIENCE: Final = 60.0  # seconds; what takes longer hangs
# seconds in which nothing may happen for all to be at rest: the kernel leaves some wake-ups to its workers
CUSHION: Final = 0.001
MANAGERS: Final[Mapping[str, Any]] = {
    "epoll": "epoll",
    "aiopoll": "aiopoll",
    "aiopoll without fast sockets": lambda: trio_aiopoll.AiopollIOManager(fast_sockets=False),
}
SUBJECTS: Final = [name for name in MANAGERS if name != "epoll"]


class InOrder(random.Random):
    """Takes the chance out of the order in which Trio runs its tasks: both runs must throw the same dice."""

    def random(self) -> float:
        return 1.0

    def shuffle(self, x: Any) -> None:
        x.reverse()  # Trio takes the tasks from the end


@pytest.fixture(autouse=True)
def tasks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", InOrder())


################
# What there is to act on
################


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def udp_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socket(type=socket.SOCK_DGRAM), socket.socket(type=socket.SOCK_DGRAM)
    for sock in pair:
        sock.bind(("127.0.0.1", 0))
    pair[0].connect(pair[1].getsockname())
    pair[1].connect(pair[0].getsockname())
    return pair


PAIRS: Final[Mapping[str, Callable[[], tuple[socket.socket, socket.socket]]]] = {
    "unix": socket.socketpair,
    "tcp": tcp_pair,
    "unix datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "seqpacket": lambda: socket.socketpair(type=socket.SOCK_SEQPACKET),
    "udp": udp_pair,
}


class End:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.stream = trio.SocketStream(self.sock) if sock.type == socket.SOCK_STREAM else None
        self.fd = self.sock.fileno()  # kept when the socket is detached
        self.detached = False

    def write(self, data: bytes) -> None:
        with suppress(OSError):
            os.write(self.sock.fileno(), data)

    def fill(self) -> None:
        with suppress(OSError):
            while True:
                os.write(self.sock.fileno(), bytes(4096))

    def drain(self) -> list[Any]:
        found = b""
        try:
            for _ in range(2000):
                data = os.read(self.sock.fileno(), 65536)
                if not data:
                    return [*self._told(found), "eof"]
                found += data
        except OSError as error:
            return [*self._told(found), errno.errorcode[error.errno or 0]]
        raise AssertionError("no end of data")

    def _told(self, found: bytes) -> list[tuple[int, int | None]]:
        # how much TCP takes until it is full varies, and fill() writes zeros
        return [(byte, None if byte == 0 else size) for byte, size in runs(found)]

    def close(self) -> None:
        self.sock.close()
        if self.detached:
            os.close(self.fd)


def runs(data: bytes) -> list[tuple[int, int]]:
    return [(value, sum(1 for _ in same)) for value, same in groupby(data)]


################
# Actions
################


class Action(NamedTuple):
    what: str
    end: int  # of which socket
    size: int = 0  # bytes; or which earlier action, or how
    then: tuple[Any, ...] = ()  # the actions that the same task takes afterwards


def payload(number: int, size: int) -> bytes:
    return bytes([number % 255 + 1]) * size


async def recv_into(end: End, size: int, number: int) -> object:
    buffer = bytearray(size)
    got = await end.sock.recv_into(buffer)
    return got, runs(bytes(buffer))


async def recvfrom_into(end: End, size: int, number: int) -> object:
    buffer = bytearray(size)
    got, _ = await end.sock.recvfrom_into(buffer)
    return got, runs(bytes(buffer))


async def recvfrom(end: End, size: int, number: int) -> object:
    return runs((await end.sock.recvfrom(size))[0])


async def recvmsg(end: End, size: int, number: int) -> object:
    data, ancillary, flags, _ = await end.sock.recvmsg(size, 64)
    return runs(data), ancillary, flags


# Stock Trio counts a wait for a closed socket as waiting for ever, which we don't.


async def wait_readable(end: End, size: int, number: int) -> None:
    if end.sock.fileno() != -1:
        await trio.lowlevel.wait_readable(end.sock)


async def wait_writable(end: End, size: int, number: int) -> None:
    if end.sock.fileno() != -1:
        await trio.lowlevel.wait_writable(end.sock)


async def detach(end: End, size: int, number: int) -> object:
    if end.sock.fileno() == -1:
        return None
    end.detached = True
    assert end.sock.detach() == end.fd
    return None


async def shutdown(end: End, size: int, number: int) -> None:
    # A datagram socket that is shut down is readable although it cannot be read from, and stock Trio spins.
    if end.stream is not None:
        end.sock.shutdown(size % 3)


async def reset(end: End, size: int, number: int) -> None:
    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.sock.close()


def sync(act: Callable[[End, int, int], object]) -> Callable[[End, int, int], Any]:
    async def action(end: End, size: int, number: int) -> object:
        return act(end, size, number)

    return action


def stream(act: Callable[[Any, int, int], Any]) -> Callable[[End, int, int], Any]:
    async def action(end: End, size: int, number: int) -> object:
        return None if end.stream is None else await act(end.stream, size, number)

    return action


RECEIVES: Final[Mapping[str, Callable[[End, int, int], Any]]] = {
    "recv": lambda end, size, number: end.sock.recv(size),
    "recv into": recv_into,
    "recvfrom": recvfrom,
    "recvfrom into": recvfrom_into,
    "recvmsg": recvmsg,
    "peek": lambda end, size, number: end.sock.recv(size, socket.MSG_PEEK),
    "receive some": stream(lambda stream, size, number: stream.receive_some(size)),
    "receive any": stream(lambda stream, size, number: stream.receive_some()),
    "anext": stream(lambda stream, size, number: stream.__anext__()),
    "wait readable": wait_readable,
}
SENDS: Final[Mapping[str, Callable[[End, int, int], Any]]] = {
    "send": lambda end, size, number: end.sock.send(payload(number, size)),
    "send bytearray": lambda end, size, number: end.sock.send(bytearray(payload(number, size))),
    "send memoryview": lambda end, size, number: end.sock.send(memoryview(payload(number, size))),
    "send with a flag": lambda end, size, number: end.sock.send(payload(number, size), socket.MSG_NOSIGNAL),
    "sendmsg": lambda end, size, number: end.sock.sendmsg([payload(number, size)]),
    "send all": stream(lambda stream, size, number: stream.send_all(payload(number, size))),
    "send all of a bytearray": stream(lambda stream, size, number: stream.send_all(bytearray(payload(number, size)))),
    "might not block": stream(lambda stream, size, number: stream.wait_send_all_might_not_block()),
    "wait writable": wait_writable,
}
ENDINGS: Final[Mapping[str, Callable[[End, int, int], Any]]] = {
    "close": sync(lambda end, size, number: end.sock.close()),
    "aclose": stream(lambda stream, size, number: stream.aclose()),
    "send eof": stream(lambda stream, size, number: stream.send_eof()),
    "shutdown": shutdown,
    "detach": detach,
    "reset": reset,
    "notify closing": sync(lambda end, size, number: trio.lowlevel.notify_closing(end.sock)),
}
OTHERS: Final[Mapping[str, Callable[[End, int, int], Any]]] = {
    "read": sync(lambda end, size, number: os.read(end.sock.fileno(), size)),
    "write": sync(lambda end, size, number: os.write(end.sock.fileno(), payload(number, size))),
}
PERFORM: Final = {**RECEIVES, **SENDS, **ENDINGS, **OTHERS}


def told(error: BaseException) -> tuple[object, ...]:
    number = error.errno if isinstance(error, OSError) else None
    cause = error.__cause__
    return (type(error).__name__, number and errno.errorcode[number], type(cause).__name__ if cause else None)


class World:
    def __init__(self, kinds: Sequence[str]) -> None:
        self.ends = [End(sock) for kind in kinds for sock in PAIRS[kind]()]
        self.scopes: list[trio.CancelScope] = []
        self.first_of_round = 0
        self.ended: dict[tuple[int, int], object] = {}

    async def act(self, number: int, action: Action) -> None:
        if action.what in ("cancel", "deadline"):
            # of the first task of the socket in this round, or of any in the rounds before
            earlier = self.first_of_round or 1
            scope = self.scopes[action.then[0] if action.size < 0 else action.size % earlier]
            if action.what == "cancel":
                scope.cancel()
            else:
                scope.deadline = -float("inf")
            return
        with self.scopes[number]:
            for place, one in enumerate((action, *action.then)):
                await self._perform((number, place), one)

    async def _perform(self, key: tuple[int, int], action: Action) -> None:
        try:
            value = await PERFORM[action.what](self.ends[action.end], action.size, sum(key))
        except BaseException as error:
            self.ended[key] = told(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.ended[key] = runs(value) if isinstance(value, bytes) else value

    async def round(self, nursery: trio.Nursery, actions: Sequence[Action], in_order: bool = True) -> None:
        first = self.first_of_round = len(self.scopes)
        self.scopes += [trio.CancelScope() for _ in actions]
        for number in range(first, len(self.scopes))[:: 1 if in_order else -1]:
            nursery.start_soon(self.act, number, actions[number - first])
        await trio.testing.wait_all_tasks_blocked(CUSHION)


################
# Two operations in a tick, from every state that a socket can be in
################

# What an operation meets: (state, what the peer did before)
STATES: Final[Mapping[str, Callable[[End, End], None]]] = {
    "nothing received": lambda end, peer: None,
    "data received": lambda end, peer: peer.write(bytes(range(1, 21))),
    "data and the end received": lambda end, peer: (peer.write(b"abc"), peer.sock.shutdown(1))[1],
    "the end received": lambda end, peer: peer.sock.shutdown(1),
    "nothing more can be sent": lambda end, peer: end.fill(),
    "peer gone": lambda end, peer: peer.sock.close(),
    "reset": lambda end, peer: (end.write(b"unread"), peer.sock.close())[1],
    "data received, nothing more can be sent": lambda end, peer: (peer.write(b"abcdefghijkl"), end.fill())[1],
}
FIRST: Final = [
    ("recv", 5),
    ("recv", 65536),
    ("recv into", 5),
    ("receive some", 65536),
    ("receive any", 5),
    ("anext", 5),
    ("wait readable", 5),
    ("send", 0),
    ("send", 5),
    ("send bytearray", 5),
    ("send all", 5),
    ("send all", 4096),
    ("send all", 4097),
    ("send all", 1 << 20),
]
AT_THE_TICK: Final = [("recv", 65536), ("receive any", 5), ("send", 5), ("send all", 5)]
SECOND: Final = [
    *((what, 0, size) for what in RECEIVES for size in (7, 65536)),
    *((what, 0, 7) for what in SENDS),
    *((what, 0, 1) for what in ENDINGS),
    *((what, 1, 1) for what in ENDINGS),
    ("shutdown", 0, 0),
    ("shutdown", 0, 2),
    *((what, 0, 7) for what in OTHERS),
    ("send", 1, 7),
    ("sendmsg", 1, 7),
    ("recv", 1, 7),
    ("recv", 1, 65536),
    ("cancel", 0, 0),
    ("deadline", 0, 0),
]


async def end_of_two(
    what: str, size: int, state: str, second: tuple[str, int, int], kind: str, in_order: bool
) -> list[Any]:
    world = World([kind])
    end, peer = world.ends
    notes: list[Any] = []
    STATES[state](end, peer)
    async with trio.open_nursery() as nursery:
        await world.round(nursery, [Action(what, 0, size), Action(*second)], in_order)
        notes.append(dict(world.ended))
        if peer.sock.fileno() != -1:
            notes.append(peer.drain())
            peer.write(b"late")
        await trio.testing.wait_all_tasks_blocked(CUSHION)
        notes.append(dict(world.ended))
        nursery.cancel_scope.cancel()
    notes += [world.ended, peer.drain(), end.drain()]
    for end in world.ends:
        end.close()
    return notes


@lru_cache(maxsize=200)
def ends_of_two(
    io_manager: str, what: str, size: int, kind: str, together: bool, in_order: bool = True
) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}

    async def one(state: str, second: tuple[str, int, int]) -> None:
        found[state, second] = await end_of_two(what, size, state, second, kind, in_order)

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()  # Trio's own tasks have begun to wait
        with trio.fail_after(PATIENCE):
            for state in STATES:
                if together:
                    async with trio.open_nursery() as nursery:
                        for second in SECOND:
                            nursery.start_soon(one, state, second)
                else:
                    for second in SECOND:
                        await one(state, second)

    trio.run(main, io_manager=MANAGERS[io_manager])
    return found


def of_two_tasks_that_cannot_know_of_each_other(second: tuple[str, int, int]) -> bool:
    """Whether the action goes round the socket. Trio takes the tasks of a tick in any order, so it may come first."""
    what, end, _ = second
    return end == 1 or what in OTHERS


@pytest.mark.parametrize(
    ("io_manager", "kind", "together", "what", "size"),
    [
        *(("aiopoll", "unix", True, *first) for first in FIRST),
        *(("aiopoll", "unix", False, *first) for first in AT_THE_TICK),
        *(("aiopoll", "tcp", True, *first) for first in AT_THE_TICK),
        *(("aiopoll without fast sockets", "unix", True, *first) for first in AT_THE_TICK),
    ],
)
def test_two_operations_in_a_tick_end_as_on_stock_trio(
    io_manager: str, kind: str, together: bool, what: str, size: int
) -> None:
    expected = ends_of_two("epoll", what, size, kind, together)
    got = ends_of_two(io_manager, what, size, kind, together)
    different = {case: notes for case, notes in got.items() if notes != expected[case]}
    if any(of_two_tasks_that_cannot_know_of_each_other(second) for _, second in different):
        otherwise = ends_of_two("epoll", what, size, kind, together, in_order=False)
        for case in list(different):
            if of_two_tasks_that_cannot_know_of_each_other(case[1]) and different[case] == otherwise[case]:
                del different[case]
    assert got.keys() == expected.keys()
    assert not different, "".join(
        f"\n{case}:\n  stock: {expected[case]}\n  here:  {notes}" for case, notes in different.items()
    )


################
# Random programs
################

operations = st.one_of(
    st.tuples(st.sampled_from(list(RECEIVES)), st.sampled_from([0, 1, 5, 300, 65536])),
    st.tuples(st.sampled_from(list(RECEIVES)), st.sampled_from([1, 65536])),
    st.tuples(st.sampled_from(list(SENDS)), st.sampled_from([0, 1, 5, 4096, 4097, 32768])),
    st.tuples(st.sampled_from(list(SENDS)), st.sampled_from([1, 5])),
    st.tuples(st.sampled_from(list(ENDINGS)), st.integers(0, 2)),
)
# What the tasks of a socket do in a round: one thing each; or one task does some things, one after the other, and
# others cancel it or what was begun in earlier rounds. (That operations are in conflict, stock Trio says in the same
# tick, and we may say it in the next one. What else those tasks would do, or who cancels them, could make that a
# difference.)
cancels = st.tuples(st.sampled_from(["cancel", "deadline"]), st.integers(-10, 30)).map(lambda action: [action])
tasks_of_a_socket = st.one_of(
    st.lists(operations.map(lambda operation: [operation]), min_size=1, max_size=4),
    st.tuples(st.lists(operations, min_size=1, max_size=6), st.lists(cancels, max_size=2)).map(
        lambda tasks: [tasks[0], *tasks[1]]
    ),
)
# The program may not read and write round its sockets while it does something else with them: see above.
others = st.tuples(st.sampled_from(list(OTHERS)), st.sampled_from([1, 5, 65536])).map(lambda action: [[action]])
# For some of the pairs: which of its two sockets does something in this round, and what. What the two would do in the
# same tick could take effect in any order.
rounds = st.dictionaries(
    st.integers(0, 4), st.tuples(st.booleans(), tasks_of_a_socket | others), min_size=1, max_size=5
)


# Of a pair of these the kernel says that they can be written to when so many datagrams are queued that they cannot,
# and stock Trio spins.
QUEUES: Final = ("unix datagrams", "seqpacket")
QUEUED_MAX: Final = 10


def run_program(io_manager: str, kinds: Sequence[str], program: Sequence[Mapping[int, Any]]) -> list[Any]:
    notes: list[Any] = []
    sent: Counter[int] = Counter()

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()
        world = World(kinds)
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for step in program:
                    actions = []
                    for pair, (other, chosen) in step.items():
                        first = len(world.scopes) + len(actions)
                        for task in chosen if pair < len(kinds) else ():
                            end, steps = 2 * pair + other, []
                            for what, size in task:
                                # A peer that waits may receive the first alone, or several of them.
                                if what in SENDS and any(step.what in SENDS for step in steps):
                                    continue
                                sent[end] += what in SENDS or what == "write"
                                if kinds[pair] == "tcp" and what in SENDS:  # how much TCP takes at a time varies
                                    size = min(size, 4097)
                                if kinds[pair] not in QUEUES or sent[end] < QUEUED_MAX:
                                    steps.append(Action(what, end, size))
                            if steps:
                                then = steps[1:] if task[0][0] in PERFORM else [first]
                                actions.append(steps[0]._replace(then=tuple(then)))
                    await world.round(nursery, actions)
                    statistics = trio.lowlevel.current_statistics().io_statistics
                    notes.append((dict(world.ended), statistics.tasks_waiting_read, statistics.tasks_waiting_write))
                nursery.cancel_scope.cancel()
        notes.append(world.ended)
        notes.extend(end.drain() for end in world.ends)
        for end in world.ends:
            end.close()

    trio.run(main, io_manager=MANAGERS[io_manager])
    return notes


@settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=list(Phase) if EXAMPLES else [Phase.generate],
)
@given(
    kinds=st.lists(st.sampled_from(["unix", "unix", *PAIRS]), min_size=1, max_size=5),
    program=st.lists(rounds, min_size=1, max_size=10),
)
def test_a_program_of_socket_operations_has_the_outcome_that_it_has_on_stock_trio(
    kinds: list[str], program: list[dict[int, Any]]
) -> None:
    expected = run_program("epoll", kinds, program)
    for io_manager in SUBJECTS:
        got = run_program(io_manager, kinds, program)
        for step, (one, other) in enumerate(zip(expected, got, strict=True)):
            assert other == one, f"{io_manager}, step {step} of {program} on {kinds}"
