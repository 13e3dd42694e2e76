"""How these pages are built: ``sphinx-build -W --keep-going -n docs docs/_build/html``, from the root of the checkout.

They describe the trio_aiopoll that is installed, from whose docstrings the reference is made. No network is needed:
what they refer to elsewhere stands in ``_inventories``.
"""

import importlib.metadata
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.path.append(str(HERE / "_extensions"))

project = "trio_aiopoll"
author = "The trio_aiopoll team"
project_copyright = author
release = version = importlib.metadata.version("trio-aiopoll")

extensions = [
    "benchmark_table",
    "myst_parser",
    "private_names",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_static"]
default_role = "py:obj"

html_theme = "furo"
html_title = f"trio_aiopoll {release}"
html_static_path = ["_static"]
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a default that is an object is shown as it is written
# what signatures name and nobody documents
nitpick_ignore = [
    ("py:class", name) for name in ("IOManagerChoice", "T", "deque", "outcome.Outcome", "trio.lowlevel.RunStatistics")
]
napoleon_use_ivar = True

intersphinx_mapping = {
    name: (address, str(HERE / "_inventories" / f"{name}.txt"))
    for name, address in {
        "anyio": "https://anyio.readthedocs.io/en/stable/",
        "python": "https://docs.python.org/3/",
        "trio": "https://trio.readthedocs.io/en/stable/",
    }.items()
}
