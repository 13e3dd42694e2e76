"""What runs in the processes that are measured. Not meant to be started by hand.

    python -m benchmarks._child rounds BENCHMARK RIVAL PARAMETERS SECONDS   a round for each line on stdin
    python -m benchmarks._child once BENCHMARK RIVAL PARAMETERS COUNT       `measure` once, to be looked at from outside
    python -m benchmarks._child count BENCHMARK RIVAL PARAMETERS COUNT LIB  the same, after a first time to get warm
    python -m benchmarks._child serve BENCHMARK RIVAL PARAMETERS            a server, until it is killed

Answers are lines of JSON on what stdout was at the start.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ._processes import raise_fd_limit
from ._watch import CountingWatch, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._model import Sample


class Rounds:
    """Rounds of about the wanted length."""

    def __init__(self, measure: Callable[..., float], manager: str, parameters: dict[str, Any], seconds: float) -> None:
        self._measure = measure
        self._manager = manager
        self._parameters = parameters
        self._count = 1
        while True:
            elapsed = self._timed()
            if elapsed >= seconds / 3:
                break
            # what a short time says of a longer one is not to be trusted too far
            self._count *= min(64, max(2, round(seconds / 2 / max(elapsed, 1e-9))))
        self._count = max(1, round(self._count * seconds / elapsed))

    def _timed(self) -> float:
        self._watch = Watch()
        self._operations = self._measure(self._manager, self._watch, self._count, **self._parameters)
        return self._watch.wall

    def round(self) -> Sample:
        gc.collect()
        self._timed()
        return {
            "cpu": self._watch.cpu / self._operations * 1e6,
            "wall": self._watch.wall / self._operations * 1e6,
        }


def main(mode: str, benchmark: str, rival: str, parameters_json: str, *rest: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    raise_fd_limit()
    module = importlib.import_module(f"benchmarks.{benchmark}")
    parameters = json.loads(parameters_json)
    if mode == "rounds":
        rounds = Rounds(module.measure, rival, parameters, float(rest[0]))
        print("ready", file=answers)
        for _ in sys.stdin:
            print(json.dumps(rounds.round()), file=answers)
    elif mode == "once":
        answer = module.measure(rival, Watch(), int(rest[0]), **parameters)
        print(json.dumps(answer), file=answers)
    elif mode == "count":
        module.measure(rival, Watch(), int(rest[0]), **parameters)
        answer = module.measure(rival, CountingWatch(rest[1]), int(rest[0]), **parameters)
        print(json.dumps(answer), file=answers)
    elif mode == "serve":
        module.serve(rival, lambda port: print(port, file=answers), **parameters)
    else:
        raise ValueError(mode)


if __name__ == "__main__":
    main(*sys.argv[1:])
