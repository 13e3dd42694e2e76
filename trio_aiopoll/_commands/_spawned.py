"""Processes that multiprocessing starts anew, by "spawn" or "forkserver", import trio_aiopoll, as ours has done.

Without that, a server with several workers would be on aiopoll in name only: ``TRIO_IO_MANAGER`` is in the workers'
environment, but nobody there would look at it. multiprocessing sends each such process a dict with what it needs to
know to become like its parent, and pays no attention to items that it does not know. One that needs this module to be
unpickled has it imported, and that of the children's children too.
"""

from __future__ import annotations

import functools
import multiprocessing.spawn
from typing import Any

_KEY = "trio_aiopoll"


class _Following:
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return follow, ()


def follow() -> None:
    """Have trio_aiopoll imported in the processes that this one will start by multiprocessing."""
    original: Any = multiprocessing.spawn.get_preparation_data
    if getattr(original, "is_followed", False):
        return

    @functools.wraps(original)
    def get_preparation_data(*args: Any, **kwargs: Any) -> Any:
        return {**original(*args, **kwargs), _KEY: _Following()}

    get_preparation_data.is_followed = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = get_preparation_data
