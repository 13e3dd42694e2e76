"""On CPython without its GIL aiopoll refuses with a clear message, and "auto" falls back."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest
import trio

import trio_aiopoll


@pytest.fixture
def no_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_aiopoll._probe._no_gil", True)


@pytest.mark.usefixtures("no_gil")
def test_without_the_gil_aiopoll_refuses() -> None:
    with pytest.raises(trio_aiopoll.UnavailableError, match=r"without its GIL.*PYTHON_GIL=1"):
        trio.run(trio.sleep, 0, io_manager="aiopoll")
    result = trio_aiopoll.probe()
    assert not result.available
    assert "without its GIL" in str(result.reason)


@pytest.mark.usefixtures("no_gil")
def test_without_the_gil_auto_uses_epoll(caplog: pytest.LogCaptureFixture) -> None:
    async def backend() -> str:
        return trio.lowlevel.current_statistics().io_statistics.backend

    assert trio.run(backend, io_manager="auto") == "epoll"
    assert [record.name for record in caplog.records] == ["trio_aiopoll"]
    assert "without its GIL" in caplog.text


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this CPython cannot be without its GIL")
def test_a_free_threaded_cpython_stays_without_its_gil_and_auto_uses_epoll() -> None:
    program = """
import sys, trio, trio_aiopoll
async def backend():
    return trio.lowlevel.current_statistics().io_statistics.backend
print(trio.run(backend, io_manager="auto"), sys._is_gil_enabled(), trio_aiopoll.probe().reason)
"""
    # isolated, which also leaves PYTHON_GIL out of account
    output = subprocess.check_output([sys.executable, "-I", "-c", program], text=True, timeout=60)
    assert output.startswith("epoll False aiopoll is not available: this is CPython without its GIL")
