"""A round trip to a worker thread that does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ._managers import MANAGERS, runner
from ._model import Benchmark

if TYPE_CHECKING:
    from ._watch import Watch


def nothing() -> None:
    pass


def measure(manager: str, watch: Watch, count: int) -> int:
    async def main() -> None:
        await trio.to_thread.run_sync(nothing)
        watch.start()
        for _ in range(count):
            await trio.to_thread.run_sync(nothing)
        watch.stop()

    runner(manager)(main)
    return count


BENCHMARK = Benchmark(
    title="to_thread: round trip to a worker thread",
    rivals=MANAGERS,
    cases={"one round trip": {}},
    measure=measure,
    weight=2,
)
