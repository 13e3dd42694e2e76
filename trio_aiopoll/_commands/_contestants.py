"""Who takes part in a case of ``bench``: a child process each, which runs a round when it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ._load import Load

if TYPE_CHECKING:
    from types import TracebackType

_CHILD: Final = Path(__file__).with_name("_bench_child.py")
_RUN_SCRIPT: Final = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
_ENVIRONMENT: Final = "TRIO_"  # what begins like this would have a say in the choice of the I/O manager


class FailedError(Exception):
    """A rival could not take part; the message says why."""


class _Child:
    def __init__(self, cpu: int, *arguments: object) -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # Not as a script by its path, which would put the directory it lies in on sys.path.
        words = [sys.executable, "-c", _RUN_SCRIPT, str(_CHILD), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_ENVIRONMENT)}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True, env=environment
        )
        os.sched_setaffinity(self._process.pid, {cpu})

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline() or self.fail()

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.fail()
        return self.answer()

    def fail(self) -> Any:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines()
        raise FailedError(lines[-1] if lines else f"its process ended with status {code}")

    def cpu_time(self) -> float:
        """In seconds, of all threads."""
        return time.clock_gettime((~self._process.pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()


class _Contestant:
    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


class WaitsContestant(_Contestant):
    """Tasks that wait, read and write; there is no other process."""

    def __init__(self, rival: str, cpu: int, ready: int) -> None:
        super().__init__()
        self._child = _Child(cpu, "waits", rival, ready)
        self._stack.callback(self._child.close)
        try:
            self._child.answer()
        except BaseException:
            self._stack.close()
            raise

    def round(self, seconds: float) -> dict[str, float]:
        count, cpu, wall = json.loads(self._child.ask(str(seconds)))
        return {"cpu": cpu / count, "rate": count / wall}


class EchoContestant(_Contestant):
    """A server in a child process, and connections to it from here."""

    def __init__(self, rival: str, cpu: int, connections: int, size: int) -> None:
        super().__init__()
        self._child = _Child(cpu, "echo", rival)
        self._stack.callback(self._child.close)
        try:
            self._load = Load(int(self._child.answer()), connections, size)
            self._stack.callback(self._load.close)
            self.round(0.05)
        except OSError as error:
            self._stack.close()
            raise FailedError(str(error)) from None
        except BaseException:
            self._stack.close()
            raise

    def round(self, seconds: float) -> dict[str, float]:
        before = self._child.cpu_time()
        try:
            result = self._load.run(seconds)
        except ConnectionError:
            self._child.fail()
        except OSError as error:
            raise FailedError(str(error)) from None
        return {
            "cpu": (self._child.cpu_time() - before) / result.requests,
            "rate": result.requests / result.seconds,
            "p50": result.latencies[len(result.latencies) // 2],
            "p99": result.latencies[len(result.latencies) * 99 // 100],
        }
