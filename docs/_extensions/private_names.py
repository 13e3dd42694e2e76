"""``{private-names} CHECK``: the private names of Trio that a self-check of _trio_compat.py wants, as a list.

The check itself is asked, what it would report of a Trio that has none of them; so the list cannot be out of date.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from trio_aiopoll import _trio_compat

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx


def private_names(check: str) -> list[str]:
    def nothing_is_there(owner: object, name: str) -> bool:
        return False

    def modules_are_complete(owner: object, name: str) -> bool:
        return isinstance(owner, types.ModuleType)

    answers = [missing_if(has, check) for has in (nothing_is_there, modules_are_complete)]
    return list(dict.fromkeys(name for missing in answers for name in missing))


def missing_if(has: Callable[[object, str], bool], check: str) -> list[str]:
    """What the check reports where that is its ``hasattr``."""
    function = getattr(_trio_compat, check)
    missing: list[str] = types.FunctionType(function.__code__, {**vars(_trio_compat), "hasattr": has})()
    return missing


class PrivateNames(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        names = private_names(self.arguments[0])
        items = (nodes.list_item("", nodes.paragraph("", "", nodes.literal("", name))) for name in names)
        return [nodes.bullet_list("", *items)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("private-names", PrivateNames)
    return {"parallel_read_safe": True}
