"""A run gets the I/O manager that was chosen for it, by whatever way it was chosen, and no other run notices: without a
choice nothing changes, and a choice that cannot be had is refused without a trace.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import pickle
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_aiopoll
from trio_aiopoll import AiopollIOManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import outcome

EpollIOManager = trio._core._io_epoll.EpollIOManager  # type: ignore[attr-defined]
NAMES = ("aiopoll", "auto", "epoll")
IDLE_RINGS_MAX = 4
# what a "from trio import run" before the import of trio_aiopoll would have got
earlier_run = inspect.unwrap(trio.run)
TIMEOUT = 60  # seconds: what takes longer hangs


async def manager() -> object:
    """The I/O manager of this run, which at this time can do what a manager is for."""
    with trio.fail_after(TIMEOUT):
        left, right = trio.socket.socketpair()
        with left, right:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, left)
                await trio.testing.wait_all_tasks_blocked()
                await right.send(b"x")
    return trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager  # type: ignore[attr-defined]


async def manager_class() -> type:
    return type(await manager())


def guest(start: Callable[..., None]) -> Callable[..., Any]:
    """``start``, which is a start_guest_run, with a host loop around it, as something to be called like trio.run."""

    def run(async_fn: Callable[..., Awaitable[object]], *args: object, **kwargs: object) -> object:
        todo: queue.Queue[Callable[[], object]] = queue.Queue()
        done: list[outcome.Outcome[object]] = []
        start(async_fn, *args, run_sync_soon_threadsafe=todo.put, done_callback=done.append, **kwargs)
        while not done:
            todo.get(timeout=TIMEOUT)()
        return done[0].unwrap()

    return run


def host_runs() -> dict[str, Callable[..., Any]]:
    return {
        "trio.run": trio.run,
        "trio._core.run": trio._core.run,
        "trio._core._run.run": trio._core._run.run,
        "trio_aiopoll.run": trio_aiopoll.run,
        "trio.lowlevel.start_guest_run": guest(trio.lowlevel.start_guest_run),
        "trio._core.start_guest_run": guest(trio._core.start_guest_run),
        "trio._core._run.start_guest_run": guest(trio._core._run.start_guest_run),
        "trio_aiopoll.start_guest_run": guest(trio_aiopoll.start_guest_run),
    }


@pytest.fixture(params=list(host_runs()))
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return host_runs()[request.param]


@pytest.fixture(autouse=True)
def no_choice_is_left_behind() -> Any:
    yield
    assert trio._core._run.TheIOManager is EpollIOManager
    assert earlier_run(manager_class) is EpollIOManager
    assert trio.run(manager_class) is EpollIOManager


def ring_count() -> int:
    return Path("/proc/self/maps").read_text().count("/[aio]")


def in_child(program: str) -> Any:
    """What a program of its own, in a fresh process, prints as JSON."""
    child = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


# What can be chosen


@pytest.mark.parametrize(
    ("io_manager", "expected"),
    [("aiopoll", AiopollIOManager), ("auto", AiopollIOManager), ("epoll", EpollIOManager), (None, EpollIOManager)],
)
def test_a_name_chooses_the_manager(run: Callable[..., Any], io_manager: str | None, expected: type) -> None:
    assert run(manager_class, io_manager=io_manager) is expected


@pytest.mark.parametrize("cls", [AiopollIOManager, EpollIOManager])
def test_a_callable_makes_the_manager(run: Callable[..., Any], cls: type) -> None:
    made = []

    def make() -> object:
        made.append(cls())
        return made[-1]

    assert run(manager, io_manager=make) is made[0]
    assert len(made) == 1


@pytest.mark.parametrize("make", [AiopollIOManager, functools.partial(AiopollIOManager, busy_poll=1e-6)])
def test_the_class_and_a_partial_of_it_are_callables(run: Callable[..., Any], make: Callable[[], object]) -> None:
    assert run(manager_class, io_manager=make) is AiopollIOManager


def test_without_a_choice_trio_runs_on_its_own_manager() -> None:
    for name, run in host_runs().items():
        expected = AiopollIOManager if name.startswith("trio_aiopoll.") else EpollIOManager
        assert run(manager_class) is expected, name


def test_import_changes_no_default_and_replaces_every_name() -> None:
    before = in_child(
        """
        import json, trio
        default = trio._core._run.TheIOManager
        runs = [trio.run, trio._core.run, trio._core._run.run]
        guests = [trio.lowlevel.start_guest_run, trio._core.start_guest_run, trio._core._run.start_guest_run]
        import trio_aiopoll
        print(json.dumps({
            "default": trio._core._run.TheIOManager is default,
            "runs": len({*runs, trio.run, trio._core.run, trio._core._run.run}),
            "guests": len({*guests, trio.lowlevel.start_guest_run, trio._core.start_guest_run,
                           trio._core._run.start_guest_run}),
        }))
        """
    )
    assert before == {"default": True, "runs": 2, "guests": 2}


def test_arguments_result_and_exceptions_pass_through(run: Callable[..., Any]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)

    class Counting(trio.abc.Instrument):
        steps = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.steps += 1

    counting = Counting()

    async def main(*args: str) -> tuple[str, ...]:
        await trio.sleep(1000)
        assert trio.lowlevel.current_clock() is clock
        return args

    assert run(main, "a", "b", io_manager="aiopoll", clock=clock, instruments=[counting]) == ("a", "b")
    assert counting.steps > 0

    error = KeyError("no result")

    async def failing() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        run(failing, io_manager="aiopoll")
    assert raised.value is error


# What cannot


@pytest.mark.parametrize("name", ["", "AIOPOLL", "uring", "aiopoll "])
def test_unknown_name_is_a_value_error_that_lists_the_names(run: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match="is not known") as raised:
        run(manager, io_manager=name)
    assert repr(name) in str(raised.value)
    for known in NAMES:
        assert repr(known) in str(raised.value)


@pytest.mark.parametrize("choice", [b"aiopoll", 1, True, ["aiopoll"], object()])
def test_what_is_neither_name_nor_callable_is_a_type_error(run: Callable[..., Any], choice: object) -> None:
    with pytest.raises(TypeError, match="io_manager must be a name or a callable that makes a manager"):
        run(manager, io_manager=choice)


class AlmostAManager:
    def close(self) -> None: ...
    def get_events(self, timeout: float) -> None: ...
    def process_events(self, events: object) -> None: ...
    def force_wakeup(self) -> None: ...
    def statistics(self) -> None: ...


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (None, "None"),
        ("aiopoll", "'aiopoll'"),
        (object(), "<object object"),
        (AlmostAManager(), "notify_closing, wait_readable, wait_writable"),
    ],
)
def test_callable_that_makes_no_manager_is_a_type_error(run: Callable[..., Any], made: object, complaint: str) -> None:
    with pytest.raises(TypeError, match="no I/O manager") as raised:
        run(manager, io_manager=lambda: made)
    assert complaint in str(raised.value)
    assert run(manager_class, io_manager="aiopoll") is AiopollIOManager


def test_callable_that_makes_a_class_is_a_type_error() -> None:
    """The class has all the methods, so a run that took it would fail later, and leave its thread unusable."""
    seen = in_child(
        """
        import json, trio, trio_aiopoll

        async def backend():
            return trio.lowlevel.current_statistics().io_statistics.backend

        errors = []
        for cls in (trio_aiopoll.AiopollIOManager, trio._core._io_epoll.EpollIOManager):
            try:
                trio.run(backend, io_manager=lambda: cls)
            except BaseException as error:
                errors.append([type(error).__name__, "no I/O manager" in str(error)])
        print(json.dumps([*errors, trio.run(backend), trio.run(backend, io_manager="aiopoll")]))
        """
    )
    assert seen == [["TypeError", True], ["TypeError", True], "epoll", "aiopoll"]


def test_exception_of_the_callable_is_passed_on(run: Callable[..., Any]) -> None:
    error = KeyError("not today")

    def make() -> object:
        raise error

    with pytest.raises(KeyError) as raised:
        run(manager, io_manager=make)
    assert raised.value is error
    assert run(manager_class, io_manager="aiopoll") is AiopollIOManager


@pytest.fixture
def unavailable(monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_polls(own_fd: int = -1) -> object:
        raise trio_aiopoll.UnavailableError("io_setup() failed, for this test")

    monkeypatch.setattr("trio_aiopoll._io_manager.open_polls", open_polls)
    monkeypatch.setattr("trio_aiopoll._selection.open_polls", open_polls)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("unavailable")
def test_aiopoll_that_cannot_be_served_is_an_error(run: Callable[..., Any]) -> None:
    with pytest.raises(trio_aiopoll.UnavailableError, match="for this test"):
        run(manager, io_manager="aiopoll")


@pytest.mark.usefixtures("unavailable")
def test_auto_falls_back_to_epoll_with_one_log_line_that_says_why(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(manager_class, io_manager="auto") is EpollIOManager
    [record] = caplog.records
    assert record.name == "trio_aiopoll"
    assert record.levelname == "WARNING"
    assert "for this test" in record.getMessage()


def test_auto_says_nothing_where_aiopoll_works(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    run(manager_class, io_manager="auto")
    assert caplog.records == []


# Runs inside of runs, and beside each other


@pytest.mark.parametrize("outer", ["aiopoll", "epoll"])
@pytest.mark.parametrize("inner", ["aiopoll", "epoll", "auto", None, AiopollIOManager])
def test_nested_run_gets_stock_trios_error_and_leaves_nothing(
    run: Callable[..., Any], outer: str, inner: str | type | None
) -> None:
    async def nested(**choice: Any) -> str:
        with pytest.raises(RuntimeError) as raised:
            run(manager_class, **choice)
        return str(raised.value)

    async def stock() -> str:
        with pytest.raises(RuntimeError) as raised:
            earlier_run(manager_class)
        return str(raised.value)

    async def main() -> tuple[str, str, type]:
        with trio.fail_after(TIMEOUT):
            return await nested(io_manager=inner), await stock(), await manager_class()

    got, expected, still = run(main, io_manager=outer)
    assert got == expected == "Attempted to call run() from inside a run()"
    assert still is {"aiopoll": AiopollIOManager, "epoll": EpollIOManager}[outer]


def test_nested_run_makes_no_manager() -> None:
    made = []

    def make() -> object:
        made.append(AiopollIOManager())
        return made[-1]

    async def main() -> None:
        with pytest.raises(RuntimeError):
            trio.run(manager_class, io_manager=make)

    trio.run(main, io_manager="aiopoll")
    assert made == []


def test_run_in_a_worker_thread_of_a_run_has_its_own_choice() -> None:
    async def main() -> list[type]:
        choices: tuple[str | None, ...] = ("epoll", None, "aiopoll", "auto")
        with trio.fail_after(TIMEOUT):
            return [
                await trio.to_thread.run_sync(functools.partial(trio.run, manager_class, io_manager=choice))
                for choice in choices
            ]

    assert trio.run(main, io_manager="aiopoll") == [EpollIOManager, EpollIOManager, AiopollIOManager, AiopollIOManager]


def test_run_that_a_callable_starts_is_not_given_that_callable() -> None:
    calls = []

    def make() -> object:
        calls.append(make)
        assert len(calls) == 1
        assert earlier_run(manager_class) is EpollIOManager
        assert trio.run(manager_class) is EpollIOManager
        assert trio.run(manager_class, io_manager="aiopoll") is AiopollIOManager
        return AiopollIOManager()

    assert trio.run(manager_class, io_manager=make) is AiopollIOManager


def test_callable_that_takes_its_time_holds_up_no_other_thread() -> None:
    other_has_run = threading.Event()

    def make() -> object:
        assert other_has_run.wait(TIMEOUT / 4), "another thread's run could not start meanwhile"
        return AiopollIOManager()

    def other() -> type:
        result: type = trio.run(manager_class)
        other_has_run.set()
        return result

    with ThreadPoolExecutor(2) as executor:
        slow = executor.submit(functools.partial(trio.run, manager_class, io_manager=make))
        assert executor.submit(other).result() is EpollIOManager
        assert slow.result() is AiopollIOManager


def test_choices_of_many_threads_do_not_mix(request: pytest.FixtureRequest) -> None:
    threads, rounds = 12, 40
    barrier = threading.Barrier(threads)
    choices: list[tuple[Any, type]] = [
        ("aiopoll", AiopollIOManager),
        (None, EpollIOManager),
        ("epoll", EpollIOManager),
        ("auto", AiopollIOManager),
        (lambda: AiopollIOManager(), AiopollIOManager),
        (lambda: EpollIOManager(), EpollIOManager),
    ]

    async def cls() -> type:
        await trio.lowlevel.checkpoint()
        return type(trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager)  # type: ignore[attr-defined]

    def work(number: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        barrier.wait(TIMEOUT)
        for turn in range(rounds):
            choice, expected = choices[(number + turn) % len(choices)]
            seen["right" if trio.run(cls, io_manager=choice) is expected else f"wrong for {choice}"] += 1
        return seen

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    request.addfinalizer(functools.partial(sys.setswitchinterval, interval))
    with ThreadPoolExecutor(threads) as executor:
        assert sum(executor.map(work, range(threads)), Counter()) == {"right": threads * rounds}
    assert_surplus_rings_are_given_back()


def assert_surplus_rings_are_given_back() -> None:
    # by a thread that does nothing else, some 30 ms each
    deadline = time.monotonic() + TIMEOUT
    while ring_count() > IDLE_RINGS_MAX:
        assert time.monotonic() < deadline, f"{ring_count()} rings are kept"
        time.sleep(0.01)


# Runs that fail before they have begun


class BadClock:
    def start_clock(self) -> None:
        raise OSError("no time")


class BadInstrument:
    @property
    def before_run(self) -> None:
        raise OSError("no instrument")


async def never() -> None:
    raise AssertionError("this was not to run")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"clock": object()}, id="no clock"),
        pytest.param({"clock": BadClock()}, id="bad clock"),
        pytest.param({"instruments": 5}, id="no instruments"),
        pytest.param({"instruments": [BadInstrument()]}, id="bad instrument"),
        pytest.param({"no_such_argument": 5}, id="unknown argument"),
        pytest.param({"async_fn": lambda: None}, id="not async"),
        pytest.param({"async_fn": None}, id="not callable"),
        pytest.param({"async_fn": never, "args": (1, 2, 3)}, id="too many arguments"),
        pytest.param({"async_fn": trio.sleep}, id="too few arguments"),
    ],
)
def test_run_that_fails_in_setup_fails_as_on_stock_trio_and_leaks_nothing(arguments: dict[str, Any]) -> None:
    keywords = dict(arguments)
    async_fn = keywords.pop("async_fn", never)
    args = keywords.pop("args", ())

    def failure(run: Callable[..., object]) -> tuple[type, str]:
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            run(async_fn, *args, **keywords)
        return raised.type, str(raised.value)

    stock = failure(earlier_run)
    trio.run(manager_class, io_manager="aiopoll")  # so that what is kept for the next run is there
    gc.collect()
    descriptors, rings = len(os.listdir("/proc/self/fd")), ring_count()
    for _ in range(10):
        assert failure(functools.partial(trio.run, io_manager="aiopoll")) == stock
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert ring_count() == rings


def test_many_runs_use_one_ring_after_the_other() -> None:
    trio.run(manager_class, io_manager="aiopoll")
    descriptors, rings = len(os.listdir("/proc/self/fd")), ring_count()
    for _ in range(100):
        trio.run(manager_class, io_manager="aiopoll")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert ring_count() == rings <= IDLE_RINGS_MAX


# For the whole process


def test_install_serves_names_that_were_bound_before_and_uninstall_takes_it_back() -> None:
    seen = in_child(
        """
        import functools, inspect, json, queue
        import trio
        from trio import run as earlier_run
        from trio.lowlevel import start_guest_run as earlier_start_guest_run

        def defaults(function=earlier_run):  # as pytest-trio does it
            return function

        import trio_aiopoll

        async def backend():
            return trio.lowlevel.current_statistics().io_statistics.backend

        def guest(start, **kwargs):
            todo, done = queue.Queue(), []
            start(backend, run_sync_soon_threadsafe=todo.put, done_callback=done.append, **kwargs)
            while not done:
                todo.get(timeout=30)()
            return done[0].unwrap()

        def look():
            return {
                "earlier run": earlier_run(backend),
                "default argument": defaults()(backend),
                "run": trio.run(backend),
                "None": trio.run(backend, io_manager=None),
                "epoll": trio.run(backend, io_manager="epoll"),
                "aiopoll": trio.run(backend, io_manager="aiopoll"),
                "auto": trio.run(backend, io_manager="auto"),
                "our run": trio_aiopoll.run(backend),
                "earlier guest": guest(earlier_start_guest_run),
                "guest": guest(trio.lowlevel.start_guest_run),
                "guest epoll": guest(trio.lowlevel.start_guest_run, io_manager="epoll"),
            }

        seen = [look()]
        trio_aiopoll.uninstall()  # nothing to take back
        seen.append(look())
        trio_aiopoll.install()
        seen.append(look())
        trio_aiopoll.install()  # no more than once
        seen.append(look())
        trio_aiopoll.uninstall()
        seen.append(look())
        seen.append(trio._core._run.TheIOManager is trio._core._io_epoll.EpollIOManager)
        print(json.dumps(seen))
        """
    )
    not_installed = {
        "earlier run": "epoll",
        "default argument": "epoll",
        "run": "epoll",
        "None": "epoll",
        "epoll": "epoll",
        "aiopoll": "aiopoll",
        "auto": "aiopoll",
        "our run": "aiopoll",
        "earlier guest": "epoll",
        "guest": "epoll",
        "guest epoll": "epoll",
    }
    installed = {name: "epoll" if name.endswith("epoll") else "aiopoll" for name in not_installed}
    installed["aiopoll"] = "aiopoll"
    assert seen == [not_installed, not_installed, installed, installed, not_installed, True]


def test_install_and_uninstall_leave_the_present_run_alone() -> None:
    async def main(change: Callable[[], None]) -> tuple[type, type]:
        change()
        there = await trio.to_thread.run_sync(trio.run, manager_class)
        return await manager_class(), there

    try:
        assert trio.run(main, trio_aiopoll.install) == (EpollIOManager, AiopollIOManager)
        assert trio.run(main, trio_aiopoll.uninstall) == (AiopollIOManager, EpollIOManager)
    finally:
        trio_aiopoll.uninstall()


@pytest.mark.usefixtures("unavailable")
def test_install_that_cannot_be_served_changes_nothing() -> None:
    with pytest.raises(trio_aiopoll.UnavailableError, match="for this test"):
        trio_aiopoll.install()
    assert trio.run(manager_class) is EpollIOManager


# How it looks


@pytest.mark.parametrize("name", ["run", "start_guest_run"])
def test_replaced_functions_look_like_trios_own(name: str) -> None:
    replaced = trio.run if name == "run" else trio.lowlevel.start_guest_run
    original = inspect.unwrap(replaced)
    assert original is not replaced
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(replaced, attribute) == getattr(original, attribute)
    assert replaced.__annotations__.items() >= original.__annotations__.items()
    assert pickle.loads(pickle.dumps(replaced)) is replaced


@pytest.mark.parametrize("name", ["run", "start_guest_run"])
def test_signature_is_trios_own_and_io_manager(name: str) -> None:
    replaced = trio.run if name == "run" else trio.lowlevel.start_guest_run
    parameters = dict(inspect.signature(replaced).parameters)
    added = parameters.pop("io_manager")
    assert (added.kind, added.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert parameters == dict(inspect.signature(inspect.unwrap(replaced)).parameters)


@pytest.mark.parametrize("function", [trio_aiopoll.run, trio_aiopoll.start_guest_run])
def test_own_functions_default_to_aiopoll(function: Callable[..., object]) -> None:
    parameter = inspect.signature(function).parameters["io_manager"]
    assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, "aiopoll")


class PassesOn:
    """An I/O manager around another one, as somebody would make it who wants to watch."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("inner", [AiopollIOManager, EpollIOManager])
