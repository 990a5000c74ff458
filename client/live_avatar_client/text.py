"""Makes text of unknown origin safe for a terminal and a log: of bounded length, without control characters."""

from typing import Final

MAX_TEXT_CHARS: Final = 1_000
_CUT: Final = "..."


def printable(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Return `text` with a backslash escape for each character that does not print, line ends included, and cut."""
    cut = text if len(text) <= max_chars else text[: max_chars - len(_CUT)] + _CUT
    return "".join(char if char.isprintable() else _escaped(char) for char in cut)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
