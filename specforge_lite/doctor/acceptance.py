"""Does a draft accept in decoding what its training run promised?

A draft learns from whatever states it is given. Where these come in another order, from other layers, or from another
revision of the target than a server hands out, training looks healthy and decoding accepts next to nothing. Greedy
output stays right all the same, so no error shows it. Here the run's own record is held against real decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lite.checkpoints.training_run import TRAINING_CONFIG, read_config
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.data.cache import open_dataset
from specforge_lite.doctor import Problem
from specforge_lite.evaluation.acceptance import decode_answers
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.model.config_json import config_from_file
from specforge_lite.training.reporting import METRICS_FILE

# Of the tokens gained beyond one per pass. On answers that are the target's own greedy ones the estimate describes the
# very passes of decoding (evaluation/acceptance.py) and differs by rounding and by which samples are decoded; on others
# decoding leaves the text of the file at once, and only a collapse says something.
OWN_ANSWERS = 0.9  # share of the file's answers that decoding reproduces
BROKEN_SHARE_OWN, BROKEN_SHARE_OTHERS = 0.85, 0.5
NUM_TRAINING_ROWS = 5


@dataclass(frozen=True)
class Recorded:
    """What a run wrote down about itself. tau: tokens per pass; chain_length: drafted tokens per pass that it means;
    source: for people."""

    tau: float
    chain_length: int
    source: str


@dataclass(frozen=True)
class RunRecord:
    """A checkpoint's run: its record, its data section, and the dtype its target ran in."""

    recorded: Recorded
    data: DataSection
    data_path: str
    target_dtype: str


def read_run(checkpoint: Path) -> RunRecord:
    """The run of `OUTPUT_DIR/step_N`. Raises CheckpointError where it recorded no acceptance or no data."""
    config = read_config(checkpoint / "config.json")
    try:
        data = DataSection.model_validate(config["data"])
        training, dtype = config["training"], config["target"]["target_dtype"]
        chain_length, num_steps = training["eval_chain_length"], training["ttt_length"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'}: not a training run's: {error}") from None
    num_steps = config_from_file(checkpoint / TRAINING_CONFIG).tokens_per_block or num_steps
    path = data.eval_data_path or data.train_data_path
    if path is None:
        raise CheckpointError(f"{checkpoint}: the run trained from an offline directory; its text is not known here")
    step = int(read_config(checkpoint / "state.json")["step"])
    metrics = checkpoint.parent / METRICS_FILE
    if not metrics.is_file():
        raise CheckpointError(f"{metrics}: missing; it holds the acceptance that the run estimated")
    recorded = recorded_acceptance(read_jsonl(metrics), step, min(chain_length, num_steps), num_steps)
    return RunRecord(recorded, data, path, dtype)


def recorded_acceptance(rows: Sequence[dict[str, Any]], step: int, chain_length: int, num_steps: int) -> Recorded:
    """The last evaluation up to `step`, else the mean of the last step lines."""
    earlier = [row for row in rows if row.get("step", 0) <= step]
    evaluated = [row for row in earlier if "eval/tau_walk" in row]
    if evaluated:
        row = evaluated[-1]
        return Recorded(float(row["eval/tau_walk"]), chain_length, f"the evaluation after step {row['step']}")
    trained = [float(row["tau"]) for row in earlier if "tau" in row][-NUM_TRAINING_ROWS:]
    if not trained:
        raise CheckpointError(f"{METRICS_FILE}: no acceptance was recorded up to step {step}")
    return Recorded(sum(trained) / len(trained), num_steps, f"training up to step {step}")


def check_acceptance(
    draft_path: Path, checkpoint: Path, target: TargetSection, device: str | None, max_samples: int
) -> Iterator[Problem]:
    """Decode the run's own data with the real target and compare tokens per pass."""
    run = read_run(checkpoint)
    if not Path(run.data_path).is_file():
        raise ConfigError(f"{run.data_path}: the data of the run is gone; decoding needs its prompts")
    dataset = open_dataset(run.data_path, target, run.data)
    samples = [dataset[i] for i in range(min(len(dataset), max_samples))]
    model = SpeculativeModel.from_pretrained(
        target.target_model_path,
        draft_path,
        num_draft_tokens=run.recorded.chain_length,
        dtype=run.target_dtype,
        device=device,
        trust_remote_code=target.trust_remote_code,
    )
    decoded = decode_answers(model, samples, run.recorded.chain_length)
    yield from compare(run.recorded, decoded.tokens_per_pass, decoded.reproduced_share)


def compare(recorded: Recorded, decoded: float, reproduced_share: float) -> Iterator[Problem]:
    """One finding: how the tokens gained by drafting, beyond the one that every pass gives, relate.

    decoded: tokens per pass. reproduced_share: of the file's answers, what decoding gave before the first difference.
    """
    promised, gained = recorded.tau - 1, decoded - 1
    own = reproduced_share >= OWN_ANSWERS
    figures = (
        f"{recorded.source} estimated {recorded.tau:.2f} tokens per pass of {recorded.chain_length} drafted ones,"
        f" decoding gives {decoded:.2f}"
    )
    if gained < (BROKEN_SHARE_OWN if own else BROKEN_SHARE_OTHERS) * promised:
        yield (
            "broken",
            f"{figures}: the draft does not see in decoding what it was trained on; compare the order of its aux"
            " layers, the target's revision and its chat template with those of the run",
        )
    elif gained < BROKEN_SHARE_OWN * promised:
        yield (
            "warning",
            f"{figures}; the answers of the file are not the target's own (decoding reproduces {reproduced_share:.0%}),"
            " so the two need not agree: regenerate them (scripts/generate_data_by_target.py) to be sure",
        )
    else:
        yield "ok", figures
