"""``python -m trio_aiopoll``: ``check`` tells the truth of this machine, ``run`` is what Python does, on another I/O
manager, ``bench`` measures and ``top`` sees what is there. The exit codes are as --help says.
"""

from __future__ import annotations

import json
import os
import platform
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

import trio_aiopoll
from trio_aiopoll import _commands
from trio_aiopoll._commands import _terminal, bench, check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT = 60  # seconds: what takes longer hangs
VARIABLES = ("TRIO_IO_MANAGER", "TRIO_AIOPOLL_DEBUG", "TRIO_AIOPOLL_TOP")
COMMAND = (sys.executable, "-m", "trio_aiopoll")

# Makes AIO fail in this process and its children. It needs the names in FILTERS.
FORBID_AIO = """
    import ctypes, struct
    load, jump_if_equal, ret = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 4), (jump_if_equal, 0, 3, ARCH), (load, 0, 0, 0), (jump_if_equal, 0, 1, IO_SETUP),
             (ret, 0, 0, ACTION), (ret, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program) == 0
"""
FILTERS = {"x86_64": {"ARCH": 0xC000003E, "IO_SETUP": 206}, "aarch64": {"ARCH": 0xC00000B7, "IO_SETUP": 0}}
FAIL_WITH_EPERM = 0x00050001
KILL_PROCESS = 0x80000000

BACKEND = """
    import trio

    async def backend():
        return trio.lowlevel.current_statistics().io_statistics.backend
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the tests say is all that is set, and the checkout is not the current directory, where -m would find it."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def do(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return do(*COMMAND, *words, **environment)


def without_aio(action: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command where AIO is forbidden."""
    if platform.machine() not in FILTERS:
        pytest.skip("no numbers of the system calls for here")
    names = {**FILTERS[platform.machine()], "ACTION": action}
    program = "\n".join(f"{name} = {value}" for name, value in names.items())
    program += textwrap.dedent(FORBID_AIO)
    program += f"import sys\nfrom trio_aiopoll._commands import main\nsys.exit(main({list(words)!r}))\n"
    return do(sys.executable, "-c", program)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(textwrap.dedent(text))
    return name


# All commands


