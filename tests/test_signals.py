"""Guarantee: a signal interrupts a blocked run the way it interrupts stock Trio, and costs neither time nor an event.

Where a signal must arrive while the run sleeps in the kernel, a child process sends it, after it has seen in
/proc/PID/task/TID/syscall that the thread sleeps there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

import trio_aiopoll  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The numbers of io_getevents, epoll_wait, epoll_pwait and ppoll/poll, as "what a sleeping run is in".
_SLEEPS: Final = {"x86_64": (208, 232, 281), "aarch64": (4, 22)}
pytestmark = [
    pytest.mark.skipif(platform.machine() not in _SLEEPS, reason="the numbers of the system calls are not known here"),
    pytest.mark.parametrize("io_manager", ["epoll", "aiopoll"]),
]

# Sends each signal of argv[4:] at the time after which it stands, once the thread is seen asleep.
SENDER: Final = """
import os, signal, sys, time
pid, tid, sleeps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
def wait_until_asleep():
    while True:
        with open(f"/proc/{pid}/task/{tid}/syscall") as file:
            if file.read().split()[0] in sleeps:
                return
        time.sleep(0.001)
wait_until_asleep()
began = time.monotonic()
for item in sys.argv[4:]:
    at, name = item.split(":")
    time.sleep(max(0, began + float(at) - time.monotonic()))
    if name == "CONT":
        os.kill(pid, signal.SIGCONT)
        continue
    wait_until_asleep()
    if name == "STOP":
        os.kill(pid, signal.SIGSTOP)
    else:
        signal_number = getattr(signal, "SIG" + name)
        import ctypes
        assert ctypes.CDLL(None, use_errno=True).syscall(%d, pid, tid, signal_number) == 0
""" % {"x86_64": 234, "aarch64": 131}.get(platform.machine(), 0)  # noqa: UP031  tgkill


@contextmanager
def sender(*items: str, tid: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child that sends signals, each ``"seconds:NAME"``, to one thread of this process while that sleeps."""
    sleeps = ",".join(map(str, _SLEEPS[platform.machine()]))
    command = [sys.executable, "-c", SENDER, str(os.getpid()), str(tid or threading.get_native_id()), sleeps, *items]
    with subprocess.Popen(command) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                try:
                    child.wait(1)
                except subprocess.TimeoutExpired:
                    child.kill()


