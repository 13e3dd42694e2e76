"""Guarantee: a forked child leaves its parent's ring alone and can run Trio, and the parent loses nothing.

A child of these tests is killed by a seccomp filter if it makes one of AIO's system calls on a ring of its parent's;
that it does not take events from the shared memory of one is seen by the ring's head, which must stay where it is.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import platform
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT: Final = 40.0

# name: (AUDIT_ARCH_..., io_destroy, io_getevents, io_submit, io_cancel)
_ARCHITECTURES: Final = {
    "x86_64": (0xC000003E, 207, 208, 209, 210),
    "aarch64": (0xC00000B7, 1, 4, 2, 3),
}
pytestmark = [
    pytest.mark.skipif(platform.machine() not in _ARCHITECTURES, reason="no numbers of the system calls for here"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


##############################
# Rings
##############################


def rings_and_events() -> dict[int, tuple[int, int]]:
    """{address: (head, tail)} of the AIO rings mapped into this process, those it inherited included."""
    rings = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "[aio]" in line:
            address = int(line.split("-")[0], 16)
            _, _, head, tail = struct.unpack("IIII", ctypes.string_at(address, 16))
            rings[address] = (head, tail)
    return rings


def own_rings() -> dict[int, int]:
    """{address: head}: which rings there are, and how far their events have been taken."""
    return {address: head for address, (head, _) in rings_and_events().items()}


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def begin_child() -> None:
    """From now on this process dies of SIGSYS if it makes a system call on a ring that is mapped now, and of SIGALRM if
    it hangs, even when nobody is left to kill it."""
    signal.alarm(int(TIMEOUT))
    load, jump_if_equal, ret = 0x20, 0x15, 0x06
    kill, allow = 0x80000000, 0x7FFF0000
    arch, *numbers = _ARCHITECTURES[platform.machine()]
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, arch), (ret, 0, 0, allow), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(ret, 0, 0, allow)]
    for address in own_rings():
        low, high = address & 0xFFFFFFFF, address >> 32
        steps += [(load, 0, 0, 16), (jump_if_equal, 0, 3, low), (load, 0, 0, 20), (jump_if_equal, 0, 1, high)]
        steps += [(ret, 0, 0, kill)]
    steps += [(ret, 0, 0, allow)]
    program = _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    seccomp, set_no_new_privileges, all_threads = {"x86_64": 317, "aarch64": 277}[platform.machine()], 38, 1
    if (
        libc.prctl(set_no_new_privileges, 1, 0, 0, 0) != 0
        or libc.syscall(seccomp, 1, all_threads, ctypes.byref(program)) != 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def test_the_filter_of_these_tests_kills() -> None:
    trio.run(trio.sleep, 0, io_manager="aiopoll")  # leaves a ring in the pool
    (context, *_) = own_rings()

    def touch() -> None:
        number = _ARCHITECTURES[platform.machine()][2]
        nothing = ctypes.c_long(0)
        zero = (ctypes.c_long * 2)(0, 0)
        ctypes.CDLL(None).syscall(number, ctypes.c_ulong(context), nothing, nothing, None, zero)

    assert reap(fork(touch)) == -signal.SIGSYS


##############################
# Children
##############################


def run_and_exit(function: Callable[[], object]) -> None:
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fork(function: Callable[[], object]) -> int:
    """A child that is not allowed to use our rings."""
    child = os.fork()
    if child == 0:
        run_and_exit(lambda: (begin_child(), function()))
    return child


def reap(child: int) -> int:
    """The exit code of the child, which is killed if it hangs."""
    pidfd = os.pidfd_open(child)
    try:
        hangs = not select.select([pidfd], [], [], TIMEOUT)[0]
        if hangs:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(pidfd)
    assert not hangs, "the child hung"
    return os.waitstatus_to_exitcode(status)


async def use_trio() -> None:
    """A bit of everything."""
    with trio.fail_after(TIMEOUT / 2):
        a, b = socket.socketpair()
        with a, b:
            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.lowlevel.wait_readable, a)
                    await trio.testing.wait_all_tasks_blocked()
                    b.send(b"x")
                assert a.recv(10) == b"x"
            with trio.move_on_after(0.01) as scope:
                await trio.lowlevel.wait_readable(a)
            assert scope.cancelled_caught
            trio.lowlevel.notify_closing(a)
        await trio.sleep(0.001)
        async with trio.open_nursery() as nursery:
            streams: list[trio.SocketStream] = []
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

            async def accept() -> None:
                streams.append(await listeners[0].accept())

            nursery.start_soon(accept)
            client = await trio.testing.open_stream_to_socket_listener(listeners[0])
        await client.send_all(b"x" * 100)
        assert await streams[0].receive_some(100) == b"x" * 100
        for stream in (*streams, client, *listeners):
            await stream.aclose()


async def use_trio_with_threads() -> None:
    await use_trio()
    with trio.fail_after(TIMEOUT / 2):
        assert await trio.to_thread.run_sync(lambda: 5) == 5


def run_trio() -> None:
    trio.run(use_trio_with_threads, io_manager="aiopoll")


def run_trio_on_a_new_ring() -> None:
    before = own_rings()
    run_trio()
    assert set(own_rings()) - set(before), "it ran without a ring of its own"


def run_trio_in_a_thread() -> None:
    """For a child that was forked inside a run, where trio.run() refuses to work."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            run_trio_on_a_new_ring()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    for failure in failures:
        raise failure


