"""The processes of a contest: who is measured runs on one CPU, who makes the load on another."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ._model import RivalFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
ANSWER_WITHIN = 120.0


def cpus() -> tuple[int, int]:
    """The CPU of who is measured, and that of who makes the load."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def raise_fd_limit() -> int:
    """Allow as many descriptors as may be had; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def child_command(mode: str, benchmark: str, rival: str, parameters: Mapping[str, Any], *rest: object) -> list[str]:
    words = [mode, benchmark, rival, json.dumps(dict(parameters)), *rest]
    return [sys.executable, "-m", "benchmarks._child", *(str(word) for word in words)]


def _last_words(complaints: str, code: int) -> str:
    lines = complaints.strip().splitlines()
    return lines[-1] if lines else f"ended with status {code}"


class Talker:
    """A child process that answers with lines."""

    def __init__(self, process: subprocess.Popen[str], complaints: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._complaints = complaints
        self._in = process.stdin
        self._out = process.stdout

    def answer(self) -> str:
        line = self._out.readline()
        if not line:
            self._process.wait()
            self.check()
        return line

    def check(self) -> None:
        """Raise RivalFailed if it is dead."""
        code = self._process.poll()
        if code is not None:
            self._complaints.seek(0)
            raise RivalFailed(_last_words(self._complaints.read(), code))

    def ask(self, question: str) -> str:
        try:
            print(question, file=self._in, flush=True)
        except BrokenPipeError:
            self._process.wait()
            self.check()
        return self.answer()


@contextmanager
def talking(command: Sequence[str], cpu: int) -> Iterator[Talker]:
    """Start a child on that CPU; it is killed in the end."""
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )
        try:
            yield Talker(process, complaints)
        finally:
            process.kill()
            process.communicate()


def run_aside(command: Sequence[str], cpu: int, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end on that CPU; returns its output."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=ANSWER_WITHIN,
        env={**os.environ, **(environment or {})},
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    if result.returncode != 0:
        raise RivalFailed(_last_words(result.stderr, result.returncode))
    return result.stdout


def cpu_time_of(pid: int) -> float:
    """CPU time that all threads of a process have used, in seconds."""
    return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel
