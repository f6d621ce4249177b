"""`B,STEPS,TOPK,VERIFY`: batch size, draft steps, candidates per step, tokens verified at once (SGLang's terms)."""

from __future__ import annotations

from dataclasses import dataclass

from specforge_lite.core.errors import ConfigError


@dataclass(frozen=True, order=True)
class Speculation:
    """How far and how wide a draft looks ahead. steps 0: no draft.

    `num_draft_tokens` counts the root, as SGLang does: a chain of S steps verifies S + 1 tokens.
    """

    steps: int
    topk: int
    num_draft_tokens: int

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
    """An entry of `--config-list`."""

    batch_size: int
    speculation: Speculation

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


def check_backend(configs: list[BenchConfig], backend: str) -> None:
    """Refuse at once what a backend cannot run: vLLM drafts chains only. Raises ConfigError."""
    trees = [str(config) for config in configs if not config.speculation.is_baseline and config.speculation.topk > 1]
    if backend == "vllm" and trees:
        raise ConfigError(
            f"config_list: {' '.join(trees)}: vllm drafts chains only (TOPK 1, VERIFY STEPS + 1);"
            " use --backend sglang or hf for trees"
        )


def plan(configs: list[BenchConfig]) -> list[tuple[Speculation, list[int]]]:
    """(speculation, batch sizes) in the order to run them: each engine start serves all batch sizes of a speculation,
    and the baseline of every batch size comes first, asked for or not."""
    sizes = sorted({config.batch_size for config in configs})
    plans: dict[Speculation, list[int]] = {BASELINE: sizes}
    for config in configs:
        known = plans.setdefault(config.speculation, [])
        if config.batch_size not in known:
            known.append(config.batch_size)
    return [(speculation, sorted(batch_sizes)) for speculation, batch_sizes in plans.items()]
