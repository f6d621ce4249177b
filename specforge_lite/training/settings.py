"""All settings of a training run: one frozen section per concern, every key also a flag, all mistakes in one report."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from specforge_lite.core.log import info
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section

if TYPE_CHECKING:
    from specforge_lite.model.draft import DraftConfig

TORCHAO = "torchao==0.18.0"
TORCH_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
TRACKER_NAMES = ("wandb", "tensorboard", "trackio")


class DraftSection(Section):
    """The draft network."""

    draft_model_config: Path | None = Field(
        None,
        description="config.json of the draft; default: derived from the target's config",
        json_schema_extra={"flags": ["--configpath"]},
    )
    draft_kind: Literal["eagle3", "eagle1", "dspark", "dflash"] | None = Field(
        None, description="which draft is trained; decides the defaults of many flags: give it with --help"
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="overrides the draft config; default when derived: 32000 or the whole vocabulary"
    )
    init: Literal["target", "random"] = Field("target", description="start from the target's last layer, or randomly")
    norm_output: bool | None = Field(None, description="EAGLE-3.1: the state fed to the next step is the normed one")
    fc_norm: bool | None = Field(None, description="EAGLE-3.1: one RMSNorm per aux layer before fc")
    allow_vocab_mismatch: bool = Field(
        False, description="resume although the vocabulary map was built from other data or another tokenizer"
    )


class TrainingSection(Section):
    """How long, on what batches, with which loss."""

    num_epochs: int | None = Field(None, ge=1, description="passes over the data (default: 1, unless --total-steps)")
    total_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps, and length of the learning-rate schedule; with --num-epochs the smaller one ends"
        " the run; default: from --num-epochs",
        json_schema_extra={"flags": ["--max-num-steps"]},
    )
    batch_size: int = Field(
        1, ge=1, description="samples per micro batch and rank", json_schema_extra={"flags": ["--bs"]}
    )
    accumulation_steps: int = Field(
        1,
        ge=1,
        description="micro batches per optimizer step",
        json_schema_extra={"flags": ["--gradient-accumulation-steps", "--draft-accumulation-steps"]},
    )
    max_tokens_per_batch: int | None = Field(
        None, ge=8, description="pack micro batches up to this many tokens instead of counting samples"
    )
    ttt_length: int = Field(7, ge=1, le=32, description="K, steps of the training-time test")
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of step k is this to the power k")
    draft_attention_backend: Literal["auto", "eager", "sdpa", "flex_attention"] = Field(
        "auto",
        description="attention of the draft in training; auto: flex_attention on CUDA, sdpa elsewhere",
        json_schema_extra={"flags": ["--attention-backend"]},
    )
    loss: Literal["ce", "lk", "lk_alpha"] = Field(
        "ce",
        description="EAGLE-3: soft cross-entropy; lk: KL that becomes 1 - acceptance as the draft improves; lk_alpha:"
        " negative log of the acceptance",
    )
    loss_mask_alignment: Literal["ours", "eagle"] = Field(
        "ours", description="supervise by the mask of the predicted token, or as EAGLE does by that of the row"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="compute dtype, master weights are fp32 always; auto: bf16 on CUDA, fp32 on CPU; fp16 scales the"
        " loss, for GPUs without bf16",
    )
    compile: bool = Field(False, description="torch.compile what lies between the draft's matrix products")
    activation_checkpointing: bool = Field(
        False,
        description="recompute activations of a step in backward",
        json_schema_extra={"flags": ["--gradient-checkpointing"]},
    )
    deterministic: bool = Field(
        False,
        description="on CUDA: kernels that add in a fixed order, so that a resumed run gives the same bits (they are"
        " slower; without it a resume is equal within rounding; on a CPU it is exact always)",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="order of the samples, initial weights, noise")
    deepspeed_config: Path | None = Field(
        None, description="ds_config.json of an EAGLE run: its settings hold where no flag is given"
    )
    skip_budget: float = Field(
        0.001, ge=0, le=1, description="share of samples that may be skipped because the engine refused them"
    )
    nonfinite_budget: int = Field(
        10, ge=0, description="optimizer steps that may be skipped for a NaN or infinite loss or gradient"
    )
    eval_interval: int = Field(
        1000, ge=0, description="evaluate every so many steps, and at the end; 0: at the end only"
    )
    eval_epochs: int | None = Field(None, ge=1, description="also evaluate after every so many epochs")
    eval_max_samples: int | None = Field(None, ge=1, description="evaluate on the first so many samples")
    eval_chain_length: int = Field(5, ge=1, description="drafted tokens per pass in the estimated acceptance length")
    offline_dir: Path | None = Field(
        None,
        description="train from hidden states of scripts/capture_hidden_states.py instead of an engine; EAGLE-1: also"
        " from a folder of EAGLE's own samples (data_0.ckpt, ...)",
        json_schema_extra={"flags": ["--tmpdir"]},
    )
    profile_start_step: int | None = Field(None, ge=1, description="write a chrome trace from this step on")
    profile_num_steps: int = Field(3, ge=1, description="steps in the trace")

    def loss_settings(self) -> dict[str, Any]:
        """Weights of losses that only some algorithms have, as `TTTSettings` names them."""
        return {}

    @field_validator("precision", mode="before")
    @classmethod
    def _torch_names(cls, value: Any) -> Any:
        """`float16`, `bfloat16`, `float32` and `half` are understood as well."""
        return TORCH_DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


class OptimizerSection(Section):
    """AdamW and its schedule."""

    optim: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: a quarter of the optimizer's memory, needs the package torchao"
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate", json_schema_extra={"flags": ["--lr"]})
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="where cosine and linear end")
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="share of the steps (default: 0.015)")
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="steps of linear warm-up, instead of --warmup-ratio",
        json_schema_extra={"flags": ["--num-warmup-steps"]},
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, json_schema_extra={"flags": ["--b1"]})
    adam_beta2: float = Field(0.95, ge=0, lt=1, json_schema_extra={"flags": ["--b2"]})
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(
        0.5, ge=0, description="clip the gradient's norm; 0: do not", json_schema_extra={"flags": ["--grad-clip"]}
    )
    max_grad_value: float = Field(0.0, ge=0, description="clip each element of the gradient instead; 0: do not")
    schedule_steps: int | None = Field(
        None, ge=1, description="length of the learning-rate schedule, where it is not that of the run"
    )
    loss_scale: float = Field(0.0, ge=0, description="with fp16: a fixed scale of the loss; 0: find it while training")
    initial_scale_power: int = Field(16, ge=0, le=32, description="with fp16: the loss scale starts at 2 to this power")
    loss_scale_window: int = Field(1000, ge=1, description="with fp16: steps without overflow until the scale doubles")
    loss_scale_hysteresis: int = Field(
        2,
        ge=1,
        description="with fp16: overflows until the scale halves",
        json_schema_extra={"flags": ["--hysteresis"]},
    )
    min_loss_scale: float = Field(1.0, gt=0, description="with fp16: the loss scale does not fall below this")

    @field_validator("optim")
    @classmethod
    def _package_is_installed(cls, value: str) -> str:
        if value == "adamw_8bit" and find_spec("torchao") is None:
            raise ValueError(f"adamw_8bit needs torchao, which is not installed: pip install {TORCHAO}")
        return value


class CheckpointSection(Section):
    """Where the run lives and how it is continued."""

    output_dir: Path = Field(
        description="checkpoints, metrics, provenance", json_schema_extra={"flags": ["--savedir", "--cpdir"]}
    )
    resume: bool = Field(True, description="continue the newest complete checkpoint of --output-dir, if there is one")
    overwrite: bool = Field(False, description="delete the checkpoints and metrics of an earlier run first")
    save_interval: int = Field(1000, ge=0, description="save every so many steps, and at the end; 0: at the end only")
    save_epochs: int | None = Field(
        None, ge=1, description="also save after every so many epochs", json_schema_extra={"flags": ["--save-freq"]}
    )
    save_total_limit: int | None = Field(None, ge=1, description="keep only so many checkpoints")


class LoggingSection(Section):
    """What is reported where. OUTPUT_DIR/metrics.jsonl is written in any case."""

    log_interval: int = Field(10, ge=1, description="steps between two step lines; the only host synchronisation")
    log_file: Path | None = Field(None, description="every event of the run as JSON lines")
    report_to: tuple[Literal["none", "wandb", "tensorboard", "trackio"], ...] = Field(
        (), description="none, wandb, tensorboard, trackio"
    )
    metric_names: Literal["ours", "eagle"] = Field(
        "ours", description="names on trackers; eagle: train/acc_0, train/ploss_0, test/epochacc_0 as on its dashboards"
    )
    wandb_project: str = Field("specforge-lite", description="project of wandb and trackio")
    wandb_name: str | None = Field(None, description="name of the run; default: name of --output-dir")
    wandb_key: str | None = Field(None, description="refused on the command line: set WANDB_API_KEY")

    @field_validator("wandb_key")
    @classmethod
    def _key_from_environment_only(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError("keys on a command line are seen by every user of the machine; set WANDB_API_KEY instead")

    @field_validator("report_to")
    @classmethod
    def _packages_are_installed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        missing = [name for name in value if name != "none" and find_spec(name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: not installed; install with `pip install {' '.join(missing)}`")
        return value

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names to report to, without `none` and doubles."""
        return tuple(dict.fromkeys(name for name in self.report_to if name != "none"))


