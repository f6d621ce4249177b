"""`SpeculativeModel`: a target, a draft, and the generate calls that EAGLE's users know."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge_lite.capture.hf import load_target_model, place_target
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.devices import without_cudnn
from specforge_lite.core.errors import CheckpointError, ConfigError, suggest
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.data.prompts import text_token_ids
from specforge_lite.inference.block_drafter import BlockDrafter
from specforge_lite.inference.decode import Decoding, counters
from specforge_lite.inference.drafter import CachedDraft, Drafter, Head
from specforge_lite.inference.logit_rules import check_generation_config
from specforge_lite.inference.output import Chunk, GenerationOutput, StopRules
from specforge_lite.inference.target import Target, rounding_units
from specforge_lite.inference.tree import TreeShape
from specforge_lite.inference.verify import Sampling
from specforge_lite.model.block import BlockDraft
from specforge_lite.model.draft import Draft
from specforge_lite.model.target_head import family_scales

# In fp32, leads of this many times what the target's logits differ by between passes of other shapes are decided by its
# own one-token passes (see `rounding_units`). The least: tree passes and `generate` were seen 30 units apart on a CPU.
TIE_MARGIN, LEAST_TIE_UNITS = 8.0, 256.0
DRAFT_SAMPLING = ("auto", "greedy", "sampled")

# Text, token ids, a tokenizer's output, or several: tensors and numpy arrays count as token ids.
Prompts = Any


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated and when they end.

    max_length: prompt and answer together. top_p (0 or 1: off) and top_k (0: off) are of the sampling, not of the tree.
    eos_token_id: None for the model's own, an empty list for none. seed: makes sampling repeatable. shape: another
    tree than the model's. draft_sampling: where text is sampled, chains are the draft's most probable tokens (`greedy`,
    what engines do by default) or drawn from its distribution (`sampled`, what DSpark is trained for); `auto`: sampled
    for a dspark draft. The text has the target's distribution either way. confidence_threshold: a dspark chain ends
    before the first token whose chance of being accepted is below it (0: never).
    """

    max_new_tokens: int = 512
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()
    seed: int | None = None
    shape: TreeShape | None = None
    draft_sampling: str = "auto"
    confidence_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.draft_sampling not in DRAFT_SAMPLING:
            hint = suggest(self.draft_sampling, DRAFT_SAMPLING)
            raise ConfigError(f"draft_sampling: unknown value '{self.draft_sampling}'{hint}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if "" in self.stops or self.stop_strings == "":
            raise ConfigError("stop_strings: an empty string would end every answer at once; leave it out")
        _ = self.sampling  # checks the rest

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    def draw_drafts(self, draft: Draft) -> bool:
        """Whether chains are drawn rather than the most probable tokens."""
        is_auto = self.draft_sampling == "auto"
        return draft.config.algorithm == "dspark" if is_auto else self.draft_sampling == "sampled"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)


