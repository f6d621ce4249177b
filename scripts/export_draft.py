"""Write the draft of a training checkpoint as SGLang and vLLM load it, and check the result."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from specforge_lite.cli import Section, parse_config
from specforge_lite.export import export_checkpoint
from specforge_lite.log import info, run_script


class ExportConfig(Section):
    """Write the draft of a training checkpoint as SGLang and vLLM load it, and check the result."""

    checkpoint: Path = Field(
        description="step_N, or a run's output directory (its newest complete checkpoint is taken)"
    )
    output_dir: Path = Field(description="directory to write config.json and model.safetensors to")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype of the weights")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, description="layers whose OUTPUT feeds the draft; default: as recorded by the run"
    )
    overwrite: bool = Field(False, description="replace the output directory if it exists")


def main() -> None:
    config = parse_config(ExportConfig)
    folder = export_checkpoint(
        config.checkpoint, config.output_dir, config.aux_layer_ids, config.dtype, config.overwrite
    )
    info(f"exported to {folder}; SGLang: --speculative-draft-model-path {folder}")


if __name__ == "__main__":
    run_script(main)
