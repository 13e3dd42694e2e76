"""Many waits are cancelled in random order, all at once or one after the other."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
import trio.testing

from ._managers import MANAGERS, check_waits, runner
from ._model import Benchmark
from ._sockets import silent_sockets

if TYPE_CHECKING:
    from ._watch import Watch


def measure(manager: str, watch: Watch, count: int, *, waits: int, at_once: bool) -> int:
    """From the first cancel to the end of the last task. Setting the stage is not counted."""
    shuffle = random.Random(0).shuffle
    left = 0
    all_gone = trio.Event()

    async def sleeper(scope: trio.CancelScope, fd: int) -> None:
        nonlocal left
        with scope:
            await trio.lowlevel.wait_readable(fd)
        left -= 1
        if left == 0:
            all_gone.set()

    async def storm() -> None:
        nonlocal left, all_gone
        left, all_gone = waits, trio.Event()
        scopes = [trio.CancelScope() for _ in sockets]
        async with trio.open_nursery() as nursery:
            for scope, sock in zip(scopes, sockets, strict=True):
                nursery.start_soon(sleeper, scope, sock.fileno())
            await trio.testing.wait_all_tasks_blocked()
            check_waits()
            shuffle(scopes)
            watch.start()
            for scope in scopes:
                scope.cancel()
                if not at_once:
                    await trio.lowlevel.cancel_shielded_checkpoint()
            await all_gone.wait()
            watch.stop()

    async def main() -> None:
        for _ in range(count):
            await storm()

    with silent_sockets(waits) as sockets:
        runner(manager)(main)
    return count * waits


BENCHMARK = Benchmark(
    title="cancel storm: one cancelled wait",
    rivals=MANAGERS,
    cases={
        f"{waits:,} {'at once' if at_once else 'one by one'}": {"waits": waits, "at_once": at_once}
        for at_once in (True, False)
        for waits in (100, 1_000, 9_000)
    },
    measure=measure,
)
