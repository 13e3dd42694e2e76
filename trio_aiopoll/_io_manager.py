"""Trio's I/O manager on AIO polls."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import stat
import types
from dataclasses import dataclass
from functools import partial
from socket import SOCK_STREAM
from socket import socket as stdlib_socket
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import outcome
import trio

from ._batch import Batch, Place
from ._probe import open_polls, require_support
from ._ring import READABLE, WRITABLE, RingLost, key_of, refused
from ._transfers import LARGE_RECEIVE, MAX_COPY, MAX_RECEIVE, MAX_SEND, with_errors
from ._trio_compat import (
    GLOBAL_RUN_CONTEXT,
    IS_RUNNABLE,
    EpollLane,
    current_task_or_none,
    entry_queue_wakeup,
    is_guest_run,
    is_in_run,
    is_runnable,
    looks_for_idleness,
    make_runnable,
    make_trap,
    missing_names_for_sockets,
    run_context,
    run_queue,
    runnable_tasks,
    use_quick_instruments,
    wake,
)

_fast_classes: types.ModuleType | None = None
if not missing_names_for_sockets:
    _fast_classes = importlib.import_module("._fast_classes", __package__)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
    from typing import Protocol

    from ._ring import Polls
    from ._sockets import FastSocket
    from ._trio_compat import WaitTaskRescheduled, WakeupSocketpair

    class HasFileno(Protocol):
        def fileno(self) -> int: ...


logger: Final = logging.getLogger("trio_aiopoll")

EAGER_CANCELS: Final = 32

# A receive that is all there is to do in its tick, as with a single connection, mostly has to wait. If this socket's
# last one had to (so it is no listener, for which a poll waits where recv() fails), only one of so many is tried first;
# for the others the poll is armed without, which finds what is there as well.
LONE_RECEIVES: Final = 8

# What get_events returns if no poll has completed and the timeout has not expired, because tasks are runnable.
_NO_KEYS: Final = [1 << 40]
_NO_EVENTS: Final[list[Any]] = []


@dataclass(frozen=True)
class AiopollStatistics:
    """What ``trio.lowlevel.current_statistics().io_statistics`` is on an aiopoll run. All but ``backend`` are counts.

    Attributes:
      tasks_waiting_read: tasks in `trio.lowlevel.wait_readable`, in either lane.
      tasks_waiting_write: tasks in `trio.lowlevel.wait_writable`, in either lane.
      polls_in_flight: polls that the kernel holds, those of the manager itself included.
      capacity: how many the present rings hold; more rings are added as needed.
      rings: AIO rings in use.
      epoll_lane_waits: of the waiting tasks, those that wait on Trio's own epoll.
      submit_calls: io_submit() calls so far.
      polls_submitted: polls that these calls armed.
      events_taken: completions so far that were read from a ring without a system call.
      events_waited: completions that a blocking call brought back.
      blocking_calls: io_getevents() calls so far, which is how often the run slept.
      cancels: polls cancelled so far.
      transfers: receives and sends so far that the tick performed for tasks.
    """

    tasks_waiting_read: int
    tasks_waiting_write: int
    polls_in_flight: int
    capacity: int
    rings: int
    epoll_lane_waits: int
    submit_calls: int
    polls_submitted: int
    events_taken: int
    events_waited: int
    blocking_calls: int
    cancels: int
    transfers: int
    backend: Literal["aiopoll"] = "aiopoll"


# Some facts about AIO polls
# --------------------------
#
# Since 2018 Linux can poll as an AIO operation. io_submit() takes an array of
# requests, each "tell me, once, when this file is readable", so one system
# call arms as many waits as a tick of the scheduler has produced. What becomes
# of them the kernel writes into a ring in memory that it shares with us, so to
# look at it costs no system call at all. Sleeping until something happens is
# one call again, io_getevents(). With epoll, every wait is an epoll_ctl() of
# its own, and every look an epoll_wait().
#
# Nothing comes for free, though. An epoll instance holds weak references: it
# forgets a file that is closed. A poll in flight is a strong one, so:
#
# - while we wait for a socket, close() closes the descriptor but not the
#   socket. The peer sees no EOF, a listener keeps its port, and goes on
#   accepting. So whoever closes a file must have its polls ended first, and
#   Trio has just the hook for it: notify_closing.
#
# - the same holds for a wait that was cancelled, because the task will often
#   go on and close the file. io_cancel() only begins to end a poll: the end
#   is an event like any other, which a worker thread of the kernel delivers
#   some microseconds later, and until then the file is held.
#
# Polls live in a budget that all of the host shares (fs.aio-max-nr), and in
# rings of limited size. And some files cannot be polled like this. The kernel
# refuses those that sleep on two wait queues at once, ttys for instance.
# Worse, it takes a signalfd without complaint and never reports it, because
# the poll is looked at by a thread with other signals than ours.
#
#
# What does this mean for Trio?
# -----------------------------
#
# We keep Trio's own epoll manager underneath, as a second lane, by inheriting
# from it. The ring lane serves sockets and pipes, which is where the speed is
# wanted. Any other kind of file, any file that the kernel refuses, and any wait
# that finds the budget spent, goes to the epoll lane and behaves as on stock
# Trio because it *is* stock Trio. The epoll instance is a file that can be
# polled, so a poll on it in the ring, from when it first has something to wait
# for, lets one blocking call wait for both lanes. Should AIO fail in the middle
# of a run (a sandbox closes behind us, or the process forks and the child goes
# on), all waits move over to the epoll lane. Nothing is lost by that: epoll
# reports what is ready, not what changed.
#
# A wait is named by its key, an int: twice the file descriptor, plus one for
# writing. It goes through these places:
#
#     wait_readable ──> pending ──> in flight ──> [key, ...] ──> task rescheduled
#                       (a list)    (the C core)   get_events    process_events
#
# and at each of them it can be cancelled. `_tasks` is the one truth about who
# waits: an event for a key that is not in there is nobody's, and is dropped.
#
# A cancelled wait must have let go of its file when its task goes on. Trio
# offers two moments for it: when it calls the abort function, and when it
# resumes the task. The first is the better one, because who cancels a wait may
# close its file in the same breath, and need not even tell us: nobody waits
# for it any more. But if a thousand tasks are cancelled at once, a thousand
# round trips to the worker thread would cost more than all else. So the first
# few of a tick are ended at once; of the others the abort functions just
# collect the keys, and the first task to be resumed has all of them ended in
# one call. A new wait with the same key is not misled meanwhile: it is
# submitted in get_events, which ends cancelled polls first.
#
# One cancelled wait may keep its file: Trio's own, for calls from other threads,
# which Trio cancels when all else is over. Its poll is completed in close(), by
# such a call, without the round trip.
#
# It follows that when a poll is in flight, it has a waiting task or a task
# about to resume. That is the whole defence against stale events: a key is
# never submitted while an earlier poll of that key is in flight.
#
# File descriptors are reused, also behind our back. Whether a descriptor may
# use the ring lane is asked once, unless a socket object was given (fstat costs
# more than all else in a wait), and remembered until notify_closing. If somebody
# closes a socket without notify_closing and gets, say, a tty with the same
# number, the kernel refuses it, and we forget what we knew. Two kinds it does not
# refuse. What cannot be polled at all, a regular file for instance, it reports as
# ready at once, so the C core looks again at what completes in the tick that
# submits it. And for the sake of signalfd it has a second look at polls that stay
# in flight for long; see is_no_longer_pollable() and verify() in _polls.c.
#
#
# Receiving and sending
# ---------------------
#
# Polls are a tenth of what a request costs. On stock Trio a recv() is tried
# under five coroutines, and fails as a rule, with a BlockingIOError that has to
# be made; then comes the wait, a second recv(), and for a send() a checkpoint.
# So on our runs Trio's sockets and streams (_sockets.py, _streams.py) hand the
# operation itself over. It goes through these places:
#
#     recv ──> the batch ──> done in get_events ──────────────> task runnable
#              (_batch.c) └─> would block: pending ──> as a wait; then back to
#                             the batch, and done in process_events
#
# While it waits, `_tasks` has its place under the key, where a wait has its
# task; the place knows the task. If it comes to wait in the epoll lane, its
# task is woken as from any wait there, and does the operation itself.
#
# Each such socket has a place in the batch, to which its methods go without a
# detour over this file: two calls of Python for each message would be a tenth
# of what it costs. `_place_to_ask` is for when the place has no answer.
#
# get_events has C perform all of a tick's operations in a row and sends each
# task what came of its own. That is the checkpoint that the operation owes
# anyway, a cancelled operation has had no effect, and data is never without an
# owner: whose operation was performed is runnable, and nothing can cancel that.
#
# On stock Trio an operation is tried when it is called, and here a little
# later. Nobody should be able to tell: who comes between the two, and does
# something to the socket or cancels the task, has all operations performed
# first (perform_transfers). And whoever is watched by an instrument gets no
# transfers, because they would make Trio look idle when it is not. What is left
# to tell, by who goes around Trio's socket or looks at the other end within the
# same tick, stands in docs/semantics.md.
#
# Measured, for an echo of 64 bytes between 128 connections on loopback: the
# operations under Trio's coroutines 19 us; at once, with less around them, 11;
# by C for all of a tick 7.6. Of that the kernel takes 5 and two steps of Trio's
# scheduler 1.6. The kernel is faster in a row, with its code in the caches, and
# recv() need not get and give back 64 KiB of memory each time. A send alone in
# its tick gains nothing by it and is done at once (CROWD in _batch.c), as is a
# very large one (MAX_SEND). IOCB_CMD_PREAD and PWRITE on the ring save the
# kernel's entries but add an event each: 2.99 us for what recv() in C does in
# 2.71 and socket.recv() in 2.96. They would also have data arrive for tasks
# that were cancelled meanwhile. To try what blocked once more in the next tick,
# before there is a poll for it, gains nothing: where much blocks, it is because
# the peers are slower than we are. Nor does it to hold sends back for a tick,
# so that those of all tasks come together: peers sleep less often for it, but
# have not answered yet when they are looked at, and streams take 13 % longer.
#
#
# Which thread may touch what
# ---------------------------
#
# Everything here belongs to Trio's thread. In guest mode there is one more:
# get_events(timeout > 0) runs in a worker thread while the host's code, on
# Trio's thread, may cancel scopes and close files. Trio has by then called
# get_events(0) on its own thread, so `_pending` is empty and stays empty while
# the worker thread is in there, because only tasks and process_events add to
# it. That leaves the C core as what both may enter, and it has a lock. Events
# that the worker thread brings back are looked up in `_tasks` only later, in
# process_events, on Trio's thread.
#
#
# Why the wait is so terse
# ------------------------
#
# A wait costs a few microseconds, nearly all of it Python. So it is one
# generator instead of four nested coroutines; what it yields to Trio is made
# once per key and kept (`_traps`); and a wake-up sends None, where Trio sends
# an Outcome that would have to be made and unwrapped. Anything but None is
# therefore news: an error, or somebody who called reschedule() himself.


class _Lost:
    """What get_events returns when AIO stopped working: process_events, on the right thread, deals with it."""

    def __init__(self, error: int) -> None:
        self.errno = error


def _make_wait(direction: int) -> Callable[[AiopollIOManager, int | HasFileno], Coroutine[Any, Any, None]]:
    @types.coroutine
    def wait(self: AiopollIOManager, fd: int | HasFileno) -> Generator[Any, Any, None]:
        file = fd
        if not isinstance(fd, int):
            fd = _fileno(fd)
        key = fd * 2 + direction
        trap = self._traps.get(key)
        if trap is None:
            trap = self._admit(key, file)
            if trap is None:
                self._lane_fds.add(fd)
                self._watch_lane()
                yield from self.lane_wait(fd, direction)
                return
        tasks = self._tasks
        if key in tasks:
            raise _busy()
        try:
            tasks[key] = self._context["task"]
        except KeyError:
            raise _no_task() from None
        self._pending.append(key)
        sent = yield trap
        if sent is not None:
            try:
                self._woken_otherwise(key)
                sent.unwrap()
            finally:
                del sent  # its traceback holds this frame

    return cast("Callable[[AiopollIOManager, int | HasFileno], Coroutine[Any, Any, None]]", wait)


def _busy() -> trio.BusyResourceError:
    return trio.BusyResourceError("another task is already reading / writing this fd")


def _no_task() -> RuntimeError:
    return RuntimeError("must be called from async context")


def _fileno(fd: HasFileno) -> int:
    # Trio takes an AttributeError from here for a call outside of trio.run(), and raises a RuntimeError that says so.
    # The type is kept, but let the message be true.
    try:
        fileno = fd.fileno()
    except AttributeError as error:
        raise RuntimeError(f"{fd!r} is neither a file descriptor nor has a fileno() that works: {error}") from None
    if not isinstance(fileno, int):
        raise TypeError(f"fileno() of {fd!r} returned {fileno!r}, not an int")
    return fileno


class AiopollIOManager(EpollLane):
    """A Trio I/O manager for Linux that waits by AIO polls; a drop-in for Trio's epoll manager, which it inherits from.

    Usually not made by hand: ``trio.run(main, io_manager="aiopoll")``.

    Args:
      busy_poll: seconds, at most 1, for which a run that has nothing to do watches the ring before it sleeps; 0 for not
        at all. Who watches need not be woken up, which saves some microseconds of latency at the price of a busy CPU:
        a run that waits often and long enough uses all of one. Python's signal handlers run only when the time is over.
        ``trio.run(main, io_manager=lambda: AiopollIOManager(busy_poll=50e-6))``
      fast_sockets: whether Trio's sockets and socket streams that are made in the run have their receives and sends
        performed by the tick, for all tasks at once, where that pays. They do the same, in less time.

    Raises:
      UnavailableError: there is no AIO here, or none left.
      ValueError: ``busy_poll`` is out of range.
    """

    def __init__(self, *, busy_poll: float = 0.0, fast_sockets: bool = True) -> None:
        if not 0 <= busy_poll <= 1:
            raise ValueError(f"busy_poll must be from 0 to 1 (seconds), not {busy_poll!r}")
        require_support()
        super().__init__()
        try:
            self._polls: Polls | None = open_polls(self.lane_fileno())
        except BaseException:
            super().close()
            raise
        if busy_poll:
            self._polls.set_busy_poll(busy_poll)
        self._fast_classes = _fast_classes if fast_sockets else None
        if self._fast_classes is not None:
            self._fast_classes.begin_run()
        # what tasks have asked their sockets to do, and the places in it, by descriptor; made for the first of them
        self._batch: Batch | tuple[()] = ()
        self._places: dict[int, Place] = {}
        self._transfers = 0
        # that of the last receive that was all there was to do in its tick, if it had to wait; how many there were
        self._lone_place: Place | None = None
        self._lone_receives = 0
        # {key: the task that waits, or the place whose operation does}, for the ring lane
        self._tasks: dict[int, trio.lowlevel.Task | Place] = {}
        # keys and tasks whose waits have been taken over, until they go on
        self._ousted: Sequence[Any] = ()
        # the keys to submit at the next tick
        self._pending: list[int] = []
        # whether some of these belong to waits that have been cancelled
        self._pending_is_stale = False
        # keys of polls that are in flight although their task was cancelled
        self._cancelled: list[int] = []
        # how many more cancelled waits are ended at once in this tick
        self._eager = EAGER_CANCELS
        # {key: what a wait yields}; a key in here is one that the ring lane serves
        self._traps: dict[int, WaitTaskRescheduled] = {}
        # see run_context(); a wait that finds its trap finds this as well
        self._context: dict[str, Any] = {}
        # what Trio itself waits on, and its key: a file that may be held until the run ends; None and -1: not yet known
        self._entry_wakeup: WakeupSocketpair | None = None
        self._entry_key = -1
        # the tasks that are about to run; empty until the run has begun
        self._runq: Sequence[trio.lowlevel.Task] = ()
        # whose tasks they are; None until there is a batch
        self._runner: Any = None
        # descriptors that the epoll lane may know
        self._lane_fds: set[int] = set()
        self._lane_process_id = os.getpid()
        self._lane_key = key_of(self.lane_fileno(), READABLE)
        # whether the ring waits for that key
        self._lane_is_watched = False

    @property
    def has_fast_sockets(self) -> bool:
        """Whether the sockets that are made in this run are `FastSocket` ones."""
        return self._fast_classes is not None

    ################
    # Waiting
    ################

    if TYPE_CHECKING:

        async def wait_readable(self, fd: int | HasFileno) -> None: ...
        async def wait_writable(self, fd: int | HasFileno) -> None: ...
    else:
        wait_readable = _make_wait(READABLE)
        wait_writable = _make_wait(WRITABLE)

    def _admit(self, key: int, file: int | HasFileno) -> WaitTaskRescheduled | None:
        """Decide about a descriptor that we do not know: the ring lane's trap, or None for the epoll lane."""
        fd, direction = divmod(key, 2)
        if type(file) is stdlib_socket:  # which need not be asked what it is
            mode = stat.S_IFSOCK
        else:
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                mode = 0  # for a closed file, the epoll lane has the right error
        if fd < 0:
            raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
        if self._polls is None or not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
            return None
        if self.lane_has(fd, direction):
            raise _busy()
        self._context = run_context()
        if self._entry_key < 0:
            self._begin_run()
        trap = self._traps[key] = make_trap(partial(self._abort, key))
        return trap

    def _begin_run(self) -> None:
        """What has to wait until there is a run. Its first wait is Trio's own, on the entry queue."""
        if is_in_run():  # whose manager is this one, or one that passes all on to it
            self._entry_wakeup = entry_queue_wakeup()
            self._entry_key = key_of(self._entry_wakeup.wakeup_sock.fileno(), READABLE)
            self._runq = run_queue()
            use_quick_instruments()
            if is_guest_run():
                try:
                    self.lane_open_wakeup()
                except OSError as error:
                    logger.warning(
                        "%s; the host wakes this run by way of Trio's entry queue, which takes longer", error
                    )
                self._watch_lane()

    def _watch_lane(self) -> None:
        """Have the ring wait for the epoll lane too, from now on."""
        if not self._lane_is_watched and self._polls is not None:
            self._lane_is_watched = True
            self._pending.append(self._lane_key)

    def force_wakeup(self) -> None:
        """Make `get_events` return soon; from any thread, or a signal handler."""
        entry_wakeup = self._entry_wakeup
        if self.lane_has_wakeup():
            super().force_wakeup()
        elif entry_wakeup is not None:  # outside of guest mode, where Trio does not do this
            entry_wakeup.wakeup_thread_and_signal_safe()
        # else nobody sleeps: there is no run yet, or no more

    ################
    # Receiving and sending
    ################

    def begin_receive(self, socket: FastSocket, size: int) -> WaitTaskRescheduled | Literal[False] | None:
        """Have the next tick receive for the running task, which yields the answer; if that is false, it has to do it
        itself. Only for who has got no answer from the socket's place (`Place.begin_receive`), which is quicker.

        What it is sent then is the data; otherwise see `finish_transfer`.
        """
        if size != MAX_RECEIVE:
            return None
        place = self._place_to_ask(socket, READABLE)
        return None if place is None else cast("WaitTaskRescheduled", place.begin_receive(socket._sock, size))

    def begin_send(self, socket: FastSocket, data: bytes | memoryview) -> WaitTaskRescheduled | Literal[False] | None:
        """The same for sending; what is sent to the task is how much of ``data`` has been sent."""
        place = self._place_to_ask(socket, WRITABLE)
        return None if place is None else cast("WaitTaskRescheduled", place.begin_send(socket._sock, data))

    def _place_to_ask(self, socket: FastSocket, direction: int) -> Place | None:
        """The place of a socket whose own had no answer, if it would have another one now."""
        sock = socket._sock
        fd = sock.fileno()
        place = self._places.get(fd)
        if place is None or place is not socket._place:
            return self._admit_transfers(fd, socket)
        if place.task(direction) is not None or not place.has_begun(not direction):
            return None
        # A socket is about to have both a receive and a send in this tick, in another order than one that has come
        # earlier. If its connection was reset, the first one gets the error that says so, and only the first.
        self.perform_transfers()
        return place

    def finish_transfer(self, fd: int, direction: int, sent: Any) -> None:
        """Return if the file is ready now, and what was begun is to be done, or raise what has become of it."""
        try:
            if sent is not None:
                self._woken_otherwise(key_of(fd, direction))
                sent.unwrap()
        finally:
            del sent  # its traceback holds this frame

    def _admit_transfers(self, fd: int, socket: FastSocket) -> Place | None:
        sock = socket._sock
        if fd < 0 or sock.type != SOCK_STREAM or socket._is_duplicated:
            return None  # a datagram socket may be connected to somebody else before the tick
        if not isinstance(self._batch, Batch):
            self._runner = GLOBAL_RUN_CONTEXT.runner
            self._batch = Batch(
                self._runner,
                run_context(),
                self._tasks,
                IS_RUNNABLE,
                stdlib_socket.fileno,
                MAX_RECEIVE,
                LARGE_RECEIVE,
                MAX_SEND,
                MAX_COPY,
            )
        if not self._places:
            self._batch.begin_tick(runnable_tasks(self._runner))
        if not self._batch.is_open(READABLE):
            return None
        keys = key_of(fd, READABLE), key_of(fd, WRITABLE)
        for key in keys:
            if key not in self._traps and (self.lane_has(*divmod(key, 2)) or self._admit(key, sock) is None):
                return None
        if fd in self._places:
            self._places[fd].close()
        place = self._places[fd] = self._batch.place(*keys)
        place.set_traps(*[make_trap(partial(self._abort_transfer, place, key)) for key in keys])
        socket._place = place
        return place

    @trio.lowlevel.enable_ki_protection
    def perform_transfers(self) -> None:
        """Do now what the next tick would do. For who is about to do something by which one could tell the difference:
        on stock Trio, it was tried when it was called."""
        if self._batch:
            blocked = self._pending if self._polls is not None else []
            ousted: list[Any] = []
            self._ousted = ousted  # so that they cannot be cancelled, by a finalizer say, before we come to them
            tasks, values, failures = self._batch.perform(blocked, ousted)
            self._transfers += len(tasks)
            if ousted:
                self._oust(ousted)
            make_runnable(tasks, with_errors(values) if failures else values)
            if self._polls is None:
                self._move_to_lane(blocked)

    def _oust(self, ousted: list[Any]) -> None:
        """Have those go on, with an error, whose waits others have taken over. Until they do, they cannot be cancelled:
        what is in `_tasks` under their keys is not theirs."""
        self._ousted = ousted
        for i in range(0, len(ousted), 2):
            self._pending_is_stale = True  # the key may be in there twice
            self._cancelled.append(ousted[i])
            if not is_runnable(ousted[i + 1]):
                trio.lowlevel.reschedule(ousted[i + 1], outcome.Error(_busy()))
        self._ousted = ()

    def perform_transfers_of(self, fd: int) -> None:
        """The same if there is something to do for ``fd``."""
        place = self._places.get(fd)
        if place is not None and (place.has_begun(READABLE) or place.has_begun(WRITABLE)):
            self.perform_transfers()

    def _abort_transfer(self, place: Place, key: int, raise_cancel: object) -> trio.lowlevel.Abort:
        if place.has_begun(key & 1):
            task = place.task(key & 1)
            if task is current_task_or_none():  # it was cancelled before it came here
                place.withdraw(key & 1)
                return trio.lowlevel.Abort.SUCCEEDED
            self.perform_transfers()
            if task is not None and is_runnable(task):
                return trio.lowlevel.Abort.FAILED
        if key not in self._tasks and not self.lane_has(*divmod(key, 2)):
            return trio.lowlevel.Abort.FAILED  # it has been performed; the task is about to be made runnable
        return self._abort_wait(key)

    def _task_waiting(self, key: int) -> trio.lowlevel.Task | None:
        """Who waits in the ring lane."""
        waiter = self._tasks.get(key)
        return waiter.task(key & 1) if isinstance(waiter, Place) else waiter

    def _end_wait(self, key: int) -> trio.lowlevel.Task | None:
        """Who waits in the ring lane, and does so no more."""
        waiter = self._tasks.pop(key, None)
        return waiter.withdraw(key & 1) if isinstance(waiter, Place) else waiter

    ################
    # Letting go
    ################

    def _abort(self, key: int, _: object) -> trio.lowlevel.Abort:
        if self._ousted and key in self._ousted[::2]:
            return trio.lowlevel.Abort.FAILED
        return self._abort_wait(key)

    def _abort_wait(self, key: int) -> trio.lowlevel.Abort:
        if self._end_wait(key) is None:
            self.lane_release(*divmod(key, 2))  # it was adopted there
        else:
            self._withdraw(key)
            if self._cancelled and self._eager and key != self._entry_key:
                self._eager -= 1
                self._end_cancelled()
        return trio.lowlevel.Abort.SUCCEEDED

    def _withdraw(self, key: int) -> None:
        """End a wait, which may have a poll in flight or be pending."""
        pending = self._pending
        if pending and pending[-1] == key:  # it has only just begun
            pending.pop()
            return
        self._pending_is_stale = bool(pending)
        self._cancelled.append(key)  # which is harmless for a key that is not in flight

    def _woken_otherwise(self, key: int) -> None:
        """The task of this wait goes on, but not because we woke it."""
        if self._task_waiting(key) is GLOBAL_RUN_CONTEXT.task:  # somebody else rescheduled it
            self._end_wait(key)
            self._withdraw(key)
        if self._cancelled and key != self._entry_key:
            self._end_cancelled()

    def _end_cancelled(self) -> None:
        """Have the kernel let go of all files whose waits were cancelled."""
        keys, self._cancelled = self._cancelled, []
        if self._polls is not None:
            try:
                self._polls.cancel(keys)
            except RingLost as lost:
                self._leave_ring(lost.errno)

    def notify_closing(self, fd: int | HasFileno) -> None:
        if not isinstance(fd, int):
            fd = _fileno(fd)
        self.perform_transfers_of(fd)
        self._close_place(fd)
        sleepers = []
        for key in (fd * 2, fd * 2 + 1):
            self._traps.pop(key, None)
            task = self._end_wait(key)
            if task is not None:
                self._withdraw(key)
                sleepers.append(task)
        if self._cancelled:
            self._end_cancelled()
        for task in sleepers:
            trio.lowlevel.reschedule(task, outcome.Error(trio.ClosedResourceError("another task closed this fd")))
        if fd in self._lane_fds:
            self._lane_fds.discard(fd)
            super().notify_closing(fd)

    ################
    # The tick
    ################

    def _close_places(self) -> None:
        for place in self._places.values():
            place.close()
        self._places.clear()

    def _close_place(self, fd: int) -> None:
        place = self._places.pop(fd, None)
        if place is not None:
            place.close()

    def get_events(self, timeout: float) -> list[Any]:
        nothing = _NO_EVENTS
        batch = self._batch
        if batch:
            batch.end_tick()
            place = batch.lone_receive()
            if place is None:
                self.perform_transfers()
            else:
                self._receive_alone(place)
            if self._runq:
                timeout, nothing = 0, _NO_KEYS
        keys = self._take_pending() if self._pending else ()
        polls = self._polls
        if polls is None:
            return super().get_events(timeout) or nothing
        if not keys and timeout == 0 and polls.is_idle():
            return nothing
        try:
            return polls.tick(keys, timeout) or nothing
        except RingLost as lost:
            return [_Lost(lost.errno)]

    def _take_pending(self) -> Sequence[int]:
        """The keys to be submitted now. Cancelled polls end before that, as some may have the same keys."""
        if self._cancelled:
            self._end_cancelled()
        keys, self._pending = self._pending, []
        if self._pending_is_stale:
            self._pending_is_stale = False
            keys = [key for key in dict.fromkeys(keys) if key in self._tasks or key == self._lane_key]
        return keys

    def _receive_alone(self, place: Place) -> None:
        """Do the only operation of a tick, or have it wait."""
        self._lone_receives += 1
        if place is self._lone_place and self._lone_receives % LONE_RECEIVES and self._may_wait_first(place):
            return
        self.perform_transfers()
        self._lone_place = None if self._runq else place

    def _may_wait_first(self, place: Place) -> bool:
        """Turn a place's receive into a wait, if nothing is in the way."""
        sock = place.socket(READABLE)
        if self._polls is None or sock is None or sock.fileno() < 0:
            return False
        return place.wait(READABLE, self._pending)

    def process_events(self, events: Sequence[Any]) -> None:
        self._eager = EAGER_CANCELS
        if events and events is not _NO_KEYS:
            self._wake(events)
        elif not self._runq and looks_for_idleness():
            self._catch_up()
        if self._places:  # or who has the first one looks
            self._batch.begin_tick(runnable_tasks(self._runner))  # type: ignore[union-attr]

    def _catch_up(self) -> None:
        """Wake whoever can go on, although no event says so yet.

        The kernel passes some completions to a worker thread, above all that a peer has closed its socket. If Trio is
        about to conclude that nobody can go on (`trio.testing.wait_all_tasks_blocked`, an autojumping clock), that is
        too late. With a task made runnable here, it does not come to that conclusion.
        """
        if self._polls is not None and self._polls.catch_up():
            self._wake(self.get_events(0))

    def _wake(self, events: Sequence[Any]) -> None:
        """Have go on whoever waits for these: tasks, and operations, which are performed."""
        batch = self._batch
        if isinstance(batch, Batch):
            events = batch.resume(events)
        if events:
            for event in wake(self._tasks, events):  # type: ignore[arg-type]  # no places are left
                self._process_other(event)
        if batch:
            self.perform_transfers()

    def _process_other(self, event: object) -> None:
        if event == self._lane_key:
            self.lane_process()
            self._pending.append(self._lane_key)
        elif isinstance(event, int):
            if event < 0:
                self._process_refusal(*refused(event))
            # else: its task was cancelled after the event had been taken
        elif isinstance(event, _Lost):
            self._leave_ring(event.errno)
        else:
            super().process_events([event])  # type: ignore[list-item]

    def _process_refusal(self, key: int, error: int) -> None:
        if key == self._lane_key:
            self._leave_ring(error)
            return
        self._traps.pop(key, None)  # so that the next wait looks at both lanes
        self._close_place(key // 2)
        task = self._end_wait(key)
        if task is not None:
            self._adopt(key, task)

    def _adopt(self, key: int, task: trio.lowlevel.Task) -> None:
        fd, direction = divmod(key, 2)
        self._lane_fds.add(fd)
        self._watch_lane()
        self.lane_adopt(fd, direction, task)

    def _move_to_lane(self, keys: Iterable[int]) -> None:
        """Have whoever waits for these keys in the ring lane wait in the other one."""
        for key in keys:
            task = self._end_wait(key)
            if task is None:
                continue  # cancelled meanwhile
            if self.lane_has(*divmod(key, 2)):
                trio.lowlevel.reschedule(task, outcome.Error(_busy()))
            else:
                self._adopt(key, task)

    def _leave_ring(self, error: int) -> None:
        """Go on with the epoll lane alone."""
        polls, self._polls = self._polls, None
        if polls is None:
            return
        if error == errno.ECHILD:
            if self._lane_process_id != os.getpid():  # a fork that Python does not know of
                self._after_fork_in_child()
            self.lane_restore()
            logger.warning("this process was forked from inside a run; the run goes on here, on epoll")
        else:
            logger.warning("AIO stopped working (%s); the run goes on, on epoll", os.strerror(error))
            try:
                polls.destroy()
            except OSError as failure:
                logger.warning("%s; files may be held open until they are ready", failure)
        self._close_places()
        for collection in (self._pending, self._cancelled, self._traps):
            collection.clear()
        self._move_to_lane(list(self._tasks))

    def _after_fork_in_child(self) -> None:
        """Let go of what is shared with the parent, before anybody uses it; the ring, the C core refuses to touch."""
        self.lane_replace()
        self._lane_process_id = os.getpid()
        if self._polls is None:
            self.lane_restore()  # otherwise _leave_ring does it

    ################
    # The rest
    ################

    def close(self) -> None:
        if self._polls is not None:
            if self._entry_wakeup is not None and self._entry_key in self._cancelled:
                # to complete its poll is cheaper than to cancel it, which would take a detour
                self._entry_wakeup.wakeup_thread_and_signal_safe()
            self._polls.close()
        self._runq, self._runner, self._entry_wakeup = (), None, None
        self._traps.clear()  # they refer back to us
        self._close_places()
        self._batch, self._lone_place = (), None
        if self._fast_classes is not None:
            self._fast_classes.end_run()
            self._fast_classes = None
        super().close()

    def statistics(self) -> AiopollStatistics:  # type: ignore[override]
        self.perform_transfers()  # so that who waits is counted, and who does not is not
        lane = super().statistics()
        writers = sum(key & 1 for key in self._tasks)
        polls = None if self._polls is None else self._polls.statistics()
        return AiopollStatistics(
            tasks_waiting_read=lane.tasks_waiting_read + len(self._tasks) - writers,
            tasks_waiting_write=lane.tasks_waiting_write + writers,
            polls_in_flight=polls.in_flight if polls else 0,
            capacity=polls.capacity if polls else 0,
            rings=polls.rings if polls else 0,
            epoll_lane_waits=lane.tasks_waiting_read + lane.tasks_waiting_write,
            submit_calls=polls.submit_calls if polls else 0,
            polls_submitted=polls.submitted if polls else 0,
            events_taken=polls.taken if polls else 0,
            events_waited=polls.waited if polls else 0,
            blocking_calls=polls.blocking_calls if polls else 0,
            cancels=polls.cancels if polls else 0,
            transfers=self._transfers,
        )


def restore_stock_classes() -> None:
    """Called before a run on another manager: its sockets are Trio's own."""
    if _fast_classes is not None:
        _fast_classes.restore()


def _manager_of_this_thread() -> AiopollIOManager | None:
    manager: Any = getattr(getattr(GLOBAL_RUN_CONTEXT, "runner", None), "io_manager", None)
    return manager if hasattr(manager, "begin_receive") else None  # it may be one that passes all on to ours


def _before_fork() -> None:
    # or the child, if it goes on with this run, would receive and send the same again
    manager = _manager_of_this_thread()
    if manager is not None:
        manager.perform_transfers()


def _after_fork_in_child() -> None:
    # Only the thread that forked is there in the child; if it was in a run, the child goes on with that run.
    manager = _manager_of_this_thread()
    if manager is not None:
        manager._after_fork_in_child()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
