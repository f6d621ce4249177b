"""How good is a draft: accuracy and loss by position (mean and standard deviation over batches), three estimates of its
acceptance length, and with --decode the acceptance of real decoding beside the estimate.

python scripts/evaluate_draft.py --target-model-path TARGET --draft-model-path DRAFT --eval-data-path FILE --decode

--error-analysis DIR writes where it fails: by kind of token, token and context, with samples.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.sections import (
    DRAFT_FLAGS,
    FIM_ORDER_HELP,
    DataSection,
    Dtype,
    FimOrder,
    LocalTargetSection,
    MeasureSection,
    TargetSection,
)
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from specforge_lite.data.store import TokenizedDataset
    from specforge_lite.evaluation.acceptance import Decoded
    from specforge_lite.evaluation.checkpoints import Checkpoint, CheckpointResults
    from specforge_lite.evaluation.completions import CompletionResult

CHECKPOINTS_HELP = """Evaluate every checkpoint of a run: a table, a curve, and the best one.

    python scripts/evaluate_checkpoints.py outputs/run
    python scripts/evaluate_checkpoints.py CKPT_DIR --basepath MODEL --testpath eval.jsonl     (EAGLE's state_N)

Target and data are those of the run unless given. Results go to RUN_DIR/evaluation; checkpoints that were evaluated
before are not evaluated again.
"""
COMPLETIONS_HELP = """\
Fill held-out holes in code with and without the draft: decoded acceptance, exact match, BLEU, equality.

python scripts/evaluate_completions.py --basepath TARGET --draft-model-path DRAFT --testpath fim_eval.jsonl
"""


class EvaluationSection(MeasureSection):
    """What to evaluate, and how."""

    draft_model_path: Path = Field(
        description="exported draft directory, a checkpoint step_N, or EAGLE's state_N", json_schema_extra=DRAFT_FLAGS
    )
    decode: bool = Field(False, description="decode the same prompts too and compare, per position")
    error_analysis: Path | None = Field(
        None, description="directory for errors.json and errors.html: where the draft fails, with samples"
    )
    save_results: Path | None = Field(None, description="write everything as JSON: a file, or a directory for it")


class EvaluateConfig(Section):
    """Accuracy, loss and acceptance of a draft."""

    target: TargetSection
    data: DataSection = DataSection()
    evaluation: EvaluationSection


def main() -> None:
    words = sys.argv[1:]
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    if flags & {"--basepath", "--base-model-path", "--target-model-path"}:  # EAGLE's test.py calls the draft model_path
        words = [re.sub(r"^--model[-_]path(?==|$)", "--draft-model-path", word) for word in words]
    config = parse_config(EvaluateConfig, words, description=__doc__ or "")
    from specforge_lite.core.hub import load_tokenizer
    from specforge_lite.evaluation.acceptance import Acceptance
    from specforge_lite.evaluation.error_analysis import ErrorAnalysis
    from specforge_lite.evaluation.run import (
        engine_for,
        evaluate_draft,
        load_evaluated,
        open_eval_data,
        open_target_files,
        position_rows,
        prepare_place,
        save_results,
    )
    from specforge_lite.report.terminal import print_comparison, print_positions, write_errors

    options = config.evaluation
    results_file = options.save_results
    if results_file is not None:
        holds_checkpoints = results_file.is_dir() and any(results_file.glob("st*_*"))
        if results_file.suffix != ".json" and not holds_checkpoints:  # a directory, as EAGLE's users give it
            results_file = results_file / "results.json"
        prepare_place(results_file, "save_results")
    if options.error_analysis is not None:
        prepare_place(options.error_analysis / "errors.json", "error_analysis")
    dataset = open_eval_data(config.target, config.data)
    files = open_target_files(config.target, options.device)
    draft = load_evaluated(options.draft_model_path, files)
    if options.error_analysis is not None and draft.config.tokens_per_block:
        kind = draft.config.algorithm
        raise ConfigError(f"error_analysis: it unrolls EAGLE drafts; a {kind} draft fills blocks; leave it out")
    with engine_for(draft, config.target, config.data, files.device) as engine:
        analysis = None
        if options.error_analysis is not None:
            analysis = ErrorAnalysis(
                draft,
                files.head,
                load_tokenizer(config.target.target_model_path, config.target.trust_remote_code),
                options.ttt_length,
            )
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
        decoded = _decode(config, dataset, result.chain_length)
        results["decoded"] = decoded.to_dict()
        print_comparison(estimated, decoded)
    if results_file is not None:
        save_results(results_file, results)
        info(f"results: {results_file}")


def _decode(config: EvaluateConfig, dataset: TokenizedDataset, chain_length: int) -> Decoded:
    """Decode the answers of the evaluated samples."""
    from specforge_lite.evaluation.acceptance import decode_answers
    from specforge_lite.evaluation.run import num_samples
    from specforge_lite.inference import SpeculativeModel

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


class CheckpointsSection(MeasureSection):
    """Which checkpoints, and what makes one the best."""

    run_dir: Path = Field(description="output directory of a run, with step_N or EAGLE's state_N in it")
    output_dir: Path | None = Field(None, description="default: RUN_DIR/evaluation")
    metric: Literal["tau_walk", "tau_chain", "tau_sampling", "accuracy", "loss"] = Field(
        "tau_walk", description="the best checkpoint by this; accuracy and loss: of position 0"
    )
    draft_model_config: Path | None = Field(
        None, description="config.json of the drafts in state_N; default: beside them, else told from their tensors"
    )


class CheckpointsConfig(Section):
    """Evaluate all checkpoints of a run."""

    target: TargetSection
    data: DataSection = DataSection()
    checkpoints: CheckpointsSection

    @model_validator(mode="before")
    @classmethod
    def _from_run(cls, values: Any) -> Any:
        """What is not given is as it was in the run."""
        given = values.get("checkpoints") if isinstance(values, dict) else None
        if not isinstance(given, dict) or given.get("run_dir") is None:
            return values
        from specforge_lite.evaluation.checkpoints import run_settings

        before = run_settings(Path(given["run_dir"]))
        return {**values, **{name: {**before[name], **(values.get(name) or {})} for name in before}}


def checkpoints() -> None:
    config = parse_config(CheckpointsConfig, description=CHECKPOINTS_HELP, positional="--run-dir")
    from specforge_lite.evaluation.checkpoints import CheckpointResults, find_checkpoints, settings_of
    from specforge_lite.evaluation.run import open_eval_data
    from specforge_lite.report.figures import plot_checkpoints

    options = config.checkpoints
    found = find_checkpoints(options.run_dir)
    dataset = open_eval_data(config.target, config.data)
    output_dir = options.output_dir or options.run_dir / "evaluation"
    settings = settings_of(
        options, config.target.target_model_path, str(config.data.eval_data_path), dataset.fingerprint
    )
    results = CheckpointResults(output_dir / "checkpoints.json", settings, options.metric)
    todo = [checkpoint for checkpoint in found if not results.take_earlier(checkpoint)]
    info(f"{options.run_dir}: {len(found)} checkpoints, {len(found) - len(todo)} evaluated before")
    if todo:
        _evaluate_all(todo, config, dataset, results)
    order = {checkpoint.name: place for place, checkpoint in enumerate(found)}
    results.entries.sort(key=lambda entry: order[entry["name"]])
    results.finish()
    figure = output_dir / "checkpoints.png"
    plot_checkpoints(figure, results.entries, options.metric, options.run_dir.resolve().name)
    _print_entries(results.entries, options.metric)
    info(f"results: {results.path}, {figure}")


def _evaluate_all(
    todo: Sequence[Checkpoint], config: CheckpointsConfig, dataset: Any, results: CheckpointResults
) -> None:
    """Evaluate checkpoints one after another, with one engine."""
    from specforge_lite.evaluation.run import engine_for, evaluate_draft, open_target_files, position_rows

    options = config.checkpoints
    files = open_target_files(config.target, options.device)
    first = todo[0].load(files, options.draft_model_config)
    with engine_for(first, config.target, config.data, files.device) as engine:
        for place, checkpoint in enumerate(todo):
            draft = first if place == 0 else checkpoint.load(files, options.draft_model_config)
            title = f"{checkpoint.name} ({place + 1}/{len(todo)})"
            result = evaluate_draft(draft, files, dataset, engine, options, title=title)
            results.add(checkpoint, {"positions": position_rows(result), **result.to_dict()})


def _print_entries(entries: list[dict[str, Any]], metric: str) -> None:
    from specforge_lite.evaluation.checkpoints import best_entry

    best = best_entry(entries, metric)
    table = Table(title=f"best by {metric}: {best['name'] if best else 'none'}")
    for column in ("", "checkpoint", "tau walk", "tau chain", "tau sampling", "accuracy 0", "loss 0"):
        table.add_column(column, justify="right")
    for entry in entries:
        values = (entry["tau_walk"], entry["tau_chain"], entry["tau_sampling"], entry["accuracy"][0], entry["loss"][0])
        table.add_row("*" if entry is best else "", entry["name"], *(f"{value:.4f}" for value in values))
    Console().print(table)


class CompletionsConfig(LocalTargetSection):
    """What to complete, and how."""

    draft_model_path: Path = Field(
        description="exported draft directory, or a training checkpoint step_N", json_schema_extra=DRAFT_FLAGS
    )
    eval_data_path: Path = Field(
        description="jsonl of {prefix, middle, suffix}", json_schema_extra={"flags": ["--testpath"]}
    )
    num_rows: int | None = Field(None, ge=1, description="the first so many rows (default: all)")
    num_draft_tokens: int = Field(5, ge=1, description="chain of drafted tokens per pass")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion at most")
    max_length: int = Field(512, ge=8, description="tokens of prompt and completion; the code around the hole is cut")
    fim_order: FimOrder = Field("psm", description=FIM_ORDER_HELP)
    target_dtype: Dtype = Field("float32", description="float32 makes equality exact")
    save_results: Path | None = Field(None, description="write everything as JSON")


def completions() -> None:
    config = parse_config(CompletionsConfig, description=COMPLETIONS_HELP)
    from specforge_lite.evaluation.completions import CompletionSettings, complete, read_fim_file
    from specforge_lite.evaluation.run import save_results
    from specforge_lite.inference.speculative import SpeculativeModel
    from specforge_lite.inference.tree import TreeShape

    rows = read_fim_file(config.eval_data_path, config.num_rows)
    model = SpeculativeModel.from_pretrained(
        config.target_model_path,
        config.draft_model_path,
        dtype=config.target_dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    shape = TreeShape.chain(config.num_draft_tokens)
    settings = CompletionSettings(config.max_new_tokens, config.max_length, config.fim_order, shape)
    result = complete(model, rows, settings)
    Console().print(_completions_table(result))
    if config.save_results is not None:
        save_results(config.save_results, result.to_dict())
        info(f"results: {config.save_results}")


def _completions_table(result: CompletionResult) -> Table:
    title = f"{result.num_rows} holes in {result.num_files} files, {result.num_tokens} tokens, greedy"
    table = Table(title=title, caption=result.with_draft.bleu_signature)
    for column in ("", "without draft", "with draft"):
        table.add_column(column, justify="right" if column else "left")
    both = (result.without_draft, result.with_draft)
    tokens = max(result.num_tokens, 1)
    table.add_row("acceptance length (tokens per verification pass)", "1.00", f"{result.acceptance_length:.2f}")
    passes = (result.target_passes_without, result.target_passes)
    table.add_row("target passes per token", *(f"{count / tokens:.2f}" for count in passes))
    speeds = (result.tokens_per_second_without, result.tokens_per_second)
    table.add_row("tokens/s", *(f"{speed:.0f}" for speed in speeds))
    table.add_row("exact match", *(f"{quality.exact_match:.1%}" for quality in both))
    table.add_row("first line matches", *(f"{quality.first_line_match:.1%}" for quality in both))
    table.add_row("BLEU (of 100)", *(f"{quality.bleu:.1f}" for quality in both))
    table.add_row("outputs identical", "", f"{result.num_identical} of {result.num_rows}")
    return table
