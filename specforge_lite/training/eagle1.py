"""Settings of an EAGLE-1 run: those of EAGLE-3 with EAGLE's own defaults (SafeAILab/EAGLE, train/main.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from specforge_lite.core.sections import TargetSection
from specforge_lite.core.settings import flag
from specforge_lite.training.settings import DraftSection, OptimizerSection, TrainConfig, TrainingSection

EAGLE1_HELP = """\
Train an EAGLE-1 draft with EAGLE's own loss, noise and schedule, online or from captured hidden states.

    python scripts/train_eagle1.py --target-model-path MODEL --train-data-path train.jsonl --output-dir outputs/run
    python scripts/train_eagle1.py --target-model-path MODEL --offline-dir CAPTURED --output-dir outputs/run

`--offline-dir` is what scripts/capture_hidden_states.py writes, for EAGLE-3 drafts too. A second call with the same
--output-dir continues the run. SIGTERM and Ctrl-C finish the step, save, and exit with 143 and 130. Exit code 2:
something about the input, reported in one line.
"""


def unless_given(key: str, **replaced: Any) -> Any:
    """A validator of a section: where `key` is given, other defaults become `replaced`; what is given itself stays."""

    def choose(cls: Any, values: Any) -> Any:
        given = isinstance(values, dict) and values.get(key) is not None
        return {**replaced, **values} if given else values

    return model_validator(mode="before")(classmethod(choose))  # type: ignore[arg-type]


def refuse_eagle3_options(draft: DraftSection, kind: str, advice: str = "") -> None:
    """Raise ValueError for what only an EAGLE-3 draft has."""
    for name in ("draft_vocab_size", "norm_output", "fc_norm"):
        if getattr(draft, name) is not None:
            raise ValueError(f"{name}: {kind} draft has no such option{advice}")


class Eagle1TargetSection(TargetSection):
    """The frozen target model and where it runs."""

    aux_layer_ids: tuple[int, ...] | None = flag(
        (0,), "EAGLE-1 reads the last hidden state only; engines capture at least one layer beside it"
    )


class Eagle1DraftSection(DraftSection):
    """The draft network: as wide as the target, with its whole vocabulary and its frozen head."""

    init: str = flag(
        "random", "as the target's last layer (target; it gained nothing when measured), randomly, or from this draft"
    )

    @model_validator(mode="after")
    def _no_eagle3_options(self) -> Eagle1DraftSection:
        refuse_eagle3_options(self, "an EAGLE-1", "; train with train_eagle3_online.py")
        return self


class Eagle1TrainingSection(TrainingSection):
    """How long, on what batches, with which loss. `--ttt-length` above 1 trains on its own output, as HASS does."""

    num_epochs: int | None = flag(20, "passes over the data; none if only --total-steps is given", ge=1)
    ttt_length: int = flag(1, "K; EAGLE-1 trains one step", ge=1, le=32)
    v_weight: float = flag(1.0, "weight of SmoothL1 between predicted and true hidden state", "--v-w", ge=0)
    p_weight: float = flag(0.1, "weight of the cross-entropy through the target's head", "--p-w", ge=0)
    noise: float = flag(0.2, "uniform noise on the states it reads: (u - 0.5) * noise * 512 / tokens", "--std", ge=0)
    batch_size: int = flag(4, "samples per micro batch and rank", "--bs", ge=1)
    eval_interval: int = flag(0, "evaluate every so many steps, and at the end; 0: see eval_epochs", ge=0)
    eval_epochs: int | None = flag(1, "evaluate after every so many epochs", ge=1)

    def loss_settings(self) -> dict[str, Any]:
        return {"v_weight": self.v_weight, "p_weight": self.p_weight, "noise": self.noise}

    _steps_replace_epochs = unless_given("total_steps", num_epochs=None)


class Eagle1OptimizerSection(OptimizerSection):
    """AdamW and its schedule."""

    learning_rate: float = flag(3e-5, "peak learning rate", "--lr", gt=0)
    lr_schedule: Literal["cosine", "linear", "constant"] = flag("linear", "after the warm-up")
    warmup_steps: int | None = flag(
        2000, "steps of linear warm-up; none with --warmup-ratio", "--num-warmup-steps", ge=0
    )
    schedule_steps: int | None = flag(800_000, "length of the learning-rate schedule; none: that of the run", ge=1)
    max_grad_norm: float = flag(0.0, "clip the gradient's norm; 0: do not", ge=0)
    max_grad_value: float = flag(
        0.5, "clip each element of the gradient; 0, or --max-grad-norm given: do not", "--grad-clip", ge=0
    )

    _ratio_replaces_steps = unless_given("warmup_ratio", warmup_steps=None)
    _norm_replaces_value = unless_given("max_grad_norm", max_grad_value=0.0)


class Eagle1Config(TrainConfig):
    """Train an EAGLE-1 draft: it learns the target's next hidden state, and speaks through the target's head."""

    algorithm: ClassVar[str] = "eagle1"

    target: Eagle1TargetSection
    draft: Eagle1DraftSection = Eagle1DraftSection()
    training: Eagle1TrainingSection = Eagle1TrainingSection()
    optimizer: Eagle1OptimizerSection = Eagle1OptimizerSection()

    @model_validator(mode="after")
    def _not_for_eagle1(self) -> Eagle1Config:
        if self.training.loss != "ce":
            raise ValueError(
                f"loss {self.training.loss}: EAGLE-1 has its own two losses (--v-weight, --p-weight); leave it at ce"
            )
        if self.distributed.sp_size > 1:
            raise ValueError(f"sp_size {self.distributed.sp_size}: EAGLE-3 only; EAGLE-1 trains with --sp-size 1")
        return self
