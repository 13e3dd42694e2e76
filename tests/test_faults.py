"""Guarantee: whatever AIO's system calls answer, a run is refused with a clear error, or goes on without hang or spin.

The faults are real: a seccomp filter in a child process makes a system call fail, before the run starts or in the
middle of it. Run as a program, this file is the laboratory: it reads one experiment a line, forks for each, and reports
a line.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import faulthandler
import json
import logging
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ARCHITECTURES: Final[dict[str, tuple[int, int, dict[str, int]]]] = {
    # name: (AUDIT_ARCH_..., number of seccomp(), numbers of the five calls)
    "x86_64": (
        0xC000003E,
        317,
        {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209, "io_cancel": 210},
    ),
    "aarch64": (
        0xC00000B7,
        277,
        {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_cancel": 3, "io_getevents": 4},
    ),
}

ERRORS_OF: Final = {
    "io_setup": ("EPERM", "ENOSYS", "EINVAL", "EAGAIN", "EFAULT", "ENOMEM"),
    "io_submit": ("EPERM", "ENOSYS", "EINVAL", "EAGAIN", "EFAULT", "EBADF", "ENOMEM"),
    "io_getevents": ("EPERM", "ENOSYS", "EINVAL", "EFAULT", "EINTR"),
    "io_cancel": ("EPERM", "ENOSYS", "EINVAL", "EAGAIN", "EFAULT", "EINPROGRESS"),
    "io_destroy": ("EPERM", "ENOSYS", "EINVAL", "EFAULT"),
}
EVERY_FAULT: Final = [(call, error) for call, errors in ERRORS_OF.items() for error in errors]
NEEDED_FAULTS: Final = [(call, error) for call, error in EVERY_FAULT if call != "io_destroy"]

PATIENCE: Final = 60.0


##############################
# The laboratory
##############################


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def forbid(call: str, error: str) -> None:
    """From now on ``call`` fails with ``error`` in all threads of this process."""
    arch, seccomp_number, numbers = _ARCHITECTURES[platform.machine()]
    load, jump_if_equal, ret = 0x20, 0x15, 0x06
    allow, fail = 0x7FFF0000, 0x00050000 | getattr(errno, error)
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_if_equal, 0, 3, arch),
        (load, 0, 0, 0),  # seccomp_data.nr
        (jump_if_equal, 0, 1, numbers[call]),
        (ret, 0, 0, fail),
        (ret, 0, 0, allow),
    ]
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_mode_filter, all_threads = 38, 1, 1
    if libc.prctl(set_no_new_privileges, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if libc.syscall(seccomp_number, set_mode_filter, all_threads, ctypes.byref(program)) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


class LogLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("trio_aiopoll")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def exchange() -> str:
    """A wait that has to sleep, a wait that has not, a cancelled wait: returns the backend that served them."""
    a, b = socket.socketpair()
    with a, b, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, a)
            await trio.testing.wait_all_tasks_blocked()
            b.send(b"x")
        a.recv(1)
        await trio.lowlevel.wait_writable(a)
        with trio.move_on_after(0.01) as scope:
            await trio.lowlevel.wait_readable(a)
        assert scope.cancelled_caught
        await trio.sleep(0.01)
        return str(trio.lowlevel.current_statistics().io_statistics.backend)


def before_the_run(faults: list[tuple[str, str]]) -> dict[str, Any]:
    """Answers of "aiopoll", "auto" and probe() where the calls fail from the start."""
    log = LogLines()
    for call, error in faults:
        forbid(call, error)
    report: dict[str, Any] = {}
    try:
        report["aiopoll"] = trio.run(exchange, io_manager="aiopoll")
    except trio_aiopoll.UnavailableError as refusal:
        report["refusal"] = str(refusal)
        report["refused with a cause"] = refusal.__cause__ is not None
    result = trio_aiopoll.probe()
    report["probe"] = [result.available, result.reason]
    log.lines.clear()
    report["auto"] = trio.run(exchange, io_manager="auto")
    report["log"] = log.lines
    return report


class Exhibit:
    """Tasks that wait for files of several kinds, and a count of what they got."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.readers: dict[int, Callable[[], object]] = {}  # {fd: make it readable}
        self.got: dict[int, int] = {}
        self.files: list[socket.socket] = []
        self.changed = trio.Event()

    def add_reader(self, fd: int, feed: Callable[[], object]) -> None:
        os.set_blocking(fd, False)
        self.readers[fd] = feed
        self.got[fd] = 0
        self.nursery.start_soon(self.read_for_ever, fd)

    def add_socket_reader(self, family: int = socket.AF_UNIX) -> None:
        a, b = stream_pair(family)
        self.files += [a, b]
        self.add_reader(a.fileno(), lambda: b.send(b"x"))

    def add_pipe_reader(self) -> None:
        reader, writer = os.pipe()
        self.add_reader(reader, lambda: os.write(writer, b"x"))

    def add_eventfd_reader(self) -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.add_reader(fd, lambda: os.eventfd_write(fd, 1))

    async def read_for_ever(self, fd: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(fd)
            os.read(fd, 8)  # BlockingIOError: it was woken for nothing
            self.got[fd] += 1
            self.changed.set()

    async def feed_all(self) -> None:
        """Every waiting task gets one thing, and gets it once."""
        wanted = {fd: count + 1 for fd, count in self.got.items()}
        for feed in self.readers.values():
            feed()
        while self.got != wanted:
            assert all(self.got[fd] <= wanted[fd] for fd in wanted), (self.got, wanted)
            self.changed = trio.Event()
            await self.changed.wait()


def stream_pair(family: int = socket.AF_UNIX) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        a, b = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            a = socket.create_connection(listener.getsockname())
            b, _ = listener.accept()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


def assert_eof(peer: socket.socket, where: str) -> None:
    try:
        data = peer.recv(1)
    except BlockingIOError:
        raise AssertionError(f"{where}: the closed socket is held open") from None
    assert data == b"", f"{where}: {data!r}"


class Operations:
    """What a program does after the fault has set in, each on its own."""

    def __init__(self, exhibit: Exhibit, releases: bool) -> None:
        self.exhibit = exhibit
        self.releases = releases
        self.to_cancel: list[tuple[trio.CancelScope, socket.socket, socket.socket, trio.Event]] = []
        self.to_close: list[tuple[socket.socket, socket.socket, trio.Event]] = []

    async def prepare(self) -> None:
        """Puts waits in flight that will be cancelled and closed later."""
        for _ in range(3):
            a, b = stream_pair()
            scope, done = trio.CancelScope(), trio.Event()
            self.to_cancel.append((scope, a, b, done))
            self.exhibit.nursery.start_soon(self.wait_until_cancelled, scope, a, done)
        for _ in range(3):
            a, b = stream_pair()
            done = trio.Event()
            self.to_close.append((a, b, done))
            self.exhibit.nursery.start_soon(self.wait_until_closed, a, done)
        await trio.testing.wait_all_tasks_blocked()

    async def wait_until_cancelled(self, scope: trio.CancelScope, sock: socket.socket, done: trio.Event) -> None:
        with scope:
            await trio.lowlevel.wait_readable(sock)
        assert scope.cancelled_caught
        sock.close()
        done.set()

    async def wait_until_closed(self, sock: socket.socket, done: trio.Event) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(sock)
        done.set()

    async def wake(self) -> None:
        await self.exhibit.feed_all()

    async def cancel(self) -> None:
        scope, _, peer, done = self.to_cancel.pop()
        scope.cancel()
        await done.wait()
        if self.releases:
            assert_eof(peer, "cancel")
        for scope, _, _, _ in self.to_cancel:
            scope.cancel()
        for _, _, peer, done in self.to_cancel:
            await done.wait()
            if self.releases:
                assert_eof(peer, "cancel of several")
        self.to_cancel.clear()

    async def close(self) -> None:
        for sock, peer, done in self.to_close:
            trio.lowlevel.notify_closing(sock)
            sock.close()
            if self.releases:
                assert_eof(peer, "notify_closing")
            await done.wait()
        self.to_close.clear()

    async def idle(self) -> None:
        cpu = time.process_time()
        began = time.monotonic()
        await trio.sleep(0.2)
        took = time.monotonic() - began
        assert took >= 0.2
        cpu = time.process_time() - cpu
        assert cpu < 0.05, f"{cpu:.3f} s of CPU time in {took:.3f} s of idleness"

    async def arrive(self) -> None:
        for family in (socket.AF_UNIX, socket.AF_INET):
            self.exhibit.add_socket_reader(family)
        self.exhibit.add_pipe_reader()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            await self.exhibit.feed_all()

    async def busy(self) -> None:
        a, b = stream_pair()
        with a, b, trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, a)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await trio.lowlevel.wait_readable(a)
                b.send(b"x")
            trio.lowlevel.notify_closing(a)

    async def threads(self) -> None:
        for _ in range(5):
            await trio.to_thread.run_sync(trio.from_thread.run_sync, int)

    async def write(self) -> None:
        a, b = stream_pair()
        with a, b:
            try:
                while True:
                    a.send(bytes(65536))
            except BlockingIOError:
                pending = trio.Event()
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    await trio.lowlevel.wait_writable(a)
                    pending.set()

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                assert not pending.is_set()
                while not pending.is_set():
                    try:
                        b.recv(1 << 20)
                    except BlockingIOError:
                        await pending.wait()
            trio.lowlevel.notify_closing(a)


