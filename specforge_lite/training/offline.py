"""`--offline-dir`: data and captured states of an earlier run, instead of an engine."""

from __future__ import annotations

from pathlib import Path

from specforge_lite.capture.offline import OfflineEngine, OfflinePart
from specforge_lite.core.hub import load_config
from specforge_lite.training.settings import TrainConfig
from specforge_lite.training.wiring import RunData


def open_offline(config: TrainConfig, directory: Path) -> RunData:
    """Datasets and the reader of their states; for EAGLE-1 also EAGLE's own sample files."""
    if config.algorithm == "eagle1" and not (directory / "train").exists():
        from specforge_lite.checkpoints.compat.eagle_samples import EagleSamples, sample_files

        if sample_files(directory):
            target = load_config(config.target.target_model_path, config.target.trust_remote_code).get_text_config()
            samples = EagleSamples(directory, config.data.cache_dir, config.data.max_length, target.vocab_size)
            train, *rest = samples.datasets
            return RunData(train, rest[0] if rest else None, samples)
    parts = [OfflinePart(directory / "train")]
    if (directory / "eval").exists():
        parts.append(OfflinePart(directory / "eval"))
    wanted = None if config.algorithm == "eagle1" else config.target.aux_layer_ids  # EAGLE-1 reads none
    return RunData(parts[0].dataset, parts[1].dataset if parts[1:] else None, OfflineEngine(parts, wanted))
