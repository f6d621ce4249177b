"""Evaluation results for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge_lite.core.log import info
from specforge_lite.evaluation.acceptance import Acceptance, Decoded, disagreement
from specforge_lite.evaluation.error_analysis import ErrorAnalysis
from specforge_lite.evaluation.run import save_results
from specforge_lite.report.errors import error_tables, write_errors_page
from specforge_lite.report.figures import visible
from specforge_lite.training.evaluate import EvalResult

MAX_PRINTED_ROWS = 10


def print_positions(result: EvalResult, title: str) -> None:
    """The table by position, and the estimated acceptance lengths."""
    table = Table(
        title=f"{title}: {result.num_samples} samples in {result.num_batches} batches,"
        f" {result.num_supervised} supervised tokens",
        caption="mean and standard deviation over batches; the last two columns over all tokens",
    )
    for column in ("position", "accuracy mean", "accuracy std", "loss mean", "loss std", "accuracy", "loss"):
        table.add_column(column, justify="right")
    for k in range(len(result.accuracy)):
        accuracies = (f"{100 * value[k]:.2f}%" for value in (result.accuracy_mean, result.accuracy_std))
        losses = (f"{value[k]:.4f}" for value in (result.loss_mean, result.loss_std))
        table.add_row(str(k), *accuracies, *losses, f"{100 * result.accuracy[k]:.2f}%", f"{result.loss[k]:.4f}")
    Console().print(table)
    info(
        f"estimated acceptance length, chains of {result.chain_length}: greedy {result.tau_walk:.3f}, mean over all"
        f" {result.tau_chain:.3f}, sampling {result.tau_sampling:.3f}"
    )


def print_comparison(estimated: Acceptance, decoded: Decoded) -> None:
    """Estimated beside decoded acceptance."""
    info("share of verification passes that accepted drafted token k:")
    table = Table()
    for column in ("k", "estimated", "decoded"):
        table.add_column(column, justify="right")
    for k, pair in enumerate(zip(estimated.per_position, decoded.acceptance.per_position)):
        table.add_row(str(k), *(f"{share:.3f}" for share in pair))
    pair = (estimated.tokens_per_pass, decoded.acceptance.tokens_per_pass)
    table.add_row("tokens per pass", *(f"{value:.3f}" for value in pair))
    Console().print(table)
    info(
        f"estimate and decoding differ by {disagreement(estimated, decoded.acceptance):.1%};"
        f" {decoded.reproduced_share:.1%} of the file's answers came out before the first difference"
        + ("" if decoded.reproduced_share > 0.9 else ": they are not the target's own, so the two need not agree")
    )


def write_errors(directory: Path, analysis: ErrorAnalysis, title: str) -> Path:
    """errors.json and errors.html in `directory`, and the tables on the terminal; -> the page."""
    errors = analysis.to_dict()
    save_results(directory / "errors.json", errors)
    for item in error_tables(errors):
        table = Table(title=item.title)
        for column in item.header:
            table.add_column(column, overflow="fold")
        for row in item.rows[:MAX_PRINTED_ROWS]:
            table.add_row(*(Text(visible(cell)) for cell in row))  # Text: what a model wrote is no markup
        if item.rows:
            Console().print(table)
    return write_errors_page(directory / "errors.html", errors, f"Errors of {title}")
