"""What is wrong with flags and keys, in the words of the user who gave them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import yaml

from specforge_lite.core.errors import suggest
from specforge_lite.core.settings import MISSING, Leaves, Parse, bare, dashed


def describe(parse: Parse, item: Any) -> Iterator[str]:
    """The lines about one of pydantic's errors."""
    location = [str(part) for part in item["loc"]]
    leaf = next((part for part in location if part in parse.leaves), "")
    typed = parse.typed.get(leaf)
    key = typed or ".".join(location)
    place = key if typed or not parse.source or not location else parse.source + key
    if item["type"] == "extra_forbidden":
        yield f"{place}: unknown key{nearest(parse, location[-1], [*parse.keys, *parse.config_class.model_fields])}"
    elif item["type"] == "missing":
        yield f"{key}: required (flag {dashed('--' + location[-1])})"
    elif item["type"] == "literal_error":
        expected = [word.strip(" '") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = suggest(str(item["input"]), expected)
        known = f"; known: {', '.join(expected)}"
        yield f"{place}: unknown value '{item['input']}'{hint if hint != known else ''}{known}"
    elif item["type"] in ("value_error", "assertion_error"):
        for line in item["msg"].removeprefix("Value error, ").split("\n"):
            message = _as_typed(parse, line.strip())
            yield f"{place}: {message}" if place and not message.startswith(place) else message
    else:
        yield f"{place}: {item['msg']} (found {item['input']!r})"


def _as_typed(parse: Parse, message: str) -> str:
    """Field names before the first colon become the flags that the user typed."""
    head, colon, rest = message.partition(":")
    for leaf, flag in parse.typed.items():
        head = re.sub(rf"^{leaf}\b" if "_" not in leaf else rf"\b{leaf}\b", flag, head)
    return head + colon + rest


def nearest(parse: Parse, name: str, known: Iterable[str]) -> str:
    """What an unknown name probably means: a name of another project, or one of ours mistyped or cut short."""
    plain, dashes = bare(name), "--" if name.startswith("--") else ""
    names = {bare(word) for word in known}
    if not dashes and plain in parse.keys:  # a key in the wrong section
        return f"; did you mean '{'.'.join((*parse.leaves[parse.keys[plain]][0], parse.keys[plain]))}'?"
    peer = peer_flags().get(plain.replace("_", "-"), ())
    if isinstance(peer, str):
        return f"; {peer}"
    found = [word for word in map(bare, peer) if word in names][:1]
    found = found or difflib.get_close_matches(plain, sorted(names), n=1, cutoff=0.8)
    found = found or sorted((word for word in names if word.startswith(plain + "_")), key=len)[:1]
    return f"; did you mean '{dashed(dashes + found[0]) if dashes else found[0]}'?" if found else ""


def peer_flags() -> dict[str, tuple[str, ...] | str]:
    """What flags of other projects are called here, or a note where no flag of ours is the same."""
    tables = yaml.safe_load((resources.files("specforge_lite.assets") / "peer_flags.yaml").read_text("utf-8"))
    ours = {peer: tuple(names.split()) for names, theirs in tables["flags"].items() for peer in theirs.split()}
    return ours | {peer: note for note, theirs in tables["notes"].items() for peer in theirs.split()}


def take_out(values: dict[str, Any], item: Any, leaves: Leaves) -> bool:
    """Remove the value of a mistake, or put MISSING for what is missing; False where there is nothing to remove."""
    *path, name = [str(part) for part in item["loc"]] or [""]
    for depth, part in enumerate(item["loc"]):  # an item of a list: take the list out
        if part in leaves:
            path, name = [str(word) for word in item["loc"][:depth]], str(part)
    inner: Any = values
    for part in path:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        return False
    if item["type"] == "missing":
        inner[name] = MISSING
        return True
    found = name in inner
    inner.pop(name, None)
    return found
