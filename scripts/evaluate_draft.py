"""How good is a draft: accuracy and loss by position (mean and standard deviation over batches), three estimates of its
acceptance length, and with --decode the acceptance of real decoding beside the estimate.

python scripts/evaluate_draft.py --target-model-path TARGET --draft-model-path DRAFT --eval-data-path FILE --decode

--error-analysis DIR writes where it fails: by kind of token, token and context, with samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from specforge_lite.core.log import info, run_script
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.evaluation.acceptance import Acceptance, Decoded, decode_answers
from specforge_lite.evaluation.error_analysis import ErrorAnalysis
from specforge_lite.evaluation.run import (
    MeasureSection,
    TargetFiles,
    engine_for,
    evaluate_draft,
    load_evaluated,
    num_samples,
    open_eval_data,
    open_target_files,
    position_rows,
    prepare_place,
    save_results,
)
from specforge_lite.inference import SpeculativeModel
from specforge_lite.model.draft import Draft
from specforge_lite.report.terminal import print_comparison, print_positions, write_errors
from specforge_lite.training.wiring import load_tokenizer


class EvaluationSection(MeasureSection):
    """What to evaluate, and how."""

    draft_model_path: Path = Field(description="exported draft directory, a checkpoint step_N, or EAGLE's state_N")
    decode: bool = Field(False, description="decode the same prompts too and compare, per position")
    error_analysis: Path | None = Field(
        None, description="directory for errors.json and errors.html: where the draft fails, with samples"
    )
    save_results: Path | None = Field(None, description="write everything as JSON")


class EvaluateConfig(Section):
    """Accuracy, loss and acceptance of a draft."""

    target: TargetSection
    data: DataSection = DataSection()
    evaluation: EvaluationSection


def main() -> None:
    config = parse_config(EvaluateConfig, description=__doc__ or "")
    options = config.evaluation
    if options.save_results is not None:
        prepare_place(options.save_results, "save_results")
    if options.error_analysis is not None:
        prepare_place(options.error_analysis / "errors.json", "error_analysis")
    dataset = open_eval_data(config.target, config.data)
    files = open_target_files(config.target, options.device)
    draft = load_evaluated(options.draft_model_path, files)
    with engine_for(draft, config.target, config.data, files.device) as engine:
        analysis = error_analysis(config, draft, files) if options.error_analysis is not None else None
        observers = [analysis] if analysis is not None else []
        result = evaluate_draft(draft, files, dataset, engine, options, observers)
    estimated = Acceptance.estimated(result)
    results: dict[str, Any] = {
        "draft_model_path": str(options.draft_model_path),
        "eval_data_path": str(config.data.eval_data_path),
        "batch_size": options.batch_size,
        "positions": position_rows(result),
        **result.to_dict(),
        "estimated": estimated.to_dict(),
    }
    print_positions(result, str(options.draft_model_path))
    if analysis is not None and options.error_analysis is not None:
        info(f"errors: {write_errors(options.error_analysis, analysis, str(options.draft_model_path))}")
    if options.decode:
        decoded = decode(config, dataset, result.chain_length)
        results["decoded"] = decoded.to_dict()
        print_comparison(estimated, decoded)
    if options.save_results is not None:
        save_results(options.save_results, results)
        info(f"results: {options.save_results}")


def error_analysis(config: EvaluateConfig, draft: Draft, files: TargetFiles) -> ErrorAnalysis:
    """Collects the misses of this evaluation."""
    tokenizer = load_tokenizer(config.target)
    return ErrorAnalysis(draft, files.head, tokenizer, config.evaluation.ttt_length)


def decode(config: EvaluateConfig, dataset: TokenizedDataset, chain_length: int) -> Decoded:
    """Decode the answers of the evaluated samples."""
    model = SpeculativeModel.from_pretrained(
        config.target.target_model_path,
        config.evaluation.draft_model_path,
        num_draft_tokens=chain_length,
        dtype=config.target.target_dtype,
        device=config.evaluation.device,
        trust_remote_code=config.target.trust_remote_code,
    )
    samples = [dataset[i] for i in range(num_samples(dataset, config.evaluation))]
    return decode_answers(model, samples, chain_length)


if __name__ == "__main__":
    run_script(main)
