"""The decoding loops: with a draft (propose, verify, accept) and without (one token per pass of the target)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specforge_lite.core.errors import ConfigError
from specforge_lite.inference.block_drafter import BlockDrafter
from specforge_lite.inference.drafter import Drafter
from specforge_lite.inference.output import Answer, Chunk, DecodeStats, StopRules
from specforge_lite.inference.target import ExactReplay, Target
from specforge_lite.inference.tree import TreeShape
from specforge_lite.inference.verify import Sampling, Verdict, accept_greedy, accept_sampled, near_ties


class Decoding:
    """One call's state: answers, caches, counters. `active` lists the answers that are not finished yet; row b of
    every cache and tensor belongs to answer `active[b]`.

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
        tie_units: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        limit = min(target.context_length, max_length or target.context_length)
        for index, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < limit:
                raise ConfigError(f"prompt {index} has {len(prompt)} tokens; expected 1..{limit - 1}")
        self.target = target
        self.sampling = sampling
        self.answers = [Answer(prompt, _within(rules, limit - len(prompt)), tokenizer) for prompt in prompts]
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

    # ------------------------------------------------------------------------------------------------------------ loops

    def plain(self) -> Iterator[list[Chunk]]:
        """Decode without a draft; yields what each step added."""
        yield [self._read_prompt(row, None) for row in range(len(self.active))]
        self._drop_finished(None)
        while self.active:
            last_B = torch.tensor([self.answers[i].tokens[-1] for i in self.active], device=self.target.device)
            tokens = self.sampling.draw(self.target.next_token(self.cache, last_B), self.generator).tolist()
            yield [self._add(row, [token], [False]) for row, token in enumerate(tokens)]
            self._drop_finished(None)

    def speculative(
        self, drafter: Drafter | BlockDrafter, shape: TreeShape, draw: bool = False
    ) -> Iterator[list[Chunk]]:
        """Decode with a draft; yields what each step added. draw: chains are drawn from the draft's own distribution,
        where the text is sampled, and accepted by the rule for that; else they are its most probable tokens."""
        sampling = self.sampling if draw and shape.is_chain and not self.sampling.is_greedy else None
        drafter.start(len(self.active), self.capacity)
        yield [self._read_prompt(row, drafter) for row in range(len(self.active))]
        self._drop_finished(drafter)
        while self.active:
            root_B = torch.tensor([self.answers[i].tokens[-1] for i in self.active], device=self.target.device)
            tree = drafter.propose(root_B, shape, sampling, self.generator)
            logits_BQV, features_BQG = self.target.verify(self.cache, tree)
            if self.sampling.is_greedy:
                verdict = accept_greedy(tree, logits_BQV)
                self._settle_near_ties(verdict, logits_BQV)
            else:
                verdict = accept_sampled(tree, logits_BQV, self.sampling, self.generator)
            chunks = [self._take(row, verdict, shape) for row in range(len(self.active))]
            self.cache.keep(verdict.paths)
            left = [row for row, i in enumerate(self.active) if self.answers[i].finish_reason is None]
            if left:
                self._drop_finished(drafter)
                _read_verdict(drafter, verdict, features_BQG, left)
            else:
                self.active = []
            yield chunks

    # ------------------------------------------------------------------------------------------------------------ parts

    def _read_prompt(self, row: int, drafter: Drafter | BlockDrafter | None) -> Chunk:
        answer = self.answers[self.active[row]]
        prompt_T = torch.tensor(answer.prompt, device=self.target.device)
        logits_V, features_TG = self.target.prefill(self.cache, row, prompt_T)
        token = int(self.sampling.draw(logits_V[None], self.generator))
        chunk = self._add(row, [token], [False])
        if drafter is not None and chunk.finish_reason is None:
            next_tokens_T = torch.cat([prompt_T[1:], prompt_T.new_tensor([token])])
            drafter.read_prompt(row, features_TG, next_tokens_T)
        return chunk

    def _add(self, row: int, tokens: list[int], drafted: list[bool]) -> Chunk:
        index = self.active[row]
        answer = self.answers[index]
        taken = answer.add(tokens, drafted)
        self.stats.num_tokens += taken
        return Chunk(index, tokens[:taken], drafted[:taken], answer.finish_reason)

    def _take(self, row: int, verdict: Verdict, shape: TreeShape) -> Chunk:
        """Append a row's accepted tokens (the root is in the text already) and the bonus token."""
        accepted = verdict.tokens[row][1:]
        chunk = self._add(row, [*accepted, verdict.bonus[row]], [True] * len(accepted) + [False])
        self.stats.count_pass(sum(chunk.drafted), shape.longest_path)
        return chunk

    def _drop_finished(self, drafter: Drafter | BlockDrafter | None) -> None:
        left = [row for row, i in enumerate(self.active) if self.answers[i].finish_reason is None]
        if len(left) == len(self.active):
            return
        self.active = [self.active[row] for row in left]
        if left:
            self.cache.select_rows(left)
            if drafter is not None:
                drafter.select_rows(left)

    def _settle_near_ties(self, verdict: Verdict, logits_BQV: Tensor) -> None:
        """Where a token of the path leads by rounding only, ask the target's own decoding, and cut the path there if it
        says otherwise."""
        if not self.tie_units:
            return
        for row, path in enumerate(verdict.paths):
            for place, is_near in enumerate(near_ties(logits_BQV[row, path], self.tie_units)):
                if is_near and self._differs(row, place, verdict):
                    break

    def _differs(self, row: int, place: int, verdict: Verdict) -> bool:
        """Decide the token after node `place` of a row's path; True if the path was cut there."""
        index = self.active[row]
        answer, tokens = self.answers[index], verdict.tokens[row]
        replay = self.replays.setdefault(index, ExactReplay(self.target))
        logits_V = replay.logits_after([*answer.all_tokens, *tokens[1 : place + 1]], len(answer.prompt))
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


