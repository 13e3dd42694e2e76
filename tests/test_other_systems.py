"""On another system than Linux the import says what is wrong, in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_import_elsewhere_is_refused_in_one_sentence(system: str) -> None:
    script = f"import sys; sys.platform = {system!r}; import trio_aiopoll"
    child = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 1
    *_, last = child.stderr.splitlines()
    assert last.startswith("ImportError: trio_aiopoll works on Linux only")
    assert last.endswith(f"this is {system}")
