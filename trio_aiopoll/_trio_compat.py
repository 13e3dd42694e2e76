"""Every private name of Trio that this package uses, and the check that says which is missing.

Nothing else in the package may import from inside Trio. Seen to fit Trio 0.22 to 0.35.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import select
import types
from collections import UserDict
from typing import TYPE_CHECKING, Any, Final

import trio

from ._wakeup import WakeupEventfd

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from types import ModuleType

    from trio import SocketStream as StockStream
    from trio._core._io_epoll import EpollIOManager
    from trio._core._run import GLOBAL_RUN_CONTEXT
    from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled
    from trio._core._wakeup_socketpair import WakeupSocketpair
    from trio._highlevel_socket import DEFAULT_RECEIVE_SIZE
    from trio._highlevel_socket import _translate_socket_errors_to_stream_errors as translate_errors
    from trio._socket import _SocketType as StockSocket

_NEEDED: Final = {
    "trio._core._io_epoll": ("EpollIOManager",),
    "trio._core._run": ("GLOBAL_RUN_CONTEXT", "TheIOManager", "setup_runner"),
    "trio._core._traps": ("CancelShieldedCheckpoint", "WaitTaskRescheduled"),
    "trio._core._wakeup_socketpair": ("WakeupSocketpair",),
}
_NEEDED_METHODS: Final = (
    "_update_registrations",
    "close",
    "force_wakeup",
    "get_events",
    "notify_closing",
    "process_events",
    "statistics",
    "wait_readable",
    "wait_writable",
)
_NEEDED_ATTRIBUTES: Final = ("_epoll", "_registered", "_force_wakeup", "_force_wakeup_fd")


def _find_missing() -> list[str]:
    missing = []
    for module_name, names in _NEEDED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    if not missing:
        manager = importlib.import_module("trio._core._io_epoll").EpollIOManager
        missing += [
            f"trio._core._io_epoll.EpollIOManager.{name}"
            for name in _NEEDED_METHODS + _NEEDED_ATTRIBUTES
            if not hasattr(manager, name)
        ]
        missing += [
            f"trio._core._io_epoll.EpollIOManager({name}=)"
            for name in ("epoll", "force_wakeup")
            if name not in inspect.signature(manager).parameters
        ]
    return missing


# What the fast sockets need besides. Seen to fit Trio 0.28 to 0.35.
_NEEDED_FOR_SOCKETS: Final = {
    "trio._core._run": ("CancelStatus", "Runner", "Task"),
    "trio._highlevel_socket": ("DEFAULT_RECEIVE_SIZE", "SocketStream", "_translate_socket_errors_to_stream_errors"),
    "trio._socket": ("_SocketType",),
    "trio._util": ("ConflictDetector",),
}
_NEEDED_ATTRIBUTES_FOR_SOCKETS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "trio._core._run": {
        "CancelStatus": ("effectively_cancelled",),
        "Runner": ("instruments", "ki_pending", "main_task", "runq"),
        "Task": ("_cancel_points", "_cancel_status", "_runner"),
    },
    "trio._highlevel_socket": {"SocketStream": ("__init_subclass__", "receive_some", "send_all")},
    "trio._socket": {
        "_SocketType": (
            *("__exit__", "_nonblocking_helper", "_resolve_address_nocp", "detach", "did_shutdown_SHUT_WR", "dup"),
            *("fileno", "getsockopt", "is_readable", "recv", "send", "setsockopt", "shutdown"),
        )
    },
    "trio._util": {"ConflictDetector": ("__enter__",)},
}


REPLACED: Final = " (it is another)"


def is_of_trio(function: object) -> bool:
    # Others may pass on to Trio's what they are asked, say that they are equal to it, and have its globals.
    if type(function) is not types.FunctionType:
        return False
    return function.__code__.co_filename.startswith(os.path.dirname(trio.__file__) + os.sep)


def _find_missing_for_sockets() -> list[str]:
    missing = []
    for module_name, names in _NEEDED_FOR_SOCKETS.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    if missing:
        return missing
    for module_name, classes in _NEEDED_ATTRIBUTES_FOR_SOCKETS.items():
        for class_name, names in classes.items():
            holder = vars(getattr(importlib.import_module(module_name), class_name))
            missing += [f"{module_name}.{class_name}.{name}" for name in names if name not in holder]
    if missing:
        return missing
    socket_type: Any = importlib.import_module("trio._socket")._SocketType
    # Somebody may have put something into their place before we came, which wants to be called.
    for holder, holder_name, names in (
        (socket_type, "trio._socket._SocketType", ("_nonblocking_helper", "fileno", "recv", "send")),
        (trio.SocketStream, "trio.SocketStream", ("__anext__", "receive_some", "send_all")),
    ):
        missing += [holder_name + "." + name + REPLACED for name in names if not is_of_trio(getattr(holder, name))]
    if missing:
        return missing
    # attributes that only instances have
    parameters = list(inspect.signature(socket_type._nonblocking_helper).parameters)
    if parameters != ["self", "wait_fn", "fn", "args", "kwargs"]:
        missing.append("trio._socket._SocketType._nonblocking_helper(wait_fn, fn, *args, **kwargs)")
    for function, holder_name, attribute in (
        (socket_type.fileno, "trio._socket._SocketType", "_sock"),
        (socket_type.did_shutdown_SHUT_WR.fget, "trio._socket._SocketType", "_did_shutdown_SHUT_WR"),
        (trio.SocketStream.send_all, "trio.SocketStream", "_send_conflict_detector"),
        (importlib.import_module("trio._util").ConflictDetector.__enter__, "trio._util.ConflictDetector", "_held"),
    ):
        if attribute not in function.__code__.co_names:
            missing.append(f"{holder_name}.{attribute}")
    # An older Trio's makes a function of another kind, which keeps its caller's error and with it the socket alive.
    if trio.lowlevel.enable_ki_protection(_find_missing) is not _find_missing:
        missing.append("trio.lowlevel.enable_ki_protection(function) is function")
    return missing


missing_names: Final[tuple[str, ...]] = tuple(_find_missing())
"""The private names that this Trio does not have; with any missing, aiopoll is not available."""

missing_names_for_sockets: Final = missing_names or tuple(_find_missing_for_sockets())
"""The private names without which sockets stay as they are, or in whose place somebody has put something else; all else
works."""

if not TYPE_CHECKING:
    if missing_names:
        EpollIOManager = object
        CancelShieldedCheckpoint = WaitTaskRescheduled = WakeupSocketpair = None
        GLOBAL_RUN_CONTEXT = None
    else:
        from trio._core._io_epoll import EpollIOManager
        from trio._core._run import GLOBAL_RUN_CONTEXT
        from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled
        from trio._core._wakeup_socketpair import WakeupSocketpair

    if missing_names_for_sockets:
        StockSocket = StockStream = None
        DEFAULT_RECEIVE_SIZE = translate_errors = None
    else:
        from trio import SocketStream as StockStream
        from trio._highlevel_socket import DEFAULT_RECEIVE_SIZE
        from trio._highlevel_socket import _translate_socket_errors_to_stream_errors as translate_errors
        from trio._socket import _SocketType as StockSocket

__all__ = [
    "DEFAULT_RECEIVE_SIZE",
    "GLOBAL_RUN_CONTEXT",
    "IS_RUNNABLE",
    "NOT_DONE",
    "REPLACED",
    "WOULD_BLOCK",
    "EpollIOManager",
    "EpollLane",
    "StockSocket",
    "StockStream",
    "WaitTaskRescheduled",
    "WakeupSocketpair",
    "at_once",
    "current_task_or_none",
    "entry_queue_wakeup",
    "is_guest_run",
    "is_in_run",
    "is_of_trio",
    "is_runnable",
    "looks_for_idleness",
    "make_runnable",
    "make_trap",
    "missing_names",
    "missing_names_for_sockets",
    "modules_that_bind",
    "run_context",
    "run_module",
    "run_queue",
    "runnable_tasks",
    "translate_errors",
    "use_quick_instruments",
    "wake",
]


def run_module() -> ModuleType:
    """The module that holds TheIOManager and setup_runner, which Trio looks up there at each run; an empty one if this
    Trio has none of that name."""
    try:
        return importlib.import_module("trio._core._run")
    except ImportError:
        return types.ModuleType("trio._core._run")


_TASK_OF: Final = ("read_task", "write_task")


class _RegistersNothing:
    """An epoll instance for Trio's constructor, which registers what wakes it: we do that later."""

    def register(self, fd: object, eventmask: int) -> None:
        pass


