"""What a benchmark is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from typing import TypeAlias

Sample: TypeAlias = "dict[str, float]"
"""One round of one rival: {name of a metric: value}."""

Contestant: TypeAlias = "Callable[[], Sample]"
"""Runs one round."""

BASELINE = "stock"


@dataclass(frozen=True)
class Metric:
    unit: str
    better: Literal["lower", "higher"] = "lower"


CPU_AND_WALL: Mapping[str, Metric] = {"cpu": Metric("us"), "wall": Metric("us")}


@dataclass(frozen=True)
class Benchmark:
    """A contest of rivals in a number of cases.

    Attributes:
      title: what is measured, in a few words.
      rivals: who takes part unless the command line says otherwise.
      cases: {label: parameters}.
      metrics: what a round yields. The first is the one that is drawn.
      measure: ``measure(manager, watch, count, **parameters)`` does ``count`` units of work in a child process, has the
        watch run around what counts, and returns the number of operations done.
      enter: for benchmarks whose rounds are not made like that: ``enter(rival, parameters, round_seconds)``.
      baselines: rivals that the others are divided by.
      round_seconds: how long a round takes.
      max_rounds: more than that tell nothing new.
      weight: the share of the time budget that a case gets, relative to others.
    """

    title: str
    rivals: tuple[str, ...]
    cases: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Metric] = field(default_factory=lambda: CPU_AND_WALL)
    measure: Callable[..., float] | None = None
    enter: Callable[[str, Mapping[str, Any], float], AbstractContextManager[Contestant]] | None = None
    baselines: tuple[str, ...] = (BASELINE,)
    round_seconds: float = 0.3
    max_rounds: int = 60
    weight: float = 1.0


class RivalFailed(Exception):
    """A rival cannot take part; the message says why."""
