"""`write_report`: one self-contained HTML file without scripts, fonts or anything else from outside.

The sections are built here as plain values; templates/report.html turns them into markup and escapes all text, so that
what a model wrote cannot become markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge_lite.benchmark.choice import Candidate
from specforge_lite.core.files import write_atomically
from specforge_lite.core.provenance import redact
from specforge_lite.evaluation.compare_generation import Decoding, Sample
from specforge_lite.report.cards import Card, PageSection, bars_card, curves_card, percent, render, short_number
from specforge_lite.report.errors import errors_section
from specforge_lite.report.figures import Bar, Curve
from specforge_lite.report.sources import is_number, read_decoding, read_metrics
from specforge_lite.report.speedup import headline, speedup_section
from specforge_lite.report.tables import Table
from specforge_lite.report.training_curves import curves_of

FOLDED_KEYS = ("config", "packages", "environment")
NUM_PASS_COLOURS = 6
MAX_PROMPT_CHARACTERS = 600
# metric of evaluation -> what it is called in a report
ESTIMATES = {
    "tau_walk": "greedy decoding of the held-out answers",
    "tau_chain": "mean over all positions",
    "tau_sampling": "sampling at temperature 1",
}
ESTIMATES_NOTE = (
    "Acceptance length: tokens per verification pass of the target, for chains. The mean over all positions lets a pass"
    " start at any token, which is optimistic: real passes start where the draft was wrong before."
)
# panel of a chart -> (title, note, lowest value of the axis)
TRAINING_PANELS: dict[str, tuple[str, str, float | None]] = {
    "step_loss": ("Loss by position", "nats per token; position 0 is the first drafted token", None),
    "accuracy": ("Accuracy by position", "share of tokens where the draft's first choice is the target's", 0.0),
    "acceptance": ("Estimated acceptance length", "tokens per verification pass of the target, for chains", 1.0),
    "learning_rate": ("Learning rate", "", 0.0),
    "grad_norm": ("Gradient norm", "before clipping", 0.0),
    "speed": ("Training speed", "tokens per second, all ranks", 0.0),
}
LAST_VALUES = {
    "step": "optimizer steps",
    "epoch": "epochs",
    "loss": "training loss (weighted sum over positions)",
    "acc0": "accuracy at position 0",
    "tau": "estimated acceptance length, training data",
    "eval/tau_walk": "estimated acceptance length, held-out data",
    "tokens_per_second": "tokens per second",
    "wait_share": "share of time waiting for hidden states",
    "memory_bytes": "memory",
    "skipped_samples": "samples skipped",
    "nonfinite_steps": "steps skipped (not finite)",
}


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
    ranking: Sequence[Candidate] = (),
) -> Path:
    """Write report.html at `path` (atomically) and return it. A section appears for each thing that is given.

    metrics_path: a run's metrics.jsonl. evaluation: `EvalResult.to_dict()`, what `evaluate_draft.py` writes.
    decoding: `Decoding` or its JSON form. speedup_rows: rows of `bench_model_speedup.py`. provenance: what
    `collect_provenance` returns, or any nested mapping; secrets are removed. errors: errors.json of
    `evaluate_draft.py --error-analysis`. ranking: of those rows, the best first.

    Raises DataError for a file or a row that cannot be used.
    """
    rows = read_metrics(Path(metrics_path)) if metrics_path is not None else []
    if decoding is not None and not isinstance(decoding, Decoding):
        decoding = read_decoding(decoding)
    sections = [
        training_section(rows) if metrics_path is not None else None,
        acceptance_section(evaluation or {}, decoding),
        errors_section(errors) if errors else None,
        generations_section(decoding.samples) if decoding is not None and decoding.samples else None,
        speedup_section(speedup_rows, ranking) if speedup_rows else None,
        _facts(rows, provenance or {}),
    ]
    tiles = [*_tiles(rows, evaluation or {}, decoding), *(headline(speedup_rows, ranking) if speedup_rows else ())]
    started = str((provenance or {}).get("started", ""))
    shown = [section for section in sections if section is not None]
    write_atomically(Path(path), render("report.html", title=title, started=started, tiles=tiles[:5], sections=shown))
    return Path(path)


def training_section(rows: Sequence[dict[str, Any]]) -> PageSection:
    """All charts that the rows have numbers for."""
    known = ("step", "step_losses", "accuracies", "tau", "learning_rate", "grad_norm")
    kept = [{key: value for key, value in row.items() if key in known or key.startswith("eval/")} for row in rows]
    curves = curves_of(kept, "metrics") if any(len(row) > 1 for row in kept) else []
    speed = [row for row in rows if is_number(row.get("tokens_per_second"))]
    if speed:
        values = [float(row["tokens_per_second"]) for row in speed]
        curves.append(Curve("tokens per second", "speed", None, False, [float(row["step"]) for row in speed], values))
    cards = []
    for panel, (title, note, floor) in TRAINING_PANELS.items():
        shown = [curve for curve in curves if curve.panel == panel]
        for curve in shown if panel == "acceptance" else ():
            held_out, _, name = curve.label.partition("tau")
            curve.label = ("held-out: " if held_out else "") + ESTIMATES.get(f"tau{name}", "training data")
        if shown:
            cards.append(curves_card(title, note, shown, floor))
    note = "" if cards else "The metrics file has no row of a training step."
    return PageSection("Training", cards, note)


def acceptance_section(evaluation: Mapping[str, Any], decoding: Decoding | None) -> PageSection | None:
    """Bars per drafted position: what teacher-forced evaluation gives, and what decoding accepted; the estimates."""
    cards = []
    accepted = decoding.accepted_per_position if decoding is not None else ()
    groups = (
        ("Draft accuracy", evaluation.get("accuracy") or (), "second",
         "share of held-out tokens where the draft's first choice is the target's, each position by itself"),
        ("Accepted in decoding", accepted, "accent",
         "share of verification passes that accepted the drafted token at this position and all before it"),
    )  # fmt: skip
    for title, shares, colour, note in groups:
        if shares:
            bars = [Bar(f"position {k}", value, percent(value), colour) for k, value in enumerate(shares)]
            cards.append(bars_card(title, bars, note, limit=1.0))
    estimates = [[text, f"{evaluation[key]:.2f}"] for key, text in ESTIMATES.items() if is_number(evaluation.get(key))]
    tables = [Table("", ["estimated", "tokens per pass"], estimates)] if estimates else []
    if decoding is not None:
        settings = f", {decoding.settings}" if decoding.settings else ""
        row = [f"{decoding.num_prompts} prompts{settings}", f"{decoding.acceptance_length:.2f}"]
        tables.append(Table("", ["decoded", "tokens per pass"], [row]))
    if accepted:
        before = (1.0, *accepted)
        rows = [[str(k), percent(s / b if b else 0.0)] for k, (s, b) in enumerate(zip(accepted, before))]
        cards.append(
            Card("Accepted in decoding, given all before it", tables=(Table("", ["position", "share"], rows),))
        )
    if tables:
        cards.append(Card("Acceptance length", tables=tuple(tables), note=ESTIMATES_NOTE if estimates else ""))
    return PageSection("Acceptance per position", cards, dense=True) if cards else None


def generations_section(samples: Sequence[Sample]) -> PageSection:
    """One box per sample, each token coloured by the verification pass it came from."""
    return PageSection("Generations", samples=[_generation(sample) for sample in samples])


def _generation(sample: Sample) -> dict[str, Any]:
    passes, start = [], 0
    for index, count in enumerate(sample.tokens_per_pass):
        texts = sample.token_texts[start : start + count]
        if not texts:
            break
        own = count - 1 if len(texts) == count else None  # the last pass may be cut by the length limit
        title = f"pass {index + 1}: {count} token{'s' if count != 1 else ''}"
        passes.append({"colour": index % NUM_PASS_COLOURS, "title": title, "tokens": texts, "own": own})
        start += count
    facts = f"{len(sample.token_texts)} tokens in {len(sample.tokens_per_pass)} passes"
    if passes:
        facts += f", {len(sample.token_texts) / len(sample.tokens_per_pass):.2f} per pass"
    prompt = sample.prompt
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        prompt = prompt[:MAX_PROMPT_CHARACTERS].rstrip() + " …"
    return {"category": sample.category, "facts": facts, "prompt": prompt, "passes": passes}


def _tiles(
    rows: Sequence[dict[str, Any]], evaluation: Mapping[str, Any], decoding: Decoding | None
) -> list[tuple[str, str]]:
    """The few numbers a reader came for, (value, words); none follows from another."""
    tiles: list[tuple[str, str]] = []
    estimate = evaluation.get("tau_walk")
    if decoding is not None:
        beside = f" (estimated before: {estimate:.2f})" if is_number(estimate) else ""
        tiles.append((f"{decoding.acceptance_length:.2f}", f"tokens per pass of the target, decoded{beside}"))
        if decoding.tokens_per_second and decoding.tokens_per_second_without:
            ratio = decoding.tokens_per_second / decoding.tokens_per_second_without
            words = f"{decoding.tokens_per_second:.0f} against {decoding.tokens_per_second_without:.0f} tokens/s"
            tiles.append((f"{ratio:.2f}×", f"speed in our decoder: {words}"))
        if decoding.num_identical is not None:
            words = "outputs are the same with and without the draft"
            if decoding.num_near_ties:
                words += f"; {decoding.num_near_ties} of the others differ first at a near tie"
            tiles.append((f"{decoding.num_identical} of {decoding.num_prompts}", words))
    elif is_number(estimate):
        tiles.append((f"{estimate:.2f}", "tokens per pass of the target, estimated on held-out data"))
    if evaluation.get("accuracy"):
        tiles.append((percent(evaluation["accuracy"][0]), "of first drafted tokens are right (held-out data)"))
    if not tiles and rows:
        tiles.append((f"{rows[-1]['step']:,.0f}", "optimizer steps"))
    return tiles


def _facts(rows: Sequence[dict[str, Any]], provenance: Mapping[str, Any]) -> PageSection | None:
    last: dict[str, float] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if is_number(value)})
    values = [[name, _last_value(key, last[key])] for key, name in LAST_VALUES.items() if key in last]
    facts = [Table("", ["last values", ""], values)] if values else []
    # A commit is 40 hex digits, as some keys are; `git` holds nothing else.
    safe = {key: value if key == "git" else redact({key: value})[key] for key, value in provenance.items()}
    plain = {key: value for key, value in safe.items() if key not in FOLDED_KEYS}
    if plain:
        facts.append(Table("", ["provenance", ""], _flat(plain), 2))
    folded = [Table(key, ["key", "value"], _flat(safe[key]), 2) for key in FOLDED_KEYS if safe.get(key)]
    return PageSection("The run", facts=facts, folded=folded) if facts or folded else None


def _last_value(key: str, value: float) -> str:
    if key == "memory_bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"
    return percent(value, 1) if key in ("wait_share", "acc0") else short_number(value)


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    """Nested mappings as rows of [dotted key, text]."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, (list, tuple)):
        return [[prefix or "value", " ".join(str(item) for item in value)]]
    return [[prefix or "value", "–" if value is None else str(value)]]
