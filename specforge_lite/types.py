"""The values that travel between stages. Shape letters used in the whole package:

N tokens of a batch (documents back to back, no padding), L tokens of one sample, S documents of a batch,
H target hidden size, D draft hidden size, A aux layers, V target vocabulary, Vd draft vocabulary, K TTT steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds; preparing and tokenizing data does not need it
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conversation:
    """One row of the normal form: `{"id", "conversations": [{"role", "content", ...}], "tools"?: [...]}`.

    A message keeps `tool_calls`, `reasoning_content` and `name` where the source had them.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids [L] int64 of one sample and which of them the target is meant to produce, bool [L]."""

    sample_id: str
    input_ids_L: Tensor
    loss_mask_L: Tensor

    def __len__(self) -> int:
        return int(self.input_ids_L.shape[0])


@dataclass(frozen=True)
class CapturedStates:
    """What a target engine returns for one sample.

    input_ids_L: the ids the engine ran, echoed; must equal the sample's.
    aux_LAH: outputs of the aux layers, ascending in layer id. last_LH: last hidden state; `last_is_normed` says
    whether the final norm was applied (SGLang, transformers: yes; vLLM: no).
    aux_layer_ids: 0-based ids of the layers whose OUTPUT each slice is.
    """

    sample_id: str
    input_ids_L: Tensor
    aux_LAH: Tensor
    last_LH: Tensor
    aux_layer_ids: tuple[int, ...]
    last_is_normed: bool


@dataclass
class DraftBatch:
    """A training batch: S documents back to back in one row of N tokens. There is no padding anywhere.

    input_ids_N int64; loss_mask_N bool (m_t: token t is one the target should produce);
    doc_offsets: S+1 python ints, document s is tokens doc_offsets[s] .. doc_offsets[s+1]-1;
    aux_NG [N, A*H] aux states, last_NH [N, H] last hidden state AFTER the final norm.
    """

    input_ids_N: Tensor
    loss_mask_N: Tensor
    doc_offsets: list[int]
    aux_NG: Tensor
    last_NH: Tensor
    sample_ids: list[str] = field(default_factory=list)
    epoch: int = 0  # of its samples; block drafts draw other anchors in every epoch
    host_mask_N: Tensor | None = None  # loss_mask_N on the CPU, so that planning a step never waits for a GPU

    def __len__(self) -> int:
        return int(self.input_ids_N.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DraftBatch:
        """Copy to a device (non-blocking from pinned memory), casting hidden states to `dtype` if given."""
        return DraftBatch(
            input_ids_N=self.input_ids_N.to(device, non_blocking=True),
            loss_mask_N=self.loss_mask_N.to(device, non_blocking=True),
            doc_offsets=self.doc_offsets,
            aux_NG=self.aux_NG.to(device, dtype, non_blocking=True),
            last_NH=self.last_NH.to(device, dtype, non_blocking=True),
            sample_ids=self.sample_ids,
            epoch=self.epoch,
            host_mask_N=self.loss_mask_N.cpu() if self.host_mask_N is None else self.host_mask_N,
        )


def collate(samples: list[TokenizedSample], last_normed: list[Tensor], aux: list[Tensor]) -> DraftBatch:
    """Lay samples, their normed last states [L, H] and aux states [L, A, H] back to back."""
    import torch

    offsets = [0]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    return DraftBatch(
        input_ids_N=torch.cat([s.input_ids_L for s in samples]),
        loss_mask_N=torch.cat([s.loss_mask_L for s in samples]),
        doc_offsets=offsets,
        aux_NG=torch.cat([a.flatten(1) for a in aux]),
        last_NH=torch.cat(last_normed),
        sample_ids=[s.sample_id for s in samples],
    )


@dataclass
class StepOutput:
    """Sums and counts of one forward pass; nothing is divided here, so nothing depends on batching.

    loss: scalar, sum over steps and counted positions of weight_k * CE; call backward on it.
    Per-step vectors [K], fp32, on the batch's device, detached: loss_sum_K (unweighted), counted_K (positions in the
    loss), supervised_K (counted plus out-of-vocabulary teachers), correct_K (argmax equals the teacher's full argmax),
    alpha_sum_K (sum over supervised positions of sum_v min(p, q), p over the full vocabulary).
    run_sum / run_rows: sum over rows supervised at step 0 of the run of correct steps from step 0, and their number.
    weight_sum: what `loss` is divided by once it is added up over ranks and accumulation; None: counted_K[0].
    """

    loss: Tensor
    loss_sum_K: Tensor
    counted_K: Tensor
    supervised_K: Tensor
    correct_K: Tensor
    run_sum: Tensor
    run_rows: Tensor
    alpha_sum_K: Tensor | None = None
    correct_NK: Tensor | None = None  # bool, evaluation only: row t, step k was right
    supervised_NK: Tensor | None = None  # bool, evaluation only
    guess_NK: Tensor | None = None  # int64, evaluation of an EAGLE draft only: what supervised rows guess, target ids
    weight_sum: Tensor | None = None
