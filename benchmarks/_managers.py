"""Trio's I/O managers by name: ``stock``, ``lean``, ``free``, ``aiopoll``, and ``aiopoll:option=value,...``."""

from __future__ import annotations

import ast
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

MANAGERS = ("stock", "lean", "aiopoll")
WITH_BOUND = (*MANAGERS, "free")
"""For the benchmarks in which ``free`` can take part."""


def is_manager(name: str) -> bool:
    return name.partition(":")[0] in WITH_BOUND


def runner(name: str) -> Callable[..., Any]:
    """`trio.run` with the manager of that name. Where it is stock Trio, trio_aiopoll is not even imported."""
    kind, _, options = name.partition(":")
    if kind == "stock":
        return trio.run
    if kind == "lean":
        from trio._core import _run

        from ._lean_epoll import LeanEpollIOManager

        _run.TheIOManager = LeanEpollIOManager  # type: ignore[attr-defined, assignment]
        return trio.run
    if kind == "free":
        from trio._core import _run

        from ._free_waits import FreeWaits

        _run.TheIOManager = FreeWaits  # type: ignore[attr-defined, assignment]
        return trio.run
    if kind == "aiopoll":
        import trio_aiopoll

        if not options:
            return partial(trio.run, io_manager="aiopoll")  # type: ignore[call-arg]
        arguments = {
            key: ast.literal_eval(value) for key, _, value in (option.partition("=") for option in options.split(","))
        }
        return partial(trio.run, io_manager=partial(trio_aiopoll.AiopollIOManager, **arguments))  # type: ignore[call-arg]
    raise ValueError(f"there is no manager {name!r}; there are {', '.join(WITH_BOUND)}, and aiopoll:option=value,...")


def check_waits() -> None:
    """To be called in a run when its waits are under way, so that nothing is measured under a wrong name.

    Raises:
      RuntimeError: waits have gone to aiopoll's epoll lane, because others have spent the host's AIO budget.
    """
    statistics = trio.lowlevel.current_statistics().io_statistics
    astray = getattr(statistics, "epoll_lane_waits", 0)
    if astray:
        raise RuntimeError(f"{astray} waits found no room in the host's AIO budget (fs.aio-max-nr)")
