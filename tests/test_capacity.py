"""Guarantee: any number of waits can be had, and what they cost the host is given back.

More waits than one ring holds, up to the limit of descriptors; with the host's AIO budget (fs.aio-max-nr) spent in the
middle of a run, or no descriptor left, further waits go to the epoll lane and nobody notices.

fs.aio-nr counts for the whole host, where others may use AIO too. What this process has of it is told by the rings that
are mapped into it.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PATIENCE: Final = 60  # seconds
# of one ring; see POOL_RING_EVENTS and POOL_IDLE_MAX in _pool.h
RING_EVENTS: Final = 256
IDLE_RINGS: Final = 4
# more waits than the idle rings that this process keeps can hold
MANY_PAIRS: Final = 2000

# Takes what is left of the host's AIO budget, and whatever is given back, until its stdin is closed.
HOG: Final = """
import ctypes, platform, select, sys

io_setup = {"x86_64": 206, "aarch64": 0}[platform.machine()]
libc = ctypes.CDLL(None)

def grab():
    size = 1 << 16
    while size:
        if libc.syscall(io_setup, size, ctypes.byref(ctypes.c_ulong(0))) < 0:
            size //= 2

grab()
print("spent", flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    grab()
"""


@contextmanager
def budget_spent() -> Iterator[None]:
    """In a run: nobody gets another ring from the host, and this process has no more idle ones than it keeps.

    The rings of an earlier run are destroyed one by one, some 30 ms each, and until then serve whoever asks.
    """
    deadline = time.monotonic() + PATIENCE
    while rings_mapped() > statistics().rings + IDLE_RINGS:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "spent\n"
            yield
        finally:
            hog.kill()


@pytest.fixture
def many_descriptors() -> Iterator[int]:
    """How many descriptors a test may open, the limit having been raised as far as it goes."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield min(before[1] - 200, 18_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def rings_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/[aio]")


def budget_in_use() -> int:
    return int(Path("/proc/sys/fs/aio-nr").read_text())


def statistics() -> trio_aiopoll.AiopollStatistics:
    answer = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(answer, trio_aiopoll.AiopollStatistics)
    return answer


