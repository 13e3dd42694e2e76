"""Guarantee: a batch performs each operation that has begun once, for its task and on its socket, and no other.

Owners, tasks and traps are opaque to it, so no run of Trio is needed here.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import operator
import os
import resource
import socket
import sys
import threading
import time
import tracemalloc
import weakref
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_aiopoll._batch import Batch, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pair = tuple[socket.socket, socket.socket]
    Pairs = Callable[[], Pair]
    Reports = list[tuple[object, type[BaseException] | None]]

PATIENCE: Final = 30.0  # seconds; what takes longer hangs
WHOLE: Final = 65536  # bytes
RECEIVE: Final = 0
SEND: Final = 1
ORDERS: Final = {"receive first": (RECEIVE, SEND), "send first": (SEND, RECEIVE)}
FILENO: Final = operator.methodcaller("fileno")
NOTHING: Final[tuple[object, ...]] = ([], [], 0, [])


class Thing:
    """Something that can be seen to be gone."""

    is_done: object = None

    def __init__(self, name: str | None = "") -> None:
        self.name = name


class Task(int):
    """Whether it sleeps, a batch can see."""

    is_done: object = None


class Sleeper:
    """A task that sleeps, and is equal to what it is named."""

    is_done: object = None

    def __init__(self, name: object) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return self.name == (other.name if isinstance(other, Sleeper) else other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return repr(self.name)


OWNER: Final = Thing("owner")
CONTEXT: Final[dict[str, Any]] = {"runner": OWNER}
CROWD: Final = 4
RECEIVE_TRAP: Final = Thing("receive trap")
SEND_TRAP: Final = Thing("send trap")


class File:
    """Its fileno() does what it is told to, like a socket gone wrong."""

    def __init__(self, fileno: Callable[[], Any]) -> None:
        self.fileno = fileno


def connected(stack: ExitStack) -> Pair:
    ends = socket.socketpair()
    for end in ends:
        stack.enter_context(end).setblocking(False)
    return ends


@pytest.fixture
def pair() -> Iterator[Pairs]:
    """Makes connected sockets that are closed after the test."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with ExitStack() as stack:
        yield lambda: connected(stack)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def waiting() -> dict[int, Any]:
    return {}


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Which exceptions had nobody to go to, each with the object that was reported to have raised it."""
    reports: Reports = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append((report.object, report.exc_type)))
    return reports


def new_batch(waiting: dict[int, Any] | None = None, max_receive: int = WHOLE, max_send: int = WHOLE) -> Batch:
    waiting = {} if waiting is None else waiting
    return Batch(OWNER, CONTEXT, waiting, "is_done", FILENO, max_receive, max_receive // 2, max_send, max_send)


def open_batch(waiting: dict[int, Any] | None = None, max_receive: int = WHOLE, max_send: int = WHOLE) -> Batch:
    batch = new_batch(waiting, max_receive, max_send)
    batch.begin_tick(CROWD)
    return batch


def place_in(batch: Batch, receive_key: int = 1, send_key: int = 2) -> Any:
    """A Place, of which mypy does not know that a task may be anything."""
    place = batch.place(receive_key, send_key)
    place.set_traps(RECEIVE_TRAP, SEND_TRAP)
    return place


def ask_to_begin(
    place: Place, direction: int, task: Any, sock: Any, data: bytes | memoryview = b"x", size: int = WHOLE
) -> Any:
    CONTEXT["task"] = task if hasattr(task, "is_done") else Sleeper(task)
    return place.begin_receive(sock, size) if direction == RECEIVE else place.begin_send(sock, data)


def begin(
    place: Place, direction: int, task: Any, sock: Any, data: bytes | memoryview = b"x", size: int = WHOLE
) -> bool:
    """Whether it has begun."""
    answer = ask_to_begin(place, direction, task, sock, data, size)
    assert answer in (None, False, (RECEIVE_TRAP, SEND_TRAP)[direction])
    return bool(answer)


def who_waits(waiter: Any, key: int) -> Any:
    """The task, whether it waits itself or its operation does."""
    if not isinstance(waiter, Place):
        return waiter
    tasks = [waiter.task(direction) for direction in (RECEIVE, SEND)]
    return tasks[key % 2] if None not in tasks else tasks[tasks[0] is None]


def perform_plainly(batch: Batch, pending: list[int]) -> tuple[list[Any], list[bytes | int], int, list[Any]]:
    """What it returns, and who was ousted."""
    ousted: list[Any] = []
    return *batch.perform(pending, ousted), ousted


def perform(
    batch: Batch, waiting: dict[int, Any] | None = None
) -> tuple[dict[Any, bytes | int], dict[int, tuple[Any, Any]]]:
    """The values by task; and by key the task that now waits, with the one that did so before.

    Without `waiting`, none may block.
    """
    pending: list[int] = []
    tasks, values, failures, ousted = perform_plainly(batch, pending)
    assert not batch
    assert failures == sum(isinstance(value, int) and value < 0 for value in values)
    assert all(type(value) in (bytes, int) for value in values)
    value_by_task: dict[Any, bytes | int] = dict(zip(tasks, values, strict=True))
    others = dict(zip(ousted[::2], ousted[1::2], strict=True))
    assert len(value_by_task) == len(tasks)
    assert 2 * len(others) == len(ousted)
    assert {*others} <= {*pending}
    if waiting is None:
        assert not pending
        waiting = {}
    return value_by_task, {key: (who_waits(waiting[key], key), others.get(key)) for key in pending}


def fill(sock: socket.socket) -> int:
    """How many bytes there was room for."""
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(4096))
    return sent


def left_in(sock: socket.socket) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while data := sock.recv(WHOLE):
            found += data
    return found


##############################
# What comes of it
##############################


@pytest.mark.parametrize("number", [1, 2, 255, 256, 257, 300, 1000])
def test_of_many_operations_each_task_gets_its_own_result(pair: Pairs, waiting: dict[int, Any], number: int) -> None:
    batch = open_batch(waiting)
    data = [b"%d;" % i * (1 + i % 7) for i in range(number)]
    for i in range(number):
        near, far = pair()
        assert begin(place_in(batch, 4 * i, 4 * i + 1), SEND, ("send", i), near, data[i])
        assert begin(place_in(batch, 4 * i + 2, 4 * i + 3), RECEIVE, ("receive", i), far)
        if i % 3 == 0:  # and some that would block, among them
            assert begin(place_in(batch, -i, 1), RECEIVE, ("blocked", i), near)
        assert batch
    values, blocked = perform(batch, waiting)
    assert values == {("send", i): len(data[i]) for i in range(number)} | {
        ("receive", i): data[i] for i in range(number)
    }
    assert blocked == {-i: (("blocked", i), None) for i in range(0, number, 3)}
    assert len(waiting) == len(blocked)


@pytest.mark.parametrize("number", [8, 9, 30])
@pytest.mark.parametrize("size", [1, 4096, 65535, 65536])
def test_data_of_any_size_come_as_they_went(pair: Pairs, number: int, size: int) -> None:
    batch = open_batch()
    data = [bytes([i]) * (size - 1) + b"." for i in range(number)]
    far_places = []
    for i in range(number):
        near, far = pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * WHOLE)
        assert begin(place_in(batch), SEND, i, near, data[i])
        far_places.append((place_in(batch), far))
    assert perform(batch) == (dict.fromkeys(range(number), size), {})
    for i, (place, far) in enumerate(far_places):
        assert begin(place, RECEIVE, i, far)
    assert perform(batch) == (dict(enumerate(data)), {})


def test_a_send_that_finds_little_room_says_how_much_has_gone(pair: Pairs) -> None:
    batch = open_batch(max_send=1 << 20)
    near, far = pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = bytes(range(256)) * 4096
    assert begin(place_in(batch), SEND, "task", near, data)
    values, _ = perform(batch)
    sent = values["task"]
    assert isinstance(sent, int)
    assert 0 < sent < len(data)
    assert left_in(far) == data[:sent]


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
def test_what_would_block_is_over_and_its_task_waits(pair: Pairs, waiting: dict[int, Any], direction: int) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    fill(near)
    places = [place_in(batch, 10**30, -5) for _ in range(2)]
    key = (10**30, -5)[direction]
    assert begin(places[0], direction, "first", near)
    assert begin(places[1], direction, "second", near)
    assert not waiting
    pending = ["before"]
    assert perform_plainly(batch, pending) == ([], [], 0, [key, "first"])
    assert pending == ["before", key, key]
    assert waiting == {key: places[1]}
    assert places[0].task(direction) is places[0].socket(direction) is None
    assert (places[1].task(direction), places[1].socket(direction)) == ("second", near)
    for place in places:
        assert place.has_begun(RECEIVE) is place.has_begun(SEND) is False
        assert not begin(place, direction, "late", near)
    assert perform_plainly(batch, pending) == NOTHING


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
def test_who_came_to_wait_meanwhile_is_named_and_waits_no_longer(
    pair: Pairs, waiting: dict[int, Any], direction: int
) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    fill(near)
    place, other, bystander = place_in(batch, 10**20, 10**20 + 1), Thing("other"), Thing("bystander")
    key = 10**20 + direction
    assert begin(place, direction, "task", near)
    waiting |= {key: other, key + 2: bystander}
    assert perform(batch, waiting) == ({}, {key: ("task", other)})
    assert waiting == {key: place, key + 2: bystander}
    assert waiting.pop(key).withdraw(direction) == "task"
    assert begin(place, direction, "task", near)
    near.close()
    waiting[key] = other
    assert perform(batch) == ({"task": -errno.EBADF}, {})  # no wait: that of the other one goes on
    assert waiting == {key: other, key + 2: bystander}


def test_failures_are_negative_errnos(pair: Pairs) -> None:
    batch = open_batch()
    broken, far = pair()
    far.close()
    reset, far = pair()
    reset.send(b"unread")
    far.close()
    with socket.socket() as unconnected:
        assert begin(place_in(batch), SEND, "broken", broken)
        assert begin(place_in(batch), RECEIVE, "reset", reset)
        assert begin(place_in(batch), RECEIVE, "unconnected", unconnected)
        values, _ = perform(batch)
    assert values == {"broken": -errno.EPIPE, "reset": -errno.ECONNRESET, "unconnected": -errno.ENOTCONN}


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
def test_a_socket_closed_meanwhile_fails_and_the_next_of_its_number_is_not_touched(pair: Pairs, direction: int) -> None:
    batch = open_batch()
    near, _ = pair()
    fd = near.fileno()
    assert begin(place_in(batch), direction, "task", near)
    near.close()
    other, its_peer = pair()
    assert other.fileno() == fd
    its_peer.send(b"not yours")
    assert perform(batch) == ({"task": -errno.EBADF}, {})
    assert (left_in(other), left_in(its_peer)) == (b"not yours", b"")


##############################
# In which order
##############################


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("number", [1, 400])
def test_a_socket_has_its_operations_in_the_order_in_which_they_began(
    pair: Pairs, waiting: dict[int, Any], first: str, number: int
) -> None:
    batch = open_batch(waiting)
    sent: dict[Any, bytes | int] = {}
    received: dict[Any, bytes | int] = {}
    for i in range(number):
        near, far = pair()
        near_place, far_place = place_in(batch), place_in(batch, 3 * i)
        assert begin(far_place, RECEIVE, -1 - i, far)
        for direction in ORDERS[first]:
            assert begin(near_place, direction, (direction, i), near, b"hello")
        sent[SEND, i] = 5
        received[-1 - i] = b"hello"
        far.send(b"there")
        received[RECEIVE, i] = b"there"
    values, blocked = perform(batch, waiting)
    if first == "receive first":  # so that nothing had been sent yet
        assert blocked == {3 * i: (-1 - i, None) for i in range(number)}
        for task, _ in blocked.values():
            del received[task]
    assert values == sent | received


##############################
# What may begin
##############################


class EqualToAll:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def test_nothing_begins_that_is_not_let_in(pair: Pairs) -> None:
    """What depends on other operations and on the waits, the model below knows."""
    batch = new_batch(max_receive=8, max_send=5)
    near, _ = pair()
    place: Any = batch.place(1, 2)
    for direction in (RECEIVE, SEND):
        assert ask_to_begin(place, direction, "trap unknown", near, size=8) is None
    place.set_traps(RECEIVE_TRAP, SEND_TRAP)
    for runnable, lets_in in ((None, ()), (-1, ()), (0, (RECEIVE,)), (CROWD - 1, (RECEIVE,)), (CROWD, (RECEIVE, SEND))):
        if runnable is not None:
            batch.begin_tick(runnable)
        for direction in (RECEIVE, SEND):
            assert batch.is_open(direction) == (direction in lets_in)
            answer = ask_to_begin(place, direction, "task", near, size=8)
            assert answer is ((RECEIVE_TRAP, SEND_TRAP)[direction] if direction in lets_in else False)
            if answer:
                place.withdraw(direction)
    try:
        for owner in (None, Thing("owner"), EqualToAll()):
            CONTEXT["runner"] = owner
            for direction in (RECEIVE, SEND):
                assert ask_to_begin(place, direction, "another's", near, size=8) is None
    finally:
        CONTEXT["runner"] = OWNER
    del CONTEXT["task"]
    assert place.begin_receive(near, 8) is place.begin_send(near, b"1") is None
    CONTEXT["task"] = "task"
    in_thread: list[object] = []
    thread = threading.Thread(
        target=lambda: in_thread.extend([place.begin_receive(near, 8), place.begin_send(near, b"")])
    )
    thread.start()
    thread.join(PATIENCE)
    assert in_thread == [None, None]
    for size in (7, 9, 0, -1, 1 << 99, -1 << 99):
        assert place.begin_receive(near, size) is False
    large = b"123456", memoryview(b"123456"), memoryview(b"12345678").cast("i"), memoryview(bytes(16)).cast("b", (4, 4))
    for data in (*large, memoryview(b"12345678")[::2]):
        assert place.begin_send(near, data) is False
    released = memoryview(b"1")
    released.release()
    assert place.begin_send(near, released) is False
    for size in (8.0, True, "8", None):
        assert place.begin_receive(near, size) is None
    for data in (bytearray(b"1"), "1", None, 1):
        assert place.begin_send(near, data) is None
    assert not batch
    assert begin(place, SEND, "task", near, b"12345")
    assert begin(place, RECEIVE, "task", near, size=8)


def test_what_is_not_for_the_tick_is_not_told_to_overtake(pair: Pairs) -> None:
    batch = open_batch(max_send=5)
    near, _ = pair()
    place = place_in(batch)
    assert ask_to_begin(place, SEND, "large", near, b"123456") is False
    assert begin(place, RECEIVE, "task", near)
    assert ask_to_begin(place, SEND, "large", near, b"123456") is None
    place.withdraw(RECEIVE)
    assert begin(place, SEND, "task", near)
    assert ask_to_begin(place, RECEIVE, "small", near, size=3) is None


def test_a_memoryview_that_is_too_large_is_not_copied_first(pair: Pairs) -> None:
    size = 1 << 20
    one_item = (ctypes.c_char * size * 1)()
    batch = open_batch(max_send=1000)
    near, _ = pair()
    place = place_in(batch)
    CONTEXT["task"] = "task"
    for view in (memoryview(bytes(size)), memoryview(bytes(size)).cast("B", [1, size]), memoryview(one_item)):
        tracemalloc.start()
        try:
            assert place.begin_send(near, view) is False
            assert tracemalloc.get_traced_memory()[1] < size // 2
        finally:
            tracemalloc.stop()


def test_a_memoryview_is_sent_as_it_was(pair: Pairs) -> None:
    batch = open_batch(max_send=5)
    near, far = pair()
    data = bytearray(b"12345")
    assert begin(place_in(batch), SEND, "task", near, memoryview(data))
    data[:] = b"other"
    assert perform(batch) == ({"task": 5}, {})
    assert left_in(far) == b"12345"


def test_a_place_that_brought_much_receives_at_once_until_told_better(pair: Pairs) -> None:
    batch = open_batch(max_receive=8)
    near, far = pair()
    place = place_in(batch)
    for size in (4, 5):
        far.send(b"12345678"[:size])
        assert begin(place, RECEIVE, "task", near, size=8)
        assert perform(batch) == ({"task": b"12345678"[:size]}, {})
    assert ask_to_begin(place, RECEIVE, "task", near, size=8) is False
    place.received(5)
    assert ask_to_begin(place, RECEIVE, "task", near, size=8) is False
    place.received(4)
    assert begin(place, RECEIVE, "task", near, size=8)


def test_after_a_slow_tick_sends_are_not_let_in_for_twenty_times_as_long() -> None:
    batch = open_batch()
    batch.end_tick()
    batch.begin_tick(CROWD)
    assert batch.is_open(SEND)
    began = time.monotonic()
    busy_until = began + 0.002 + 50e-6 * CROWD
    while time.monotonic() < busy_until:
        pass
    batch.end_tick()
    took = time.monotonic() - began
    batch.begin_tick(CROWD)
    if time.monotonic() < began + 20 * 0.002:
        assert not batch.is_open(SEND)
        assert batch.is_open(RECEIVE)
    deadline = time.monotonic() + PATIENCE
    while not batch.is_open(SEND) and time.monotonic() < deadline:
        batch.begin_tick(CROWD)
    assert began + 20 * 0.002 < time.monotonic() < deadline
    assert time.monotonic() - began < 30 * took + 1


def resumed(batch: Batch, keys: list[int]) -> list[Any]:
    others: list[Any] = batch.resume(keys)
    return others


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
def test_what_waits_is_resumed_for_its_key_and_performed(pair: Pairs, waiting: dict[int, Any], direction: int) -> None:
    batch = open_batch(waiting)
    near, far = pair()
    fill(near)
    place, bystander, task = place_in(batch, 10**20, 10**20 + 1), Thing("bystander"), Task(1)
    key = 10**20 + direction
    waiting[5] = bystander
    assert begin(place, direction, task, near)
    assert perform(batch, waiting) == ({}, {key: (task, None)})
    assert resumed(batch, [3, 5, "lost", key + 2]) == [3, 5, "lost", key + 2]  # type: ignore[list-item]
    assert not batch
    assert resumed(batch, [3, key, 5]) == [3, 5]
    assert waiting == {5: bystander}
    assert batch
    assert place.has_begun(direction)
    assert not place.has_begun(1 - direction)
    assert perform(batch, waiting) == ({}, {key: (task, None)})  # it was too soon
    left_in(far)
    far.send(b"hello")
    assert resumed(batch, [key, key]) == [key]
    assert perform(batch) == ({task: b"hello" if direction == RECEIVE else 1}, {})
    assert left_in(far) == (b"" if direction == RECEIVE else b"x")


def test_for_a_task_that_goes_on_already_nothing_is_received(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, far = pair()
    place, task = place_in(batch, 6, 7), Task(1)
    assert begin(place, RECEIVE, task, near)
    assert perform(batch, waiting) == ({}, {6: (task, None)})
    task.is_done = "somebody has woken it"
    far.send(b"data")
    assert resumed(batch, [6]) == []
    assert not batch
    assert not waiting
    assert place.task(RECEIVE) is place.socket(RECEIVE) is None
    assert left_in(near) == b"data"


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
@pytest.mark.parametrize("position", [0, 1, 4])
def test_nothing_is_done_for_a_task_that_goes_on_already(
    pair: Pairs, waiting: dict[int, Any], direction: int, position: int
) -> None:
    batch = open_batch(waiting)
    places, ends, tasks = [place_in(batch) for _ in range(5)], [pair() for _ in range(5)], [Task(i) for i in range(5)]
    for place, (near, far), task in zip(places, ends, tasks, strict=True):
        far.send(b"data")
        assert begin(place, direction, task, near)
    tasks[position].is_done = "somebody has woken it"
    values, _ = perform(batch)
    assert values == {task: b"data" if direction == RECEIVE else 1 for task in tasks if task != position}
    assert places[position].task(direction) is places[position].socket(direction) is None
    near, far = ends[position]
    assert (left_in(near), left_in(far)) == (b"data", b"")
    assert begin(places[position], direction, Task(9), near)


def test_what_was_copied_is_not_kept_by_who_has_to_wait(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    fill(near)
    place, pending = place_in(batch, 6, 7), []
    for data in (memoryview(b"x"), b"x"):
        assert begin(place, SEND, Task(1), near, data)
        assert perform_plainly(batch, pending) == NOTHING
        assert pending.pop() == 7
        assert (place.task(SEND) is None) == (type(data) is memoryview)
        assert waiting.pop(7) == (1 if type(data) is memoryview else place)
    assert place.withdraw(SEND) == 1


def test_what_was_withdrawn_is_not_resumed(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    place = place_in(batch, 6, 7)
    assert begin(place, RECEIVE, Task(1), near)
    perform(batch, waiting)
    place.withdraw(RECEIVE)
    assert resumed(batch, [6]) == []
    assert not waiting
    assert perform_plainly(batch, []) == NOTHING


def test_a_receive_can_wait_without_being_tried(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, far = pair()
    far.send(b"data")
    place, task, pending = place_in(batch, 6, 7), Task(1), [1]
    assert not place.wait(RECEIVE, pending)
    assert begin(place, RECEIVE, task, near)
    waiting[6] = "another one"
    assert not place.wait(RECEIVE, pending)
    del waiting[6]
    assert pending == [1]
    assert place.wait(RECEIVE, pending)
    assert pending == [1, 6]
    assert waiting == {6: place}
    assert not batch
    assert not place.wait(RECEIVE, pending)
    place.close()
    assert not place.wait(RECEIVE, pending)
    assert resumed(batch, [6]) == []
    assert perform(batch) == ({task: b"data"}, {})


def test_a_closed_place_begins_nothing_but_ends_what_it_began(pair: Pairs) -> None:
    batch = open_batch()
    near, far = pair()
    place, other = place_in(batch), place_in(batch)
    assert begin(place, SEND, "task", near)
    assert begin(other, SEND, "withdrawn", far)
    for closed in (place, other, place):
        closed.close()
    for closed in (place, other):
        with pytest.raises(RuntimeError, match="the place is closed"):
            closed.set_traps(RECEIVE_TRAP, SEND_TRAP)
    assert not begin(place, RECEIVE, "late", near)
    assert other.withdraw(SEND) == "withdrawn"
    assert not begin(other, SEND, "late", far)
    assert perform(batch) == ({"task": 1}, {})
    assert not begin(place, SEND, "late", near)
    assert (left_in(near), left_in(far)) == (b"", b"x")


##############################
# Bad input
##############################


class Key(int):
    """A key that has a say when it is looked up."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError


