"""Serve an exported draft in SGLang or vLLM: is it accepted there as in our own decoder, and is the output unchanged?

    python scripts/compare_serving.py --backend sglang --target-model-path TARGET --draft-model-path DRAFT \
        --prompts eval.jsonl

Exit code 2 if the acceptance lengths differ by more than --tolerance, or a greedy answer from plain decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.evaluation.compare_generation import read_prompts
from specforge_lite.evaluation.compare_serving import TOLERANCE, compare_serving
from specforge_lite.serving.session import ServingOptions


class CompareServingConfig(Section):
    """What to serve and what to ask."""

    backend: Literal["sglang", "vllm"] = Field(description="the engine")
    target_model_path: str = Field(json_schema_extra={"flags": ["--base-model-path", "--model-path"]})
    draft_model_path: Path = Field(description="exported draft")
    prompts: Path = Field(description="jsonl of conversations; the last answer of each is left out")
    num_prompts: int = Field(40, ge=1)
    num_draft_tokens: int = Field(3, ge=1, description="tokens that a chain drafts")
    max_new_tokens: int = Field(96, ge=1)
    max_length: int = Field(1024, ge=16, description="tokens of prompt and answer together")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="float32 makes equality exact"
    )
    tp_size: int = Field(1, ge=1)
    mem_frac: float | None = Field(None, gt=0, lt=1, json_schema_extra={"flags": ["--mem-fraction-static"]})
    engine_python: str | None = None
    engine_arg: tuple[str, ...] = Field((), description="key=value passed to the engine untouched; may repeat")
    tolerance: float = Field(TOLERANCE, gt=0, description="relative difference of the acceptance lengths")
    output: Path | None = Field(None, description="json of the comparison")
    log_dir: Path | None = None


def main() -> None:
    config = parse_config(CompareServingConfig, description=__doc__ or "")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.target_model_path)
    prompts = []
    for messages in read_prompts(config.prompts, config.num_prompts):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        prompts.append(list(encoded["input_ids"]))
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or longest + config.max_new_tokens >= config.max_length:
        raise ConfigError(
            f"prompts {config.prompts}: {len(prompts)} prompts, the longest {longest} tokens, {config.max_new_tokens}"
            f" new ones; expected some, and together less than max_length {config.max_length}"
        )
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


if __name__ == "__main__":
    run_script(main)
