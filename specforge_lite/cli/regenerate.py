"""Replace the answers in a data set by the target's own.

A draft learns to predict what ITS target says, so it should be trained on the target's answers. Any number of
OpenAI-compatible servers, or transformers in this process:

  python scripts/generate_data_by_target.py --model-name Qwen/Qwen3-8B --raw-data-file train.jsonl \\
      --output-dir outputs/regenerated --server-address-port 127.0.0.1:30000 127.0.0.1:30001 --max-concurrency 128
  python scripts/generate_data_by_target.py --target-backend hf --model-name specforge_lite/assets/tiny_target \\
      --raw-data-file train.jsonl --output-dir outputs/regenerated --output-file outputs/train.jsonl --max-tokens 160
"""

from __future__ import annotations

import signal

from specforge_lite.core.settings import parse_config
from specforge_lite.regenerate.settings import RegenerateConfig


def main() -> int:
    config = parse_config(RegenerateConfig, description=__doc__ or "")
    from specforge_lite.regenerate.run import run

    return 128 + signal.SIGTERM if run(config).stopped else 0
