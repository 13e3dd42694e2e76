"""A manager that explains itself: for each wait, which lane it takes and why.

It is a subclass, so that a run without it does not pay for as much as the question whether somebody wants to know.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Final

import trio

from ._io_manager import AiopollIOManager
from ._probe import aio_budget
from ._ring import key_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

logger: Final = logging.getLogger("trio_aiopoll.waits")

_DIRECTIONS: Final = ("readable", "writable")


def _make_heard() -> None:
    """Let the explanations come out somewhere, also where nobody has configured logging."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.addFilter(lambda _: not logging.getLogger().handlers)  # the program may do it later
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)


def _file(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return "closed" if error.errno == errno.ENOENT else f"unknown: {error.strerror}"


def _refusal(error: int) -> str:
    if error == errno.EAGAIN:
        budget = aio_budget()
        spent = "" if budget is None else f" ({budget[0]} of {budget[1]} in use)"
        return f"there is no room for its poll, as the host's AIO budget, fs.aio-max-nr, is spent{spent}"
    if error == errno.EINVAL:
        return "the kernel cannot poll this kind of file through AIO"
    if error == errno.ESTALE:
        return "the number now stands for another file, of a kind that AIO accepts but never reports"
    return f"the kernel refused its poll: {errno.errorcode.get(error, error)}, {os.strerror(error)}"


class ExplainingIOManager(AiopollIOManager):
    """`AiopollIOManager` that tells for each wait which lane it takes, and why; it is otherwise the same, but slower.

    ``trio.run(main, io_manager=trio_aiopoll.ExplainingIOManager)``, or the environment variable
    ``TRIO_AIOPOLL_DEBUG=1``, by which every run on aiopoll gets it.

    It tells the logger ``trio_aiopoll.waits``, at level DEBUG, which it sets unless the program has set one. Where no
    handler has been configured, what it says goes to stderr. A wait that is cancelled before the tick in which it would
    have reached the kernel takes no lane, and is not mentioned.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _make_heard()

    def _explain(self, key: int, task: trio.lowlevel.Task, lane: str) -> None:
        fd, direction = divmod(key, 2)
        logger.debug("fd %d (%s) %s, task %r: %s", fd, _file(fd), _DIRECTIONS[direction], task.name, lane)

    def _take_pending(self) -> Sequence[int]:
        keys = super()._take_pending()
        for key in keys:
            task = self._task_waiting(key)
            if task is not None:  # the others are polls of the manager's own
                self._explain(key, task, "ring lane")
        return keys

    def lane_wait(self, fd: int, direction: int) -> Generator[Any, Any, None]:
        why = "it is neither a socket nor a pipe" if self._polls is not None else "the run has left AIO"
        self._explain(key_of(fd, direction), trio.lowlevel.current_task(), f"epoll lane, because {why}")
        return super().lane_wait(fd, direction)

    def _process_refusal(self, key: int, error: int) -> None:
        task = self._task_waiting(key)
        if task is not None:
            self._explain(key, task, f"moves to the epoll lane, because {_refusal(error)}")
        super()._process_refusal(key, error)

    def close(self) -> None:
        logger.debug("the run ends: %s", self.statistics())
        super().close()