INTEGER: Final = "cannot be interpreted as an integer"
KEYS: Final = "a place's keys must be ints"
MAX_RECEIVE: Final = r"max_receive must be from 1 to \d+ \(bytes\), not "
DIRECTION: Final = "direction must be 0, to receive, or 1, to send, not "
BAD_INPUT: Final[dict[str, tuple[Any, str]]] = {
    "Batch()": (TypeError, "argument 'owner'"),
    "Batch(1)": (TypeError, "argument 'context'"),
    "Batch(1, [], {}, '', len, 1, 1, 1, 1)": (TypeError, "must be dict, not list"),
    "Batch(1, {}, [], '', len, 1, 1, 1, 1)": (TypeError, "must be dict, not list"),
    "Batch(1, {}, {}, 1, len, 1, 1, 1, 1)": (TypeError, "must be str, not int"),
    "Batch(1, {}, {}, '', 1, 1, 1, 1, 1)": (TypeError, "fileno must be callable, not 1"),
    "Batch(1, {}, {}, '', len, '1', 1, 1, 1)": (TypeError, INTEGER),
    "Batch(1, {}, {}, '', len, 1, 1, 1.0, 1)": (TypeError, INTEGER),
    "Batch(1, {}, {}, '', len, 0, 1, 1, 1)": (ValueError, MAX_RECEIVE + "0$"),
    "Batch(1, {}, {}, '', len, -1, 1, 1, 1)": (ValueError, MAX_RECEIVE + "-1$"),
    "Batch(1, {}, {}, '', len, sys.maxsize, 1, 1, 1)": (ValueError, MAX_RECEIVE + str(sys.maxsize)),
    "Batch(1, {}, {}, '', len, sys.maxsize // 8, 1, 1, 1)": (MemoryError, "^$"),
    "Place()": (TypeError, "cannot create .*Place"),
    "object.__new__(Place)": (TypeError, "Place"),
    "Place.close(batch)": (TypeError, "Place"),
    "batch.place(1)": (TypeError, r"place\(\) takes .*2"),
    "batch.place([], 2)": (TypeError, KEYS),
    "batch.place(1, None)": (TypeError, KEYS),
    "batch.place(1, True)": (TypeError, KEYS),
    "batch.place(Key(1), 2)": (TypeError, KEYS),
    "batch.place(1, 1)": (ValueError, "a place's keys must not be equal"),
    "batch.begin_tick('1')": (TypeError, "an integer is required|" + INTEGER),
    "batch.begin_tick(1 << 99)": (OverflowError, "too large"),
    "batch.end_tick(1)": (TypeError, "takes no arguments"),
    "batch.is_open(2)": (ValueError, DIRECTION + "2"),
    "batch.perform([])": (TypeError, "perform takes pending and ousted"),
    "batch.perform([], (), 1)": (TypeError, "perform takes pending and ousted"),
    "batch.perform([], ())": (TypeError, "pending and ousted must be lists"),
    "batch.perform((), [])": (TypeError, "pending and ousted must be lists"),
    "batch.resume(1)": (TypeError, "not iterable"),
    "batch.resume([[]])": (TypeError, "unhashable"),
    "batch.lone_receive(1)": (TypeError, "takes no arguments"),
    "place.close(1)": (TypeError, "takes no arguments"),
    "place.set_traps(1)": (TypeError, r"set_traps\(\) takes .*2"),
    "place.set_traps(None, 2)": (TypeError, "a trap must not be None"),
    "place.set_traps(1, None)": (TypeError, "a trap must not be None"),
    "place.begin_receive(1)": (TypeError, "begin_receive takes socket and size"),
    "place.begin_send(1)": (TypeError, "begin_send takes socket and data"),
    "place.received('1')": (TypeError, "an integer is required|" + INTEGER),
    "place.has_begun(2)": (ValueError, DIRECTION + "2"),
    "place.wait(0)": (TypeError, r"wait\(\) takes .*2"),
    "place.wait(0, ())": (TypeError, "must be list, not tuple"),
    "place.wait(2, [])": (ValueError, DIRECTION + "2"),
    "place.task(2)": (ValueError, DIRECTION + "2"),
    "place.socket(-1)": (ValueError, DIRECTION + "-1"),
    "place.withdraw(2)": (ValueError, DIRECTION + "2"),
    "place.task('0')": (TypeError, INTEGER),
    "place.withdraw(1 << 99)": ((ValueError, OverflowError), "direction|too large"),
    "place.withdraw(0)": (RuntimeError, "no operation to withdraw"),
}


