"""The pytest plugin: a session's Trio runs, or one test's, are on the manager that was asked for, with pytest-trio and
without; what cannot be had is refused in one line; and who does not ask does not notice that it is installed.

Each session is a process of its own, in which the plugin is found by its entry point as in any user's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMEOUT = 120  # seconds: what takes longer hangs


class Session(NamedTuple):
    exit_code: int
    output: str
    outcomes: dict[str, str]


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., Session]:
    def run(files: dict[str, str], *options: str, environment: dict[str, str] | None = None) -> Session:
        for name, text in files.items():
            (tmp_path / name).write_text(textwrap.dedent(text))
        report = tmp_path / "report.xml"
        # The files may name each other, and plugins among them: -m puts their folder on the path.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "TRIO_IO_"))}
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", *options],
            cwd=tmp_path,
            env={**inherited, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        outcomes = {}
        if report.exists():
            for case in ET.parse(report).getroot().iter("testcase"):
                problems = [problem.tag for problem in case]
                outcomes[case.attrib["name"]] = problems[0] if problems else "passed"
        return Session(child.returncode, child.stdout, outcomes)

    return run


BACKEND = """
import trio


def backend():
    return trio.lowlevel.current_statistics().io_statistics.backend
"""

SHOW_BACKEND = {
    "backend.py": BACKEND,
    "test_it.py": """
        import trio
        from backend import backend

        async def main():
            return backend()

        def test_backend():
            print("backend:", trio.run(main))
    """,
}

TRIO_TESTS = {
    "backend.py": BACKEND,
    "test_it.py": """
        import functools, socket, struct
        import pytest, trio
        from backend import backend

        def work():
            statistics = trio.lowlevel.current_statistics().io_statistics
            return statistics.polls_submitted + statistics.transfers

        @pytest.fixture
        async def echo(nursery):
            assert backend() == "aiopoll"
            report, reports = trio.open_memory_channel(10)

            async def handler(stream):
                try:
                    async for data in stream:
                        await stream.send_all(data)
                except trio.BrokenResourceError:
                    await report.send("broken")
                else:
                    await report.send("closed")

            listeners = await nursery.start(functools.partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            yield listeners[0].socket.getsockname(), reports
            assert backend() == "aiopoll"
            for listener in listeners:
                await listener.aclose()

        @pytest.mark.trio
        async def test_every_byte_comes_back(echo):
            address, _ = echo
            before, rounds = work(), 50
            with trio.fail_after(30):
                async with await trio.open_tcp_stream(*address) as stream:
                    for number in range(rounds):
                        request = number.to_bytes(2, "big") * 500
                        await stream.send_all(request)
                        answer = b""
                        while len(answer) < len(request):
                            answer += await stream.receive_some()
                        assert answer == request
            assert work() - before >= rounds // 2  # nearly each time a side waits, or the tick does it

        @pytest.mark.trio
        async def test_client_that_vanishes_is_noticed(echo):
            address, reports = echo
            with trio.fail_after(30):
                stream = await trio.open_tcp_stream(*address)
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()
                assert await reports.receive() == "broken"

        @pytest.mark.trio
        async def test_waiting_is_cancelled(echo):
            address, reports = echo
            async with await trio.open_tcp_stream(*address) as stream:
                with trio.move_on_after(0.01) as scope:
                    await stream.receive_some()
                assert scope.cancelled_caught
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
            with trio.fail_after(30):
                assert await reports.receive() == "closed"

        @pytest.mark.trio
        async def test_clock_that_jumps(echo, autojump_clock):
            address, _ = echo
            async with await trio.open_tcp_stream(*address) as stream:
                with trio.move_on_after(1000) as scope:
                    await stream.receive_some()
            assert scope.cancelled_caught

        @pytest.mark.trio
        async def test_that_fails(echo):
            assert backend() == "this fails, and is reported as a failure"

        def test_run_of_its_own():
            async def main():
                return backend()
            assert trio.run(main) == "aiopoll"
            assert trio.run(main, io_manager="epoll") == "epoll"
    """,
}
TRIO_OUTCOMES = {
    "test_every_byte_comes_back": "passed",
    "test_client_that_vanishes_is_noticed": "passed",
    "test_waiting_is_cancelled": "passed",
    "test_clock_that_jumps": "passed",
    "test_that_fails": "failure",
    "test_run_of_its_own": "passed",
}


@pytest.mark.parametrize(
    ("way", "trio_mode"),
    [("option", False), ("environment", False), ("ini", True), ("marker", True), ("marker", False)],
)
def test_pytest_trio_runs_tests_and_fixtures_on_aiopoll(
    way: str, trio_mode: bool, session: Callable[..., Session]
) -> None:
    files, options, environment = dict(TRIO_TESTS), [], {}
    files["pytest.ini"] = f"[pytest]\naddopts = --strict-markers --strict-config\ntrio_mode = {trio_mode}\n"
    if way == "option":
        options = ["--trio-io-manager=aiopoll"]
    elif way == "ini":
        files["pytest.ini"] += "trio_io_manager = aiopoll\n"
    elif way == "environment":
        environment = {"TRIO_IO_MANAGER": "aiopoll"}
    else:
        mark = "import pytest\npytestmark = pytest.mark.trio_io_manager('aiopoll')\n"
        files["test_it.py"] = mark + textwrap.dedent(files["test_it.py"])
    result = session(files, *options, environment=environment)
    assert result.outcomes == TRIO_OUTCOMES, result.output
    assert ("trio I/O manager: aiopoll" in result.output) == (way != "marker")


ANYIO_TESTS = {
    "backend.py": BACKEND,
    "test_it.py": """
        import anyio, anyio.abc, pytest
        from backend import backend

        @pytest.fixture(scope="module")
        def anyio_backend():
            return "trio"

        @pytest.fixture(scope="module")
        async def port(anyio_backend):
            async def echo(stream):
                async with stream:
                    async for data in stream:
                        await stream.send(data)

            async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(listener.serve, echo)
                    yield listener.extra(anyio.abc.SocketAttribute.local_port)
                    tasks.cancel_scope.cancel()

        @pytest.mark.parametrize("number", range(3))
        async def test_echo_by_the_run_of_a_module(port, number):
            assert backend() == "aiopoll"
            with anyio.fail_after(30):
                async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"

        async def test_failure(port):
            assert backend() == "this fails, and is reported as a failure"
    """,
}


@pytest.mark.parametrize("way", ["option", "marker"])
def test_plugin_of_anyio_runs_tests_and_fixtures_of_any_scope_on_aiopoll(
    way: str, session: Callable[..., Session]
) -> None:
    files, options = dict(ANYIO_TESTS), ["-p", "no:trio", "-o", "anyio_mode=auto"]
    if way == "option":
        options += ["--trio-io-manager=aiopoll"]
    else:
        mark = "import pytest\npytestmark = pytest.mark.trio_io_manager('aiopoll')\n"
        files["test_it.py"] = mark + textwrap.dedent(files["test_it.py"])
    result = session(files, *options)
    assert result.outcomes == {
        **{f"test_echo_by_the_run_of_a_module[{number}]": "passed" for number in range(3)},
        "test_failure": "failure",
    }, result.output


@pytest.mark.parametrize(
    ("option", "environment", "ini", "expected"),
    [
        (None, None, None, "epoll"),
        (None, None, "aiopoll", "aiopoll"),
        (None, "epoll", "aiopoll", "epoll"),
        ("aiopoll", "epoll", "epoll", "aiopoll"),
        ("epoll", "aiopoll", "aiopoll", "epoll"),
        ("auto", "epoll", "epoll", "aiopoll"),
    ],
)
def test_command_line_comes_before_environment_before_ini(
    option: str | None, environment: str | None, ini: str | None, expected: str, session: Callable[..., Session]
) -> None:
    files = dict(SHOW_BACKEND)
    if ini is not None:
        files["pytest.ini"] = f"[pytest]\ntrio_io_manager = {ini}\n"
    options = ["-s"] if option is None else ["-s", "--trio-io-manager", option]
    result = session(files, *options, environment={} if environment is None else {"TRIO_IO_MANAGER": environment})
    assert result.outcomes == {"test_backend": "passed"}
    assert f"backend: {expected}\n" in result.output
    asked_for = (option, environment, ini) != (None, None, None)
    assert (f"trio I/O manager: {expected}\n" in result.output) == asked_for


MARKED_TESTS = {
    "backend.py": BACKEND,
    "test_it.py": """
        import pytest, trio, trio_aiopoll
        from backend import backend

        on = pytest.mark.trio_io_manager

        async def test_default(default):
            assert backend() == default

        @on("aiopoll")
        async def test_aiopoll():
            assert backend() == "aiopoll"

        async def test_default_after_aiopoll(default):
            assert backend() == default

        @on("epoll")
        async def test_epoll():
            assert backend() == "epoll"

        @on("auto")
        @pytest.mark.xfail(strict=True)
        async def test_fails():
            assert backend() == "this fails, and what follows is not affected"

        async def test_default_after_failure(default):
            assert backend() == default

        @on("epoll")
        class TestClass:
            async def test_mark_of_class(self):
                assert backend() == "epoll"

            @on("aiopoll")
            async def test_nearest_mark_counts(self):
                assert backend() == "aiopoll"

        @pytest.fixture
        def run_of_fixture():
            async def main():
                return backend()
            yield trio.run(main)
            assert trio.run(main) == "aiopoll"

        @on("aiopoll")
        def test_fixtures_are_included(run_of_fixture):
            assert run_of_fixture == "aiopoll"

        def test_default_after_fixtures(default):
            async def main():
                return backend()
            assert trio.run(main) == default

        def test_choice_made_by_a_test():
            trio_aiopoll.install()
            trio_aiopoll.uninstall()

        async def test_default_after_that(default):
            assert backend() == default
    """,
}


@pytest.mark.parametrize(("ini", "environment"), [("aiopoll", ""), ("epoll", ""), ("", "aiopoll"), ("", "")])
def test_marker_is_for_its_tests_and_fixtures_alone(
    ini: str, environment: str, session: Callable[..., Session]
) -> None:
    files = {
        **MARKED_TESTS,
        "conftest.py": f"import pytest\n@pytest.fixture\ndef default(): return {ini or environment or 'epoll'!r}\n",
        "pytest.ini": f"[pytest]\ntrio_mode = true\ntrio_io_manager = {ini}\n",
    }
    result = session(files, "--strict-markers", environment={"TRIO_IO_MANAGER": environment})
    assert result.exit_code == 0, result.output
    assert len(result.outcomes) == 12


def test_marked_test_leaves_alone_what_a_session_fixture_installs(session: Callable[..., Session]) -> None:
    files = {
        "backend.py": BACKEND,
        "conftest.py": """
            import pytest, trio_aiopoll

            @pytest.fixture(scope="session", autouse=True)
            def on_aiopoll():
                trio_aiopoll.install()
        """,
        "test_it.py": """
            import pytest, trio
            from backend import backend

            @pytest.mark.trio_io_manager("epoll")
            async def test_marked():
                pass

            async def test_unmarked():
                assert backend() == "aiopoll"
        """,
    }
    result = session(files, "-o", "trio_mode=true")
    assert result.outcomes == {"test_marked": "passed", "test_unmarked": "passed"}, result.output


def test_session_inside_a_session_does_not_change_the_outer_one(session: Callable[..., Session]) -> None:
    files = {
        "conftest.py": "pytest_plugins = ['pytester']",
        "backend.py": BACKEND,
        "test_it.py": """
            import pytest, trio
            from backend import backend

            async def main():
                return backend()

            @pytest.mark.parametrize("inner", ["aiopoll", "epoll"])
            def test_outer(inner, pytester):
                path = pytester.makepyfile(
                    f"import trio; from test_it import main\\ndef test_inner(): assert trio.run(main) == {inner!r}"
                )
                for _ in range(2):
                    result = pytester.runpytest_inprocess("--trio-io-manager", inner, path)
                    result.assert_outcomes(passed=1)
                    assert trio.run(main) == "aiopoll"
        """,
    }
    result = session(files, "--trio-io-manager=aiopoll")
    assert set(result.outcomes.values()) == {"passed"}, result.output


@pytest.mark.parametrize("marker", ["'uring'", "", "'aiopoll', 'epoll'", "name='aiopoll'", "['aiopoll']"])
def test_marker_that_is_wrong_fails_its_test(marker: str, session: Callable[..., Session]) -> None:
    result = session({"test_it.py": f"import pytest\n@pytest.mark.trio_io_manager({marker})\ndef test_it(): pass\n"})
    assert result.outcomes == {"test_it": "error"}
    assert f"trio_io_manager({marker}) takes one of 'aiopoll', 'auto', 'epoll'" in result.output


@pytest.mark.parametrize("way", ["option", "ini", "environment"])
def test_unknown_manager_ends_the_session_in_one_line(way: str, session: Callable[..., Session]) -> None:
    result = session(
        {"test_it.py": "", "pytest.ini": "[pytest]\n" + ("trio_io_manager = uring" if way == "ini" else "")},
        *(["--trio-io-manager=uring"] if way == "option" else []),
        environment={"TRIO_IO_MANAGER": "uring"} if way == "environment" else None,
    )
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "'uring'" in result.output
    assert "Traceback" not in result.output


UNAVAILABLE = {**SHOW_BACKEND, "unavailable.py": "import trio_aiopoll._probe as p; p.missing_names = ('trio.gone',)"}


def test_session_on_aiopoll_is_refused_where_there_is_none(session: Callable[..., Session]) -> None:
    result = session(UNAVAILABLE, "-p", "unavailable", "--trio-io-manager=aiopoll")
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: aiopoll is not available: this Trio lacks trio.gone" in result.output
    assert "Traceback" not in result.output


def test_auto_is_epoll_where_there_is_no_aiopoll_and_says_why(session: Callable[..., Session]) -> None:
    result = session(UNAVAILABLE, "-s", "-p", "unavailable", "--trio-io-manager=auto")
    assert result.outcomes == {"test_backend": "passed"}
    assert "backend: epoll\n" in result.output
    assert "trio I/O manager: epoll (aiopoll is not available: this Trio lacks trio.gone" in result.output


def test_test_marked_for_aiopoll_fails_where_there_is_none(session: Callable[..., Session]) -> None:
    files = {
        **UNAVAILABLE,
        "test_marked.py": """
            import pytest
            @pytest.mark.trio_io_manager("aiopoll")
            def test_marked(): pass
        """,
    }
    result = session(files, "-p", "unavailable")
    assert result.outcomes == {"test_backend": "passed", "test_marked": "error"}
    assert "aiopoll is not available: this Trio lacks trio.gone" in result.output


def test_named_with_p_where_plugins_are_not_loaded_automatically(session: Callable[..., Session]) -> None:
    options = ["-s", "-p", "pytest_trio_aiopoll", "--trio-io-manager=aiopoll"]
    for environment in ({}, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}):
        result = session(SHOW_BACKEND, *options, environment=environment)
        assert "backend: aiopoll\n" in result.output, result.output


def test_who_does_not_ask_for_it_does_not_load_trio(session: Callable[..., Session]) -> None:
    files = {
        "test_it.py": """
            import sys

            def test_it(pytestconfig):
                assert pytestconfig.pluginmanager.has_plugin("pytest_trio_aiopoll")
                for name in sys.modules:
                    assert name.partition(".")[0] not in ("trio", "trio_aiopoll", "cffi", "anyio")
        """
    }
    result = session(files, "-p", "no:trio", "-p", "no:anyio")
    assert result.outcomes == {"test_it": "passed"}, result.output


def test_no_warning_where_the_package_is_imported_before_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass")
    program = (
        "import pytest, sys, trio_aiopoll; sys.exit(pytest.main(['-W', 'error::pytest.PytestAssertRewriteWarning']))"
    )
    child = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "1 passed" in child.stdout
