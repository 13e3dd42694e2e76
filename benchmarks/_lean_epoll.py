"""An epoll manager with the Python diet of AiopollIOManager, to tell what the diet gains from what the ring gains.

One generator a wait, traps that are kept, int keys, None instead of an Outcome, and one EPOLL_CTL_MOD a wait. Good
enough to be measured; not meant for use.
"""

from __future__ import annotations

import contextlib
import select
import types
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import trio
from trio._core._io_epoll import EpollIOManager
from trio._core._run import GLOBAL_RUN_CONTEXT
from trio._core._traps import WaitTaskRescheduled

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

READING = select.EPOLLIN | select.EPOLLONESHOT
WRITING = select.EPOLLOUT | select.EPOLLONESHOT
BOTH = READING | WRITING
NEITHER = select.EPOLLONESHOT


def _make_wait(direction: int) -> Callable[[LeanEpollIOManager, Any], Generator[Any, Any, None]]:
    flags = WRITING if direction else READING

    @types.coroutine
    def wait(self: LeanEpollIOManager, fd: Any) -> Generator[Any, Any, None]:
        if not isinstance(fd, int):
            fd = fd.fileno()
        key = fd * 2 + direction
        tasks = self._tasks
        if key in tasks:
            raise trio.BusyResourceError("another task is already reading / writing this fd")
        trap = self._traps.get(key)
        if trap is None:
            trap = self._traps[key] = WaitTaskRescheduled(partial(self._abort, key))
        try:
            self._modify(fd, flags if key ^ 1 not in tasks else BOTH)
        except FileNotFoundError:
            self._epoll.register(fd, flags)
        tasks[key] = GLOBAL_RUN_CONTEXT.task
        sent = yield trap
        if sent is not None:
            sent.unwrap()

    return wait


class LeanEpollIOManager(EpollIOManager):
    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[int, trio.lowlevel.Task] = {}
        self._traps: dict[int, WaitTaskRescheduled] = {}
        self._modify = self._epoll.modify

    wait_readable = _make_wait(0)  # type: ignore[assignment]
    wait_writable = _make_wait(1)  # type: ignore[assignment]

    def _flags(self, fd: int) -> int:
        return (READING if fd * 2 in self._tasks else NEITHER) | (WRITING if fd * 2 + 1 in self._tasks else NEITHER)

    def _abort(self, key: int, _: object) -> trio.lowlevel.Abort:
        del self._tasks[key]
        self._modify(key >> 1, self._flags(key >> 1))
        return trio.lowlevel.Abort.SUCCEEDED

    def notify_closing(self, fd: Any) -> None:
        if not isinstance(fd, int):
            fd = fd.fileno()
        for key in (fd * 2, fd * 2 + 1):
            if self._traps.pop(key, None) is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(fd)
            task = self._tasks.pop(key, None)
            if task is not None:
                trio.lowlevel.reschedule(task, outcome.Error(trio.ClosedResourceError("another task closed this fd")))

    def get_events(self, timeout: float) -> list[tuple[int, int]]:
        return self._epoll.poll(timeout, len(self._tasks) or 1)

    def process_events(self, events: Iterable[tuple[int, int]]) -> None:
        tasks = self._tasks
        reschedule = GLOBAL_RUN_CONTEXT.runner.reschedule
        for fd, flags in events:
            if fd == self._force_wakeup_fd:
                self._force_wakeup.drain()
                continue
            key = fd * 2
            if flags & ~select.EPOLLOUT:
                task = tasks.pop(key, None)
                if task is not None:
                    reschedule(task, None)  # type: ignore[arg-type]
            if flags & ~select.EPOLLIN:
                task = tasks.pop(key + 1, None)
                if task is not None:
                    reschedule(task, None)  # type: ignore[arg-type]
            if key in tasks or key + 1 in tasks:
                self._modify(fd, self._flags(fd))

    def close(self) -> None:
        self._traps.clear()  # they refer back to us
        super().close()
