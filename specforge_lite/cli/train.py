"""Train an EAGLE-3 draft: a frozen target gives hidden states, the draft learns from them as they come.

    python scripts/train_eagle3_online.py --target-model-path MODEL --train-data-path FILE --output-dir RUN
    torchrun --standalone --nproc_per_node 8 scripts/train_eagle3_online.py --config run.yaml --sharding fsdp2

A second call with the same --output-dir continues the run. SIGTERM and Ctrl-C finish the step, save, and exit with 143
and 130. Exit code 2: something about the input, reported in one line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from specforge_lite.core.settings import parse_config
from specforge_lite.training.settings import TrainConfig


def main() -> int:
    kind = asked_kind(sys.argv[1:])
    if kind == "eagle1":
        return eagle1()
    if kind in ("dspark", "dflash"):
        from specforge_lite.training.block import BLOCK_HELP, DflashConfig, DsparkConfig

        block: type[TrainConfig] = DsparkConfig if kind == "dspark" else DflashConfig
        return _train(parse_config(block, description=BLOCK_HELP.format(kind=kind)))
    return _train(parse_config(TrainConfig, description=__doc__ or ""))


def asked_kind(argv: list[str]) -> str | None:
    """`--draft-kind` of the flags, else of the YAML file: it decides which settings there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--draft-kind", "--draft_kind", nargs="?")
    parser.add_argument("--config", nargs="?")
    given, _ = parser.parse_known_args(argv)
    if given.draft_kind is not None or given.config is None:
        return given.draft_kind  # type: ignore[no-any-return]
    try:
        values = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # reported where the whole file is read
        return None
    if not isinstance(values, dict):
        return None
    section = values.get("draft")
    found = values.get("draft_kind", section.get("draft_kind") if isinstance(section, dict) else None)
    return found if isinstance(found, str) else None


def eagle1() -> int:
    from specforge_lite.training.eagle1 import EAGLE1_HELP, Eagle1Config

    return _train(parse_config(Eagle1Config, description=EAGLE1_HELP))


def _train(config: TrainConfig) -> int:
    from specforge_lite.training.loop import run_training

    return run_training(config)
