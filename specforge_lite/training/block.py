"""Settings of a DFlash or DSpark run: DeepSpec's recipe and z-lab's layers where EAGLE-3's defaults differ."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import model_validator

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.hub import load_config, load_tokenizer
from specforge_lite.core.log import warn
from specforge_lite.core.settings import flag
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.data.vocab import COUNT_BLOCK, count_supervised_tokens
from specforge_lite.model.config_json import config_from_file
from specforge_lite.model.draft import DraftConfig
from specforge_lite.training.eagle1 import refuse_eagle3_options, unless_given
from specforge_lite.training.settings import (
    DraftSection,
    OptimizerSection,
    TrainConfig,
    TrainingSection,
)

BLOCK_HELP = """\
Train a {kind} draft, which fills a whole block of tokens in one pass, from the same captured states as EAGLE-3.

    torchrun --standalone --nproc_per_node 8 scripts/train_eagle3_online.py --draft-kind {kind} \\
        --target-model-path MODEL --train-data-path train.jsonl --output-dir outputs/run

`--block-size`, `--num-draft-layers`, `--num-anchors` are its sizes. A second call with the same --output-dir continues
the run.
"""

NUM_AUX_LAYERS = 5
# Tokens that checkpoints keep for such uses, by parts of their names.
UNUSED_NAMES = ("mask", "reserved", "unused", "extra_", "dummy")


class BlockDraftSection(DraftSection):
    """The draft network: layers of the target's width, its embedding and head, its whole vocabulary."""

    init: str = flag("random", "a block draft starts from random weights, or from this draft")
    block_size: int | None = flag(None, "slots of a block (default: dspark 7, dflash 16)", ge=2, le=64)
    num_draft_layers: int | None = flag(None, "layers of the draft (default: 5)", ge=1)
    mask_token_id: int | None = flag(
        None, "row of the target's embedding that empty slots read; default: one that no text has", ge=0
    )
    markov_rank: int | None = flag(None, "dspark: rank of the Markov head (default: 256)", ge=1)

    @model_validator(mode="after")
    def _no_eagle_options(self) -> BlockDraftSection:
        refuse_eagle3_options(self, "a block")
        if self.init == "target":
            raise ValueError("init target: a block draft starts from random weights (--init random) or from a draft")
        return self


class BlockTrainingSection(TrainingSection):
    """How long, on what batches, with which loss."""

    num_anchors: int = flag(512, "blocks of a sample and step, drawn anew in every epoch", ge=1)
    eval_chain_length: int = flag(64, "drafted tokens per pass of the estimated acceptance, at most a block's", ge=1)

    def loss_settings(self) -> dict[str, Any]:
        return {"num_anchors": self.num_anchors, "anchor_seed": self.seed}


class BlockOptimizerSection(OptimizerSection):
    """AdamW and its schedule."""

    learning_rate: float = flag(6e-4, "peak learning rate", "--lr", gt=0)
    warmup_ratio: float | None = flag(0.04, "share of the steps", ge=0, le=1)
    adam_beta2: float = flag(0.999, "", ge=0, lt=1)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0: do not", ge=0)

    _steps_replace_ratio = unless_given("warmup_steps", warmup_ratio=None)


