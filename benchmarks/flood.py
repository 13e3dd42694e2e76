"""Servers that only receive, or only send, as much as they can; and one whose clients read slowly."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio

from ._load import under_load
from ._managers import is_manager, runner
from ._model import Benchmark, Metric
from .tcp_echo import BACKLOG, HOST, split_rival

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._model import Contestant, Sample

MIB = 1 << 20
PATTERN = bytes(i % 251 for i in range(MIB))  # what load.c sends and expects

# Bytes of a request or an answer, and bytes a call: as many as possible, or so few that the calls are what costs.
UNITS = {"": (MIB, MIB), ", 1 KiB a call": (MIB // 16, 1024)}


class Swallower:
    """Counts what is received. load.c waits for a byte after each unit: without that it would measure buffers."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._received = 0

    def complete(self, count: int) -> int:
        """How many units ``count`` more bytes have completed."""
        before = self._received // self._unit
        self._received += count
        return self._received // self._unit - before


def serve(rival: str, announce: Callable[[int], object], *, what: str, unit: int, part: int) -> None:
    parts = [PATTERN[i : i + part] for i in range(0, unit, part)]
    most = None if part == unit else part  # what streams receive if nobody says

    async def receive(stream: trio.SocketStream) -> None:
        swallower = Swallower(unit)
        while data := await stream.receive_some(most):
            for _ in range(swallower.complete(len(data))):
                await stream.send_all(PATTERN[:1])

    async def send(stream: trio.SocketStream) -> None:
        async for requests in stream:
            for _ in requests:
                for data in parts:
                    await stream.send_all(data)

    async def receive_on_asyncio(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        swallower = Swallower(unit)
        while data := await reader.read(most or 65536):
            for _ in range(swallower.complete(len(data))):
                writer.write(PATTERN[:1])
                await writer.drain()
        writer.close()

    async def send_on_asyncio(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while requests := await reader.read(65536):
            for _ in requests:
                for data in parts:
                    writer.write(data)
                    await writer.drain()
        writer.close()

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=BACKLOG)
        announce(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(receive if what == "receive" else send, listeners)

    async def main_on_asyncio() -> None:
        handler = receive_on_asyncio if what == "receive" else send_on_asyncio
        server = await asyncio.start_server(handler, HOST, 0, backlog=BACKLOG)
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    if is_manager(rival):
        runner(rival)(main)
    else:
        run, api = split_rival(rival)
        if api != "streams":
            raise ValueError(f"there is no rival {rival!r}")
        run(main_on_asyncio())


@contextmanager
def enter(rival: str, parameters: Mapping[str, Any], round_seconds: float) -> Iterator[Contestant]:
    """A request is a unit that the server receives, or a byte for which it sends one."""
    connections, what, unit, pace = (parameters[name] for name in ("connections", "what", "unit", "pace"))
    shape = [connections, connections, *((unit, 1) if what == "receive" else (1, unit))]
    # two on their way, so that nobody has to wait for the next one
    shape += [1, pace] if pace else [2]
    of_server = {name: parameters[name] for name in ("what", "unit", "part")}
    with under_load("flood", rival, of_server, shape, lambda: f"closed {round_seconds}") as run_round:

        def run_round_by_mib() -> Sample:
            sample = run_round()
            sample["cpu"] *= MIB / unit
            # of the whole round: at its end, as much is on its way as may be a good part of all
            sample["throughput"] = sample["completed"] * unit / MIB / sample["elapsed"]
            return sample

        run_round()
        yield run_round_by_mib


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for what in ("receive", "send"):
        for text, (unit, part) in UNITS.items():
            for connections in (1, 16, 128):
                parameters = {"what": what, "connections": connections, "unit": unit, "part": part, "pace": 0}
                cases[f"{what} only, {connections} connections{text}"] = parameters
    for connections, pace in ((16, 8 * MIB), (128, MIB)):
        parameters = {"what": "send", "connections": connections, "unit": MIB // 4, "part": MIB // 4, "pace": pace}
        cases[f"slow readers, {connections} connections at {pace // MIB} MiB/s"] = parameters
    return cases


BENCHMARK = Benchmark(
    title="floods and slow readers: one MiB received or sent",
    rivals=("stock", "aiopoll", "asyncio streams", "uvloop streams"),
    cases=_cases(),
    metrics={
        "cpu": Metric("us"),
        "throughput": Metric("MiB/s", "higher"),
        "fairness": Metric("Jain", "higher"),
        "load_cpu": Metric("CPUs"),
    },
    enter=enter,
    baselines=("stock", "uvloop streams"),
    round_seconds=0.4,
    weight=1.6,
)