class SpeculativeModel:
    """Generates with a target and, where asked, its draft.

    model: a transformers causal LM in evaluation mode; draft: None for plain decoding only. In fp32, greedy output is
    the output of `model.generate(do_sample=False)`, token for token; sampled output follows the same distribution.
    Rules of the model's generation_config that change logits are applied, see `logit_rules`; temperature, top_p, top_k
    and length are those of the call. Threads may share a model: calls wait for each other, a stream until its end.

    >>> model = SpeculativeModel.from_pretrained("path/to/target", "path/to/draft")
    >>> output = model.speculative_generate("Once upon a time", max_new_tokens=64)
    >>> output.texts[0], output.stats.acceptance_length
    """

    def __init__(
        self,
        model: Any,
        draft: Draft | None,
        tokenizer: Any | None = None,
        shape: TreeShape | None = None,
        tie_units: float | None = None,
    ) -> None:
        self.shape = shape or TreeShape()
        self.tokenizer = tokenizer
        self.tie_units = tie_units
        self._lock, self._owner = threading.Lock(), 0  # one call at a time: caches, hooks and counters are shared
        check_generation_config(getattr(model, "generation_config", None))
        is_eagle1 = draft is not None and draft.config.algorithm == "eagle1"
        aux_layer_ids = None if draft is None else draft.config.aux_layer_ids
        self.target = Target(model, aux_layer_ids, last_state=is_eagle1)
        self.drafter: CachedDraft | None = None
        if draft is not None:
            check_match(draft, self.target)
            placed = draft.to(device=self.target.device, dtype=self.target.dtype)
            if isinstance(placed, BlockDraft):
                self.drafter = BlockDrafter(placed, self.target.embedding_VH, target_head_of(model))
                self.shape = shape if shape is not None and shape.is_chain else TreeShape.chain(placed.num_predictions)
            else:
                head = target_head_of(model) if is_eagle1 else None
                self.drafter = Drafter(placed, self.target.embedding_VH, head)

    @classmethod
    def from_pretrained(
        cls,
        base_model_path: str,
        draft_model_path: str | Path | None = None,
        total_token: int = 60,
        depth: int = 7,
        top_k: int = 10,
        use_eagle3: bool | None = None,
        num_draft_tokens: int | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> SpeculativeModel:
        """Load a target (directory or hub name) and a draft directory (see `load_draft`).

        total_token, depth, top_k: the tree, see `TreeShape`; num_draft_tokens: a chain of that many tokens instead.
        use_eagle3: what the draft is expected to be (default: whatever it is). dtype: `auto` (as stored), `float32`,
        `bfloat16`, `float16`. device: `cpu`, `cuda:N`, `auto` (all visible GPUs); default: one GPU if it fits.

        Raises ConfigError and CheckpointError naming what does not fit.
        """
        place = place_target(str(base_model_path), dtype, device)
        model = load_target_model(str(base_model_path), dtype, place, trust_remote_code)
        draft = None
        if draft_model_path is not None:
            where = model.get_input_embeddings().weight.device
            draft = load_draft(draft_model_path, model.config, model.dtype, where)
            is_eagle3 = draft.config.algorithm == "eagle3"
            if use_eagle3 is not None and use_eagle3 != is_eagle3:
                raise ConfigError(
                    f"use_eagle3={use_eagle3}: {draft_model_path} is of algorithm {draft.config.algorithm}"
                )
        tokenizer = None  # a model without one still generates from token ids; text asks for it and says so
        with contextlib.suppress(ConfigError):
            tokenizer = load_tokenizer(base_model_path, trust_remote_code)
        shape = TreeShape.chain(num_draft_tokens) if num_draft_tokens else TreeShape(total_token, depth, top_k)
        return cls(model, draft, tokenizer, shape)

    def speculative_generate(self, prompts: Prompts, max_new_tokens: int = 512, **settings: Any) -> GenerationOutput:
        """Answer one prompt or several at once, each with its own tree; settings: those of `GenerationSettings`.

        prompts: text, token ids [T] or [B, T] (no padding), or a list of either.
        """
        return self.run(prompts, GenerationSettings(max_new_tokens, **settings), speculative=True)

    def generate(self, prompts: Prompts, max_new_tokens: int = 512, **settings: Any) -> GenerationOutput:
        """The same without the draft: one token per pass of the target."""
        return self.run(prompts, GenerationSettings(max_new_tokens, **settings), speculative=False)

    @torch.inference_mode()
    def run(self, prompts: Prompts, settings: GenerationSettings, speculative: bool = True) -> GenerationOutput:
        """Generate to the end. Raises ConfigError for prompts or settings that cannot be."""
        with self._alone():
            decoding, steps = self._open(prompts, settings, speculative)
            drafter = self.drafter if speculative else None
            before = counters(self.target, drafter)
            for _ in steps:
                pass
            for name, count in counters(self.target, drafter).items():
                setattr(decoding.stats, name, count - before[name])
        return GenerationOutput(decoding.answers, decoding.stats, self.pad_token_id)

    @torch.inference_mode()
    def stream(
        self, prompts: Prompts, settings: GenerationSettings | None = None, speculative: bool = True
    ) -> Iterator[Chunk]:
        """Generate, yielding what every pass adds to every answer as it comes. Other calls wait until the stream has
        ended or is closed; from the same thread, which would wait for itself, they raise ConfigError."""
        with self._alone():
            _, steps = self._open(prompts, settings or GenerationSettings(), speculative)
            for chunks in steps:
                yield from chunks

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise ConfigError("this model is streaming an answer in this thread; read it to its end or close it first")
        with self._lock, without_cudnn(self.target.device):
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0

    def _open(
        self, prompts: Prompts, settings: GenerationSettings, speculative: bool
    ) -> tuple[Decoding, Iterator[list[Chunk]]]:
        if speculative and self.drafter is None:
            raise ConfigError("no draft was loaded; give draft_model_path, or call generate")
        token_ids = self.token_ids(prompts)
        eos = settings.eos_token_id if settings.eos_token_id is not None else self.eos_token_ids
        rules = StopRules(settings.max_new_tokens, frozenset([eos] if isinstance(eos, int) else eos), settings.stops)
        decoding = Decoding(
            self.target, token_ids, rules, settings.sampling, settings.seed, self.tokenizer, self.tie_units,
            settings.max_length,
        )  # fmt: skip
        if not speculative or self.drafter is None:
            return decoding, decoding.steps(None, self.shape)
        threshold, draft = settings.confidence_threshold, self.drafter.draft
        if threshold and getattr(draft, "confidence_head", None) is None:
            raise ConfigError(
                f"confidence_threshold {threshold}: this {draft.config.algorithm} draft has no confidence head"
            )
        self.drafter.threshold = threshold
        if decoding.tie_units is None and token_ids:
            measured = rounding_units(self.target, token_ids[0])
            decoding.tie_units = self.tie_units = max(LEAST_TIE_UNITS, TIE_MARGIN * measured)
        return decoding, decoding.steps(self.drafter, settings.shape or self.shape, settings.draw_drafts(draft))

    def token_ids(self, prompts: Prompts) -> list[list[int]]:
        """Prompts of any accepted form -> token ids of each. Padding goes by the attention mask, where there is one."""
        mask = None
        if isinstance(prompts, Mapping):  # what a tokenizer returns
            prompts, mask = prompts["input_ids"], prompts.get("attention_mask")
        rows = [self._ids_of(row) for row in _rows(prompts)]
        if mask is None:
            return rows
        return [[token for token, seen in zip(*pair) if seen] for pair in zip(rows, _rows(mask))]

    def _ids_of(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("a text prompt needs a tokenizer, and the target has none; give token ids")
            return text_token_ids(self.tokenizer, prompt)
        ids: list[int] = prompt[0] if len(prompt) == 1 and isinstance(prompt[0], list) else prompt  # tensors [1, T]
        if wrong := [token for token in ids if not isinstance(token, int) or isinstance(token, bool)]:
            raise ConfigError(f"prompts: expected token ids, found {wrong[0]!r}")
        return ids

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end an answer, by the model's generation config."""
        found = getattr(getattr(self.target.model, "generation_config", None), "eos_token_id", None)
        if found is None:
            found = getattr(self.target.text_config, "eos_token_id", None)
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @property
    def pad_token_id(self) -> int:
        found = getattr(self.target.text_config, "pad_token_id", None)
        return found if isinstance(found, int) else 0

    def eagenerate(
        self,
        input_ids: Prompts,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        speculative: bool = True,
    ) -> Any:
        """As EAGLE's `EaModel.eagenerate`: token ids [B, T] of prompt and answer; with `log` also the number of new
        tokens of the first prompt and the index of its last verification pass. is_llama3: not needed, the target's own
        end tokens are taken."""
        settings = GenerationSettings(max_new_tokens, max_length, temperature, top_p, int(top_k))
        return self._answer(input_ids, settings, log, speculative)

    naivegenerate = partialmethod(eagenerate, speculative=False)  # EAGLE's name for the same without the draft

    def _answer(self, prompts: Prompts, settings: GenerationSettings, log: bool, speculative: bool) -> Any:
        output = self.run(prompts, settings, speculative)
        sequences = output.sequences_BT.to(self.target.device)
        if not log:
            return sequences
        passes = output.stats.verification_passes if speculative else output.stats.num_tokens
        return sequences, len(output.answers[0].tokens), passes - 1


def _rows(prompts: Any) -> list[Any]:
    """One prompt or several -> a list of texts and lists of plain numbers."""
    values = _nested(prompts)
    if isinstance(values, str) or (isinstance(values, list) and values and all(isinstance(v, int) for v in values)):
        return [values]
    if not isinstance(values, list) or not all(isinstance(value, (str, list)) for value in values):
        raise ConfigError(f"prompts: expected text, token ids, or a list of either, found {type(prompts).__name__}")
    return values


def _nested(values: Any) -> Any:
    """Tensors, numpy arrays and numbers inside lists and tuples as plain Python values."""
    if hasattr(values, "tolist"):  # torch and numpy, scalars included
        return values.tolist()
    return [_nested(value) for value in values] if isinstance(values, (list, tuple)) else values


def check_match(draft: Draft, target: Target) -> None:
    """Raise CheckpointError unless the draft was made for a target of this shape."""
    config, text = draft.config, target.text_config
    for name, found, wanted in (
        ("target_hidden_size", config.target_hidden_size, text.hidden_size),
        ("vocab_size", config.vocab_size, text.vocab_size),
        ("number of aux layers", config.num_aux_layers, len(target.aux_layer_ids) or config.num_aux_layers),
    ):
        if found != wanted:
            raise CheckpointError(f"the draft belongs to another target: {name} {found} != {wanted}")


def target_head_of(model: Any) -> Head:
    """The target's own head as a function, for EAGLE-1 drafts, which have none."""
    head = model.get_output_embeddings()
    _, logit_scale, softcap = family_scales(model.config.get_text_config())

    def logits(hidden: Tensor) -> Tensor:
        raw: Tensor = head(hidden).to(hidden.device) * logit_scale  # it may lie on another GPU than the embedding
        return softcap * torch.tanh(raw / softcap) if softcap else raw

    return logits
