"""Results as tables of text: one form for terminals, pages and markdown, and the tables that commands print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specforge_lite.core.log import format_bytes

if TYPE_CHECKING:
    from specforge_lite.benchmark.planner import Plan
    from specforge_lite.checkpoints.contract import Finding
    from specforge_lite.evaluation.acceptance import Acceptance, Decoded
    from specforge_lite.evaluation.compare_generation import Decoding
    from specforge_lite.evaluation.completions import CompletionResult
    from specforge_lite.training.estimate import MemoryPlan
    from specforge_lite.training.evaluate import EvalResult

# C0 controls other than tab and newline, DEL, C1 controls: shown as pictures, because HTML does not allow them. Lone
# surrogates cannot be written as UTF-8 at all.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
LEVEL_STYLES = {"OK": "green", "SKIPPED": "yellow", "WARNING": "yellow", "BROKEN": "bold red"}


def visible(text: str) -> str:
    """`text` with characters that neither HTML nor a terminal should get replaced by a picture of them."""
    return _CONTROLS.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text)


@dataclass(frozen=True)
class Table:
    """The first `text_columns` columns are text, the others numbers; an empty row is a line across."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    caption: str = ""

    def markdown(self) -> str:
        lines = ["| " + " | ".join(line) + " |" for line in (self.header, *self.rows)]
        return "\n".join([lines[0], "|" + "---|" * len(self.header), *lines[1:]])