class DistributedSection(Section):
    """How ranks share the work; torchrun says how many there are."""

    sharding: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="ddp: every rank holds the draft; fsdp2: parameters, gradients and AdamW state are sharded"
    )
    cpu_offload: bool = Field(False, description="with fsdp2: parameters and AdamW state live in CPU memory")
    sp_size: int = Field(
        1,
        ge=1,
        description="EAGLE-3: neighbouring ranks that share each batch, every one with its part of the rows (sequence"
        " parallelism, for long samples)",
        json_schema_extra={"flags": ["--sp-ulysses-size", "--sequence-parallel-size"]},
    )
    dist_timeout: float = Field(
        20.0, gt=0, description="minutes after which ranks give up waiting for one that died or hangs"
    )

    local_rank: int | None = Field(
        None, description="as launchers such as DeepSpeed's append it; the environment's LOCAL_RANK is what counts"
    )


class TrainConfig(Section):
    """Train an EAGLE draft online: a frozen target gives hidden states, the draft learns from them."""

    algorithm: ClassVar[str] = "eagle3"

    target: TargetSection
    data: DataSection = DataSection()
    draft: DraftSection = DraftSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection
    logging: LoggingSection = LoggingSection()
    distributed: DistributedSection = DistributedSection()

    @model_validator(mode="before")
    @classmethod
    def _from_files(cls, values: Any) -> Any:
        """What EAGLE users keep in files: ds_config.json, and `length` (K) in the draft's config.json."""
        if not isinstance(values, dict):
            return values
        path = (values.get("training") or {}).get("deepspeed_config")
        draft = (values.get("draft") or {}).get("draft_model_config")
        if path is None and draft is None:
            return values
        from specforge_lite.checkpoints.compat.deepspeed import eagle_length, merge_deepspeed, read_deepspeed_config

        if path is not None:
            settings, unused = read_deepspeed_config(Path(path))
            if unused:
                info(f"{path}: no effect here: {', '.join(unused)}")
            values = merge_deepspeed(values, settings)
        steps = eagle_length(draft)
        if steps is None or cls.algorithm != "eagle3":
            return values
        return merge_deepspeed(values, {"training": {"ttt_length": steps}})

    def with_target_defaults(self) -> TrainConfig:
        """What is left open and depends on the target, for kinds that choose otherwise than the engine."""
        return self

    def draft_shape(self, draft: DraftConfig, target_config: Any) -> dict[str, Any]:
        """Fields of the draft's shape that this kind decides itself."""
        return {}

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        problems = list(_impossible_combinations(self))
        if problems:
            raise ValueError("\n  ".join(problems))
        return self