@pytest.mark.parametrize("call", BAD_INPUT)
def test_bad_input_is_refused_with_the_reason(call: str) -> None:
    error, reason = BAD_INPUT[call]
    batch = open_batch()
    place = place_in(batch)
    with pytest.raises(error, match=reason):
        eval(call, globals(), {"batch": batch, "place": place})
    assert not batch


def raising(error: BaseException) -> Callable[[], Any]:
    def fileno() -> Any:
        raise error

    return fileno


# of a socket, what does as if it were one; and which exception is reported
FAULTS: Final[dict[str, tuple[Callable[[socket.socket], object], type[BaseException] | None]]] = {
    "no fileno": (lambda _: None, AttributeError),
    "OSError": (lambda _: File(raising(OSError(5, "no"))), OSError),
    "KeyboardInterrupt": (lambda _: File(raising(KeyboardInterrupt())), KeyboardInterrupt),
    "str": (lambda _: File(lambda: "3"), TypeError),
    "float": (lambda _: File(lambda: 3.0), TypeError),
    "1 << 99": (lambda _: File(lambda: 1 << 99), OverflowError),
    "-1 << 99": (lambda _: File(lambda: -1 << 99), OverflowError),
    "1 << 31": (lambda _: File(lambda: 1 << 31), None),
    "(1 << 31) - 1": (lambda _: File(lambda: (1 << 31) - 1), None),
    "(1 << 32) + n": (lambda sock: File(lambda: (1 << 32) + sock.fileno()), None),
    "-1": (lambda _: File(lambda: -1), None),
    "n - (1 << 32)": (lambda sock: File(lambda: sock.fileno() - (1 << 32)), None),
}


