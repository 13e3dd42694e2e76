"""A Trio instrument that records what each tick of the scheduler did: how long it slept, how much it ran."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


class Tick(NamedTuple):
    """One turn of Trio's scheduler: it looks for I/O, and then runs a batch of tasks. Times are in seconds.

    Attributes:
      start: when it turned to I/O, counted from the start of the recording.
      timeout: how long it could have slept; 0 if there was something to run anyway.
      blocked: how long it looked for I/O, or slept. In guest mode until the host let it go on.
      ran: how long its tasks then ran, all together.
      batch: how many task steps that were.
    """

    start: float
    timeout: float
    blocked: float
    ran: float
    batch: int


class Sample(NamedTuple):
    """The run's statistics at some moment.

    Attributes:
      time: in seconds, counted from the start of the recording.
      statistics: what `trio.lowlevel.current_statistics` returned.
    """

    time: float
    statistics: trio.lowlevel.RunStatistics


def plain_statistics(statistics: trio.lowlevel.RunStatistics) -> dict[str, Any]:
    """The statistics of a run on any manager as what JSON can express; an infinite number is None."""
    io = statistics.io_statistics
    deadline = statistics.seconds_to_next_deadline
    return {
        "tasks_living": statistics.tasks_living,
        "tasks_runnable": statistics.tasks_runnable,
        "seconds_to_next_deadline": deadline if math.isfinite(deadline) else None,
        "io": {name: getattr(io, name) for name in dir(io) if not name.startswith("_")},
    }


class TickRecorder(trio.abc.Instrument):
    """A Trio instrument that records ticks, the size of their batches, and how long they block and run.

    ``trio.run(main, instruments=[recorder])``, or `trio.lowlevel.add_instrument` for a part of a run. It works with
    every I/O manager, and costs some hundred nanoseconds a task step. It records one run at a time: the next one begins
    anew.

    Args:
      max_ticks: how many ticks to keep; of more, the latest. As many samples are kept.
      sample_every: seconds between samples of `trio.lowlevel.current_statistics`. They are taken between two ticks, so
        a run that sleeps is not woken up for them.
      clock: what tells the time, in seconds.

    Attributes:
      ticks: the complete ticks, oldest first.
      samples: the samples, oldest first.
      dropped: how many older ticks were not kept.

    Raises:
      ValueError: ``max_ticks`` is not positive, or ``sample_every`` is negative.
    """

    ticks: deque[Tick]
    samples: deque[Sample]
    dropped: int

    def __init__(
        self,
        *,
        max_ticks: int = 100_000,
        sample_every: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_ticks < 1:
            raise ValueError(f"max_ticks must be positive, not {max_ticks!r}")
        if not sample_every >= 0:
            raise ValueError(f"sample_every must be 0 or more (seconds), not {sample_every!r}")
        self._max_ticks = max_ticks
        self._sample_every = sample_every
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self.ticks = deque(maxlen=self._max_ticks)
        self.samples = deque(maxlen=self._max_ticks)
        self.dropped = 0
        # when the recording began, and when the next sample is due
        self._origin = self._sample_due = -math.inf
        # of the tick under way: when it turned to I/O, for how long it might sleep, when it had it; before that NaN
        self._turned = self._timeout = self._woke = math.nan
        self._batch = 0

    def _end_tick(self, now: float) -> None:
        if not math.isnan(self._turned + self._woke):
            self.dropped += len(self.ticks) == self._max_ticks
            blocked, ran = self._woke - self._turned, now - self._woke
            self.ticks.append(Tick(self._turned - self._origin, self._timeout, blocked, ran, self._batch))
        self._woke = math.nan

    def before_run(self) -> None:
        self._begin()

    def before_io_wait(self, timeout: float) -> None:
        now = self._clock()
        if self._origin == -math.inf:
            self._origin = now
        self._end_tick(now)
        if now >= self._sample_due:
            self.samples.append(Sample(now - self._origin, trio.lowlevel.current_statistics()))
            self._sample_due = now + self._sample_every
            now = self._clock()
        self._turned = now
        self._timeout = timeout
        self._batch = 0

    def after_io_wait(self, timeout: float) -> None:
        self._woke = self._clock()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._batch += 1

    def after_run(self) -> None:
        self._end_tick(self._clock())

    def as_dict(self) -> dict[str, Any]:
        """All that was recorded, as what JSON can express.

        ``{"ticks": {"start": [...], ...}, "samples": [{"time": ..., "tasks_living": ..., "io": {...}}, ...],
        "dropped": ...}``, with a list for each field of `Tick`.
        """
        ticks = list(self.ticks)
        return {
            "ticks": {name: [tick[place] for tick in ticks] for place, name in enumerate(Tick._fields)},
            "samples": [{"time": sample.time, **plain_statistics(sample.statistics)} for sample in self.samples],
            "dropped": self.dropped,
        }
