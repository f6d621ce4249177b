"""Train a small target like the one in specforge_lite/assets/tiny_target, from nothing, on CPU.

    python scripts/prepare_data.py --dataset gsm8k --output-path data --data-path gsm8k_train.jsonl
    python scripts/train_tiny_target.py --chat-data data/gsm8k.jsonl --output-dir outputs/tiny_target

A byte-level BPE of 4,096 tokens and a Llama of 2.5M parameters, on chats (any normal-form jsonl) and on functions of
the running Python's standard library, part of them with a span of lines cut out (fill-in-the-middle). Muon for
matrices, AdamW for the rest, two linear decays. The shipped target took 15.3M tokens, 69 minutes on two cores.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from specforge_lite.core.errors import DataError
from specforge_lite.core.log import format_seconds, info, run_script
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{%- else -%}{{ message['content'] + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


class TinyTargetConfig(Section):
    """Data, shape and length of the run."""

    chat_data: Path = Field(description="normal-form jsonl of conversations (scripts/prepare_data.py)")
    source_dir: Path = Field(Path(sysconfig.get_path("stdlib")), description="Python source; default: the stdlib")
    output_dir: Path
    vocab_size: int = Field(4096, ge=300)
    hidden_size: int = Field(128, ge=32)
    intermediate_size: int = Field(352, ge=32)
    num_layers: int = Field(8, ge=2)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    max_length: int = Field(512, ge=32, description="tokens of a training row; the model accepts twice as many")
    batch_size: int = Field(8, ge=1)
    total_tokens: int = Field(15_300_000, ge=1, description="tokens to train on")
    whole_share: float = Field(0.4, ge=0, le=1, description="functions kept whole; the others have a span cut out")
    max_functions: int = Field(6440, ge=0)
    held_out: int = Field(100, ge=1, description="texts kept for the held-out loss")
    muon_lr: float = Field(0.02, gt=0)
    adam_lr: float = Field(3e-3, gt=0)
    seed: int = 0


def main() -> None:
    config = parse_config(TinyTargetConfig, description=__doc__ or "")
    import torch

    chooser = random.Random(config.seed)
    texts = [*chat_texts(config.chat_data), *code_texts(config, chooser)]
    chooser.shuffle(texts)
    if len(texts) <= config.held_out:
        raise DataError(f"{config.chat_data}: {len(texts)} texts in all, but {config.held_out} are to be held out")
    tokenizer = train_tokenizer(texts[config.held_out :], config.vocab_size)
    held_out, training = (pack_rows(part, tokenizer, config.max_length) for part in split(texts, config.held_out))
    info(f"{len(texts):,} texts, {training.numel():,} training tokens, {held_out.numel():,} held out")
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    train(model, training, held_out, config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    info(f"written to {config.output_dir}")


def split(texts: list[str], num_held_out: int) -> tuple[list[str], list[str]]:
    return texts[:num_held_out], texts[num_held_out:]


def chat_texts(path: Path) -> Iterator[str]:
    """Conversations as ChatML text."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            messages = json.loads(line)["conversations"]
            yield "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)


def code_texts(config: TinyTargetConfig, chooser: random.Random) -> list[str]:
    """Functions of the source tree: whole ones, and ones with a span of lines to fill in."""
    functions: list[str] = []
    for file in sorted(config.source_dir.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        lines = source.splitlines(keepends=True)
        texts = (textwrap.dedent("".join(lines[n.lineno - 1 : n.end_lineno])).rstrip("\n") for n in nodes)
        functions += [text for text in texts if 80 < len(text) < 2000]
    chooser.shuffle(functions)
    return [cut_out(text, config.whole_share, chooser) for text in functions[: config.max_functions]]


def cut_out(text: str, whole_share: float, chooser: random.Random) -> str:
    """`<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>M<|endoftext|>`, or the text itself."""
    lines = text.splitlines(keepends=True)
    if chooser.random() < whole_share or len(lines) < 4:
        return text + END_OF_TEXT
    start = chooser.randrange(1, len(lines) - 1)
    stop = min(len(lines), start + chooser.randint(1, 8))
    prefix, middle, suffix = ("".join(part) for part in (lines[:start], lines[start:stop], lines[stop:]))
    return f"{FIM[0]}{prefix}{FIM[2]}{suffix}{FIM[1]}{middle}{END_OF_TEXT}"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stay single, so that numbers are spelled the same everywhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, TURN_START, TURN_END, *FIM]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack_rows(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """All texts back to back, cut into rows [R, length] int64; the last, partial row is dropped."""
    import torch

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
    rows = len(ids) // length
    if not rows:
        raise DataError(f"{len(ids)} tokens are less than one row of {length}")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def build_model(config: TinyTargetConfig, tokenizer: Any) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=2 * config.max_length,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model


def train(model: LlamaForCausalLM, rows: Tensor, held_out: Tensor, config: TinyTargetConfig) -> None:
    """Two linear decays: down to zero over the first half, then again from half the rate."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers." not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = (config.muon_lr, config.adam_lr)
    total = max(1, config.total_tokens // (config.batch_size * rows.shape[1]))
    generator = torch.Generator().manual_seed(config.seed)
    start, order = time.monotonic(), torch.empty(0, dtype=torch.int64)
    for step in range(total):
        if len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[: config.batch_size]], order[config.batch_size :]
        half = max(1, (total + 1) // 2)
        decay = (1 - step / half) if step < half else 0.5 * (1 - (step - half) / max(1, total - half))
        for optimizer, rate in zip(optimizers, base_rates):
            optimizer.param_groups[0]["lr"] = rate * decay * min(1.0, (step + 1) / 50)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == total:
            elapsed = time.monotonic() - start
            rate = (step + 1) * batch.numel() / elapsed
            eta = format_seconds((total - step - 1) * elapsed / (step + 1))
            info(f"step {step + 1}/{total} loss {loss.item():.3f} tok/s {rate:.0f} eta {eta}")
    info(f"held-out loss {held_out_loss(model, held_out, config.batch_size):.3f} nats per token")


def held_out_loss(model: LlamaForCausalLM, rows: Tensor, batch_size: int) -> float:
    import torch

    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss * len(part) for part in rows.split(batch_size)]
    return float(torch.stack(losses).sum() / len(rows))


if __name__ == "__main__":
    run_script(main)