@contextmanager
def handler(signal_number: int, action: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(signal_number, action)
    try:
        yield
    finally:
        signal.signal(signal_number, before)


@contextmanager
def silent_handler(signal_number: int, flags: int) -> Iterator[None]:
    """A handler in C that does nothing, so that Python is not told: all that happens is EINTR."""

    class SigAction(ctypes.Structure):
        _fields_ = (
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_ulong * 16),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    libc = ctypes.CDLL(None, use_errno=True)
    getpid_takes_no_argument = ctypes.cast(libc.getpid, ctypes.c_void_p).value
    action, before = SigAction(getpid_takes_no_argument, flags=flags), SigAction()
    assert libc.sigaction(signal_number, ctypes.byref(action), ctypes.byref(before)) == 0
    try:
        yield
    finally:
        assert libc.sigaction(signal_number, ctypes.byref(before), None) == 0


SA_RESTART: Final = 0x10000000

# A sleep may end late on a busy machine. What must not happen is that it begins anew.
SLEEP: Final = 1.2
LATE: Final = 0.6


def test_control_c_interrupts_a_blocked_run(io_manager: str) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await trio.sleep_forever()

    with sender("0:INT"), pytest.raises(KeyboardInterrupt):
        trio.run(main, io_manager=io_manager)


def test_control_c_interrupts_a_wait_and_lets_go_of_its_file(io_manager: str) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            a, b = socket.socketpair()
            b.setblocking(False)
            with b:
                try:
                    with a:
                        await trio.lowlevel.wait_readable(a)
                finally:
                    seen.append(b.recv(1))

    seen: list[bytes] = []
    with sender("0:INT"), pytest.raises(KeyboardInterrupt):
        trio.run(main, io_manager=io_manager)
    assert seen == [b""]


def test_control_c_works_again_in_the_next_run(io_manager: str) -> None:
    for _ in range(3):
        with sender("0:INT"), pytest.raises(KeyboardInterrupt):
            trio.run(trio.sleep, 30, io_manager=io_manager)
    trio.run(exchange_many, 3, io_manager=io_manager)


async def exchange_many(rounds: int) -> None:
    """Both ends of some connections send ``rounds`` numbered messages each and wait for those of the other end."""
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            for family in (socket.AF_UNIX,) * 8:
                a, b = socket.socketpair(family)
                nursery.start_soon(play, trio.socket.from_stdlib_socket(a), rounds, True)
                nursery.start_soon(play, trio.socket.from_stdlib_socket(b), rounds, False)


async def play(sock: trio.socket.SocketType, rounds: int, serves: bool) -> None:
    with sock:
        for number in range(rounds):
            if serves:
                await sock.send(number.to_bytes(4, "big"))
            received = b""
            while len(received) < 4:
                received += await sock.recv(4 - len(received))
            assert received == number.to_bytes(4, "big")
            if not serves:
                await sock.send(received)


@pytest.mark.parametrize("restart", [False, True], ids=["interrupts", "SA_RESTART"])
def test_a_handled_signal_does_not_end_or_stretch_a_sleep(io_manager: str, restart: bool) -> None:
    handled: list[int] = []
    with handler(signal.SIGUSR1, lambda *_: handled.append(1)):
        signal.siginterrupt(signal.SIGUSR1, not restart)
        with sender("0.2:USR1", "0.5:USR1", "0.9:USR1") as child:
            began = time.monotonic()
            trio.run(trio.sleep, SLEEP, io_manager=io_manager)
            took = time.monotonic() - began
            assert child.wait(10) == 0
    assert len(handled) == 3
    assert SLEEP <= took < SLEEP + LATE


@pytest.mark.parametrize("flags", [0, SA_RESTART], ids=["interrupts", "SA_RESTART"])
def test_an_interruption_that_python_does_not_see_does_not_end_or_stretch_a_sleep(io_manager: str, flags: int) -> None:
    with silent_handler(signal.SIGUSR1, flags), sender("0.9:USR1") as child:
        began = time.monotonic()
        trio.run(trio.sleep, SLEEP, io_manager=io_manager)
        took = time.monotonic() - began
        assert child.wait(10) == 0
    assert SLEEP <= took < SLEEP + LATE


def test_a_stopped_and_continued_process_does_not_end_or_stretch_its_sleep(io_manager: str) -> None:
    with sender("0.9:STOP", "1.0:CONT") as child:
        began = time.monotonic()
        trio.run(trio.sleep, SLEEP, io_manager=io_manager)
        took = time.monotonic() - began
        assert child.wait(10) == 0
    assert SLEEP <= took < SLEEP + LATE


def test_an_interruption_in_a_thread_does_not_end_or_stretch_its_sleep(io_manager: str) -> None:
    took: list[float] = []
    tid: list[int] = []
    started = threading.Event()

    async def main() -> None:
        tid.append(threading.get_native_id())
        started.set()
        began = time.monotonic()
        await trio.sleep(SLEEP)
        took.append(time.monotonic() - began)

    with silent_handler(signal.SIGUSR1, 0):
        thread = threading.Thread(target=lambda: trio.run(main, io_manager=io_manager))
        thread.start()
        assert started.wait(30)
        with sender("0.9:USR1", tid=tid[0]) as child:
            assert child.wait(30) == 0
        thread.join(30)
    assert SLEEP <= took[0] < SLEEP + LATE


def test_an_interruption_is_not_taken_for_quiet(io_manager: str) -> None:
    """Trio takes an empty answer of get_events for the end of the time that it gave."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked(SLEEP)
            nursery.cancel_scope.cancel()

    with silent_handler(signal.SIGUSR1, 0), sender("0.3:USR1", "0.6:USR1", "0.9:USR1") as child:
        began = time.monotonic()
        trio.run(main, io_manager=io_manager)
        took = time.monotonic() - began
        assert child.wait(10) == 0
    assert SLEEP <= took < SLEEP + LATE


def test_a_signal_receiver_gets_what_is_sent_while_the_run_sleeps(io_manager: str) -> None:
    got: list[int] = []

    async def main() -> None:
        with (
            trio.fail_after(30),
            trio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2) as signals,
            sender("0:USR1", "0.05:USR2", "0.1:USR1") as child,
        ):
            async for signal_number in signals:
                got.append(signal_number)
                if len(got) == 3:
                    break
            assert await trio.to_thread.run_sync(child.wait, 10) == 0

    trio.run(main, io_manager=io_manager)
    assert got == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]


@pytest.mark.parametrize("seen_by_python", [True, False], ids=["handled", "unseen"])
def test_a_storm_of_signals_loses_no_event(io_manager: str, seen_by_python: bool) -> None:
    handled: list[int] = []

    async def main() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            await exchange_many(400)
            # and with the run asleep most of the time
            async with trio.open_nursery() as nursery:
                for delay in range(50):
                    nursery.start_soon(send_late, delay / 100)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    async def send_late(delay: float) -> None:
        a, b = socket.socketpair()
        with a, b, trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, a)
                await trio.sleep(delay)
                b.send(b"x")

    # the handler in C stays, Python's own is not called then
    with handler(signal.SIGALRM, lambda *_: handled.append(1)):
        if seen_by_python:
            trio.run(main, io_manager=io_manager)
        else:
            with silent_handler(signal.SIGALRM, 0):
                trio.run(main, io_manager=io_manager)
    assert (len(handled) > 100) == seen_by_python


def test_a_storm_of_signals_does_not_keep_a_deadline_from_expiring(io_manager: str) -> None:
    with silent_handler(signal.SIGALRM, 0):
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            began = time.monotonic()
            trio.run(trio.sleep, 0.5, io_manager=io_manager)
            took = time.monotonic() - began
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert 0.5 <= took < 0.5 + LATE


RAISING_HANDLER: Final = """
import signal, socket, sys, trio, trio.testing, trio_aiopoll

class Raised(Exception):
    pass

def action(*_):
    # again, should it come in the middle of a destructor of what an earlier run has left, where exceptions are ignored
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    raise Raised

async def wait():
    a, b = socket.socketpair()
    with a, b, trio.fail_after(30):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        await trio.lowlevel.wait_readable(a)

async def exchange():
    a, b = socket.socketpair()
    with a, b, trio.fail_after(30):
        for _ in range(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, a)
                await trio.testing.wait_all_tasks_blocked()
                b.send(b"x")
            assert a.recv(10) == b"x"

signal.signal(signal.SIGALRM, action)
for _ in range(3):
    try:
        trio.run(wait, io_manager=sys.argv[1])
    except (Raised, trio.TrioInternalError):
        pass
    else:
        raise AssertionError
    signal.setitimer(signal.ITIMER_REAL, 0)
    trio.run(exchange, io_manager=sys.argv[1])
"""


def test_a_handler_that_raises_ends_the_run_and_leaves_the_next_one_whole(io_manager: str, tmp_path: Path) -> None:
    # in a process of its own, because Trio leaves a mess behind on either manager
    command = [sys.executable, "-c", RAISING_HANDLER, io_manager]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)


def test_a_handler_may_wake_the_run(io_manager: str) -> None:
    async def main() -> None:
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        with handler(signal.SIGUSR1, lambda *_: token.run_sync_soon(event.set)), sender("0:USR1"), trio.fail_after(30):
            await event.wait()

    trio.run(main, io_manager=io_manager)
