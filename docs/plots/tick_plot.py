"""Draws what the ticks of a run did, from what `trio_aiopoll.TickRecorder` has recorded. It needs matplotlib.

``python -m trio_aiopoll run --record-ticks ticks.json app.py`` and then ``python docs/plots/tick_plot.py ticks.json``;
or from a program of one's own, ``draw(recorder.as_dict(), "ticks")``.

Without a file it records a run of its own, the one in the documentation: an echo server whose clients, in another
process, are 16 for a second and then 128, while after each half second somebody's task does not let go for 20 ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import trio
from matplotlib import pyplot as plt

import trio_aiopoll

HOST = "127.0.0.1"
PHASES = (16, 128)  # clients
SECONDS = 1.0
HOLD_EVERY, HOLD_FOR = 0.5, 0.02
SLEPT, RAN, BATCH, POLLS = "#4c78a8", "#e45756", "#54a24b", "#b279a2"


def draw(recorded: dict[str, Any], output: str) -> None:
    """Write ``output``.png and ``output``.svg.

    Args:
      recorded: what `trio_aiopoll.TickRecorder.as_dict` returned.
    """
    ticks, samples = recorded["ticks"], recorded["samples"]
    start = ticks["start"]
    figure, (batches, times, polls) = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True, layout="constrained")
    dots = {"linestyle": "none", "marker": ".", "markersize": 3, "alpha": 0.5, "rasterized": True}

    batches.plot(start, ticks["batch"], color=BATCH, **dots)
    batches.set_ylabel("task steps a tick")
    batches.set_title(f"what {len(start):,} ticks did")

    times.plot(
        start, [1e3 * value for value in ticks["blocked"]], color=SLEPT, label="looked for I/O, or slept", **dots
    )
    times.plot(start, [1e3 * value for value in ticks["ran"]], color=RAN, label="ran tasks", **dots)
    times.set_yscale("log")
    times.set_ylabel("ms a tick")
    times.legend(markerscale=4, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

    _draw_polls(polls, samples)
    polls.set_xlabel("seconds since the recording began")
    for axes in (batches, times, polls):
        axes.grid(alpha=0.3)
    for kind in ("png", "svg"):
        figure.savefig(f"{output}.{kind}", dpi=110)
    plt.close(figure)


def _draw_polls(axes: Any, samples: list[dict[str, Any]]) -> None:
    """How the run armed its polls, from one sample to the next; on epoll there is nothing of the kind."""
    when, each = [], []
    for before, after in itertools.pairwise(samples):
        calls = after["io"].get("submit_calls", 0) - before["io"].get("submit_calls", 0)
        if calls:
            when.append((before["time"] + after["time"]) / 2)
            each.append((after["io"]["polls_submitted"] - before["io"]["polls_submitted"]) / calls)
    axes.plot(when, each, color=POLLS, marker="o", markersize=3)
    axes.set_ylabel("polls an io_submit()")
    axes.set_ylim(bottom=0)


def _clients(port: int) -> None:
    """Runs in another process."""

    async def client(stop: trio.Event) -> None:
        async with await trio.open_tcp_stream(HOST, port) as stream:
            while not stop.is_set():
                await stream.send_all(b"x" * 64)
                await stream.receive_some()

    async def main() -> None:
        for count in PHASES:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(client, stop)
                await trio.sleep(SECONDS)
                stop.set()

    trio.run(main)


def record() -> dict[str, Any]:
    """An echo server's run on aiopoll."""
    recorder = trio_aiopoll.TickRecorder(sample_every=0.05)

    first = trio.Event()
    connected, began = 0, math.inf

    async def echo(stream: trio.SocketStream) -> None:
        nonlocal connected
        first.set()
        connected += 1
        async for data in stream:
            await stream.send_all(data)
        connected -= 1
        if connected == 0 and time.monotonic() > began + SECONDS * len(PHASES):
            trio.lowlevel.remove_instrument(recorder)

    async def hold() -> None:
        while True:
            await trio.sleep(HOLD_EVERY)
            time.sleep(HOLD_FOR)  # noqa: ASYNC251 - this is what one must not do

    async def main() -> None:
        nonlocal began
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, echo, 0, host=HOST)
            listeners: list[trio.SocketListener] = await nursery.start(serve)
            port = listeners[0].socket.getsockname()[1]
            clients = multiprocessing.get_context("spawn").Process(target=_clients, args=(port,))
            clients.start()
            await first.wait()
            began = time.monotonic()
            trio.lowlevel.add_instrument(recorder)
            nursery.start_soon(hold)
            await trio.to_thread.run_sync(clients.join)
            nursery.cancel_scope.cancel()

    trio_aiopoll.run(main)
    return recorder.as_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="what 'run --record-ticks' wrote")
    parser.add_argument("--run", type=int, default=0, metavar="N", help="of a file, which run (default: 0, the first)")
    parser.add_argument("--output", default="ticks", metavar="NAME", help="NAME.png and NAME.svg (default: ticks)")
    options = parser.parse_args()
    if options.file is None:
        recorded = record()
    else:
        runs = json.loads(options.file.read_text())["runs"]
        if not 0 <= options.run < len(runs):
            parser.error(f"--run: there are {len(runs)} runs in {options.file}")
        recorded = runs[options.run]
    if not recorded["ticks"]["start"]:
        print("there is not a single tick to draw", file=sys.stderr)
        return 1
    draw(recorded, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
