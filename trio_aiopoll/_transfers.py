"""Performs what tasks have asked their sockets to receive and to send since the last tick, and lets them go on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import outcome

from ._trio_compat import make_runnable

if TYPE_CHECKING:
    from collections.abc import Iterable

    import trio

    from ._batch import Batch

    Blocked: TypeAlias = Iterable[tuple[int, trio.lowlevel.Task | None]]

MAX_RECEIVE: Final = 65536
"""Bytes; how much a receive asks for. It is what Trio's streams ask for."""
MAX_SEND: Final = 65536
"""Bytes; the most that one send may have. A larger one takes so long that nothing is gained by doing it with others."""
MAX_COPY: Final = 4096
"""Bytes; the most that is copied because it might change until the tick."""


def perform(batch: Batch) -> tuple[int, Blocked]:
    """Try each operation once, and make its task runnable with what came of it: bytes, a count, or an Error.

    Returns how many have not had to wait, and the keys of the others, whose tasks wait now, each with the task that had
    come to wait for the same key meanwhile.
    """
    tasks, values, failures, blocked = batch.perform()
    make_runnable([_failure_or(value) for value in values] if failures else values, tasks)
    return len(tasks), zip(blocked[::2], blocked[1::2], strict=True) if blocked else ()


def _failure_or(value: bytes | int) -> Any:
    if type(value) is int and value < 0:
        return outcome.Error(OSError(-value, os.strerror(-value)))
    return value
