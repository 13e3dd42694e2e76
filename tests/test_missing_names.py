"""On a Trio that lacks a private name that we use, "aiopoll" says which, and "auto" falls back."""

from __future__ import annotations

import pytest
import trio

import trio_aiopoll


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    name = "trio._core._io_epoll.EpollIOManager._registered"
    monkeypatch.setattr("trio_aiopoll._probe.missing_names", (name,))
    return name


def test_a_missing_private_name_is_named(missing: str) -> None:
    with pytest.raises(trio_aiopoll.UnavailableError, match=missing):
        trio.run(trio.sleep, 0, io_manager="aiopoll")
    with pytest.raises(trio_aiopoll.UnavailableError, match=missing):
        trio_aiopoll.install()
    assert missing in str(trio_aiopoll.probe().reason)


@pytest.mark.usefixtures("missing")
def test_with_a_private_name_missing_auto_uses_epoll() -> None:
    async def backend() -> str:
        return trio.lowlevel.current_statistics().io_statistics.backend

    assert trio.run(backend, io_manager="auto") == "epoll"
