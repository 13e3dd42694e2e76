"""A Trio that lacks a private name is refused by that name, whichever it is, and "auto" falls back.
Sockets stay as they are where only what the fast ones need is missing.

That those which have them all work is shown by .ci/versions.py, on each CPython with the oldest and the newest Trio.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import trio_aiopoll

PACKAGE: Final = Path(trio_aiopoll.__file__).resolve().parent
COMPAT: Final = "_trio_compat.py"

# Takes each private name out of Trio in a child, while trio_aiopoll is imported and looks for it, and gives it back to
# Trio, which cannot run without most of them.
TAKE_OUT: Final = '''
import importlib, os, sys, traceback
import trio
import trio._core._io_epoll, trio._core._wakeup_socketpair

# As a program would that has it before us.
run_before = trio.run

async def backend():
    return trio.lowlevel.current_statistics().io_statistics.backend

def take_out(full_name):
    """And return what puts it back."""
    if full_name in sys.modules:
        module, sys.modules[full_name] = sys.modules[full_name], None  # for the import system, that there is none
        return lambda: sys.modules.update({full_name: module})
    holder_name, _, name = full_name.rpartition(".")
    if holder_name in sys.modules:
        holder = sys.modules[holder_name]
    else:
        module_name, _, class_name = holder_name.rpartition(".")
        holder = getattr(sys.modules[module_name], class_name)
    value = vars(holder)[name]
    delattr(holder, name)
    return lambda: setattr(holder, name, value)

async def echo():
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
        nursery.cancel_scope.cancel()
    return await backend()

async def answer(stream):
    async with stream:
        async for data in stream:
            await stream.send_all(data)

def check_sockets(full_name):
    put_back = take_out(full_name)
    import trio_aiopoll
    put_back()
    assert full_name in trio_aiopoll._trio_compat.missing_names_for_sockets
    assert trio.run(echo, io_manager="aiopoll") == "aiopoll"

def check(full_name):
    put_back = take_out(full_name)
    import trio_aiopoll
    put_back()

    assert full_name in trio_aiopoll.probe().reason, trio_aiopoll.probe()
    in_vain = [
        lambda: trio.run(backend, io_manager="aiopoll"),
        lambda: trio.run(backend, io_manager=lambda: trio_aiopoll.AiopollIOManager()),
        trio_aiopoll.install,
    ]
    for refused in in_vain:
        try:
            refused()
        except trio_aiopoll.UnavailableError as error:
            assert full_name in str(error), error
        else:
            raise AssertionError("not refused")
    assert trio.run(backend, io_manager="auto") == "epoll"
    assert trio.run(backend, io_manager="epoll") == "epoll"
    assert trio.run(backend) == "epoll"
    assert run_before(backend) == "epoll"
    os.environ["TRIO_IO_MANAGER"] = "auto"
    assert trio.run(backend) == "epoll"
    trio_aiopoll.uninstall()

check_one = globals()[sys.argv[1]]
for argument in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        try:
            check_one(argument)
        except BaseException:
            print("WITHOUT", argument)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        print("fine without", argument)
'''


def needed_names() -> list[str]:
    """Each private name of Trio, modules included, that aiopoll cannot do without."""
    compat = sys.modules["trio_aiopoll._trio_compat"]
    in_modules = [f"{module}.{name}" for module, names in compat._NEEDED.items() for name in names]
    in_class = [*compat._NEEDED_METHODS, *compat._NEEDED_ATTRIBUTES]
    return [*compat._NEEDED, *in_modules, *(f"trio._core._io_epoll.EpollIOManager.{name}" for name in in_class)]


def needed_names_for_sockets() -> list[str]:
    compat = sys.modules["trio_aiopoll._trio_compat"]
    in_modules = [f"{module}.{name}" for module, names in compat._NEEDED_FOR_SOCKETS.items() for name in names]
    in_classes = [
        f"{module}.{holder}.{name}"
        for module, classes in compat._NEEDED_ATTRIBUTES_FOR_SOCKETS.items()
        for holder, names in classes.items()
        for name in names
    ]
    modules = [module for module in compat._NEEDED_FOR_SOCKETS if module not in compat._NEEDED]
    return [*modules, *in_modules, *in_classes]


def check_without_each(check: str, names: list[str]) -> None:
    assert len(names) > 10
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", TAKE_OUT, check, *names],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.splitlines() == [f"fine without {name}" for name in names], result.stderr


def test_without_any_one_private_name_aiopoll_says_which_and_auto_uses_epoll() -> None:
    check_without_each("check", needed_names())


def test_without_any_one_private_name_that_fast_sockets_need_sockets_stay_as_they_are() -> None:
    check_without_each("check_sockets", needed_names_for_sockets())


def private_names(source: str) -> list[str]:
    """Names inside of Trio, in imports, in expressions and in strings, which importlib may be given."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [name for name in found if re.match(r"trio(\.\w+)*\._(?!_)", name)]


def test_only_one_file_uses_private_names_of_trio() -> None:
    using = {path.name for path in PACKAGE.rglob("*.py") if private_names(path.read_text())}
    assert using == {COMPAT}


def test_the_import_warns_of_nothing() -> None:
    """As a program may have it that turns warnings into errors. Trio may warn of itself; it is imported before."""
    program = "import warnings, trio; warnings.simplefilter('error'); import trio_aiopoll"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/", timeout=60)
