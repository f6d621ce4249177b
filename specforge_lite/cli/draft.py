"""The commands on a draft directory: export it, check it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from specforge_lite.cli.options import serving_options
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import USER_ERROR_EXIT_CODE, info
from specforge_lite.core.sections import TARGET_FLAGS, DraftPathSection, EngineFlags, LocalTargetSection, TargetSection
from specforge_lite.core.settings import Section, flag, parse_config

if TYPE_CHECKING:
    from specforge_lite.checkpoints.contract import Finding

CHECK_HELP = """\
Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken.

    python scripts/check_draft.py DRAFT --target-model-path MODEL
    python scripts/check_draft.py DRAFT --target-model-path MODEL --checkpoint RUN/step_N --decode
    python scripts/check_draft.py DRAFT --target-model-path MODEL --live vllm

With --live the draft is served by the engine and held, position by position, against our own decoder on the same
prompts (24 of MT-bench unless --prompts names a file): below 80% of ours is an error. Its likely cause is the mistake
with which our decoder accepts as little: the order of layers, a norm, the head, the vocabulary map, draft sampling.
With --decode the run's own data are decoded with the real target: tokens per pass far below what the run estimated mean
that the draft was trained on other states than decoding gives it, such as layers in another order.
"""


class ExportConfig(Section):
    """Write the draft of a training checkpoint as SGLang and vLLM load it, and check the result."""

    checkpoint: Path = flag(..., "step_N, or a run's output directory (its newest complete checkpoint is taken)")
    output_dir: Path | None = flag(None, "directory to write config.json and model.safetensors to")
    bundle: Path | None = flag(None, "directory to publish: the draft and a model card")
    dtype: Literal["bfloat16", "float16", "float32"] = flag("bfloat16", "dtype of the weights")
    aux_layer_ids: tuple[int, ...] | None = flag(
        None, "layers whose OUTPUT feeds the draft; default: as recorded by the run"
    )
    overwrite: bool = flag(False, "replace the output directory if it exists")
    target_model_path: str | None = flag(None, "with --bundle: the target, as users will launch it")
    evaluation: Path | None = flag(None, "with --bundle: json of evaluate_draft.py --save-results")
    decoding: Path | None = flag(None, "with --bundle: json of compare_generation.py --output")
    license: str | None = flag(None, "with --bundle: licence of the draft, e.g. apache-2.0")
    tokenizer_from: Path | None = flag(None, "with --bundle: take the tokenizer of this directory along")

    @model_validator(mode="after")
    def _one_place(self) -> ExportConfig:
        if (self.output_dir is None) == (self.bundle is None):
            raise ValueError("output_dir and bundle: give one of them")
        if self.bundle is not None and self.target_model_path is None:
            raise ValueError("target_model_path: required with --bundle, for the launch commands of the card")
        return self


def export() -> None:
    config = parse_config(ExportConfig, positional="--checkpoint")
    from specforge_lite.checkpoints.bundle import CardFacts, write_bundle
    from specforge_lite.checkpoints.export import export_checkpoint

    if config.output_dir is not None:
        folder = export_checkpoint(
            config.checkpoint, config.output_dir, config.aux_layer_ids, config.dtype, config.overwrite
        )
        info(f"exported to {folder}; SGLang: --speculative-draft-model-path {folder}")
        return
    assert config.bundle is not None
    assert config.target_model_path is not None
    with tempfile.TemporaryDirectory() as directory:
        exported = export_checkpoint(config.checkpoint, Path(directory) / "draft", config.aux_layer_ids, config.dtype)
        facts = CardFacts(config.target_model_path, config.evaluation, config.decoding, config.license)
        folder = write_bundle(exported, config.bundle, facts, config.tokenizer_from, config.overwrite)
    info(f"bundle in {folder}; publish with: hf upload OWNER/{folder.name} {folder}")


LIVE_STEPS, LIVE_LENGTH = 3, 1024  # drafted tokens of an EAGLE chain; positions that are served


class CheckConfig(DraftPathSection, LocalTargetSection, EngineFlags):
    """Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken."""

    target_model_path: str | None = Field(  # type: ignore[assignment]  # optional here only
        None,
        description="compare with this target: width, vocabulary, depth",
        json_schema_extra=TARGET_FLAGS,
    )
    num_draft_tokens: int | None = flag(None, "dspark, dflash: tokens a pass it is served with", ge=1)
    checkpoint: Path | None = flag(None, "compare aux layers with this training checkpoint step_N")
    decode: bool = flag(False, "decode the run's data and compare with the acceptance it estimated")
    decode_samples: int = flag(16, "samples to decode", ge=1)
    live: Literal["sglang", "vllm"] | None = flag(None, "serve it with this engine, against our decoder")
    prompts: Path | None = flag(None, "--live: jsonl of prompts (default: 24 of MT-bench)")
    num_prompts: int = flag(24, "--live: the first so many", ge=1)
    max_new_tokens: int = flag(64, "--live: tokens of an answer", ge=8)
    temperature: float = flag(0.0, "--live: of the answers; above 0 chains are drawn as they were trained", ge=0)
    log_dir: Path | None = flag(None, "--live: where the server's log goes")

    @model_validator(mode="after")
    def _decoding_needs_both(self) -> CheckConfig:
        if self.live and self.target_model_path is None:
            raise ValueError("target_model_path: required with --live")
        for name in ("target_model_path", "checkpoint"):
            if self.decode and getattr(self, name) is None:
                raise ValueError(f"{name}: required with --decode")
        return self


def check() -> int:
    config = parse_config(CheckConfig, description=CHECK_HELP, positional="--draft-model-path")
    from specforge_lite.checkpoints.contract import Finding, check_draft
    from specforge_lite.checkpoints.draft_files import draft_config_of
    from specforge_lite.checkpoints.loading import read_draft_files
    from specforge_lite.doctor.acceptance import check_acceptance
    from specforge_lite.report.tables import print_findings

    if config.live:
        from specforge_lite.serving.launch import check_server

        check_server(serving_options(config.live, config, None), config.temperature)
    trained = draft_config_of(read_draft_files(config.checkpoint)).aux_layer_ids if config.checkpoint else None
    path = config.target_model_path
    target = load_config(path, config.trust_remote_code) if path is not None else None
    findings = check_draft(config.draft_model_path, target, trained, config.num_draft_tokens)
    if path is not None:
        findings += _template(config)
    if config.decode and not any(finding.is_broken for finding in findings):
        assert config.checkpoint is not None
        shared = config.model_dump(include={"target_model_path", "trust_remote_code", "target_dtype"})
        problems = check_acceptance(
            config.draft_model_path, config.checkpoint, TargetSection(**shared), config.device, config.decode_samples
        )
        findings += [Finding("acceptance", level, message) for level, message in problems]
    if config.live and not any(finding.is_broken for finding in findings):
        findings.append(_serve(config, target))
    if print_findings(str(config.draft_model_path), findings):
        return USER_ERROR_EXIT_CODE
    print("nothing found that an engine would refuse or serve wrong")
    return 0


def _template(config: CheckConfig) -> list[Finding]:
    """Whether servers lay prompts out as the draft's training did, where that is recorded."""
    from specforge_lite.checkpoints.contract import Finding
    from specforge_lite.checkpoints.loading import read_draft_files
    from specforge_lite.core.hub import load_tokenizer
    from specforge_lite.data.encoding import TokenizerSpec
    from specforge_lite.data.templates.families import template_warning
    from specforge_lite.data.templates.rendering import choose_template

    recorded: Any = read_draft_files(config.draft_model_path).config
    for key in ("specforge_lite", "config", "data", "chat_template"):
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    if not isinstance(recorded, str):
        return []
    spec = TokenizerSpec.from_tokenizer(load_tokenizer(str(config.target_model_path), config.trust_remote_code))
    problem = template_warning(choose_template(recorded, spec), spec)
    return [Finding("chat template", "warning" if problem else "ok", problem or "")]


