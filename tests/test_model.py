"""Whatever a program does with its files, each wait ends as it would on stock Trio, and nothing else happens.

Two runs in guest mode, one on Trio's own epoll manager and one on aiopoll, are taken through the same steps on files
of their own that are made alike: waits, readiness, cancels, closes, dups, reused descriptor numbers, crowds that need
several rings, and a budget or a ring that is lost in mid-run. After each step both come to rest, and the same waits
must have ended in the same way. Steps are taken by the host while the I/O thread sleeps, or inside of the run.

``AIOPOLL_MODEL_EXAMPLES=5000`` runs that many sequences, different ones each time, and shrinks what fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import random
import resource
import socket
import tempfile
import threading
import time
import tty
from dataclasses import dataclass
from functools import partial
from select import POLLIN, poll
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import trio_aiopoll
from trio_aiopoll._ring import RingLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import outcome

EXAMPLES: Final = int(os.environ.get("AIOPOLL_MODEL_EXAMPLES") or 0)
PATIENCE: Final = 30.0  # seconds; what takes longer hangs
FILES_MAX: Final = 24
CROWD: Final = 700  # sockets that are waited for in both directions: more than two rings hold

libc: Final = ctypes.CDLL(None, use_errno=True)


################
# Files
################


@dataclass
class File:
    fd: int
    kind: str
    peer: int | None = None  # the name of the other end


def signalfd() -> int:
    fd = libc.signalfd(-1, ctypes.create_string_buffer(128), os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return fd


def open_ends(kind: str) -> list[int]:
    if kind == "socket":
        ends = [end.detach() for end in socket.socketpair()]
    elif kind == "datagram":
        ends = [end.detach() for end in socket.socketpair(type=socket.SOCK_DGRAM)]
    elif kind == "pipe":
        ends = list(os.pipe())
    elif kind == "pty":
        ends = list(os.openpty())
        tty.setraw(ends[1])
    elif kind == "eventfd":
        ends = [os.eventfd(0)]
    elif kind == "fifo":
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/fifo"
            os.mkfifo(path)
            ends = [os.open(path, os.O_RDWR)]
    else:
        ends = [signalfd()]
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


KINDS: Final = ("socket", "socket", "datagram", "pipe", "pipe", "pty", "eventfd", "fifo", "signalfd")


################
# A run in lock-step
################


class StingyPolls:
    """The manager's polls, with a budget that can be taken away and a ring that can break."""

    def __init__(self, polls: Any) -> None:
        self._polls = polls
        self.keep: int = 0  # never refused: the manager's own
        self.refusing = False
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._polls, name)

    def tick(self, keys: Sequence[int], timeout: float) -> list[int]:
        if self.broken:
            raise RingLost(errno.EPERM)
        refused = [key for key in keys if key != self.keep] if self.refusing else []
        if not refused:
            return self._polls.tick(keys, timeout)
        taken = self._polls.tick([key for key in keys if key == self.keep], 0)
        return [*taken, *(-((key << 12) | errno.EAGAIN) - 1 for key in refused)]


