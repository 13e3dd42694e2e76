"""Running a program in this process, such that it cannot tell from having been started by Python itself.

What Python does when it starts a program is done here by hand, but for ``sys.argv[1:]``, which is there already:
``runpy`` puts back ``__main__`` when the main module has ended, while threads and atexit functions may still need it,
and it shows up in every traceback.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import pkgutil
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType, TracebackType


class NotFoundError(Exception):
    """There is no such program; the message and the exit code are those of Python."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Program:
    """What is to be run.

    Args:
      code: of the main module.
      argv0: what ``sys.argv[0]`` is going to be.
      path0: what ``sys.path[0]`` is going to be, in the place of the current directory.
      attributes: of the main module.
    """

    def __init__(self, code: CodeType, argv0: str, path0: str | None, attributes: dict[str, Any]) -> None:
        self._code = code
        self._argv0 = argv0
        self._path0 = path0
        self._main = ModuleType("__main__")
        self._main.__dict__.update(attributes)

    def run(self) -> None:
        """Run the main module; what it raises is raised, and will be shown without us in the traceback."""
        sys.argv[0] = self._argv0
        if self._path0 is not None:
            sys.path[0] = self._path0
        sys.modules["__main__"] = self._main
        try:
            exec(self._code, self._main.__dict__)
        except BaseException as error:
            _show_from(error, self._main.__dict__)
            raise


def _show_from(error: BaseException, namespace: dict[str, Any] | None) -> None:
    """Have the traceback begin in this namespace when Python shows it; without one, have none at all."""
    program_hook = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = program_hook
        if value is error:
            while traceback is not None and traceback.tb_frame.f_globals is not namespace:
                traceback = traceback.tb_next
            value.__traceback__ = traceback
        program_hook(kind, value, traceback)

    sys.excepthook = hook


def _has_safe_path() -> bool:
    """Whether Python was told to put nothing of the kind at the beginning of sys.path."""
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))


def _as_module(spec: importlib.machinery.ModuleSpec) -> tuple[CodeType | None, dict[str, Any]]:
    loader: Any = spec.loader
    attributes = {
        "__spec__": spec,
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__loader__": loader,
        "__package__": spec.parent,
    }
    return loader.get_code(spec.name), attributes


def find_module(name: str) -> Program:
    """What ``python -m name`` runs.

    Raises:
      NotFoundError: there is no such module, or none that can be run.
    """
    spec = _spec_of(name)
    if spec.submodule_search_locations is not None:
        try:
            spec = _spec_of(f"{name}.__main__")
        except NotFoundError as error:
            raise NotFoundError(f"{error}; {name!r} is a package and cannot be directly executed", 1) from None
    try:
        code, attributes = _as_module(spec)
    except SyntaxError as error:
        _show_from(error, None)
        raise
    if code is None:
        raise NotFoundError(f"No code object available for {name}", 1)
    return Program(code, spec.origin or name, None, attributes)


def _spec_of(name: str) -> importlib.machinery.ModuleSpec:
    sys.argv[0] = "-m"  # as long as parent packages are imported
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and f"{name}.".startswith(f"{error.name}.")
        ):
            raise NotFoundError(f"No module named {name}", 1) from None
        message = f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})"
        raise NotFoundError(message, 1) from error
    if spec is None or (spec.loader is None and spec.submodule_search_locations is None):
        raise NotFoundError(f"No module named {name}", 1)
    return spec


def find_script(path: str) -> Program:
    """What ``python path`` runs: a script, a compiled one, or a directory or ZIP file with a ``__main__`` in it.

    Raises:
      NotFoundError: there is no such script, or it cannot be read.
      SyntaxError: it does not compile.
    """
    # Python does not look for ".." and the like in it.
    absolute = os.getcwd() if path == "." else os.path.join(os.getcwd(), path)
    importer: Any = pkgutil.get_importer(absolute)
    if (importer is not None and not isinstance(importer, importlib.machinery.FileFinder)) or os.path.isdir(path):
        return _find_main_in(path, absolute, importer)
    try:
        with io.open_code(absolute) as file:
            code = pkgutil.read_code(file)
        if code is None:
            with io.open_code(absolute) as file:
                code = _compiled(file.read(), absolute)
    except OSError as error:
        message = f"can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}"
        raise NotFoundError(message, 2) from None
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    attributes = {"__file__": absolute, "__cached__": None, "__loader__": loader, "__package__": None, "__spec__": None}
    path0 = None if _has_safe_path() else os.path.dirname(os.path.realpath(path))
    return Program(code, path, path0, attributes)


def _compiled(source: bytes, path: str) -> CodeType:
    try:
        code: CodeType = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        _show_from(error, None)
        raise
    return code


def _find_main_in(path: str, absolute: str, importer: Any) -> Program:
    spec = importer.find_spec("__main__") if importer is not None else None
    if spec is None or spec.loader is None:
        raise NotFoundError(f"can't find '__main__' module in {absolute!r}", 1)
    if _has_safe_path():
        sys.path.insert(0, absolute)
    code, attributes = _as_module(spec)
    if code is None:
        raise NotFoundError(f"No code object available for {path}", 1)
    return Program(code, path, absolute, attributes)
