"""`B,STEPS,TOPK,VERIFY`: batch size, draft steps, candidates per step, tokens verified at once (SGLang's terms); and at
which temperature, with which way of drafting.

    plan(spread([BenchConfig.parse("8,3,1,4")], temperatures=[0, 0.7], modes=("greedy", "sampled")))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from specforge_lite.core.errors import ConfigError


@dataclass(frozen=True, order=True)
class Speculation:
    """How far and how wide a draft looks ahead. steps 0: no draft.

    `num_draft_tokens` counts the root, as SGLang does: a chain of S steps verifies S + 1 tokens. draft_sampling: above
    temperature 0, whether its tokens are the draft's most probable ones (`greedy`) or drawn from it (`sampled`).
    """

    steps: int
    topk: int
    num_draft_tokens: int
    draft_sampling: str = "greedy"

    @property
    def is_baseline(self) -> bool:
        return self.steps == 0

    @property
    def is_chain(self) -> bool:
        return self.topk == 1

    def __str__(self) -> str:
        return f"{self.steps},{self.topk},{self.num_draft_tokens}"

    def check(self) -> None:
        """Raise ConfigError, with the arithmetic, for a combination that no engine can run."""
        steps, topk, verified = self.steps, self.topk, self.num_draft_tokens
        if self.is_baseline:
            return
        if min(steps, topk, verified) < 1:
            raise ConfigError(f"{self}: STEPS, TOPK and VERIFY must be positive (STEPS 0: no draft)")
        if topk == 1 and verified != steps + 1:
            raise ConfigError(f"{self}: a chain (TOPK 1) verifies STEPS + 1 = {steps + 1} tokens, VERIFY is {verified}")
        largest = 1 + topk + (steps - 1) * topk * topk
        if not 2 <= verified <= largest:
            raise ConfigError(
                f"{self}: VERIFY {verified}; {steps} steps of top-{topk} draft 1 + {topk} + {steps - 1} x {topk}^2"
                f" = {largest} tokens, expected 2..{largest}"
            )


BASELINE = Speculation(0, 0, 0)


@dataclass(frozen=True, order=True)
class BenchConfig:
    """An entry of `--config-list`, at a temperature."""

    batch_size: int
    speculation: Speculation
    temperature: float = 0.0

    @classmethod
    def parse(cls, text: str) -> BenchConfig:
        """`4,7,10,60`; with STEPS 0 the other two do not matter. Raises ConfigError."""
        try:
            batch_size, steps, topk, verified = (int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(
                f"config_list: '{text}': expected B,STEPS,TOPK,VERIFY, four numbers such as 4,3,1,4"
            ) from None
        if batch_size < 1 or steps < 0:
            raise ConfigError(f"config_list: '{text}': expected B at least 1 and STEPS at least 0")
        speculation = BASELINE if steps == 0 else Speculation(steps, topk, verified)
        try:
            speculation.check()
        except ConfigError as error:
            raise ConfigError(f"config_list: '{text}': {error}") from None
        return cls(batch_size, speculation)

    def __str__(self) -> str:
        return f"{self.batch_size},{self.speculation}"


def spread(
    configs: Iterable[BenchConfig], temperatures: Sequence[float], modes: Sequence[str] = ("greedy",)
) -> list[BenchConfig]:
    """Each config at each temperature; above 0 chains are drafted in each of `modes`."""
    found: list[BenchConfig] = []
    for config in configs:
        for temperature in temperatures:
            spec = config.speculation
            choice = modes if temperature and spec.is_chain else ("greedy",)
            found += [BenchConfig(config.batch_size, replace(spec, draft_sampling=m), temperature) for m in choice]
    return found


def plan(configs: Sequence[BenchConfig]) -> list[tuple[Speculation, list[BenchConfig]]]:
    """(speculation, its configs) in the order to run them: each engine start serves all batch sizes and temperatures of
    a speculation, and their baselines come first, asked for or not."""
    plans: dict[Speculation, set[BenchConfig]] = {BASELINE: {replace(c, speculation=BASELINE) for c in configs}}
    for config in configs:
        plans.setdefault(config.speculation, set()).add(config)
    return [(speculation, sorted(found)) for speculation, found in plans.items()]
