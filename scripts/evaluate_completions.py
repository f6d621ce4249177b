"""Fill held-out holes in code with and without the draft: decoded acceptance, exact match, BLEU, equality.

python scripts/evaluate_completions.py --basepath TARGET --draft-model-path DRAFT --testpath fim_eval.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.evaluation.completions import CompletionResult, CompletionSettings, complete, read_fim_file
from specforge_lite.evaluation.run import save_results
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.inference.tree import TreeShape


class CompletionsConfig(Section):
    """What to complete, and how."""

    target_model_path: str = Field(json_schema_extra={"flags": ["--base-model-path", "--basepath", "--model-path"]})
    draft_model_path: Path = Field(description="exported draft directory, or a training checkpoint step_N")
    eval_data_path: Path = Field(
        description="jsonl of {prefix, middle, suffix}", json_schema_extra={"flags": ["--testpath"]}
    )
    num_rows: int | None = Field(None, ge=1, description="the first so many rows (default: all)")
    num_draft_tokens: int = Field(5, ge=1, description="chain of drafted tokens per pass")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion at most")
    max_length: int = Field(512, ge=8, description="tokens of prompt and completion; the code around the hole is cut")
    fim_order: Literal["psm", "spm"] = "psm"
    target_dtype: str = Field("float32", description="float32 makes equality exact")
    device: str | None = None
    save_results: Path | None = Field(None, description="write everything as JSON")
    trust_remote_code: bool = False


def main() -> None:
    config = parse_config(CompletionsConfig, description=__doc__ or "")
    rows = read_fim_file(config.eval_data_path, config.num_rows)
    model = SpeculativeModel.from_pretrained(
        config.target_model_path,
        config.draft_model_path,
        dtype=config.target_dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    shape = TreeShape.chain(config.num_draft_tokens)
    settings = CompletionSettings(config.max_new_tokens, config.max_length, config.fim_order, shape)
    result = complete(model, rows, settings)
    Console().print(table_of(result))
    if config.save_results is not None:
        save_results(config.save_results, result.to_dict())
        info(f"results: {config.save_results}")


def table_of(result: CompletionResult) -> Table:
    title = f"{result.num_rows} holes in {result.num_files} files, {result.num_tokens} tokens, greedy"
    table = Table(title=title, caption=result.with_draft.bleu_signature)
    for column in ("", "without draft", "with draft"):
        table.add_column(column, justify="right" if column else "left")
    both = (result.without_draft, result.with_draft)
    tokens = max(result.num_tokens, 1)
    table.add_row("acceptance length (tokens per verification pass)", "1.00", f"{result.acceptance_length:.2f}")
    passes = (result.target_passes_without, result.target_passes)
    table.add_row("target passes per token", *(f"{count / tokens:.2f}" for count in passes))
    speeds = (result.tokens_per_second_without, result.tokens_per_second)
    table.add_row("tokens/s", *(f"{speed:.0f}" for speed in speeds))
    table.add_row("exact match", *(f"{quality.exact_match:.1%}" for quality in both))
    table.add_row("first line matches", *(f"{quality.first_line_match:.1%}" for quality in both))
    table.add_row("BLEU", *(f"{quality.bleu:.2f}" for quality in both))
    table.add_row("outputs identical", "", f"{result.num_identical} of {result.num_rows}")
    return table


if __name__ == "__main__":
    run_script(main)
