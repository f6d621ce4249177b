"""Answer prompts with and without the draft: acceptance length, passes of the target saved, tokens/s, equality.

python scripts/compare_generation.py --base-model-path TARGET --draft-model-path DRAFT --prompts eval.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from specforge_lite.cli.options import TreeFlags, open_model, serving_options
from specforge_lite.core.log import info
from specforge_lite.core.sections import DraftPathSection, Dtype, EngineFlags, LocalTargetSection, TargetPathSection
from specforge_lite.core.settings import Section, flag, parse_config

SERVING_HELP = """\
Serve an exported draft in SGLang or vLLM: is it accepted there as in our own decoder, and is the output unchanged?

    python scripts/compare_serving.py --backend sglang --target-model-path TARGET --draft-model-path DRAFT \\
        --prompts eval.jsonl

Exit code 2 if the acceptance lengths differ by more than --tolerance, or a greedy answer from plain decoding.
"""


class PromptsSection(Section):
    """What is asked."""

    prompts: Path = flag(..., "jsonl of conversations; the last assistant turn is what is generated")
    target_dtype: Dtype = flag("float32", "float32 makes equality exact")


class CompareConfig(PromptsSection, DraftPathSection, LocalTargetSection, TreeFlags):
    """What to decode, and how."""

    num_prompts: int | None = flag(None, "the first so many (default: all)", ge=1)
    num_draft_tokens: int = flag(5, "chain of drafted tokens per pass; 0: a tree", ge=0)
    confidence_threshold: float = flag(0.0, "a dspark chain ends before a token less likely to be accepted", ge=0, le=1)
    max_new_tokens: int = Field(160, ge=1)
    output: Path | None = flag(None, "write the result as json (read by scripts/make_report.py)")


class CompareServingConfig(PromptsSection, DraftPathSection, EngineFlags, TargetPathSection):
    """What to serve and what to ask."""

    backend: Literal["sglang", "vllm"] = flag(..., "the engine")
    num_prompts: int = Field(40, ge=1)
    num_draft_tokens: int = flag(3, "tokens that a chain drafts", ge=1)
    max_new_tokens: int = Field(96, ge=1)
    max_length: int = flag(1024, "tokens of prompt and answer together", ge=16)
    tolerance: float = flag(0.05, "relative difference of the acceptance lengths", gt=0)
    output: Path | None = flag(None, "json of the comparison")
    log_dir: Path | None = None


def main() -> None:
    config = parse_config(CompareConfig, description=__doc__ or "")
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.evaluation.compare_generation import compare_generation, identity_line
    from specforge_lite.inference.speculative import GenerationSettings
    from specforge_lite.report.tables import generation_table, print_table

    prompts = encode_prompt_file(config.prompts, config.num_prompts, config.target_model_path, config.trust_remote_code)
    shape = config.model_dump(include={"total_token", "depth", "top_k"})
    model = open_model(config, config.draft_model_path, num_draft_tokens=config.num_draft_tokens or None, **shape)
    settings = GenerationSettings(**config.model_dump(include={"max_new_tokens", "confidence_threshold"}))
    result = compare_generation(model, prompts, settings)
    if config.output:
        config.output.write_text(json.dumps(result.to_dict(), indent=1))
    print_table(generation_table(result))
    info(identity_line(result, model.target.dtype))


def serving() -> None:
    config = parse_config(CompareServingConfig, description=SERVING_HELP)
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.evaluation.compare_serving import compare_serving

    encoded = encode_prompt_file(
        config.prompts,
        config.num_prompts,
        config.target_model_path,
        config.trust_remote_code,
        config.max_length,
        config.max_new_tokens + 1,  # the server keeps a position back
    )
    prompts = [token_ids for _, token_ids in encoded]
    options = serving_options(
        config.backend,
        config,
        str(config.draft_model_path),
        num_steps=config.num_draft_tokens,
        num_draft_tokens=config.num_draft_tokens + 1,
        max_length=config.max_length,
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
