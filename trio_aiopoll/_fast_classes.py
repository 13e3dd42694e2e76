"""Which sockets are fast: those that are made in an aiopoll run, and the streams on them.

While at least one such run lives, the constructors of Trio's two classes look whether they are in one, and if so change
the class of what they have made. Everything else about Trio's classes stays as it is, and with the last run so do the
constructors: runs on other managers pay nothing, but for a look when they make a socket while an aiopoll run lives in
another thread.
"""

from __future__ import annotations

import os
import threading
from functools import wraps
from typing import Any, Final

from ._sockets import FastSocket
from ._streams import FastStream
from ._trio_compat import GLOBAL_RUN_CONTEXT, StockSocket, StockStream

# Guards the count and the constructors, which follow from it. Held across a fork, so that no child finds it taken.
_lock: Final = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_runs = 0

_stock_socket_init: Final = StockSocket.__init__
_stock_stream_init: Final = StockStream.__init__


# Somebody who puts a method of his own into one of Trio's classes wants it to be called.
_socket_methods: Final = [(name, vars(StockSocket)[name]) for name in ("_nonblocking_helper", "recv", "send")]
_stream_methods: Final = [(name, vars(StockStream)[name]) for name in ("receive_some", "send_all")]


def _is_changed(stock: type, methods: list[tuple[str, object]]) -> bool:
    return any(vars(stock)[name] is not method for name, method in methods)


@wraps(_stock_socket_init)
def _socket_init(self: Any, sock: Any) -> None:
    _stock_socket_init(self, sock)
    runner = getattr(GLOBAL_RUN_CONTEXT, "runner", None)
    if (
        type(self) is StockSocket
        and getattr(getattr(runner, "io_manager", None), "has_fast_sockets", False)
        and not _is_changed(StockSocket, _socket_methods)
    ):
        self.__class__ = FastSocket


@wraps(_stock_stream_init)
def _stream_init(self: Any, socket: Any) -> None:
    _stock_stream_init(self, socket)
    if type(self) is StockStream and type(socket) is FastSocket and not _is_changed(StockStream, _stream_methods):
        self.__class__ = FastStream


def begin_run() -> None:
    global _runs
    with _lock:
        _runs += 1
        if _runs == 1:
            StockSocket.__init__ = _socket_init  # type: ignore[method-assign]
            StockStream.__init__ = _stream_init  # type: ignore[method-assign]


def end_run() -> None:
    global _runs
    with _lock:
        _runs -= 1
        if _runs == 0:
            StockSocket.__init__ = _stock_socket_init  # type: ignore[method-assign]
            StockStream.__init__ = _stock_stream_init  # type: ignore[method-assign]
