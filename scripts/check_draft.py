"""Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken.

    python scripts/check_draft.py DRAFT --target-model-path MODEL
    python scripts/check_draft.py DRAFT --target-model-path MODEL --checkpoint RUN/step_N --decode

With --decode the run's own data are decoded with the real target: tokens per pass far below what the run estimated mean
that the draft was trained on other states than decoding gives it, such as layers in another order.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, model_validator

from specforge_lite.checkpoints.contract import Finding, check_draft
from specforge_lite.checkpoints.draft_files import draft_config_of, read_draft_files
from specforge_lite.core.errors import transformers_errors
from specforge_lite.core.log import USER_ERROR_EXIT_CODE, run_script
from specforge_lite.core.sections import TargetSection
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.doctor.acceptance import check_acceptance


class CheckConfig(Section):
    """Check a draft directory against what SGLang and vLLM load: a table of findings, exit code 2 if one is broken."""

    draft_model_path: Path = Field(
        description="draft directory", json_schema_extra={"flags": ["--speculative-draft-model-path"]}
    )
    target_model_path: str | None = Field(None, description="compare with this target: width, vocabulary, depth")
    checkpoint: Path | None = Field(None, description="compare aux layers with this training checkpoint step_N")
    decode: bool = Field(False, description="decode the run's data and compare with the acceptance it estimated")
    decode_samples: int = Field(16, ge=1, description="samples to decode")
    device: str | None = Field(None, description="with --decode; default: CUDA if there is one")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the target")

    @model_validator(mode="after")
    def _decoding_needs_both(self) -> CheckConfig:
        for name in ("target_model_path", "checkpoint"):
            if self.decode and getattr(self, name) is None:
                raise ValueError(f"{name}: required with --decode")
        return self


def main() -> int:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):  # `check_draft.py DIRECTORY` needs no flag
        words.insert(0, "--draft-model-path")
    config = parse_config(CheckConfig, words)
    path = config.target_model_path
    target = load_target_config(path, config.trust_remote_code) if path else None
    trained = draft_config_of(read_draft_files(config.checkpoint)).aux_layer_ids if config.checkpoint else None
    findings = check_draft(config.draft_model_path, target, trained)
    if config.decode and not any(finding.is_broken for finding in findings):
        findings += decoding(config)
    print_findings(str(config.draft_model_path), findings)
    return USER_ERROR_EXIT_CODE if any(finding.is_broken for finding in findings) else 0


def decoding(config: CheckConfig) -> list[Finding]:
    assert config.target_model_path is not None
    assert config.checkpoint is not None
    target = TargetSection(target_model_path=config.target_model_path, trust_remote_code=config.trust_remote_code)
    problems = check_acceptance(
        config.draft_model_path, config.checkpoint, target, config.device, config.decode_samples
    )
    return [Finding("acceptance", level, message) for level, message in problems]


def load_target_config(path: str, trust_remote_code: bool) -> object:
    from transformers import AutoConfig

    with transformers_errors(f"target_model_path {path}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def print_findings(title: str, findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warning": "yellow", "broken": "bold red"}
    table = Table(title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found")
    for finding in findings:
        colour = colours[finding.level]
        level = "OK" if finding.level == "ok" else finding.level.upper()
        table.add_row(finding.check, f"[{colour}]{level}[/]", escape(finding.message))
    Console().print(table)
    broken = [finding for finding in findings if finding.is_broken]
    for finding in broken:
        print(f"broken: {finding.check}: {finding.message}")
    if not broken:
        print("nothing found that an engine would refuse or serve wrong")


if __name__ == "__main__":
    run_script(main)
