"""Where the draft fails, as tables: errors.json of `evaluate_draft.py --error-analysis`. Model output is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import write_atomically
from specforge_lite.evaluation.error_analysis import ErrorAnalysis
from specforge_lite.evaluation.run import save_results
from specforge_lite.report.cards import Card, PageSection, bars_card, percent, render
from specforge_lite.report.figures import Bar
from specforge_lite.report.tables import Table, print_table

CONTROL_PICTURES = {"\n": "↵", "\t": "⇥", "\r": "␍"}
MAX_SHOWN_ROWS, MAX_PRINTED_ROWS = 12, 10
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
        return list(_tables(errors))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"errors: not written by evaluate_draft.py --error-analysis: {error}") from None


def _tables(errors: Mapping[str, Any]) -> Iterator[Table]:
    tally = ["tokens", "missed", "accuracy"]
    rows = []
    for kind in errors["classes"]:
        share, outside = _share(kind["share_of_misses"]), str(kind["outside_draft_vocabulary"])
        rows.append([kind["class"], *_tally(kind), share, outside])
    header = ["kind", *tally, "share of misses", "not in draft vocabulary"]
    yield Table("By kind of token, position 0", header, rows)

    kinds = [kind["class"] for kind in errors["classes"]]
    rows = []
    for step in errors["positions"]:
        found = [step["classes"].get(kind) for kind in kinds]
        rows.append([str(step["position"]), _share(step["accuracy"])])
        rows[-1] += [_share(value["accuracy"]) if value else "–" for value in found]
    yield Table("Accuracy by position and kind", ["position", "all", *kinds], rows)

    rows = [[str(place["from"]), *_tally(place)] for place in errors["answer_places"]]
    yield Table("By place in the answer, position 0", ["from token", *tally], rows)

    rows = []
    for token in errors["tokens"]:
        guesses = ", ".join(f"{shown(guess['guessed'])} ({guess['count']})" for guess in token["guessed_instead"])
        outside = "" if token["in_draft_vocabulary"] else ", not in draft vocabulary"
        rows.append([shown(token["token"]), token["class"] + outside, guesses, *_tally(token)])
    yield Table("Tokens with most misses", ["token", "kind", "guessed instead", *tally], rows, 3)

    rows = [[shown(context["before"]), *_tally(context)] for context in errors["contexts"]]
    yield Table("Contexts with most misses", ["after", *tally], rows)

    rows = [[shown(pair["expected"]), shown(pair["guessed"]), str(pair["count"])] for pair in errors["pairs"]]
    yield Table("Mistaken for each other", ["target's token", "draft's token", "times"], rows, 2)

    rows = []
    for miss in errors["samples"]:
        texts = (shown(miss[name]) for name in ("before", "expected", "guessed"))
        rows.append([miss["sample_id"], str(miss["place"]), miss["kind"], *texts])
    yield Table("Samples", ["sample", "token", "kind", "before", "target's token", "draft's token"], rows, 6)


def errors_section(errors: Mapping[str, Any], all_rows: bool = False) -> PageSection:
    """Cards of an analysis, the longest tables cut unless `all_rows`."""
    ordered = sorted(errors["classes"], key=lambda kind: -kind["missed"])
    bars = [Bar(kind["class"], kind["share_of_misses"], f"{kind['missed']:,}") for kind in ordered]
    note = "position 0; the number of misses stands on the right"
    cards = [bars_card("Share of misses by kind of token", bars, note, limit=1.0, name="Share of misses")]
    for item in error_tables(errors):
        if item.rows:
            rows = item.rows if all_rows else item.rows[:MAX_SHOWN_ROWS]
            table = replace(item, title="", rows=rows)
            cards.append(Card(item.title, tables=(table,), wide=len(item.header) > MAX_NARROW_COLUMNS))
    facts = f"{errors['num_missed']:,} of {errors['num_tokens']:,} tokens missed at position 0"
    note = "· is a space, ↵ a line end. A miss: the draft's first choice is not the target's."
    cards.sort(key=lambda card: card.wide)  # narrow cards share rows; wide ones follow
    return PageSection("Where the draft fails", cards, f"{facts}. {note}", dense=True)


def write_errors(directory: Path, analysis: ErrorAnalysis, title: str) -> Path:
    """errors.json, errors.html (one self-contained page, every row) in `directory`, and the tables on the terminal; ->
    the page."""
    errors, page = analysis.to_dict(), directory / "errors.html"
    save_results(directory / "errors.json", errors)
    for table in error_tables(errors):
        if table.rows:
            print_table(replace(table, rows=table.rows[:MAX_PRINTED_ROWS]))
    sections = [errors_section(errors, all_rows=True)]
    title = f"Errors of {title}"
    write_atomically(page, render("report.html", title=title, started="", tiles=[], sections=sections))
    return page


def _tally(row: Mapping[str, Any]) -> list[str]:
    return [str(row["total"]), str(row["missed"]), _share(row["accuracy"])]


def _share(value: float) -> str:
    return percent(value, 1)
