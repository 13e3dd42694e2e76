"""Wakes a run that sleeps, from any thread or signal handler."""

from __future__ import annotations

import contextlib
import os


class WakeupEventfd:
    """What Trio's WakeupSocketpair is to an I/O manager.

    Trio's is made of two sockets, because it also serves Python's signal handler, and other systems. To make and close
    those takes longer than all else that a manager does to start and stop. And this one has no descriptor before it is
    opened.
    """

    _fd = -1

    def open(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def fileno(self) -> int:
        return self._fd

    @property
    def wakeup_sock(self) -> WakeupEventfd:
        return self

    def wakeup_thread_and_signal_safe(self) -> None:
        os.eventfd_write(self._fd, 1)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close
