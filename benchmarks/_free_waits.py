"""A manager whose waits cost nothing: it asks nobody, it is told who is ready. What is left is the bound for any other.

Only for tasks that pass tokens on (_passing.py), which tell. The Python diet is that of _lean_epoll.py, and so is the
warning: good enough to be measured, not meant for use.
"""

from __future__ import annotations

import types
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from trio._core._io_epoll import EpollIOManager
from trio._core._run import GLOBAL_RUN_CONTEXT
from trio._core._traps import WaitTaskRescheduled

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


class FreeWaits(EpollIOManager):
    """``ready``: descriptors that have become readable, to be filled by who makes them so."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: list[int] = []
        self._tasks: dict[int, trio.lowlevel.Task] = {}
        self._traps: dict[int, WaitTaskRescheduled] = {}

    @types.coroutine
    def wait_readable(self, fd: Any) -> Generator[Any, Any, None]:
        if not isinstance(fd, int):  # Trio's own
            yield from EpollIOManager.wait_readable(self, fd).__await__()
            return
        tasks = self._tasks
        if fd in tasks:
            raise trio.BusyResourceError("another task is already reading this fd")
        trap = self._traps.get(fd)
        if trap is None:
            trap = self._traps[fd] = WaitTaskRescheduled(partial(self._abort, fd))
        tasks[fd] = GLOBAL_RUN_CONTEXT.task
        sent = yield trap
        if sent is not None:
            sent.unwrap()

    def _abort(self, fd: int, _: object) -> trio.lowlevel.Abort:
        del self._tasks[fd]
        return trio.lowlevel.Abort.SUCCEEDED

    def get_events(self, timeout: float) -> Any:
        if self.ready:
            ready, self.ready = self.ready, []
            return ready
        return EpollIOManager.get_events(self, timeout) if timeout else ()

    def process_events(self, events: Sequence[Any]) -> None:
        if not events or not isinstance(events[0], int):
            EpollIOManager.process_events(self, events)  # type: ignore[arg-type]
            return
        pop = self._tasks.pop
        runq = GLOBAL_RUN_CONTEXT.runner.runq
        for fd in events:
            task = pop(fd, None)
            if task is not None:
                # what Runner.reschedule does, as in trio_aiopoll
                task._next_send_fn = task.coro.send
                task._abort_func = None
                task.custom_sleep_data = None
                runq.append(task)

    def close(self) -> None:
        self._traps.clear()  # they refer back to us
        super().close()
