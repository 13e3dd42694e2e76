#!/usr/bin/env python3
"""Runs the quick tests on every supported CPython that this machine has, with the oldest, some and the newest Trio.

All of them install one and the same abi3 wheel; a free-threaded CPython gets a wheel of its own. A CPython that is not
here is named in the output, and is no failure. Needs pip 24.1 or later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
PYPROJECT: Final = (ROOT / "pyproject.toml").read_text()
PYTHONS: Final[list[str]] = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
DEPENDENCIES: Final[str] = re.findall(r"^dependencies = .*", PYPROJECT, re.MULTILINE)[0]
FLOORS: Final[dict[str, str]] = dict(re.findall(r"\"(\w+)>=([\d.]+)\"", DEPENDENCIES))
FREE_THREADED: Final = ["3.14t"]
# by its Python; Trio before 0.25 cannot be imported on CPython 3.13
OLDEST: Final = {**dict.fromkeys(PYTHONS, FLOORS["trio"]), "3.13": "0.25"}
# another one on each Python; 0.28 is the first that has fast sockets
BETWEEN: Final = dict(zip(PYTHONS, ("0.24", "0.28", "0.30", "0.33"), strict=True))
NEWEST: Final = ""

AT_ONCE: Final = 2
SECONDS: Final = 240

WHO_ARE_YOU: Final = """
import sys, sysconfig
print("{}.{}".format(*sys.version_info), "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")), sep="", end="")
"""


class Cell(NamedTuple):
    python: str
    """The interpreter's path."""
    trio: str
    """The version of Trio, or the empty string for the newest."""
    cffi: str
    """What is asked of pip."""
    free_threaded: bool = False


def find_python(version: str) -> str | None:
    beside = sorted(Path.home().glob(f".pyenv/versions/{version.rstrip('t')}.*/bin/python{version}"), reverse=True)
    # pyenv puts programs on PATH that only say that they are not there
    for candidate in (shutil.which(f"python{version}"), *map(str, beside)):
        if candidate is not None:
            answer = subprocess.run([candidate, "-c", WHO_ARE_YOU], capture_output=True, text=True)
            if answer.stdout == version:
                return candidate
    return None


def run(log: Path, *command: str | Path, **environment: str) -> None:
    with log.open("a") as file:
        subprocess.run(
            command, env={**os.environ, **environment}, stdout=file, stderr=file, check=True, timeout=SECONDS
        )


def build(python: str, directory: Path) -> Path:
    # pip has an interpreter to itself only in an environment
    subprocess.run([python, "-m", "venv", "--without-pip", directory], check=True)
    pip = (sys.executable, "-m", "pip", "--python", directory)
    subprocess.run((*pip, "wheel", "-q", "--no-deps", "-w", directory, ROOT), check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def test(cell: Cell, abi3: Path, directory: Path) -> tuple[bool, str]:
    """Whether the cell passed, and what there is to say of it."""
    start = time.monotonic()
    log = directory.with_suffix(".log")
    log.touch()
    venv = directory / "venv"
    trio = f"trio=={cell.trio}" if cell.trio else "trio"
    names = "import sys, trio; print(sys.version.split()[0], trio.__version__)"
    name = f"{cell.python}, {trio}"
    environment = {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    try:
        wheel = abi3
        if cell.free_threaded:
            environment["PYTHON_GIL"] = "1"  # without its GIL it is refused; see tests/test_free_threading.py
            wheel = build(cell.python, directory / "build")
        run(log, cell.python, "-m", "venv", "--without-pip", venv)
        run(log, sys.executable, "-m", "pip", "--python", venv, "install", "-q", wheel, "pytest", trio, cell.cffi)
        output = subprocess.check_output([venv / "bin" / "python", "-W", "ignore", "-c", names], text=True)
        name = "CPython {}, Trio {}".format(*output.split())
        run(log, ROOT / ".ci" / "quick", **environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return False, f"{name}: FAILED: {error}\n{log.read_text(errors='replace')[-20_000:]}"
    outcome = log.read_text().splitlines()[-1]
    return True, f"{name}, {cell.cffi}, {wheel.name}: {outcome}, {time.monotonic() - start:.0f} s in all"


def main() -> int:
    cells = []
    for version in [*PYTHONS, *FREE_THREADED]:
        python = find_python(version)
        if python is None:
            print(f"SKIPPED: CPython {version} is neither on PATH nor in ~/.pyenv/versions", flush=True)
        elif version in FREE_THREADED:
            cells.append(Cell(python, NEWEST, "cffi", free_threaded=True))
        else:
            cells.append(Cell(python, OLDEST[version], f"cffi=={FLOORS['cffi']}"))
            cells += [Cell(python, trio, "cffi") for trio in (BETWEEN[version], NEWEST)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as threads:
        work = Path(name)
        abi3 = build(sys.executable, work / "abi3")
        failed = 0
        for passed, report in threads.map(lambda i: test(cells[i], abi3, work / str(i)), range(len(cells))):
            print(report, flush=True)
            failed += not passed
    return 1 if failed or not cells else 0


if __name__ == "__main__":
    sys.exit(main())
