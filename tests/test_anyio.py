"""anyio runs on aiopoll: as its Trio backend with an option, and as a backend "aiopoll" of its own; in programs, in
blocking portals and in tests. Who does not use anyio does not load it.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio
import trio
import trio.testing

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

TIMEOUT = 60  # seconds: what takes longer hangs

WAYS: dict[str, dict[str, Any]] = {
    "option of the Trio backend": {"backend": "trio", "backend_options": {"io_manager": "aiopoll"}},
    "backend of its own": {"backend": "aiopoll"},
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def io_backend() -> str:
    name: str = trio.lowlevel.current_statistics().io_statistics.backend
    return name


def run(function: Callable[..., Awaitable[object]], *args: object, **way: Any) -> object:
    async def main() -> object:
        with anyio.fail_after(TIMEOUT):
            return await function(*args)

    return anyio.run(main, **way)


def in_child(program: str) -> Any:
    """What a program of its own, in a fresh process, prints as JSON."""
    child = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_import_does_not_load_anyio_but_makes_the_backend_known() -> None:
    assert in_child(
        """
        import json, sys
        import trio_aiopoll
        before = [name for name in sys.modules if name.partition(".")[0] == "anyio"]

        import anyio, trio
        async def main():
            return trio.lowlevel.current_statistics().io_statistics.backend
        print(json.dumps([before, anyio.run(main, backend="aiopoll")]))
        """
    ) == [["anyio._backends._aiopoll"], "aiopoll"]


def test_backend_is_known_to_an_anyio_that_was_imported_and_used_before() -> None:
    assert in_child(
        """
        import json
        import anyio
        async def nothing(): ...
        anyio.run(nothing, backend="trio")
        try:
            anyio.run(nothing, backend="aiopoll")
        except LookupError as error:
            before = str(error)

        import trio_aiopoll, trio
        async def main():
            return trio.lowlevel.current_statistics().io_statistics.backend
        print(json.dumps([before, anyio.run(main, backend="aiopoll"), anyio.run(main, backend="trio")]))
        """
    ) == ["No such backend: aiopoll", "aiopoll", "epoll"]


def test_run_is_on_aiopoll_and_is_trio_for_everybody_who_asks(way: dict[str, Any]) -> None:
    async def main(*args: str) -> tuple[object, ...]:
        return (*args, io_backend(), sniffio.current_async_library(), anyio.get_cancelled_exc_class())

    assert anyio.run(main, "a", "b", **way) == ("a", "b", "aiopoll", "trio", trio.Cancelled)
    with pytest.raises(sniffio.AsyncLibraryNotFoundError):
        sniffio.current_async_library()


def test_without_a_choice_anyio_runs_trio_on_its_own_manager(way: dict[str, Any]) -> None:
    async def main() -> str:
        return io_backend()

    assert anyio.run(main, **way) == "aiopoll"
    assert anyio.run(main, backend="trio") == "epoll"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("epoll", "epoll"), ("auto", "aiopoll"), (None, "epoll"), (trio_aiopoll.AiopollIOManager, "aiopoll")],
)
@pytest.mark.parametrize("backend", ["trio", "aiopoll"])
def test_option_has_the_last_word(backend: str, choice: Any, expected: str) -> None:
    async def main() -> str:
        return io_backend()

    assert anyio.run(main, backend=backend, backend_options={"io_manager": choice}) == expected


def test_other_options_reach_trio(way: dict[str, Any]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    options = {**way.get("backend_options", {}), "clock": clock}

    async def main() -> float:
        await anyio.sleep(1000)
        return anyio.current_time()

    # starts anywhere, stands still, and jumps
    start = clock.current_time()
    assert anyio.run(main, backend=way["backend"], backend_options=options) == start + 1000


@pytest.mark.parametrize("backend", ["trio", "aiopoll"])
def test_unknown_manager_is_a_value_error(backend: str) -> None:
    with pytest.raises(ValueError, match="'uring' is not known"):
        anyio.run(anyio.sleep, 0, backend=backend, backend_options={"io_manager": "uring"})


def test_exception_and_result_pass_through(way: dict[str, Any]) -> None:
    error = KeyError("no result")

    async def failing() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        anyio.run(failing, **way)
    assert raised.value is error


def test_tcp_echo_returns_every_byte_to_many_clients(way: dict[str, Any]) -> None:
    clients, size = 20, 300_000

    async def echo(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    async def client(number: int, port: int) -> None:
        request = bytes([number]) * size
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:

            async def send() -> None:
                await stream.send(request)
                await stream.send_eof()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                answer = b"".join([data async for data in stream])
        assert answer == request

    async def main() -> str:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            async with anyio.create_task_group() as server:
                server.start_soon(listener.serve, echo)
                async with anyio.create_task_group() as tasks:
                    for number in range(clients):
                        tasks.start_soon(client, number, port)
                server.cancel_scope.cancel()
        statistics = trio.lowlevel.current_statistics().io_statistics
        assert statistics.polls_submitted + statistics.transfers > clients
        return io_backend()

    assert run(main, **way) == "aiopoll"


def test_peer_that_vanishes_and_wait_that_is_cancelled_are_what_they_are_with_trio(way: dict[str, Any]) -> None:
    async def main() -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            client = await anyio.connect_tcp("127.0.0.1", port)
            server = await listener.listeners[0].accept()
        async with server, client:
            for _ in range(50):
                with anyio.move_on_after(0.0001) as scope:
                    await server.receive()
                assert scope.cancelled_caught
                await client.send(b"not lost")
                assert await server.receive() == b"not lost"

            async def wait() -> None:
                with pytest.raises(anyio.BrokenResourceError):
                    await server.receive()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                raw = client.extra(anyio.abc.SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await anyio.aclose_forcefully(client)
            with pytest.raises(anyio.BrokenResourceError):  # noqa: PT012
                while True:
                    await server.send(b"x")

    run(main, **way)


def test_waiting_for_a_socket_is_waiting_on_aiopoll(way: dict[str, Any]) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.wait_readable, left)
                await anyio.wait_all_tasks_blocked()
                assert trio.lowlevel.current_statistics().io_statistics.tasks_waiting_read >= 1
                right.send(b"x")
            await anyio.wait_writable(left)

            async def closed() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await anyio.wait_readable(right)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(closed)
                await anyio.wait_all_tasks_blocked()
                anyio.notify_closing(right)

    run(main, **way)


def test_threads_and_back(way: dict[str, Any]) -> None:
    async def back() -> str:
        await anyio.lowlevel.checkpoint()
        return io_backend()

    def work() -> tuple[str, str]:
        with pytest.raises(sniffio.AsyncLibraryNotFoundError):
            sniffio.current_async_library()
        return anyio.from_thread.run(back), anyio.from_thread.run_sync(io_backend)

    async def main() -> list[object]:
        results: list[object] = []

        async def one() -> None:
            results.append(await anyio.to_thread.run_sync(work))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(one)
        return results

    assert run(main, **way) == 10 * [("aiopoll", "aiopoll")]


def test_blocking_portal_runs_on_aiopoll(way: dict[str, Any]) -> None:
    async def main() -> str:
        await anyio.lowlevel.checkpoint()
        return io_backend()

    with anyio.from_thread.start_blocking_portal(**way) as portal:
        assert portal.call(main) == "aiopoll"
        assert portal.start_task_soon(main).result(TIMEOUT) == "aiopoll"


def test_subprocess_output_comes_through(way: dict[str, Any]) -> None:
    async def main() -> bytes:
        result = await anyio.run_process([sys.executable, "-c", "print(input()[::-1])"], input=b"lloponaio\n")
        return result.stdout

    assert run(main, **way) == b"oianopoll\n"


TESTS = """
import anyio, pytest, trio
import trio_aiopoll

