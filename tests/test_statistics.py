"""The statistics of a run on aiopoll are exact: who waits is counted as stock Trio counts it, whichever lane it waits
in, and polls, events and system calls are counted one by one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

TIMEOUT = 30  # seconds: what takes longer hangs
RING = 512  # polls that one ring holds


def statistics() -> Any:
    return trio.lowlevel.current_statistics().io_statistics


async def settled() -> Any:
    """The statistics at a moment when every wait has reached the kernel and every event its task."""
    await trio.testing.wait_all_tasks_blocked()
    return statistics()


def changes(before: Any, after: Any) -> dict[str, int]:
    """What has changed, and by how much."""
    differences = {
        field.name: getattr(after, field.name) - getattr(before, field.name)
        for field in dataclasses.fields(before)
        if field.name != "backend"
    }
    return {name: difference for name, difference in differences.items() if difference}


@contextmanager
def socket_pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(count)]
        for pair in pairs:
            for sock in pair:
                sock.setblocking(False)
                stack.enter_context(sock)
        yield pairs


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        descriptors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        yield descriptors


@contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    with ExitStack() as stack:
        ends = [os.pipe2(os.O_NONBLOCK) for _ in range(count)]
        for pair in ends:
            for descriptor in pair:
                stack.callback(os.close, descriptor)
        yield ends


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        return


def run(main: Callable[[], Awaitable[Any]], io_manager: str = "aiopoll") -> Any:
    async def guarded() -> Any:
        with trio.fail_after(TIMEOUT):
            return await main()

    return trio.run(guarded, io_manager=io_manager)


def test_statistics_are_frozen_and_say_aiopoll() -> None:
    async def main() -> None:
        assert type(statistics()) is trio_aiopoll.AiopollStatistics
        assert statistics().backend == "aiopoll"
        for field in dataclasses.fields(statistics()):
            if field.name != "backend":
                assert type(getattr(statistics(), field.name)) is int
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(statistics(), field.name, 5)

    run(main)


def test_statistics_are_a_snapshot() -> None:
    async def main() -> None:
        before = await settled()
        copy = dataclasses.replace(before)
        with socket_pairs(1) as [(left, _)], trio.move_on_after(0.001):
            await trio.lowlevel.wait_readable(left)
        assert statistics() != before
        assert before == copy

    run(main)


def test_waiting_tasks_are_counted_as_on_stock_trio() -> None:
    """Through all that can happen to a wait, on every kind of file that the lanes tell apart."""

    async def main() -> list[tuple[int, int]]:
        counts = []

        async def count() -> None:
            now = await settled()
            counts.append((now.tasks_waiting_read, now.tasks_waiting_write))

        async def wait(
            direction: Callable[[Any], Awaitable[None]],
            thing: Any,
            task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
        ) -> None:
            with trio.CancelScope() as scope, suppress(trio.ClosedResourceError):
                task_status.started(scope)
                await direction(thing)

        read, write = trio.lowlevel.wait_readable, trio.lowlevel.wait_writable
        with socket_pairs(6) as pairs, eventfds(3) as events, pipes(2) as ends:
            for left, _ in pairs[:3]:
                fill(left)
            os.eventfd_write(events[2], 2**64 - 2)  # not writable either
            await count()
            async with trio.open_nursery() as nursery:
                scopes = [await nursery.start(wait, read, left) for left, _ in pairs]
                await count()
                for left, _ in pairs[:3]:  # the other direction of the same file
                    nursery.start_soon(wait, write, left)
                await count()
                for event in events[:2]:
                    nursery.start_soon(wait, read, event)
                nursery.start_soon(wait, write, events[2])
                await count()
                for reader, _ in ends:
                    nursery.start_soon(wait, read, reader)
                await count()
                pairs[0][1].send(b"x")
                os.write(ends[0][1], b"x")
                os.eventfd_write(events[0], 1)
                await count()
                os.eventfd_read(events[2])
                await count()
                scopes[1].cancel()
                scopes[3].cancel()
                await count()
                trio.lowlevel.notify_closing(pairs[2][0])
                trio.lowlevel.notify_closing(events[1])
                await count()
                nursery.cancel_scope.cancel()
        await count()
        return counts

    stock, ours = run(main, "epoll"), run(main, "aiopoll")
    assert ours == stock
    own, _ = stock[0]  # Trio waits for its own wakeup socket
    assert [(readers - own, writers) for readers, writers in stock] == [
        (0, 0),
        (6, 0),
        (6, 3),
        (8, 4),
        (10, 4),
        (7, 4),
        (7, 3),
        (5, 3),
        (3, 2),
        (0, 0),
    ]


def test_each_wait_on_a_socket_is_a_poll_in_flight_until_it_ends() -> None:
    async def main() -> None:
        with socket_pairs(10) as pairs, trio.CancelScope() as scope:
            before = await settled()
            own = before.polls_in_flight - before.tasks_waiting_read
            assert own == 0  # there is none for the epoll lane before somebody waits there
            async with trio.open_nursery() as nursery:
                for left, _ in pairs:
                    nursery.start_soon(trio.lowlevel.wait_readable, left)
                armed = await settled()
                assert armed.polls_in_flight - before.polls_in_flight == 10
                assert armed.tasks_waiting_read - before.tasks_waiting_read == 10
                for _, right in pairs[:4]:
                    right.send(b"x")
                woken = await settled()
                assert woken.polls_in_flight - before.polls_in_flight == 6
                assert woken.events_taken + woken.events_waited - armed.events_taken - armed.events_waited == 4
                scope.cancel()
        after = await settled()
        assert after.polls_in_flight == before.polls_in_flight
        assert after.polls_submitted - before.polls_submitted == 10
        assert after.cancels - before.cancels == 6

    run(main)


def test_all_waits_on_the_epoll_lane_are_one_poll() -> None:
    async def main() -> None:
        with eventfds(3) as events:
            os.eventfd_write(events[2], 2**64 - 2)  # as full as it gets
            before = await settled()
            assert before.epoll_lane_waits == 0
            async with trio.open_nursery() as nursery:
                for event in events[:2]:
                    nursery.start_soon(trio.lowlevel.wait_readable, event)
                nursery.start_soon(trio.lowlevel.wait_writable, events[2])
                waiting = await settled()
                assert waiting.epoll_lane_waits == 3
                assert waiting.tasks_waiting_read - before.tasks_waiting_read == 2
                assert waiting.tasks_waiting_write - before.tasks_waiting_write == 1
                # one poll, on the epoll instance, is there for all of them
                assert waiting.polls_in_flight == before.polls_in_flight + 1
                for event in events[:2]:
                    os.eventfd_write(event, 1)
                os.eventfd_read(events[2])
            after = await settled()
            assert after.epoll_lane_waits == 0
            assert after.polls_in_flight == waiting.polls_in_flight

    run(main)


def test_waits_armed_in_one_tick_cost_one_io_submit() -> None:
    async def main() -> None:
        go = trio.Event()

        async def reader(sock: socket.socket) -> None:
            await go.wait()
            await trio.lowlevel.wait_readable(sock)

        with socket_pairs(64) as pairs:
            async with trio.open_nursery() as nursery:
                for left, _ in pairs:
                    nursery.start_soon(reader, left)
                before = await settled()
                go.set()
                armed = await settled()
                assert changes(before, armed) == {
                    "tasks_waiting_read": 64,
                    "polls_in_flight": 64,
                    "polls_submitted": 64,
                    "submit_calls": 1,
                }
                for _, right in pairs:
                    right.send(b"x")
                # all of them have happened when somebody next looks, so a look suffices
                assert changes(armed, await settled()) == {
                    "tasks_waiting_read": -64,
                    "polls_in_flight": -64,
                    "events_taken": 64,
                }

    run(main)


def test_waits_cancelled_together_are_counted_one_by_one() -> None:
    async def main() -> None:
        with socket_pairs(20) as pairs:
            before = await settled()
            async with trio.open_nursery() as nursery:
                for left, _ in pairs:
                    nursery.start_soon(trio.lowlevel.wait_readable, left)
                armed = await settled()
                nursery.cancel_scope.cancel()
            assert changes(armed, await settled()) == {
                "tasks_waiting_read": -20,
                "polls_in_flight": -20,
                "cancels": 20,
                "events_taken": 20,
            }
            assert before.cancels == 0

    run(main)


def test_wait_cancelled_before_its_tick_ends_never_reaches_the_kernel() -> None:
    async def main() -> None:
        with socket_pairs(1) as [(left, _)]:
            before = await settled()
            for _ in range(5):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await trio.lowlevel.wait_readable(left)
                assert scope.cancelled_caught
            assert changes(before, await settled()) == {}

    run(main)


def test_ticks_with_nothing_to_do_count_nothing() -> None:
    async def main() -> None:
        before = await settled()
        for _ in range(1000):
            await trio.lowlevel.checkpoint()
        assert changes(before, statistics()) == {}

    run(main)


def test_sleep_is_a_blocking_call() -> None:
    async def main() -> None:
        before = await settled()
        await trio.sleep(0.001)
        after = statistics()
        assert set(changes(before, after)) == {"blocking_calls"}

    run(main)


def test_event_that_ends_a_sleep_is_counted_as_waited_for() -> None:
    async def main() -> None:
        with socket_pairs(1) as [(left, right)]:
            start = before = await settled()
            completions = 0
            while statistics().events_waited == start.events_waited:  # until one comes after the run has fallen asleep
                thread = threading.Thread(target=lambda: (time.sleep(0.005), right.send(b"x")))
                thread.start()
                before = statistics()
                await trio.lowlevel.wait_readable(left)
                completions += 1
                thread.join()
                assert left.recv(10) == b"x"
            after = statistics()
            assert after.events_waited - before.events_waited == 1
            assert after.blocking_calls > before.blocking_calls
            assert after.events_taken + after.events_waited - start.events_taken - start.events_waited == completions

    run(main)


def test_capacity_grows_with_the_polls_that_need_it() -> None:
    async def main() -> None:
        with socket_pairs(RING + 10) as pairs:
            before = await settled()
            assert (before.rings, before.capacity) == (1, RING)
            async with trio.open_nursery() as nursery:
                for left, _ in pairs:
                    nursery.start_soon(trio.lowlevel.wait_readable, left)
                armed = await settled()
                assert (armed.rings, armed.capacity) == (2, 2 * RING)
                assert armed.tasks_waiting_read - before.tasks_waiting_read == RING + 10
                assert armed.polls_submitted - before.polls_submitted == RING + 10
                assert armed.epoll_lane_waits == 0
                assert armed.capacity >= armed.polls_in_flight >= RING + 10
                nursery.cancel_scope.cancel()

    run(main)


def test_each_run_counts_for_itself() -> None:
    async def main() -> Any:
        return await settled()

    async def busy() -> None:
        with socket_pairs(50) as pairs:
            async with trio.open_nursery() as nursery:
                for left, right in pairs:
                    nursery.start_soon(trio.lowlevel.wait_readable, left)
                    right.send(b"x")
            await trio.to_thread.run_sync(inside)

    def inside() -> None:
        assert run(main) == first

    first = run(main)
    run(busy)
    assert run(main) == first
