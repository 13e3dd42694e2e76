"""The C core keeps its promises by itself: against the real kernel, against one that fails, and between threads.

The tests proper are the programs in ``tests/c``, built here from the sources of the checkout: as they are, also with
musl for a C library, under AddressSanitizer with UndefinedBehaviorSanitizer, and, for what may happen on two threads at
once, under ThreadSanitizer.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).resolve().parent / "c"
CORE: Final = HERE.parent.parent / "trio_aiopoll"
CORE_FILES: Final = ("_ring.c", "_pool.c", "_polls.c", "_transfer.c")
WARNINGS: Final = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread")

MODES: Final = {
    "plain": ("gcc", "-O2"),
    "asan-ubsan": ("clang", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # the C library of the musllinux wheels
    "musl": ("musl-gcc", "-O2"),
    "tsan": ("clang", "-O1", "-g", "-fsanitize=thread"),
}
# where two threads are at work is where ThreadSanitizer has something to see
PROGRAMS: Final = {
    "test_core.c": ("plain", "asan-ubsan", "musl"),
    "test_faults.c": ("plain", "asan-ubsan", "musl"),
    "test_transfer.c": ("plain", "asan-ubsan", "musl"),
    "test_threads.c": ("plain", "asan-ubsan", "musl", "tsan"),
}


def compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is not installed; the C core is tested with gcc, clang and musl: "
            "apt-get install gcc clang musl-tools libclang-rt-14-dev (Debian; of clang's own version elsewhere)"
        )
    return path


def compile_c(*arguments: str) -> None:
    result = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(arguments)}\n{result.stdout}")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The path of a test program, built when it is first asked for."""

    @functools.cache
    def build(source: str, mode: str) -> Path:
        name, *options = MODES[mode]
        command = [compiler(name), *WARNINGS, *options, f"-I{CORE}"]
        directory = tmp_path_factory.mktemp(f"{Path(source).stem}-{mode}")
        objects = [str((directory / file).with_suffix(".o")) for file in CORE_FILES]
        for file, target in zip(CORE_FILES, objects, strict=True):
            compile_c(*command, "-include", str(HERE / "hooks.h"), "-c", str(CORE / file), "-o", target)
        path = directory / "program"
        compile_c(*command, str(HERE / "harness.c"), str(HERE / source), *objects, "-o", str(path))
        return path

    return build


@functools.cache
def runner() -> tuple[str, ...]:
    """The sanitizers of some versions do not like addresses that are too random; not every container lets us say so."""
    fixed = ("setarch", "-R")
    try:
        return fixed if subprocess.run([*fixed, "true"], stderr=subprocess.DEVNULL).returncode == 0 else ()
    except FileNotFoundError:
        return ()


def all_tests() -> list[tuple[str, str, str]]:
    return [
        (source, mode, name)
        for source, modes in PROGRAMS.items()
        for mode in modes
        for name in re.findall(r"^TEST\((\w+)\)", (HERE / source).read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize(("source", "mode", "name"), all_tests())
def test_core(program: Callable[[str, str], Path], source: str, mode: str, name: str) -> None:
    result = subprocess.run(
        [*runner(), str(program(source, mode)), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=150,
    )
    assert result.returncode == 0, f"{name} ended with {result.returncode}:\n{result.stdout[-10000:]}"


def test_each_program_has_the_tests_that_are_run(program: Callable[[str, str], Path]) -> None:
    for source in PROGRAMS:
        listed = subprocess.run([str(program(source, "plain"))], stdout=subprocess.PIPE, text=True, timeout=60).stdout
        assert sorted(listed.split()) == sorted(test[2] for test in all_tests() if test[:2] == (source, "plain"))


@pytest.mark.parametrize("name", ["gcc", "clang"])
@pytest.mark.parametrize("optimization", ["-O0", "-O2"])
def test_core_compiles_without_a_warning(name: str, optimization: str, tmp_path: Path) -> None:
    for file in CORE_FILES:
        compile_c(
            compiler(name), *WARNINGS, "-Wshadow", "-Wvla", "-Wstrict-prototypes", "-Wmissing-prototypes", optimization,
            "-c", str(CORE / file), "-o", str(tmp_path / "core.o"),
        )  # fmt: skip
