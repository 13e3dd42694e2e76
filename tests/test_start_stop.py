"""Guarantee: runs start and stop without slow system calls, and leave nothing behind: no descriptor, memory or budget.

Not even where they fail at their start. Destroying an AIO ring takes tens of milliseconds, so rings are kept for the
next run, in a bounded number.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PATIENCE: Final = 60  # seconds
IDLE_RINGS: Final = 4  # POOL_IDLE_MAX in _pool.h
RUNS: Final = 10_000


@pytest.fixture(params=["epoll", "aiopoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    manager: str = request.param
    return manager


def open_descriptors() -> dict[str, str]:
    result = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            result[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return result


def rings_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/[aio]")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def wait_until_idle_rings_are_few() -> None:
    deadline = time.monotonic() + PATIENCE
    while rings_mapped() > IDLE_RINGS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert rings_mapped() <= IDLE_RINGS


#########################
# What a run may do
#########################


async def do_nothing() -> None:
    await trio.lowlevel.checkpoint()


async def do_some_io() -> None:
    """A wait in the ring that is woken, one in the epoll lane that is woken, and one of each that is cancelled."""
    sock, peer = socket.socketpair()
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for make_ready in (lambda: (peer.send(b"x"), os.eventfd_write(eventfd, 1)), None):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, sock)
                nursery.start_soon(trio.lowlevel.wait_readable, eventfd)
                await wait_all_tasks_blocked()
                if make_ready is None:
                    nursery.cancel_scope.cancel()
                else:
                    make_ready()
            if make_ready is not None:
                sock.recv(1)
                os.eventfd_read(eventfd)
    finally:
        trio.lowlevel.notify_closing(sock)
        trio.lowlevel.notify_closing(eventfd)
        sock.close()
        peer.close()
        os.close(eventfd)


async def fail_with_waits_in_flight() -> None:
    sock, peer = socket.socketpair()
    with sock, peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, sock)
            await wait_all_tasks_blocked()
            raise LookupError


async def use_many_rings(pairs: int = 1500) -> None:
    opened = [socket.socketpair() for _ in range(pairs)]
    async with trio.open_nursery() as nursery:
        for pair in opened:
            for sock in pair:
                nursery.start_soon(trio.lowlevel.wait_readable, sock)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    for pair in opened:
        for sock in pair:
            sock.close()


def run(main: Callable[..., Awaitable[None]], io_manager: str) -> None:
    try:
        trio.run(main, io_manager=io_manager)
    except Exception as error:
        if not all(isinstance(one, LookupError) for one in getattr(error, "exceptions", [error])):
            raise


#########################
# Leaks
#########################


@pytest.mark.parametrize("main", [do_nothing, do_some_io, fail_with_waits_in_flight])
def test_many_runs_leak_no_descriptor_no_memory_and_no_budget(
    io_manager: str, main: Callable[[], Awaitable[None]]
) -> None:
    runs = RUNS if (main, io_manager) == (do_nothing, "aiopoll") else RUNS // 10
    for _ in range(runs // 5):
        run(main, io_manager)
    gc.collect()
    descriptors, rings, resident = open_descriptors(), rings_mapped(), resident_bytes()
    for _ in range(runs):
        run(main, io_manager)
    gc.collect()
    assert open_descriptors() == descriptors
    assert rings_mapped() <= rings
    per_run = (resident_bytes() - resident) / runs
    assert per_run < (200 if runs == RUNS else 2000), f"{per_run:.0f} bytes a run"


def python_bytes_left_by(runs: int, main: Callable[[], Awaitable[None]], io_manager: str) -> int:
    for _ in range(20):
        run(main, io_manager)
    tracemalloc.start()
    try:
        run(main, io_manager)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(runs):
            run(main, io_manager)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


@pytest.mark.parametrize("main", [do_nothing, do_some_io, fail_with_waits_in_flight])
def test_many_runs_leak_no_more_python_objects_than_on_stock_trio(main: Callable[[], Awaitable[None]]) -> None:
    runs = 200
    stock, ours = (python_bytes_left_by(runs, main, io_manager) for io_manager in ("epoll", "aiopoll"))
    assert (ours - stock) / runs < 30, f"after {runs} runs {ours} bytes are left, on stock {stock}"


@pytest.mark.parametrize("main", [do_nothing, do_some_io, use_many_rings])
def test_a_run_has_closed_its_descriptors_when_it_returns(io_manager: str, main: Callable[[], Awaitable[None]]) -> None:
    """It does not leave that to the garbage collector."""
    run(main, io_manager)
    gc.collect()
    before = open_descriptors()
    gc.disable()
    try:
        for _ in range(3):
            run(main, io_manager)
        left = {name: file for name, file in open_descriptors().items() if name not in before}
    finally:
        gc.enable()
        gc.collect()
    assert left == {}


#########################
# Failing at the start
#########################


class BadClock(trio.abc.Clock):
    def start_clock(self) -> None:
        raise LookupError("no time")

    def current_time(self) -> float:
        raise AssertionError

    def deadline_to_sleep_time(self, deadline: float) -> float:
        raise AssertionError


def not_async() -> None:
    pass


async def call_run_inside_a_run() -> None:
    trio.run(do_nothing, io_manager="aiopoll")


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((not_async,), {}, TypeError),
        ((do_nothing, "one argument too many"), {}, TypeError),
        ((do_nothing(),), {}, TypeError),
        ((do_nothing,), {"clock": BadClock()}, trio.TrioInternalError),
        ((do_nothing,), {"instruments": 5}, TypeError),
        ((do_nothing,), {"no_such_option": 5}, TypeError),
        ((call_run_inside_a_run,), {}, RuntimeError),
    ],
    ids=["not async", "wrong arguments", "coroutine", "clock fails", "bad instruments", "bad option", "run in a run"],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_runs_that_fail_at_their_start_leak_nothing(
    io_manager: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception]
) -> None:
    def fail() -> None:
        with pytest.raises(error):
            trio.run(*args, io_manager=io_manager, **kwargs)

    for _ in range(10):
        fail()
    run(do_nothing, io_manager)
    gc.collect()
    descriptors, rings = open_descriptors(), rings_mapped()
    for _ in range(100):
        fail()
    gc.collect()
    assert open_descriptors() == descriptors
    assert rings_mapped() <= rings
    run(do_some_io, io_manager)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in open_descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, before[1]))
    taken = []
    try:
        try:
            while True:
                taken.append(os.dup(0))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_runs_that_find_no_descriptor_fail_only_when_stock_trio_fails_and_leak_nothing() -> None:
    failed: dict[str, list[int]] = {}
    for io_manager in ("epoll", "aiopoll"):
        run(do_nothing, io_manager)
        gc.collect()
        descriptors, rings = open_descriptors(), rings_mapped()
        failed[io_manager] = []
        for left in range(10):
            for _ in range(10):
                try:
                    with descriptors_left(left):
                        trio.run(do_nothing, io_manager=io_manager)
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                    failed[io_manager].append(left)
        gc.collect()
        assert open_descriptors() == descriptors
        assert rings_mapped() <= rings
        run(do_some_io, io_manager)
    assert failed["aiopoll"]
    assert set(failed["aiopoll"]) <= set(failed["epoll"])


def run_child(script: str, *prefix: str) -> str:
    result = subprocess.run(
        [*prefix, sys.executable, "-P", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_runs_that_find_no_budget_leak_nothing() -> None:
    """In a process without idle rings, and with another that has taken what the host allows."""
    script = """
        import ctypes, os, platform, subprocess, sys, time, trio, trio_aiopoll
        hog = '''if True:
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
        '''
        def left():
            return len(os.listdir("/proc/self/fd")), open("/proc/self/maps").read().count("/[aio]")

        with subprocess.Popen(
            [sys.executable, "-c", hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "spent\\n"
            before = left()
            for _ in range(200):
                try:
                    trio.run(trio.sleep, 0, io_manager="aiopoll")
                except trio_aiopoll.UnavailableError as error:
                    assert "budget" in str(error)
                else:  # somebody else gave back a ring's worth, and we were faster than the other process
                    print("disturbed")
                    sys.exit()
            assert left() == before, (before, left())
            process.kill()
        deadline = time.monotonic() + 30
        while not trio_aiopoll.probe().available and time.monotonic() < deadline:
            time.sleep(0.02)
        trio.run(trio.sleep, 0, io_manager="aiopoll")
        print("done")
    """
    deadline = time.monotonic() + PATIENCE
    while (answer := run_child(script)) == "disturbed\n":
        assert time.monotonic() < deadline, "others give back budget all the time"
    assert answer == "done\n"


#########################
# Rings are kept
#########################


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_ring_is_destroyed_on_the_way_of_a_run(tmp_path: Path) -> None:
    """And the next run makes none."""
    log = tmp_path / "log"
    script = """
        import trio, trio_aiopoll
        for _ in range(50):
            trio.run(trio.sleep, 0, io_manager="aiopoll")
    """
    run_child(script, "strace", "-f", "-qq", "-e", "trace=io_setup,io_destroy", "-e", "signal=none", "-o", str(log))
    calls = log.read_text().splitlines()
    assert len([call for call in calls if "io_setup(" in call]) == 1, calls
    assert not [call for call in calls if "io_destroy(" in call], calls


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_surplus_rings_are_destroyed_in_a_thread_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = """
        import os, socket, time, trio, trio_aiopoll
        from trio.testing import wait_all_tasks_blocked

        async def main():
            pairs = [socket.socketpair() for _ in range(2200)]
            async with trio.open_nursery() as nursery:
                for pair in pairs:
                    for sock in pair:
                        nursery.start_soon(trio.lowlevel.wait_readable, sock)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()

        trio.run(main, io_manager="aiopoll")
        while open("/proc/self/maps").read().count("/[aio]") > 4:
            time.sleep(0.02)
        print(os.getpid())
    """
    pid = run_child(
        script, "strace", "-f", "-qq", "-e", "trace=io_setup,io_destroy", "-e", "signal=none", "-o", str(log)
    ).strip()
    destroyers = {call.split()[0] for call in log.read_text().splitlines() if "io_destroy(" in call}
    assert destroyers
    assert pid not in destroyers


def test_idle_rings_are_bounded_in_number() -> None:
    """Many runs at once in many threads need many rings, and keep few of them."""
    count = 3 * IDLE_RINGS
    all_running = threading.Barrier(count)
    most = 0

    async def main() -> None:
        nonlocal most
        all_running.wait(PATIENCE)
        most = max(most, rings_mapped())
        all_running.wait(PATIENCE)
        await do_some_io()

    threads = [threading.Thread(target=run, args=(main, "aiopoll")) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most >= count
    wait_until_idle_rings_are_few()


def test_a_process_may_exit_while_rings_are_being_destroyed() -> None:
    script = """
        import socket, trio, trio_aiopoll
        from trio.testing import wait_all_tasks_blocked

        async def main():
            pairs = [socket.socketpair() for _ in range(2200)]
            async with trio.open_nursery() as nursery:
                for pair in pairs:
                    for sock in pair:
                        nursery.start_soon(trio.lowlevel.wait_readable, sock)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()

        trio.run(main, io_manager="aiopoll")
        print("done")
    """
    assert run_child(script) == "done\n"


def test_a_run_leaves_no_file_held_that_its_tasks_waited_for(io_manager: str) -> None:
    """Also where the run is ended by an exception, with waits in many rings."""
    pairs = [socket.socketpair() for _ in range(1500)]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for sock, _ in pairs:
                nursery.start_soon(trio.lowlevel.wait_readable, sock)
            await wait_all_tasks_blocked()
            raise LookupError

    run(main, io_manager)
    held = 0
    for sock, peer in pairs:
        sock.close()
        try:
            held += peer.recv(1, socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            held += 1
        peer.close()
    assert held == 0


def test_a_run_that_never_waits_is_available_as_often_as_one_likes() -> None:
    """A run in a run is refused, and the outer one goes on."""

    async def main() -> None:
        for _ in range(100):
            with pytest.raises(RuntimeError):
                trio.run(do_nothing, io_manager="aiopoll")
        await do_some_io()

    trio.run(main, io_manager="aiopoll")
    assert trio_aiopoll.probe().available


def test_a_run_that_does_nothing_special_opens_no_more_descriptors_than_on_stock_trio() -> None:
    async def main() -> int:
        return len(open_descriptors())

    stock, ours = (trio.run(main, io_manager=name) for name in ("epoll", "aiopoll"))
    assert ours <= stock


class SetAfterWakeup(trio.abc.Instrument):
    """Sets the event after the wakeup that somebody has asked for; there is no other until then."""

    def __init__(self, event: trio.Event) -> None:
        self.event = event
        self.asked = False

    def after_io_wait(self, timeout: float) -> None:
        if self.asked:
            self.event.set()


@pytest.mark.parametrize("lane", [False, True])
def test_any_thread_can_force_a_run_to_wake_up(io_manager: str, lane: bool) -> None:
    """Trio does so in guest mode only, but the method is there in every run. ``lane``: somebody waits on an eventfd."""

    async def main() -> None:
        manager: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager  # type: ignore[attr-defined]
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)

        def force() -> None:
            instrument.asked = True
            manager.force_wakeup()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                if lane:
                    nursery.start_soon(trio.lowlevel.wait_readable, eventfd)
                for _ in range(20):
                    instrument = SetAfterWakeup(trio.Event())
                    trio.lowlevel.add_instrument(instrument)
                    await wait_all_tasks_blocked()
                    thread = threading.Thread(target=force)
                    thread.start()
                    await instrument.event.wait()
                    trio.lowlevel.remove_instrument(instrument)
                    thread.join()
                nursery.cancel_scope.cancel()
        trio.lowlevel.notify_closing(eventfd)
        os.close(eventfd)

    trio.run(main, io_manager=io_manager)
