"""The rules of a target's generation_config that change logits, applied with speculation exactly as `generate` does.

Each of them is a function of the tokens so far and the logits after them, so it is applied to every node of a tree with
the node's own text: prompt, answer, and the path from the root. transformers' own processors do the work. What needs
more than that (beams, a second model, guidance) is refused by name.

Letters: B rows, Q nodes, N nodes of one depth, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.tree import TokenTree
from specforge_lite.inference.verify import Sampling

# Functions of text and logits, greedy and sampled. A value that says "off" may stand in any of them.
TEXT_RULES = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "remove_invalid_values",
)  # fmt: skip
# Of these, what counts from the end of the prompt.
PLACE_RULES = ("min_new_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty")
SAMPLING_RULES = ("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")  # beside temperature, top_k, top_p
REFUSED = (
    "guidance_scale", "num_beams", "num_beam_groups", "penalty_alpha", "dola_layers", "constraints", "force_words_ids",
    "watermarking_config", "token_healing", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "forced_bos_token_id", "forced_eos_token_id", "diversity_penalty", "stop_strings", "max_time",
)  # fmt: skip
# Values that switch a rule off, beside None, False, 0 and empty ones.
ONE_IS_OFF = ("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale", "num_beams",
              "num_beam_groups")  # fmt: skip


def rules_in_force(generation_config: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that the generation config switches on."""
    values = {name: getattr(generation_config, name, None) for name in names}
    return [name for name, value in values.items() if value and not (value == 1 and name in ONE_IS_OFF)]


def check_generation_config(generation_config: Any, also: Sequence[str] = ()) -> None:
    """Raise ConfigError naming a rule that cannot be applied to a tree, or is among `also`."""
    if found := rules_in_force(generation_config, (*REFUSED, *also)):
        shown = ", ".join(f"{name} {getattr(generation_config, name)!r}" for name in found)
        raise ConfigError(
            f"generation_config of the target: {shown}: not applied here, so the output would not be the target's;"
            " remove it from generation_config.json"
        )


class LogitRules:
    """The rules of one call; false where there are none. prompts: token ids of every answer."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], eos_token_ids: Sequence[int], sampling: Sampling
    ) -> None:
        config: Any = getattr(model, "generation_config", None)
        check_generation_config(config)
        self.replaces_sampling = not sampling.is_greedy and bool(rules_in_force(config, SAMPLING_RULES))
        self._processors: list[Any] = []
        if not self.replaces_sampling and not rules_in_force(config, TEXT_RULES):
            return
        device = model.get_input_embeddings().weight.device
        config = copy.deepcopy(config)
        config.do_sample = self.replaces_sampling
        config.temperature, config.num_beams = sampling.temperature if self.replaces_sampling else None, None
        config.top_k = sampling.top_k or None
        config.top_p = sampling.top_p if 0 < sampling.top_p < 1 else None
        eos = sorted(eos_token_ids)
        config._eos_token_tensor = torch.tensor(eos, device=device) if eos else None
        self._processors = [
            model._get_logits_processor(config, input_ids_seq_length=len(prompt), device=device, model_kwargs={})
            for prompt in prompts
        ]

    def __bool__(self) -> bool:
        return bool(self._processors)

    def apply(self, index: int, text: Sequence[int], logits_V: Tensor) -> Tensor:
        """Logits after `text` of answer `index` -> the same under the rules, in fp32 as in `generate`."""
        ids = torch.tensor([list(text)], device=logits_V.device)
        return self._processors[index](ids, logits_V[None].float())[0]  # type: ignore[no-any-return]

    def apply_to_tree(
        self, indices: Sequence[int], texts: Sequence[Sequence[int]], tree: TokenTree, logits_BQV: Tensor
    ) -> Tensor:
        """The same for every node; texts[b] ends with the root."""
        result = logits_BQV.float().clone()
        tokens, seen = tree.tokens_BQ.tolist(), tree.ancestors_BQQ.tolist()  # two transfers, with rules only
        for row, (index, text) in enumerate(zip(indices, texts)):
            by_depth: dict[int, list[tuple[int, list[int]]]] = {}
            for place, ancestors in enumerate(seen[row]):
                path = [token for token, above in zip(tokens[row], ancestors) if above][1:]
                by_depth.setdefault(len(path), []).append((place, path))
            for nodes in by_depth.values():
                places = [place for place, _ in nodes]
                ids_NT = torch.tensor([[*text, *path] for _, path in nodes], device=result.device)
                result[row, places] = self._processors[index](ids_NT, result[row, places])
        return result
