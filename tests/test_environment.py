"""Who chooses the I/O manager of a run: its argument, or else TRIO_IO_MANAGER, or else install(), or else Trio."""

from __future__ import annotations

import inspect
import os
import queue
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import outcome

TIMEOUT = 60  # seconds: what takes longer hangs
VARIABLE = "TRIO_IO_MANAGER"
AS_IF_UNSET = ("", None)
# what a "from trio import run" before the import of trio_aiopoll would have got
earlier_run = inspect.unwrap(trio.run)


async def backend() -> str:
    name: str = trio.lowlevel.current_statistics().io_statistics.backend
    return name


def run_as_guest(async_fn: Callable[..., Awaitable[object]], **kwargs: Any) -> Any:
    todo: queue.Queue[Callable[[], object]] = queue.Queue()
    done: list[outcome.Outcome[object]] = []
    trio.lowlevel.start_guest_run(async_fn, run_sync_soon_threadsafe=todo.put, done_callback=done.append, **kwargs)
    while not done:
        todo.get(timeout=TIMEOUT)()
    return done[0].unwrap()


RUNS: dict[str, Callable[..., Any]] = {
    "trio.run": trio.run,
    "an earlier trio.run": earlier_run,
    "trio.lowlevel.start_guest_run": run_as_guest,
    "anyio.run": lambda main: anyio.run(main, backend="trio"),
}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return RUNS[request.param]


@pytest.fixture(params=[trio.run, run_as_guest], ids=["trio.run", "trio.lowlevel.start_guest_run"])
def run_with_argument(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def installed() -> Any:
    trio_aiopoll.install()
    yield
    trio_aiopoll.uninstall()


def set_variable(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setenv(VARIABLE, value or "")
    if value is None:
        monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize("name", ["aiopoll", "auto", "epoll"])
def test_the_environment_chooses_for_every_kind_of_run(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], name: str
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    assert run(backend) == ("epoll" if name == "epoll" else "aiopoll")


@pytest.mark.parametrize("value", AS_IF_UNSET)
def test_without_a_name_in_the_environment_trio_chooses(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], value: str | None
) -> None:
    set_variable(monkeypatch, value)
    assert run(backend) == "epoll"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("value", "expected"), [(None, "aiopoll"), ("", "aiopoll"), ("epoll", "epoll")])
def test_the_environment_comes_before_the_installed_default(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], value: str | None, expected: str
) -> None:
    set_variable(monkeypatch, value)
    assert run(backend) == expected


@pytest.mark.parametrize(("argument", "value"), [("aiopoll", "epoll"), ("epoll", "aiopoll"), ("epoll", "no such name")])
def test_the_argument_comes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, run_with_argument: Callable[..., Any], argument: str, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert run_with_argument(backend, io_manager=argument) == argument


def test_a_callable_as_the_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "epoll")
    assert trio.run(backend, io_manager=trio_aiopoll.AiopollIOManager) == "aiopoll"


def test_none_as_the_argument_leaves_it_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, run_with_argument: Callable[..., Any]
) -> None:
    monkeypatch.setenv(VARIABLE, "aiopoll")
    assert run_with_argument(backend, io_manager=None) == "aiopoll"


def test_the_default_of_trio_aiopoll_run_is_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "epoll")
    assert trio_aiopoll.run(backend) == "aiopoll"


def test_anyios_backend_aiopoll_is_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "epoll")
    assert anyio.run(backend, backend="aiopoll") == "aiopoll"
    assert anyio.run(backend, backend="trio", backend_options={"io_manager": "aiopoll"}) == "aiopoll"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("value", ["no such name", "AIOPOLL", " aiopoll", "0"])
def test_a_bad_name_is_the_runs_value_error_and_nothing_is_left_of_it(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=r"^TRIO_IO_MANAGER='.*' is not known; .*'aiopoll', 'auto', 'epoll'") as caught:
        run(backend)
    assert repr(value) in str(caught.value)
    monkeypatch.delenv(VARIABLE)
    assert run(backend) == "aiopoll"


def test_a_program_may_choose_through_its_environment_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "epoll")
    assert trio.run(backend) == "epoll"
    os.environ[VARIABLE] = "aiopoll"
    assert trio.run(backend) == "aiopoll"


def test_a_run_within_a_run_is_refused_as_by_trio_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        monkeypatch.setenv(VARIABLE, "no such name")
        with pytest.raises(RuntimeError, match="call run\\(\\) from inside"):
            trio.run(backend)

    trio.run(main)


def test_if_the_environments_aiopoll_cannot_be_served_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    monkeypatch.setattr("trio_aiopoll._probe.missing_names", ("trio.a_name",))
    monkeypatch.setenv(VARIABLE, "aiopoll")
    with pytest.raises(trio_aiopoll.UnavailableError, match=r"trio\.a_name"):
        run(backend)
    monkeypatch.setenv(VARIABLE, "auto")
    assert run(backend) == "epoll"


@pytest.mark.parametrize("name", ["aiopoll", "epoll"])
def test_a_program_that_only_imports_trio_aiopoll_runs_on_what_its_environment_says(name: str, tmp_path: Path) -> None:
    program = """
        from trio import run, lowlevel
        import trio_aiopoll

        async def main():
            print(lowlevel.current_statistics().io_statistics.backend)

        run(main)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,  # not where the checkout would be imported
        env={**os.environ, VARIABLE: name},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == (f"{name}\n", "", 0)
