"""A stranger can build the package from its sdist, and what is built holds what it must, and works where it says."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT: Final = Path(__file__).resolve().parent.parent
NOT_SOURCES: Final = shutil.ignore_patterns(
    "__pycache__", "build", "_build", "dist", "*.egg-info", "*.so", "*.o", "_ring_ffi.c", ".[!c]*", ".c[!i]*"
)
FREE_THREADED: Final = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
TAG: Final = "cp{0}{1}-cp{0}{1}t".format(*sys.version_info) if FREE_THREADED else "cp310-abi3"


def run(*command: str | Path, **options: object) -> str:
    """What the command says, on either stream."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **options
    )  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout[-10_000:]}"
    return result.stdout


def sources(root: Path) -> Iterator[str]:
    return (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources alone; a build writes into it."""
    return Path(shutil.copytree(CHECKOUT, tmp_path_factory.mktemp("checkout") / "copy", ignore=NOT_SOURCES))


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    sources: frozenset[str]


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel built from it in an environment of its own, which has what pyproject.toml requires."""
    directory = tmp_path_factory.mktemp("dist")
    before = frozenset(sources(checkout))
    run(sys.executable, "-m", "build", "--outdir", directory, checkout)
    (sdist,) = directory.glob("*.tar.gz")
    (wheel,) = directory.glob("*.whl")
    return Built(sdist, wheel, before)


def test_the_sdist_holds_every_file_of_the_sources(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert built.sources - held == set()
    # it adds what setuptools writes, and no build's leftovers
    assert {name for name in held - built.sources if ".egg-info/" not in name} <= {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_modules_and_no_c_sources(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        held = set(archive.namelist())
    information = {name for name in held if name.partition("/")[0].endswith(".dist-info")}
    extensions = {name for name in held if re.fullmatch(r"trio_aiopoll/(_batch|_ring_ffi)\.[^/]*\bso", name)}
    module = re.compile(r"trio_aiopoll/(.*\.pyi?|py\.typed)|(?!setup)\w+\.py")
    modules = {name for name in built.sources if module.fullmatch(name)}
    assert len(extensions) == 2
    assert held - information - extensions == modules
    names = {re.sub(r"^[^/]*/", "", name) for name in information}
    assert {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"} <= names
    assert names <= {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE", "entry_points.txt", "top_level.txt"}


def test_one_wheel_is_for_every_cpython_and_a_free_threaded_one_has_its_own(built: Built) -> None:
    assert f"-{TAG}-linux_{platform.machine()}" in built.wheel.name
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = Parser().parsestr(archive.read(metadata).decode(), headersonly=True)
    assert headers["Requires-Python"] == ">=3.10"
    assert headers["License-Expression"] == "MIT OR Apache-2.0"


@pytest.mark.skipif(FREE_THREADED, reason="a free-threaded CPython has no stable ABI")
def test_the_wheel_keeps_to_the_stable_abi(built: Built) -> None:
    report = run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", built.wheel)
    assert "2 extensions scanned; 0 ABI version mismatches and 0 ABI violations found" in " ".join(report.split())


def test_the_wheel_needs_nothing_but_the_c_library(built: Built) -> None:
    report = run(sys.executable, "-m", "auditwheel", "show", built.wheel)
    # the C library's version is that of this machine; cibuildwheel builds with older ones
    assert re.search(rf'platform tag:\s+"(many|musl)linux_\d+_\d+_{platform.machine()}"', report), report
    with zipfile.ZipFile(built.wheel) as archive:
        extensions = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    assert extensions
    for extension in extensions:
        dynamic = ELFFile(io.BytesIO(extension)).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        assert needed
        assert needed <= {"libc.so.6", "libpthread.so.0", f"libc.musl-{platform.machine()}.so.1"}


@pytest.mark.parametrize("compiler", [None, "false"])
def test_a_build_without_a_working_compiler_says_what_to_install(
    compiler: str | None, checkout: Path, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "LDSHARED", "PATH")}
    environment["PATH"] = str(programs)
    problem = "there is no C compiler: '.*' was not found on PATH"
    if compiler is not None:
        (programs / "broken-cc").symlink_to(shutil.which("false") or "/bin/false")
        environment["CC"] = "broken-cc"
        problem = "the C compiler failed; its own message stands above"
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert re.search(f"trio_aiopoll could not be built, because {problem}", result.stdout), result.stdout
    assert "apt-get install gcc libc6-dev python3-dev" in result.stdout


def test_the_c_core_compiles_without_a_warning_for_aarch64(tmp_path: Path) -> None:
    headers = Path("/usr/aarch64-linux-gnu/include")
    if shutil.which("clang") is None or not headers.is_dir():
        pytest.fail("this test needs: apt-get install clang libc6-dev-arm64-cross (Debian)")
    # Debian's pyconfig.h looks for that of the processor; ours will do, as both have the same sizes
    configuration = tmp_path / "aarch64-linux-gnu" / "python{}.{}".format(*sys.version_info) / "pyconfig.h"
    configuration.parent.mkdir(parents=True)
    shutil.copyfile(sysconfig.get_config_h_filename(), configuration)
    includes = (headers, tmp_path, sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    compiler = ("clang", "--target=aarch64-linux-gnu", *(f"-isystem{path}" for path in includes))
    warnings = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread")
    for source in set((CHECKOUT / "trio_aiopoll").glob("_*.c")) - {CHECKOUT / "trio_aiopoll" / "_ring_ffi.c"}:
        run(*compiler, *warnings, "-c", source, "-o", tmp_path / "object.o")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cibuildwheel runs on CPython 3.11 and later")
def test_cibuildwheel_builds_for_both_processors_and_both_c_libraries() -> None:
    command = ("cibuildwheel", "--platform", "linux", "--archs", "all", "--print-build-identifiers", CHECKOUT)
    identifiers = run(sys.executable, "-m", *command).split()
    platforms = {f"{libc}linux_{cpu}" for libc in ("many", "musl") for cpu in ("x86_64", "aarch64")}
    # the abi3 wheel, and one for a free-threaded CPython
    assert {f"{cpython}-{name}" for cpython in ("cp310", "cp314t") for name in platforms} <= set(identifiers)
    assert {identifier.partition("-")[2] for identifier in identifiers} == platforms
    assert not {identifier for identifier in identifiers if identifier.startswith(("pp", "gp", "cp39", "cp313t"))}


def test_sources_that_are_not_built_say_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "trio_aiopoll"
    shutil.copytree(CHECKOUT / "trio_aiopoll", package, ignore=shutil.ignore_patterns("*.so"))
    program = subprocess.run(
        [sys.executable, "-c", "import trio_aiopoll"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert program.returncode == 1
    last_line = program.stderr.splitlines()[-1]
    assert last_line.startswith(f"ImportError: the C core of trio_aiopoll is not built in {package}; ")
    assert "pip install -e ." in last_line
