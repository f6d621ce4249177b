"""HTML and SVG elements whose text is escaped unless it is markup already: model output can never become markup.

A child or attribute that is a plain `str` is escaped; only `Html`, which nothing but this module should make, is not.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

# C0 controls other than tab and newline, DEL, C1 controls: shown as pictures, because HTML does not allow them. Lone
# surrogates cannot be written as UTF-8 at all.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_VOID = {"br", "hr", "meta", "line", "rect", "circle", "path"}


class Html(str):
    """Text that is markup."""


def visible(text: str) -> str:
    """`text` with characters that HTML cannot carry replaced by a picture of them."""
    return _CONTROLS.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text)


def escape(text: str) -> Html:
    """Escape `&<>"'` and unprintable characters; leave `Html` alone."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text), quote=True))


def tag(name: str, attributes: Mapping[str, object] | None = None, *children: str) -> Html:
    """An element. Attributes that are None are left out; numbers are written short."""
    written = "".join(
        f' {key}="{escape(_value(value))}"' for key, value in (attributes or {}).items() if value is not None
    )
    if name in _VOID and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Put parts side by side, escaping those that are plain text."""
    return Html("".join(escape(part) for part in parts))


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def card(title: str, *children: str, note: str = "", wide: bool = False) -> Html:
    """A titled box; `note` is the small print below its content."""
    small = [tag("p", {"class": "note"}, note)] if note else []
    return tag("section", {"class": "card wide" if wide else "card"}, tag("h3", None, title), *children, *small)


def table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> Html:
    """A table that scrolls sideways on a phone; columns after the first `text_columns` are numbers."""

    def cells(name: str, row: list[str]) -> Html:
        classes = ["text" if i < text_columns else "number" for i in range(len(row))]
        return tag("tr", None, *(tag(name, {"class": kind}, cell) for kind, cell in zip(classes, row)))

    head = tag("thead", None, cells("th", header))
    body = tag("tbody", None, *(cells("td", row) for row in rows))
    return tag("div", {"class": "scroll"}, tag("table", None, head, body))
