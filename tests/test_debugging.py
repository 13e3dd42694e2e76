"""What helps to understand a run tells the truth, and costs nothing where nobody asked for it: the explanations of each
wait's lane, the recorder of ticks, and the server of statistics.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_aiopoll
from trio_aiopoll import AiopollIOManager, ExplainingIOManager, TickRecorder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

TIMEOUT = 60  # seconds: what takes longer hangs
LOGGER = "trio_aiopoll.waits"


def run(main: Callable[[], Awaitable[Any]], io_manager: Any = ExplainingIOManager, **kwargs: Any) -> Any:
    async def guarded() -> Any:
        with trio.fail_after(TIMEOUT):
            return await main()

    return trio.run(guarded, io_manager=io_manager, **kwargs)


def in_child(program: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, not where the checkout would be imported."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(autouse=True)
def no_configuration_is_left_behind() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    assert (logger.level, logger.handlers) == (logging.NOTSET, [])
    yield
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said so far of waits that are not Trio's own."""

    def messages() -> list[str]:
        return [
            record.message
            for record in caplog.records
            if record.name == LOGGER
            and not record.message.startswith("the run ends")
            and "TrioToken.run_sync_soon" not in record.message
        ]

    return messages


async def wait_until_asleep(*arguments: Any) -> None:
    """Start a task of that function and let it go to sleep; then let it be cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(*arguments)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


@contextmanager
def closing(*descriptors: int) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# Explanations of waits


@pytest.mark.parametrize(
    ("wait", "direction"), [(trio.lowlevel.wait_readable, "readable"), (trio.lowlevel.wait_writable, "writable")]
)
def test_a_wait_for_a_socket_is_said_to_take_the_ring_lane(
    said: Callable[[], list[str]], wait: Callable[..., Awaitable[None]], direction: str
) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            while direction == "writable":
                try:
                    left.send(bytes(65536))
                except BlockingIOError:
                    break
            inode = os.fstat(left.fileno()).st_ino
            await wait_until_asleep(wait, left)
            name = f"trio.lowlevel.wait_{direction}"
            assert said() == [
                f"fd {left.fileno()} (socket:[{inode}]) {direction}, task {said_task(said, name)}: ring lane"
            ]

    run(main)


def said_task(said: Callable[[], list[str]], name: str) -> str:
    """The task as it is named in the only message; by what name Trio calls a function is its own affair."""
    (message,) = said()
    match = re.search(r"task ('[^']*')", message)
    assert match is not None
    assert match[1].rstrip("'").endswith(name.rpartition(".")[2])
    return match[1]


def test_every_wait_is_explained_once_and_so_are_those_of_trios_own_sockets(said: Callable[[], list[str]]) -> None:
    waits = 5

    async def main() -> None:
        left, right = trio.socket.socketpair()
        with left, right:

            async def receiver() -> None:
                for _ in range(waits):
                    assert await left.recv(1) == b"x"

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver, name="the receiver")
                for _ in range(waits):
                    await trio.testing.wait_all_tasks_blocked()
                    await right.send(b"x")
            fd = left.fileno()
        assert len(said()) == waits
        for message in said():
            assert re.fullmatch(rf"fd {fd} \(socket:\[\d+\]\) readable, task 'the receiver': ring lane", message)

    run(main)


def test_a_wait_for_another_kind_of_file_is_said_to_take_the_epoll_lane(said: Callable[[], list[str]]) -> None:
    async def main() -> None:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        with closing(fd):
            await wait_until_asleep(trio.lowlevel.wait_readable, fd)
            (message,) = said()
            assert message.startswith(f"fd {fd} (anon_inode:[eventfd]) readable, task ")
            assert message.endswith("epoll lane, because it is neither a socket nor a pipe")

    run(main)


def test_a_wait_that_the_kernel_refuses_is_said_to_move_to_the_epoll_lane(
    said: Callable[[], list[str]], tmp_path: Path
) -> None:
    async def main() -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)  # which sleeps on two wait queues
        with closing(fd):
            await wait_until_asleep(trio.lowlevel.wait_readable, fd)
            before, after = said()
            assert before.startswith(f"fd {fd} ({fifo}) readable, task ")
            assert before.endswith("ring lane")
            assert after.endswith(
                "moves to the epoll lane, because the kernel cannot poll this kind of file through AIO"
            )

    run(main)


def test_a_wait_beyond_the_budget_is_said_to_move_to_the_epoll_lane(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from trio_aiopoll._ring import Polls

    real = Polls.tick

    def refusing(self: Polls, keys: Any, timeout: float) -> list[int]:
        if chosen and chosen[0] in keys:
            return [-((chosen.pop() << 12) | errno.EAGAIN) - 1]
        return real(self, keys, timeout)

    chosen: list[int] = []
    monkeypatch.setattr(Polls, "tick", refusing)
    monkeypatch.setattr("trio_aiopoll._debugging.aio_budget", lambda: (65536, 65536))

    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            chosen.append(left.fileno() * 2)
            await wait_until_asleep(trio.lowlevel.wait_readable, left)
        _, after = said()
        assert after.endswith(
            "moves to the epoll lane, because there is no room for its poll, as the host's AIO budget, "
            "fs.aio-max-nr, is spent (65536 of 65536 in use)"
        )

    run(main)


def test_a_cancelled_wait_that_never_reached_the_kernel_is_not_mentioned(said: Callable[[], list[str]]) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right, trio.move_on_after(0):
            await trio.lowlevel.wait_readable(left)

    run(main)
    assert said() == []


def test_the_end_of_a_run_is_said_with_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        left, right = socket.socketpair()
        with left, right:
            await trio.lowlevel.wait_writable(left)
        calls: int = trio.lowlevel.current_statistics().io_statistics.submit_calls
        return calls

    calls = run(main)
    (message,) = [record.message for record in caplog.records if record.message.startswith("the run ends")]
    (told,) = re.findall(r"submit_calls=(\d+)", message)
    assert int(told) >= calls > 0


def test_a_level_that_the_program_has_set_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(LOGGER).setLevel(logging.INFO)

    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            await trio.lowlevel.wait_writable(left)

    run(main)
    assert [record for record in caplog.records if record.name == LOGGER] == []


def test_an_explaining_run_takes_what_the_manager_takes() -> None:
    with pytest.raises(ValueError, match="busy_poll"):
        ExplainingIOManager(busy_poll=2)
    trio.run(trio.sleep, 0, io_manager=lambda: ExplainingIOManager(busy_poll=1e-6))


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)])
@pytest.mark.parametrize("name", ["aiopoll", "auto", "TRIO_IO_MANAGER", "install", "trio_aiopoll.run", "guest"])
def test_the_environment_makes_every_aiopoll_run_explain_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: bool
) -> None:
    monkeypatch.setenv("TRIO_AIOPOLL_DEBUG", value)

    async def is_explaining() -> bool:
        return isinstance(trio._core._run.GLOBAL_RUN_CONTEXT.runner.io_manager, ExplainingIOManager)  # type: ignore[attr-defined]

    def in_guest_mode() -> Any:
        import asyncio

        async def main() -> Any:
            done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            trio.lowlevel.start_guest_run(
                is_explaining,
                run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
                done_callback=done.set_result,
                io_manager="aiopoll",
            )
            return (await done).unwrap()

        return asyncio.run(main())

    if name == "install":
        trio_aiopoll.install()
        try:
            assert trio.run(is_explaining) is expected
        finally:
            trio_aiopoll.uninstall()
    elif name == "TRIO_IO_MANAGER":
        monkeypatch.setenv(name, "aiopoll")
        assert trio.run(is_explaining) is expected
    elif name == "trio_aiopoll.run":
        assert trio_aiopoll.run(is_explaining) is expected
    elif name == "guest":
        assert in_guest_mode() is expected
    else:
        assert trio.run(is_explaining, io_manager=name) is expected


EXPLAINED = """
    import logging, socket, sys
    import trio, trio_aiopoll

    async def main():
        left, right = socket.socketpair()
        with left, right:
            await trio.lowlevel.wait_writable(left)

    {configuration}
    trio.run(main, io_manager="aiopoll")
