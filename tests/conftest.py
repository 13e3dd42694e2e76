"""The suite tests the package that a user would install, never the checkout it lies in."""

from __future__ import annotations

import signal
from pathlib import Path

import trio_aiopoll

CHECKOUT = Path(__file__).resolve().parent.parent

if Path(trio_aiopoll.__file__).is_relative_to(CHECKOUT / "trio_aiopoll"):
    raise RuntimeError(
        f"trio_aiopoll was imported from the checkout ({trio_aiopoll.__file__}); "
        "install it ('pip install .') and run 'python -P -m pytest' or plain 'pytest' from its root"
    )

# A shell starts what it puts into the background with SIGINT ignored, and the tests of KeyboardInterrupt, ours and
# Trio's own in a child process, would wait for it for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