class Waits:
    """Tasks of the parent that each wait for one thing, some for several in turn, and what woke them."""

    def __init__(self, nursery: trio.Nursery, count: int = 20) -> None:
        self.pairs = [socket.socketpair() for _ in range(count)]
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]  # these are not for the ring
        self.woken = [0] * count
        self.woken_by_eventfd = [0] * len(self.eventfds)
        self.scope = trio.CancelScope()
        nursery.start_soon(self.wait)

    async def wait(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                for i in range(len(self.pairs)):
                    self.pairs[i][0].setblocking(False)
                    nursery.start_soon(self.wait_for_socket, i)
                for i in range(len(self.eventfds)):
                    nursery.start_soon(self.wait_for_eventfd, i)

    async def wait_for_socket(self, i: int) -> None:
        with suppress(trio.ClosedResourceError):
            while True:
                await trio.lowlevel.wait_readable(self.pairs[i][0])
                self.pairs[i][0].recv(1)  # BlockingIOError: it was woken for nothing
                self.woken[i] += 1

    async def wait_for_eventfd(self, i: int) -> None:
        with suppress(trio.ClosedResourceError):
            while True:
                await trio.lowlevel.wait_readable(self.eventfds[i])
                os.eventfd_read(self.eventfds[i])
                self.woken_by_eventfd[i] += 1

    def feed(self, start: int = 0, stop: int | None = None) -> None:
        for _, b in self.pairs[start:stop]:
            b.send(b"x")

    def feed_eventfds(self) -> None:
        for fd in self.eventfds:
            os.eventfd_write(fd, 1)

    def close(self) -> None:
        for a, b in self.pairs:
            a.close()
            b.close()
        for fd in self.eventfds:
            os.close(fd)


async def parent_with_waits(child: Callable[[trio.Nursery, Waits], object], goes_on: bool) -> None:
    """Fork with waits in flight, half of them already complete in the ring. ``child`` ends, or returns and goes on."""
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as nursery:
            waits = Waits(nursery)
            half = len(waits.pairs) // 2
            await trio.testing.wait_all_tasks_blocked()
            waits.feed(0, half)  # the events are in the ring now
            assert any(head != tail for head, tail in rings_and_events().values())
            before = own_rings()
            pid = os.fork()
            if pid == 0:
                if not goes_on:
                    run_and_exit(lambda: (begin_child(), child(nursery, waits)))
                begin_child()
                child(nursery, waits)
                return
            assert reap(pid) == 0
            assert own_rings() == before
            waits.feed(half)
            await trio.testing.wait_all_tasks_blocked()
            assert waits.woken == [1] * len(waits.pairs)
            waits.feed()
            waits.feed_eventfds()
            await trio.testing.wait_all_tasks_blocked()
            assert waits.woken == [2] * len(waits.pairs)
            assert waits.woken_by_eventfd == [1] * len(waits.eventfds)
            nursery.cancel_scope.cancel()
        waits.close()


def run_parent(child: Callable[[trio.Nursery, Waits], object], goes_on: bool) -> None:
    parent = os.getpid()
    try:
        trio.run(parent_with_waits, child, goes_on, io_manager="aiopoll")
    except BaseException:
        if os.getpid() != parent:
            run_and_exit(lambda: traceback.print_exc() or os._exit(1))
        raise
    if os.getpid() != parent:  # the child went on to the end of the run
        run_and_exit(run_trio)


##############################
# The tests
##############################


def test_a_child_between_runs_does_not_use_the_rings_in_the_pool() -> None:
    trio.run(use_trio, io_manager="aiopoll")
    assert own_rings()
    for _ in range(3):
        before = own_rings()
        assert reap(fork(run_trio_on_a_new_ring)) == 0
        assert own_rings() == before
        trio.run(use_trio, io_manager="aiopoll")


def test_a_grandchild_works_as_well() -> None:
    trio.run(use_trio, io_manager="aiopoll")

    def child() -> None:
        run_trio_on_a_new_ring()
        assert reap(fork(run_trio_on_a_new_ring)) == 0
        run_trio()

    assert reap(fork(child)) == 0


def test_a_child_that_exits_at_once_takes_nothing_from_a_run() -> None:
    run_parent(lambda *_: None, goes_on=False)


def test_a_child_of_a_task_can_run_trio_in_a_thread() -> None:
    run_parent(lambda *_: run_trio_in_a_thread(), goes_on=False)


def test_a_child_that_cancels_everything_and_lets_the_run_end_takes_nothing_from_the_parent() -> None:
    run_parent(lambda nursery, _: nursery.cancel_scope.cancel(), goes_on=True)


def test_a_child_that_raises_out_of_the_run_takes_nothing_from_the_parent() -> None:
    class Left(Exception):
        pass

    def leave(*_: object) -> None:
        raise Left

    parent = os.getpid()
    try:
        trio.run(parent_with_waits, leave, True, io_manager="aiopoll")
    except BaseException as error:
        if os.getpid() == parent:
            raise
        os._exit(0 if "Left" in "".join(traceback.format_exception(error)) else 1)
    assert os.getpid() == parent


def test_a_child_that_closes_what_it_inherited_takes_nothing_from_the_parent() -> None:
    def close_all(nursery: trio.Nursery, waits: Waits) -> None:
        for a, _ in waits.pairs:
            trio.lowlevel.notify_closing(a)
        for fd in waits.eventfds:
            trio.lowlevel.notify_closing(fd)
        waits.close()
        nursery.cancel_scope.cancel()

    run_parent(close_all, goes_on=True)


def test_a_child_that_closes_only_what_the_epoll_lane_has_takes_nothing_from_the_parent() -> None:
    def close_eventfds(nursery: trio.Nursery, waits: Waits) -> None:
        for fd in waits.eventfds:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        nursery.cancel_scope.cancel()

    run_parent(close_eventfds, goes_on=True)


def test_a_child_can_go_on_with_the_run_and_wait_for_what_it_opens() -> None:
    def go_on(nursery: trio.Nursery, waits: Waits) -> None:
        waits.scope.cancel()

        async def use_trio_and_end() -> None:
            await use_trio()
            await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

        nursery.start_soon(use_trio_and_end)

    run_parent(go_on, goes_on=True)


@pytest.mark.parametrize("generations", [1, 2])
def test_a_child_that_goes_on_still_has_the_waits_of_the_parent(generations: int) -> None:
    """Those of its tasks that slept at the time of the fork are woken in the child by what happens there."""

    async def main() -> None:
        with trio.fail_after(TIMEOUT / 4):
            async with trio.open_nursery() as nursery:
                woken: list[int] = []
                a, b = socket.socketpair()
                eventfd = os.eventfd(0)

                async def wait(fd: int) -> None:
                    await trio.lowlevel.wait_readable(fd)
                    woken.append(fd)

                nursery.start_soon(wait, a.fileno())
                nursery.start_soon(wait, eventfd)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(generations):
                    if reap_or_be_child() > 0:
                        break
                    begin_child()
                    await trio.sleep(0.01)
                    assert woken == []
                b.send(b"x")
                os.eventfd_write(eventfd, 1)
                await trio.testing.wait_all_tasks_blocked()
                assert sorted(woken) == sorted([a.fileno(), eventfd])

    def reap_or_be_child() -> int:
        pid = os.fork()
        if pid > 0:
            assert reap(pid) == 0
        return pid

    parent = os.getpid()
    try:
        trio.run(main, io_manager="aiopoll")
    finally:
        if os.getpid() != parent:
            failed = sys.exc_info()[0] is not None
            traceback.print_exc() if failed else None
            os._exit(1 if failed else 0)


def test_a_child_outlives_the_parent_and_goes_on_with_its_run() -> None:
    """As a daemon does that forks after it has begun to serve."""
    reader, writer = os.pipe()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            waits = Waits(nursery)
            await trio.testing.wait_all_tasks_blocked()
            gone, stays = os.pipe()
            if os.fork() > 0:
                os._exit(0)  # and with it its rings
            begin_child()
            os.close(stays)
            assert os.read(gone, 1) == b""  # the parent is gone
            await use_trio()
            waits.feed()
            waits.feed_eventfds()
            await trio.testing.wait_all_tasks_blocked()
            assert waits.woken == [1] * len(waits.pairs)
            assert waits.woken_by_eventfd == [1] * len(waits.eventfds)
            nursery.cancel_scope.cancel()

    def parent() -> None:
        trio.run(main, io_manager="aiopoll")
        run_trio()
        os.write(writer, b"done")

    pid = os.fork()
    if pid == 0:
        begin_child()
        run_and_exit(parent)
    os.close(writer)
    assert reap(pid) == 0
    assert select.select([reader], [], [], TIMEOUT)[0]
    assert os.read(reader, 10) == b"done"
    os.close(reader)


def test_a_child_of_a_worker_thread_can_run_trio_and_the_run_loses_nothing() -> None:
    async def main() -> None:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                waits = Waits(nursery)
                await trio.testing.wait_all_tasks_blocked()
                for round_ in range(1, 4):
                    pid = await trio.to_thread.run_sync(fork, run_trio_on_a_new_ring)
                    waits.feed()
                    waits.feed_eventfds()
                    assert await trio.to_thread.run_sync(reap, pid) == 0
                    await trio.testing.wait_all_tasks_blocked()
                    assert waits.woken == [round_] * len(waits.pairs)
                    assert waits.woken_by_eventfd == [round_] * len(waits.eventfds)
                nursery.cancel_scope.cancel()
            waits.close()

    trio.run(main, io_manager="aiopoll")


def test_multiprocessing_by_fork_works_from_a_thread_of_a_run_and_between_runs() -> None:
    context = multiprocessing.get_context("fork")

    def in_process() -> None:
        process = context.Process(target=lambda: (begin_child(), run_trio()))
        process.start()
        process.join(TIMEOUT)
        hangs = process.is_alive()
        process.kill()
        process.join()
        assert not hangs
        assert process.exitcode == 0

    async def main() -> None:
        with trio.fail_after(TIMEOUT):
            await use_trio()
            await trio.to_thread.run_sync(in_process)
            await use_trio()

    trio.run(main, io_manager="aiopoll")
    in_process()


def test_subprocesses_take_nothing_from_a_run() -> None:
    async def main() -> None:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                waits = Waits(nursery)
                await trio.testing.wait_all_tasks_blocked()
                for round_ in range(1, 6):
                    waits.feed()
                    options: dict[str, Any] = {"preexec_fn": os.getpid} if round_ % 2 else {}
                    result = await trio.run_process(["echo", "hello"], capture_stdout=True, **options)
                    assert result.stdout == b"hello\n"
                    await trio.testing.wait_all_tasks_blocked()
                    assert waits.woken == [round_] * len(waits.pairs)
                nursery.cancel_scope.cancel()
            waits.close()

    trio.run(main, io_manager="aiopoll")


def test_a_child_of_guest_mode_s_host_can_run_trio_while_the_io_thread_sleeps() -> None:
    class Announcing(trio_aiopoll.AiopollIOManager):
        def get_events(self, timeout: float) -> list[Any]:
            if timeout > 0:
                asleep.set()
            return super().get_events(timeout)

    asleep = threading.Event()

    async def host() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        a, b = socket.socketpair()

        async def guest() -> None:
            with trio.fail_after(TIMEOUT), a, b:
                await trio.lowlevel.wait_readable(a)
                assert a.recv(1) == b"x"
                await use_trio()

        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: loop.call_soon(done.set_result, outcome.unwrap()),
            io_manager=Announcing,
        )
        await loop.run_in_executor(None, asleep.wait, TIMEOUT)
        before = own_rings()
        pid = fork(run_trio_in_a_thread)
        assert await loop.run_in_executor(None, reap, pid) == 0
        assert own_rings() == before
        b.send(b"x")
        await asyncio.wait_for(done, TIMEOUT)

    asyncio.run(host())