@pytest.mark.parametrize("words", [(), ("check",), ("run",), ("bench",), ("top",)])
def test_help_is_there_for_every_command_and_tells_the_exit_codes(words: tuple[str, ...]) -> None:
    result = command(*words, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python -m trio_aiopoll")
    assert not words or "Exit code: " in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("no-such-command",),
        ("check", "more"),
        ("run",),
        ("run", "-m"),
        ("run", "--no-such-option", "x"),
        ("run", "--io-manager"),
        ("run", "--io-manager", "no such name", "x"),
        ("run", "--record-ticks", "/no/such/directory/file", "x"),
        ("bench", "--seconds", "0"),
        ("bench", "--seconds", "x"),
        ("top",),
        ("top", "x"),
        ("top", "1", "--interval", "0"),
        ("top", "1", "--count", "0"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2_and_say_why(words: tuple[str, ...]) -> None:
    result = command(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(r"^python -m trio_aiopoll.*: error: ", result.stderr, re.MULTILINE)


def test_version_is_that_of_the_package() -> None:
    assert command("--version").stdout == f"trio_aiopoll {trio_aiopoll.__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error_worth_a_traceback() -> None:
    with subprocess.Popen(
        [*COMMAND, "check", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, complaints = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, complaints) == (1, "")


def on_terminal(*words: str, **environment: str) -> str:
    """What the command shows on a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", **environment}
    ) as process:
        os.close(slave)
        shown = b""
        while select.select([master], [], [], TIMEOUT)[0]:
            try:
                part = os.read(master, 65536)
            except OSError:  # EIO: nobody has it open any more
                break
            shown += part
        process.wait(TIMEOUT)
    os.close(master)
    return shown.decode()


def test_colours_are_for_terminals_that_want_them() -> None:
    assert "\x1b[" in on_terminal(*COMMAND, "check", NO_COLOR="")
    assert "\x1b[" not in on_terminal(*COMMAND, "check", NO_COLOR="1")
    assert "\x1b[" not in on_terminal(*COMMAND, "check", NO_COLOR="", TERM="dumb")
    assert "\x1b[" not in command("check", NO_COLOR="").stdout


def test_an_encoding_without_blocks_gets_other_characters(tmp_path: Path) -> None:
    with open(tmp_path / "ascii", "w+", encoding="ascii") as file:
        _terminal.Terminal(file).print(f"{_terminal.bar(0.3, 1, 8)} · µ")
        file.seek(0)
        assert file.read() == "##- . ?\n"


@pytest.mark.parametrize(
    ("value", "expected"), [(0, ""), (-1, ""), (1, "████"), (9, "████"), (0.5, "██"), (0.25, "█"), (0.03125, "▏")]
)
def test_a_bar_has_the_length_of_its_value_and_fits(value: float, expected: str) -> None:
    assert _terminal.bar(value, 1, 4) == expected


def test_a_table_is_aligned_whatever_its_colours() -> None:
    rows = [["a", "1", "x"], ["\x1b[1mlonger\x1b[0m", "\x1b[2m22\x1b[0m", ""]]
    assert _terminal.table(rows, "<><") == ["a         1   x", "\x1b[1mlonger\x1b[0m   \x1b[2m22\x1b[0m"]


# check


def test_check_says_that_it_works_here_and_exits_with_0() -> None:
    result = command("check")
    assert (result.returncode, result.stderr) == (0, "")
    assert "aiopoll works here." in result.stdout
    for fact in (platform.release(), trio.__version__, platform.python_version(), trio_aiopoll.__version__):
        assert fact in result.stdout


def test_check_json_is_one_object_with_all_findings() -> None:
    result = command("check", "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["available"], report["reason"]) == (0, True, None)
    assert report["version"] == trio_aiopoll.__version__
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert list(findings) == ["kernel", "AIO polls", "AIO budget", "seccomp", "Python", "Trio", "C core"]
    assert {state for finding in findings.values() for state in [finding["state"]]} <= {"ok", "warning"}
    most = int(Path("/proc/sys/fs/aio-max-nr").read_text())
    used, free, told = (
        int(n.replace(",", "")) for n in re.findall(r"[\d,]+\d|\d", findings["AIO budget"]["value"])[:3]
    )
    assert told == most
    assert used + free == most


def test_check_says_that_it_does_not_work_why_and_what_to_do_and_exits_with_1() -> None:
    result = without_aio(FAIL_WITH_EPERM, "check")
    assert result.returncode == 1
    assert "aiopoll does not work here." in result.stdout
    text = " ".join(result.stdout.split())
    assert "io_setup() failed with EPERM" in text
    assert "allow io_setup, io_submit, io_getevents, io_cancel and io_destroy in it" in text


def test_check_survives_a_filter_that_kills_who_uses_aio() -> None:
    result = without_aio(KILL_PROCESS, "check", "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["available"]) == (1, False)
    assert "is killed by SIGSYS; a seccomp filter does that" in report["reason"]
    (seccomp,) = [finding for finding in report["findings"] if finding["name"] == "seccomp"]
    assert seccomp["state"] == "warning"


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("4.18.0-553.el8", "failed"),
        ("4.19.0", "warning"),
        ("5.15.160", "warning"),
        ("5.16.0", "ok"),
        ("6.1.0-13-amd64", "ok"),
        ("10.0", "ok"),
        ("?", "warning"),
    ],
)
def test_check_knows_which_kernels_lack_what(monkeypatch: pytest.MonkeyPatch, release: str, state: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    finding = check._kernel()
    assert finding.state == state
    assert release in finding.value
    assert (finding.advice is None) == (state == "ok")


@pytest.mark.parametrize(
    ("budget", "state", "room"),
    [
        ((0, 65536), "ok", "131,072 polls"),
        ((65000, 65536), "warning", "1,024 polls"),
        ((65281, 65536), "failed", "0 polls"),
        ((70000, 65536), "failed", "0 free of 65,536: room for 0 polls"),
    ],
)
def test_check_says_how_many_polls_the_budget_has_room_for(
    monkeypatch: pytest.MonkeyPatch, budget: tuple[int, int], state: str, room: str
) -> None:
    monkeypatch.setattr(check, "aio_budget", lambda: budget)
    finding = check._budget()
    assert (finding.state, finding.value.endswith(room)) == (state, True)
    assert (finding.advice is None) == (state == "ok")


def test_the_room_that_check_tells_is_counted_in_rings_as_they_are() -> None:
    async def main() -> int:
        capacity: int = trio.lowlevel.current_statistics().io_statistics.capacity
        return capacity

    assert trio.run(main, io_manager="aiopoll") == check._RING_POLLS


def test_check_names_the_private_names_that_trio_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "missing_names", ("trio.a_name",))
    finding = check._trio()
    assert finding.state == "failed"
    assert "trio.a_name" in finding.value


def test_check_warns_of_a_name_in_the_environment_that_is_not_known() -> None:
    assert "runs without the argument io_manager fail" in command("check", TRIO_IO_MANAGER="uring").stdout
    assert "TRIO_IO_MANAGER  ok" in command("check", TRIO_IO_MANAGER="auto").stdout


# run: as Python does it

PROGRAMS = {
    "what a script sees": (
        """
        import sys
        main = sys.modules["__main__"]
        print(__name__, __file__, __package__, __spec__, __doc__, __cached__, type(__loader__).__name__)
        print(main.__dict__ is globals(), sys.argv, sys.path)
        """,
        ("a", "-m", "--", "--help", "--io-manager", ""),
    ),
    "no future of ours": ("def f(x: 1 + 1): pass\nprint(f.__annotations__)\n", ()),
    "exit code": ("import sys; sys.exit(7)\n", ()),
    "exit with a message": ("import sys; sys.exit('that was it')\n", ()),
    "exit without a code": ("raise SystemExit\n", ()),
    "exception": ("def f():\n    1 / 0\n\ndef g():\n    f()\n\nprint('before')\ng()\n", ()),
    "exception group": ("raise ValueError('a') from KeyError('b')\n", ()),
    "exception in a thread": (
        "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()\n",
        (),
    ),
    "excepthook": (
        """
        import sys, traceback

        def hook(kind, value, tb):
            names = [frame.filename for frame in traceback.extract_tb(tb) if "runpy" not in frame.filename]
            print("hook", kind, value, names, tb is value.__traceback__)

        sys.excepthook = hook
        raise ValueError(1)
        """,
        (),
    ),
    "keyboard interrupt": ("raise KeyboardInterrupt\n", ()),
    "death by a signal": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n", ()),
    "hard exit": ("import os; os._exit(9)\n", ()),
    "syntax error": ("x = (\n", ()),
    "its own modules": ("import beside\nprint(beside.__file__)\n", ()),
    "threads and atexit functions after the end": (
        """
        import atexit, pickle, sys, threading

        class Own: pass

        def later():
            pickle.dumps(Own())
            print("later", sys.modules["__main__"].__dict__ is globals())

        atexit.register(later)
        threading.Thread(target=lambda: (threading.main_thread().join(), later())).start()
        """,
        (),
    ),
}

WHERE_IT_IS_MATTERS = ("what a script sees", "its own modules", "exception")


def same_as_python(*words: str, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """What the program did, which is what it does when Python runs it."""
    plain = do(sys.executable, *python, *words)
    ours = do(sys.executable, *python, "-m", "trio_aiopoll", "run", *words)
    expected = re.sub(rf"^{re.escape(sys.executable)}: ", "python -m trio_aiopoll run: ", plain.stderr)
    # Python itself is in the tracebacks of modules.
    expected = re.sub(r'^  File "(<frozen .*|.*/runpy\.py".*\n    .*)\n', "", expected, flags=re.MULTILINE)
    expected = re.sub(r'^Traceback.*\n(?!  File ".*", line \d+, in )', "", expected, flags=re.MULTILINE)
    at_address = partial(re.sub, r"0x[0-9a-f]+", "0x")
    assert at_address(ours.stdout) == at_address(plain.stdout)
    assert ours.stderr == expected
    assert ours.returncode == plain.returncode
    return ours


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *((way, name) for way in ("script", "module") for name in PROGRAMS),
        *((way, name) for way in ("script in a directory", "script behind a link") for name in WHERE_IT_IS_MATTERS),
    ],
)
def test_a_program_does_what_it_does_when_python_runs_it(name: str, way: str) -> None:
    text, arguments = PROGRAMS[name]
    directory = "" if way in ("script", "module") else "some/where/"
    write(f"{directory}beside.py", "")
    path = write(f"{directory}program.py", text)
    if way == "script behind a link":
        os.symlink(path, "link.py")
        path = "link.py"
    if way == "module":
        same_as_python("-m", "program", *arguments)
    else:
        same_as_python(path, *arguments)


@pytest.mark.parametrize(
    "words", [("no-such-file.py",), ("-m", "no_such_module"), ("-m", "json"), ("empty",), ("no/such",)]
)
def test_a_program_that_is_not_there_is_said_to_be_so_as_python_says_it(words: tuple[str, ...]) -> None:
    os.mkdir("empty")
    assert same_as_python(*words).returncode != 0


@pytest.mark.parametrize("path", ["./program.py", "some/../program.py", "absolute"])
def test_a_script_is_known_by_the_path_by_which_python_knows_it(path: str) -> None:
    os.mkdir("some")
    write("program.py", "import sys; print(__file__, sys.argv, sys.path[0])\n1 / 0\n")
    same_as_python(os.path.abspath("program.py") if path == "absolute" else path)


def test_the_name_of_a_module_may_be_attached_to_its_option() -> None:
    write("program.py", "import sys; print(sys.argv[1:])")
    assert same_as_python("-mprogram", "x").stdout == "['x']\n"


def test_packages_directories_and_archives_are_run_as_python_runs_them() -> None:
    see = "import sys; print(__name__, __file__, __package__, __spec__.name, sys.argv, sys.path[0])\n"
    write("package/__init__.py", "import sys; print(sys.argv)\n")
    write("package/__main__.py", see)
    write("package/module.py", see)
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("__main__.py", see)
    for words in (("-m", "package"), ("-m", "package.module"), ("package",), ("archive.zip",)):
        assert "__main__" in same_as_python(*words, "x").stdout


def test_a_module_whose_package_fails_is_not_said_to_be_missing() -> None:
    write("package/__init__.py", "import no_such_module_at_all\n")
    result = command("run", "-m", "package.module")
    assert result.returncode == 1
    assert "no_such_module_at_all" in result.stderr


def test_compiled_scripts_are_run_as_python_runs_them() -> None:
    import py_compile

    write("program.py", "import sys; print(__file__, sys.argv)\n")
    py_compile.compile("program.py", cfile="compiled.pyc")
    assert "compiled.pyc" in same_as_python("compiled.pyc", "x").stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no -P yet")
def test_a_safe_path_stays_safe() -> None:
    write("program.py", "import sys; print(sys.path)\n")
    same_as_python("program.py", python=["-P"])


# run: on which I/O manager


@pytest.mark.parametrize(
    ("options", "variable", "expected"),
    [
        ((), "", "aiopoll"),
        ((), "epoll", "epoll"),
        ((), "auto", "aiopoll"),
        (("--io-manager", "epoll"), "", "epoll"),
        (("--io-manager=auto",), "epoll", "aiopoll"),
        (("--io-manager", "aiopoll", "--"), "epoll", "aiopoll"),
    ],
)
def test_a_program_runs_on_what_the_argument_says_or_else_the_environment_or_else_aiopoll(
    options: tuple[str, ...], variable: str, expected: str
) -> None:
    write("program.py", BACKEND + "    print(trio.run(backend))\n")
    result = command("run", *options, "program.py", TRIO_IO_MANAGER=variable)
    assert (result.stdout, result.stderr, result.returncode) == (f"{expected}\n", "", 0)


def test_a_bad_name_in_the_environment_is_refused_before_the_program_starts() -> None:
    write("program.py", "print('started')\n")
    result = command("run", "program.py", TRIO_IO_MANAGER="uring")
    assert (result.returncode, result.stdout) == (2, "")
    assert "TRIO_IO_MANAGER='uring' is not known; use one of aiopoll, auto, epoll" in result.stderr


def test_where_aiopoll_does_not_work_the_program_is_not_started() -> None:
    write("program.py", BACKEND + "    print(trio.run(backend))\n")
    result = without_aio(FAIL_WITH_EPERM, "run", "program.py")
    assert (result.returncode, result.stdout) == (125, "")
    assert "io_setup() failed with EPERM" in result.stderr


def test_where_aiopoll_does_not_work_auto_runs_the_program_on_epoll() -> None:
    write("program.py", BACKEND + "    print(trio.run(backend))\n")
    result = without_aio(FAIL_WITH_EPERM, "run", "--io-manager", "auto", "program.py")
    assert (result.returncode, result.stdout) == (0, "epoll\n")
    assert "using epoll: aiopoll is not available" in result.stderr


def test_an_argument_in_the_program_has_the_last_word() -> None:
    write("program.py", BACKEND + "    print(trio.run(backend, io_manager='epoll'))\n")
    assert command("run", "program.py").stdout == "epoll\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_of_multiprocessing_follow_and_so_do_theirs(method: str) -> None:
    write(
        "program.py",
        BACKEND
        + f"""
    import multiprocessing

    def work(queue, depth):
        queue.put(trio.run(backend))
        if depth:
            process = multiprocessing.get_context({method!r}).Process(target=work, args=(queue, depth - 1))
            process.start()
            process.join()

    if __name__ == "__main__":
        queue = multiprocessing.get_context({method!r}).SimpleQueue()
        work(queue, 2)
        print([queue.get() for _ in range(3)])
    """,
    )
    plain = do(sys.executable, "program.py")
    assert (plain.stdout, plain.stderr) == (f"{['epoll'] * 3}\n", "")
    result = command("run", "program.py")
    assert (result.stdout, result.stderr, result.returncode) == (f"{['aiopoll'] * 3}\n", "", 0)
    assert command("run", "--io-manager", "epoll", "program.py").stdout == f"{['epoll'] * 3}\n"


def test_every_worker_of_a_server_is_on_what_run_was_told() -> None:
    write(
        "application.py",
        """
        import os, pathlib
        import trio

        async def app(scope, receive, send):
            assert scope["type"] == "lifespan"
            while True:
                message = await receive()
                backend = trio.lowlevel.current_statistics().io_statistics.backend
                pathlib.Path(f"{os.getpid()}.backend").write_text(backend)
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        """,
    )
    for io_manager in ("aiopoll", "epoll"):
        words = ["run", "--io-manager", io_manager, "-m", "hypercorn", "-k", "trio", "-w", "2", "-b", "127.0.0.1:0"]
        with subprocess.Popen([*COMMAND, *words, "application:app"], stderr=subprocess.PIPE, text=True) as process:
            watchdog = threading.Timer(TIMEOUT, process.kill)
            watchdog.start()
            try:
                assert process.stderr is not None
                started = 0
                for line in process.stderr:
                    started += "Running on" in line
                    if started == 2:
                        break
                assert started == 2
                process.terminate()
                process.communicate(timeout=TIMEOUT)
                assert process.returncode == 0
            finally:
                watchdog.cancel()
                process.kill()
        told = list(Path().glob("*.backend"))
        assert [path.read_text() for path in told] == [io_manager] * 2
        for path in told:
            path.unlink()


# run: what it can tell


def test_debug_explains_the_waits_on_stderr() -> None:
    program = """
        import socket, trio

        async def main():
            left, right = socket.socketpair()
            with left, right:
                await trio.lowlevel.wait_writable(left)

        trio.run(main)
    """
    write("program.py", program)
    result = command("run", "--debug", "program.py")
    assert result.stdout == ""
    assert re.search(r"fd \d+ \(socket:\[\d+\]\) writable, task '.*main': ring lane", result.stderr)
    assert command("run", "program.py").stderr == ""


def test_record_ticks_writes_what_every_run_of_the_program_did_whatever_its_end() -> None:
    program = """
        import os, sys, trio

        async def main():
            for _ in range(10):
                await trio.lowlevel.checkpoint()

        trio.run(main)
        if (child := os.fork()) == 0:
            sys.exit()
        os.waitpid(child, 0)
        trio.run(main)
        1 / 0
    """
    write("program.py", program)
    result = command("run", "--record-ticks", "ticks.json", "program.py")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    first, second = json.loads(Path("ticks.json").read_text())["runs"]
    for run in (first, second):
        assert len(run["ticks"]["batch"]) > 10
        assert run["samples"][0]["io"]["backend"] == "aiopoll"


# bench


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cases as there are, but small and short ones."""

    def cases(has_uvloop: bool) -> list[bench.Case]:
        managers = ("epoll", "aiopoll")
        return [
            bench.Case("waits", "wait", managers, partial(bench._enter_waits, ready=2)),
            bench.Case("echo", "request", managers, partial(bench._enter_echo, connections=3)),
        ]

    monkeypatch.setattr(bench, "_cases", cases)
    monkeypatch.setattr(bench, "_ROUND", 0.02)
    allowed = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("few_cases")
def test_bench_measures_both_managers_in_turns_and_compares_round_with_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _commands.main(["bench", "--seconds", "1", "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert [case["title"] for case in report["cases"]] == ["waits", "echo"]
    for case in report["cases"]:
        epoll, aiopoll = (case["rivals"][name] for name in ("epoll", "aiopoll"))
        assert len(epoll["rounds"]) == len(aiopoll["rounds"]) >= 3
        for rounds in (epoll["rounds"], aiopoll["rounds"]):
            assert all(value > 0 for each in rounds for value in each.values())
        own = [ours["cpu"] / theirs["cpu"] for ours, theirs in zip(aiopoll["rounds"], epoll["rounds"], strict=True)]
        low, middle, high = aiopoll["ratios to epoll"]["cpu"]
        assert min(own) <= low <= middle <= high <= max(own)
        assert epoll["ratios to epoll"]["cpu"] == [1, 1, 1]
    assert report["environment"]["trio"] == trio.__version__


@pytest.mark.usefixtures("few_cases")
def test_bench_shows_a_table_with_a_bar_for_each_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert _commands.main(["bench", "--seconds", "1"]) == 0
    shown = capsys.readouterr().out
    for title in ("waits", "echo"):
        (table,) = re.findall(rf"^{title}  \(\d+ rounds\)\n((?:  .*\n)+)", shown, re.MULTILINE)
        heading, epoll, aiopoll = table.splitlines()
        assert "CPU, ratio" in heading
        assert re.search(r"Trio on epoll +[\d.]+ us .* 1   █{24}$", epoll)
        assert re.search(r"Trio on aiopoll +[\d.]+ us .* \d\.\d\d \(\d\.\d\d-\d\.\d\d\)   █*.?$", aiopoll)


@pytest.mark.usefixtures("few_cases")
def test_rivals_of_bench_are_what_they_are_called_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in (("TRIO_IO_MANAGER", "no such name"), ("TRIO_AIOPOLL_TOP", "1")):
        monkeypatch.setenv(variable, value)
    rings = {}
    for rival in ("epoll", "aiopoll"):
        with bench._enter_echo(rival, min(os.sched_getaffinity(0)), connections=1) as contestant:
            pid = contestant._child._process.pid
            rings[rival] = Path(f"/proc/{pid}/maps").read_text().count("/[aio]")
            modules = Path(f"/proc/{pid}/maps").read_text().count("_ring_ffi")
            assert (modules > 0) == (rival == "aiopoll")
    assert rings == {"epoll": 0, "aiopoll": 1}


@pytest.mark.usefixtures("few_cases")
def test_a_rival_that_fails_is_named_with_its_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bench.Case("waits", "wait", ("epoll", "uvloop"), partial(bench._enter_waits, ready=1))
    monkeypatch.setattr(bench, "_cases", lambda has_uvloop: [case])
    assert _commands.main(["bench", "--seconds", "1"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"Trio on epoll +[\d.]+ us", shown)
    assert "asyncio on uvloop could not take part: ValueError: io_manager='uvloop' is not known" in shown


def test_a_server_that_dies_in_the_middle_is_a_rival_that_fails() -> None:
    with bench._enter_echo("epoll", min(os.sched_getaffinity(0)), connections=2) as contestant:
        os.kill(contestant._child._process.pid, signal.SIGKILL)
        with pytest.raises(bench.FailedError, match="ended with status -9"):
            contestant.round(0.1)


def test_bench_compares_with_uvloop_where_it_is_installed() -> None:
    assert {rival for case in bench._cases(has_uvloop=True) for rival in case.rivals} == {"epoll", "aiopoll", "uvloop"}
    assert {rival for case in bench._cases(has_uvloop=False) for rival in case.rivals} == {"epoll", "aiopoll"}


def test_bench_where_aiopoll_does_not_work_says_why_and_exits_with_1() -> None:
    result = without_aio(FAIL_WITH_EPERM, "bench")
    assert (result.returncode, result.stdout) == (1, "")
    assert "io_setup() failed with EPERM" in result.stderr


# top

ASLEEP = """
    import sys, trio

    async def main():
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            print("asleep", flush=True)
            await trio.lowlevel.wait_readable(sys.stdin)
            nursery.cancel_scope.cancel()

    trio.run(main)
"""


@contextmanager
def running(text: str, *options: str, **environment: str) -> Iterator[int]:
    """The pid of a program that has got as far as to print a line, and which ends when its stdin is closed."""
    write("program.py", text)
    words = [*COMMAND, "run", *options, "program.py"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() != ""
            yield process.pid
            process.communicate("", timeout=TIMEOUT)
            assert process.returncode == 0
        finally:
            process.kill()


def top(pid: int, *options: str) -> subprocess.CompletedProcess[str]:
    return command("top", str(pid), "--interval", "0.05", *options)


@pytest.mark.parametrize("io_manager", ["aiopoll", "epoll"])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_top_shows_what_the_runs_of_a_process_tell(io_manager: str, by: str) -> None:
    told = (("--top",), {}) if by == "option" else ((), {"TRIO_AIOPOLL_TOP": "1"})
    with running(ASLEEP, *told[0], "--io-manager", io_manager, **told[1]) as pid:
        result = top(pid, "--count", "3", "--json")
        shown = top(pid, "--count", "2").stdout
    looks = [json.loads(line) for line in result.stdout.splitlines()]
    assert (len(looks), result.returncode, result.stderr) == (3, 0, "")
    for look in looks:
        assert look["process"]["pid"] == pid
        assert look["process"]["rings"] == (io_manager == "aiopoll")
        (run,) = look["runs"]
        assert run["statistics"]["io"]["backend"] == io_manager
        assert run["statistics"]["tasks_living"] >= 5
    assert shown.count(f"  {io_manager} in MainThread, for 0:00:0") == 2
    assert ("io_submit" in shown) == (io_manager == "aiopoll")


def test_top_of_a_process_that_tells_nothing_shows_what_the_kernel_knows() -> None:
    with running(ASLEEP) as pid:
        shown = top(pid, "--count", "1").stdout
        assert json.loads(top(pid, "--count", "1", "--json").stdout)["runs"] == []
    assert "It has AIO rings, so it runs on aiopoll, or did." in shown
    assert "TRIO_AIOPOLL_TOP=1" in shown
    with running(ASLEEP, "--io-manager", "epoll") as pid:
        assert "It has no AIO rings, so it does not run on aiopoll." in top(pid, "--count", "1").stdout


def test_top_tells_a_run_that_is_stuck_in_a_task_from_one_that_answers() -> None:
    stuck = """
        import sys, trio

        async def main():
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            print("stuck", flush=True)
            sys.stdin.read()

        trio.run(main)
    """
    with running(stuck, "--top") as pid:
        result = top(pid, "--count", "1")
        assert json.loads(top(pid, "--count", "1", "--json").stdout)["runs"] == [None]
    assert (result.returncode, "a run has not answered for 1 s" in result.stdout) == (0, True)


@contextmanager
def watched(pid: int) -> Iterator[subprocess.Popen[str]]:
    """``top`` that goes on, and has had its first look."""
    with subprocess.Popen(
        [*COMMAND, "top", str(pid), "--interval", "0.05", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        try:
            assert watching.stdout is not None
            assert json.loads(watching.stdout.readline())["process"]["pid"] == pid
            yield watching
        finally:
            watching.kill()


def test_top_ends_with_the_process_that_it_watches() -> None:
    with ExitStack() as stack:
        with running(ASLEEP) as pid:
            watching = stack.enter_context(watched(pid))
        _, complaints = watching.communicate(timeout=TIMEOUT)
    assert watching.returncode == 0
    assert complaints.startswith("python -m trio_aiopoll top: ")
    assert complaints.endswith((f"there is no process {pid}\n", f"the process {pid} has ended\n"))


def test_top_ends_when_it_is_interrupted() -> None:
    with running(ASLEEP) as pid, watched(pid) as watching:
        watching.send_signal(signal.SIGINT)
        _, complaints = watching.communicate(timeout=TIMEOUT)
        assert (watching.returncode, complaints) == (0, "")


def test_top_of_a_process_that_is_not_there_exits_with_1() -> None:
    with running(ASLEEP) as pid:
        pass
    result = top(pid, "--count", "1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"python -m trio_aiopoll top: there is no process {pid}\n"
