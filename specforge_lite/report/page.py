"""`write_report`: one self-contained HTML file without scripts, fonts or anything else from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import write_atomically
from specforge_lite.core.provenance import redact
from specforge_lite.evaluation.compare_generation import Decoding
from specforge_lite.report.decoding import acceptance_section, generations_section
from specforge_lite.report.errors import errors_section
from specforge_lite.report.markup import Html, join, table, tag
from specforge_lite.report.sources import read_jsonl
from specforge_lite.report.speedup import config_label, speedup_section
from specforge_lite.report.training import run_table, training_section
from specforge_lite.report.values import read_decoding

# Nothing may run and nothing may be fetched, whatever a model wrote: the browser enforces it as well.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
FOLDED_KEYS = ("config", "packages", "environment")


def write_report(
    path: str | Path,
    *,
    title: str,
    metrics_path: str | Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
    decoding: Decoding | Mapping[str, Any] | None = None,
    speedup_rows: Sequence[Mapping[str, Any]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    errors: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html at `path` (atomically) and return it. A section appears for each thing that is given.

    metrics_path: a run's metrics.jsonl. evaluation: `EvalResult.to_dict()`, what `evaluate_draft.py` writes.
    decoding: `Decoding` or its JSON form. speedup_rows: rows of `bench_model_speedup.py`. provenance: what
    `collect_provenance` returns, or any nested mapping; secrets are removed. errors: errors.json of
    `evaluate_draft.py --error-analysis`.

    Raises DataError for a file or a row that cannot be used.
    """
    rows = _read_metrics(Path(metrics_path)) if metrics_path is not None else []
    if decoding is not None and not isinstance(decoding, Decoding):
        decoding = read_decoding(decoding)
    sections = [
        _section("Training", training_section(rows) if metrics_path is not None else Html("")),
        _section("Acceptance per position", acceptance_section(evaluation, decoding)),
        _section("Where the draft fails", errors_section(errors)),
        _section("Generations", generations_section(decoding.samples if decoding else ())),
        _section("Speed-up", speedup_section(speedup_rows) if speedup_rows else Html("")),
        _section("The run", _facts(rows, provenance)),
    ]
    started = str((provenance or {}).get("started", ""))
    header = tag(
        "header",
        None,
        tag("h1", None, title),
        tag("p", {"class": "note"}, f"started {started}") if started else Html(""),
        _tiles(rows, evaluation, decoding, speedup_rows or ()),
    )
    body = tag("main", None, header, *sections)
    write_atomically(Path(path), document(title, body))
    return Path(path)


def write_errors_page(path: Path, errors: Mapping[str, Any], title: str) -> Path:
    """One self-contained page of an error analysis, every row of it; written atomically."""
    section = tag("section", {"class": "part"}, errors_section(errors, all_rows=True))
    body = tag("main", None, tag("header", None, tag("h1", None, title)), section)
    write_atomically(path, document(title, body))
    return path


def document(title: str, body: Html) -> str:
    """A whole page around `body`."""
    style = resources.files("specforge_lite.assets").joinpath("report.css").read_text(encoding="utf-8")
    head = join(
        [
            tag("meta", {"charset": "utf-8"}),
            tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
            tag("meta", {"name": "color-scheme", "content": "light dark"}),
            tag("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
            tag("title", None, title),
            Html(f"<style>{style}</style>"),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows with a step; the last line may be half written (the run was killed, or is still running)."""
    rows = read_jsonl(path, last_may_be_cut=True)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), (int, float)):
            raise DataError(f"{path}:{number}: expected an object with a number 'step'")
    return rows


def _section(title: str, content: Html) -> Html:
    return tag("section", {"class": "part"}, tag("h2", None, title), content) if content else Html("")


def _tiles(
    rows: Sequence[dict[str, Any]],
    evaluation: Mapping[str, Any] | None,
    decoding: Decoding | None,
    speedup_rows: Sequence[Mapping[str, Any]],
) -> Html:
    """The few numbers a reader came for."""
    tiles: list[tuple[str, str]] = []
    if decoding is not None:
        tiles.append((f"{decoding.acceptance_length:.2f}", "tokens per verification pass, decoded"))
        if decoding.num_passes and decoding.num_passes_without:
            saved = 1 - decoding.num_passes / decoding.num_passes_without
            tiles.append((f"{100 * saved:.0f}%", "target forward passes saved"))
        if decoding.num_identical is not None:
            tiles.append((f"{decoding.num_identical}/{decoding.num_prompts}", "outputs identical without the draft"))
        if decoding.tokens_per_second and decoding.tokens_per_second_without:
            ratio = decoding.tokens_per_second / decoding.tokens_per_second_without
            words = f"{decoding.tokens_per_second:.0f} against {decoding.tokens_per_second_without:.0f} tokens/s"
            tiles.append((f"{ratio:.2f}×", words))
    if evaluation and isinstance(evaluation.get("tau_walk"), (int, float)):
        tiles.append((f"{evaluation['tau_walk']:.2f}", "tokens per pass, estimated on held-out data"))
    if evaluation and evaluation.get("accuracy") and decoding is None:
        tiles.append((f"{100 * evaluation['accuracy'][0]:.0f}%", "first draft step right"))
    measured = [row for row in speedup_rows if isinstance(row.get("speedup"), (int, float)) and row.get("steps")]
    if measured:
        best = max(measured, key=lambda row: row["speedup"])
        tiles.append((f"{best['speedup']:.2f}×", f"best speed-up: {best['benchmark']}, {config_label(best)}"))
    if not tiles and rows:
        tiles.append((f"{rows[-1]['step']:.0f}", "optimizer steps"))
    items = [tag("li", None, tag("b", None, value), tag("span", None, words)) for value, words in tiles]
    return tag("ul", {"class": "tiles"}, *items) if items else Html("")


def _facts(rows: Sequence[dict[str, Any]], provenance: Mapping[str, Any] | None) -> Html:
    parts: list[Html] = []
    if rows:
        parts.append(tag("section", {"class": "card"}, run_table(rows)))
    if provenance:
        # A commit is 40 hex digits, as some keys are; `git` holds nothing else.
        safe = {key: value if key == "git" else redact({key: value})[key] for key, value in provenance.items()}
        plain = {key: value for key, value in safe.items() if key not in FOLDED_KEYS}
        boxes = [table(["where it came from", ""], _flat(plain), 2)]
        for key in FOLDED_KEYS:
            if safe.get(key):
                folded = table(["key", "value"], _flat(safe[key]), 2)
                boxes.append(tag("details", None, tag("summary", None, key), folded))
        parts.append(tag("section", {"class": "card facts-table"}, *boxes))
    return tag("div", {"class": "grid two"}, *parts) if parts else Html("")


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    """Nested mappings as rows of [dotted key, text]."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, (list, tuple)):
        text = " ".join(str(item) for item in value)
    else:
        text = "–" if value is None else str(value)
    return [[prefix or "value", text]]