"""


@pytest.mark.parametrize(
    ("configuration", "stdout", "stderr"),
    [
        ("", 0, 1),
        ("logging.basicConfig(stream=sys.stdout)", 1, 0),
        # after the first run, which had to make itself heard
        ("trio.run(main, io_manager='aiopoll'); logging.basicConfig(stream=sys.stdout)", 1, 1),
        ("logging.getLogger('trio_aiopoll').addHandler(logging.StreamHandler(sys.stdout))", 1, 0),
    ],
)
def test_explanations_are_heard_once_whether_or_not_logging_is_configured(
    tmp_path: Path, configuration: str, stdout: int, stderr: int
) -> None:
    result = in_child(EXPLAINED.format(configuration=configuration), tmp_path, TRIO_AIOPOLL_DEBUG="1")
    assert (result.stdout.count(") writable, task "), result.stderr.count(") writable, task ")) == (stdout, stderr)


def test_a_run_that_is_not_to_explain_itself_has_none_of_the_code_for_it_on_its_way(tmp_path: Path) -> None:
    """Not a question is asked, a wait or a tick: the methods are those of the manager's own class."""
    for method in ("wait_readable", "wait_writable", "get_events", "process_events", "lane_wait"):
        assert "_debugging" not in getattr(AiopollIOManager, method).__code__.co_filename
    assert "logger.debug" not in Path(sys.modules[AiopollIOManager.__init__.__module__].__file__ or "").read_text()
    result = in_child(EXPLAINED.format(configuration="logging.basicConfig(level='DEBUG')"), tmp_path)
    assert "trio_aiopoll" not in result.stderr