OPERATIONS: Final = ("wake", "cancel", "close", "idle", "arrive", "busy", "threads", "write")


async def live_through(faults: list[tuple[str, str]], first: str, releases: bool) -> None:
    with trio.fail_after(PATIENCE / 2):
        async with trio.open_nursery() as nursery:
            exhibit = Exhibit(nursery)
            for family in (socket.AF_UNIX, socket.AF_INET):
                for _ in range(3):
                    exhibit.add_socket_reader(family)
            for _ in range(3):
                exhibit.add_pipe_reader()
            exhibit.add_eventfd_reader()
            operations = Operations(exhibit, releases)
            await operations.prepare()
            await exhibit.feed_all()
            await trio.testing.wait_all_tasks_blocked()
            for call, error in faults:
                forbid(call, error)
            await getattr(operations, first)()
            for name in OPERATIONS:
                if name != first:
                    await getattr(operations, name)()
            await exhibit.feed_all()
            nursery.cancel_scope.cancel()


def in_the_middle(faults: list[tuple[str, str]], first: str, releases: bool) -> dict[str, Any]:
    log = LogLines()
    began = time.monotonic()
    trio.run(live_through, faults, first, releases, io_manager="aiopoll")
    took = time.monotonic() - began
    lines = log.lines[:]
    # a next run works too, or says clearly that it cannot
    try:
        trio.run(exchange, io_manager="aiopoll")
    except trio_aiopoll.UnavailableError as refusal:
        assert faults[0][0] in str(refusal)  # noqa: PT017
    assert trio.run(exchange, io_manager="auto") in ("aiopoll", "epoll")
    return {"took": took, "log": lines}