class DsparkConfig(TrainConfig):
    """Train a DSpark draft: it fills a block of tokens in one pass, with a Markov and a confidence head."""

    algorithm: ClassVar[str] = "dspark"

    draft: BlockDraftSection = BlockDraftSection()
    training: BlockTrainingSection = BlockTrainingSection()
    optimizer: BlockOptimizerSection = BlockOptimizerSection()

    @model_validator(mode="after")
    def _not_for_blocks(self) -> DsparkConfig:
        training = self.training
        for name, given in (
            ("loss", training.loss != "ce"),
            ("loss_mask_alignment", training.loss_mask_alignment != "ours"),
            ("sp_size", self.distributed.sp_size > 1),
            ("ttt_length", "ttt_length" in training.model_fields_set),
            ("step_decay", "step_decay" in training.model_fields_set),
            ("markov_rank", self.algorithm == "dflash" and self.draft.markov_rank is not None),
        ):
            if given:
                raise ValueError(f"{name}: a {self.algorithm} draft has no such option; leave it out")
        return self

    def with_target_defaults(self) -> TrainConfig:
        """The aux layers that a block draft reads, where none were given."""
        if self.draft.starts_from_draft:
            return super().with_target_defaults()
        if self.target.aux_layer_ids is not None or self.training.offline_dir is not None:
            return self
        file, ids = self.draft.draft_model_config, None
        if file is not None:
            ids = config_from_file(file).aux_layer_ids
        if ids is None:
            target = load_config(self.target.target_model_path, self.target.trust_remote_code)
            ids = spread_aux_layers(int(target.get_text_config().num_hidden_layers))
        return self.with_values(target={"aux_layer_ids": ids})

    def draft_shape(self, draft: DraftConfig, target_config: Any) -> dict[str, Any]:
        """What the target's config does not have: flags first, then the draft's config.json, then DeepSpec's sizes."""
        flags, is_dspark = self.draft, self.algorithm == "dspark"
        mask = flags.mask_token_id if flags.mask_token_id is not None else draft.mask_token_id
        is_plain = not draft.block_size  # derived from the target, or a plain Llama config
        return {
            "block_size": flags.block_size or draft.block_size or (7 if is_dspark else 16),
            "num_hidden_layers": flags.num_draft_layers or (5 if is_plain else draft.num_hidden_layers),
            "mask_token_id": unused_token(self, target_config) if mask is None else mask,
            "markov_rank": (flags.markov_rank or draft.markov_rank or 256) if is_dspark else 0,
            "confidence_head": is_dspark and (is_plain or draft.confidence_head),
        }

    def check_dataset(self, draft: DraftConfig, dataset: TokenizedDataset) -> None:
        """Refuse answers that hold the mask token: it stands for "not known yet" and would be anchor and label."""
        mask = int(draft.mask_token_id or 0)
        supervised, others = occurrences(dataset, mask)
        if supervised:
            unused = np.flatnonzero(count_supervised_tokens(dataset, draft.vocab_size) == 0)[-1:].tolist()
            raise DataError(
                f"mask_token_id {mask}: {supervised:,} answer tokens of the data are this token; give --mask-token-id"
                + "".join(f" {token} or another" for token in unused)
                + " that never occurs"
            )
        if others:
            warn(f"mask_token_id {mask}: {others:,} prompt tokens of the data are this token; answers have none")


class DflashConfig(DsparkConfig):
    """Train a DFlash draft: it fills a block of tokens in one pass."""

    algorithm: ClassVar[str] = "dflash"


def spread_aux_layers(num_layers: int, count: int = NUM_AUX_LAYERS) -> tuple[int, ...]:
    """Layers whose outputs a block draft reads by default: z-lab's round(1 + i (N - 4) / (A - 1)), distinct.

    >>> spread_aux_layers(36)
    (1, 9, 17, 25, 33)
    >>> spread_aux_layers(8)
    (1, 2, 3, 4, 5)
    """
    last = max(num_layers - 3, 1)
    count = min(count, last)
    wanted = [round(1 + i * (last - 1) / max(count - 1, 1)) for i in range(count)]
    return tuple(sorted(set(wanted)))


def unused_token(config: DsparkConfig, target_config: Any) -> int:
    """A row of the target's embedding that no text has: behind the tokenizer's last id, a reserved token, padding that
    ends nothing, else the last special token that the chat template does not use (SmolLM2: <empty_output>; answers are
    searched for it all the same, see `check_dataset`). Raises ConfigError where there is none."""
    text = target_config.get_text_config()
    tokenizer = load_tokenizer(config.target.target_model_path, config.target.trust_remote_code)
    if len(tokenizer) < text.vocab_size:
        return len(tokenizer)
    added = tokenizer.get_added_vocab()
    for part in UNUSED_NAMES:
        found = sorted(index for name, index in added.items() if part in name.lower())
        if found:
            return int(found[0])
    eos = text.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), text.bos_token_id, tokenizer.eos_token_id}
    pad = text.pad_token_id
    if pad is not None and pad not in ends:
        return int(pad)
    template = str(tokenizer.chat_template or "")
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content not in template}
    if left := special - ends:
        return int(max(left))
    raise ConfigError(
        "mask_token_id: the target's vocabulary has no unused token; give --mask-token-id with one that never occurs in"
        " your data"
    )


def occurrences(dataset: TokenizedDataset, token_id: int) -> tuple[int, int]:
    """(supervised tokens that are `token_id`, others that are)."""
    input_ids, loss_mask = dataset.token_arrays()
    supervised = others = 0
    for start in range(0, len(input_ids), COUNT_BLOCK):
        found = loss_mask[start : start + COUNT_BLOCK][input_ids[start : start + COUNT_BLOCK] == token_id]
        supervised += int(found.sum())
        others += int((~found).sum())
    return supervised, others