class EpollLane(EpollIOManager):
    """Trio's epoll manager, with names for what the ring lane asks of it.

    ``direction`` is 0 for reading and 1 for writing.
    """

    def __init__(self) -> None:
        super().__init__(epoll=_RegistersNothing(), force_wakeup=WakeupEventfd())  # type: ignore[arg-type]
        self._epoll = select.epoll()

    def lane_open_wakeup(self) -> None:
        """Make what `force_wakeup` writes to, and have this lane wait for it."""
        self._force_wakeup.open()  # type: ignore[attr-defined]
        try:
            self._epoll.register(self._force_wakeup.wakeup_sock, select.EPOLLIN)
        except BaseException:
            self._force_wakeup.close()
            raise
        self._force_wakeup_fd = self._force_wakeup.wakeup_sock.fileno()

    def lane_has_wakeup(self) -> bool:
        return self._force_wakeup.is_open  # type: ignore[attr-defined, no-any-return]

    def lane_fileno(self) -> int:
        return self._epoll.fileno()

    def lane_has(self, fd: int, direction: int) -> bool:
        """Whether a task waits for ``fd`` in this lane."""
        return fd in self._registered and getattr(self._registered[fd], _TASK_OF[direction]) is not None

    def lane_wait(self, fd: int, direction: int) -> Generator[Any, Any, None]:
        """The whole wait as Trio does it, to be delegated to with ``yield from``."""
        wait = EpollIOManager.wait_writable if direction else EpollIOManager.wait_readable
        return wait(self, fd).__await__()

    def lane_adopt(self, fd: int, direction: int, task: trio.lowlevel.Task) -> None:
        """Take over a task that already sleeps; it wakes, perhaps with an error, as if it had waited here all along."""
        setattr(self._registered[fd], _TASK_OF[direction], task)
        self._update_registrations(fd)

    def lane_release(self, fd: int, direction: int) -> None:
        """Give up an adopted task's wait, which has been cancelled."""
        if fd in self._registered:
            setattr(self._registered[fd], _TASK_OF[direction], None)
            self._update_registrations(fd)

    def lane_process(self) -> None:
        """Wake whoever is ready here, without blocking."""
        EpollIOManager.process_events(self, EpollIOManager.get_events(self, 0))

    def lane_replace(self) -> None:
        """Leave the epoll instance and what wakes us, which a forked child shares, to its parent.

        Who waits here is registered anew only by `lane_restore`: most children never come to wait.
        """
        self._epoll.close()
        self._epoll = select.epoll()
        if self.lane_has_wakeup():
            self._force_wakeup.close()
            self.lane_open_wakeup()
        shared, own = GLOBAL_RUN_CONTEXT.runner.entry_queue.wakeup, WakeupSocketpair()
        # under the same numbers: a task waits for one of them, and Python's signal handler writes to the other
        os.dup2(own.wakeup_sock.fileno(), shared.wakeup_sock.fileno(), inheritable=False)
        os.dup2(own.write_sock.fileno(), shared.write_sock.fileno(), inheritable=False)
        own.wakeup_sock.close()
        own.write_sock.close()

    def lane_restore(self) -> None:
        """Register with the present epoll instance whoever waits here."""
        for fd, waiters in list(self._registered.items()):
            waiters.current_flags = 0
            self._update_registrations(fd)


