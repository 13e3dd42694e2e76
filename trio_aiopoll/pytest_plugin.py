"""A pytest plugin that runs a whole test session on one I/O manager.

``pytest -p trio_aiopoll.pytest_plugin --trio-io-manager=aiopoll``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("trio").addoption(
        "--trio-io-manager",
        choices=["aiopoll", "epoll"],
        help="the I/O manager of every Trio run in this session (default: Trio's own, epoll)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--trio-io-manager") == "aiopoll":
        import trio_aiopoll

        trio_aiopoll.install()


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.getoption("--trio-io-manager")
    return None if name is None else f"trio I/O manager: {name}"