def _serve(config: CheckConfig, target: Any) -> Finding:
    from specforge_lite.capture.base import num_positions
    from specforge_lite.checkpoints.draft_files import draft_config_of
    from specforge_lite.checkpoints.loading import read_draft_files
    from specforge_lite.data.prompts import encode_prompt_file
    from specforge_lite.data.sources import shipped_file
    from specforge_lite.evaluation.compare_serving import compare_serving

    assert config.live is not None
    draft = draft_config_of(read_draft_files(config.draft_model_path), target)
    length = min(LIVE_LENGTH, num_positions(target) or LIVE_LENGTH)
    steps = draft.block_size - (draft.algorithm == "dflash") if draft.block_size else LIVE_STEPS
    encoded = encode_prompt_file(
        config.prompts or shipped_file("mtbench.jsonl"),
        config.num_prompts,
        str(config.target_model_path),
        config.trust_remote_code,
        length,
        config.max_new_tokens + 1,  # the server keeps a position back
    )
    chain = {"num_steps": steps, "num_draft_tokens": steps + 1}
    options = serving_options(
        config.live, config, str(config.draft_model_path), **chain, max_length=length, log_dir=config.log_dir,
        temperature=config.temperature,
    )  # fmt: skip
    return compare_serving(options, [token_ids for _, token_ids in encoded], config.max_new_tokens, True).finding()
