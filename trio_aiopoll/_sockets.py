"""What Trio's socket objects become on an aiopoll run: the same operations, which the tick performs where that pays."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Final

from trio.lowlevel import enable_ki_protection

from ._coroutines import yielding
from ._ring import READABLE, WRITABLE
from ._transfers import MAX_RECEIVE
from ._trio_compat import GLOBAL_RUN_CONTEXT, NOT_DONE, WOULD_BLOCK, StockSocket, at_once

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from ._batch import Place
    from ._io_manager import AiopollIOManager

_stock_recv: Final[Any] = StockSocket.recv
_stock_send: Final[Any] = StockSocket.send
_MISSING: Final = object()

# Control-C raises KeyboardInterrupt in the middle of any Python code that does not refuse it, and Trio's own waits do
# refuse it. So must whoever has handed over an operation, or taken one from others, and has not yet done the rest.


def manager_or_none() -> AiopollIOManager | None:
    """The manager of the run that we are in, if it has what a fast socket needs."""
    try:
        manager: Any = GLOBAL_RUN_CONTEXT.runner.io_manager
    except AttributeError:
        return None
    return manager if hasattr(manager, "begin_receive") else None


def _perform_queued(socket: StockSocket) -> None:
    manager = manager_or_none()
    if manager is not None:
        manager.perform_transfers_of(socket._sock.fileno())


@enable_ki_protection
@types.coroutine
def _retry(wait: Callable[[Any], Any], sock: Any, function: Callable[..., Any], *args: Any) -> Generator[Any, Any, Any]:
    """What follows where ``function(*args)`` would have blocked."""
    while True:
        yield from wait(sock)
        try:
            return function(*args)
        except BlockingIOError:
            continue


@enable_ki_protection
@types.coroutine
def receive_otherwise(socket: FastSocket, max_bytes: int, answer: object) -> Generator[Any, Any, Any]:
    """Receive on a socket whose place did not begin it, but gave ``answer`` (see `Place.begin_receive`): by the tick
    if the manager does, or else at once, after a wait if need be. `NOT_DONE`: nothing was received and it was no
    checkpoint."""
    manager = manager_or_none()
    if manager is None or type(socket) is not FastSocket or type(max_bytes) is not int or max_bytes <= 0:
        return NOT_DONE
    sock = socket._sock
    trap = None
    if answer is None:
        trap = manager.begin_receive(socket, max_bytes)
        if not trap:
            manager.perform_transfers_of(sock.fileno())
    if not trap:
        data = yield from at_once(sock.recv, max_bytes)
        if data is WOULD_BLOCK:
            data = yield from _retry(manager.wait_readable, sock, sock.recv, max_bytes)
        elif data is NOT_DONE:
            return NOT_DONE
        socket._place.received(len(data))
    else:
        data = yield trap
        if type(data) is not bytes:
            rest = finish_receive(socket, data)
            del data  # its traceback may hold this frame
            data = yield from rest
    return data


@enable_ki_protection
@types.coroutine
def finish_receive(socket: FastSocket, sent: Any) -> Generator[Any, Any, bytes]:
    """What a task does whose receive the tick has begun, and that was sent something else than data."""
    sock = socket._sock
    manager: Any = GLOBAL_RUN_CONTEXT.runner.io_manager
    try:
        manager.finish_transfer(sock.fileno(), READABLE, sent)
    finally:
        del sent  # its traceback holds this frame
    try:
        return sock.recv(MAX_RECEIVE)
    except BlockingIOError:
        pass
    return (yield from _retry(manager.wait_readable, sock, sock.recv, MAX_RECEIVE))  # type: ignore[no-any-return]


@enable_ki_protection
@types.coroutine
def send_otherwise(socket: FastSocket, data: bytes | memoryview, answer: object) -> Generator[Any, Any, Any]:
    """The same for sending; what is sent at once is as much as the socket takes."""
    manager = manager_or_none()
    if manager is None or type(socket) is not FastSocket or type(data) not in (bytes, memoryview):
        return NOT_DONE
    sock = socket._sock
    trap = None
    if answer is None:
        trap = manager.begin_send(socket, data)
        if not trap:
            manager.perform_transfers_of(sock.fileno())
    if not trap:
        sent = yield from at_once(sock.send, data)
        if sent is WOULD_BLOCK:
            sent = yield from _retry(manager.wait_writable, sock, sock.send, data)
        return sent
    sent = yield trap
    if type(sent) is not int:
        rest = finish_send(socket, data, sent)
        del sent  # its traceback may hold this frame
        sent = yield from rest
    return sent


@enable_ki_protection
@types.coroutine
def finish_send(socket: FastSocket, data: bytes | memoryview, sent: Any) -> Generator[Any, Any, int]:
    """What a task does whose send the tick has begun, and that was sent something else than a count."""
    sock = socket._sock
    manager: Any = GLOBAL_RUN_CONTEXT.runner.io_manager
    try:
        manager.finish_transfer(sock.fileno(), WRITABLE, sent)
    finally:
        del sent  # its traceback holds this frame
    try:
        return sock.send(data)
    except BlockingIOError:
        pass
    return (yield from _retry(manager.wait_writable, sock, sock.send, data))  # type: ignore[no-any-return]


class Nowhere:
    """The `Place` of a socket that has none."""

    def begin_receive(self, *_: object) -> None:
        """Nothing begins."""

    def begin_send(self, *_: object) -> None:
        """Nothing begins."""

    def received(self, *_: object) -> None:
        """Nothing is remembered."""


NOWHERE: Final = Nowhere()


def be_without_place(socket: StockSocket) -> None:
    """Give a socket what it has to have as a `FastSocket`."""
    vars(socket).update(_place=NOWHERE, _is_duplicated=False)


class FastSocket(StockSocket):
    """Trio's socket. On a run that is not aiopoll, to which such a socket may come, it works too.

    Its class may change back at any time, so its methods name Trio's class where others would say ``super()``.
    """

    # These two are in every instance; see be_without_place(). With a value for them in the class as well, CPython would
    # look into both each time.
    _place: Place | Nowhere
    """What begins a receive or a send that is left to the tick, for those who know that it is a fast socket's."""
    _is_duplicated: bool
    """Whether the socket has a second number, by which something may be sent or received in the same tick."""

    # for who makes one of its own accord: type(socket)(sock), or of a subclass
    def __new__(cls, *_: object, **__: object) -> FastSocket:  # noqa: PYI034  (Self came with Python 3.11)
        self = object.__new__(cls)
        self.__dict__ = {}  # see _fast_classes.py
        be_without_place(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("recv", "send", "_nonblocking_helper"):  # a test double, say, which wants to be called
            _perform_queued(self)  # Trio's methods would overtake it
            self.__class__ = StockSocket  # type: ignore[assignment]
            self._place = NOWHERE  # for who has bound a method of ours
        object.__setattr__(self, name, value)

    # Trio's take *args and **kwargs, but to make a tuple and a dict for them would be a fifth of what is done here. Of
    # keywords, recv() and send() take none anyway.
    @enable_ki_protection
    @yielding(_stock_recv)
    def recv(self, max_bytes: Any = _MISSING, /, *more: Any) -> Generator[Any, Any, Any]:
        if not more:
            trap = self._place.begin_receive(self._sock, max_bytes)
            if trap:
                data = yield trap
                if type(data) is bytes:
                    return data
                rest = finish_receive(self, data)
                del data  # its traceback may hold this frame
            else:
                rest = receive_otherwise(self, max_bytes, trap)
            data = yield from rest
            if data is not NOT_DONE:
                return data
        args = () if max_bytes is _MISSING else (max_bytes, *more)
        return (yield from _stock_recv(self, *args))

    @enable_ki_protection
    @yielding(_stock_send)
    def send(self, data: Any = _MISSING, /, *more: Any) -> Generator[Any, Any, Any]:
        if not more:
            trap = self._place.begin_send(self._sock, data)
            if trap:
                sent = yield trap
                if type(sent) is int:
                    return sent
                rest = finish_send(self, data, sent)
                del sent  # its traceback may hold this frame
            else:
                rest = send_otherwise(self, data, trap)
            sent = yield from rest
            if sent is not NOT_DONE:
                return sent
        args = () if data is _MISSING else (data, *more)
        return (yield from _stock_send(self, *args))

    # What all operations but connect() go through.
    @enable_ki_protection
    async def _nonblocking_helper(
        self,
        wait_fn: Callable[[Any], Awaitable[None]],
        fn: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _perform_queued(self)
        sock = self._sock
        if kwargs:
            return await StockSocket._nonblocking_helper(self, wait_fn, fn, *args, **kwargs)
        result = await at_once(fn, sock, *args)
        if result is NOT_DONE:
            return await StockSocket._nonblocking_helper(self, wait_fn, fn, *args)
        while result is WOULD_BLOCK:
            await wait_fn(sock)
            try:
                return fn(sock, *args)
            except BlockingIOError:
                continue
        return result

    ################
    # What must not overtake what tasks have asked this socket to do
    ################

    def __exit__(self, *exc_info: object) -> None:  # closes without notify_closing
        _perform_queued(self)
        StockSocket.__exit__(self, *exc_info)  # type: ignore[arg-type]

    # the last thing that connect() awaits before it connects, while others may have begun something
    async def _resolve_address_nocp(self, *args: Any, **kwargs: Any) -> Any:
        address = await StockSocket._resolve_address_nocp(self, *args, **kwargs)
        _perform_queued(self)
        return address

    def shutdown(self, flag: int) -> None:
        _perform_queued(self)
        StockSocket.shutdown(self, flag)

    def detach(self) -> int:
        _perform_queued(self)
        return StockSocket.detach(self)

    def is_readable(self) -> bool:
        _perform_queued(self)
        return StockSocket.is_readable(self)

    def getsockopt(self, *args: Any) -> Any:  # SO_ERROR takes the error that a receive should get
        _perform_queued(self)
        return StockSocket.getsockopt(self, *args)

    def setsockopt(self, *args: Any) -> None:
        _perform_queued(self)
        StockSocket.setsockopt(self, *args)

    def dup(self) -> Any:
        # Two numbers for one socket: what is done by the one knows nothing of what waits for the tick by the other.
        _perform_queued(self)
        duplicate: Any = StockSocket.dup(self)
        self._is_duplicated = duplicate._is_duplicated = True
        self._place = NOWHERE
        return duplicate


# so that nobody sees another name in a repr or a traceback
FastSocket.__name__ = StockSocket.__name__
FastSocket.__qualname__ = StockSocket.__qualname__
FastSocket.__module__ = StockSocket.__module__
