"""``python -m trio_aiopoll``; see `trio_aiopoll._commands`."""

import sys

from ._commands import main

sys.exit(main(sys.argv[1:]))