async def until(condition: Callable[[], bool], *, busy: bool = False) -> None:
    """Poll for what nothing announces; ``busy``: the run never gets to sleep meanwhile."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0 if busy else 0.02)


class Crowd:
    """Pairs of sockets with a task at each end that counts how often it is woken."""

    def __init__(self) -> None:
        self.others = statistics().tasks_waiting_read
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.woken: dict[socket.socket, int] = {}
        self.expected: dict[socket.socket, int] = {}
        self.scopes: dict[socket.socket, trio.CancelScope] = {}
        self.somebody_woke = trio.Event()

    def grow(self, nursery: trio.Nursery, pairs: int) -> None:
        for _ in range(pairs):
            pair = socket.socketpair()
            self.pairs.append(pair)
            for sock in pair:
                self.woken[sock] = self.expected[sock] = 0
                nursery.start_soon(self._serve, sock)

    async def outgrow_the_rings(self, nursery: trio.Nursery) -> None:
        """With the budget spent, add waits until some of them find no ring.

        Others may give budget back at any time, which we may get before it is spent again: a ring of it holds 512.
        """
        self.grow(nursery, MANY_PAIRS)
        await self.check()
        while statistics().epoll_lane_waits == 0:
            self.grow(nursery, RING_EVENTS)
            await self.check()

    async def _serve(self, sock: socket.socket) -> None:
        with trio.CancelScope() as self.scopes[sock]:
            while True:
                await trio.lowlevel.wait_readable(sock)
                assert sock.recv(2, socket.MSG_DONTWAIT) == b"x"
                self.woken[sock] += 1
                self.somebody_woke.set()

    def poke(self, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        for near, far in pairs:
            for sock, peer in ((near, far), (far, near)):
                peer.send(b"x")
                self.expected[sock] += 1

    async def check(self) -> None:
        await wait_all_tasks_blocked()
        assert self.woken == self.expected

    def close(self) -> None:
        for pair in self.pairs:
            for sock in pair:
                trio.lowlevel.notify_closing(sock)
                sock.close()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def patient_main() -> None:
        with trio.fail_after(PATIENCE):
            await wait_all_tasks_blocked()  # Trio's own tasks are under way
            await main()

    trio.run(patient_main, io_manager="aiopoll")


#########################
# More than one ring
#########################


def test_as_many_waits_as_there_are_descriptors_are_each_woken_once(many_descriptors: int) -> None:
    """The rings grow while the loop runs and others are woken."""
    choose = random.Random(1)

    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                while 2 * len(crowd.pairs) < many_descriptors:
                    crowd.grow(nursery, min(choose.randrange(1, 1500), many_descriptors // 2 - len(crowd.pairs)))
                    await crowd.check()
                    crowd.poke(choose.sample(crowd.pairs, len(crowd.pairs) // 7))
                    await crowd.check()
                assert statistics().tasks_waiting_read - crowd.others == 2 * len(crowd.pairs)
                assert statistics().rings > 2
                for _ in range(2):
                    crowd.poke(crowd.pairs)
                    await crowd.check()
                nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_rings_grow_although_another_cpu_has_cached_slots(many_descriptors: int) -> None:
    """The kernel keeps some of a ring's slots for the CPU that freed them, so a ring can be full before its time."""
    here, there, *_ = os.sched_getaffinity(0)
    before = os.sched_getaffinity(0)

    async def main() -> None:
        pairs = [socket.socketpair() for _ in range(min(1500, many_descriptors // 2))]
        some = pairs[:300]
        for _ in range(5):
            os.sched_setaffinity(0, {here})
            async with trio.open_nursery() as nursery:
                for sock, _peer in some:
                    nursery.start_soon(trio.lowlevel.wait_readable, sock)
                await wait_all_tasks_blocked()
                os.sched_setaffinity(0, {there})
                for _, peer in some:
                    peer.send(b"x")
            for sock, _ in some:
                sock.recv(1)
        os.sched_setaffinity(0, {here})
        async with trio.open_nursery() as nursery:
            for sock, _ in pairs:
                nursery.start_soon(trio.lowlevel.wait_readable, sock)
            await wait_all_tasks_blocked()
            answer = statistics()
            nursery.cancel_scope.cancel()
        for pair in pairs:
            for sock in pair:
                sock.close()
        assert answer.rings > 2, answer
        assert answer.epoll_lane_waits == 0, answer

    try:
        for _ in range(10):
            run(main)
    finally:
        os.sched_setaffinity(0, before)


def test_a_loop_that_sleeps_is_woken_by_a_wait_in_any_ring(many_descriptors: int) -> None:
    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, many_descriptors // 6)
                await crowd.check()
                assert statistics().rings > 4
                for sock, peer in crowd.pairs[:: len(crowd.pairs) // 8]:
                    before = crowd.woken[sock]
                    crowd.somebody_woke = trio.Event()
                    # late enough for the loop to have gone to sleep for good; should it not have, the test proves less
                    poke = threading.Timer(0.15, peer.send, [b"x"])
                    poke.start()
                    crowd.expected[sock] += 1
                    with trio.fail_after(PATIENCE / 4):
                        await crowd.somebody_woke.wait()
                    poke.join()
                    assert crowd.woken[sock] == before + 1
                await crowd.check()
                nursery.cancel_scope.cancel()

    run(main)


def test_thousands_of_waits_can_be_cancelled_in_any_order(many_descriptors: int) -> None:
    choose = random.Random(2)

    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, many_descriptors // 4)
                await crowd.check()
                socks = list(crowd.scopes)
                choose.shuffle(socks)
                for start in range(0, len(socks), 1000):
                    for sock in socks[start : start + 1000]:
                        crowd.scopes[sock].cancel()
                    await wait_all_tasks_blocked()
                    assert statistics().tasks_waiting_read - crowd.others == len(socks) - len(socks[: start + 1000])
            assert sum(crowd.woken.values()) == 0

    run(main)


def test_both_directions_count_as_waits_of_their_own(many_descriptors: int) -> None:
    async def main() -> None:
        pairs = [socket.socketpair() for _ in range(min(1500, many_descriptors // 2))]
        outcomes = {"readable": 0, "writable": 0}

        async def wait(direction: str, sock: socket.socket) -> None:
            await (trio.lowlevel.wait_readable if direction == "readable" else trio.lowlevel.wait_writable)(sock)
            outcomes[direction] += 1

        async with trio.open_nursery() as nursery:
            for sock, _ in pairs:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                sock.setblocking(False)
                sock.send(b"x" * 4096)
                nursery.start_soon(wait, "readable", sock)
                nursery.start_soon(wait, "writable", sock)
            await wait_all_tasks_blocked()
            assert outcomes == {"readable": 0, "writable": 0}
            for _, peer in pairs:
                peer.recv(1 << 16)
            await wait_all_tasks_blocked()
            assert outcomes == {"readable": 0, "writable": len(pairs)}
            for _, peer in pairs:
                peer.send(b"x")
        assert outcomes == {"readable": len(pairs), "writable": len(pairs)}
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main)


#########################
# No budget, no descriptors
#########################


@pytest.mark.usefixtures("many_descriptors")
def test_with_the_budget_spent_further_waits_use_the_epoll_lane_and_come_back_when_it_is_there_again() -> None:
    choose = random.Random(3)

    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, 100)
                await crowd.check()
                with budget_spent():
                    await crowd.outgrow_the_rings(nursery)
                    assert statistics().epoll_lane_waits > 0
                    assert statistics().tasks_waiting_read - crowd.others == 2 * len(crowd.pairs)
                    for _ in range(3):
                        crowd.poke(choose.sample(crowd.pairs, len(crowd.pairs) // 2))
                        await crowd.check()

                    for pair in crowd.pairs[-100:]:
                        crowd.scopes[pair[0]].cancel()
                        crowd.scopes[pair[1]].cancel()
                    await crowd.check()
                    assert statistics().tasks_waiting_read - crowd.others == 2 * len(crowd.pairs) - 200

                    idle_from, cpu_from = time.monotonic(), time.process_time()
                    await trio.sleep(0.5)
                    cpu, idle = time.process_time() - cpu_from, time.monotonic() - idle_from
                    assert cpu < 0.2 * idle, f"{cpu:.3f} s of CPU time in {idle:.3f} s, while all tasks were asleep"

                def all_in_rings() -> bool:
                    return statistics().epoll_lane_waits == 0

                with trio.fail_after(PATIENCE):
                    while not all_in_rings():
                        await trio.sleep(0.1)
                        crowd.poke(crowd.pairs[:-100])
                        await crowd.check()
                nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.parametrize("direction", ["readable", "writable"])
@pytest.mark.usefixtures("many_descriptors")
def test_with_the_budget_spent_a_second_wait_is_still_refused(direction: str) -> None:
    wait = trio.lowlevel.wait_readable if direction == "readable" else trio.lowlevel.wait_writable

    async def main() -> None:
        with closing(Crowd()) as crowd:
            woken = 0

            async def wait_once(sock: socket.socket) -> None:
                nonlocal woken
                await wait(sock)
                woken += 1

            async with trio.open_nursery() as nursery:
                sock, peer = socket.socketpair()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                sock.setblocking(False)
                with sock, peer, budget_spent():
                    await crowd.outgrow_the_rings(nursery)
                    assert statistics().epoll_lane_waits > 0
                    sock.send(b"x" * 4096)  # no longer writable
                    nursery.start_soon(wait_once, sock)
                    await wait_all_tasks_blocked()
                    for _ in range(2):
                        with trio.move_on_after(1) as scope, pytest.raises(trio.BusyResourceError):
                            await wait(sock)
                        assert not scope.cancelled_caught, "two tasks wait for the same file"
                    assert woken == 0
                    peer.send(b"x")
                    peer.recv(1 << 16)
                    await wait_all_tasks_blocked()
                    assert woken == 1
                nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.usefixtures("many_descriptors")
def test_with_the_budget_spent_waits_can_be_closed_under_their_tasks() -> None:
    async def main() -> None:
        with closing(Crowd()) as crowd:
            closed = 0

            async def wait_to_be_closed(sock: socket.socket) -> None:
                nonlocal closed
                with pytest.raises(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(sock)
                closed += 1

            async with trio.open_nursery() as nursery:
                with budget_spent():
                    await crowd.outgrow_the_rings(nursery)
                    for _ in range(50):
                        sock, peer = socket.socketpair()
                        with peer:
                            nursery.start_soon(wait_to_be_closed, sock)
                            await wait_all_tasks_blocked()
                            trio.lowlevel.notify_closing(sock)
                            sock.close()
                            assert peer.recv(1, socket.MSG_DONTWAIT) == b""
                    await wait_all_tasks_blocked()
                    assert closed == 50
                nursery.cancel_scope.cancel()

    run(main)


def all_descriptors() -> list[int]:
    """Descriptors that leave no other to be had."""
    taken = []
    while True:
        try:
            taken.append(os.dup(0))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return taken


def test_with_no_descriptor_left_all_waits_work() -> None:
    """More rings than one need a descriptor to signal each other."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                gc.collect()  # so that nothing gives a descriptor back meanwhile
                in_use = max(int(name) for name in os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 1300, before[1]))
                try:
                    crowd.grow(nursery, 600)
                    spare = all_descriptors()
                    await crowd.check()
                    assert statistics().epoll_lane_waits > 0
                    for _ in range(3):
                        crowd.poke(crowd.pairs)
                        await crowd.check()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, before)
                for fd in spare:
                    os.close(fd)
                nursery.cancel_scope.cancel()

    run(main)


#########################
# Giving back
#########################


@pytest.mark.parametrize("busy", [False, True], ids=["with time to sleep", "without"])
def test_the_budget_of_waits_that_are_over_is_given_back_while_the_run_goes_on(
    many_descriptors: int, busy: bool
) -> None:
    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, many_descriptors // 4)
                await crowd.check()
                rings, budget = rings_mapped(), budget_in_use()
                surplus = rings - 1 - IDLE_RINGS
                assert rings >= statistics().rings > 1 + IDLE_RINGS
                nursery.cancel_scope.cancel()
        await until(lambda: statistics().rings == 1, busy=busy)
        await until(lambda: rings_mapped() <= 1 + IDLE_RINGS)
        # of others' rings there may be more by now, but not for long as many as we have given back
        await until(lambda: budget_in_use() <= budget - surplus * RING_EVENTS // 2)

    run(main)


def test_the_budget_of_a_run_that_is_over_is_given_back(many_descriptors: int) -> None:
    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, many_descriptors // 4)
                await crowd.check()
                assert rings_mapped() > 2 * IDLE_RINGS
                nursery.cancel_scope.cancel()

    run(main)
    deadline = time.monotonic() + PATIENCE
    while rings_mapped() > IDLE_RINGS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert rings_mapped() <= IDLE_RINGS


def test_one_wait_among_many_rings_keeps_only_what_it_needs(many_descriptors: int) -> None:
    """The last of a crowd sits in the last ring, and still works when the others have been given back."""

    async def main() -> None:
        with closing(Crowd()) as crowd:
            async with trio.open_nursery() as nursery:
                crowd.grow(nursery, many_descriptors // 4)
                await crowd.check()
                last = crowd.pairs[-1]
                for sock, scope in crowd.scopes.items():
                    if sock not in last:
                        scope.cancel()
                await until(lambda: statistics().rings <= 3)
                for _ in range(3):
                    crowd.poke([last])
                    await crowd.check()
                nursery.cancel_scope.cancel()

    run(main)