# The recorder of ticks


class Clock:
    """Time passes only by `forward`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["aiopoll", "epoll"])
def io_manager(request: pytest.FixtureRequest) -> str:
    return request.param


def test_ticks_have_the_time_that_their_tasks_ran_and_how_many_they_were(io_manager: str) -> None:
    clock = Clock()
    recorder = TickRecorder(clock=clock)

    async def worker() -> None:
        clock.forward(1)

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for _ in range(7):
                nursery.start_soon(worker)

    run(main, io_manager, instruments=[recorder])
    (busy,) = [tick for tick in recorder.ticks if tick.ran]
    assert (busy.ran, busy.batch) == (7, 7)
    assert [tick.start for tick in recorder.ticks] == sorted(tick.start for tick in recorder.ticks)
    assert recorder.ticks[0].start == 0
    assert sum(tick.blocked for tick in recorder.ticks) == 0


def test_ticks_have_the_time_that_they_blocked_and_might_have(io_manager: str) -> None:
    clock = Clock()
    recorder = TickRecorder(clock=clock)
    asleep: list[float] = []
    woken = threading.Event()

    class Sleeper(trio.abc.Instrument):
        """While the run sleeps, time passes, and what ends its sleep is under way."""

        def before_io_wait(self, timeout: float) -> None:
            if timeout > 1:
                asleep.append(timeout)
                clock.forward(3)
                woken.set()

    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:

            def wake() -> None:
                assert woken.wait(TIMEOUT)
                right.send(b"x")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, left)
                nursery.start_soon(trio.to_thread.run_sync, wake)

    run(main, io_manager, instruments=[recorder, Sleeper()])
    slept = [tick for tick in recorder.ticks if tick.blocked]
    assert len(slept) == len(asleep) >= 1
    assert [tick.timeout for tick in slept] == asleep
    assert {tick.blocked for tick in slept} == {3}
    assert all(tick.ran == 0 for tick in recorder.ticks)


def test_the_whole_run_is_in_its_ticks(io_manager: str) -> None:
    recorder = TickRecorder()
    steps = 0

    class Counter(trio.abc.Instrument):
        ticks = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += 1

        def before_io_wait(self, timeout: float) -> None:
            self.ticks += 1

    counter = Counter()

    async def main() -> None:
        for _ in range(100):
            await trio.lowlevel.checkpoint()

    run(main, io_manager, instruments=[recorder, counter])
    assert len(recorder.ticks) == counter.ticks > 100
    assert sum(tick.batch for tick in recorder.ticks) == steps
    for before, after in zip(list(recorder.ticks), list(recorder.ticks)[1:], strict=False):
        assert after.start >= before.start + before.blocked + before.ran - 1e-9


def test_a_recorder_can_join_and_leave_a_run_that_is_under_way(io_manager: str) -> None:
    recorder = TickRecorder()

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        trio.lowlevel.add_instrument(recorder)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(recorder)
        await trio.lowlevel.checkpoint()

    run(main, io_manager)
    assert 9 <= len(recorder.ticks) <= 10
    assert all(tick.batch >= 1 and tick.start >= 0 and tick.blocked >= 0 for tick in recorder.ticks)


def test_a_recorder_starts_anew_with_each_run(io_manager: str) -> None:
    recorder = TickRecorder(max_ticks=5)

    async def main() -> None:
        for _ in range(20):
            await trio.lowlevel.checkpoint()

    run(main, io_manager, instruments=[recorder])
    first, dropped = list(recorder.ticks), recorder.dropped
    run(main, io_manager, instruments=[recorder])
    assert recorder.dropped == dropped > 0
    assert recorder.samples[0].time == 0
    assert first != list(recorder.ticks)


def test_only_the_latest_ticks_are_kept_and_the_others_counted(io_manager: str) -> None:
    everything, latest = TickRecorder(clock=Clock()), TickRecorder(max_ticks=10, clock=Clock())

    async def main() -> None:
        for _ in range(50):
            await trio.lowlevel.checkpoint()

    run(main, io_manager, instruments=[everything, latest])
    assert len(latest.ticks) == 10
    assert latest.dropped == len(everything.ticks) - 10
    assert list(everything.ticks)[-10:] == list(latest.ticks)


def test_samples_are_the_runs_statistics_not_more_often_than_asked_for(io_manager: str) -> None:
    clock = Clock()
    recorder = TickRecorder(sample_every=10, clock=clock)

    async def main() -> None:
        left, right = trio.socket.socketpair()
        with left, right:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(40):
                    clock.forward(1)
                    await trio.lowlevel.checkpoint()
                await right.send(b"x")

    run(main, io_manager, instruments=[recorder])
    assert [sample.time for sample in recorder.samples] == [0, 10, 20, 30, 40]
    for sample in list(recorder.samples)[1:]:
        assert sample.statistics.io_statistics.backend == io_manager
        assert sample.statistics.io_statistics.tasks_waiting_read == 2  # the second is Trio's own


def test_what_was_recorded_can_be_written_as_json(io_manager: str) -> None:
    recorder = TickRecorder(sample_every=0)

    async def main() -> None:
        await trio.sleep(0.01)

    run(main, io_manager, instruments=[recorder])
    recorded = json.loads(json.dumps(recorder.as_dict(), allow_nan=False))
    assert set(recorded) == {"ticks", "samples", "dropped"}
    ticks = [trio_aiopoll.Tick(*values) for values in zip(*recorded["ticks"].values(), strict=True)]
    assert list(recorded["ticks"]) == list(trio_aiopoll.Tick._fields)
    assert ticks == list(recorder.ticks)
    assert len(recorded["samples"]) == len(recorder.samples) == len(ticks)
    assert recorded["samples"][0]["io"]["backend"] == io_manager
    assert recorded["samples"][0]["seconds_to_next_deadline"] is None


def test_what_was_recorded_can_be_drawn(io_manager: str, tmp_path: Path) -> None:
    recorder = TickRecorder(sample_every=0)

    async def main() -> None:
        await trio.sleep(0.01)

    run(main, io_manager, instruments=[recorder])
    recorded = tmp_path / "ticks.json"
    recorded.write_text(json.dumps({"runs": [{}, recorder.as_dict()]}))
    script = Path(__file__).resolve().parent.parent / "docs" / "plots" / "tick_plot.py"
    words = [sys.executable, "-I", str(script), str(recorded), "--run", "1", "--output", str(tmp_path / "plot")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"what {len(recorder.ticks)} ticks did" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("options", [{"max_ticks": 0}, {"sample_every": -1}, {"sample_every": float("nan")}])
def test_a_recorder_that_could_not_record_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TickRecorder(**options)


# The server of statistics


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_AIOPOLL_TOP", "1")


def addresses() -> list[str]:
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return ["\0" + name[1:] for name in names if name.startswith(f"@trio_aiopoll/{os.getpid()}/")]


def asked(address: str) -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(address)
        return json.loads(b"".join(iter(lambda: sock.recv(65536), b"")))


async def started() -> str:
    """The address of this run's server."""
    await trio.testing.wait_all_tasks_blocked()
    (address,) = addresses()
    return address


