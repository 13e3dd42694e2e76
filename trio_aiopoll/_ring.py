"""The Python face of the C core: polls by key, their errors as exceptions."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final, Protocol, cast

from . import _ring_ffi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    # cffi's objects have no types that a checker could use
    PollsPointer: TypeAlias = object

READABLE: Final = 0
WRITABLE: Final = 1

_RESUME: Final = -1  # POLLS_RESUME
_INTERRUPTIONS: Final = 1000
_AT_ONCE_NS: Final = 20_000


class _StatisticsStruct(Protocol):
    in_flight: int
    capacity: int
    rings: int
    submit_calls: int
    submitted: int
    taken: int
    waited: int
    blocking_calls: int
    cancels: int


class _Lib(Protocol):
    """What _polls.h and _pool.h declare."""

    def polls_open(self, own_fd: int, error: object) -> PollsPointer: ...
    def polls_tick(self, polls: PollsPointer, keys: Sequence[int] | object, count: int, timeout_ns: int) -> int: ...
    def polls_is_idle(self, polls: PollsPointer) -> int: ...
    def polls_set_busy_poll(self, polls: PollsPointer, busy_poll_ns: int) -> None: ...
    def polls_out(self, polls: PollsPointer) -> object: ...
    def polls_cancel(self, polls: PollsPointer, keys: Sequence[int], count: int) -> int: ...
    def polls_catch_up(self, polls: PollsPointer) -> int: ...
    def polls_close(self, polls: PollsPointer) -> None: ...
    def polls_destroy(self, polls: PollsPointer) -> int: ...
    def polls_free(self, polls: PollsPointer) -> None: ...
    def polls_get_statistics(self, polls: PollsPointer, statistics: _StatisticsStruct) -> None: ...
    def pool_idle_count(self) -> int: ...


class _FFI(Protocol):
    NULL: object

    def new(self, ctype: object) -> object: ...
    def typeof(self, cdecl: str) -> object: ...
    def unpack(self, cdata: object, length: int) -> list[int]: ...


lib: Final = cast("_Lib", _ring_ffi.lib)
ffi: Final = cast("_FFI", _ring_ffi.ffi)

_tick = lib.polls_tick
_is_idle = lib.polls_is_idle
_out = lib.polls_out
_unpack = ffi.unpack
_NULL: Final = ffi.NULL  # cffi takes it for an array sooner than an empty sequence
_INT_POINTER: Final = ffi.typeof("int *")


class RingLost(Exception):
    """AIO does not work any more for these polls; all that can be done with them is `Polls.destroy`.

    ``errno`` says why: `errno.ECHILD` in a forked child, `errno.ESHUTDOWN` after `Polls.close`, otherwise what the
    kernel answered.
    """

    def __init__(self, error: int) -> None:
        super().__init__(os.strerror(error))
        self.errno = error


def key_of(fd: int, direction: int) -> int:
    """The name of the poll for ``fd`` in ``direction`` (`READABLE` or `WRITABLE`)."""
    return fd * 2 + direction


def refused(item: int) -> tuple[int, int]:
    """The key and the errno that a negative item of `Polls.tick` stands for."""
    packed = -item - 1
    return packed >> 12, packed & 0xFFF


class Polls:
    """One-shot readiness polls on AIO rings. See ``_polls.h`` for who may call what, and when.

    Args:
      own_fd: a descriptor that may be polled although it is neither a socket nor a pipe.

    Raises:
      OSError: io_setup() failed; ``errno`` says how. `errno.EPROTO`: it made a ring of an unknown kind.
    """

    __slots__ = ("_pointer",)

    def __init__(self, own_fd: int = -1) -> None:
        self._pointer: PollsPointer = ffi.NULL
        error = ffi.new(_INT_POINTER)
        pointer = lib.polls_open(own_fd, error)
        if pointer == ffi.NULL:
            code = -cast("list[int]", error)[0]
            raise OSError(code, os.strerror(code), "io_setup")
        self._pointer = pointer

    def __del__(self) -> None:
        # Not by ffi.gc(): if a whole run is collected as garbage, its tasks are closed, which cancels waits, and that
        # may be before or after this. For the C core, NULL is closed polls.
        pointer, self._pointer = self._pointer, ffi.NULL
        lib.polls_free(pointer)

    def tick(self, keys: Sequence[int], timeout: float) -> list[int]:
        """Submit a poll for each key, then return what has completed; if nothing has, block for ``timeout`` seconds.

        Each item of the result is a key whose poll has completed, or negative: see `refused`. The result is empty only
        if the timeout has passed.

        Raises:
          RingLost: it is unknown which of the keys were submitted.
        """
        pointer = self._pointer
        count = _tick(pointer, keys or _NULL, len(keys), int(timeout * 1e9))
        if count < 0:
            count = self._after_signal(count)
        return _unpack(_out(pointer), count) if count else []

    def is_idle(self) -> bool:
        """Whether ``tick((), 0)`` would have nothing to do. To ask takes a third of the time."""
        return bool(_is_idle(self._pointer))

    def _after_signal(self, count: int) -> int:
        # Python has run the signal's handler by the time the loop comes round. If there is no signal, but something
        # that answers EINTR in the kernel's place, no time passes either.
        at_once = 0
        while count == -errno.EINTR and at_once < _INTERRUPTIONS:
            began = time.monotonic_ns()
            count = _tick(self._pointer, (), 0, _RESUME)
            at_once = at_once + 1 if time.monotonic_ns() - began < _AT_ONCE_NS else 0
        if count < 0:
            raise RingLost(-count)
        return count

    def set_busy_poll(self, busy_poll: float) -> None:
        """Have `tick` watch the ring for ``busy_poll`` seconds before it lets the thread sleep."""
        lib.polls_set_busy_poll(self._pointer, int(busy_poll * 1e9))

    def cancel(self, keys: Sequence[int]) -> None:
        """End the polls of these keys; keys that have none are passed over.

        On return none of them will be reported by `tick`, and the kernel holds neither their files nor those of polls
        that were cancelled earlier.

        Raises:
          RingLost: the kernel would not do it.
        """
        result = lib.polls_cancel(self._pointer, keys, len(keys))
        if result < 0:
            raise RingLost(-result)

    def catch_up(self) -> bool:
        """Wait for the events of all files that are ready at this moment; whether `tick` has something to report.

        Takes time in proportion to the polls in flight.
        """
        return lib.polls_catch_up(self._pointer) > 0

    def close(self) -> None:
        """End all polls and leave the rings to the next `Polls`."""
        lib.polls_close(self._pointer)

    def destroy(self) -> None:
        """End all polls by destroying the rings, which takes tens of milliseconds but needs nobody's consent.

        Raises:
          OSError: io_destroy() failed, and the kernel goes on holding the files until they are ready.
        """
        result = lib.polls_destroy(self._pointer)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "io_destroy")

    def statistics(self) -> _StatisticsStruct:
        statistics = cast("_StatisticsStruct", ffi.new("struct polls_statistics *"))
        lib.polls_get_statistics(self._pointer, statistics)
        return statistics
