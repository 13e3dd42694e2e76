"""Instructions in user space, counted by callgrind: no noise, but none of the kernel's work either."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._load import built
from ._managers import MANAGERS
from ._model import Benchmark, Metric, RivalFailed
from ._processes import child_command, cpus, run_aside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._model import Contestant, Sample


ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # collisions are the same every time
    # callgrind takes each byte of a rep stosb for an instruction
    "GLIBC_TUNABLES": "glibc.cpu.x86_rep_stosb_threshold=1000000000:glibc.cpu.x86_rep_movsb_threshold=1000000000",
}


def count_instructions(rival: str, parameters: Mapping[str, Any], out: Path) -> float:
    """Instructions an operation; what callgrind wrote stays in ``out``, for callgrind_annotate."""
    library = built("_callgrind.c", "-shared", "-fPIC")
    command = child_command(
        "count", parameters["benchmark"], rival, parameters["parameters"], parameters["count"], library
    )
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--", *command]
    answer = run_aside(valgrind, cpus()[0], ENVIRONMENT)
    found = re.search(r"^totals: (\d+)", out.read_text(), re.MULTILINE)
    if found is None:
        raise RivalFailed("callgrind counted nothing")
    return int(found[1]) / float(json.loads(answer))


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    if shutil.which("valgrind") is None:
        raise RivalFailed("valgrind is not installed")

    def run_round() -> Sample:
        with tempfile.TemporaryDirectory() as directory:
            return {"instructions": count_instructions(rival, parameters, Path(directory) / "callgrind.out")}

    yield run_round


def _case(benchmark: str, count: int, **parameters: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "count": count, "parameters": parameters}


BENCHMARK = Benchmark(
    title="instructions in user space",
    rivals=MANAGERS,
    cases={
        "wait cycle, 1 ready": _case("wait_cycle", 1000, ready=1),
        "wait cycle, 64 ready": _case("wait_cycle", 40, ready=64),
        "start and stop": _case("start_stop", 40),
        "to_thread": _case("to_thread", 200),
        "churn, 1 client": _case("churn", 60, clients=1),
    },
    metrics={"instructions": Metric("instructions")},
    enter=enter,
    baselines=("stock", "lean"),
    max_rounds=1,
)
