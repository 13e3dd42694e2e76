"""What waiting costs in system calls, counted by strace: on aiopoll a wait costs a small part of one, because all that
a tick has armed goes to the kernel in one call and what has completed is read without any; a tick that finds nothing to
do costs none. Everything that a program does is counted, except for its own data and its memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

TIMEOUT = 120  # seconds: what takes longer hangs
SOCKETS = 64
ROUNDS = 100
WAITS = SOCKETS * ROUNDS
TICKS = 1000
# 0.03 to 0.05, but a run that sleeps wakes up now and then for a second look, the oftener the slower the machine
AT_MOST_PER_WAIT = 0.1

# what a program needs at times of its own choosing
MEMORY = {"brk", "madvise", "mmap", "mprotect", "mremap", "munmap"}

# The arguments of both programs: the I/O manager; and of this one: whether the run sleeps before data comes. The paths
# that they look for tell in strace's output where to begin and to end.
WAITS_PROGRAM = f"""
import os, socket, sys
import trio, trio.testing
import trio_aiopoll

io_manager, sleeps = sys.argv[1], sys.argv[2] == "sleeps"

async def reader(descriptor):
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        os.read(descriptor, 1)

async def main():
    pairs = [socket.socketpair() for _ in range({SOCKETS})]
    async with trio.open_nursery() as nursery:
        for left, _ in pairs:
            left.setblocking(False)
            nursery.start_soon(reader, left.fileno())
        await trio.testing.wait_all_tasks_blocked()
        os.access("/begin", os.F_OK)
        for _ in range({ROUNDS}):
            if sleeps:
                await trio.sleep(0.002)
            for _, right in pairs:
                os.write(right.fileno(), b"x")
            await trio.testing.wait_all_tasks_blocked()
        os.access("/end", os.F_OK)
        nursery.cancel_scope.cancel()

trio.run(main, io_manager=io_manager)
"""

TICKS_PROGRAM = f"""
import os, sys
import trio
import trio_aiopoll

async def main():
    await trio.sleep(0.01)  # Trio's own tasks have begun to wait
    os.access("/begin", os.F_OK)
    for _ in range({TICKS}):
        await trio.lowlevel.checkpoint()
    os.access("/end", os.F_OK)

trio.run(main, io_manager=sys.argv[1])
"""


def system_calls(directory: Path, program: str, *arguments: str) -> Counter[str]:
    """How often each system call is made, by any thread, from where the program begins to where it ends."""
    output = directory / "strace"
    subprocess.run(
        ["strace", "-f", "-o", str(output), sys.executable, "-I", "-c", program, *arguments],
        check=True,
        timeout=TIMEOUT,
    )
    _, begin, rest = output.read_text(errors="replace").partition('"/begin"')
    between, end, _ = rest.partition('"/end"')
    assert begin
    assert end
    lines = between.rpartition("\n")[0]  # without the start of the one that looks for /end
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", lines, re.MULTILINE))
    return Counter({name: count for name, count in calls.items() if name not in MEMORY})


def calls_of_waiting(directory: Path, io_manager: str, how: str) -> Counter[str]:
    calls = system_calls(directory, WAITS_PROGRAM, io_manager, how)
    data = Counter({"read": WAITS, "write": WAITS})
    assert calls >= data
    return calls - data


def report(capsys: pytest.CaptureFixture[str], title: str, calls: Counter[str]) -> None:
    with capsys.disabled():
        each = ", ".join(f"{name} {count}" for name, count in calls.most_common())
        print(f"\n  {title}: {sum(calls.values()) / WAITS:.4f} system calls a wait ({each})")


@pytest.mark.parametrize("how", ["sleeps", "is busy"])
def test_wait_costs_a_small_part_of_a_system_call(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = calls_of_waiting(tmp_path, "epoll", how)
    ours = calls_of_waiting(tmp_path, "aiopoll", how)
    report(capsys, f"epoll, when the run {how}", stock)
    report(capsys, f"aiopoll, when the run {how}", ours)
    assert stock["epoll_ctl"] >= WAITS  # the count counts
    assert ours["io_submit"] >= ROUNDS
    assert how == "is busy" or ours["io_getevents"] >= ROUNDS / 2
    assert sum(ours.values()) <= AT_MOST_PER_WAIT * WAITS


def test_tick_with_nothing_to_do_makes_no_system_call(tmp_path: Path) -> None:
    assert system_calls(tmp_path, TICKS_PROGRAM, "epoll") == {"epoll_wait": TICKS}  # the count counts
    assert system_calls(tmp_path, TICKS_PROGRAM, "aiopoll") == {}