@pytest.mark.parametrize("direction", [RECEIVE, SEND])
@pytest.mark.parametrize("position", [0, 256, 257])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_operation_is_its_own(
    pair: Pairs, unraisable: Reports, name: str, position: int, direction: int
) -> None:
    make_fault, error = FAULTS[name]
    batch = open_batch(max_receive=1)
    near, far = pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * WHOLE)
    fault = make_fault(near)
    places = [place_in(batch) for _ in range(300)]
    data = [bytes([i % 256]) for i in range(300)]
    for _ in range(2):
        if direction == RECEIVE:
            far.send(b"".join(data))
        for i, place in enumerate(places):
            place.received(0)
            assert begin(place, direction, i, fault if i == position else near, data[i], 1)
        values, _ = perform(batch)
        assert values.pop(position) == -errno.EBADF
        assert [*values] == [i for i in range(300) if i != position]
        if direction == RECEIVE:
            assert [*values.values()] == data[:299]
            assert left_in(near) == data[299]
        else:
            assert [*values.values()] == [1] * 299
            assert left_in(far) == b"".join(data[:position] + data[position + 1 :])
        assert [place.task(direction) for place in places] == [None] * 300
    assert {*unraisable} == ({(fault, error)} if error else set())  # it may be asked again for its descriptor
    assert perform_plainly(batch, []) == NOTHING


