"""Measures trio_aiopoll against its rivals; README.md says how each figure is made.

What is measured is the trio_aiopoll that is installed, never the checkout this package lies in.
"""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent

# python -m puts the working directory first; as the last one it is still good enough to find this package
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT] + [str(_CHECKOUT)]
