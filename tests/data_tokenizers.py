"""Tokenizers that tests train on a few sentences: small, always the same, with the control tokens of all families."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.templates.families import TEMPLATES
from specforge_lite.data.tokenize import ConversationTokenizer, TokenizeOptions
from specforge_lite.types import Conversation, TokenizedSample

CORPUS = [
    "Be kind. Hi there, hello. It is 2. Add the numbers. One and one is two, is it not?",
    "system user assistant tool model ipython functions final analysis commentary",
    "You are a helpful assistant. What is the weather like in Paris today? It is sunny in Paris.",
    "def add(one, two):\n    return one + two\n\n\ndef main():\n    print(add(1, 2))\n",
]


def control_tokens() -> list[str]:
    """The control tokens of every template, in a fixed order."""
    return sorted({token for template in TEMPLATES.values() for token in template.control_tokens})


@lru_cache
def byte_level(trim_offsets: bool = True, extra: tuple[str, ...] = (), all_control: bool = True) -> Any:
    """Byte-level BPE of 256 bytes and some merges. trim_offsets: as GPT-2's and the tiny target's post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = [*(control_tokens() if all_control else []), *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 120,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0] if special else None)


@lru_cache
def sentencepiece_like() -> Any:
    """BPE as Llama 2's tokenizer.json writes it: spaces become U+2581, one is prepended, bytes are a fall-back."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that merges stay inside words
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def swallowing_spaces() -> Any:
    """A tokenizer whose headers swallow the spaces after them, as those of Phi-3 do."""
    tokenizer = Tokenizer.from_str(byte_level(all_control=False).backend_tokenizer.to_str())
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tokenize_conversation(
    conversation: Conversation,
    tokenizer: Any,
    template: str = "auto",
    max_length: int = 2048,
    train_only_last_turn: bool = False,
    system_prompt: str | None = None,
) -> TokenizedSample:
    """Tokenize one conversation with a transformers tokenizer."""
    options = TokenizeOptions(template, max_length, train_only_last_turn, system_prompt)
    return ConversationTokenizer(TokenizerSpec.from_tokenizer(tokenizer), options)(conversation).to_sample()
