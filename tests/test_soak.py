"""A soak of some seconds loses nothing; see soak.py, which can be run for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SOAK = Path(__file__).resolve().parent / "soak.py"


def test_soak_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    result = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "10", "--connections", "1500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    with capfd.disabled():
        print(f"\n{result.stdout}", end="")
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("\n0 lost\n")