def in_the_middle_as_guest(faults: list[tuple[str, str]], first: str, releases: bool) -> dict[str, Any]:
    """The same with the I/O thread blocked when the fault sets in, and host code that closes a file first."""
    log = LogLines()
    inside = threading.Event()

    class Announcing(trio_aiopoll.AiopollIOManager):
        def get_events(self, timeout: float) -> list[Any]:
            if timeout > 0:
                inside.set()
            return super().get_events(timeout)

    async def host() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        a, b = stream_pair()
        outcomes: list[str] = []
        prepared = asyncio.Event()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                exhibit = Exhibit(nursery)
                for _ in range(3):
                    exhibit.add_socket_reader()
                prepared.set()
                try:
                    await trio.lowlevel.wait_readable(a)
                except trio.ClosedResourceError:
                    outcomes.append("closed")
                with trio.fail_after(PATIENCE / 2):
                    await exhibit.feed_all()
                    await exhibit.feed_all()
                nursery.cancel_scope.cancel()

        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: done.set_result(outcome.unwrap()),
            io_manager=Announcing,
        )
        await prepared.wait()
        await wait_until_asleep(inside)
        for call, error in faults:
            forbid(call, error)
        trio.lowlevel.notify_closing(a)
        a.close()
        if releases:
            assert_eof(b, "host code")
        await asyncio.wait_for(done, PATIENCE / 2)
        assert outcomes == ["closed"]

    began = time.monotonic()
    asyncio.run(host())
    return {"took": time.monotonic() - began, "log": log.lines}


