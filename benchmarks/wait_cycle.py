"""One wait_readable and the read after it, with a number of sockets ready at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._managers import WITH_BOUND
from ._model import Benchmark
from ._passing import measure_passing, pairs

if TYPE_CHECKING:
    from ._watch import Watch


def measure(manager: str, watch: Watch, count: int, *, ready: int) -> int:
    """Each of ``ready`` pairs of tasks has one token, so half of the tasks wake at every tick."""
    passes = count * ready
    measure_passing(manager, watch, pairs(ready), range(0, 2 * ready, 2), passes, (0, 1))
    return passes


BENCHMARK = Benchmark(
    title="wait cycle: one wait_readable and read",
    rivals=WITH_BOUND,
    cases={f"{ready} ready": {"ready": ready} for ready in (1, 8, 64, 512, 4096)},
    measure=measure,
    baselines=("stock", "lean"),
)