class World:
    """A guest run with its host loop in a thread of its own. Both take their orders from the test's thread."""

    def __init__(self, io_manager: str) -> None:
        self.files: dict[int, File] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.ended: dict[int, str] = {}
        self.crowd: list[tuple[int, int]] = []
        self.polls: StingyPolls | None = None
        self._host: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._result: outcome.Outcome[None] | None = None
        self._thread = threading.Thread(target=self._run_host, args=(io_manager,), name=io_manager, daemon=True)
        self._thread.start()
        self._await(self._started, "start")

    def _run_host(self, io_manager: str) -> None:
        def done(result: outcome.Outcome[None]) -> None:
            self._result = result
            self._host.put(None)

        trio.lowlevel.start_guest_run(
            self._main, run_sync_soon_threadsafe=self._host.put, done_callback=done, io_manager=io_manager
        )
        while (job := self._host.get()) is not None:
            job()

    async def _main(self) -> None:
        manager = _io_manager()
        if isinstance(manager, trio_aiopoll.AiopollIOManager):
            self.polls = StingyPolls(manager._polls)
            self.polls.keep = manager._lane_key
            manager._polls = self.polls  # type: ignore[assignment]
        async with trio.open_nursery() as self.nursery:
            self.token = trio.lowlevel.current_trio_token()
            self._started.set()
            await trio.sleep_forever()

    def _await(self, event: threading.Event, what: str) -> None:
        give_up = time.monotonic() + PATIENCE
        while not event.wait(0.5):
            if self._result is not None:
                self._result.unwrap()
            assert self._thread.is_alive(), f"{what}: the host's thread is gone"
            assert time.monotonic() < give_up, f"{what}: nothing happens any more"

    def do(self, step: Callable[[World], Any], inside: bool) -> Any:
        """What ``step`` returns, taken by the host or inside of the run."""
        results: list[Any] = []
        done = threading.Event()

        def job() -> None:
            try:
                results.append(step(self))
            except Exception as error:
                results.append(error)
            done.set()

        (self.token.run_sync_soon if inside else self._host.put)(job)
        self._await(done, "step")
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def settle(self) -> tuple[dict[int, str], tuple[int, int]]:
        """How the waits have ended that have, and how many tasks the manager says are waiting."""
        found: list[Any] = []
        done = threading.Event()

        async def settle() -> None:
            await trio.testing.wait_all_tasks_blocked()
            statistics = trio.lowlevel.current_statistics().io_statistics
            found.append((dict(self.ended), (statistics.tasks_waiting_read, statistics.tasks_waiting_write)))
            done.set()

        self.token.run_sync_soon(self.nursery.start_soon, settle)
        self._await(done, "settle")
        return found[0]  # type: ignore[no-any-return]

    def stop(self) -> None:
        if self._thread.is_alive():
            self.token.run_sync_soon(self.nursery.cancel_scope.cancel)
            self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the run does not end"
        for fd in {file.fd for file in self.files.values()} | {fd for pair in self.crowd for fd in pair}:
            os.close(fd)
        assert self._result is not None
        with contextlib.suppress(trio.Cancelled):
            self._result.unwrap()

    # Each of these is a part of a step, and what it returns must be the same in both worlds.

    def open(self, names: Sequence[int], kind: str) -> None:
        for name, fd in zip(names, open_ends(kind), strict=True):
            peer = next((other for other in names if other != name), None)
            self.files[name] = File(fd, kind, peer)

    def wait(self, number: int, fd: int, direction: str) -> None:
        self.nursery.start_soon(self._wait, number, fd, direction)

    async def _wait(self, number: int, fd: int, direction: str) -> None:
        wait = trio.lowlevel.wait_readable if direction == "read" else trio.lowlevel.wait_writable
        with trio.CancelScope() as self.scopes[number]:
            try:
                await wait(fd)
            except OSError as error:
                self.ended[number] = f"OSError {errno.errorcode[error.errno or 0]}"
            except BaseException as error:
                self.ended[number] = type(error).__name__
                if isinstance(error, trio.Cancelled):
                    raise
            else:
                self.ended[number] = "returned"

    def cancel(self, number: int, by_deadline: bool) -> None:
        scope = self.scopes.get(number)  # None if its task has not come so far in this very step
        if scope is not None and by_deadline:
            scope.deadline = -float("inf")
        elif scope is not None:
            scope.cancel()

    def close(self, name: int, tell: bool) -> bool | None:
        file = self.files.pop(name)
        if tell:
            trio.lowlevel.notify_closing(file.fd)
        os.close(file.fd)
        return self.sees_eof(file.peer)

    def sees_eof(self, name: int | None) -> bool | None:
        """At once; None where nobody could."""
        file = self.files.get(-1 if name is None else name)
        if file is None or file.kind != "socket":
            return None
        with socket.socket(fileno=os.dup(file.fd)) as sock:
            try:
                return sock.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

    def dup(self, name: int, new_name: int) -> None:
        file = self.files[name]
        self.files[new_name] = File(os.dup(file.fd), file.kind)

    def reuse(self, names: Sequence[int], kind: str, tell: bool) -> None:
        """A new file takes the number of the first of ``names``."""
        fd, old_peer = self.files[names[0]].fd, self.files[names[0]].peer
        if tell:
            trio.lowlevel.notify_closing(fd)
        if old_peer in self.files:
            self.files[old_peer].peer = None
        self.open(names, kind)
        os.dup2(self.files[names[0]].fd, fd)
        os.close(self.files[names[0]].fd)
        self.files[names[0]].fd = fd

    def transfer(self, name: int, what: str) -> str:
        file = self.files[name]
        payload = (1).to_bytes(8, "little") if file.kind == "eventfd" else b"x"
        try:
            if what == "write":
                os.write(file.fd, payload)
                self._let_tty_catch_up(file)
            elif what == "fill" and file.kind == "eventfd":
                os.write(file.fd, (2**64 - 2).to_bytes(8, "little"))
            elif what == "fill" and file.kind != "pty":
                while True:
                    os.write(file.fd, payload if file.kind == "datagram" else bytes(4096))
            elif what == "drain":
                while os.read(file.fd, 65536):
                    pass
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    def _let_tty_catch_up(self, file: File) -> None:
        # a worker of the kernel carries the bytes over
        if file.kind == "pty" and file.peer in self.files:
            poller = poll()
            poller.register(self.files[file.peer].fd, POLLIN)
            poller.poll(PATIENCE * 100)

    def gather_crowd(self) -> None:
        for _ in range(CROWD):
            ours, peer = socket.socketpair()
            for end in (ours, peer):
                end.setblocking(False)
            self.crowd.append((ours.detach(), peer.detach()))