def _within(rules: StopRules, room: int) -> StopRules:
    """The same rules, ending where the target's context does."""
    if rules.max_new_tokens <= room:
        return rules
    return StopRules(room, rules.eos_token_ids, rules.stop_strings)


def _read_verdict(drafter: Drafter | BlockDrafter, verdict: Verdict, features_BQG: Tensor, rows: list[int]) -> None:
    """Give the draft the true features of every row's accepted nodes, each with the token that follows it."""
    counts = [len(verdict.paths[row]) for row in rows]
    width = max(counts)
    places, following = [], []
    for row in rows:
        path, tokens = verdict.paths[row], verdict.tokens[row]
        padding = width - len(path)
        places.append([*path, *[0] * padding])
        following.append([*tokens[1:], verdict.bonus[row], *[0] * padding])
    device = features_BQG.device
    rows_R1 = torch.tensor(rows, device=device)[:, None]
    features_RMG = features_BQG[rows_R1, torch.tensor(places, device=device)]
    drafter.read_accepted(features_RMG, torch.tensor(following, device=device), counts)


class Meter:
    """Adds what the networks counted since it was made to a call's statistics."""

    def __init__(self, target: Target, drafter: Drafter | BlockDrafter | None) -> None:
        self.target, self.drafter = target, drafter
        self.began = self.target.clock()
        self.before = self._read()

    def _read(self) -> list[float]:
        draft = self.drafter
        counts = [self.target.num_forwards, self.target.seconds]
        if draft is not None:
            counts += [draft.num_forwards, draft.num_true_rows, draft.num_speculative_rows, draft.seconds]
        return counts

    def write(self, stats: DecodeStats) -> None:
        spent = [now - before for now, before in zip(self._read(), self.before)]
        stats.target_forwards, stats.target_seconds = int(spent[0]), spent[1]
        if self.drafter is not None:
            stats.draft_forwards, stats.draft_true_rows, stats.draft_speculative_rows = (int(x) for x in spent[2:5])
            stats.draft_seconds = spent[5]
        stats.seconds = self.target.clock() - self.began
