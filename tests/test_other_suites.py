"""The test suites of what stands on Trio pass on aiopoll as they do on epoll.

Each project's suite is taken from its source distribution on PyPI, of the version that is installed, and runs in a
process of its own with every Trio run on aiopoll. What does not pass there has the same outcome on epoll.
``pytest tests/test_other_suites.py -k anyio`` runs one of them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

TIMEOUT = 400  # seconds: what takes longer hangs
CONFIRMATIONS = 10


@dataclass
class Suite:
    """How to run it.

    Attributes:
      options: of pytest.
      requires: what is installed for it alone, since we would not want these plugins in our own tests.
      passed: at least so many pass; not to keep up to date, but against a session that collects next to nothing.
      autoload: whether it wants all plugins that are installed.
    """

    options: tuple[str, ...]
    requires: tuple[str, ...]
    passed: int
    autoload: bool = False


SUITES = {
    "anyio": Suite(
        # its asyncio half has nothing to do with Trio
        options=("-k", "not asyncio"),
        requires=("blockbuster", "forbiddenfruit", "psutil", "pytest-mock", "pytest-timeout", "truststore"),
        passed=1000,
    ),
    "hypercorn": Suite(
        options=("-p", "trio", "-p", "asyncio", "-o", "addopts=", "--ignore=tests/asyncio"),
        requires=("pytest-asyncio", "mock"),
        passed=100,
    ),
    "pytest-trio": Suite(
        # one of its files wants a Trio of 2022; the conftest.py, which may not stand there, only names the plugin
        options=("-p", "pytester", "--noconftest", "--ignore=pytest_trio/_tests/test_hypothesis_interaction.py"),
        requires=(),
        passed=30,
        autoload=True,  # in the sessions that its tests run
    ),
    "quart-trio": Suite(options=("-o", "addopts=", "-o", "asyncio_mode=strict", "-p", "trio"), requires=(), passed=10),
    "trio-websocket": Suite(options=("-p", "trio", "-o", "trio_mode=true"), requires=(), passed=50),
}

# A pytest plugin for the child: what became of each test, and on what Trio ran.
WATCH = """
import functools, json, os
from collections import Counter

import pytest

outcomes, runs, polls = {}, Counter(), Counter()


def watch(cls):
    close = cls.close

    @functools.wraps(close)
    def watched(self):
        if type(self) is cls:
            statistics = self.statistics()
            runs[statistics.backend] += 1
            polls[statistics.backend] += getattr(statistics, "polls_submitted", 0)
        close(self)

    cls.close = watched


def pytest_sessionstart():
    from trio._core._io_epoll import EpollIOManager
    from trio_aiopoll import AiopollIOManager

    watch(EpollIOManager)
    watch(AiopollIOManager)


def pytest_runtest_logreport(report):
    if report.nodeid not in outcomes or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        outcomes[report.nodeid] = [report.outcome, crash.message if crash else str(report.longrepr or "")]


def pytest_sessionfinish():
    with open(os.environ["WATCH_REPORT"], "w") as file:
        json.dump({"outcomes": outcomes, "runs": runs, "polls": polls}, file)
"""

# Some of anyio's tests want localhost to be both of these, which is not so in every container.
HOSTS = "127.0.0.1 localhost\n::1 localhost\n"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.fixture
def tests_of(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The tests of the project that the test is about, as it ships them, with what they need beside them."""
    name = request.getfixturevalue("project")
    pip("download", "--no-deps", f"--no-binary={name}", "-d", tmp_path, f"{name}=={importlib.metadata.version(name)}")
    (archive,) = tmp_path.glob("*.tar.gz")
    root = tmp_path / "suite"
    root.mkdir()
    # without the sources: it is the installed package that is tested
    wanted = ["*/*tests/*", "*/pyproject.toml"]
    command = ["tar", "-xzf", archive, "-C", root, "--strip-components=1", "--wildcards", *wanted]
    subprocess.run(command, timeout=TIMEOUT, check=True)
    if SUITES[name].requires:
        pip("install", "--no-deps", "--target", tmp_path / "plugins", *SUITES[name].requires)
    (tmp_path / "plugins").mkdir(exist_ok=True)
    (tmp_path / "plugins" / "watch.py").write_text(WATCH)
    (tmp_path / "hosts").write_text(HOSTS)
    return tmp_path


def run_suite(project: str, folder: Path, io_manager: str, tests: Iterable[str] = ()) -> dict[str, Any]:
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "plugins"),
        "WATCH_REPORT": str(report),
    }
    if not SUITES[project].autoload:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "watch"]
    command += ["-p", "pytest_trio_aiopoll", f"--trio-io-manager={io_manager}", *SUITES[project].options, *tests]
    child = subprocess.run(
        [*with_hosts(folder / "hosts"), *command],
        cwd=folder / "suite",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert child.returncode in (0, 1), child.stdout[-10000:]
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def with_hosts(hosts: Path) -> list[str]:
    """The start of a command that runs the rest where /etc/hosts is that file, if we may."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode != 0:
        return []
    return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]


def differences(on_aiopoll: Mapping[str, list[str]], on_epoll: Mapping[str, list[str]]) -> dict[str, str]:
    return {
        test: f"{outcome} on aiopoll, {on_epoll[test][0]} on epoll: {message}"
        for test, (outcome, message) in on_aiopoll.items()
        if test in on_epoll and outcome not in ("passed", on_epoll[test][0])
    }


def confirmed(project: str, folder: Path, suspects: Iterable[str]) -> set[str]:
    """Some tests are races against time. The others go on to come out differently, or hang."""
    seen: dict[str, set[tuple[str, str]]] = {"aiopoll": set(), "epoll": set()}
    for _ in range(CONFIRMATIONS):
        for io_manager, outcomes in seen.items():
            result = run_suite(project, folder, io_manager, suspects)
            outcomes |= {(test, outcome) for test, (outcome, _) in result["outcomes"].items()}
    return {test for test, outcome in seen["aiopoll"] - seen["epoll"] if outcome != "passed"}


@pytest.mark.parametrize("project", SUITES)
def test_suite_has_the_same_outcome_on_aiopoll_as_on_epoll(project: str, tests_of: Path) -> None:
    on_aiopoll = run_suite(project, tests_of, "aiopoll")
    assert set(on_aiopoll["runs"]) == {"aiopoll"}
    assert on_aiopoll["polls"]["aiopoll"] > on_aiopoll["runs"]["aiopoll"]  # each run has one for itself
    outcomes: dict[str, list[str]] = on_aiopoll["outcomes"]
    others = {test: outcome for test, outcome in outcomes.items() if outcome[0] != "passed"}
    assert len(outcomes) - len(others) >= SUITES[project].passed
    if not others:
        return
    on_epoll = run_suite(project, tests_of, "epoll", others)
    assert "aiopoll" not in on_epoll["runs"]
    assert set(on_epoll["outcomes"]) >= set(others)
    suspects = differences(others, on_epoll["outcomes"])
    if suspects:
        assert not confirmed(project, tests_of, suspects), "\n".join(suspects.values())
        for test, text in suspects.items():
            warnings.warn(f"{test} once {text}, and in {CONFIRMATIONS} more runs the same on both", stacklevel=1)
