"""Holds a contest: rounds of all rivals in turn, until the time is up."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ._model import RivalFailed
from ._processes import child_command, cpus, talking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._model import Benchmark, Contestant, Sample

MIN_ROUNDS = 3


class Outcome:
    """What came of one case.

    Attributes:
      rounds: {rival: [sample of a round, ...]}; round ``i`` of all rivals happened one after the other.
      failed: {rival: why it could not take part}.
    """

    def __init__(self) -> None:
        self.rounds: defaultdict[str, list[Sample]] = defaultdict(list)
        self.failed: dict[str, str] = {}


@contextmanager
def measuring_child(
    benchmark: str, rival: str, parameters: Mapping[str, Any], round_seconds: float
) -> Iterator[Contestant]:
    """A fresh process that runs rounds of the benchmark's `measure`."""
    with talking(child_command("rounds", benchmark, rival, parameters, round_seconds), cpus()[0]) as child:
        child.answer()
        yield lambda: json.loads(child.ask("round"))


def hold(
    name: str,
    benchmark: Benchmark,
    parameters: Mapping[str, Any],
    rivals: Sequence[str],
    seconds: float,
    progress: Callable[[int], object],
) -> Outcome:
    """Run one case: at least three rounds, and then as many as fit into the time."""
    outcome = Outcome()
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for rival in rivals:
            if benchmark.enter is None:
                entering = measuring_child(name, rival, parameters, benchmark.round_seconds)
            else:
                entering = benchmark.enter(rival, parameters, benchmark.round_seconds)  # type: ignore[assignment]
            try:
                contestants[rival] = stack.enter_context(entering)
            except RivalFailed as failure:
                outcome.failed[rival] = str(failure)
        done = 0
        started = time.monotonic()
        while contestants and done < benchmark.max_rounds:
            now = time.monotonic()
            if done >= min(MIN_ROUNDS, benchmark.max_rounds) and now + (now - started) / done > deadline:
                break
            samples = {}
            for rival, run_round in list(contestants.items()):
                try:
                    samples[rival] = run_round()
                except RivalFailed as failure:
                    outcome.failed[rival] = str(failure)
                    outcome.rounds.pop(rival, None)
                    del contestants[rival]
            for rival, sample in samples.items():
                outcome.rounds[rival].append(sample)
            done += 1
            progress(done)
    return outcome