def _io_manager() -> object:
    return trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager  # type: ignore[attr-defined]


################
# The steps
################

index = st.integers(0, 999)
directions = st.sampled_from(["read", "read", "write"])
# (operation, which, how); what they refer to is taken modulo what there is
controls = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), index, directions),
        st.tuples(st.just("wait"), index, directions),
        st.tuples(st.just("wait"), index, directions),
        st.tuples(st.just("cancel"), index, st.booleans()),
        st.tuples(st.just("cancel"), index, st.booleans()),
        st.tuples(st.just("close"), index, st.none()),
        st.tuples(st.just("dup"), index, st.none()),
        st.tuples(st.just("reuse"), index, st.sampled_from(KINDS)),
    ),
    min_size=1,
    max_size=6,
)
transfers = st.one_of(st.none(), st.tuples(index, st.sampled_from(["write", "write", "fill", "drain"])))


class SameAsEpoll(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = World("epoll")
        self.subject = World("aiopoll")
        self.worlds = (self.model, self.subject)
        self.next_name = 0
        self.next_wait = 0
        self.kinds: dict[int, str] = {}  # of the files that are open, by name
        self.waiting: dict[int, int] = {}  # {wait: name of its file, or -1}; only those that have not ended
        self.crowd_waits: dict[tuple[int, str], int] = {}
        self.crowd_ready: set[int] = set()
        self.has_crowd = False
        self.history: list[str] = []

    def teardown(self) -> None:
        for world in self.worlds:
            world.stop()
        self.history.append("the end")
        self.compare(self.model.ended, self.subject.ended)

    def take(self, step: Callable[[World], Any], inside: bool, *parts: object) -> None:
        """One step of both worlds, and what must be the same after it. ``parts`` is what to call it."""
        self.history.append(f"{'inside' if inside else 'host'}: {', '.join(map(str, parts))}")
        self.compare(*(world.do(step, inside) for world in self.worlds))
        # What the kernel leaves to its workers may take a moment. What ought not to have ended will not do so for that.
        give_up = time.monotonic() + PATIENCE / 6
        expected, got = (world.settle() for world in self.worlds)
        while got != expected and time.monotonic() < give_up:
            time.sleep(0.001)
            expected, got = (world.settle() for world in self.worlds)
        self.compare(expected[0], got[0])
        self.compare(expected[1], got[1])
        ended = expected[0]
        self.waiting = {number: name for number, name in self.waiting.items() if number not in ended}
        self.crowd_waits = {which: number for which, number in self.crowd_waits.items() if number not in ended}

    def compare(self, expected: object, got: object) -> None:
        if got != expected:
            if isinstance(expected, dict) and isinstance(got, dict):
                differ = {key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)}
                expected, got = ({key: ended.get(key) for key in sorted(differ)} for ended in (expected, got))
            # a failure that has to do with timing may not come again, so this one has to say it all
            steps = "\n".join(self.history)
            pytest.fail(f"stock Trio: {expected}\naiopoll:    {got}\nafter these steps:\n{steps}")

    def new_names(self, kind: str) -> list[int]:
        count = 2 if kind in ("socket", "datagram", "pipe", "pty") else 1
        names = list(range(self.next_name, self.next_name + count))
        self.next_name += count
        for name in names:
            self.kinds[name] = kind
        return names

    def new_names_for(self, name: int, kind: str) -> list[int]:
        """The names of the ends of a new file, the first of which takes over ``name``."""
        first, *others = self.new_names(kind)
        del self.kinds[first]
        self.kinds[name] = kind
        return [name, *others]

    def new_wait(self, name: int) -> int:
        number = self.next_wait
        self.next_wait += 1
        self.waiting[number] = name
        return number

    @initialize(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=5))
    def first_files(self, kinds: list[str]) -> None:
        for kind in kinds:
            self.open(kind)

    @rule(kind=st.sampled_from(KINDS))
    @precondition(lambda self: len(self.kinds) < FILES_MAX)
    def open(self, kind: str) -> None:
        names = self.new_names(kind)
        self.take(lambda world: world.open(names, kind), False, f"open {names} {kind}")

    @rule(operations=controls, transfer=transfers, at=index, inside=st.booleans())
    @precondition(lambda self: len(self.kinds) > 0)
    def step(
        self, operations: list[tuple[str, int, Any]], transfer: tuple[int, str] | None, at: int, inside: bool
    ) -> None:
        """Several things at once, but none whose outcome is a matter of timing: a file that gets ready in this step may
        be found so a moment earlier or later. So only one thing moves data (what gets ready shall stay it), a wait that
        may be over is no obstacle to another, and its deadline does not come at the same time."""
        something_gets_ready = transfer is not None or any(what in ("close", "reuse") for what, _, _ in operations)
        parts: list[Callable[[World], Any]] = []
        told: list[str] = []

        def part(function: Callable[..., Any], **arguments: Any) -> None:
            parts.append(partial(function, **arguments))
            told.append(f"{function.__name__} {arguments}")

        ahead = list(self.waiting)
        about_to_wait = set()
        renewed = set()
        for position, (what, which, how) in enumerate(operations):
            if transfer is not None and position == at % len(operations):
                name = self.pick(transfer[0])
                if name is not None:
                    part(World.transfer, name=name, what=transfer[1])
            name = self.pick(which)
            if what == "cancel" and ahead:
                part(World.cancel, number=ahead[which % len(ahead)], by_deadline=how and not something_gets_ready)
            elif name is None:
                continue
            elif what == "wait":
                if something_gets_ready and name in self.waiting.values() and name not in renewed:
                    continue
                about_to_wait.add(name)
                number = self.new_wait(name)
                part(self._wait, number=number, name=name, direction=how)
            elif what == "close" and name not in about_to_wait:  # when its task starts, the number is anybody's
                del self.kinds[name]
                part(World.close, name=name, tell=True)
            elif what == "dup" and len(self.kinds) < FILES_MAX:
                self.kinds[self.next_name] = self.kinds[name]
                part(World.dup, name=name, new_name=self.next_name)
                self.next_name += 1
            elif what == "reuse" and len(self.kinds) < FILES_MAX:
                names = self.new_names_for(name, how)
                renewed.add(name)
                part(World.reuse, names=names, kind=how, tell=True)
        self.take(lambda world: [part(world) for part in parts], inside, *told)

    @staticmethod
    def _wait(world: World, number: int, name: int, direction: str) -> None:
        world.wait(number, world.files[name].fd, direction)

    def pick(self, which: int) -> int | None:
        names = list(self.kinds)
        return names[which % len(names)] if names else None

    @rule(which=index, inside=st.booleans(), kind=st.sampled_from(KINDS), reuse=st.booleans())
    @precondition(lambda self: 0 < len(self.kinds) < FILES_MAX)
    def close_without_a_word(self, which: int, inside: bool, kind: str, reuse: bool) -> None:
        """Nobody waits for the file, and nobody tells Trio that it is closed."""
        name = self.pick(which)
        if name is None or name in self.waiting.values():
            return
        self.close_or_reuse(name, kind if reuse else None, inside, tell=False)

    def close_or_reuse(self, name: int, kind: str | None, inside: bool, tell: bool) -> None:
        word = "after a word" if tell else "without a word"
        if kind is None:
            del self.kinds[name]
            self.take(lambda world: world.close(name, tell), inside, f"close {name} {word}")
        else:
            names = self.new_names_for(name, kind)
            self.take(lambda world: world.reuse(names, kind, tell), inside, f"reuse {names} {kind} {word}")

    @rule(which=index, inside=st.booleans())
    @precondition(lambda self: len(self.kinds) > 0)
    def fill_and_wait_for_room(self, which: int, inside: bool) -> None:
        name = self.pick(which)
        self.take(lambda world: world.transfer(name, "fill"), inside, f"fill {name}")
        number = self.new_wait(name)
        self.take(lambda world: self._wait(world, number, name, "write"), inside, f"wait {number} to write to {name}")

    @rule(which=index, inside=st.booleans(), kind=st.sampled_from(KINDS), reuse=st.booleans())
    @precondition(lambda self: any(name in self.kinds for name in self.waiting.values()))
    def close_what_somebody_waits_for(self, which: int, inside: bool, kind: str, reuse: bool) -> None:
        names = [name for name in self.waiting.values() if name in self.kinds]
        self.close_or_reuse(names[which % len(names)], kind if reuse else None, inside, tell=True)

    @rule(which=index, direction=directions, inside=st.booleans(), refusing=st.booleans())
    @precondition(lambda self: any(name in self.kinds for name in self.waiting.values()))
    def wait_for_what_somebody_waits_for(self, which: int, direction: str, inside: bool, refusing: bool) -> None:
        names = [name for name in self.waiting.values() if name in self.kinds]
        self.budget_changes(refusing)
        for _ in range(2):
            name, number = names[which % len(names)], self.new_wait(names[which % len(names)])
            self.take(
                partial(self._wait, number=number, name=name, direction=direction), inside, f"wait {number} for {name}"
            )
            self.budget_changes(not refusing)

    @rule(direction=directions)
    def wait_for_what_is_no_file(self, direction: str) -> None:
        number = self.new_wait(-1)
        fd = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1
        self.take(lambda world: world.wait(number, fd, direction), False, f"wait {number} for no file")

    @rule(start=index, count=st.integers(1, CROWD), direction=directions, inside=st.booleans())
    def crowd_waits_for(self, start: int, count: int, direction: str, inside: bool) -> None:
        if not self.has_crowd:
            self.has_crowd = True
            self.take(World.gather_crowd, False, "gather crowd")
        numbers = {}
        for which in range(start, start + count):
            one = (which % CROWD, direction)
            if one not in self.crowd_waits:
                numbers[one] = self.crowd_waits[one] = self.next_wait
                self.next_wait += 1

        def wait(world: World) -> None:
            for (which, direction), number in numbers.items():
                world.wait(number, world.crowd[which][0], direction)

        self.take(wait, inside, f"{len(numbers)} of the crowd wait to {direction}")

    @rule(start=index, count=st.integers(1, CROWD), inside=st.booleans(), drain=st.booleans())
    @precondition(lambda self: self.has_crowd)
    def crowd_gets_ready(self, start: int, count: int, inside: bool, drain: bool) -> None:
        chosen = {which % CROWD for which in range(start, start + count)}
        chosen = chosen & self.crowd_ready if drain else chosen - self.crowd_ready
        self.crowd_ready ^= chosen

        def transfer(world: World) -> None:
            for which in chosen:
                ours, peer = world.crowd[which]
                if drain:
                    os.read(ours, 100)
                else:
                    os.write(peer, b"x")

        self.take(transfer, inside, f"{len(chosen)} of the crowd {'are drained' if drain else 'get ready'}")

    @rule(start=index, step=st.integers(1, 7), inside=st.booleans(), by_deadline=st.booleans())
    @precondition(lambda self: bool(self.crowd_waits))
    def crowd_is_cancelled(self, start: int, step: int, inside: bool, by_deadline: bool) -> None:
        numbers = list(self.crowd_waits.values())[start % len(self.crowd_waits) :: step]

        def cancel(world: World) -> None:
            for number in numbers:
                world.cancel(number, by_deadline)

        self.take(cancel, inside, f"{len(numbers)} of the crowd are cancelled")

    @rule(refusing=st.booleans())
    def budget_changes(self, refusing: bool) -> None:
        assert self.subject.polls is not None
        self.subject.polls.refusing = refusing
        self.history.append("the budget is spent" if refusing else "there is budget")

    @rule(inside=st.booleans(), die=st.integers(1, 6))
    @precondition(lambda self: self.next_wait > 20)
    def ring_breaks(self, inside: bool, die: int) -> None:
        """Seldom: afterwards there is epoll alone."""
        assert self.subject.polls is not None
        if self.subject.polls.broken or die < 4:
            return
        self.subject.polls.broken = True
        self.take(lambda world: None, inside, "the ring breaks")


SameAsEpoll.TestCase.settings = settings(
    max_examples=EXAMPLES or 80,
    stateful_step_count=40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    # without them a failure is found as surely, and reported minutes earlier
    phases=list(Phase) if EXAMPLES else [Phase.generate],
)


class InOrder(random.Random):
    """Takes the chance out of the order in which Trio runs its tasks: both runs must throw the same dice."""

    def random(self) -> float:
        return 1.0

    def shuffle(self, x: object) -> None:
        pass


@pytest.fixture(autouse=True)
def tasks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", InOrder())


TestSameAsEpoll = SameAsEpoll.TestCase
