"""What the commands print with: colours where they are wanted, tables, bars, a line that shows progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STYLES: Final[Mapping[str, str]] = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m")
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_PLAIN: Final = str.maketrans(
    {"█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "=", "▍": "-", "▎": "-", "▏": "-", "·": "."}
)


def is_interactive(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Terminal:
    """A stream to print to.

    Colours are used on a terminal, unless the environment has ``NO_COLOR``; characters beyond ASCII if the stream's
    encoding has them.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream: TextIO = stream or sys.stdout
        self.is_interactive = is_interactive(self.stream)
        self._has_colours = self.is_interactive and not os.environ.get("NO_COLOR")
        try:
            _EIGHTHS.encode(self.stream.encoding or "ascii")
            self._has_blocks = True
        except UnicodeEncodeError:
            self._has_blocks = False

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns if self.is_interactive else 100

    def style(self, text: str, *styles: str) -> str:
        if not (self._has_colours and styles and text):
            return text
        return f"\x1b[{';'.join(_STYLES[style] for style in styles)}m{text}\x1b[0m"

    def print(self, text: str = "") -> None:
        if not self._has_blocks:
            text = text.translate(_PLAIN)
            encoding = self.stream.encoding or "ascii"
            text = text.encode(encoding, "replace").decode(encoding)
        print(text, file=self.stream, flush=True)

    def transient(self, text: str) -> None:
        """Show a line in the place of the last transient one; on a terminal only."""
        if self.is_interactive:
            self.stream.write("\r" + text[: self.width - 1] + "\x1b[K")
            self.stream.flush()

    def clear(self) -> None:
        """Start a new screen; on a terminal only."""
        if self.is_interactive:
            self.stream.write("\x1b[H\x1b[2J")


def bar(value: float, full: float, width: int) -> str:
    """``width`` characters for ``full``, in eighths of a character; a value beyond is cut off."""
    eighths = round(min(max(value / full, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def visible_length(text: str) -> int:
    return len(_ESCAPE.sub("", text))


def table(rows: Sequence[Sequence[str]], align: str, gap: int = 3) -> list[str]:
    """Lines with aligned columns.

    Args:
      align: for each column ``<`` or ``>``.
    """
    widths = [max(visible_length(row[column]) for row in rows) for column in range(len(align))]
    lines = []
    for row in rows:
        cells = []
        for cell, side, width in zip(row, align, widths, strict=True):
            padding = " " * (width - visible_length(cell))
            cells.append(padding + cell if side == ">" else cell + padding)
        lines.append((" " * gap).join(cells).rstrip())
    return lines
