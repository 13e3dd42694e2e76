"""The watch that a benchmark has run around what counts."""

from __future__ import annotations

import ctypes
import time


class Watch:
    """Sums the time between `start` and `stop`.

    Attributes:
      cpu: CPU time of all threads, in seconds.
      wall: real time, in seconds.
    """

    def __init__(self) -> None:
        self.cpu = 0.0
        self.wall = 0.0

    def start(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        self.cpu += time.process_time()
        self.wall += time.perf_counter()

    def discount(self, seconds: float) -> None:
        """Take off what was done inside but does not count."""
        self.cpu -= seconds
        self.wall -= seconds


class CountingWatch(Watch):
    """Has callgrind count while it runs; the library is _callgrind.c."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self._library = ctypes.PyDLL(library)

    def start(self) -> None:
        self._library.counting_start()

    def stop(self) -> None:
        self._library.counting_stop()