def test_a_manager_that_passes_all_on_is_as_good(inner: Callable[[], Any]) -> None:
    async def main() -> None:
        near, far = trio.socket.socketpair()
        reader, writer = os.pipe()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def echo() -> None:
                    while data := await far.recv(65536):
                        await far.send(data)

                nursery.start_soon(echo)
                for _ in range(10):
                    await near.send(b"x")
                    assert await near.recv(65536) == b"x"
                nursery.start_soon(trio.lowlevel.wait_readable, reader)
                await trio.testing.wait_all_tasks_blocked()
                os.write(writer, b"x")
                assert await trio.to_thread.run_sync(os.getpid) == os.getpid()
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)  # noqa: ASYNC222
                await near.send(b"y")
                assert await near.recv(65536) == b"y"
                nursery.cancel_scope.cancel()
        trio.lowlevel.notify_closing(reader)
        for sock in (near, far):
            sock.close()
        os.close(reader)
        os.close(writer)

    trio.run(main, io_manager=lambda: PassesOn(inner()))


@pytest.mark.parametrize("inner", [AiopollIOManager, EpollIOManager])
def test_so_it_is_in_guest_mode(inner: Callable[[], Any]) -> None:
    """The host wakes a run that sleeps."""
    jobs: queue.Queue[Callable[[], object]] = queue.Queue()
    outcomes: list[outcome.Outcome[int]] = []
    events = []

    async def main() -> int:
        for _ in range(10):
            events.append(trio.Event())
            await events[-1].wait()
        return len(events)

    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=jobs.put,
        done_callback=outcomes.append,
        io_manager=lambda: PassesOn(inner()),
    )
    woken = 0
    while not outcomes:
        try:
            jobs.get(timeout=0.05)()
        except queue.Empty:  # it sleeps
            assert len(events) > woken, "it never wakes up"
            events[woken].set()
            woken += 1
    assert outcomes[0].unwrap() == 10
