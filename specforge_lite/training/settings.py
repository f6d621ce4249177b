"""All settings of a training run: one frozen section per concern, every key also a flag, all mistakes in one report."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, flag

if TYPE_CHECKING:
    from specforge_lite.data.store import TokenizedDataset
    from specforge_lite.model.draft import DraftConfig

TORCHAO = "torchao==0.18.0"
TORCH_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


class DraftSection(Section):
    """The draft network."""

    draft_model_config: Path | None = flag(
        None, "config.json of the draft; default: derived from the target's config", "--configpath"
    )
    draft_kind: Literal["eagle3", "eagle1", "dspark", "dflash"] | None = flag(
        None, "which draft is trained; decides the defaults of many flags: give it with --help"
    )
    draft_vocab_size: int | None = flag(
        None, "overrides the draft config; default when derived: 32000 or the whole vocabulary", ge=1
    )
    init: str = flag("target", "start from the target's last layer (target), randomly (random), or from this draft")
    init_partial: bool = flag(False, "with --init PATH: parts that do not fit start anew")
    init_kind: str | None = flag(None, "with --init PATH: the kind that the draft becomes, eagle3.1 of an eagle3 draft")
    norm_output: bool | None = flag(None, "EAGLE-3.1: the state fed to the next step is the normed one")
    fc_norm: bool | None = flag(None, "EAGLE-3.1: one RMSNorm per aux layer before fc")
    allow_vocab_mismatch: bool = flag(
        False, "resume although the vocabulary map was built from other data or another tokenizer"
    )

    @property
    def starts_from_draft(self) -> bool:
        """`--init PATH`, which `--init-kind` needs."""
        return self.init not in ("target", "random") or self.init_kind is not None


class TrainingSection(Section):
    """How long, on what batches, with which loss."""

    num_epochs: int | None = flag(None, "passes over the data (default: 1, unless --total-steps)", ge=1)
    total_steps: int | None = flag(
        None,
        "optimizer steps, and length of the learning-rate schedule; with --num-epochs the smaller one ends"
        " the run; default: from --num-epochs",
        "--max-num-steps",
        ge=1,
    )
    batch_size: int = flag(1, "samples per micro batch and rank", "--bs", ge=1)
    accumulation_steps: int = flag(
        1, "micro batches per optimizer step", "--gradient-accumulation-steps", "--draft-accumulation-steps", ge=1
    )
    max_tokens_per_batch: int | None = flag(
        None, "pack micro batches up to this many tokens instead of counting samples", ge=8
    )
    ttt_length: int = flag(7, "K, steps of the training-time test", ge=1, le=32)
    step_decay: float = flag(0.8, "weight of step k is this to the power k", gt=0, le=1)
    draft_attention_backend: Literal["auto", "eager", "sdpa", "flex_attention"] = flag(
        "auto",
        "attention of the draft in training; auto: flex_attention on CUDA, sdpa elsewhere",
        "--attention-backend",
    )
    loss: Literal["ce", "lk", "lk_alpha"] = flag(
        "ce",
        "EAGLE-3: soft cross-entropy; lk: KL that becomes 1 - acceptance as the draft improves; lk_alpha:"
        " negative log of the acceptance",
    )
    loss_mask_alignment: Literal["ours", "eagle"] = flag(
        "ours", "supervise by the mask of the predicted token, or as EAGLE does by that of the row"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto",
        "compute dtype, master weights are fp32 always; auto: bf16 on CUDA, fp32 on CPU; fp16 scales the"
        " loss, for GPUs without bf16",
    )
    compile: bool = flag(False, "torch.compile what lies between the draft's matrix products")
    activation_checkpointing: bool = flag(
        False, "recompute activations of a step in backward", "--gradient-checkpointing"
    )
    deterministic: bool = flag(
        False,
        "on CUDA: kernels that add in a fixed order, so that a resumed run gives the same bits (they are"
        " slower; without it a resume is equal within rounding; on a CPU it is exact always)",
    )
    seed: int = flag(0, "order of the samples, initial weights, noise", ge=0, lt=1 << 63)
    deepspeed_config: Path | None = flag(
        None, "ds_config.json of an EAGLE run: its settings hold where no flag is given"
    )
    skip_budget: float = flag(0.001, "share of samples that may be skipped because the engine refused them", ge=0, le=1)
    nonfinite_budget: int = flag(10, "optimizer steps that may be skipped for a NaN or infinite loss or gradient", ge=0)
    eval_interval: int = flag(1000, "evaluate every so many steps, and at the end; 0: at the end only", ge=0)
    eval_epochs: int | None = flag(None, "also evaluate after every so many epochs", ge=1)
    eval_max_samples: int | None = flag(None, "evaluate on the first so many samples", ge=1)
    eval_chain_length: int = flag(5, "drafted tokens per pass in the estimated acceptance length", ge=1)
    offline_dir: Path | None = flag(
        None,
        "train from hidden states of scripts/capture_hidden_states.py instead of an engine; EAGLE-1: also"
        " from a folder of EAGLE's own samples (data_0.ckpt, ...)",
        "--tmpdir",
    )
    follow: Path | None = flag(
        None,
        "train on the rows of this directory of specforge-lite record as they come, each once, oldest first, until"
        " --total-steps or a signal; without --total-steps at a constant learning rate",
    )
    follow_models: tuple[str, ...] = flag(
        (), "--follow: only rows recorded under these model names; default: all, other names than the target's are told"
    )
    hand_over_to: str | None = flag(
        None,
        "--follow: http://HOST:PORT of the server of this draft; after each checkpoint it is exported to"
        " OUTPUT_DIR/draft and loaded there where the engine can (SGLang), else the command to serve it is printed",
    )
    profile_start_step: int | None = flag(None, "write a chrome trace from this step on", ge=1)
    profile_num_steps: int = flag(3, "steps in the trace", ge=1)

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

    optim: Literal["adamw", "adamw_8bit"] = flag(
        "adamw", "adamw_8bit: a quarter of the optimizer's memory, needs the package torchao"
    )
    learning_rate: float = flag(1e-4, "peak learning rate", "--lr", gt=0)
    lr_schedule: Literal["cosine", "linear", "constant"] = flag("cosine", "after the warm-up")
    min_learning_rate: float = flag(0.0, "where cosine and linear end", ge=0)
    warmup_ratio: float | None = flag(None, "share of the steps (default: 0.015)", ge=0, le=1)
    warmup_steps: int | None = flag(
        None, "steps of linear warm-up, instead of --warmup-ratio", "--num-warmup-steps", ge=0
    )
    weight_decay: float = flag(0.0, "decoupled, on matrices only", ge=0)
    adam_beta1: float = flag(0.9, "", "--b1", ge=0, lt=1)
    adam_beta2: float = flag(0.95, "", "--b2", ge=0, lt=1)
    adam_eps: float = flag(1e-8, "", gt=0)
    max_grad_norm: float = flag(0.5, "clip the gradient's norm; 0: do not", "--grad-clip", ge=0)
    max_grad_value: float = flag(0.0, "clip each element of the gradient instead; 0: do not", ge=0)
    schedule_steps: int | None = flag(
        None, "length of the learning-rate schedule, where it is not that of the run", ge=1
    )
    loss_scale: float = flag(0.0, "with fp16: a fixed scale of the loss; 0: find it while training", ge=0)
    initial_scale_power: int = flag(16, "with fp16: the loss scale starts at 2 to this power", ge=0, le=32)
    loss_scale_window: int = flag(1000, "with fp16: steps without overflow until the scale doubles", ge=1)
    loss_scale_hysteresis: int = flag(2, "with fp16: overflows until the scale halves", "--hysteresis", ge=1)
    min_loss_scale: float = flag(1.0, "with fp16: the loss scale does not fall below this", gt=0)

    @field_validator("optim")
    @classmethod
    def _package_is_installed(cls, value: str) -> str:
        if value == "adamw_8bit" and find_spec("torchao") is None:
            raise ValueError(f"adamw_8bit needs torchao, which is not installed: pip install {TORCHAO}")
        return value


class CheckpointSection(Section):
    """Where the run lives and how it is continued."""

    output_dir: Path = flag(..., "checkpoints, metrics, provenance", "--savedir", "--cpdir")
    resume: bool = flag(True, "continue the newest complete checkpoint of --output-dir, if there is one")
    overwrite: bool = flag(False, "delete the checkpoints and metrics of an earlier run first")
    save_interval: int = flag(1000, "save every so many steps, and at the end; 0: at the end only", ge=0)
    save_epochs: int | None = flag(None, "also save after every so many epochs", "--save-freq", ge=1)
    save_total_limit: int | None = flag(None, "keep only so many checkpoints", ge=1)


class LoggingSection(Section):
    """What is reported where. OUTPUT_DIR/metrics.jsonl is written in any case."""

    log_interval: int = flag(10, "steps between two step lines; the only host synchronisation", ge=1)
    log_file: Path | None = flag(None, "every event of the run as JSON lines")
    report_to: tuple[Literal["none", "wandb", "tensorboard", "trackio"], ...] = flag(
        (), "none, wandb, tensorboard, trackio"
    )
    metric_names: Literal["ours", "eagle"] = flag(
        "ours", "names on trackers; eagle: train/acc_0, train/ploss_0, test/epochacc_0 as on its dashboards"
    )
    wandb_project: str = flag("specforge-lite", "project of wandb and trackio")
    wandb_name: str | None = flag(None, "name of the run; default: name of --output-dir")
    wandb_key: str | None = flag(None, "refused on the command line: set WANDB_API_KEY")

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

    sharding: Literal["ddp", "fsdp2"] = flag(
        "ddp", "ddp: every rank holds the draft; fsdp2: parameters, gradients and AdamW state are sharded"
    )
    cpu_offload: bool = flag(False, "with fsdp2: parameters and AdamW state live in CPU memory")
    sp_size: int = flag(
        1,
        "EAGLE-3: neighbouring ranks that share each batch, every one with its part of the rows (sequence"
        " parallelism, for long samples)",
        "--sp-ulysses-size",
        "--sequence-parallel-size",
        ge=1,
    )
    dist_timeout: float = flag(20.0, "minutes after which ranks give up waiting for one that died or hangs", gt=0)

    local_rank: int | None = flag(
        None, "as launchers such as DeepSpeed's append it; the environment's LOCAL_RANK is what counts"
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
        from specforge_lite.checkpoints.compat.deepspeed import with_eagle_files

        return with_eagle_files(values, path, draft if cls.algorithm == "eagle3" else None)

    def with_values(self, **sections: dict[str, Any]) -> Self:
        """A copy with other values: `with_values(training={"precision": "fp32"})`. They are not validated."""
        changed = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=changed)

    def with_target_defaults(self) -> TrainConfig:
        """What is left open and depends on the target, or on the draft that the run starts from."""
        if not self.draft.starts_from_draft:
            return self
        from specforge_lite.training.warm_start import with_source_layers

        return with_source_layers(self)

    def draft_shape(self, draft: DraftConfig, target_config: Any) -> dict[str, Any]:
        """Fields of the draft's shape that this kind decides itself."""
        return {}

    def check_dataset(self, draft: DraftConfig, dataset: TokenizedDataset) -> None:
        """Raise DataError for data that this kind cannot learn from."""

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
    if training.follow is not None:
        from specforge_lite.training.follow import wrong_with_follow

        found += wrong_with_follow(config, training.follow)
    elif training.follow_models or training.hand_over_to:
        found.append("follow_models, hand_over_to: only with --follow")
    elif training.offline_dir is None and data.train_data_path is None:
        found.append("train_data_path: required (flag --train-data-path), unless --offline-dir or --follow is given")
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


def run_length(config: TrainingSection, steps_of_epochs: Callable[[int], float]) -> float:
    """Optimizer steps of the whole run. steps_of_epochs: step at which the n-th epoch ends."""
    if config.total_steps is None:
        return steps_of_epochs(config.num_epochs or 1)
    if config.num_epochs is None:
        return config.total_steps
    return min(config.total_steps, steps_of_epochs(config.num_epochs))
