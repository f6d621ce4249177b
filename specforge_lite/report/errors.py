"""Where the draft fails, as tables: errors.json of `evaluate_draft.py --error-analysis`. Model output is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import write_atomically
from specforge_lite.report.cards import Card, PageSection, Table, bars_card, percent, render
from specforge_lite.report.figures import Bar

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


def error_tables(errors: Mapping[str, Any]) -> list[Table]:
    """All tables of an errors.json. Raises DataError for another JSON."""
    try:
        return [make(errors) for make in TABLES]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"errors: not written by evaluate_draft.py --error-analysis: {error}") from None


def _by_kind(errors: Mapping[str, Any]) -> Table:
    rows = [
        [c["class"], *_tally(c), _share(c["share_of_misses"]), str(c["outside_draft_vocabulary"])]
        for c in errors["classes"]
    ]
    header = ["kind", *TALLY, "share of misses", "not in draft vocabulary"]
    return Table("By kind of token, position 0", header, rows)


def _by_position(errors: Mapping[str, Any]) -> Table:
    kinds = [c["class"] for c in errors["classes"]]
    rows = []
    for step in errors["positions"]:
        values = [step["classes"].get(kind) for kind in kinds]
        cells = [_share(value["accuracy"]) if value else "–" for value in values]
        rows.append([str(step["position"]), _share(step["accuracy"]), *cells])
    return Table("Accuracy by position and kind", ["position", "all", *kinds], rows)


def _by_place(errors: Mapping[str, Any]) -> Table:
    rows = [[str(place["from"]), *_tally(place)] for place in errors["answer_places"]]
    return Table("By place in the answer, position 0", ["from token", *TALLY], rows)


def _by_token(errors: Mapping[str, Any]) -> Table:
    rows = []
    for token in errors["tokens"]:
        guesses = ", ".join(f"{shown(guess['guessed'])} ({guess['count']})" for guess in token["guessed_instead"])
        outside = "" if token["in_draft_vocabulary"] else ", not in draft vocabulary"
        rows.append([shown(token["token"]), token["class"] + outside, guesses, *_tally(token)])
    return Table("Tokens with most misses", ["token", "kind", "guessed instead", *TALLY], rows, 3)


def _by_context(errors: Mapping[str, Any]) -> Table:
    rows = [[shown(context["before"]), *_tally(context)] for context in errors["contexts"]]
    return Table("Contexts with most misses", ["after", *TALLY], rows)


def _pairs(errors: Mapping[str, Any]) -> Table:
    rows = [[shown(pair["expected"]), shown(pair["guessed"]), str(pair["count"])] for pair in errors["pairs"]]
    return Table("Mistaken for each other", ["target's token", "draft's token", "times"], rows, 2)


def _samples(errors: Mapping[str, Any]) -> Table:
    rows = [
        [m["sample_id"], str(m["place"]), m["kind"], *(shown(m[name]) for name in ("before", "expected", "guessed"))]
        for m in errors["samples"]
    ]
    return Table("Samples", ["sample", "token", "kind", "before", "target's token", "draft's token"], rows, 6)


TALLY = ["tokens", "missed", "accuracy"]
TABLES = (_by_kind, _by_position, _by_place, _by_token, _by_context, _pairs, _samples)


def errors_section(errors: Mapping[str, Any], all_rows: bool = False) -> PageSection:
    """Cards of an analysis, the longest tables cut unless `all_rows`."""
    cards = [_chart(errors)]
    for item in error_tables(errors):
        if item.rows:
            rows = item.rows if all_rows else item.rows[:MAX_SHOWN_ROWS]
            table = Table("", item.header, rows, item.text_columns)
            cards.append(Card(item.title, tables=(table,), wide=len(item.header) > MAX_NARROW_COLUMNS))
    facts = f"{errors['num_missed']:,} of {errors['num_tokens']:,} tokens missed at position 0"
    note = "· is a space, ↵ a line end. A miss: the draft's first choice is not the target's."
    cards.sort(key=lambda card: card.wide)  # narrow cards share rows; wide ones follow
    return PageSection("Where the draft fails", cards, f"{facts}. {note}", dense=True)


def write_errors_page(path: Path, errors: Mapping[str, Any], title: str) -> Path:
    """One self-contained page of an error analysis, every row of it; written atomically."""
    sections = [errors_section(errors, all_rows=True)]
    write_atomically(path, render("report.html", title=title, started="", tiles=[], sections=sections))
    return path


def _chart(errors: Mapping[str, Any]) -> Card:
    ordered = sorted(errors["classes"], key=lambda c: -c["missed"])
    bars = [Bar(c["class"], c["share_of_misses"], f"{c['missed']:,}") for c in ordered]
    note = "position 0; the number of misses stands on the right"
    return bars_card("Share of misses by kind of token", bars, note, limit=1.0, name="Share of misses")


def _tally(row: Mapping[str, Any]) -> list[str]:
    return [str(row["total"]), str(row["missed"]), _share(row["accuracy"])]


def _share(value: float) -> str:
    return percent(value, 1)
