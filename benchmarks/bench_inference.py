"""Decoding: tokens per CPU-second, passes of the target, and what our decoder adds to its networks.

    python benchmarks/bench_inference.py                                  # both targets, one CPU thread
    python benchmarks/bench_inference.py --targets tiny --draft-model-path outputs/quickstart/draft

Targets: `tiny`, the one that ships with the package (with its draft where one is given, else a random one), and `wide`,
random, 8 layers of width 512, vocabulary 32,000, with a random draft: nothing is accepted there, so it shows what a
pass costs. Systems, greedy, on the same prompts:

    generate    transformers' own loop, one token per pass
    assisted    transformers' assisted generation; its assistant is one layer (the target's first, with the target's
                embedding and head), drafting as many tokens as our chain
    plain, chain, tree    ours, without a draft, with a chain, with a dynamic tree

They run in turn, prompt by prompt, so that a machine whose speed drifts favours none. Seconds are CPU seconds of this
process. `break-even` is the acceptance length from which a pass pays: its cost over that of one plain token of ours.
`overhead` is the share of CPU time outside both networks' forward passes.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from specforge_lite.capture.hf import load_target_model
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.log import info, progress, run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.inference import GenerationSettings, SpeculativeModel, TreeShape
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.initialize import init_random
from specforge_lite.model.registry import build_draft

ROOT = Path(__file__).resolve().parent.parent
TINY_TARGET = ROOT / "specforge_lite" / "assets" / "tiny_target"
CPU = torch.device("cpu")
# hidden, layers, heads, kv heads, FFN, vocabulary, draft vocabulary
RANDOM_TARGETS = {"wide": (512, 8, 8, 4, 1408, 32000, 8000), "test": (32, 4, 4, 2, 48, 128, 64)}


class BenchConfig(Section):
    """Decoding speed against transformers, and our overhead."""

    targets: tuple[Literal["tiny", "wide", "test"], ...] = Field(("tiny", "wide"), description="which targets")
    draft_model_path: Path | None = Field(None, description="exported draft of the tiny target (default: a random one)")
    num_prompts: int = Field(4, ge=1, description="prompts; every system answers each once")
    max_new_tokens: int = Field(48, ge=2)
    num_draft_tokens: int = Field(5, ge=1, description="tokens per chain, ours and the assistant's")
    total_token: int = Field(60, ge=2, description="nodes of the tree")
    depth: int = Field(7, ge=0)
    top_k: int = Field(10, ge=1)
    output: Path | None = Field(None, description="write the rows as JSON")


@dataclass
class Row:
    """Sums of one system on one target."""

    target: str
    system: str
    tokens: int = 0
    cpu_seconds: float = 0.0
    target_passes: int = 0
    draft_passes: int = 0
    network_seconds: float | None = None
    outputs: list[list[int]] = field(default_factory=list)

    def to_dict(self, plain: Row) -> dict[str, Any]:
        # The prompt's own pass gives the first token and is left out of the costs per pass.
        passes = max(self.target_passes, 1)
        cost = self.cpu_seconds / passes / (plain.cpu_seconds / max(plain.target_passes, 1))
        return {
            "target": self.target,
            "system": self.system,
            "tokens": self.tokens,
            "tokens_per_cpu_second": self.tokens / self.cpu_seconds,
            "target_passes": self.target_passes,
            "draft_passes": self.draft_passes,
            "tokens_per_pass": self.tokens / passes,
            "break_even": cost,
            "overhead": None if self.network_seconds is None else 1 - self.network_seconds / self.cpu_seconds,
            "identical": self.outputs == plain.outputs,
        }


class Contest:
    """All systems on one target."""

    def __init__(self, name: str, config: BenchConfig) -> None:
        self.name, self.config = name, config
        self.model, draft, self.prompts = make_target(name, config)
        self.ours = SpeculativeModel(self.model, draft)
        assert self.ours.drafter is not None
        self.ours.target.clock = self.ours.drafter.clock = time.process_time
        self.assistant = one_layer_assistant(self.model, config.num_draft_tokens)
        tree = TreeShape(config.total_token, config.depth, config.top_k)
        chain = TreeShape.chain(config.num_draft_tokens)
        self.systems: dict[str, Callable[[Row, list[int]], None]] = {
            "generate": lambda row, prompt: self.run_transformers(row, prompt, None),
            "assisted": lambda row, prompt: self.run_transformers(row, prompt, self.assistant),
            "plain": lambda row, prompt: self.run_ours(row, prompt, None),
            "chain": lambda row, prompt: self.run_ours(row, prompt, chain),
            "tree": lambda row, prompt: self.run_ours(row, prompt, tree),
        }

    def run(self) -> list[Row]:
        rows = {system: Row(self.name, system) for system in self.systems}
        for system, run in self.systems.items():  # once unmeasured: allocation, lazy imports
            run(Row(self.name, system), self.prompts[0])
        with progress(len(self.prompts) * len(rows), self.name, "answer") as bar:
            for prompt in self.prompts:
                for system, run in self.systems.items():
                    run(rows[system], prompt)
                    bar.update(1)
        return list(rows.values())

    def run_ours(self, row: Row, prompt: list[int], shape: TreeShape | None) -> None:
        settings = GenerationSettings(max_new_tokens=self.config.max_new_tokens, eos_token_id=[], shape=shape)
        start = time.process_time()
        output = self.ours.run(prompt, settings, speculative=shape is not None)
        row.cpu_seconds += time.process_time() - start
        stats = output.stats
        row.tokens += stats.num_tokens
        row.target_passes += stats.target_forwards
        row.draft_passes += stats.draft_forwards
        row.network_seconds = (row.network_seconds or 0.0) + stats.target_seconds + stats.draft_seconds
        row.outputs += output.new_tokens

    def run_transformers(self, row: Row, prompt: list[int], assistant: Any | None) -> None:
        ids = torch.tensor([prompt])
        counts = {"target": 0, "draft": 0}
        hooks = [counting_hook(self.model, counts, "target")]
        if assistant is not None:
            hooks.append(counting_hook(assistant, counts, "draft"))
        start = time.process_time()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.config.max_new_tokens,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
            assistant_model=assistant,
        )
        row.cpu_seconds += time.process_time() - start
        for hook in hooks:
            hook.remove()
        new = output[0, len(prompt) :].tolist()
        row.tokens += len(new)
        row.target_passes += counts["target"]
        row.draft_passes += counts["draft"]
        row.outputs.append(new)


def counting_hook(model: Any, counts: dict[str, int], key: str) -> Any:
    def count(*_: Any) -> None:
        counts[key] += 1

    return model.register_forward_hook(count)


def make_target(name: str, config: BenchConfig) -> tuple[Any, Draft, list[list[int]]]:
    """(model in fp32, draft, prompts of token ids)."""
    if name == "tiny":
        model = load_target_model(str(TINY_TARGET), "float32", CPU, False)
        if config.draft_model_path is not None:
            draft = load_draft(config.draft_model_path, model.config, torch.float32)
        else:
            draft = random_draft(model, 2048)
        return model, draft, tiny_prompts(config.num_prompts)
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, ffn, vocab, draft_vocab = RANDOM_TARGETS[name]
    torch.manual_seed(0)
    target_config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(target_config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocab, (64,), generator=generator).tolist() for _ in range(config.num_prompts)]
    return model, random_draft(model, draft_vocab), prompts


def tiny_prompts(count: int) -> list[list[int]]:
    from specforge_lite.core.hub import load_tokenizer

    tokenizer: Any = load_tokenizer(TINY_TARGET)
    names = ("Tom", "Ann", "Kim", "Leo", "Eva", "Max", "Ida", "Sam")
    texts = [
        f"{names[i % len(names)]} has {3 + i} boxes with {4 + 2 * i} pens each and sells {2 + i} pens a day."
        " How many days do the pens last?"
        for i in range(count)
    ]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]
        for chat in chats
    ]


def random_draft(model: Any, draft_vocab_size: int) -> Draft:
    config = DraftConfig.from_target(model.config, draft_vocab_size)
    ids = torch.arange(config.draft_vocab_size) * (config.vocab_size // config.draft_vocab_size)
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    draft = build_draft(config, ids - torch.arange(len(ids)), t2d)
    init_random(draft, seed=0)
    return draft.eval().requires_grad_(False)


def one_layer_assistant(model: Any, num_draft_tokens: int) -> Any:
    """The target's first layer with its embedding, norm and head, drafting a fixed number of tokens."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    assistant = type(model)(config).to(model.dtype).eval().requires_grad_(False)
    assistant.load_state_dict(model.state_dict(), strict=False)
    assistant.generation_config.num_assistant_tokens = num_draft_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for column in (
        "target", "system", "tokens/CPU-s", "target passes", "draft passes", "tokens/pass", "break-even", "overhead",
        "identical",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("target", "system") else "right")
    for row in rows:
        table.add_row(
            row["target"],
            row["system"],
            f"{row['tokens_per_cpu_second']:.1f}",
            str(row["target_passes"]),
            str(row["draft_passes"]),
            f"{row['tokens_per_pass']:.2f}",
            f"{row['break_even']:.2f}",
            "" if row["overhead"] is None else f"{row['overhead']:.1%}",
            "yes" if row["identical"] else "no",
        )
    return table


def main() -> None:
    config = parse_config(BenchConfig, description=__doc__ or "")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for name in config.targets:
        rows = Contest(name, config).run()
        plain = next(row for row in rows if row.system == "plain")
        results += [row.to_dict(plain) for row in rows]
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table_of(results))
    if config.output is not None:
        config.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        info(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
