"""Hypercorn under wrk, with each of its workers."""

from __future__ import annotations

import os
import re
import shutil
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._load import serving
from ._model import Benchmark, Metric, RivalFailed
from ._processes import cpu_time_of, cpus, run_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant, Sample

WORKERS = {
    "stock": ("trio", "benchmarks._http_application:application"),
    "aiopoll": ("trio", "benchmarks._http_application_on_aiopoll:application"),
    "asyncio": ("asyncio", "benchmarks._http_application:application"),
    "uvloop": ("uvloop", "benchmarks._http_application:application"),
}

_TO_MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


def serve(rival: str, announce: Callable[[int], object]) -> None:
    from hypercorn.config import Config
    from hypercorn.run import run

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    config.worker_class, config.application_path = WORKERS[rival]
    config.workers = 0  # in this process
    config.accesslog = None
    config.errorlog = None
    listener.listen(config.backlog)  # so that nobody who comes before the worker is turned away
    announce(listener.getsockname()[1])
    os.chdir("/")  # hypercorn has the working directory searched for modules, and that is the checkout
    run(config)


def parse(output: str) -> Sample:
    """What ``wrk --latency`` printed."""
    sample: Sample = {}
    for share, number, unit in re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)$", output, re.MULTILINE):
        sample[f"p{share}"] = float(number) * _TO_MICROSECONDS[unit]
    for key, pattern in (("throughput", r"^Requests/sec:\s+([\d.]+)$"), ("completed", r"^\s+(\d+) requests in ")):
        found = re.search(pattern, output, re.MULTILINE)
        if found is None:
            raise RivalFailed(f"wrk said {output!r}")
        sample[key] = float(found[1])
    if "Non-2xx" in output or "Socket errors" in output:
        raise RivalFailed(f"wrk said {output!r}")
    return sample


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    if rival not in WORKERS:
        raise RivalFailed(f"there is no worker for {rival}")
    if shutil.which("wrk") is None:
        raise RivalFailed("wrk is not installed")
    with serving("http", rival, {}) as (server, port):
        command = ["wrk", "-t1", f"-c{parameters['connections']}", f"-d{round_seconds:.0f}s", "--latency"]
        command.append(f"http://127.0.0.1:{port}/")

        def run_round() -> Sample:
            before = cpu_time_of(server.pid)
            output = run_aside(command, cpus()[1])
            server.check()
            sample = parse(output)
            sample["cpu"] = (cpu_time_of(server.pid) - before) / sample.pop("completed") * 1e6
            return sample

        run_round()
        yield run_round


BENCHMARK = Benchmark(
    title="HTTP: hypercorn under wrk",
    rivals=tuple(WORKERS),
    cases={f"{connections} connections": {"connections": connections} for connections in (1, 64, 512)},
    metrics={
        "cpu": Metric("us"),
        "throughput": Metric("1/s", "higher"),
        "p50": Metric("us"),
        "p99": Metric("us"),
    },
    enter=enter,
    baselines=("stock", "uvloop"),
    round_seconds=1.0,
    weight=2,
)
