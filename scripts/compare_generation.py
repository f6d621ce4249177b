"""Answer prompts with and without the draft: acceptance length, passes of the target saved, tokens/s, equality.

python scripts/compare_generation.py --base-model-path TARGET --draft-model-path DRAFT --prompts eval.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.log import run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.evaluation.compare_generation import Decoding, compare_generation, read_prompts
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel


class CompareConfig(Section):
    """What to decode, and how."""

    target_model_path: str = Field(json_schema_extra={"flags": ["--base-model-path", "--model-path"]})
    draft_model_path: Path = Field(description="exported draft directory")
    prompts: Path = Field(description="jsonl of conversations; the last assistant turn is what is generated")
    num_prompts: int | None = Field(None, ge=1, description="the first so many (default: all)")
    num_draft_tokens: int = Field(5, ge=0, description="chain of drafted tokens per pass; 0: a tree")
    total_token: int = Field(60, ge=2, description="tree: tokens verified at once")
    depth: int = Field(7, ge=1, description="tree: draft steps")
    top_k: int = Field(10, ge=1, description="tree: candidates per step")
    max_new_tokens: int = Field(160, ge=1)
    target_dtype: str = Field("float32", description="float32 makes equality exact")
    device: str | None = None
    output: Path | None = Field(None, description="write the result as json (read by scripts/make_report.py)")
    trust_remote_code: bool = False


def main() -> None:
    config = parse_config(CompareConfig, description=__doc__ or "")
    prompts = read_prompts(config.prompts, config.num_prompts)
    model = SpeculativeModel.from_pretrained(
        config.target_model_path,
        config.draft_model_path,
        total_token=config.total_token,
        depth=config.depth,
        top_k=config.top_k,
        num_draft_tokens=config.num_draft_tokens or None,
        dtype=config.target_dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    result = compare_generation(model, prompts, GenerationSettings(max_new_tokens=config.max_new_tokens))
    if config.output:
        config.output.write_text(json.dumps(result.to_dict(), indent=1))
    Console().print(table_of(result))


def table_of(result: Decoding) -> Table:
    table = Table(title=f"{result.num_prompts} prompts, {result.num_tokens} tokens, greedy")
    for column in ("", "without draft", "with draft"):
        table.add_column(column, justify="left" if not column else "right")
    passes = (result.num_passes_without or 0, result.num_passes or 0)
    table.add_row("acceptance length (tokens per verification pass)", "1.00", f"{result.acceptance_length:.2f}")
    table.add_row("target passes per token", *(f"{n / max(result.num_tokens, 1):.2f}" for n in passes))
    table.add_row("tokens/s", f"{result.tokens_per_second_without or 0:.0f}", f"{result.tokens_per_second or 0:.0f}")
    table.add_row("outputs identical", "", f"{result.num_identical} of {result.num_prompts}")
    return table


if __name__ == "__main__":
    run_script(main)
