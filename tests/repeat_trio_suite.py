"""Trio's own tests, again and again, on aiopoll and on epoll in turn: which of them fail now and then, and on which?

    python tests/repeat_trio_suite.py --times 20
    python tests/repeat_trio_suite.py --times 20 --seconds 200 --report report.json    # as many as fit, and later more

(or ``python -m tests.repeat_trio_suite`` with the same options; ``--slow`` takes Trio's slow tests, too.)

Ends with a line a test that has failed, and how often on either. Status 1: one has failed on aiopoll that has never
failed on epoll, other than the one that asserts the backend's name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Final

MANAGERS: Final = ("aiopoll", "epoll")
EXPECTED: Final = {"test_io_manager_statistics"}  # asserts that the backend's name is one of Trio's own
PATIENCE: Final = 1800  # seconds


def run_suite(manager: str, slow: bool, tests: list[str]) -> tuple[int, list[str]]:
    """How many tests have run, and which have failed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:trio", "-p", "no:cacheprovider"]
        command += ["-p", "trio._tests.pytest_plugin", f"--junit-xml={report}"]
        command += ["-p", "pytest_trio_aiopoll", f"--trio-io-manager={manager}"]
        command += ["--run-slow"] if slow else []
        # some of the tests start what is installed beside this Python, by name
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        child = subprocess.run(
            [*command, "--pyargs", *tests],
            cwd=directory,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if child.returncode not in (0, 1):
            raise RuntimeError(child.stdout[-5000:])
        cases = list(ET.parse(report).getroot().iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases) - skipped, [f"{case.get('classname')}::{case.get('name')}" for case in bad]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often on each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none that might end later")
    parser.add_argument("--report", type=Path, help="where the counts are kept from one call to the next")
    parser.add_argument("--slow", action="store_true", help="also Trio's slow tests")
    suite = ["trio._core._tests", "trio._tests"]
    parser.add_argument("--tests", nargs="+", default=suite, help="which packages or modules (default: all)")
    options = parser.parse_args()
    if options.report is not None and options.report.exists():
        kept = json.loads(options.report.read_text())
    else:
        kept = {manager: {"times": 0, "tests": 0, "failed": {}} for manager in MANAGERS}

    began, longest = time.monotonic(), 0.0
    while True:
        manager = min(MANAGERS, key=lambda manager: kept[manager]["times"])
        start = time.monotonic()
        if kept[manager]["times"] >= options.times or start - began + longest > options.seconds:
            break
        tests, failed = run_suite(manager, options.slow, options.tests)
        kept[manager]["times"] += 1
        kept[manager]["tests"] += tests
        kept[manager]["failed"] = Counter(kept[manager]["failed"]) + Counter(failed)
        longest = max(longest, time.monotonic() - start)
        failures = ", ".join(failed) or "none"
        print(f"{manager} {kept[manager]['times']}: {tests} tests run, failed: {failures}", flush=True)
        if options.report is not None:
            options.report.write_text(json.dumps(kept))

    for manager in MANAGERS:
        print(f"{manager}: {kept[manager]['times']} times, {kept[manager]['tests']} tests run")
    of_ours, of_stock = (kept[manager]["failed"] for manager in MANAGERS)
    for name in sorted({*of_ours, *of_stock}):
        print(f"  {name}: failed {of_ours.get(name, 0)} times on aiopoll, {of_stock.get(name, 0)} on epoll")
    ours_alone = [name for name in of_ours if name not in of_stock and name.rpartition("::")[2] not in EXPECTED]
    print(f"{len(ours_alone)} flakes that epoll does not have")
    return 1 if ours_alone else 0


if __name__ == "__main__":
    sys.exit(main())
