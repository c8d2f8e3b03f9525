"""Text from outside made harmless for Markdown: names, ids and errors come from other people's repositories and folders.

Everything is either known to be `Markdown`, or goes through `plain` or `code`. A code span is the one place where Markdown,
HTML and automatic links are all switched off, so whatever is not plain words goes there.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 200
_WORD = r"[^\W_](?:[\w.+/-]*[^\W_])?"
_PLAIN = re.compile(rf"{_WORD}(?: {_WORD})*")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def one_line(text: object) -> str:
    """The text on one line: no control or formatting characters, runs of blanks made one, at most `LONGEST` characters."""
    visible = "".join(" " if c.isspace() or unicodedata.category(c)[0] == "C" else c for c in str(text))
    short = " ".join(visible.split())
    return short if len(short) <= LONGEST else f"{short[: LONGEST - 1]}…"


def code(text: object) -> Markdown:
    """The text as a code span, in a table or not. A pipe becomes its look-alike: parsers differ on escaping it in tables."""
    content = one_line(text).replace("|", "∣") or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", content)), default=0) + 1)
    padding = " " if content[0] == "`" or content[-1] == "`" else ""
    return Markdown(f"{fence}{padding}{content}{padding}{fence}")


def plain(text: object) -> Markdown:
    """The text as it is if it is `Markdown` or plain words, else as a code span."""
    if isinstance(text, Markdown):
        return text
    words = one_line(text)
    return Markdown(words) if _PLAIN.fullmatch(words) and "www." not in words.lower() else code(words)


def block(text: str, language: str) -> Markdown:
    """The text as a fenced code block, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> Markdown:
    """A table whose cells all go through `plain`; the first `words` columns stand to the left, the numbers to the right."""
    rule = Markdown(f"|{'|'.join('---' if i < words else '---:' for i in range(len(header)))}|")
    return Markdown("\n".join([_row(header), rule, *map(_row, rows)]))


def _row(cells: Sequence[str]) -> Markdown:
    return Markdown(f"| {' | '.join(map(plain, cells))} |")


def listed(items: Iterable[str]) -> Markdown:
    """`a`, `a and b`, or `a, b and c`."""
    *first, last = map(plain, items)
    return Markdown(f"{', '.join(first)} and {last}" if first else last)
