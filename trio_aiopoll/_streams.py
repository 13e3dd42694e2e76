"""What Trio's socket streams become on an aiopoll run: the same, with the socket's operations inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from trio.lowlevel import enable_ki_protection

from ._coroutines import yielding
from ._sockets import FastSocket, finish_receive, finish_send, receive_otherwise, send_otherwise
from ._transfers import MAX_RECEIVE
from ._trio_compat import DEFAULT_RECEIVE_SIZE, NOT_DONE, StockStream, translate_errors

if TYPE_CHECKING:
    from collections.abc import Generator

_stock_receive_some: Final[Any] = StockStream.receive_some
_stock_send_all: Final[Any] = StockStream.send_all
_stock_anext: Final[Any] = StockStream.__anext__

# Each call, and each coroutine between a task and what it yields to Trio, costs a tenth of a microsecond a message. So
# the methods here do themselves what recv() and send() in _sockets.py do, and one what the other does.

# SocketStream forbids subclasses, for the sake of those who would come to depend on which of its methods calls which.
# This one overrides whole operations; and it has to be a subclass, or no stream could become one.
_forbid_subclasses: Final = StockStream.__dict__["__init_subclass__"]
del StockStream.__init_subclass__
try:

    class FastStream(StockStream):  # type: ignore[misc]
        """A SocketStream whose socket is a `FastSocket`. Its class may change back at any time, as its socket's."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("receive_some", "send_all"):  # a test double, say, which wants to be called
                self.__class__ = StockStream  # type: ignore[assignment]
            object.__setattr__(self, name, value)

        @enable_ki_protection
        @yielding(_stock_receive_some)
        def receive_some(self, max_bytes: int | None = None) -> Generator[Any, Any, Any]:
            size = DEFAULT_RECEIVE_SIZE if max_bytes is None else max_bytes
            socket: Any = self.socket
            if type(socket) is not FastSocket:
                return (yield from _stock_receive_some(self, max_bytes))
            trap = socket._place.begin_receive(socket._sock, size)
            try:
                if not trap:
                    data = yield from receive_otherwise(socket, size, trap)
                else:
                    data = yield trap
                    if type(data) is not bytes:
                        rest = finish_receive(socket, data)
                        del data  # its traceback may hold this frame
                        data = yield from rest
            except OSError:
                with translate_errors():
                    raise
            if data is NOT_DONE:
                data = yield from _stock_receive_some(self, max_bytes)
            return data

        # the same for the usual case, and otherwise that
        @enable_ki_protection
        @yielding(_stock_anext)
        def __anext__(self) -> Generator[Any, Any, Any]:
            socket: Any = self.socket
            trap = socket._place.begin_receive(socket._sock, MAX_RECEIVE) if type(socket) is FastSocket else None
            if not trap:
                data = yield from self.receive_some()
            else:
                data = yield trap
                if type(data) is not bytes:
                    rest: Any = _finish_receive(socket, data)
                    del data  # its traceback may hold this frame
                    data = yield from rest
            if not data:
                raise StopAsyncIteration
            return data

        @enable_ki_protection
        @yielding(_stock_send_all)
        def send_all(self, data: Any) -> Generator[Any, Any, Any]:
            socket: Any = self.socket
            detector = self._send_conflict_detector
            if (
                type(socket) is not FastSocket
                or type(data) is not bytes
                or not data
                or socket._did_shutdown_SHUT_WR
                or detector._held
            ):
                return (yield from _stock_send_all(self, data))
            trap = socket._place.begin_send(socket._sock, data)
            detector._held = True  # what "with detector:" does, in a fifth of the time
            try:
                if not trap:
                    sent = yield from send_otherwise(socket, data, trap)
                    if sent is NOT_DONE:
                        sent = 0
                else:
                    sent = yield trap
                    if type(sent) is not int:
                        rest: Any = finish_send(socket, data, sent)
                        del sent  # its traceback may hold this frame
                        sent = yield from rest
                if sent < len(data):
                    rest = _send_from(self, sent, data)
                    yield from rest
            except OSError:
                with translate_errors():
                    raise
            finally:
                detector._held = False

finally:
    StockStream.__init_subclass__ = _forbid_subclasses  # type: ignore[method-assign]


@enable_ki_protection
async def _finish_receive(socket: FastSocket, sent: Any) -> Any:
    rest = finish_receive(socket, sent)
    del sent
    try:
        return await rest
    except OSError:
        with translate_errors():
            raise


async def _send_from(stream: StockStream, start: int, data: bytes) -> None:
    with memoryview(data) as view:
        while start < len(data):
            with view[start:] as rest:
                start += await stream.socket.send(rest)


# so that nobody sees another name in a repr or a traceback
FastStream.__name__ = StockStream.__name__
FastStream.__qualname__ = StockStream.__qualname__
FastStream.__module__ = StockStream.__module__