_StockInstruments: Final[Any] = getattr(run_module(), "Instruments", None)

if _StockInstruments is not None and issubclass(_StockInstruments, UserDict):

    class _NoInstruments(tuple[()]):
        """What Trio's Instruments are for as long as there are none. Trio looks into them twice for each step of a task
        and three times a tick. To look into a UserDict is to call a Python method, and even into a dict's subclass it
        takes twice as long as into an empty tuple."""

        __slots__ = ()

        def add_instrument(self, instrument: trio.abc.Instrument) -> None:
            runner: Any = GLOBAL_RUN_CONTEXT.runner
            if type(runner.instruments) is _NoInstruments:
                runner.instruments = _StockInstruments(())
            runner.instruments.add_instrument(instrument)

        def __getitem__(self, name: Any) -> Any:
            return _StockInstruments(())[name]

        def __getattr__(self, name: str) -> Any:
            return getattr(_StockInstruments(()), name)

    def use_quick_instruments() -> None:
        """Have the present run hold its instruments in what is quick to look into while there are none."""
        runner: Any = GLOBAL_RUN_CONTEXT.runner
        if type(runner.instruments) is _StockInstruments and not runner.instruments["_all"]:
            runner.instruments = _NoInstruments()

else:

    def use_quick_instruments() -> None:
        """Nothing to do: they are in a dict."""


