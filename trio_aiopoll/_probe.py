"""Whether aiopoll is available here; if not, why not and what to do about it."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ._ring import READABLE, Polls, RingLost, key_of, refused
from ._trio_compat import missing_names

_BUDGET: Final = Path("/proc/sys/fs")


class UnavailableError(RuntimeError):
    """aiopoll was asked for and cannot be served; the message says what failed, how, and what to do."""


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found.

    Attributes:
      available: whether a run on aiopoll would work at this moment.
      reason: if not, what failed, how, and what to do; otherwise None.
    """

    available: bool
    reason: str | None


def aio_budget() -> tuple[int, int] | None:
    """How many AIO requests the whole host has set aside and how many it may (fs.aio-nr, fs.aio-max-nr), or None where
    /proc does not say."""
    try:
        return int((_BUDGET / "aio-nr").read_text()), int((_BUDGET / "aio-max-nr").read_text())
    except (OSError, ValueError):
        return None


def _advice(call: str, code: int) -> str:
    if code == errno.EAGAIN and call == "io_setup":
        budget = aio_budget()
        spent = "" if budget is None else f" ({budget[0]} of {budget[1]} in use)"
        return (
            f"the host's AIO budget is spent{spent}; raise it on the host with 'sysctl -w fs.aio-max-nr=1048576', "
            "or stop what uses it"
        )
    if code == errno.EPROTO:
        return "the kernel's AIO ring has an unknown magic or layout; this emulated kernel cannot be used"
    if code in (errno.EPERM, errno.EACCES):
        return "a seccomp filter or another sandbox forbids it; allow the io_* calls of Linux AIO there"
    if code == errno.ENOSYS:
        return "this kernel, or what emulates it, has no AIO (CONFIG_AIO)"
    if code == errno.EINVAL:
        return "this kernel, or what emulates it, cannot poll through AIO; Linux 4.19 or later can"
    if code in (errno.ENOMEM, errno.EAGAIN):
        return "the kernel is short of memory for it; try again, or free some"
    if code in (errno.EMFILE, errno.ENFILE):
        return "there are no file descriptors left; raise the limit (ulimit -n)"
    if code == errno.ETIMEDOUT:
        return "a cancelled poll never completed; this kernel, or what emulates it, cannot be used"
    return "this is not an answer that Linux is known to give; please report it"


def unavailable(call: str, code: int) -> UnavailableError:
    """The error for a system call that failed with the errno ``code``."""
    name = errno.errorcode.get(code, str(code))
    return UnavailableError(
        f"aiopoll is not available: {call}() failed with {name} ({os.strerror(code)}): {_advice(call, code)}. "
        "io_manager='auto' falls back to epoll where aiopoll is not available."
    )


def _try_everything(polls: Polls) -> None:
    """Use each of the system calls once, for real."""
    try:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unavailable("pipe2", error.errno or 0) from None
    try:
        key = key_of(reader, READABLE)
        call = "io_submit"
        items = polls.tick([key], 0)
        if items:
            raise unavailable(call, refused(items[0])[1] if items[0] < 0 else errno.EPROTO)
        call = "io_cancel"
        polls.cancel([key])
        call = "io_getevents"
        if polls.tick((), 1e-4):  # long enough to be worth a call
            raise unavailable(call, errno.EPROTO)
        os.write(writer, b"x")
        call = "io_submit"
        if polls.tick([key], 1) != [key]:
            raise unavailable(call, errno.EPROTO)
    except RingLost as lost:
        raise unavailable(call, lost.errno) from None
    finally:
        os.close(reader)
        os.close(writer)


_no_gil = hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled()
_proven = False


def require_support() -> None:
    """Refuse what no kernel could make good.

    Raises:
      UnavailableError: this Trio lacks a private name that we use, or this CPython has no GIL.
    """
    if missing_names:
        raise UnavailableError(
            f"aiopoll is not available: this Trio lacks {', '.join(missing_names)}; "
            "use a version of Trio that trio_aiopoll supports, or a newer trio_aiopoll"
        )
    if _no_gil:
        raise UnavailableError(
            "aiopoll is not available: this is CPython without its GIL, on which it has not been proven; "
            "run with PYTHON_GIL=1, or use io_manager='epoll'"
        )


def open_polls(own_fd: int = -1) -> Polls:
    """Polls that work; the first of a process are tried out before anybody relies on them.

    Args:
      own_fd: see `Polls`.

    Raises:
      UnavailableError: there are none to be had.
    """
    global _proven
    require_support()
    try:
        polls = Polls(own_fd)
    except OSError as error:
        raise unavailable(str(error.filename), error.errno or 0) from None
    if not _proven:
        try:
            _try_everything(polls)
        except BaseException:
            polls.close()
            raise
        _proven = True
    return polls


def probe() -> ProbeResult:
    """Find out whether aiopoll is available here and now, by using it.

    Never raises for an answer of the kernel; ``reason`` is what `UnavailableError` would say.
    """
    try:
        polls = open_polls()
    except UnavailableError as error:
        return ProbeResult(False, str(error))
    try:
        _try_everything(polls)
    except UnavailableError as error:
        return ProbeResult(False, str(error))
    finally:
        polls.close()
    return ProbeResult(True, None)
