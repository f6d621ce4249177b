"""Answer prompts with and without the draft: acceptance length, passes of the target saved, tokens/s, equality.

python scripts/compare_generation.py --base-model-path TARGET --draft-model-path DRAFT --prompts eval.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.core.log import info
from specforge_lite.core.sections import DraftPathSection, Dtype, EngineFlags, LocalTargetSection, TargetPathSection
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from specforge_lite.evaluation.compare_generation import Decoding

SERVING_HELP = """\
Serve an exported draft in SGLang or vLLM: is it accepted there as in our own decoder, and is the output unchanged?

    python scripts/compare_serving.py --backend sglang --target-model-path TARGET --draft-model-path DRAFT \\
        --prompts eval.jsonl

Exit code 2 if the acceptance lengths differ by more than --tolerance, or a greedy answer from plain decoding.
"""


class PromptsSection(Section):
    """What is asked."""

    prompts: Path = Field(description="jsonl of conversations; the last assistant turn is what is generated")
    target_dtype: Dtype = Field("float32", description="float32 makes equality exact")


class CompareConfig(PromptsSection, DraftPathSection, LocalTargetSection):
    """What to decode, and how."""

    num_prompts: int | None = Field(None, ge=1, description="the first so many (default: all)")
    num_draft_tokens: int = Field(5, ge=0, description="chain of drafted tokens per pass; 0: a tree")
    total_token: int = Field(60, ge=2, description="tree: tokens verified at once")
    depth: int = Field(7, ge=1, description="tree: draft steps")
    top_k: int = Field(10, ge=1, description="tree: candidates per step")
    confidence_threshold: float = Field(
        0.0, ge=0, le=1, description="a dspark chain ends before a token less likely to be accepted"
    )
    max_new_tokens: int = Field(160, ge=1)
    output: Path | None = Field(None, description="write the result as json (read by scripts/make_report.py)")


class CompareServingConfig(PromptsSection, DraftPathSection, EngineFlags, TargetPathSection):
    """What to serve and what to ask."""

    backend: Literal["sglang", "vllm"] = Field(description="the engine")
    num_prompts: int = Field(40, ge=1)
    num_draft_tokens: int = Field(3, ge=1, description="tokens that a chain drafts")
    max_new_tokens: int = Field(96, ge=1)
    max_length: int = Field(1024, ge=16, description="tokens of prompt and answer together")
    tolerance: float = Field(0.05, gt=0, description="relative difference of the acceptance lengths")
    output: Path | None = Field(None, description="json of the comparison")
    log_dir: Path | None = None


def main() -> None:
    config = parse_config(CompareConfig, description=__doc__ or "")
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.evaluation.compare_generation import compare_generation, identity_line
    from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel

    prompts = encode_prompt_file(config.prompts, config.num_prompts, config.target_model_path, config.trust_remote_code)
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
    settings = GenerationSettings(
        max_new_tokens=config.max_new_tokens, confidence_threshold=config.confidence_threshold
    )
    result = compare_generation(model, prompts, settings)
    if config.output:
        config.output.write_text(json.dumps(result.to_dict(), indent=1))
    Console().print(_table_of(result))
    info(identity_line(result, model.target.dtype))


def _table_of(result: Decoding) -> Table:
    table = Table(title=f"{result.num_prompts} prompts, {result.num_tokens} tokens, greedy")
    for column in ("", "without draft", "with draft"):
        table.add_column(column, justify="left" if not column else "right")
    passes = (result.num_passes_without or 0, result.num_passes or 0)
    table.add_row("acceptance length (tokens per verification pass)", "1.00", f"{result.acceptance_length:.2f}")
    table.add_row("target passes per token", *(f"{n / max(result.num_tokens, 1):.2f}" for n in passes))
    table.add_row("tokens/s", f"{result.tokens_per_second_without or 0:.0f}", f"{result.tokens_per_second or 0:.0f}")
    table.add_row("outputs identical", "", f"{result.num_identical} of {result.num_prompts}")
    return table


def serving() -> None:
    config = parse_config(CompareServingConfig, description=SERVING_HELP)
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.evaluation.compare_serving import compare_serving
    from specforge_lite.serving.session import ServingOptions

    encoded = encode_prompt_file(
        config.prompts,
        config.num_prompts,
        config.target_model_path,
        config.trust_remote_code,
        config.max_length,
        config.max_new_tokens + 1,  # the server keeps a position back
    )
    prompts = [token_ids for _, token_ids in encoded]
    options = ServingOptions(
        config.backend,
        config.target_model_path,
        str(config.draft_model_path),
        num_steps=config.num_draft_tokens,
        topk=1,
        num_draft_tokens=config.num_draft_tokens + 1,
        tp_size=config.tp_size,
        dtype=config.target_dtype,
        mem_frac=config.mem_frac,
        max_length=config.max_length,
        engine_python=config.engine_python,
        engine_args=config.engine_arg,
        engine_devices=config.engine_devices,
        trust_remote_code=config.trust_remote_code,
        log_dir=config.log_dir,
    )
    found = compare_serving(options, prompts, config.max_new_tokens)
    info(
        f"{found.backend}: acceptance length {found.acceptance_length:.3f}, our decoder"
        f" {found.acceptance_length_ours:.3f} ({found.relative_difference:.1%} apart); {found.num_identical} of"
        f" {found.num_prompts} answers equal plain decoding; {found.tokens_per_second:.0f} tok/s"
    )
    found.check(config.tolerance)
    if config.output is not None:
        found.write(config.output)
