"""Which sockets are fast: those that are made in an aiopoll run, and the streams on them.

From the first such run on, the constructors of Trio's two classes look whether they are in one, and if so change the
class of what they have made. Everything else about Trio's classes stays as it is, and a run on another manager gets the
constructors back as they were: it pays nothing, but for a look when it makes a socket while an aiopoll run lives in
another thread. They are not given back sooner, because to change a class has Python forget what it knows of it, which
would cost a program with many short runs more than all else here.

Whose class changes gets a new dict as well, unless somebody else's constructor may know the one it has. That one shares
its keys with others of the class it had, and CPython 3.11 takes four times as long to find an attribute in there for
who has another class: 20 ns, ten times an echo.
"""

from __future__ import annotations

import os
import threading
from functools import wraps
from operator import is_
from typing import Any, Final

from ._sockets import FastSocket, be_without_place
from ._streams import FastStream
from ._trio_compat import GLOBAL_RUN_CONTEXT, StockSocket, StockStream, is_of_trio

# Guards the count and the constructors, which follow from it. Held across a fork, so that no child finds it taken.
_lock: Final = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_runs = 0

_stock_socket_init: Final = StockSocket.__init__
_stock_stream_init: Final = StockStream.__init__
# Somebody else's constructor may have kept the dict, or put one of its own there; as may one that wraps ours.
_may_replace_dict: Final = is_of_trio(_stock_socket_init) and is_of_trio(_stock_stream_init)


# Somebody who puts a method of his own into one of Trio's classes wants it to be called. It may say that it is equal to
# Trio's.
def _socket_methods() -> tuple[object, ...]:
    return StockSocket._nonblocking_helper, StockSocket.recv, StockSocket.send


def _stream_methods() -> tuple[object, ...]:
    return StockStream.receive_some, StockStream.send_all, StockStream.__anext__


_stock_socket_methods: Final = _socket_methods()
_stock_stream_methods: Final = _stream_methods()


@wraps(_stock_socket_init)
def _socket_init(self: Any, sock: Any) -> None:
    _stock_socket_init(self, sock)
    runner = getattr(GLOBAL_RUN_CONTEXT, "runner", None)
    if (
        type(self) is StockSocket
        and getattr(getattr(runner, "io_manager", None), "has_fast_sockets", False)
        and all(map(is_, _socket_methods(), _stock_socket_methods))
    ):
        if _may_replace_dict and StockSocket.__init__ is _socket_init:
            self.__dict__ = dict(vars(self))
        be_without_place(self)
        self.__class__ = FastSocket


@wraps(_stock_stream_init)
def _stream_init(self: Any, socket: Any) -> None:
    _stock_stream_init(self, socket)
    if (
        type(self) is StockStream
        and type(socket) is FastSocket
        and all(map(is_, _stream_methods(), _stock_stream_methods))
    ):
        if _may_replace_dict and StockStream.__init__ is _stream_init:
            self.__dict__ = dict(vars(self))
        self.__class__ = FastStream


_constructors: Final[list[tuple[Any, object, object]]] = [
    (StockSocket, _stock_socket_init, _socket_init),
    (StockStream, _stock_stream_init, _stream_init),
]


def begin_run() -> None:
    global _runs
    with _lock:
        _runs += 1
        if StockSocket.__init__ is _socket_init and StockStream.__init__ is _stream_init:
            return
        for stock, init, fast_init in _constructors:
            if vars(stock)["__init__"] is init:
                stock.__init__ = fast_init


def end_run() -> None:
    global _runs
    with _lock:
        _runs -= 1


def restore() -> None:
    """Called when a run on another manager begins: give Trio its constructors back, unless a run still needs them."""
    if StockSocket.__init__ is _stock_socket_init and StockStream.__init__ is _stock_stream_init:
        return
    with _lock:
        if _runs == 0:
            for stock, init, fast_init in _constructors:
                if vars(stock)["__init__"] is fast_init:
                    stock.__init__ = init
