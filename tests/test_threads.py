"""Guarantee: any number of threads can each have a run, at the same time and in turn, and the rings are shared."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT: Final = 60.0
THREADS: Final = 50
# How many idle rings are kept at most, as the documentation of the pool says.
IDLE_RINGS: Final = 4


def own_rings() -> set[str]:
    """The addresses of the AIO rings of this process."""
    return {line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if "[aio]" in line}


def wait_until_surplus_rings_are_gone() -> None:
    give_up = time.monotonic() + TIMEOUT
    while len(own_rings()) > IDLE_RINGS:
        assert time.monotonic() < give_up, f"{len(own_rings())} rings are left"
        time.sleep(0.01)


def in_threads(function: Callable[[int], object], count: int = THREADS) -> list[object]:
    """Call ``function(number)`` in that many threads at the same time."""
    barrier = threading.Barrier(count)

    def call(number: int) -> object:
        barrier.wait(TIMEOUT)
        return function(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


async def exchange(connections: int = 5, rounds: int = 10) -> str:
    """Some connections on which numbers go to and fro; returns the backend that served them."""

    async def count(sock: trio.socket.SocketType, first: bool) -> None:
        with sock:
            for number in range(rounds):
                if first:
                    await sock.send(bytes([number]))
                assert await sock.recv(1) == bytes([number])
                if not first:
                    await sock.send(bytes([number]))

    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            for _ in range(connections):
                a, b = trio.socket.socketpair()
                nursery.start_soon(count, a, True)
                nursery.start_soon(count, b, False)
        return str(trio.lowlevel.current_statistics().io_statistics.backend)


def test_many_threads_have_runs_at_the_same_time() -> None:
    together = threading.Barrier(THREADS)

    async def main() -> str:
        backend = await exchange()
        await trio.to_thread.run_sync(together.wait, TIMEOUT)  # nobody ends before all have begun
        return backend

    backends = in_threads(lambda _: trio.run(main, io_manager="aiopoll"))
    assert backends == ["aiopoll"] * THREADS
    wait_until_surplus_rings_are_gone()


def test_many_threads_have_many_runs() -> None:
    def run_often(_: int) -> list[str]:
        return [trio.run(exchange, 2, 3, io_manager="aiopoll") for _ in range(10)]

    assert in_threads(run_often) == [["aiopoll"] * 10] * THREADS
    wait_until_surplus_rings_are_gone()
    assert trio.run(exchange, io_manager="aiopoll") == "aiopoll"


def test_threads_one_after_the_other_use_the_same_ring() -> None:
    trio.run(exchange, io_manager="aiopoll")
    wait_until_surplus_rings_are_gone()
    before = own_rings()
    for _ in range(30):
        thread = threading.Thread(target=trio.run, args=(exchange, 2, 2), kwargs={"io_manager": "aiopoll"})
        thread.start()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        assert own_rings() == before


def test_runs_that_fail_in_many_threads_give_back_their_rings() -> None:
    class Failure(Exception):
        pass

    async def main() -> None:
        a, b = socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, a)
                await trio.testing.wait_all_tasks_blocked()
                raise Failure

    def run(_: int) -> None:
        for _ in range(5):
            with pytest.raises(Exception) as caught:  # noqa: PT011  Trio puts it into a group
                trio.run(main, io_manager="aiopoll")
            assert "Failure()" in repr(caught.value)

    in_threads(run)
    wait_until_surplus_rings_are_gone()


def test_threads_leave_no_descriptor_behind() -> None:
    in_threads(lambda _: trio.run(exchange, io_manager="aiopoll"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        in_threads(lambda _: trio.run(exchange, io_manager="aiopoll"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("io_manager", ["epoll", "aiopoll"])
def test_calls_into_threads_and_back_are_all_answered(io_manager: str) -> None:
    async def add(a: int, b: int) -> int:
        await trio.lowlevel.checkpoint()
        return a + b

    def in_thread(number: int) -> int:
        assert trio.from_thread.run_sync(lambda: number) == number
        return trio.from_thread.run(add, number, 1)

    async def main() -> None:
        answers: dict[int, int] = {}

        async def call(number: int) -> None:
            answers[number] = await trio.to_thread.run_sync(in_thread, number)

        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange, 10, 50)
                for number in range(500):
                    nursery.start_soon(call, number)
        assert answers == {number: number + 1 for number in range(500)}

    trio.run(main, io_manager=io_manager)


def test_calls_into_threads_and_back_are_all_answered_in_many_runs_at_a_time() -> None:
    async def main(number: int) -> int:
        total = 0
        with trio.fail_after(TIMEOUT):
            for _ in range(10):
                total += await trio.to_thread.run_sync(trio.from_thread.run_sync, lambda: number)
            await exchange(1, 3)
        return total

    answers = in_threads(lambda number: trio.run(main, number, io_manager="aiopoll"))
    assert answers == [10 * number for number in range(THREADS)]


def test_a_run_is_woken_by_all_other_runs() -> None:
    count = 20
    tokens: dict[int, trio.lowlevel.TrioToken] = {}
    received: list[list[int]] = [[] for _ in range(count)]
    all_there = threading.Barrier(count)

    async def main(me: int) -> None:
        with trio.fail_after(TIMEOUT):
            tokens[me] = trio.lowlevel.current_trio_token()
            await trio.to_thread.run_sync(all_there.wait, TIMEOUT)
            complete = trio.Event()

            def receive(sender: int) -> None:
                received[me].append(sender)
                if len(received[me]) == count - 1:
                    complete.set()

            receivers[me] = receive
            await trio.to_thread.run_sync(all_there.wait, TIMEOUT)
            for other in range(count):
                if other != me:
                    tokens[other].run_sync_soon(receivers[other], me)
                    await trio.lowlevel.checkpoint()
            await complete.wait()
            await trio.to_thread.run_sync(all_there.wait, TIMEOUT)

    receivers: dict[int, Callable[[int], None]] = {}
    in_threads(lambda number: trio.run(main, number, io_manager="aiopoll"), count)
    assert [sorted(senders) for senders in received] == [
        [other for other in range(count) if other != me] for me in range(count)
    ]


@pytest.mark.parametrize("io_manager", ["epoll", "aiopoll"])
def test_several_runs_may_wait_for_the_same_file(io_manager: str) -> None:
    a, b = socket.socketpair()
    woken: list[int] = []
    all_wait = threading.Barrier(9)

    async def main(number: int) -> None:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, a)
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(all_wait.wait, TIMEOUT)
        woken.append(number)

    def run_or_send(number: int) -> None:
        if number == 0:
            all_wait.wait(TIMEOUT)
            b.send(b"x")
        else:
            trio.run(main, number, io_manager=io_manager)

    with a, b:
        in_threads(run_or_send, 9)
    assert sorted(woken) == list(range(1, 9))


def test_runs_of_both_kinds_live_side_by_side() -> None:
    names = ["aiopoll", "epoll", None, "auto"]

    async def main() -> str:
        await exchange_any()
        return type(trio.lowlevel.current_statistics().io_statistics).__name__

    async def exchange_any() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            await a.send(b"x")
            assert await b.recv(1) == b"x"

    kinds = in_threads(lambda number: trio.run(main, io_manager=names[number % 4]), 40)
    assert kinds[:4] * 10 == kinds
    assert kinds[0] == kinds[3] == "AiopollStatistics"
    assert kinds[1] == kinds[2] != "AiopollStatistics"
