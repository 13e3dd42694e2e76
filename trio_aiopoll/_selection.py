"""How a program chooses: run, start_guest_run, install, and the names of the managers.

Trio makes the manager of a run in ``setup_runner``, by calling ``TheIOManager``. Both names are looked up in a module
of its own (`run_module`) at each run, so that is where we step in: ``setup_runner`` is replaced, once and for
good, by one that can put a manager made beforehand in the place of ``TheIOManager`` while the original runs. A lock
keeps other threads out of there meanwhile, the choice itself is kept per thread, and a run that asks for nothing gets
what it would have got without us.

Who is asked, in this order: the run's argument ``io_manager``, the environment variable ``TRIO_IO_MANAGER``, what
`install` made the default, Trio. The environment is read when a run starts, so that a program may still change it, and
a name in it that is not known is that run's ValueError, as it would be in the argument. The pytest plugin, which knows
of one test's choice, answers for the environment and for `install` (`override_default`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import trio

from . import _trio_compat as compat
from ._debugging import ExplainingIOManager
from ._environment import DEBUG, IO_MANAGER, TOP
from ._io_manager import AiopollIOManager, restore_stock_classes
from ._probe import UnavailableError, open_polls, require_support
from ._statistics_server import StatisticsServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    import outcome

T = TypeVar("T")
IOManagerChoice: TypeAlias = "str | Callable[[], Any] | None"

logger: Final = logging.getLogger("trio_aiopoll")

additional_instruments: Final[list[Callable[[], trio.abc.Instrument]]] = []
"""Each is called at the start of every run for an instrument that the run gets beside its own."""

_run_module: Final = compat.run_module()


def _absent() -> None:
    """In the place of a name that this Trio lacks."""


_trio_setup_runner: Final[Callable[..., Any]] = getattr(_run_module, "setup_runner", _absent)
_setup_signature: Final = inspect.signature(_trio_setup_runner)
_trio_default: Final[Callable[[], Any]] = getattr(_run_module, "TheIOManager", _absent)
_can_choose: Final = _absent not in (_trio_setup_runner, _trio_default)
_replaced = _trio_default  # what install() took the place of
_environment_counts = True

# Held while Trio makes a runner, while TheIOManager is changed for good, and across a fork: the child must find neither
# the lock taken by a thread that it does not have, nor TheIOManager as another run wanted it.
_lock: Final = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Choice(threading.local):
    """What the run that this thread is about to start has asked for."""

    make: Callable[[], Any] | None = None


_choice: Final = _Choice()


def _make_aiopoll() -> AiopollIOManager:
    return ExplainingIOManager() if DEBUG.is_on() else AiopollIOManager()


def _make_auto() -> Any:
    try:
        return _make_aiopoll()
    except UnavailableError as error:
        logger.warning("using epoll: %s", error)
        return _trio_default()


_MANAGERS: Final[dict[str, Callable[[], Any]]] = {
    "aiopoll": _make_aiopoll,
    "auto": _make_auto,
    "epoll": _trio_default,
}
NAMES: Final = tuple(_MANAGERS)

_METHODS: Final = (
    "close",
    "force_wakeup",
    "get_events",
    "notify_closing",
    "process_events",
    "statistics",
    "wait_readable",
    "wait_writable",
)


def _checked(make: Callable[[], Any]) -> Callable[[], Any]:
    def make_checked() -> Any:
        manager = make()
        if isinstance(manager, type):
            raise TypeError(f"io_manager={make!r} made {manager!r}, no I/O manager but a class: call it")
        lacking = [name for name in _METHODS if not callable(getattr(manager, name, None))]
        if lacking:
            raise TypeError(f"io_manager={make!r} made {manager!r}, no I/O manager: it lacks {', '.join(lacking)}")
        return manager

    return make_checked


def _named(name: str, source: str, alternative: str) -> Callable[[], Any]:
    try:
        return _MANAGERS[name]
    except KeyError:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"{source}={name!r} is not known; use one of {known}, or {alternative}") from None


def _resolve(io_manager: IOManagerChoice) -> Callable[[], Any] | None:
    if io_manager is None:
        return None
    if isinstance(io_manager, str):
        return _named(io_manager, "io_manager", "a callable that makes a manager")
    if callable(io_manager):
        return _checked(io_manager)
    raise TypeError(f"io_manager must be a name or a callable that makes a manager, not {io_manager!r}")


def _from_environment() -> Callable[[], Any] | None:
    name = IO_MANAGER.get() if _environment_counts else ""
    return _named(name, IO_MANAGER.name, "unset it") if name else None


@functools.wraps(_trio_setup_runner)
def _setup_runner(*args: Any, **kwargs: Any) -> Any:
    make = _choice.make
    if make is not None:
        _choice.make = None
    if hasattr(compat.GLOBAL_RUN_CONTEXT, "runner"):  # a run inside of a run, which Trio refuses
        return _trio_setup_runner(*args, **kwargs)
    if additional_instruments or TOP.is_on():
        additional = [new() for new in additional_instruments]
        if TOP.is_on():
            additional.append(StatisticsServer())
        bound = _setup_signature.bind(*args, **kwargs)
        bound.arguments["instruments"] = [*bound.arguments["instruments"], *additional]
        args, kwargs = bound.args, bound.kwargs
    make = make or _from_environment()
    if make is None and DEBUG.is_on():
        with _lock:
            make = _make_aiopoll if _run_module.TheIOManager is AiopollIOManager else None
    if make is None:
        with _lock:
            if _run_module.TheIOManager is not AiopollIOManager:
                restore_stock_classes()
            return _trio_setup_runner(*args, **kwargs)
    # Before the lock is taken: a callable may take its time, and start runs of its own.
    manager = make()
    if not isinstance(manager, AiopollIOManager):
        restore_stock_classes()
    try:
        with _lock:
            before = _run_module.TheIOManager
            _run_module.TheIOManager = lambda: manager  # type: ignore[attr-defined]
            try:
                return _trio_setup_runner(*args, **kwargs)
            finally:
                _run_module.TheIOManager = before  # type: ignore[attr-defined]
    except BaseException:
        manager.close()
        raise


def _settle_for_trios_own(make: Callable[[], Any] | None) -> None:
    """On a Trio that lets nobody put a manager in, agree to what its own can serve, and refuse the rest."""
    make = make or _from_environment()
    if make is _make_auto:
        make()  # says why it cannot be aiopoll
    elif make not in (None, _trio_default):
        require_support()


def _choosing(function: Callable[..., T]) -> Callable[..., T]:
    """``function``, which ends up in setup_runner, with the additional argument ``io_manager``."""

    @functools.wraps(function)
    def choose(*args: Any, io_manager: IOManagerChoice = None, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        make = _resolve(io_manager)
        if not _can_choose:
            _settle_for_trios_own(make)
            return function(*args, **kwargs)
        before = _choice.make  # not None in a signal handler that interrupts the same a few lines further down
        if make is before is None:
            return function(*args, **kwargs)
        _choice.make = make
        try:
            return function(*args, **kwargs)
        finally:
            _choice.make = before

    signature = inspect.signature(function)
    ours = inspect.Parameter("io_manager", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="IOManagerChoice")
    choose.__signature__ = signature.replace(parameters=[*signature.parameters.values(), ours])  # type: ignore[attr-defined]
    return cast("Callable[..., T]", choose)


_run: Final[Callable[..., Any]] = _choosing(trio.run)
_start_guest_run: Final[Callable[..., None]] = _choosing(trio.lowlevel.start_guest_run)


def run(async_fn: Callable[..., Awaitable[T]], *args: Any, io_manager: IOManagerChoice = "aiopoll", **kwargs: Any) -> T:
    """`trio.run` with the additional argument ``io_manager``, by default ``"aiopoll"``.

    Args:
      async_fn: the async function to run, with the positional arguments ``args``.
      io_manager: ``"aiopoll"``; ``"epoll"``, Trio's own; ``"auto"``, aiopoll where it works, otherwise epoll and one
        log line that says why; a callable without arguments that makes a manager; or None, which leaves it to the
        environment variable ``TRIO_IO_MANAGER`` (a name), otherwise to `install`, otherwise to Trio.
      kwargs: any other argument of `trio.run`.

    Raises:
      UnavailableError: ``"aiopoll"`` cannot be served here.
      ValueError: there is no manager of that name, in the argument or, if it is None, in the environment.
    """
    __tracebackhide__ = True
    return cast("T", _run(async_fn, *args, io_manager=io_manager, **kwargs))


def start_guest_run(
    async_fn: Callable[..., Awaitable[T]],
    *args: Any,
    run_sync_soon_threadsafe: Callable[[Callable[[], object]], object],
    done_callback: Callable[[outcome.Outcome[T]], object],
    io_manager: IOManagerChoice = "aiopoll",
    **kwargs: Any,
) -> None:
    """`trio.lowlevel.start_guest_run` with the additional argument ``io_manager``; see `run` for it."""
    __tracebackhide__ = True
    _start_guest_run(
        async_fn,
        *args,
        run_sync_soon_threadsafe=run_sync_soon_threadsafe,
        done_callback=done_callback,
        io_manager=io_manager,
        **kwargs,
    )


def install() -> None:
    """Make aiopoll the default of every later run in this process, also of runs that are started by an earlier
    ``from trio import run``. A run can still choose another with ``io_manager=``, and so can the environment variable
    ``TRIO_IO_MANAGER`` for all of them.

    Raises:
      UnavailableError: aiopoll cannot be served here; nothing is changed.
    """
    global _replaced
    open_polls().close()
    with _lock:
        if _run_module.TheIOManager is not AiopollIOManager:
            _replaced = _run_module.TheIOManager
            # the class, because programs (Trio's own tests among them) change its methods through this name
            _run_module.TheIOManager = AiopollIOManager  # type: ignore[attr-defined]


def uninstall() -> None:
    """Undo `install`. Runs that are under way keep their manager."""
    with _lock:
        if getattr(_run_module, "TheIOManager", None) is AiopollIOManager:
            _run_module.TheIOManager = _replaced  # type: ignore[attr-defined]


def override_default(name: str) -> Callable[[], None]:
    """Make that manager, "aiopoll" or "epoll", the default of every later run, whatever the environment says.

    Returns:
      a function that puts back what was, unless somebody else has changed the default since.

    Raises:
      UnavailableError: aiopoll cannot be served here; nothing is changed.
    """
    global _environment_counts
    make: Callable[[], Any] = {"aiopoll": AiopollIOManager, "epoll": _trio_default}[name]
    if make is AiopollIOManager:
        open_polls().close()
    with _lock:
        before = getattr(_run_module, "TheIOManager", _absent), _environment_counts
        _run_module.TheIOManager, _environment_counts = make, False  # type: ignore[attr-defined]

    def put_back() -> None:
        global _environment_counts
        with _lock:
            if _run_module.TheIOManager is make:
                _run_module.TheIOManager = before[0]  # type: ignore[attr-defined]
            _environment_counts = before[1]

    return put_back


def _offer() -> None:
    """Teach trio.run and trio.lowlevel.start_guest_run the argument ``io_manager``; called once, at import."""
    if _can_choose:
        _run_module.setup_runner = _setup_runner  # type: ignore[attr-defined]
    for original, choosing in ((trio.run, _run), (trio.lowlevel.start_guest_run, _start_guest_run)):
        for module in compat.modules_that_bind(original):
            setattr(module, original.__name__, choosing)