def test_a_child_can_run_trio_although_another_thread_was_just_starting_a_run() -> None:
    starting, go_on = threading.Event(), threading.Event()

    def make() -> trio_aiopoll.AiopollIOManager:
        starting.set()
        assert go_on.wait(TIMEOUT)
        return trio_aiopoll.AiopollIOManager()

    thread = threading.Thread(target=lambda: trio.run(trio.sleep, 0, io_manager=make))
    thread.start()
    assert starting.wait(TIMEOUT)
    # a fork that waits until no run is starting is right, too
    threading.Timer(0.3, go_on.set).start()

    def child() -> None:
        for name in ("aiopoll", "epoll", None):
            signal.alarm(5)  # there is one thread only, and it may be the one that hangs
            trio.run(use_trio, io_manager=name)
        signal.alarm(0)

    assert reap(fork(child)) == 0
    thread.join(TIMEOUT)


def test_children_can_run_trio_while_threads_start_and_end_runs() -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            while not stop.is_set():
                trio.run(use_trio, io_manager="aiopoll")
        except BaseException as failure:
            failures.append(failure)

    def child() -> None:
        signal.alarm(10)
        trio.run(use_trio, io_manager="aiopoll")

    threads = [threading.Thread(target=churn) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            assert reap(fork(child)) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
    assert not failures


def test_a_child_that_goes_on_takes_no_wakeup_from_the_parent() -> None:
    """Not even one that comes when the parent has begun to wait for it but is not asleep yet."""
    before_sleep: list[Callable[[], object]] = []

    class Hooked(trio_aiopoll.AiopollIOManager):
        def get_events(self, timeout: float) -> list[Any]:
            if timeout > 0 and before_sleep:
                before_sleep.pop()()
            return super().get_events(timeout)

    async def run_for_a_while(requests: int, answers: int) -> None:
        os.set_blocking(requests, False)
        while True:
            await trio.lowlevel.checkpoint()
            with suppress(BlockingIOError):
                os.read(requests, 1)
                for _ in range(100):
                    await trio.lowlevel.checkpoint()
                os.write(answers, b"x")

    async def main() -> None:
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        requests, to_child = os.pipe()
        from_child, answers = os.pipe()
        pid = os.fork()
        if pid == 0:
            begin_child()
            await run_for_a_while(requests, answers)

        def wake() -> None:
            token.run_sync_soon(event.set)
            os.write(to_child, b"x")
            os.read(from_child, 1)

        before_sleep.append(wake)
        try:
            with trio.fail_after(5):
                await event.wait()
        finally:
            os.kill(pid, signal.SIGKILL)
            assert reap(pid) == -signal.SIGKILL
            for fd in (requests, to_child, from_child, answers):
                os.close(fd)

    trio.run(main, io_manager=Hooked)
    assert not before_sleep


def test_a_child_that_goes_on_gets_the_wakeups_of_its_own_threads() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        with a, b:
            pid = os.fork()
            if pid == 0:
                begin_child()
                token = trio.lowlevel.current_trio_token()
                for _ in range(300):
                    event = trio.Event()
                    threading.Thread(target=token.run_sync_soon, args=(event.set,)).start()
                    with trio.move_on_after(5):
                        await event.wait()
                    if not event.is_set():
                        os._exit(1)
                os._exit(0)
            b.close()  # the child has the other one, and closes it by its end
            with trio.fail_after(TIMEOUT):
                await trio.lowlevel.wait_readable(a)
            assert reap(pid) == 0

    trio.run(main, io_manager="aiopoll")


def test_a_child_that_goes_on_says_so_in_the_log(tmp_path: Path) -> None:
    program = (
        "import logging, os, trio, trio_aiopoll\n"
        "logging.basicConfig()\n"
        "async def main():\n"
        "    if os.fork() > 0:\n"
        "        os.wait()\n"
        "    await trio.sleep(0.01)\n"
        "trio.run(main, io_manager='aiopoll')\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, check=True)
    assert len(re.findall("forked", result.stderr)) == 1
