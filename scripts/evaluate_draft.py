"""How good is a draft: accuracy and loss per step, three estimates of its acceptance length, and with --decode the
acceptance of real decoding beside the estimate.

python scripts/evaluate_draft.py --target-model-path TARGET --draft-model-path DRAFT --eval-data-path FILE --decode
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.cli import Section, parse_config
from specforge_lite.config import DataSection, TargetSection
from specforge_lite.drafts import Draft, TTTSettings
from specforge_lite.engines.base import TargetEngine
from specforge_lite.engines.hf import default_device
from specforge_lite.engines.registry import open_engine
from specforge_lite.errors import ConfigError
from specforge_lite.evaluation import Acceptance, Decoded, Walk, decode_answers, disagreement
from specforge_lite.inference import SpeculativeModel
from specforge_lite.inference.loading import load_draft
from specforge_lite.log import info, progress, run_script
from specforge_lite.nn.target_head import TargetHead, load_target_head
from specforge_lite.training.evaluate import EvalResult, evaluate
from specforge_lite.training.feed import BatchMaker
from specforge_lite.training.files import write_json
from specforge_lite.training.parts import open_dataset, target_directory


class EvaluationSection(Section):
    """What to evaluate, and how."""

    draft_model_path: Path = Field(description="exported draft directory, or a training checkpoint step_N")
    ttt_length: int = Field(7, ge=1, le=32, description="K, draft steps to evaluate")
    chain_length: int = Field(5, ge=1, description="drafted tokens per pass in the acceptance lengths")
    batch_size: int = Field(4, ge=1, description="samples per batch; means and deviations are over batches")
    eval_max_samples: int | None = Field(None, ge=1, description="evaluate on the first so many samples")
    decode: bool = Field(False, description="decode the same prompts too and compare, per position")
    save_results: Path | None = Field(None, description="write everything as JSON")
    device: str | None = Field(None, description="default: CUDA if there is one")


class EvaluateConfig(Section):
    """Accuracy, loss and acceptance of a draft."""

    target: TargetSection
    data: DataSection = DataSection()
    evaluation: EvaluationSection


def main() -> None:
    config = parse_config(EvaluateConfig, description=__doc__ or "")
    options = config.evaluation
    if config.data.eval_data_path is None:
        raise ConfigError("eval_data_path: required (flag --eval-data-path)")
    directory, target_config = load_target(config.target)
    device = torch.device(options.device) if options.device else default_device()
    num_layers = int(target_config.get_text_config().num_hidden_layers)
    draft = load_draft(options.draft_model_path, num_layers, torch.float32, device)
    head = load_target_head(directory, target_config).to(device, torch.float32)
    dataset = open_dataset(config.data.eval_data_path, config.target, config.data)
    count = min(len(dataset), options.eval_max_samples or len(dataset))
    engine = open_engine(with_aux_layers(config.target, draft), config.data.max_length, device=str(device))
    walk = Walk(min(options.chain_length, options.ttt_length))
    try:
        result = run_evaluation(draft, head, dataset, engine, options, count, walk)
    finally:
        engine.close()
    results: dict[str, Any] = {**result.to_dict(), "estimated": walk.acceptance.to_dict()}
    print_steps(result, str(options.draft_model_path))
    if options.decode:
        decoded = decode(config, [dataset[i] for i in range(count)], walk.chain_length)
        results["decoded"] = decoded.to_dict()
        print_comparison(walk.acceptance, decoded)
    if options.save_results is not None:
        options.save_results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.save_results, results)


def load_target(target: TargetSection) -> tuple[Path, Any]:
    from transformers import AutoConfig

    directory = target_directory(target.target_model_path)
    try:
        return directory, AutoConfig.from_pretrained(directory, trust_remote_code=target.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"target_model_path {directory}: {str(error).splitlines()[0]}") from None


def with_aux_layers(target: TargetSection, draft: Draft) -> TargetSection:
    """The target section with the aux layers that the draft was trained on."""
    ids = draft.config.aux_layer_ids
    if ids is None:
        return target
    if target.aux_layer_ids not in (None, ids):
        raise ConfigError(f"aux_layer_ids {list(target.aux_layer_ids or ())}: the draft was trained on {list(ids)}")
    return target.model_copy(update={"aux_layer_ids": ids})


def run_evaluation(
    draft: Draft,
    head: TargetHead,
    dataset: Any,
    engine: TargetEngine,
    options: EvaluationSection,
    count: int,
    walk: Walk,
) -> EvalResult:
    settings = TTTSettings(num_steps=options.ttt_length, collect_rows=True)
    device = head.embed_VH.device

    def forward(batch: Any) -> Any:
        output = draft(batch, head, settings)
        walk.add(output, batch)
        return output

    with progress(count, "evaluate", "sample") as bar:
        return evaluate(
            forward,
            dataset,
            engine,
            BatchMaker(head, len(engine.info.aux_layer_ids), device, torch.float32),
            options.ttt_length,
            chain_length=options.chain_length,
            batch_size=options.batch_size,
            max_samples=count,
            on_batch=bar.update,
        )


def decode(config: EvaluateConfig, samples: list[Any], chain_length: int) -> Decoded:
    model = SpeculativeModel.from_pretrained(
        config.target.target_model_path,
        config.evaluation.draft_model_path,
        num_draft_tokens=chain_length,
        dtype=config.target.target_dtype,
        device=config.evaluation.device,
        trust_remote_code=config.target.trust_remote_code,
    )
    return decode_answers(model, samples, chain_length)


def print_steps(result: EvalResult, title: str) -> None:
    table = Table(title=f"{title}: {result.num_samples} samples, {result.num_supervised} supervised tokens")
    for column in ("step", "accuracy", "mean ± std over batches", "loss", "mean ± std over batches"):
        table.add_column(column, justify="right")
    for k in range(len(result.accuracy)):
        table.add_row(
            str(k),
            f"{result.accuracy[k]:.4f}",
            f"{result.accuracy_mean[k]:.4f} ± {result.accuracy_std[k]:.4f}",
            f"{result.loss[k]:.4f}",
            f"{result.loss_mean[k]:.4f} ± {result.loss_std[k]:.4f}",
        )
    Console().print(table)
    info(
        f"estimated acceptance length, chains of {result.chain_length}: walk {result.tau_walk:.3f}, all rows"
        f" {result.tau_chain:.3f}, sampling {result.tau_sampling:.3f}"
    )


def print_comparison(estimated: Acceptance, decoded: Decoded) -> None:
    info("share of verification passes that accepted drafted token k:")
    table = Table()
    for column in ("k", "estimated", "decoded"):
        table.add_column(column, justify="right")
    for k, pair in enumerate(zip(estimated.per_position, decoded.acceptance.per_position)):
        table.add_row(str(k), *(f"{share:.3f}" for share in pair))
    pair = (estimated.tokens_per_pass, decoded.acceptance.tokens_per_pass)
    table.add_row("tokens per pass", *(f"{value:.3f}" for value in pair))
    Console().print(table)
    info(
        f"estimate and decoding differ by {disagreement(estimated, decoded.acceptance):.1%};"
        f" {decoded.reproduced_share:.1%} of the file's answers came out before the first difference"
        + ("" if decoded.reproduced_share > 0.9 else ": they are not the target's own, so the two need not agree")
    )


if __name__ == "__main__":
    run_script(main)
