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

from specforge_lite.cli.options import open_model
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.sections import (
    DRAFT_FLAGS,
    FIM_ORDER_HELP,
    DataSection,
    Dtype,
    FimOrder,
    LocalTargetSection,
    TargetSection,
)
from specforge_lite.core.settings import Section, flag, parse_config
from specforge_lite.evaluation.settings import MeasureSection

if TYPE_CHECKING:
    from specforge_lite.evaluation.checkpoints import Checkpoint

CHECKPOINTS_HELP = """Evaluate every checkpoint of a run: a table, a curve, and the best one.

    python scripts/evaluate_checkpoints.py outputs/run
    python scripts/evaluate_checkpoints.py CKPT_DIR --basepath MODEL --testpath eval.jsonl     (EAGLE's state_N)

Target and data are those of the run unless given. Results go to RUN_DIR/evaluation; checkpoints that were evaluated
before are not evaluated again. With --served ENGINE every checkpoint is also served, on prompts of the held-out data,
and the best is the one of which that engine accepts most.
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
    decode: bool = flag(False, "decode the same prompts too and compare, per position")
    error_analysis: Path | None = flag(
        None, "directory for errors.json and errors.html: where the draft fails, with samples"
    )
    save_results: Path | None = flag(None, "write everything as JSON: a file, or a directory for it")


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
    from specforge_lite.evaluation import run
    from specforge_lite.evaluation.acceptance import Acceptance, decode_answers, disagreement
    from specforge_lite.evaluation.error_analysis import ErrorAnalysis
    from specforge_lite.report.errors import write_errors
    from specforge_lite.report.tables import acceptance_table, positions_table, print_table

    options, target = config.evaluation, config.target
    name = str(options.draft_model_path)
    results_file = run.prepare_results(options.save_results) if options.save_results else None
    if options.error_analysis is not None:
        run.prepare_place(options.error_analysis / "errors.json", "error_analysis")
    dataset = run.open_eval_data(target, config.data)
    files = run.open_target_files(target, options.device)
    draft = files.load_draft(options.draft_model_path)
    analysis = None
    if options.error_analysis is not None and draft.config.tokens_per_block:
        kind = draft.config.algorithm
        raise ConfigError(f"error_analysis: it unrolls EAGLE drafts; a {kind} draft fills blocks; leave it out")
    if options.error_analysis is not None:
        tokenizer = load_tokenizer(target.target_model_path, target.trust_remote_code)
        analysis = ErrorAnalysis(draft, files.head, tokenizer, options.ttt_length)
    with run.engine_for(draft, target, config.data, files.device) as engine:
        result = run.evaluate_draft(draft, files, dataset, engine, options, [analysis] if analysis else [])
    estimated = Acceptance.estimated(result)
    results: dict[str, Any] = {
        "draft_model_path": name,
        "eval_data_path": str(config.data.eval_data_path),
        "batch_size": options.batch_size,
        "positions": run.position_rows(result),
        **result.to_dict(),
        "estimated": estimated.to_dict(),
    }
    print_table(positions_table(result, name))
    info(
        f"estimated acceptance length, chains of {result.chain_length}: greedy {result.tau_walk:.3f}, mean over all"
        f" {result.tau_chain:.3f}, sampling {result.tau_sampling:.3f}"
    )
    if analysis is not None and options.error_analysis is not None:
        info(f"errors: {write_errors(options.error_analysis, analysis, name)}")
    if options.decode:
        shared = target.model_dump(include={"target_model_path", "target_dtype", "trust_remote_code"})
        local = LocalTargetSection(**shared, device=options.device)
        model = open_model(local, options.draft_model_path, num_draft_tokens=result.chain_length)
        samples = [dataset[i] for i in range(run.num_samples(dataset, options))]
        decoded = decode_answers(model, samples, result.chain_length)
        results["decoded"] = decoded.to_dict()
        info("share of verification passes that accepted drafted token k:")
        print_table(acceptance_table(estimated, decoded))
        own = decoded.reproduced_share > 0.9
        info(
            f"estimate and decoding differ by {disagreement(estimated, decoded):.1%};"
            f" {decoded.reproduced_share:.1%} of the file's answers came out before the first difference"
            + ("" if own else ": they are not the target's own, so the two need not agree")
        )
    if results_file is not None:
        run.save_results(results_file, results)
        info(f"results: {results_file}")


class CheckpointsSection(MeasureSection):
    """Which checkpoints, and what makes one the best."""

    run_dir: Path = flag(..., "output directory of a run, with step_N or EAGLE's state_N in it")
    output_dir: Path | None = flag(None, "default: RUN_DIR/evaluation")
    metric: Literal["tau_walk", "tau_chain", "tau_sampling", "accuracy", "loss", "served"] | None = flag(
        None, "the best checkpoint by this (default: tau_walk; served with --served); accuracy and loss: of position 0"
    )
    served: Literal["sglang", "vllm", "hf"] | None = flag(None, "serve each checkpoint in this engine, chains")
    served_prompts: int = flag(40, "--served: prompts of the held-out data", ge=1)
    served_point: str = flag("8/0", "--served: CONCURRENCY/TEMPERATURE of the requests")
    max_new_tokens: int = flag(256, "--served: tokens of an answer", ge=1)
    draft_model_config: Path | None = flag(
        None, "config.json of the drafts in state_N; default: beside them, else told from their tensors"
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
    from specforge_lite.evaluation.checkpoints import best_entry, evaluate_checkpoints, find_checkpoints
    from specforge_lite.report.figures import plot_checkpoints
    from specforge_lite.report.tables import checkpoints_table, print_table

    options = config.checkpoints
    metric = options.metric or ("served" if options.served else "tau_walk")
    if metric == "served" and options.served is None:
        raise ConfigError("metric served: needs --served sglang, vllm or hf")
    found = find_checkpoints(options.run_dir)
    output_dir = options.output_dir or options.run_dir / "evaluation"
    file, figure = output_dir / "checkpoints.json", output_dir / "checkpoints.png"
    served = _served(config, found, output_dir) if options.served else None
    entries = evaluate_checkpoints(
        found, file, config.target, config.data, options, metric, options.draft_model_config, served
    )
    plot_checkpoints(figure, entries, metric, options.run_dir.resolve().name)
    print_table(checkpoints_table(entries, best_entry(entries, metric), metric))
    info(f"results: {file}, {figure}")


def _served(config: CheckpointsConfig, found: Sequence[Checkpoint], output_dir: Path) -> dict[str, dict[str, Any]]:
    """By name of a checkpoint what the engine accepts of it; rows in output_dir/served.jsonl, not measured again."""
    from specforge_lite.benchmark.choice import Point, rank
    from specforge_lite.cli.bench import DraftsSection, EngineSection, measure_served, options_of

    options, target = config.checkpoints, config.target
    point = Point.parse(options.served_point)
    if config.data.eval_data_path is None:
        raise ConfigError("eval_data_path: required (flag --eval-data-path)")
    if not Path(config.data.eval_data_path).is_file():
        raise ConfigError(f"eval_data_path: no such file: {config.data.eval_data_path}")
    names = {"target_model_path", "trust_remote_code", "tp_size", "mem_frac", "engine_python", "engine_arg",
             "engine_devices", "target_dtype"}  # fmt: skip
    flags = target.model_dump(include=names)
    if options.served == "hf":
        flags |= {"tp_size": 1, "mem_frac": None, "engine_python": None, "engine_arg": (), "engine_devices": None}
    work = DraftsSection(
        drafts=tuple(str(checkpoint.path) for checkpoint in found),
        concurrency=(point.batch_size,),
        temperature=(point.temperature,),
        steps=(options.chain_length,),
        draft_sampling=("greedy",),
        benchmark_list=(f"{config.data.eval_data_path}:{options.served_prompts}",),
        max_new_tokens=options.max_new_tokens,
        system_prompt=config.data.system_prompt,
        output=output_dir / f"served-{options.served}.jsonl",
    )
    serving = options_of(EngineSection(backend=options.served, **flags), work)
    rows, drafts = measure_served(serving, work, work.drafts)
    lengths = {way.draft: way for way in rank(rows, [point]) if way.acc_length is not None}
    return {
        Path(draft.path).name: {
            "served": lengths[draft.facts].acc_length,
            "served_tokens_per_second": lengths[draft.facts].tokens_per_second,
            "served_speedup": lengths[draft.facts].speedup,
        }
        for draft in drafts
    }


class CompletionsConfig(LocalTargetSection):
    """What to complete, and how."""

    draft_model_path: Path = Field(
        description="exported draft directory, or a training checkpoint step_N", json_schema_extra=DRAFT_FLAGS
    )
    eval_data_path: Path = flag(..., "jsonl of {prefix, middle, suffix}", "--testpath")
    num_rows: int | None = flag(None, "the first so many rows (default: all)", ge=1)
    num_draft_tokens: int = flag(5, "chain of drafted tokens per pass", ge=1)
    max_new_tokens: int = flag(64, "tokens of a completion at most", ge=1)
    max_length: int = flag(512, "tokens of prompt and completion; the code around the hole is cut", ge=8)
    fim_order: FimOrder = flag("psm", FIM_ORDER_HELP)
    target_dtype: Dtype = flag("float32", "float32 makes equality exact")
    save_results: Path | None = flag(None, "write everything as JSON")


def completions() -> None:
    config = parse_config(CompletionsConfig, description=COMPLETIONS_HELP)
    from specforge_lite.evaluation.completions import CompletionSettings, complete, read_fim_file
    from specforge_lite.evaluation.run import save_results
    from specforge_lite.inference.tree import TreeShape
    from specforge_lite.report.tables import completions_table, print_table

    rows = read_fim_file(config.eval_data_path, config.num_rows)
    shape = TreeShape.chain(config.num_draft_tokens)
    settings = CompletionSettings(config.max_new_tokens, config.max_length, config.fim_order, shape)
    result = complete(open_model(config, config.draft_model_path), rows, settings)
    print_table(completions_table(result))
    if config.save_results is not None:
        save_results(config.save_results, result.to_dict())
        info(f"results: {config.save_results}")
