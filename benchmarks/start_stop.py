"""A run that does nothing: trio.run(trio.sleep, 0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ._managers import MANAGERS, runner
from ._model import Benchmark

if TYPE_CHECKING:
    from ._watch import Watch


def measure(manager: str, watch: Watch, count: int) -> int:
    run = runner(manager)
    watch.start()
    for _ in range(count):
        run(trio.sleep, 0)
    watch.stop()
    return count


BENCHMARK = Benchmark(
    title="start and stop: trio.run(trio.sleep, 0)",
    rivals=MANAGERS,
    cases={"one run": {}},
    measure=measure,
    weight=2,
)
