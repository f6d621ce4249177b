"""The decoding loops: with a draft (propose, verify, accept) and without (one token per pass of the target)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.drafter import CachedDraft
from specforge_lite.inference.kv_cache import filled_paths, upload
from specforge_lite.inference.logit_rules import LogitRules
from specforge_lite.inference.output import Answer, Chunk, DecodeStats, StopRules
from specforge_lite.inference.target import ExactReplay, Target
from specforge_lite.inference.tree import TreeShape, chain_tree
from specforge_lite.inference.verify import Sampling, Verdict, accept_greedy, accept_sampled


class Decoding:
    """One call's state: answers, caches, counters. `active` lists the answers that are not finished yet; row b of
    every cache and tensor belongs to answer `active[b]`.

    A pass sends the host one tensor (what was accepted) and gets one back (what to go on with).
    tie_units: greedy tokens that lead by less are decided by `ExactReplay`; 0 switches that off.
    """

    def __init__(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]],
        rules: StopRules,
        sampling: Sampling,
        seed: int | None,
        tokenizer: object | None,
        tie_units: float | None = 0.0,
        max_length: int | None = None,
    ) -> None:
        limit = min(target.context_length, max_length or target.context_length)
        vocab_size = len(target.embedding_VH)
        for index, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < limit:
                raise ConfigError(f"prompt {index} has {len(prompt)} tokens; expected 1..{limit - 1}")
            if bad := [i for i in prompt if not 0 <= i < vocab_size]:
                raise ConfigError(f"prompt {index}: token id {bad[0]}: the target's vocabulary is 0..{vocab_size - 1}")
        self.target = target
        self.sampling = sampling
        self.logit_rules = LogitRules(target.model, prompts, sorted(rules.eos_token_ids), sampling)
        if self.logit_rules.replaces_sampling:
            self.sampling = Sampling(1.0)  # temperature, top_k and top_p are among the rules then
        self.answers = [
            Answer(prompt, replace(rules, max_new_tokens=min(rules.max_new_tokens, limit - len(prompt))), tokenizer)
            for prompt in prompts
        ]
        self.active = list(range(len(prompts)))
        self.generator: torch.Generator | None = None
        if seed is not None and not sampling.is_greedy:
            self.generator = torch.Generator(target.device).manual_seed(seed)
        self.tie_units = tie_units if sampling.is_greedy and target.dtype.itemsize >= 4 else 0.0
        self.replays: dict[int, ExactReplay] = {}
        self.stats = DecodeStats(num_prompts=len(prompts))
        longest = max((len(prompt) for prompt in prompts), default=0)
        self.capacity = longest + min(rules.max_new_tokens, 512) + 64
        self.cache = target.new_cache(len(prompts), self.capacity)

    def steps(self, drafter: CachedDraft | None, shape: TreeShape, draw: bool = False) -> Iterator[list[Chunk]]:
        """Decode, yielding what each step added: propose, verify, accept; without a drafter one token per pass.

        draw: chains are drawn from the draft's own distribution, where the text is sampled, and accepted by the rule
        for that; else they are its most probable tokens.
        """
        draft_sampling = self.sampling if draw and shape.is_chain and not self.sampling.is_greedy else None
        if drafter is not None:
            drafter.start(len(self.active), self.capacity)
        yield [self._read_prompt(row, drafter) for row in range(len(self.active))]
        left = self._unfinished()
        self._select(left, upload(left, self.target.device), drafter)
        root_B = upload([self.answers[i].tokens[-1] for i in self.active], self.target.device)
        while self.active:
            tree = chain_tree(root_B, [])
            if drafter is not None:
                tree = drafter.propose(root_B, shape, draft_sampling, self.generator)
            logits_BQV, features_BQG = self.target.verify(self.cache, tree)
            if self.logit_rules:
                texts = [self.answers[i].all_tokens for i in self.active]
                logits_BQV = self.logit_rules.apply_to_tree(self.active, texts, tree, logits_BQV)
            if self.sampling.is_greedy:
                verdict = accept_greedy(tree, logits_BQV, 0.0 if drafter is None else self.tie_units or 0.0)
                self._settle_near_ties(verdict)
            else:
                verdict = accept_sampled(tree, logits_BQV, self.sampling, self.generator)
            chunks = [self._take(row, verdict, shape, drafter is not None) for row in range(len(self.active))]
            if left := self._unfinished():
                root_B = self._go_on(drafter, verdict, features_BQG, left)
            else:
                self.active = []
            yield chunks

    def _read_prompt(self, row: int, drafter: CachedDraft | None) -> Chunk:
        answer = self.answers[self.active[row]]
        prompt_T = upload(answer.prompt, self.target.device)
        logits_V, features_TG = self.target.prefill(self.cache, row, prompt_T)
        if self.logit_rules:
            logits_V = self.logit_rules.apply(self.active[row], answer.prompt, logits_V)
        token_1 = self.sampling.draw(logits_V[None], self.generator)
        chunk = self._add(row, token_1.tolist(), [False])
        if drafter is not None and chunk.finish_reason is None:
            drafter.read_prompt(row, features_TG, torch.cat([prompt_T[1:], token_1]))
        return chunk

    def _add(self, row: int, tokens: list[int], drafted: list[bool]) -> Chunk:
        index = self.active[row]
        answer = self.answers[index]
        taken = answer.add(tokens, drafted)
        self.stats.num_tokens += taken
        return Chunk(index, tokens[:taken], drafted[:taken], answer.finish_reason)

    def _take(self, row: int, verdict: Verdict, shape: TreeShape, with_draft: bool) -> Chunk:
        """Append a row's accepted tokens (the root is in the text already) and the bonus token."""
        accepted = verdict.tokens[row][1:]
        chunk = self._add(row, [*accepted, verdict.bonus[row]], [True] * len(accepted) + [False])
        if with_draft:
            self.stats.count_pass(sum(chunk.drafted), shape.longest_path)
        return chunk

    def _unfinished(self) -> list[int]:
        """The rows whose answers go on."""
        return [row for row, i in enumerate(self.active) if self.answers[i].finish_reason is None]

    def _select(self, left: list[int], left_R: Tensor, drafter: CachedDraft | None) -> None:
        """Forget all rows but `left`; left_R: the same on the device."""
        if len(left) == len(self.active):
            return
        self.active = [self.active[row] for row in left]
        for cache in (self.cache, drafter):
            if left and cache is not None:
                cache.select_rows(left, left_R)

    def _go_on(self, drafter: CachedDraft | None, verdict: Verdict, features_BQG: Tensor, left: list[int]) -> Tensor:
        """Keep the accepted nodes of the rows left, and give the draft their true features, each with the token that
        follows it; -> the next roots [R]. All that the device must know goes there in one tensor."""
        paths = [verdict.paths[row] for row in left]
        counts, width = [len(path) for path in paths], max(len(path) for path in paths)
        packed = []
        for row, count, path in zip(left, counts, filled_paths(paths)):
            bonus, following = verdict.bonus[row], verdict.tokens[row][1:]
            packed.append([row, count, bonus, *path, *following, bonus, *[0] * (width - count)])
        packed_RX = upload(packed, features_BQG.device)
        (rows_R, counts_R, roots_R), paths_RP = packed_RX[:, :3].unbind(1), packed_RX[:, 3 : 3 + width]
        self._select(left, rows_R, drafter)
        self.cache.keep(paths, paths_RP, counts_R)
        if drafter is not None:
            features_RPG = features_BQG[rows_R[:, None], paths_RP]
            drafter.read_accepted(features_RPG, packed_RX[:, 3 + width :], counts, counts_R)
        return roots_R

    def _settle_near_ties(self, verdict: Verdict) -> None:
        """Where a token of the path leads by rounding only, ask the target's own decoding, and cut the path there if it
        says otherwise."""
        for row, flags in enumerate(verdict.near):
            for place, is_near in enumerate(flags):
                if is_near and self._differs(row, place, verdict):
                    break

    def _differs(self, row: int, place: int, verdict: Verdict) -> bool:
        """Decide the token after node `place` of a row's path; True if the path was cut there."""
        index = self.active[row]
        answer, tokens = self.answers[index], verdict.tokens[row]
        replay = self.replays.setdefault(index, ExactReplay(self.target))
        text = [*answer.all_tokens, *tokens[1 : place + 1]]
        logits_V = replay.logits_after(text, len(answer.prompt))
        if self.logit_rules:
            logits_V = self.logit_rules.apply(index, text, logits_V)
        self.stats.near_ties += 1
        exact = int(logits_V.argmax())
        taken = tokens[place + 1] if place + 1 < len(tokens) else verdict.bonus[row]
        if exact == taken:
            return False
        self.stats.near_ties_flipped += 1
        verdict.paths[row] = verdict.paths[row][: place + 1]
        verdict.tokens[row] = tokens[: place + 1]
        verdict.bonus[row] = exact
        return True


def counters(target: Target, drafter: CachedDraft | None) -> dict[str, float]:
    """What the networks have counted so far, by the names of `DecodeStats`."""
    found = {
        "seconds": target.clock(),
        "target_forwards": target.num_forwards,
        "target_seconds": target.seconds,
    }
    if drafter is not None:
        found |= {
            "draft_forwards": drafter.num_forwards,
            "draft_true_rows": drafter.num_true_rows,
            "draft_speculative_rows": drafter.num_speculative_rows,
            "draft_seconds": drafter.seconds,
        }
    return found
