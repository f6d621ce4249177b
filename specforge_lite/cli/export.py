"""Write the draft of a training checkpoint as SGLang and vLLM load it, and check the result."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from specforge_lite.core.log import info
from specforge_lite.core.settings import Section, parse_config


class ExportConfig(Section):
    """Write the draft of a training checkpoint as SGLang and vLLM load it, and check the result."""

    checkpoint: Path = Field(
        description="step_N, or a run's output directory (its newest complete checkpoint is taken)"
    )
    output_dir: Path | None = Field(None, description="directory to write config.json and model.safetensors to")
    bundle: Path | None = Field(None, description="directory to publish: the draft and a model card")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the weights")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, description="layers whose OUTPUT feeds the draft; default: as recorded by the run"
    )
    overwrite: bool = Field(False, description="replace the output directory if it exists")
    target_model_path: str | None = Field(None, description="with --bundle: the target, as users will launch it")
    evaluation: Path | None = Field(None, description="with --bundle: json of evaluate_draft.py --save-results")
    decoding: Path | None = Field(None, description="with --bundle: json of compare_generation.py --output")
    license: str | None = Field(None, description="with --bundle: licence of the draft, e.g. apache-2.0")
    tokenizer_from: Path | None = Field(None, description="with --bundle: take the tokenizer of this directory along")

    @model_validator(mode="after")
    def _one_place(self) -> ExportConfig:
        if (self.output_dir is None) == (self.bundle is None):
            raise ValueError("output_dir and bundle: give one of them")
        if self.bundle is not None and self.target_model_path is None:
            raise ValueError("target_model_path: required with --bundle, for the launch commands of the card")
        return self


def main() -> None:
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
