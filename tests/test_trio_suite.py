"""Trio's own shipped tests, the slow ones included, pass on aiopoll as they do on epoll.

They run in a child process, because they are a test session of their own: with Trio's pytest plugin, without
pytest-trio's, and with every Trio run of the process on aiopoll.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

# What differs from epoll, with the reason.
EXPECTED_DIFFERENCES = {
    "test_io_manager_statistics": "asserts that the backend's name is one of Trio's own",
}


def run_suite(tmp_path: Path, *arguments: str) -> dict[str, str]:
    """The outcome of every test, by name."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:trio", "-p", "no:cacheprovider"]
    command += ["-p", "trio._tests.pytest_plugin", "--run-slow", f"--junit-xml={report}"]
    command += ["-p", "pytest_trio_aiopoll", "--trio-io-manager=aiopoll"]
    # some of the tests start what is installed beside this Python, by name
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    child = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert child.returncode in (0, 1), child.stdout[-5000:]
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        problems = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = problems[0] if problems else "passed"
    bad = {name for name, outcome in outcomes.items() if outcome in ("failure", "error")}
    unexpected = {name for name in bad if name.rpartition("::")[2] not in EXPECTED_DIFFERENCES}
    assert not unexpected, child.stdout[-20000:]
    return outcomes


@pytest.mark.parametrize("package", ["trio._core._tests", "trio._tests"])
def test_trio_suite_passes_on_aiopoll(package: str, tmp_path: Path) -> None:
    outcomes = run_suite(tmp_path, "--pyargs", package)
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    # Not a count to keep up to date: it guards against a session that collects next to nothing.
    assert passed > 250
    if package == "trio._core._tests":
        # the expected difference also proves that the runs were on aiopoll
        statistics = [name for name in outcomes if name.endswith("::test_io_manager_statistics")]
        assert [outcomes[name] for name in statistics] == ["failure"]


def test_the_suite_can_be_repeated_on_both(tmp_path: Path) -> None:
    program = Path(__file__).resolve().parent / "repeat_trio_suite.py"
    command = [sys.executable, str(program), "--times", "2", "--report", str(tmp_path / "report.json")]
    child = subprocess.run(
        [*command, "--tests", "trio._core._tests.test_tutil", "trio._core._tests.test_io"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    *_, ours, stock, difference, last = child.stdout.splitlines()
    assert ours.startswith("aiopoll: 2 times, ")
    assert stock.startswith("epoll: 2 times, ")
    assert difference.endswith("test_io_manager_statistics: failed 2 times on aiopoll, 0 on epoll")
    assert last == "0 flakes that epoll does not have"
