"""Will everything work with this model as a target? One table: layers, template, mask, head, decoding, engines.

    python scripts/verify_target.py MODEL

Exit code 2 and one `broken:` line for each thing that does not work. docs/new-target.md says what to do about it.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from specforge_lite.core.log import USER_ERROR_EXIT_CODE, info, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.doctor.table import print_findings
from specforge_lite.doctor.target import VerifyOptions, verify_target


class VerifyConfig(Section):
    """Check a model as a target: layers, template, mask, head, decoding, engines."""

    target_model_path: str = Field(
        description="Hugging Face directory or hub name of the target",
        json_schema_extra={"flags": ["--base-model-path", "--basepath"]},
    )
    chat_template: str = Field("auto", description="auto, or a name from specforge_lite.data.templates")
    aux_layer_ids: tuple[int, ...] | None = Field(None, description="0-based layers whose OUTPUT feeds the draft")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as stored")
    device: str | None = Field(None, description="cpu, cuda, cuda:1; default: CUDA if there is one")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    load_model: bool = Field(True, description="run the model; --no-load-model checks its files only")
    engines: tuple[Literal["sglang", "vllm"], ...] = Field(
        ("sglang", "vllm"), description="ask these engines, where installed; 20 seconds each"
    )


def main() -> int:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):  # `verify_target.py MODEL` needs no flag
        words.insert(0, "--target-model-path")
    config = parse_config(VerifyConfig, words)
    findings = verify_target(
        VerifyOptions(
            target_model_path=config.target_model_path,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.chat_template,
            aux_layer_ids=config.aux_layer_ids,
            dtype=config.target_dtype,
            device=config.device,
            load_model=config.load_model,
            engines=config.engines,
        )
    )
    print_findings(config.target_model_path, findings)
    if any(finding.is_broken for finding in findings):
        return USER_ERROR_EXIT_CODE
    info(
        "works; train with: python scripts/train_eagle3_online.py"
        f" --target-model-path {config.target_model_path} --train-data-path TRAIN.jsonl --output-dir OUTPUT"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
