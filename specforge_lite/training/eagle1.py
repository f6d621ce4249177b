"""Settings of an EAGLE-1 run: those of EAGLE-3 with EAGLE's own defaults (SafeAILab/EAGLE, train/main.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from specforge_lite.core.sections import TargetSection
from specforge_lite.training.settings import DraftSection, OptimizerSection, TrainConfig, TrainingSection


class Eagle1TargetSection(TargetSection):
    """The frozen target model and where it runs."""

    aux_layer_ids: tuple[int, ...] | None = Field(
        (0,), description="EAGLE-1 reads the last hidden state only; engines capture at least one layer beside it"
    )


class Eagle1DraftSection(DraftSection):
    """The draft network: as wide as the target, with its whole vocabulary and its frozen head."""

    init: Literal["target", "random"] = Field(
        "random", description="start the layer from the target's last one, or randomly; it gained nothing when measured"
    )

    @model_validator(mode="after")
    def _no_eagle3_options(self) -> Eagle1DraftSection:
        for name in ("draft_vocab_size", "norm_output", "fc_norm"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: an EAGLE-1 draft has no such option; train with train_eagle3_online.py")
        return self


class Eagle1TrainingSection(TrainingSection):
    """How long, on what batches, with which loss. `--ttt-length` above 1 trains on its own output, as HASS does."""

    num_epochs: int | None = Field(20, ge=1, description="passes over the data; none if only --total-steps is given")
    ttt_length: int = Field(1, ge=1, le=32, description="K; EAGLE-1 trains one step")
    v_weight: float = Field(
        1.0,
        ge=0,
        description="weight of SmoothL1 between predicted and true hidden state",
        json_schema_extra={"flags": ["--v-w"]},
    )
    p_weight: float = Field(
        0.1,
        ge=0,
        description="weight of the cross-entropy through the target's head",
        json_schema_extra={"flags": ["--p-w"]},
    )
    noise: float = Field(
        0.2,
        ge=0,
        description="uniform noise on the states it reads: (u - 0.5) * noise * 512 / tokens",
        json_schema_extra={"flags": ["--std"]},
    )
    batch_size: int = Field(
        4, ge=1, description="samples per micro batch and rank", json_schema_extra={"flags": ["--bs"]}
    )
    eval_interval: int = Field(0, ge=0, description="evaluate every so many steps, and at the end; 0: see eval_epochs")
    eval_epochs: int | None = Field(1, ge=1, description="evaluate after every so many epochs")

    def loss_settings(self) -> dict[str, Any]:
        return {"v_weight": self.v_weight, "p_weight": self.p_weight, "noise": self.noise}

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, values: Any) -> Any:
        return _unless_given(values, "total_steps", {"num_epochs": None})


class Eagle1OptimizerSection(OptimizerSection):
    """AdamW and its schedule."""

    learning_rate: float = Field(3e-5, gt=0, description="peak learning rate", json_schema_extra={"flags": ["--lr"]})
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="after the warm-up")
    warmup_steps: int | None = Field(
        2000,
        ge=0,
        description="steps of linear warm-up; none with --warmup-ratio",
        json_schema_extra={"flags": ["--num-warmup-steps"]},
    )
    schedule_steps: int | None = Field(
        800_000, ge=1, description="length of the learning-rate schedule; none: that of the run"
    )
    max_grad_norm: float = Field(0.0, ge=0, description="clip the gradient's norm; 0: do not")
    max_grad_value: float = Field(
        0.5,
        ge=0,
        description="clip each element of the gradient; 0, or --max-grad-norm given: do not",
        json_schema_extra={"flags": ["--grad-clip"]},
    )

    @model_validator(mode="before")
    @classmethod
    def _choices(cls, values: Any) -> Any:
        values = _unless_given(values, "warmup_ratio", {"warmup_steps": None})
        return _unless_given(values, "max_grad_norm", {"max_grad_value": 0.0})


def _unless_given(values: Any, key: str, replaced: dict[str, Any]) -> Any:
    """Where `key` was given, other defaults become `replaced`; what was given itself stays."""
    if isinstance(values, dict) and values.get(key) is not None:
        return {**replaced, **values}
    return values


class Eagle1Config(TrainConfig):
    """Train an EAGLE-1 draft: it learns the target's next hidden state, and speaks through the target's head."""

    algorithm: ClassVar[str] = "eagle1"

    target: Eagle1TargetSection
    draft: Eagle1DraftSection = Eagle1DraftSection()
    training: Eagle1TrainingSection = Eagle1TrainingSection()
    optimizer: Eagle1OptimizerSection = Eagle1OptimizerSection()
