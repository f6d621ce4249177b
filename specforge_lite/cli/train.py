"""Train an EAGLE-3 draft: a frozen target gives hidden states, the draft learns from them as they come.

    python scripts/train_eagle3_online.py --target-model-path MODEL --train-data-path FILE --output-dir RUN
    torchrun --standalone --nproc_per_node 8 scripts/train_eagle3_online.py --config run.yaml --sharding fsdp2

A second call with the same --output-dir continues the run. SIGTERM and Ctrl-C finish the step, save, and exit with 143
and 130. Exit code 2: something about the input, reported in one line.
"""

from __future__ import annotations

from specforge_lite.core.settings import parse_config
from specforge_lite.training.settings import TrainConfig

EAGLE1_HELP = """\
Train an EAGLE-1 draft with EAGLE's own loss, noise and schedule, online or from captured hidden states.

    python scripts/train_eagle1.py --target-model-path MODEL --train-data-path train.jsonl --output-dir outputs/run
    python scripts/train_eagle1.py --target-model-path MODEL --offline-dir CAPTURED --output-dir outputs/run

`--offline-dir` is what scripts/capture_hidden_states.py writes, for EAGLE-3 drafts too. A second call with the same
--output-dir continues the run. SIGTERM and Ctrl-C finish the step, save, and exit with 143 and 130. Exit code 2:
something about the input, reported in one line.
"""


def main() -> int:
    return _train(parse_config(TrainConfig, description=__doc__ or ""))


def eagle1() -> int:
    from specforge_lite.training.eagle1 import Eagle1Config

    return _train(parse_config(Eagle1Config, description=EAGLE1_HELP))


def _train(config: TrainConfig) -> int:
    from specforge_lite.training.wiring import run_training

    return run_training(config)
