"""The anyio backend "aiopoll": anyio's Trio backend, with runs that default to aiopoll.

anyio finds a backend by importing ``anyio._backends._<name>`` and taking its ``backend_class``. This module is put in
that place. It does not import anyio before anyio asks for the class, so programs without anyio pay nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyio.abc import AsyncBackend


def _make_backend_class() -> type[AsyncBackend]:
    from anyio._backends._trio import TrioBackend

    class AiopollBackend(TrioBackend):
        @classmethod
        def run(cls, func: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
            return super().run(func, args, kwargs, {"io_manager": "aiopoll", **options})

        @classmethod
        def create_test_runner(cls, options: dict[str, Any]) -> Any:
            return super().create_test_runner({"io_manager": "aiopoll", **options})

    return AiopollBackend


def __getattr__(name: str) -> Any:
    if name == "backend_class":
        backend_class = globals()["backend_class"] = _make_backend_class()
        return backend_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def offer() -> None:
    """Let ``anyio.run(main, backend="aiopoll")`` find this module; called once, at import."""
    sys.modules["anyio._backends._aiopoll"] = sys.modules[__name__]