@pytest.fixture(params=[
    pytest.param(("trio", {"io_manager": "aiopoll"}), id="option"),
    pytest.param("aiopoll", id="backend"),
    pytest.param(("aiopoll", {"io_manager": "epoll"}), id="backend-epoll"),
    pytest.param("trio", id="stock"),
])
def anyio_backend(request):
    return request.param

@pytest.fixture
def expected(anyio_backend):
    return "epoll" if anyio_backend == "trio" or "epoll" in str(anyio_backend) else "aiopoll"

def backend():
    return trio.lowlevel.current_statistics().io_statistics.backend

@pytest.fixture
async def echo_port(expected):
    async def echo(stream):
        async with stream:
            async for data in stream:
                await stream.send(data)
    assert backend() == expected
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, echo)
            yield listener.extra(anyio.abc.SocketAttribute.local_port)
            tasks.cancel_scope.cancel()

@pytest.mark.anyio
async def test_echo(echo_port, expected):
    assert backend() == expected
    with anyio.fail_after(30):
        async with await anyio.connect_tcp("127.0.0.1", echo_port) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"

@pytest.mark.anyio
async def test_failure(anyio_backend):
    with anyio.fail_after(30):
        await anyio.sleep(0)
    assert backend() == "this fails, and is reported as a failure"
"""


def test_pytest_plugin_of_anyio_runs_tests_and_fixtures_on_aiopoll(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    child = subprocess.run(
        # without pytest-trio, which would take the tests for its own
        [sys.executable, "-I", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:trio", "-rA", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    outcomes = {
        tuple(line.split()[:2]) for line in child.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERR"))
    }
    ways = ("option", "backend", "backend-epoll", "stock")
    assert outcomes == {
        *(("PASSED", f"test_it.py::test_echo[{way}]") for way in ways),
        *(("FAILED", f"test_it.py::test_failure[{way}]") for way in ways),
    }, child.stdout + child.stderr