def _wake_by_reschedule(tasks: dict[Any, trio.lowlevel.Task], keys: Iterable[Any]) -> list[Any]:
    reschedule = GLOBAL_RUN_CONTEXT.runner.reschedule
    others = []
    for key in keys:
        task = tasks.pop(key, None)
        if task is None:
            others.append(key)
        elif task._next_send_fn is None:
            reschedule(task, None)  # type: ignore[arg-type]
    return others


def _wake_inline(tasks: dict[Any, trio.lowlevel.Task], keys: Iterable[Any]) -> list[Any]:
    runner = GLOBAL_RUN_CONTEXT.runner
    runq = runner.runq
    if runner.is_guest and not runq:
        runner.force_guest_tick_asap()
    instrumented = "task_scheduled" in runner.instruments
    others = []
    for key in keys:
        task = tasks.pop(key, None)
        if task is None:
            others.append(key)
        elif task._next_send_fn is None:
            # None is to be sent, and while a task sleeps that is what _next_send is
            task._next_send_fn = task.coro.send
            task._abort_func = None
            task.custom_sleep_data = None
            runq.append(task)
            if instrumented:
                runner.instruments.call("task_scheduled", task)
    return others


def _make_runnable_by_reschedule(tasks: Sequence[trio.lowlevel.Task], values: Sequence[Any]) -> None:
    reschedule = GLOBAL_RUN_CONTEXT.runner.reschedule
    for task, value in zip(tasks, values, strict=True):
        reschedule(task, value)


def _make_runnable_inline(tasks: Sequence[trio.lowlevel.Task], values: Sequence[Any]) -> None:
    runner = GLOBAL_RUN_CONTEXT.runner
    runq = runner.runq
    if runner.is_guest and not runq and tasks:
        runner.force_guest_tick_asap()
    for task, value in zip(tasks, values):  # noqa: B905  (strict=True takes longer than three tasks)
        task._next_send_fn = task.coro.send
        task._next_send = value
        task._abort_func = None
        task.custom_sleep_data = None
    runq.extend(tasks)
    if "task_scheduled" in runner.instruments:
        for task in tasks:
            runner.instruments.call("task_scheduled", task)


# What Runner.reschedule touches in the versions of Trio for which the inline functions were written to do the same.
_RESCHEDULE_NAMES: Final = frozenset(
    {"Value", "_NO_SEND", "_abort_func", "_next_send", "_next_send_fn", "_runner", "append", "call", "coro"}
    | {"custom_sleep_data", "force_guest_tick_asap", "instruments", "is_guest", "runq", "send"}
)

_reschedule: Final = getattr(getattr(run_module(), "Runner", None), "reschedule", None)
_inline: Final = bool(
    not missing_names and _reschedule and frozenset(_reschedule.__code__.co_names) == _RESCHEDULE_NAMES
)


IS_RUNNABLE: Final = "_next_send_fn"
"""The attribute of a task that is not None if somebody has rescheduled it."""


def is_runnable(task: trio.lowlevel.Task) -> bool:
    """Whether somebody has rescheduled the task."""
    return getattr(task, IS_RUNNABLE) is not None


def current_task_or_none() -> trio.lowlevel.Task | None:
    return getattr(GLOBAL_RUN_CONTEXT, "task", None)


def run_context() -> dict[str, Any]:
    """What `GLOBAL_RUN_CONTEXT` holds in this thread: one dict for as long as the thread lives. To look into it takes
    half the time that the thread-local object takes."""
    return GLOBAL_RUN_CONTEXT.__dict__


def entry_queue_wakeup() -> WakeupSocketpair:
    """What Trio itself waits on to be called from other threads, until it cancels that at the end of the run."""
    return GLOBAL_RUN_CONTEXT.runner.entry_queue.wakeup


