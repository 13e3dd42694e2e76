"""What tasks have asked their sockets to receive and to send since the last tick, and the calls that do all of it."""

from __future__ import annotations

import errno
import os
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import outcome

from ._ring import ffi, lib
from ._trio_compat import make_runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from socket import socket as stdlib_socket

    import trio

    Blocked: TypeAlias = list[tuple[int, trio.lowlevel.Task]]

MAX_RECEIVE: Final = 65536
"""Bytes; how much a receive asks for. It is what Trio's streams ask for."""
MAX_SEND: Final = 4096
"""Bytes; the most that one send may have, because all are copied into one piece of memory for the call."""

# Each receive needs room for all that it has asked for. Used from the front, so of most ticks only a few pages.
_ARENA: Final = 8 * MAX_RECEIVE
_AT_ONCE: Final = 256
_EAGAIN: Final = -errno.EAGAIN

_RESULTS: Final = ffi.typeof(f"int64_t[{_AT_ONCE}]")
_allocate: Final = ffi.new_allocator(should_clear_after_alloc=False)


class Transfers:
    """The receives and sends that the next tick is to try, by the key of the poll that would follow (see `key_of`).

    Each names its socket, not only the descriptor: whoever closes a socket behind our back may have its number pass to
    another one before the tick, and that one's bytes are not ours. A closed socket knows that it is.

    Attributes:
      receivers: {key: (the task that waits for data, its socket)}.
      senders: {key: (the task that waits for the count, its socket, the data)}.
      sends_first: whether all sends come before all receives; None: as it is best.
      performed: how many so far have not had to wait.
    """

    __slots__ = ("_arena", "_results", "_slice_of_arena", "performed", "receivers", "senders", "sends_first")

    def __init__(self) -> None:
        self.receivers: dict[int, tuple[trio.lowlevel.Task, stdlib_socket]] = {}
        self.senders: dict[int, tuple[trio.lowlevel.Task, stdlib_socket, bytes]] = {}
        self.sends_first: bool | None = None
        self.performed = 0
        # made when they are first needed
        self._results: object = None
        self._arena: object = None
        self._slice_of_arena: Callable[[slice], bytes] | None = None

    def perform(self) -> Blocked:
        """Try each operation once, and make its task runnable with what came of it: bytes, a count, or an Error.

        Returns the keys and tasks of those that would block. They are nobody's now.
        """
        blocked: Blocked = []
        if self._results is None:
            self._results = ffi.new(_RESULTS)
        sends_first, self.sends_first = self.sends_first is not False, None
        if self.senders and sends_first:
            self._perform_sends(blocked)
        if self.receivers:
            self._perform_receives(blocked)
        if self.senders:
            self._perform_sends(blocked)
        return blocked

    def _perform_sends(self, blocked: Blocked) -> None:
        keys = list(self.senders)
        tasks, sockets, data = zip(*self.senders.values(), strict=True)
        self.senders.clear()
        for start in range(0, len(keys), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            results = self._send(sockets[part], data[part])
            self._settle(keys[part], tasks[part], results, results, blocked)

    def _perform_receives(self, blocked: Blocked) -> None:
        keys = list(self.receivers)
        tasks, sockets = zip(*self.receivers.values(), strict=True)
        self.receivers.clear()
        start = 0
        while start < len(keys):
            results = self._receive(sockets[start : start + _AT_ONCE])
            part = slice(start, start + len(results))
            self._settle(keys[part], tasks[part], results, self._received(results), blocked)
            start += len(results)

    def _send(self, sockets: Sequence[stdlib_socket], data: Sequence[bytes]) -> list[int]:
        fds = [socket.fileno() for socket in sockets]
        lib.transfer_send(fds, list(map(len, data)), len(fds), b"".join(data), self._results)
        return ffi.unpack(self._results, len(fds))

    def _receive(self, sockets: Sequence[stdlib_socket]) -> list[int]:
        """Receives for as many of the sockets as there is room for: one at least."""
        if self._arena is None:
            self._arena = _allocate(f"char[{_ARENA}]")
            self._slice_of_arena = ffi.buffer(self._arena).__getitem__
        fds = [socket.fileno() for socket in sockets]
        done = lib.transfer_receive(fds, len(fds), MAX_RECEIVE, self._arena, _ARENA, self._results)
        return ffi.unpack(self._results, done)

    def _received(self, results: Sequence[int]) -> Iterable[bytes]:
        sizes = results if min(results) >= 0 else [max(size, 0) for size in results]
        ends = list(accumulate(sizes))
        return map(cast("Callable[[slice], bytes]", self._slice_of_arena), map(slice, [0, *ends], ends))

    def _settle(
        self,
        keys: Sequence[int],
        tasks: Sequence[trio.lowlevel.Task],
        results: Sequence[int],
        values: Iterable[Any],
        blocked: Blocked,
    ) -> None:
        if min(results) >= 0:
            self.performed += len(results)
            make_runnable(values, tasks)
            return
        done_tasks: list[trio.lowlevel.Task] = []
        done_values: list[Any] = []
        for key, task, result, value in zip(keys, tasks, results, values, strict=False):
            if result == _EAGAIN:
                blocked.append((key, task))
                continue
            done_tasks.append(task)
            done_values.append(value if result >= 0 else outcome.Error(OSError(-result, os.strerror(-result))))
        self.performed += len(done_tasks)
        make_runnable(done_values, done_tasks)
