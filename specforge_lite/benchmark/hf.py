"""The benchmark's embedded engine: `SpeculativeModel`, B prompts as one batch.

B conversations are answered as a batch, each with its own tree; a finished row leaves the batch, and the next B start
when the last of them has ended. A server would fill the empty slot at once, so throughput at B > 1 is lower here, with
a draft and without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specforge_lite.benchmark.configs import Speculation
from specforge_lite.benchmark.measure import Ask
from specforge_lite.benchmark.statistics import Counters
from specforge_lite.inference.output import DecodeStats
from specforge_lite.inference.speculative import GenerationSettings, SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.serving.engine import Generation


@dataclass
class _Row:
    """One answer as it grows. times: seconds at which tokens came."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: str = ""


class HfSession:
    """Answers with `model`; speculation with steps 0 uses no draft."""

    batched = True

    def __init__(
        self,
        model: SpeculativeModel,
        speculation: Speculation,
        seed: int = 0,
        eos_token_ids: Sequence[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.speculation = model, speculation
        self.seed, self.clock = seed, clock
        self.eos_token_ids = eos_token_ids
        self.context_length = model.target.context_length
        self._calls = 0
        self._target_seconds = self._draft_seconds = 0.0

    def begin(self) -> None:
        """Start counting."""
        self._calls = 0
        self._target_seconds = self._draft_seconds = 0.0

    def generate(self, asks: Sequence[Ask]) -> list[Generation]:
        """Answer `asks` as one batch."""
        way = self.speculation
        shape = None if way.is_baseline else TreeShape.from_steps(way.steps, way.topk, way.num_draft_tokens)
        settings = GenerationSettings(
            max_new_tokens=max(ask.max_new_tokens for ask in asks),
            temperature=asks[0].temperature,
            eos_token_id=self.eos_token_ids,
            seed=self.seed + self._calls,
            shape=shape,
            draft_sampling=way.draft_sampling,
        )
        self._calls += 1
        rows = [_Row() for _ in asks]
        start = self.clock()
        networks = self._network_seconds()
        chunks = self.model.stream([list(ask.token_ids) for ask in asks], settings, shape is not None)
        for index, chunk in enumerate(chunks):
            if index == 0:  # every prompt has been read when the first chunk comes
                networks = self._network_seconds()
            row, num_accepted = rows[chunk.prompt_index], sum(chunk.drafted)
            if row.token_ids:  # the first tokens come from the pass over the prompt
                row.stats.count_pass(num_accepted, num_accepted)
            row.times.append(self.clock() - start)
            row.token_ids += chunk.tokens
            row.finish_reason = chunk.finish_reason or ""
        now = self._network_seconds()
        self._target_seconds += now[0] - networks[0]
        self._draft_seconds += now[1] - networks[1]
        return [
            Generation(
                tuple(row.token_ids), row.stats.verification_passes if shape is not None else None,
                tuple(row.stats.accepted_at), row.times[0], row.times[-1], row.finish_reason,
            )
            for row in rows
        ]  # fmt: skip

    def _network_seconds(self) -> tuple[float, float]:
        drafter = self.model.drafter
        return self.model.target.seconds, drafter.seconds if drafter is not None else 0.0

    def counters(self) -> Counters:
        """Share of the draft in the time of both networks while decoding (prompts left out)."""
        total = self._target_seconds + self._draft_seconds
        if self.speculation.is_baseline or not total:
            return Counters()
        return Counters(draft_share=self._draft_seconds / total)

    def close(self) -> None:
        """Nothing to stop: the model is the caller's."""
