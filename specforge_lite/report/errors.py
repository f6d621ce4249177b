"""Where the draft fails, as tables: errors.json of `evaluate_draft.py --error-analysis`. Model output is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.report.charts import Bar, bar_chart
from specforge_lite.report.markup import Html, card, table, tag

CONTROL_PICTURES = {"\n": "↵", "\t": "⇥", "\r": "␍"}
MAX_SHOWN_ROWS = 12
MAX_NARROW_COLUMNS = 4


def shown(text: str) -> str:
    """A token for a table: spaces at its ends, line ends and tabs become visible."""
    core = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if core else len(text)
    right = len(text) - len(text.rstrip(" ")) if core else 0
    marked = "·" * left + core + "·" * right
    return "".join(CONTROL_PICTURES.get(letter, letter) for letter in marked)


@dataclass(frozen=True)
class ErrorTable:
    """One table, for a terminal or a page; the first `text_columns` columns are text, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1


def error_tables(errors: Mapping[str, Any]) -> list[ErrorTable]:
    """All tables of an errors.json. Raises DataError for another JSON."""
    try:
        return [make(errors) for make in TABLES]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"errors: not written by evaluate_draft.py --error-analysis: {error}") from None


def _by_kind(errors: Mapping[str, Any]) -> ErrorTable:
    rows = [
        [c["class"], *_tally(c), _percent(c["share_of_misses"]), str(c["outside_draft_vocabulary"])]
        for c in errors["classes"]
    ]
    header = ["kind", *TALLY, "share of misses", "not in draft vocabulary"]
    return ErrorTable("By kind of token, position 0", header, rows)


def _by_position(errors: Mapping[str, Any]) -> ErrorTable:
    kinds = [c["class"] for c in errors["classes"]]
    rows = []
    for step in errors["positions"]:
        values = [step["classes"].get(kind) for kind in kinds]
        cells = [_percent(value["accuracy"]) if value else "–" for value in values]
        rows.append([str(step["position"]), _percent(step["accuracy"]), *cells])
    return ErrorTable("Accuracy by position and kind", ["position", "all", *kinds], rows)


def _by_place(errors: Mapping[str, Any]) -> ErrorTable:
    rows = [[str(place["from"]), *_tally(place)] for place in errors["answer_places"]]
    return ErrorTable("By place in the answer, position 0", ["from token", *TALLY], rows)


def _by_token(errors: Mapping[str, Any]) -> ErrorTable:
    rows = []
    for token in errors["tokens"]:
        guesses = ", ".join(f"{shown(guess['guessed'])} ({guess['count']})" for guess in token["guessed_instead"])
        outside = "" if token["in_draft_vocabulary"] else ", not in draft vocabulary"
        rows.append([shown(token["token"]), token["class"] + outside, guesses, *_tally(token)])
    return ErrorTable("Tokens with most misses", ["token", "kind", "guessed instead", *TALLY], rows, 3)


def _by_context(errors: Mapping[str, Any]) -> ErrorTable:
    rows = [[shown(context["before"]), *_tally(context)] for context in errors["contexts"]]
    return ErrorTable("Contexts with most misses", ["after", *TALLY], rows)


def _pairs(errors: Mapping[str, Any]) -> ErrorTable:
    rows = [[shown(pair["expected"]), shown(pair["guessed"]), str(pair["count"])] for pair in errors["pairs"]]
    return ErrorTable("Mistaken for each other", ["target says", "draft guesses", "times"], rows, 2)


def _samples(errors: Mapping[str, Any]) -> ErrorTable:
    rows = [
        [m["sample_id"], str(m["place"]), m["kind"], *(shown(m[name]) for name in ("before", "expected", "guessed"))]
        for m in errors["samples"]
    ]
    return ErrorTable("Samples", ["sample", "token", "kind", "before", "target says", "draft guesses"], rows, 6)


TALLY = ["tokens", "missed", "accuracy"]
TABLES = (_by_kind, _by_position, _by_place, _by_token, _by_context, _pairs, _samples)


def errors_section(errors: Mapping[str, Any] | None, all_rows: bool = False) -> Html:
    """Cards for a report, the longest tables cut unless `all_rows`; empty without an analysis."""
    if not errors:
        return Html("")
    tables = [item for item in error_tables(errors) if item.rows]
    cards: list[Html] = [_chart(errors)]
    wide: list[Html] = []
    for item in tables:
        rows = item.rows if all_rows else item.rows[:MAX_SHOWN_ROWS]
        place = wide if len(item.header) > MAX_NARROW_COLUMNS else cards
        place.append(card(item.title, table(item.header, rows, item.text_columns), wide=place is wide))
    facts = f"{errors['num_missed']} of {errors['num_tokens']} tokens missed at position 0"
    note = "· is a space, ↵ a line end. A miss: the draft's guess is not the target's most probable token."
    small_print = tag("p", {"class": "note"}, f"{facts}. {note}")
    return tag("div", None, small_print, tag("div", {"class": "grid"}, *cards), *wide)


def _chart(errors: Mapping[str, Any]) -> Html:
    ordered: Sequence[Mapping[str, Any]] = sorted(errors["classes"], key=lambda c: -c["missed"])
    bars = [Bar(c["class"], c["share_of_misses"], f"{_percent(c['share_of_misses'])}, {c['missed']}") for c in ordered]
    chart = bar_chart("Share of misses", bars, full=1.0, label_width=84)
    return card("Share of misses by kind of token", chart, note="position 0; number of misses on the right")


def _tally(row: Mapping[str, Any]) -> list[str]:
    return [str(row["total"]), str(row["missed"]), _percent(row["accuracy"])]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
