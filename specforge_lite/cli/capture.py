"""Capture a target's hidden states once to disk, to train from them with --offline-dir, without running the target.

    python scripts/capture_hidden_states.py --target-model-path MODEL --train-data-path FILE --offline-dir DIR
    python scripts/train_eagle3_online.py --target-model-path MODEL --offline-dir DIR --output-dir RUN

The size is printed and checked against the free disk before anything starts. A killed capture continues.
"""

from __future__ import annotations

from specforge_lite.core.sections import CaptureSection, DataSection, TargetSection
from specforge_lite.core.settings import Section, parse_config


class CaptureConfig(Section):
    """Capture hidden states to disk."""

    target: TargetSection
    data: DataSection = DataSection()
    capture: CaptureSection


def main() -> int:
    config = parse_config(CaptureConfig, description=__doc__ or "")
    from specforge_lite.capture.base import read_target_info
    from specforge_lite.capture.offline import capture_offline, check_room
    from specforge_lite.core.files import lock_directory
    from specforge_lite.serving.registry import open_engine
    from specforge_lite.training.reporting import catch_signals
    from specforge_lite.training.wiring import open_dataset

    capture = config.capture
    datasets = {"train": open_dataset(config.data.train_data_path, config.target, config.data)}
    if config.data.eval_data_path is not None:
        datasets["eval"] = open_dataset(config.data.eval_data_path, config.target, config.data)
    check_room(capture.offline_dir, datasets, read_target_info(config.target, config.target.target_backend), capture)
    with catch_signals(), lock_directory(capture.offline_dir, "offline_dir"):
        engine = open_engine(config.target, config.data.max_length, log_dir=capture.offline_dir / "engine")
        try:
            for part, dataset in datasets.items():
                capture_offline(dataset, engine, capture.offline_dir / part, capture)
        finally:
            engine.close()
    return 0