@pytest.mark.usefixtures("serving")
def test_a_run_answers_with_its_statistics_as_often_as_it_is_asked(io_manager: str) -> None:
    async def main() -> None:
        address = await started()
        for _ in range(10):
            answer = await trio.to_thread.run_sync(asked, address)
            assert answer["pid"] == os.getpid()
            assert answer["thread"] == threading.current_thread().name
            assert 0 <= answer["seconds"] < TIMEOUT
            now = trio.lowlevel.current_statistics()
            assert answer["statistics"]["tasks_living"] == now.tasks_living
            assert answer["statistics"]["io"]["backend"] == io_manager
            # who answers does not wait for who asks
            assert answer["statistics"]["io"]["tasks_waiting_read"] == now.io_statistics.tasks_waiting_read - 1

    run(main, io_manager)
    assert addresses() == []


@pytest.mark.usefixtures("serving")
def test_runs_of_several_threads_answer_each_for_itself() -> None:
    together = threading.Barrier(3, timeout=TIMEOUT)
    answers: list[Any] = []

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(together.wait)
        await trio.to_thread.run_sync(together.wait)

    threads = [threading.Thread(target=run, args=(main, name), name=name) for name in ("aiopoll", "epoll")]
    for thread in threads:
        thread.start()
    together.wait()
    answers = [asked(address) for address in addresses()]
    together.wait()
    for thread in threads:
        thread.join(TIMEOUT)
    assert {answer["thread"]: answer["statistics"]["io"]["backend"] for answer in answers} == {
        "aiopoll": "aiopoll",
        "epoll": "epoll",
    }


