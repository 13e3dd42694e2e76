"""A Trio- and anyio-compatible I/O backend for Linux that waits by AIO polls.

After ``import trio_aiopoll``, ``trio.run(main, io_manager="aiopoll")`` runs an unmodified Trio program on it.

PYTEST_DONT_REWRITE
"""

# The last line is for pytest: for our plugin's sake it would rewrite the asserts of this package, and complain where
# that comes too late, as under python -m trio_aiopoll run -m pytest.

import os
import sys

if sys.platform != "linux":
    raise ImportError(
        f"trio_aiopoll works on Linux only, because it is made of Linux's AIO polls; this is {sys.platform}"
    )

try:
    from . import _batch as _batch
    from . import _ring_ffi as _ring_ffi
except ImportError:
    raise ImportError(
        f"the C core of trio_aiopoll is not built in {os.path.dirname(__file__)}; in a checkout, use 'pip install .' "
        "and start Python in another directory, or use 'pip install -e .'"
    ) from None

from . import _anyio, _selection
from ._debugging import ExplainingIOManager
from ._io_manager import AiopollIOManager, AiopollStatistics
from ._probe import ProbeResult, UnavailableError, probe
from ._selection import install, run, start_guest_run, uninstall
from ._tick_recorder import Sample, Tick, TickRecorder

__version__ = "0.1.0"

__all__ = [
    "AiopollIOManager",
    "AiopollStatistics",
    "ExplainingIOManager",
    "ProbeResult",
    "Sample",
    "Tick",
    "TickRecorder",
    "UnavailableError",
    "install",
    "probe",
    "run",
    "start_guest_run",
    "uninstall",
]

for _name in __all__:  # so that documentation and error messages name what users import
    globals()[_name].__module__ = __name__
del _name

_selection._offer()
_anyio.offer()
