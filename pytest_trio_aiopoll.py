"""A pytest plugin that chooses the I/O manager of a test session's Trio runs, or of one test's.

pytest loads it in every session of an environment that has trio_aiopoll installed. Therefore it stands outside of that
package, whose import imports Trio, and imports the package only in a session that asks for it. Its name is the same
as that of its entry point, so that it can also be named with ``-p``, where plugins are not loaded automatically.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

IO_MANAGERS: Final = ("aiopoll", "auto", "epoll")
MARKER: Final = "trio_io_manager"

_chosen: Final = pytest.StashKey["str | None"]()
_reason: Final = pytest.StashKey[str]()
_undo: Final = pytest.StashKey["Callable[[], None]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("trio").addoption(
        "--trio-io-manager",
        choices=IO_MANAGERS,
        help="the I/O manager of this session's Trio runs, unless a test is marked with another; "
        "auto is aiopoll where it works, otherwise epoll (default: the environment variable TRIO_IO_MANAGER, "
        "or the ini option trio_io_manager, or what it would be without this plugin)",
    )
    parser.addini("trio_io_manager", "the I/O manager of all Trio runs: aiopoll, auto or epoll")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(name): run what this test starts of Trio on that I/O manager: {', '.join(IO_MANAGERS)}",
    )
    name = _ask(config)
    if name == "auto":
        name = _decide(config)
    if name is not None:
        config.stash[_undo] = _switch(name)
    config.stash[_chosen] = name


def pytest_unconfigure(config: pytest.Config) -> None:
    if _undo in config.stash:  # not in a session that was refused
        config.stash[_undo]()


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.stash[_chosen]
    return None if name is None else f"trio I/O manager: {name}{config.stash.get(_reason, '')}"


@pytest.hookimpl(tryfirst=True)  # before the fixtures are set up, since some of them start runs
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker(MARKER)
    name = item.config.stash[_chosen]
    if marker is not None:
        if len(marker.args) != 1 or marker.kwargs or marker.args[0] not in IO_MANAGERS:
            what = ", ".join([*map(repr, marker.args), *(f"{key}={value!r}" for key, value in marker.kwargs.items())])
            pytest.fail(f"the marker {MARKER}({what}) takes one of {', '.join(map(repr, IO_MANAGERS))}", pytrace=False)
        name = marker.args[0] if marker.args[0] != "auto" else _decide(item.config)
    if name is not None:  # also that of the session, since an earlier test may have changed what it found
        try:
            item.stash[_undo] = _switch(name)
        except pytest.UsageError as unavailable:
            pytest.fail(str(unavailable), pytrace=False)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)  # after the fixtures are torn down
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    yield
    if _undo in item.stash:
        item.stash[_undo]()
        del item.stash[_undo]


def _ask(config: pytest.Config) -> str | None:
    """What this session asks for: on the command line, else in the environment, else in its configuration file."""
    name: str | None = config.getoption("--trio-io-manager")
    if name is not None:
        return name
    for origin, name in (
        ("the environment variable TRIO_IO_MANAGER", os.environ.get("TRIO_IO_MANAGER")),
        ("the ini option trio_io_manager", config.getini("trio_io_manager")),
    ):
        if name:
            if name not in IO_MANAGERS:
                raise pytest.UsageError(f"{origin} is {name!r}; use one of {', '.join(IO_MANAGERS)}")
            return name
    return None


def _decide(config: pytest.Config) -> str:
    """What "auto" is here."""
    import trio_aiopoll

    found = trio_aiopoll.probe()
    if found.available:
        return "aiopoll"
    config.stash[_reason] = f" ({found.reason})"
    return "epoll"


def _switch(name: str) -> Callable[[], None]:
    """Make it the process's default; what is returned undoes it."""
    from trio_aiopoll import UnavailableError, _selection

    try:
        return _selection.override_default(name)
    except UnavailableError as error:
        raise pytest.UsageError(str(error)) from None