INSIDE: Final = {
    "batch.perform([], [])": "the batch is being performed",
    "batch.resume([])": "the batch is being performed",
    "place.wait(SEND, [])": False,
    "begin(place, SEND, 'again', near)": False,
    "begin(place, RECEIVE, 'inner', near)": False,
    "begin(last, SEND, 'inner', near)": False,
    "place.withdraw(SEND)": "the operation is being performed",
    "other.withdraw(SEND)": "the operation is being performed",
    "last.withdraw(RECEIVE)": "the operation is being performed",
    "place.withdraw(RECEIVE)": "there is no operation to withdraw",
    "[each.close() for each in (place, other, last)] and None": None,
    "batch.begin_tick(-1)": None,
    "place.set_traps(RECEIVE_TRAP, SEND_TRAP)": None,
    "gc.collect() and (place.task(SEND), other.socket(SEND)) and None": None,
}


@pytest.mark.parametrize("call", INSIDE)
def test_what_is_being_performed_cannot_be_changed_by_a_fileno(pair: Pairs, call: str) -> None:
    batch = open_batch()
    near, far = pair()
    place, other, last = places = [place_in(batch) for _ in range(3)]
    inner: list[object] = []

    names = {"batch": batch, "place": place, "other": other, "last": last, "near": near}

    def fileno() -> int:
        try:
            inner.append(eval(call, globals(), names))
        except RuntimeError as error:
            inner.append(str(error))
        return near.fileno()

    assert begin(place, SEND, "task", File(fileno), b"1")
    assert begin(other, SEND, "other", near, b"2")
    assert begin(last, RECEIVE, "last", far)
    assert perform(batch) == ({"task": 1, "other": 1, "last": b"12"}, {})
    assert inner == [INSIDE[call]]
    assert [place.task(direction) for place in places for direction in (RECEIVE, SEND)] == [None] * 6
    batch.begin_tick(CROWD)
    assert begin(place, SEND, "again", near) == bool(batch) == ("close" not in call)


class Closing:
    """A task whose end closes a socket, the number of which passes to another."""

    is_done: object = True

    def __init__(self, sock: socket.socket, other: socket.socket) -> None:
        self.sock, self.other = sock, other

    def __del__(self) -> None:
        number = self.sock.fileno()
        self.sock.close()
        assert os.dup(self.other.fileno()) == number


def test_the_end_of_a_task_that_goes_on_already_has_nothing_sent_to_another_socket(pair: Pairs) -> None:
    batch = open_batch()
    (near, _), (other, far), (third, _) = pair(), pair(), pair()
    number = near.fileno()
    assert begin(place_in(batch, 1, 2), SEND, "task", near, b"secret")
    assert begin(place_in(batch, 3, 4), RECEIVE, Closing(near, other), third)
    CONTEXT.pop("task", None)  # in the batch alone
    assert perform(batch) == ({"task": -errno.EBADF}, {})
    with pytest.raises(BlockingIOError):
        far.recv(100)
    os.close(number)


class Withdrawing:
    """A task that, asked whether it sleeps, withdraws what it has begun."""

    place: Any = None

    @property
    def is_done(self) -> object:
        if self.place is not None:
            self.place.withdraw(RECEIVE)
        return None


