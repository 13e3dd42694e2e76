"""What README.md and the pages in docs/ say is so: each block of code does what they say it does, each test, file and
name that they refer to exists, and they build without a warning.

Blocks are run in a directory of their page's own, as their reader would, with the installed package. What a block needs
beyond itself is said in a comment before it, which readers do not see:

<!-- test: in: LINES -->           it stands in these lines, in the place of the line "# the block"
<!-- test: save as NAME -->        it is the file NAME, for the blocks after it
<!-- test: pytest OPTIONS -->      it is a test file
<!-- test: serves PORT ... -->     it serves there until it is told to end; of a shell block, each line does
<!-- test: not run: REASON -->

A ``text`` block is what the block before it prints, with "..." for what may be anything.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import json
import os
import pydoc
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import yaml

import trio_aiopoll

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHECKOUT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = CHECKOUT / "docs"
PAGES: Final = [CHECKOUT / "README.md", *sorted(DOCS.glob("**/*.md"))]
TIMEOUT: Final = 120  # seconds: what takes longer hangs

RUNNABLE: Final = ("python", "sh")
DATA: Final = ("json", "yaml", "ini")

BLOCK: Final = re.compile(
    r"""
    (?: ^(?P<comment_indent>\ *)<!--\ test:\ (?P<comment>.*?)\ ?-->\n )?
    ^(?P<indent>\ *)```(?P<language>[^\n`]*)\n
    (?P<text>.*?)
    ^(?P=indent)```$
    (?: \n\n```text\n (?P<output>.*?) ^```$ )?
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    output: str | None  # what it prints
    verb: str = ""  # of the comment before it
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


VERBS: Final = ("in", "save as", "pytest", "serves", "not run")


def blocks_of(page: Path) -> Iterator[Block]:
    source = page.read_text()
    for match in BLOCK.finditer(source):
        if match["language"].startswith("{"):
            continue  # one of Sphinx's directives
        verb = argument = ""
        if match["comment"] is not None:
            verb = next((verb for verb in VERBS if match["comment"].startswith(verb)), "")
            if not verb:
                raise ValueError(f"{page.name}: there is no test for {match['comment']!r}")
            argument = match["comment"].removeprefix(verb).lstrip(": ").strip("\n")
        indent = re.compile(f"^{match['indent']}", re.MULTILINE)
        yield Block(
            page=page,
            line=source.count("\n", 0, match.start("text")),
            language=match["language"],
            text=indent.sub("", match["text"]),
            output=match["output"],
            verb=verb,
            argument=argument,
        )


BLOCKS: Final = [block for page in PAGES for block in blocks_of(page)]


#########################
# Running blocks
#########################


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory from which the commands for a checkout work, but the checkout's trio_aiopoll is not to be found."""
    for name in ("benchmarks", "docs", "examples"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    return tmp_path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # no leavings in the checkout
    return {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": "-p no:cacheprovider"}


def run(command: Sequence[str], place: Path) -> str:
    """What the command prints, on stdout."""
    child = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}{child.stderr}"
    return child.stdout


def run_block(block: Block, place: Path) -> str:
    if block.language == "sh":
        return run(["sh", "-e", "-c", block.text], place)
    if block.verb == "pytest":
        (place / "test_block.py").write_text(block.text)
        return run([sys.executable, "-m", "pytest", *block.argument.split(), "test_block.py"], place)
    program = block.text
    if block.verb == "in":
        before, marker, after = block.argument.partition("# the block")
        assert marker, "the comment has no line '# the block'"
        program = f"{before}{block.text}{after}\n"
    (place / "block.py").write_text(program)
    return run([sys.executable, "-X", "dev", "-W", "error", "block.py"], place)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in RUNNABLE and block.verb in ("", "in", "pytest")], ids=str
)
def test_a_block_runs_and_prints_what_the_page_says(block: Block, place: Path) -> None:
    for other in BLOCKS:
        if other.page == block.page and other.verb == "save as":
            (place / other.argument).write_text(other.text)
    printed = run_block(block, place)
    if block.output is not None:
        alike = doctest.OutputChecker().check_output(block.output, printed, doctest.ELLIPSIS)
        assert alike, f"the page says\n{block.output}\nbut it prints\n{printed}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.verb == "serves"], ids=str)
def test_a_block_that_serves_answers_until_it_is_told_to_end(block: Block, place: Path) -> None:
    text = block.text
    ports = []
    for name in block.argument.split():
        assert name in text
        ports.append(free_port())
        text = text.replace(name, str(ports[-1]))
    if block.language == "python":
        (place / "block.py").write_text(text)
        commands = [f"{sys.executable} block.py"]
    else:
        commands = text.splitlines()
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=place, env=environment(), stderr=subprocess.PIPE)
            )
            for command in commands
        ]
        for server in servers:
            stack.callback(server.kill)
        for port in ports:
            assert answer_of(port, b"hello\n") != b""
        for server in servers:
            server.send_signal(signal.SIGINT)
            _, complaint = server.communicate(timeout=TIMEOUT)
            # who does not handle the signal ends as Python does
            assert server.returncode == 0 or b"KeyboardInterrupt" in complaint, complaint


def answer_of(port: int, message: bytes) -> bytes:
    """The beginning of what a server says after the message; a server that is still starting is given time."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
                client.sendall(message)
                return client.recv(64)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_of_a_kind_that_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in (*RUNNABLE, *DATA), "nobody knows how to run this; or it is a text block that follows none"
    if block.verb == "not run":
        assert block.argument, "a reason is needed"
        assert block.language != "python"
    if block.language in DATA:
        assert block.verb == "not run"
    if block.verb == "save as":
        users = [other for other in BLOCKS if other.page == block.page and other.verb == "" and other.line > block.line]
        assert users, "nothing uses the file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_and_every_comment_of_a_page_is_seen(page: Path) -> None:
    source = page.read_text()
    blocks = [block for block in BLOCKS if block.page == page]
    directives = re.findall(r"^ *```\{", source, re.MULTILINE)
    outputs = sum(block.output is not None for block in blocks)
    assert len(re.findall(r"^ *```", source, re.MULTILINE)) == 2 * (len(directives) + len(blocks) + outputs)
    assert source.count("<!-- test:") == sum(block.verb != "" for block in blocks)


#########################
# What the pages state
#########################


def text_of_all_pages() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def test_every_file_and_test_that_the_pages_name_exists() -> None:
    text = text_of_all_pages()
    names = set(re.findall(r"`((?:tests|benchmarks|examples|trio_aiopoll)/[\w./:]+)`", text))
    assert len(names) > 20  # the expression finds them
    for name in names:
        path, _, test = name.partition("::")
        assert (CHECKOUT / path).exists(), name
        assert test == "" or f"def {test}(" in (CHECKOUT / path).read_text(), name


def blocks_in(page: str, language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.page.name == page and block.language == language]


def test_the_seccomp_profile_allows_the_calls_that_the_c_core_makes() -> None:
    [profile] = blocks_in("operations.md", "json")
    made = set(re.findall(r"\bSYS_(\w+)", (CHECKOUT / "trio_aiopoll" / "_ring.c").read_text()))
    assert set(json.loads(profile)["names"]) == made


def test_the_daemon_set_sets_the_budget_of_its_node() -> None:
    [manifest] = blocks_in("operations.md", "yaml")
    daemon_set = yaml.safe_load(manifest)
    assert (daemon_set["apiVersion"], daemon_set["kind"]) == ("apps/v1", "DaemonSet")
    template = daemon_set["spec"]["template"]
    assert daemon_set["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    [container] = template["spec"]["initContainers"]
    assert container["command"][:2] == ["sysctl", "-w"]
    name, _, value = container["command"][2].partition("=")
    assert Path("/proc/sys", *name.split(".")).exists()
    assert int(value) > 65536
    assert container["securityContext"]["privileged"] is True


# How much more of the budget is in use while a process has its first ring.
CHARGE: Final = """
from pathlib import Path
from trio_aiopoll._ring import Polls
budget = lambda: int(Path("/proc/sys/fs/aio-nr").read_text())
before = budget()
polls = Polls()
print(budget() - before, polls.statistics().capacity)
"""


def test_the_table_of_budgets_is_right(tmp_path: Path) -> None:
    measured = []
    for _ in range(20):  # others on this host may use AIO at the same moment
        charge, polls = map(int, run([sys.executable, "-c", CHARGE], tmp_path).split())
        measured.append(charge)
        if charge == 256:
            break
    assert charge == 256, measured
    rows = re.findall(r"^\| (\d+)(?:, the default)? \| (\d+) \| (\d+) \|$", text_of_all_pages(), re.MULTILINE)
    assert len(rows) == 3
    for budget, rings, waits in rows:
        assert int(rings) == int(budget) // charge
        assert int(waits) == int(rings) * polls


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: trio_aiopoll\.(\w+)", reference, re.MULTILINE))
    assert documented == set(trio_aiopoll.__all__)


@pytest.mark.parametrize("project", ["anyio", "python", "trio"])
def test_the_inventory_of_what_others_document_names_what_is_there(project: str) -> None:
    kinds = {
        "class": inspect.isclass,
        "exception": lambda found: isinstance(found, type) and issubclass(found, BaseException),
        "function": callable,
        "mod": inspect.ismodule,
        "data": lambda found: True,
    }
    lines = (DOCS / "_inventories" / f"{project}.txt").read_text().splitlines()
    assert lines[0] == "# Sphinx inventory version 1"
    for line in lines[3:]:
        name, kind, _ = line.split()
        found = pydoc.locate(name)
        assert found is not None, line
        assert kinds[kind](found), line


#########################
# Building
#########################


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    html = tmp_path / "html"
    options = ["-W", "--keep-going", "-n", "-E", "-q", "-d", str(tmp_path / "doctrees")]
    run([str(Path(sys.executable).with_name("sphinx-build")), *options, str(DOCS), str(html)], tmp_path)
    for page in DOCS.glob("*.md"):
        assert (html / page.with_suffix(".html").name).stat().st_size > 1000
    reference = (html / "api.html").read_text()
    assert 'id="trio_aiopoll.AiopollIOManager"' in reference
    # a reference to Trio is a link to Trio's own documentation
    assert 'href="https://trio.readthedocs.io/en/stable/reference-core.html#trio.run"' in reference


def test_the_command_that_makes_the_figures_makes_what_the_pages_show(place: Path) -> None:
    options = ["--rivals", "stock;aiopoll", "--budget", "1", "--output", "out"]
    run([sys.executable, "-m", "benchmarks", "start_stop", *options], place)
    assert (place / "out" / "start_stop.svg").exists()
    sys.path.append(str(DOCS / "_extensions"))
    try:
        from benchmark_table import figures
    finally:
        sys.path.pop()
    rows = list(figures((place / "out" / "results.md").read_text(), "start_stop"))
    assert {row.rival for row in rows} == {"stock", "aiopoll"}
    assert all(row.ratio for row in rows if row.rival == "aiopoll")