def _impossible_combinations(config: TrainConfig) -> list[str]:
    """One line per pair of settings that cannot both be meant, or that is missing."""
    data, training, optimizer = config.data, config.training, config.optimizer
    found: list[str] = []
    if config.draft.draft_kind not in (None, config.algorithm):
        found.append(f"draft_kind {config.draft.draft_kind}: this command trains {config.algorithm}")
    if training.offline_dir is None and data.train_data_path is None:
        found.append("train_data_path: required (flag --train-data-path), unless --offline-dir is given")
    if training.offline_dir is not None and data.train_data_path is not None:
        found.append("offline_dir and train_data_path: give one; the offline directory holds its own samples")
    if optimizer.warmup_steps is not None and optimizer.warmup_ratio is not None:
        found.append("warmup_steps and warmup_ratio: give one")
    if optimizer.max_grad_norm > 0 and optimizer.max_grad_value > 0:
        found.append("max_grad_norm and max_grad_value: give one, and 0 for the other")
    if optimizer.min_learning_rate > optimizer.learning_rate:
        found.append(
            f"min_learning_rate {optimizer.min_learning_rate:g} is above learning_rate {optimizer.learning_rate:g}"
        )
    if training.max_tokens_per_batch is not None and training.max_tokens_per_batch < data.max_length:
        found.append(
            f"max_tokens_per_batch {training.max_tokens_per_batch} is below max_length {data.max_length}:"
            " the longest sample would fit into no batch"
        )
    if config.algorithm == "eagle1" and training.loss != "ce":
        found.append(f"loss {training.loss}: EAGLE-1 has its own two losses (--v-weight, --p-weight); leave it at ce")
    if config.algorithm == "eagle1" and config.distributed.sp_size > 1:
        found.append(f"sp_size {config.distributed.sp_size}: EAGLE-3 only; EAGLE-1 trains with --sp-size 1")
    if config.distributed.cpu_offload and config.distributed.sharding != "fsdp2":
        found.append("cpu_offload: only with --sharding fsdp2")
    if training.offline_dir is not None and not training.offline_dir.is_dir():
        found.append(f"offline_dir {training.offline_dir}: no such directory")
    target = config.target.target_model_path
    if target.startswith(("/", "./", "../", "~")) and not Path(target).is_dir():  # a hub name is looked up later
        found.append(f"target_model_path {target}: no such directory")
    for name, path in (("train_data_path", data.train_data_path), ("eval_data_path", data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            found.append(f"{name}: no such file: {path}")
    if config.draft.draft_model_config is not None and not config.draft.draft_model_config.exists():
        found.append(f"draft_model_config: no such file: {config.draft.draft_model_config}")
    return found


def run_length(config: TrainingSection, steps_of_epochs: Callable[[int], int]) -> int:
    """Optimizer steps of the whole run. steps_of_epochs: step at which the n-th epoch ends."""
    if config.total_steps is None:
        return steps_of_epochs(config.num_epochs or 1)
    if config.num_epochs is None:
        return config.total_steps
    return min(config.total_steps, steps_of_epochs(config.num_epochs))