def test_an_operation_may_be_withdrawn_while_it_is_resumed(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    task = Withdrawing()
    place = place_in(batch)
    assert begin(place, RECEIVE, task, near)
    perform_plainly(batch, [])
    task.place = place
    assert batch.resume([1]) == []
    assert not batch
    assert perform_plainly(batch, []) == NOTHING


class ClosingKey(int):
    place: Any = None
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        self.place.close()
        return False


def test_a_place_may_be_closed_while_it_is_seen_who_waits_for_its_key(pair: Pairs, waiting: dict[int, Any]) -> None:
    batch = open_batch(waiting)
    near, _ = pair()
    key = ClosingKey(1)
    waiting[key] = "somebody"
    key.place = place_in(batch, 1, 2)
    assert not begin(key.place, RECEIVE, "task", near)
    assert perform_plainly(batch, []) == NOTHING


class Other(socket.socket):
    """Its own fileno() is not what is asked."""

    def fileno(self) -> int:
        raise ZeroDivisionError


def test_a_method_of_sockets_is_asked_of_each_kind_of_them(pair: Pairs, unraisable: Reports) -> None:
    batch = Batch(OWNER, CONTEXT, {}, "is_done", socket.socket.fileno, WHOLE, WHOLE, WHOLE, WHOLE)
    batch.begin_tick(CROWD)
    near, far = pair()
    closed, _ = pair()
    closed.close()
    other = Other(fileno=far.detach())
    no_socket = File(lambda: near._sock.fileno())  # type: ignore[attr-defined]
    kinds: dict[str, tuple[Any, int]] = {
        "near": (near, 1),
        "other": (other, 1),
        "closed": (closed, -errno.EBADF),
        "no socket": (no_socket, -errno.EBADF),
    }
    order = ["near", "near", "other", "near", "closed", "other", "no socket", "near", "no socket", "closed"]
    for names in (order, order[::-1]):
        for i, name in enumerate(names):
            assert begin(place_in(batch, 2 * i, 2 * i + 1), SEND, i, kinds[name][0], b"x")
        assert perform(batch) == ({i: kinds[name][1] for i, name in enumerate(names)}, {})
    assert unraisable == [(no_socket, TypeError)] * 4
    socket.close(other.detach())


##############################
# What it asks of a task
##############################


class Plain:
    def __init__(self, is_done: object) -> None:
        self.is_done = is_done


class Slotted:
    __slots__ = ("is_done",)

    def __init__(self, is_done: object) -> None:
        self.is_done = is_done


class HalfSlotted(Slotted):
    """It has a dict as well, in which there are others of the same names; they do not count."""

    def __init__(self, is_done: object) -> None:
        super().__init__(is_done)
        vars(self).update(is_done=not is_done)


class Computed:
    def __init__(self, is_done: object) -> None:
        self._is_done = is_done

    @property
    def is_done(self) -> object:
        return self._is_done


class Sought:
    def __init__(self, is_done: object) -> None:
        self.answers = {"is_done": is_done}

    def __getattr__(self, name: str) -> object:
        return self.answers[name]


class SlottedAndSought(Slotted):
    """It answers for itself, whatever is in its slots."""

    def __init__(self, is_done: object) -> None:
        self.is_done = not is_done
        answers[id(self)] = {"is_done": is_done}

    def __getattribute__(self, name: str) -> object:
        return answers[id(self)].get(name) if name == "is_done" else object.__getattribute__(self, name)


answers: Final[dict[int, dict[str, object]]] = {}
KINDS_OF_TASK: Final[list[Any]] = [Plain, Slotted, HalfSlotted, Computed, Sought, SlottedAndSought]


@pytest.mark.parametrize("first", KINDS_OF_TASK)
@pytest.mark.parametrize("second", KINDS_OF_TASK)
def test_a_task_may_have_its_attribute_in_any_way(pair: Pairs, first: Any, second: Any) -> None:
    batch = open_batch()
    tasks = [kind(is_done) for kind in (first, second, first) for is_done in (None, None, True)]
    places = [place_in(batch, 2 * i, 2 * i + 1) for i in range(len(tasks))]
    near, _ = pair()
    for task, place in zip(tasks, places, strict=True):
        CONTEXT["task"] = task
        assert place.begin_send(near, b"x") is SEND_TRAP
    del CONTEXT["task"]
    done, values, _, _ = perform_plainly(batch, [])
    assert done == [task for task in tasks if task.is_done is None]
    assert values == [1] * 6


##############################
# What it keeps alive
##############################


class Scene:
    """One place of a batch, and all that it is given."""

    def __init__(self, pair: Pairs, unraisable: Reports) -> None:
        self.owner, self.task, self.other_task, self.receive_trap, self.send_trap = (Thing(None) for _ in range(5))
        self.waiting: dict[int, Any] = {}
        self.keys = (10**20, 10**20 + 1)
        self.data = bytes(100)
        self.near, self.far = pair()
        self.bad = File(lambda: str(10**9))  # each time an object of its own
        self.unraisable = unraisable
        self.context: dict[str, Any] = {"runner": self.owner, "task": self.task}
        self.batch = Batch(self.owner, self.context, self.waiting, "name", FILENO, WHOLE, WHOLE, WHOLE, WHOLE)
        self.batch.begin_tick(CROWD)
        self.place, self.other = (self.new_place() for _ in range(2))

    def new_place(self) -> Place:
        place = self.batch.place(*self.keys)
        place.set_traps(self.receive_trap, self.send_trap)
        return place

    def things(self) -> list[Any]:
        return [*vars(self).values(), *self.keys]

    def begin(self, place: Place, direction: int, sock: object = None) -> object:
        file: Any = sock or self.near
        return place.begin_receive(file, WHOLE) if direction == RECEIVE else place.begin_send(file, self.data)


def perform_them(scene: Scene) -> None:
    assert scene.begin(scene.place, SEND)
    assert scene.begin(scene.other, RECEIVE, scene.far)
    assert scene.begin(scene.place, RECEIVE)
    assert scene.begin(scene.new_place(), SEND, File(lambda: -1))
    pending: list[int] = []
    _, values, failures, ousted = perform_plainly(scene.batch, pending)
    assert sorted(map(str, values)) == ["-9", "100", str(bytes(100))]
    assert (failures, ousted, pending) == (1, [], [scene.keys[RECEIVE]])
    scene.far.send(b"1")
    assert scene.batch.resume(pending) == []
    assert perform_plainly(scene.batch, pending) == ([scene.task], [b"1"], 0, [])


def block(scene: Scene) -> None:
    fill(scene.near)
    for direction in (RECEIVE, SEND):
        key = scene.keys[direction]
        assert scene.begin(scene.place, direction)
        assert scene.begin(scene.other, direction)
        scene.waiting[key] = scene.other_task
        pending: list[int] = []
        _, _, _, ousted = perform_plainly(scene.batch, pending)
        assert ousted == [key, scene.other_task, key, scene.task]
        assert scene.batch.resume([key]) == []
        perform_plainly(scene.batch, pending)
        assert pending == [key] * 3
        assert scene.waiting.pop(key) is scene.other
        assert scene.other.withdraw(direction) is scene.task
        assert scene.begin(scene.place, direction)
        assert scene.place.wait(direction, pending)
        scene.task.name = "awake"
        assert scene.batch.resume([key]) == []
        scene.task.name = None


def withdraw(scene: Scene) -> None:
    for direction in (RECEIVE, SEND):
        assert scene.begin(scene.place, direction)
        assert scene.batch.lone_receive() is (scene.place if direction == RECEIVE else None)
        assert scene.place.task(direction) is scene.place.withdraw(direction)


def be_refused(scene: Scene) -> None:
    for direction in (RECEIVE, SEND):
        assert scene.begin(scene.place, direction)
        assert not scene.begin(scene.place, direction)
        scene.place.withdraw(direction)
        assert scene.place.begin_receive(scene.near, 1) is False
        for data in (bytes(WHOLE + 1), memoryview(bytes(WHOLE + 1)), memoryview(scene.data)[::2]):
            assert scene.place.begin_send(scene.near, data) is False
        assert scene.place.begin_send(scene.near, memoryview(scene.data))
        scene.place.withdraw(SEND)
        assert scene.place.begin_receive(None, None) is scene.place.begin_send(None, None) is None  # type: ignore[arg-type]
        scene.waiting[scene.keys[direction]] = scene.task
        assert not scene.begin(scene.place, direction)
        scene.waiting.clear()
        scene.batch.begin_tick(-1)
        assert not scene.begin(scene.place, direction)
        scene.batch.begin_tick(CROWD)
        place = scene.new_place()
        place.close()
        assert not scene.begin(place, direction)


def be_faulty(scene: Scene) -> None:
    left_in(scene.near)
    for direction in (RECEIVE, SEND):
        scene.far.send(b"1")
        assert scene.begin(scene.other, direction, scene.bad)
        assert scene.begin(scene.place, direction)
        _, values, failures, ousted = perform_plainly(scene.batch, [])
        assert (values, failures, ousted) == ([-errno.EBADF, 100 if direction == SEND else b"1"], 1, [])
    left_in(scene.near)
    left_in(scene.far)
    assert scene.unraisable == [(scene.bad, TypeError)] * 2
    scene.unraisable.clear()


def fall_out(scene: Scene) -> None:
    places = [scene.place, scene.other, scene.new_place()]
    for place in places:
        assert scene.begin(place, RECEIVE)
    scene.waiting[Key(scene.keys[RECEIVE])] = scene.task
    with suppress(ZeroDivisionError):
        perform_plainly(scene.batch, [])
        pytest.fail("the key was not looked up")
    with suppress(ZeroDivisionError):
        scene.begin(scene.place, RECEIVE)
        pytest.fail("the key was not looked up")
    assert [place.task(RECEIVE) for place in places] == [None] * 3
    assert not scene.batch
    scene.waiting.clear()
    assert perform_plainly(scene.batch, []) == NOTHING


def give_bad_input(scene: Scene) -> None:
    closed = scene.new_place()
    closed.close()
    with suppress(RuntimeError):
        closed.set_traps(scene.receive_trap, scene.send_trap)
        pytest.fail("it is not closed")
    for call, (errors, _) in BAD_INPUT.items():
        with suppress(*(errors if isinstance(errors, tuple) else [errors])):
            eval(call, globals(), vars(scene))


def abandon(scene: Scene) -> None:
    batch = Batch(scene.owner, scene.context, scene.waiting, "name", len, WHOLE, 1, 100, 1)
    batch.begin_tick(CROWD)
    place = batch.place(*scene.keys)
    place.set_traps(scene.receive_trap, scene.send_trap)
    place.set_traps(scene.send_trap, scene.receive_trap)
    assert scene.begin(place, RECEIVE)
    assert scene.begin(place, SEND)
    del batch, place
    gc.collect(0)


@pytest.mark.parametrize(
    "play", [perform_them, block, withdraw, be_refused, be_faulty, fall_out, give_bad_input, abandon]
)
def test_thousands_of_operations_leave_nothing_behind(
    pair: Pairs, unraisable: Reports, play: Callable[[Scene], None]
) -> None:
    scene = Scene(pair, unraisable)

    def count() -> tuple[list[int], int]:
        return [sys.getrefcount(thing) for thing in scene.things()], sys.getallocatedblocks()

    gc.collect()
    gc.disable()  # what is over is freed without its help
    try:
        for _ in range(20):
            play(scene)
        references, blocks = count()
        for _ in range(1500):
            play(scene)
        references_after, blocks_after = count()
    finally:
        gc.enable()
    assert references_after == references
    assert blocks_after - blocks < 300


def test_cycles_are_garbage() -> None:
    things = {name: Thing() for name in ("owner", "context", "waiting", "task", "file", "receive trap", "send trap")}
    gone = {name: weakref.ref(thing) for name, thing in things.items()}
    for kept in things:  # in each of them a cycle of its own
        thing: Any = things[kept]
        owner = thing if kept == "owner" else OWNER
        context = {
            "runner": owner,
            "task": thing if kept == "task" else OWNER,
            "more": thing if kept == "context" else 1,
        }
        batch = Batch(owner, context, {1: thing} if kept == "waiting" else {}, "is_done", len, 1, 1, 1, 1)
        batch.begin_tick(CROWD)
        place = batch.place(2, 3)
        place.set_traps(thing if kept == "receive trap" else 1, thing if kept == "send trap" else 1)
        if kept in ("task", "file"):
            assert place.begin_receive(thing, 1)
        thing.place, thing.batch = place, batch
        del thing, owner, context, batch, place
    things.clear()
    gc.collect()
    assert {name: reference() for name, reference in gone.items()} == dict.fromkeys(gone)


##############################
# Threads
##############################


def test_other_threads_run_while_it_performs(pair: Pairs, waiting: dict[int, Any]) -> None:
    """For as long as the interpreter takes the GIL from nobody, the other thread needs to be given it."""
    batch = open_batch(waiting)
    near, _ = pair()
    places = [place_in(batch) for _ in range(1000)]
    held = threading.Lock()
    progress = []

    def wait() -> None:
        with held:
            progress.append(True)

    interval = sys.getswitchinterval()
    held.acquire()
    thread = threading.Thread(target=wait, daemon=True)
    try:
        sys.setswitchinterval(1000.0)  # before it waits for the GIL
        thread.start()
        held.release()
        deadline = time.monotonic() + PATIENCE
        while not progress and time.monotonic() < deadline:
            for place in places:
                assert begin(place, RECEIVE, "task", near)
            perform_plainly(batch, [])
            waiting.clear()
            for place in places:
                if place.task(RECEIVE) is not None:
                    place.withdraw(RECEIVE)
        assert progress
    finally:
        sys.setswitchinterval(interval)
    thread.join(PATIENCE)


##############################
# Whatever is asked of it
##############################


class Model:
    """Two socketpairs; the end i has its place i and is the peer of the end i ^ 1."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.waiting: dict[int, Any] = {}
        self.expected_waiting: dict[int, Any] = {}
        self.batch = Batch(OWNER, CONTEXT, self.waiting, "is_done", FILENO, 4, 4, 5, 5)
        self.opened = [False, False]
        self.socks: list[socket.socket] = []
        self.open(0, 6)
        for _ in range(2):
            self.socks += connected(self.stack)
        self.places: list[Any] = [place_in(self.batch, 2 * i, 2 * i + 1) for i in range(4)]
        self.unread = [b""] * 4
        self.closed = [False] * 4  # the sockets
        self.done = [False] * 4  # the places
        self.begun: dict[tuple[int, int], tuple[int, bytes]] = {}  # {(end, direction): (task, data)}, oldest first
        self.order: int | None = None  # the direction that an end came to have first, since the last perform()
        self.task = Task(0)
        self.parked: dict[tuple[int, int], tuple[int, bytes]] = {}  # the same for those that wait
        self.bystanders: list[socket.socket] = []

    def orders(self) -> set[int]:
        """Which directions come first on the ends that have both."""
        firsts: dict[int, int] = {}
        return {firsts[end] for end, direction in self.begun if firsts.setdefault(end, direction) != direction}

    def begin(self, end: int, argument: int) -> None:
        direction, data = argument % 2, bytes([97 + self.task % 26]) * argument
        self.task = Task(self.task + 1)
        other = 1 - direction
        may = self.opened[direction] and not self.done[end] and (end, direction) not in self.begun
        may = may and 2 * end + direction not in self.expected_waiting and not (direction == SEND and len(data) > 5)
        both = (end, other) in self.begun
        may = may and not (both and direction in self.orders())
        begun = begin(self.places[end], direction, self.task, self.socks[end], data, 4)
        if may and both and self.order == direction:
            may = begun  # the order of what has been withdrawn since may be kept, or not
        assert begun == may
        if begun:
            self.begun[end, direction] = (self.task, data)
            if both:
                self.order = other

    def withdraw(self, end: int, argument: int) -> None:
        if (end, argument % 2) in self.begun:
            assert self.places[end].withdraw(argument % 2) == self.begun.pop((end, argument % 2))[0]
        elif (end, argument % 2) in self.parked:
            self.wait(end, argument)
        else:
            with pytest.raises(RuntimeError):
                self.places[end].withdraw(argument % 2)

    def close_place(self, end: int, argument: int) -> None:
        if argument == 0:  # not too often
            self.places[end].close()
            self.done[end] = True

    def close_socket(self, end: int, argument: int) -> None:
        if argument == 0 and not self.closed[end]:
            left_in(self.socks[end])  # or else the peer is told that bytes were lost
            self.socks[end].close()
            self.closed[end], self.unread[end] = True, b""
            self.bystanders += connected(self.stack)  # with its number
            for sock in self.bystanders[-2:]:
                sock.send(b"keep")

    def wait(self, end: int, argument: int) -> None:
        """What has begun may have come to wait before it blocks."""
        key = 2 * end + argument % 2
        if self.expected_waiting.pop(key, None) is None:
            self.expected_waiting[key] = self.waiting[key] = -1 - self.task
        else:
            waiter = self.waiting.pop(key)
            if (end, argument % 2) in self.parked:
                assert waiter is self.places[end]
                assert waiter.withdraw(argument % 2) == self.parked.pop((end, argument % 2))[0]

    def resume(self, _: int, argument: int) -> None:
        """The operations that wait on some ends, among other keys, as far as their tasks still sleep."""
        self.perform()
        keys = [key for key in range(8) if (argument >> key % 3) & 1]
        others = [key for key in keys if (key // 2, key % 2) not in self.parked]
        for key in sorted(keys, key=lambda key: -(key % 2)):
            if key not in others:
                task, data = self.parked.pop((key // 2, key % 2))
                if self.task % 5:
                    self.begun[key // 2, key % 2] = (task, data)
                else:
                    task.is_done = True  # type: ignore[attr-defined]
                del self.expected_waiting[key]
        assert self.batch.resume(keys) == others
        self.check()
        self.perform()

    def open(self, _: int, argument: int) -> None:
        self.opened = [argument - 1 >= 0, argument - 1 >= CROWD]
        self.batch.begin_tick(argument - 1)

    def predict(self, first: int) -> tuple[dict[Any, Any], dict[int, tuple[int, int | None]], list[bytes]]:
        values: dict[Any, Any] = {}
        blocked: dict[int, tuple[int, int | None]] = {}
        unread = self.unread[:]
        for (end, direction), (task, data) in sorted(self.begun.items(), key=lambda item: item[0][1] != first):
            if self.closed[end]:
                values[task] = -errno.EBADF
            elif direction == SEND:
                values[task] = -errno.EPIPE if self.closed[end ^ 1] else len(data)
                if not self.closed[end ^ 1]:
                    unread[end ^ 1] += data
            elif unread[end] or self.closed[end ^ 1]:
                values[task], unread[end] = unread[end][:4], unread[end][4:]
            else:
                blocked[2 * end] = (task, self.expected_waiting.get(2 * end))
        return values, blocked, unread

    def perform(self, *_: int) -> None:
        firsts = self.orders() or ({SEND, RECEIVE} if self.order == RECEIVE else {SEND})
        found = perform(self.batch, self.waiting)
        predictions = [self.predict(first) for first in firsts]
        assert found in [prediction[:2] for prediction in predictions]
        self.unread = next(unread for *prediction, unread in predictions if tuple(prediction) == found)
        for key, (task, _) in found[1].items():
            self.expected_waiting[key] = task
            self.parked[key // 2, key % 2] = self.begun[key // 2, key % 2]
        self.begun.clear()
        self.order = None

    def check(self) -> None:
        assert bool(self.batch) == bool(self.begun)
        assert {key: who_waits(waiter, key) for key, waiter in self.waiting.items()} == self.expected_waiting
        lone = [end for end, direction in self.begun if direction == RECEIVE] if len(self.begun) == 1 else []
        assert self.batch.lone_receive() is (self.places[lone[0]] if lone else None)
        for end, place in enumerate(self.places):
            for direction in (RECEIVE, SEND):
                begun = self.begun.get((end, direction), self.parked.get((end, direction)))
                assert place.task(direction) == (begun[0] if begun else None)
                assert place.socket(direction) is (self.socks[end] if begun else None)


ACTIONS: Final = [
    *[Model.begin] * 6,
    *[Model.perform] * 2,
    *[Model.resume] * 2,
    Model.withdraw,
    Model.close_place,
    Model.close_socket,
    *[Model.wait] * 3,
    Model.open,
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 6)), max_size=60))
def test_any_sequence_goes_as_in_the_model(steps: list[tuple[Callable[[Model, int, int], None], int, int]]) -> None:
    model = Model()
    with model.stack:
        for action, end, argument in steps:
            action(model, end, argument)
            model.check()
        model.perform()
        for end, sock in enumerate(model.socks):
            if not model.closed[end]:
                assert left_in(sock) == model.unread[end]
        assert [left_in(sock) for sock in model.bystanders] == [b"keep"] * len(model.bystanders)