def print_table(table: Table, min_width: int = 0, styles: Mapping[str, str] | None = None) -> None:
    """Print in the terminal; what a model wrote is no markup. styles: a whole cell -> its style."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    title, caption = Text(table.title), Text(table.caption)
    shown = RichTable(title=title, caption=caption, title_justify="left", caption_justify="left")
    for place, name in enumerate(table.header):
        shown.add_column(name, justify="left" if place < table.text_columns else "right", overflow="fold")
    for row in table.rows:
        if row:
            shown.add_row(*(Text(visible(cell), (styles or {}).get(cell, "")) for cell in row))
        else:
            shown.add_section()
    Console(width=max(Console().width, min_width)).print(shown)


def print_findings(title: str, findings: Sequence[Finding]) -> bool:
    """Print the table, then one `broken:` line per finding that is; -> whether there is one."""
    rows = [[finding.check, finding.level.upper(), finding.message] for finding in findings]
    print_table(Table(title, ["check", "result", "what was found"], rows, 3), styles=LEVEL_STYLES)
    broken = [finding for finding in findings if finding.is_broken]
    for finding in broken:
        print(f"broken: {finding.check}: {finding.message}", flush=True)
    return bool(broken)


# ---------------------------------------------------------------------------------------------------------- evaluation


def positions_table(result: EvalResult, title: str) -> Table:
    """Accuracy and loss by position."""
    header = ["position", "accuracy mean", "accuracy std", "loss mean", "loss std", "accuracy", "loss"]
    columns = zip(
        result.accuracy_mean, result.accuracy_std, result.loss_mean, result.loss_std, result.accuracy, result.loss
    )
    formats = ("{:.2%}", "{:.2%}", "{:.4f}", "{:.4f}", "{:.2%}", "{:.4f}")
    rows = [[str(k), *map(str.format, formats, values)] for k, values in enumerate(columns)]
    counts = f"{result.num_samples} samples in {result.num_batches} batches, {result.num_supervised} supervised tokens"
    note = "mean and standard deviation over batches; the last two columns over all tokens"
    return Table(f"{title}: {counts}", header, rows, caption=note)


def acceptance_table(estimated: Acceptance, decoded: Decoded) -> Table:
    """Share of passes that accepted drafted token k: estimated, and decoded."""
    pairs = zip(estimated.per_position, decoded.per_position)
    rows = [[str(k), *(f"{share:.3f}" for share in pair)] for k, pair in enumerate(pairs)]
    lengths = (estimated.tokens_per_pass, decoded.tokens_per_pass)
    rows.append(["tokens per pass", *(f"{value:.3f}" for value in lengths)])
    return Table("", ["k", "estimated", "decoded"], rows)


def checkpoints_table(entries: Sequence[dict[str, Any]], best: dict[str, Any] | None, metric: str) -> Table:
    """Entries of checkpoints.json; the best one is marked."""
    header = ["", "checkpoint", "tau walk", "tau chain", "tau sampling", "accuracy 0", "loss 0"]
    served = [name for name in ("served", "served_tokens_per_second", "served_speedup") if name in entries[0]]
    header += [name.replace("_", " ") for name in served]
    rows = []
    for entry in entries:
        values = [entry["tau_walk"], entry["tau_chain"], entry["tau_sampling"], entry["accuracy"][0], entry["loss"][0]]
        values += [entry[name] for name in served]
        rows.append(["*" if entry is best else "", entry["name"], *(f"{value:.4f}" for value in values)])
    return Table(f"best by {metric}: {best['name'] if best else 'none'}", header, rows, 2)


def generation_table(result: Decoding) -> Table:
    """Prompts answered with and without the draft."""
    title = f"{result.num_prompts} prompts, {result.num_tokens} tokens, greedy"
    passes = (result.num_passes_without or 0, result.num_passes or 0)
    speeds = (result.tokens_per_second_without or 0.0, result.tokens_per_second or 0.0)
    identical = ["outputs identical", "", f"{result.num_identical} of {result.num_prompts}"]
    return Table(title, BOTH_WAYS, [*_pace(result.acceptance_length, passes, speeds, result.num_tokens), identical])


def completions_table(result: CompletionResult) -> Table:
    """Holes in code filled with and without the draft."""
    title = f"{result.num_rows} holes in {result.num_files} files, {result.num_tokens} tokens, greedy"
    passes = (result.target_passes_without, result.target_passes)
    speeds = (result.tokens_per_second_without, result.tokens_per_second)
    both = (result.without_draft, result.with_draft)
    rows = [
        *_pace(result.acceptance_length, passes, speeds, result.num_tokens),
        ["exact match", *(f"{quality.exact_match:.1%}" for quality in both)],
        ["first line matches", *(f"{quality.first_line_match:.1%}" for quality in both)],
        ["BLEU (of 100)", *(f"{quality.bleu:.1f}" for quality in both)],
        ["outputs identical", "", f"{result.num_identical} of {result.num_rows}"],
    ]
    return Table(title, BOTH_WAYS, rows, caption=result.with_draft.bleu_signature)


BOTH_WAYS = ["", "without draft", "with draft"]


def _pace(length: float, passes: Sequence[int], speeds: Sequence[float], num_tokens: int) -> list[list[str]]:
    return [
        ["acceptance length (tokens per verification pass)", "1.00", f"{length:.2f}"],
        ["target passes per token", *(f"{count / max(num_tokens, 1):.2f}" for count in passes)],
        ["tokens/s", *(f"{speed:.0f}" for speed in speeds)],
    ]


# --------------------------------------------------------------------------------------------------------------- plans


def memory_table(plan: MemoryPlan) -> Table:
    """Terms of a rank's peak, largest first; those below a thousandth are left out."""
    terms = sorted(plan.peak_terms.items(), key=lambda item: -item[1])
    rows = [[name, format_bytes(n), f"{n / plan.peak:.1%}"] for name, n in terms if n >= 0.001 * plan.peak]
    rows += [[], ["peak", format_bytes(plan.peak), ""]]
    rows += [[f"host: {name}", format_bytes(size), ""] for name, size in plan.host.items()]
    return Table("", ["term", "memory", "share"], rows, caption=f"one rank at its peak: {plan.peak_moment}")


def speculation_table(plan: Plan, num_shown: int) -> Table:
    """The best configurations of each batch size."""
    rows: list[list[str]] = []
    for size, predictions in plan.predictions.items():
        for found in predictions[:num_shown]:
            name = "no draft" if found.speculation.is_baseline else str(found.speculation)
            measured = "-" if found.measured_speedup is None else f"{found.measured_speedup:.2f}"
            cost = [f"{found.tokens_per_pass:.2f}", f"{1000 * found.seconds_per_pass:.2f}", f"{found.speedup:.2f}"]
            rows.append([str(size), name, *cost, measured])
        rows.append([])
    header = ["batch", "STEPS,TOPK,VERIFY", "tokens/pass", "ms/pass", "predicted speed-up", "measured"]
    note = "predicted inside what was measured; measured where the run holds the configuration"
    return Table("", header, rows, caption=note)
