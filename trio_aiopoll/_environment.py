"""Environment variables that every run looks at when it starts."""

from __future__ import annotations

import os
from typing import Any, Final

_Environ: Final[Any] = type(os.environ)
_has_data: Final = isinstance(getattr(os.environ, "_data", None), dict)


class Variable:
    """An environment variable that is rarely set.

    That one is not set, os.environ says by an exception that it raises and catches: for three variables 5 us of the
    260 that the shortest of runs takes. So we look into the dict inside of it first.
    """

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._key: Final = os.fsencode(name)

    def get(self) -> str:
        """What it is set to at this moment, empty if it is not."""
        environ: Any = os.environ
        if _has_data and type(environ) is _Environ and self._key not in environ._data:
            return ""
        value: str = environ.get(self.name, "")
        return value

    def is_on(self) -> bool:
        """Whether it says yes: it is set, and neither empty nor 0."""
        return self.get() not in ("", "0")


IO_MANAGER: Final = Variable("TRIO_IO_MANAGER")
"""The name of the manager for runs that do not say."""
DEBUG: Final = Variable("TRIO_AIOPOLL_DEBUG")
"""On: every run on aiopoll explains its waits."""
TOP: Final = Variable("TRIO_AIOPOLL_TOP")
"""On: every run tells its statistics to who asks."""
