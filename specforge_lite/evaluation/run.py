"""Evaluate drafts on held-out samples: what every draft of one target shares is opened once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specforge_lite.capture.base import TargetEngine
from specforge_lite.checkpoints.draft_files import unnamed_aux_layer_ids
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.devices import pick_device
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import write_json
from specforge_lite.core.hub import load_config, local_directory
from specforge_lite.core.log import progress
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.data.cache import open_dataset
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.evaluation.settings import MeasureSection
from specforge_lite.model.draft import Draft, TTTSettings
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.serving.registry import open_engine
from specforge_lite.training.dataloader import BatchMaker
from specforge_lite.training.evaluate import EvalResult, evaluate
from specforge_lite.types import DraftBatch, StepOutput

Observer = Callable[[StepOutput, DraftBatch], None]


@dataclass(frozen=True)
class TargetFiles:
    """A target's directory, its transformers config, and its head on the device."""

    directory: Path
    config: Any
    head: TargetHead
    device: torch.device

    def load_draft(self, path: Path, config_file: Path | None = None) -> Draft:
        """A draft to evaluate, fp32 on the target's device: exported, a checkpoint step_N, or EAGLE's state_N (with its
        config.json, where that is elsewhere)."""
        return load_draft(path, self.config, torch.float32, self.device, config_file)


def open_target_files(target: TargetSection, device: str | None) -> TargetFiles:
    """Everything of the target but the model itself. Raises ConfigError with transformers' reason."""
    place = pick_device(device)
    directory = local_directory(target.target_model_path)
    config = load_config(directory, target.trust_remote_code)
    return TargetFiles(directory, config, load_target_head(directory, config).to(place, torch.float32), place)


def open_eval_data(target: TargetSection, data: DataSection) -> TokenizedDataset:
    """The tokenized evaluation data. Raises ConfigError without any."""
    if data.eval_data_path is None:
        raise ConfigError("eval_data_path: required (flag --eval-data-path)")
    return open_dataset(data.eval_data_path, target, data)


@contextmanager
def engine_for(draft: Draft, target: TargetSection, data: DataSection, device: torch.device) -> Iterator[TargetEngine]:
    """An engine that captures the aux layers that this draft was trained on, closed at the end."""
    ids = draft.config.aux_layer_ids
    if ids is None:
        text = load_config(target.target_model_path, target.trust_remote_code).get_text_config()
        ids = target.aux_layer_ids or unnamed_aux_layer_ids(int(text.num_hidden_layers))
    if target.aux_layer_ids not in (None, ids):
        raise ConfigError(f"aux_layer_ids {list(target.aux_layer_ids or ())}: the draft was trained on {list(ids)}")
    target = target.model_copy(update={"aux_layer_ids": ids})
    engine = open_engine(target, data.max_length, device=str(device))
    try:
        yield engine
    finally:
        engine.close()


def evaluate_draft(
    draft: Draft,
    files: TargetFiles,
    dataset: TokenizedDataset,
    engine: TargetEngine,
    measure: MeasureSection,
    observers: Sequence[Observer] = (),
    title: str = "evaluate",
) -> EvalResult:
    """Table and acceptance estimates of one draft. observers: called with every batch and its output."""
    check_evaluable(draft)
    num_steps, chain_length = draft.num_training_steps(measure.ttt_length), measure.chain_length
    if draft.config.tokens_per_block and "chain_length" not in measure.model_fields_set:
        chain_length = num_steps  # a block drafts all of its tokens at once
    settings = TTTSettings(num_steps=num_steps, collect_rows=True)
    count = num_samples(dataset, measure)

    def forward(batch: DraftBatch) -> StepOutput:
        output: StepOutput = draft(batch, files.head, settings)
        for observe in observers:
            observe(output, batch)
        return output

    with progress(count, title, "sample") as bar:
        return evaluate(
            forward,
            dataset,
            engine,
            BatchMaker(files.head, len(engine.info.aux_layer_ids), files.device, torch.float32),
            num_steps,
            chain_length=chain_length,
            batch_size=measure.batch_size,
            max_samples=count,
            on_batch=bar.update,
        )


def check_evaluable(draft: Draft) -> None:
    """Raise ConfigError for a draft whose layer differs from the one that the training pass computes."""
    from specforge_lite.checkpoints.compat.speculators import SpeculatorsEagle3

    biases = [name for name, _ in draft.named_parameters() if name.endswith("_proj.bias")]
    if biases or isinstance(draft, SpeculatorsEagle3):
        reason = f"it has {biases[0]}" if biases else "its layer is not the published one of EAGLE-3"
        raise ConfigError(f"{reason}; such a draft can be decoded (scripts/compare_generation.py), not evaluated")


def num_samples(dataset: TokenizedDataset, measure: MeasureSection) -> int:
    """Samples to evaluate on."""
    return min(len(dataset), measure.eval_max_samples or len(dataset))


def position_rows(result: EvalResult) -> list[dict[str, float]]:
    """The table by position: accuracy and loss, mean and standard deviation (n - 1) over batches."""
    columns = ("accuracy_mean", "accuracy_std", "loss_mean", "loss_std")
    return [
        {"position": k, **{name: getattr(result, name)[k] for name in columns}} for k in range(len(result.accuracy))
    ]


def prepare_place(path: Path, flag: str) -> None:
    """Make the directory of a file that will be written after long work. Raises ConfigError when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror or error}") from None
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory, expected a file name")


def prepare_results(path: Path) -> Path:
    """The file that `--save-results` means, its directory made: a directory gets results.json, as EAGLE's users expect;
    one with checkpoints in it is a mistake."""
    holds_checkpoints = path.is_dir() and any(path.glob("st*_*"))
    if path.suffix != ".json" and not holds_checkpoints:
        path = path / "results.json"
    prepare_place(path, "save_results")
    return path


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write JSON atomically, making its directory. Raises ConfigError when that cannot be."""
    prepare_place(path, "save_results")
    try:
        write_json(path, results)
    except OSError as error:
        raise ConfigError(f"save_results {path}: {error.strerror or error}") from None
