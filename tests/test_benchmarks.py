"""The benchmarks' load generator is no witness to a server that answers wrongly."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = "closed 0.05\n" * 2


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = str(tmp_path_factory.mktemp("load") / "load")
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-std=c11", "-o", target, ROOT / "benchmarks" / "load.c", "-lm"],
        check=True,
    )
    return target


@pytest.fixture
def serving() -> Iterator[Callable[[Callable[[bytes, int], bytes]], int]]:
    """Starts a server whose answer to the bytes it gets, of which so many came before, is made by a function."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(answer: Callable[[bytes, int], bytes]) -> None:
        client, _ = listener.accept()
        before = 0
        with client:
            while data := client.recv(65536):
                client.sendall(answer(data, before))
                before += len(data)

    def start(answer: Callable[[bytes, int], bytes]) -> int:
        threads.append(threading.Thread(target=serve, args=[answer]))
        threads[-1].start()
        port: int = listener.getsockname()[1]
        return port

    yield start
    for thread in threads:
        thread.join(10)
    listener.close()
    assert not any(thread.is_alive() for thread in threads)


def drive(load: str, port: int, *shape: int) -> subprocess.CompletedProcess[str]:
    words = [load, str(port), "1", "1", *map(str, shape)]
    return subprocess.run(words, input=ROUNDS, capture_output=True, text=True, timeout=30)


def spoiling(spoil: Callable[[bytes], bytes]) -> Callable[[bytes, int], bytes]:
    """An echo that is spoilt a hundred times 64 bytes after the start."""
    return lambda data, before: spoil(data) if before <= 6400 < before + len(data) else data


def test_an_echo_is_counted(load: str, serving: Callable[..., int]) -> None:
    result = drive(load, serving(lambda data, before: data), 64)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('"completed"') == 2


def test_an_answer_of_another_size_is_counted(load: str, serving: Callable[..., int]) -> None:
    def answer(data: bytes, before: int) -> bytes:
        return bytes((before + len(data)) // 4096 - before // 4096)

    result = drive(load, serving(answer), 4096, 1, 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('"completed"') == 2


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[:-1] + b"\xff", id="wrong"),
        pytest.param(lambda data: data[:1] + data, id="doubled"),
        pytest.param(lambda data: data[1:] + data[:1], id="out of order"),
        pytest.param(lambda data: data[1:], id="lost"),
    ],
)
def test_a_spoilt_byte_is_an_error(load: str, serving: Callable[..., int], spoil: Callable[[bytes], bytes]) -> None:
    result = drive(load, serving(spoiling(spoil)), 64)
    assert result.returncode == 1
    assert result.stderr == "load: an answer is wrong\n"


def test_each_benchmark_can_be_loaded_and_has_cases() -> None:
    command = [sys.executable, "-m", "benchmarks", "--list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert {line.split()[0] for line in listed.splitlines()} == modules
    assert "(0 cases)" not in listed
