"""How many tokens a warm start saves: the target was fine-tuned, its old draft no longer fits, and a draft is trained
for it at several budgets, from the old draft (`--init PATH`) or anew; each is decoded with the fine-tuned target.

    python benchmarks/warm_start.py                     # the shipped target, about an hour on a core

The shipped target is fine-tuned for 200 steps on GSM8K answers in another form (numbered steps, no calculator marks) to
questions that no draft sees. Old and new target answer the same questions, so that acceptance before and after can be
compared. Every budget is a run of its own with its own decay: no point of the curve is a run that was cut off. A
finished cell is a file in OUTPUT_DIR and is not run again; OUTPUT_DIR/warm_start.md is written anew after every cell.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.compare_eagle1_eagle3 import SCRIPTS, DraftsConfig, capture_states, decode, make_data, train_draft
from scripts.train_tiny_target import pack_rows
from specforge_lite.core.files import read_json, write_atomically, write_json
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.core.jsonl import read_jsonl
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.settings import parse_config
from specforge_lite.data.sources import shipped_file

COLUMNS = {"chain": "chain of 5, greedy", "tree": "tree of 24, greedy", "chain_sampled": "chain of 5, T=1"}
ARMS = {"anew": "anew", "init": "`--init` old draft"}
RECOVERED = 0.95


class WarmStartConfig(DraftsConfig):
    """Fine-tune a target, and train drafts for it from its old draft and anew."""

    output_dir: Path = Path("outputs/warm_start")
    num_eval: int = Field(60, ge=1, description="prompts to decode")
    batch_size: int = Field(1, ge=1)
    finetune_steps: int = Field(200, ge=1, description="steps of 8 rows of 512 tokens")
    finetune_lr: float = Field(1e-3, gt=0)
    budgets: tuple[int, ...] = Field((25, 50, 100, 200, 400, 800), description="steps; the old draft had total_steps")
    total_steps: int = Field(800, ge=1)
    draft_vocab_size: int = Field(1024, ge=8)
    seeds: tuple[int, ...] = (0, 1)


def main() -> None:
    config = parse_config(WarmStartConfig, description=__doc__ or "")
    out = config.output_dir.resolve()
    old, new = out / "old", out / "new"
    data = {old: prepare(config, old)}
    if not (out / "target" / "config.json").exists():
        fine_tune(
            config, out / "target", {row["conversations"][0]["content"] for f in data[old] for row in read_jsonl(f)}
        )
    tuned = config.model_copy(update={"target_model_path": str(out / "target")})
    data[new] = prepare(tuned, new)
    cells = [(arm, steps, seed) for seed in config.seeds for steps in config.budgets for arm in ARMS]
    with progress(len(cells), "warm start", "training") as bar:
        for seed in config.seeds:
            draft = train(config, old, out / f"old_seed{seed}", seed, config.total_steps)
            for name, target, place in (("before", config, old), ("after", tuned, new)):
                if not (file := out / f"{name}_seed{seed}.json").exists():
                    write_json(file, asdict(decode(target, name, draft, data[place][1])))
            for arm, steps, _ in [cell for cell in cells if cell[2] == seed]:
                if not (file := cell_file(out, arm, steps, seed)).exists():
                    init = ["--init", str(draft)] if arm == "init" else []
                    trained = train(tuned, new, file.with_suffix(""), seed, steps, *init)
                    write_json(file, asdict(decode(tuned, arm, trained, data[new][1])))
                write_atomically(out / "warm_start.md", report(config, out))
                bar.update(1)
    info(f"{out / 'warm_start.md'}\n{report(config, out)}")


def prepare(config: WarmStartConfig, place: Path) -> tuple[Path, Path]:
    """The questions answered by the target of `config`, and its states of the answers."""
    place.mkdir(parents=True, exist_ok=True)
    train_file, evaluation = make_data(config, place)
    capture_states(config, train_file, place / "states")
    return train_file, evaluation


def train(config: WarmStartConfig, place: Path, run: Path, seed: int, steps: int, *flags: str) -> Path:
    """A draft of `steps` steps on the states in `place`."""
    words = ["--learning-rate", str(config.learning_rate), "--ttt-length", "5"]
    words += ["--draft-vocab-size", str(config.draft_vocab_size), *flags]
    budget = config.model_copy(update={"total_steps": steps})
    return train_draft(budget, SCRIPTS["eagle3"], place / "states", run, seed, *words)


def other_form(answer: str) -> str:
    """A GSM8K answer in numbered steps, without calculator marks."""
    *steps, result = re.sub(r"<<.*?>>", "", answer).strip().split("\n")
    lines = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"The answer is {result.removeprefix('#### ')}."])


def fine_tune(config: WarmStartConfig, output: Path, kept_out: set[str]) -> None:
    """Train the target on answers in the other form and save it. kept_out: questions of the drafts."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config.target_model_path)
    rows = [row for row in read_jsonl(shipped_file("gsm8k_test.jsonl")) if row["question"] not in kept_out]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": other_form(row["answer"])}],
            tokenize=False,
        )
        for row in rows
    ]
    packed = pack_rows(texts, tokenizer, 512)
    model = AutoModelForCausalLM.from_pretrained(config.target_model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.finetune_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.finetune_steps)
    order = torch.Generator().manual_seed(0)
    with progress(config.finetune_steps, "fine-tuning", "steps") as bar:
        for _ in range(config.finetune_steps):
            batch = packed[torch.randint(len(packed), (8,), generator=order)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(1)
    info(f"fine-tuned on {len(texts)} answers, {packed.numel():,} tokens; last loss {loss.item():.3f}")
    tokenizer.save_pretrained(output)
    model.bfloat16().save_pretrained(output)


def cell_file(out: Path, arm: str, steps: int, seed: int) -> Path:
    return out / f"{arm}_{steps}_seed{seed}.json"


def read(out: Path, name: str, seeds: Sequence[int]) -> list[dict[str, float]]:
    """The decodings that are there, one a seed."""
    files = [out / f"{name}_seed{seed}.json" for seed in seeds]
    return [read_json(file) for file in files if file.exists()]


def mean(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def shown(rows: Sequence[dict[str, float]]) -> list[str]:
    """A cell for each way of decoding: the mean, and each seed's value."""
    values = {key: ", ".join(f"{row[key]:.2f}" for row in rows) for key in COLUMNS}
    return [f"{mean(rows, key):.2f} ({text})" if len(rows) > 1 else text for key, text in values.items()]


def tokens_to_reach(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The tokens at which a curve of (tokens, acceptance) first has `wanted`, between two budgets by the logarithm of
    the tokens; the first budget where that has it already, None where none has."""
    for place, (tokens, reached) in enumerate(curve):
        if reached < wanted:
            continue
        if place == 0:
            return tokens
        before, low = curve[place - 1]
        return before * (tokens / before) ** ((wanted - low) / (reached - low))
    return None


def report(config: WarmStartConfig, out: Path) -> str:
    """What is there, as markdown: acceptance before and after, the two curves, and the tokens to recover."""

    def tokens_of(steps: int, place: str = "new") -> float:
        stats = read_json(out / place / "states" / "train" / "dataset" / "manifest.json")["stats"]
        return float(steps * config.batch_size * stats["num_tokens"] / stats["num_samples"])

    lines = [["draft", "training tokens", *COLUMNS.values()], ["---"] * 5]
    curves: dict[str, list[tuple[float, list[dict[str, float]]]]] = {arm: [] for arm in ARMS}
    old = {name: read(out, name, config.seeds) for name in ("before", "after")}
    lines.append(["old draft, old target", f"{tokens_of(config.total_steps, 'old'):,.0f}", *shown(old["before"])])
    lines.append(["old draft, fine-tuned target", "0", *shown(old["after"])])
    for steps, arm in ((steps, arm) for steps in config.budgets for arm in ARMS):
        if rows := read(out, f"{arm}_{steps}", config.seeds):
            curves[arm].append((tokens_of(steps), rows))
            lines.append([ARMS[arm], f"{tokens_of(steps):,.0f}", *shown(rows)])
    table = [["to recover", "decoded as", *ARMS.values(), "share"], ["---"] * 5]
    full = curves["anew"][-1][1] if curves["anew"] else []
    for name, rows in (("of the old draft's", old["before"]), ("of the longest anew", full)):
        for key in COLUMNS if rows else ():
            wanted = RECOVERED * mean(rows, key)
            points = {arm: [(tokens, mean(found, key)) for tokens, found in curve] for arm, curve in curves.items()}
            init, anew = (tokens_to_reach(points[arm], wanted) for arm in ("init", "anew"))
            cells = ["not reached" if tokens is None else f"{tokens:,.0f}" for tokens in (anew, init)]
            share = f"{init / anew:.2f}" if init and anew else "-"
            table.append([f"{RECOVERED:.0%} {name}: {wanted:.2f}", COLUMNS[key], *cells, share])
    title = (
        f"{config.finetune_steps} steps of fine-tuning; drafts of K 5, vocabulary {config.draft_vocab_size}, learning"
        f" rate {config.learning_rate:g}, {config.batch_size} sample(s) a step, seeds"
        f" {', '.join(map(str, config.seeds))}: mean (each seed). Tokens per verification pass; {config.num_eval}"
        f" prompts not trained on, {config.max_new_tokens} tokens each."
    )
    parts = (f"| {' | '.join(line)} |" for line in lines), (f"| {' | '.join(line)} |" for line in table)
    return "\n\n".join([title, *("\n".join(part) for part in parts)]) + "\n"


if __name__ == "__main__":
    run_script(main)