def calls_of_all_threads() -> list[str]:
    return [file.read_text().split()[0] for file in Path("/proc/self/task").glob("*/syscall")]


async def wait_until_asleep(inside: threading.Event) -> None:
    """Return when another thread of this process sleeps in io_getevents()."""
    number = _ARCHITECTURES[platform.machine()][2]["io_getevents"]
    while True:
        if inside.is_set() and str(number) in calls_of_all_threads():
            return
        await asyncio.sleep(0.001)


EXPERIMENTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "before_the_run": before_the_run,
    "in_the_middle": in_the_middle,
    "in_the_middle_as_guest": in_the_middle_as_guest,
}


def experiment(request: dict[str, Any]) -> dict[str, Any]:
    """Carry one out in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            report = EXPERIMENTS[request.pop("name")](**request)
        except BaseException:
            report = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(report).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    answer = b""
    if select.select([reader], [], [], PATIENCE + 10)[0]:
        answer = os.read(reader, 65536)
    os.close(reader)
    if not answer:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return dict(json.loads(answer)) if answer else {"error": f"no answer; status {os.waitstatus_to_exitcode(status)}"}


##############################
# The tests
##############################

if __name__ != "__main__":
    pytestmark = pytest.mark.skipif(
        platform.machine() not in _ARCHITECTURES, reason="the numbers of the system calls are not known here"
    )


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Callable[..., dict[str, Any]]]:
    program = subprocess.Popen(
        [sys.executable, "-P", __file__] if sys.version_info >= (3, 11) else [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None

    def ask(name: str, faults: list[tuple[str, str]], **arguments: object) -> dict[str, Any]:
        print(json.dumps({"name": name, "faults": faults, **arguments}), file=program.stdin, flush=True)
        report: dict[str, Any] = json.loads(program.stdout.readline())
        assert "error" not in report, report["error"]
        return report

    with program:
        yield ask
        program.stdin.close()
        assert program.wait(PATIENCE) == 0


@pytest.mark.parametrize(("call", "error"), NEEDED_FAULTS)
def test_a_call_that_fails_from_the_start_is_named_with_its_errno(
    laboratory: Callable[..., dict[str, Any]], call: str, error: str
) -> None:
    report = laboratory("before_the_run", [(call, error)])
    if error == "EINTR":  # it may be a signal, each time
        assert report["auto"] in ("aiopoll", "epoll")
        return
    assert "refusal" in report, report
    for reason in (report["refusal"], report["probe"][1]):
        assert f"{call}()" in reason
        # a lie about a cancelled poll is found out by its event, which does not come
        assert error in reason or (error in ("EINVAL", "EINPROGRESS") and call == "io_cancel" and "ETIMEDOUT" in reason)
        assert "auto" in reason
    assert report["probe"][0] is False
    assert report["auto"] == "epoll"
    assert len(report["log"]) == 1
    assert report["refusal"] in report["log"][0] or call in report["log"][0]


@pytest.mark.parametrize("error", ERRORS_OF["io_destroy"])
def test_a_ring_that_cannot_be_destroyed_does_not_keep_aiopoll_from_working(
    laboratory: Callable[..., dict[str, Any]], error: str
) -> None:
    report = laboratory("before_the_run", [("io_destroy", error)])
    assert report["aiopoll"] == report["auto"] == "aiopoll"
    assert report["probe"] == [True, None]
    assert report["log"] == []


# Answers io_setup() with a ring that no kernel has made.
_STRANGE_KERNEL: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>

long syscall(long number, ...)
{
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_destroy)
        return 0;
    if (number != SYS_io_setup)
        return ((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    uint32_t *ring = mmap(0, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t header[] = {1, 127, 0, 0, 0xa10a10a2, 1, 0, 32};
    for (int i = 0; i < 8; i++)
        ring[i] = header[i];
    *(unsigned long *)a[1] = (unsigned long)ring;
    return 0;
}
"""