def is_in_run() -> bool:
    return hasattr(GLOBAL_RUN_CONTEXT, "runner")


def is_guest_run() -> bool:
    return GLOBAL_RUN_CONTEXT.runner.is_guest


def looks_for_idleness() -> bool:
    """Whether Trio will act on it if nobody is runnable now."""
    runner = GLOBAL_RUN_CONTEXT.runner
    return not runner.runq and (bool(runner.waiting_for_idle) or runner.clock_autojump_threshold != math.inf)


def run_queue() -> Sequence[trio.lowlevel.Task]:
    """The tasks that Trio is about to run: one and the same deque for all of the run."""
    return GLOBAL_RUN_CONTEXT.runner.runq


def runnable_tasks(runner: Any) -> int:
    """How many tasks Trio is about to run, or -1 if an instrument watches."""
    instruments = runner.instruments
    return -1 if instruments and instruments["_all"] else len(runner.runq)


NOT_DONE: Final = object()
"""What a fast operation returns that has done nothing, not even a checkpoint, and leaves all to Trio's own."""
WOULD_BLOCK: Final = object()
"""What `at_once` returns where the function would have blocked."""


def _refuse_to_abort(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


def _make_plain_trap(abort: Callable[[Any], trio.lowlevel.Abort]) -> WaitTaskRescheduled:
    # Its own constructor goes by its __dict__. Once an object has been asked for that, CPython 3.11 takes six times as
    # long to find its attributes, and Trio looks for this one in each step of a task.
    trap = object.__new__(WaitTaskRescheduled)
    object.__setattr__(trap, "abort_func", abort)
    return trap


make_trap: Final = (
    _make_plain_trap
    if not missing_names and getattr(WaitTaskRescheduled(len), "__dict__", None) == {"abort_func": len}  # type: ignore[arg-type]
    else WaitTaskRescheduled
)
"""What a task yields to Trio that sleeps until it is rescheduled, or until the function aborts that."""

# To be yielded by a task that has made itself runnable.
_ALREADY_RUNNABLE: Final = None if missing_names else make_trap(_refuse_to_abort)


@trio.lowlevel.enable_ki_protection
@types.coroutine
def at_once(function: Callable[..., Any], *arguments: Any) -> Generator[Any, Any, Any]:
    """``function(*arguments)`` with a checkpoint around it, as Trio has it around what may succeed at once.

    Returns `NOT_DONE` if the task has been cancelled, and `WOULD_BLOCK` if the function raises BlockingIOError; in that
    case there was no schedule point, as there is a wait to come.
    """
    try:
        task = GLOBAL_RUN_CONTEXT.task
    except AttributeError:
        return NOT_DONE
    runner = task._runner
    if task._cancel_status.effectively_cancelled or (runner.ki_pending and task is runner.main_task):
        return NOT_DONE
    try:
        result = function(*arguments)
    except BlockingIOError:
        task._cancel_points += 1
        return WOULD_BLOCK
    except BaseException:
        task._cancel_points += 1
        yield CancelShieldedCheckpoint
        raise
    instruments = runner.instruments
    if _inline and not (instruments and instruments["_all"]):
        # The same as below by a third of the work: no call of reschedule(), no Outcome.
        task._next_send_fn = task.coro.send
        runner.runq.append(task)
        yield _ALREADY_RUNNABLE
        task._abort_func = None
    else:
        task._cancel_points += 1
        yield CancelShieldedCheckpoint
    return result


def modules_that_bind(function: Callable[..., object]) -> list[ModuleType]:
    """The modules of Trio that bind ``function``, `trio.run` or `trio.lowlevel.start_guest_run`, to its name."""
    name = function.__name__
    candidates = [trio, trio.lowlevel, importlib.import_module("trio._core"), run_module()]
    return [module for module in candidates if getattr(module, name, None) is function]


make_runnable: Final = _make_runnable_inline if _inline else _make_runnable_by_reschedule
"""Have each value sent to its task, which sleeps."""

wake: Final = _wake_inline if _inline else _wake_by_reschedule
"""Remove the keys from the tasks, and make runnable the tasks that were found, which get None sent; a task that
somebody else has made runnable already is passed over. Returns the keys that were not found. ``Runner.reschedule`` for
many at once: called for each it would be a good part of what a wake-up costs, so where it does what we know, we do it
here."""
