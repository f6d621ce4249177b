"""Checks of a target's files: config, weights, frozen tensors, draft shape, tokenizer, chat template, loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specforge_lite.capture.base import check_aux_layer_ids, default_aux_layer_ids
from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.hub import load_config, load_tokenizer, local_directory
from specforge_lite.core.log import format_bytes
from specforge_lite.core.weight_files import weight_files
from specforge_lite.data.encoding import TokenizerSpec
from specforge_lite.data.templates.families import template_warning
from specforge_lite.data.tokenize import ConversationTokenizer, TokenizeOptions
from specforge_lite.doctor import Problem
from specforge_lite.doctor.settings import VerifyConfig
from specforge_lite.model.draft import Draft, DraftConfig
from specforge_lite.model.registry import build_draft
from specforge_lite.model.target_head import TargetHead, load_target_head
from specforge_lite.types import CapturedStates, Conversation, TokenizedSample

QUESTION, ANSWER = "Name a colour and a number.", "Blue, and 42. Is that what you wanted?"
FOLLOW_UP, SECOND_ANSWER = "Another one, please.", "Green, and 7."
TURNS = (("user", QUESTION), ("assistant", ANSWER), ("user", FOLLOW_UP), ("assistant", SECOND_ANSWER))
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
DRAFT_VOCAB = 32000


@dataclass
class Examination:
    """Results so far; each check fills in what later ones need (target.CHECKS names these grounds)."""

    options: VerifyConfig
    config: Any = None
    text_config: Any = None
    tokenizer: Any = None
    aux_layer_ids: tuple[int, ...] = ()
    sample: TokenizedSample | None = None
    directory: Path = field(init=False)
    head: TargetHead = field(init=False)
    draft: Draft = field(init=False)
    tokenize: ConversationTokenizer = field(init=False)
    engine: HfEngine = field(init=False)
    states: CapturedStates = field(init=False)
    broken: set[str] = field(default_factory=set)


# --------------------------------------------------------------------------------------------------------------- files


def check_config(x: Examination) -> Iterator[Problem]:
    x.config = load_config(x.options.target_model_path, x.options.trust_remote_code)
    x.text_config = text = x.config.get_text_config()
    nested = "" if text is x.config else f" ({text.model_type} inside {x.config.model_type})"
    yield (
        "ok",
        f"{text.model_type}{nested}: {text.num_hidden_layers} layers, {text.hidden_size} wide, vocabulary"
        f" {text.vocab_size}, context {getattr(text, 'max_position_embeddings', 'not limited')}",
    )


def check_weights(x: Examination) -> Iterator[Problem]:
    x.directory = local_directory(x.options.target_model_path)
    files = weight_files(x.directory)
    size = sum(file.stat().st_size for file in set(files.values()))
    yield "ok", f"{len(files)} tensors, {format_bytes(size)} of safetensors"


def check_head(x: Examination) -> Iterator[Problem]:
    x.head = head = load_target_head(x.directory, x.config)
    parts = ["tied to the embedding" if head.lm_head_VH is head.embed_VH else "a matrix of its own"]
    parts.append("LayerNorm before it" if head.norm_centers else "RMSNorm before it")
    for label, value, plain in (
        ("embedding scale", head.embed_scale, 1.0),
        ("logit scale", head.logit_scale, 1.0),
        ("soft cap", head.logit_softcap, None),
    ):
        if value != plain:
            parts.append(f"{label} {value:g}")
    yield "ok", ", ".join(parts)
    if tuple(head.embed_VH.shape) != (x.text_config.vocab_size, x.text_config.hidden_size):
        yield "broken", f"embedding {list(head.embed_VH.shape)} != [vocab_size, hidden_size] of the config"


def check_aux_layers(x: Examination) -> Iterator[Problem]:
    num_layers = int(x.text_config.num_hidden_layers)
    note = None
    if x.options.aux_layer_ids is not None:
        x.aux_layer_ids = check_aux_layer_ids(x.options.aux_layer_ids, num_layers)
    else:
        x.aux_layer_ids, note = default_aux_layer_ids(num_layers)
    inputs = [i + 1 for i in x.aux_layer_ids]
    yield "ok", f"outputs of layers {list(x.aux_layer_ids)} of {num_layers} (vLLM names them as inputs: {inputs})"
    if note:
        yield "warning", note


def check_draft_shape(x: Examination) -> Iterator[Problem]:
    vocab = min(DRAFT_VOCAB, int(x.text_config.vocab_size))
    config = DraftConfig.from_target(x.config, vocab).replace(aux_layer_ids=x.aux_layer_ids)
    ids = torch.arange(vocab)
    x.draft = build_draft(config, torch.zeros_like(ids), torch.arange(config.vocab_size) < vocab)
    count = sum(p.numel() for p in x.draft.parameters())
    yield (
        "ok",
        f"{count / 1e6:.4g}M parameters: {config.num_attention_heads}/{config.num_key_value_heads} heads of"
        f" {config.head_dim}, feed-forward {config.intermediate_size}, draft vocabulary {vocab}",
    )


# ----------------------------------------------------------------------------------------------------------- tokenizer


def check_tokenizer(x: Examination) -> Iterator[Problem]:
    x.tokenizer = load_tokenizer(x.options.target_model_path, x.options.trust_remote_code)
    spec = TokenizerSpec.from_tokenizer(x.tokenizer)
    top = max(spec.vocabulary.values())
    rows = int(x.text_config.vocab_size)
    if top >= rows:
        yield "broken", f"token ids go up to {top}, the model's vocabulary is 0..{rows - 1}: not this model's tokenizer"
    elif len(spec.vocabulary) < rows // 2:  # transformers makes up an empty one where the files are missing
        yield (
            "broken",
            f"{len(spec.vocabulary)} tokens, the model's vocabulary has {rows}: tokenizer files are missing, or are"
            " not this model's",
        )
    else:
        unused = f", {rows - 1 - top} rows of the head are no token" if top < rows - 1 else ""
        yield "ok", f"{len(spec.vocabulary)} tokens{unused}"


def check_template(x: Examination) -> Iterator[Problem]:
    spec = TokenizerSpec.from_tokenizer(x.tokenizer)
    x.tokenize = ConversationTokenizer(spec, TokenizeOptions(chat_template=x.options.chat_template))
    template = x.tokenize.template
    how = "the tokenizer's own" if template.is_own else "given"
    if x.options.chat_template == "auto" and not template.is_own:
        how = "recognised by its tokens"
    yield "ok", f"{template.name} ({how})"
    if warning := template_warning(template, spec):
        yield "warning", warning


def check_mask(x: Examination) -> Iterator[Problem]:
    """The answers of a made-up conversation, and nothing else, must be trained."""
    x.sample = x.tokenize(Conversation("verify", list(MESSAGES))).to_sample()
    ids, mask = x.sample.input_ids_L, x.sample.loss_mask_L
    trained, masked = (x.tokenizer.decode(ids[keep].tolist()) for keep in (mask, ~mask))
    for answer in (ANSWER, SECOND_ANSWER):
        if answer not in trained:
            yield "broken", f"the answer {answer!r} is not trained; trained is {trained!r}"
    for question in (QUESTION, FOLLOW_UP):
        if question in trained or question not in masked:
            yield "broken", f"the question {question!r} is trained; trained is {trained!r}"
    ending = trained[trained.rfind(SECOND_ANSWER) + len(SECOND_ANSWER) :]
    if not ending.strip():
        yield "warning", "no end token is trained after an answer: the draft will not learn where answers end"
    yield "ok", f"{int(mask.sum())} of {len(ids)} tokens trained; answers end with {ending.strip()!r}"


def check_prompt(x: Examination) -> Iterator[Problem]:
    """What the last answer is trained after must be what it is asked for with: the tokenizer's own template."""
    if not x.tokenizer.chat_template:
        yield "warning", "the tokenizer has no chat template to compare with; a base model answers no chat"
        return
    asked = x.tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, return_dict=True)
    served = list(asked["input_ids"])
    ids = x.tokenize(Conversation("verify", list(MESSAGES))).to_sample().input_ids_L.tolist()
    if ids[: len(served)] == served:
        yield "ok", f"the {len(served)} tokens before the last answer are those of the tokenizer's own template"
        return
    at = next((i for i, (a, b) in enumerate(zip(ids, served)) if a != b), min(len(ids), len(served)))
    trained, own = (repr(x.tokenizer.decode(part[max(0, at - 2) : at + 10])) for part in (ids, served))
    yield (
        "broken",
        f"token {at}: the draft would be trained after {trained}, but served after {own}; use --chat-template auto",
    )