def test_a_ring_of_an_unknown_kind_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "strange.c").write_text(_STRANGE_KERNEL)
    library = tmp_path / "strange.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(tmp_path / "strange.c"), "-ldl"], check=True
    )
    script = """if True:
        import trio, trio_aiopoll

        async def backend():
            return trio.lowlevel.current_statistics().io_statistics.backend

        try:
            trio.run(backend, io_manager="aiopoll")
        except trio_aiopoll.UnavailableError as error:
            print(error)
        print(trio_aiopoll.probe().reason)
        print(trio.run(backend, io_manager="auto"))
    """
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    refusal, reason, backend = answer.stdout.splitlines()
    assert "io_setup() failed with EPROTO" in refusal
    assert "magic" in refusal
    assert reason == refusal
    assert backend == "epoll"


@pytest.mark.parametrize(("call", "error"), EVERY_FAULT)
def test_a_run_goes_on_when_a_call_begins_to_fail(
    laboratory: Callable[..., dict[str, Any]], call: str, error: str
) -> None:
    report = laboratory("in_the_middle", [(call, error)], first="wake", releases=True)
    assert report["took"] < 10
    assert len(report["log"]) <= 1


@pytest.mark.parametrize("first", ["cancel", "close", "arrive", "busy"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("io_submit", "EPERM"),
        ("io_submit", "EINVAL"),
        ("io_submit", "EAGAIN"),
        ("io_getevents", "EPERM"),
        ("io_cancel", "EPERM"),
    ],
)
def test_a_run_goes_on_whichever_operation_meets_the_fault_first(
    laboratory: Callable[..., dict[str, Any]], call: str, error: str, first: str
) -> None:
    report = laboratory("in_the_middle", [(call, error)], first=first, releases=True)
    assert report["took"] < 10
    assert len(report["log"]) <= 1


@pytest.mark.parametrize("error", ["EPERM", "EAGAIN", "EINVAL"])
def test_a_run_goes_on_when_every_call_begins_to_fail(laboratory: Callable[..., dict[str, Any]], error: str) -> None:
    faults = [(call, error) for call in ERRORS_OF]
    report = laboratory("in_the_middle", faults, first="wake", releases=False)
    assert report["took"] < 10


@pytest.mark.parametrize("call", ["io_submit", "io_getevents", "io_cancel"])
def test_a_run_goes_on_when_the_ring_can_be_neither_used_nor_destroyed(
    laboratory: Callable[..., dict[str, Any]], call: str
) -> None:
    report = laboratory("in_the_middle", [(call, "EPERM"), ("io_destroy", "EPERM")], first="close", releases=False)
    assert report["took"] < 10


@pytest.mark.parametrize(("call", "error"), EVERY_FAULT)
def test_a_guest_run_goes_on_when_a_call_begins_to_fail_while_its_thread_sleeps(
    laboratory: Callable[..., dict[str, Any]], call: str, error: str
) -> None:
    report = laboratory("in_the_middle_as_guest", [(call, error)], first="", releases=True)
    assert report["took"] < 10


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(experiment(json.loads(line))), flush=True)
