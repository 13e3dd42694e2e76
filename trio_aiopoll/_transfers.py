"""Performs what tasks have asked their sockets to receive and to send since the last tick, and lets them go on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import outcome

from ._trio_compat import make_runnable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import trio

    from ._batch import Batch

    Blocked: TypeAlias = Sequence[tuple[int, trio.lowlevel.Task]]

MAX_RECEIVE: Final = 65536
"""Bytes; how much a receive asks for. It is what Trio's streams ask for."""
MAX_SEND: Final = 4096
"""Bytes; the most that one send may have, because all are copied into one piece of memory for the call."""


def perform(batch: Batch) -> tuple[int, Blocked]:
    """Try each operation once, and make its task runnable with what came of it: bytes, a count, or an Error.

    Returns how many have not had to wait, and the keys and tasks of those that would block, who are nobody's now.
    """
    tasks, values, failures, blocked = batch.perform()
    make_runnable([_failure_or(value) for value in values] if failures else values, tasks)
    return len(tasks), blocked or ()


def _failure_or(value: bytes | int) -> Any:
    if type(value) is int and value < 0:
        return outcome.Error(OSError(-value, os.strerror(-value)))
    return value