@pytest.mark.usefixtures("serving")
def test_the_server_survives_who_hangs_up_and_a_manager_that_cannot_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trio_aiopoll._statistics_server._PAUSE", 0)

    async def main() -> None:
        address = await started()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
        await trio.testing.wait_all_tasks_blocked()
        with monkeypatch.context() as patch:
            patch.setattr(AiopollIOManager, "statistics", lambda self: 1 / 0)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(TIMEOUT)
                sock.connect(address)
                assert await trio.to_thread.run_sync(sock.recv, 1) == b""
        assert (await trio.to_thread.run_sync(asked, address))["pid"] == os.getpid()

    run(main, "aiopoll")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.usefixtures("serving")
def test_only_the_same_user_and_root_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_aiopoll._statistics_server.peer_of", lambda sock: (os.getpid(), os.geteuid() + 1))

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(await started())
            assert await trio.to_thread.run_sync(sock.recv, 1) == b""

    run(main, "aiopoll")


@pytest.mark.usefixtures("serving")
def test_the_server_hides_neither_idleness_nor_the_end_from_a_run(io_manager: str) -> None:
    """The clock jumps and the run ends as if it were not there; even the shortest run does."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def main() -> float:
        await trio.sleep(80_000)
        return trio.current_time()

    assert trio.run(main, io_manager=io_manager, clock=clock) >= 80_000

    async def nothing() -> None:
        pass

    for _ in range(20):
        trio.run(nothing, io_manager=io_manager)
    assert addresses() == []


@pytest.mark.parametrize("value", [None, "", "0"])
def test_a_run_that_was_not_told_to_has_no_server(
    monkeypatch: pytest.MonkeyPatch, io_manager: str, value: str | None
) -> None:
    monkeypatch.setenv("TRIO_AIOPOLL_TOP", value or "")
    if value is None:
        monkeypatch.delenv("TRIO_AIOPOLL_TOP")

    async def main() -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert addresses() == []

    run(main, io_manager)
