"""What an EAGLE user's `ds_config.json` means here: its keys as settings of ours, and the keys that have no effect.

ZeRO stages 1 to 3 all become fsdp2, which shards parameters, gradients and optimizer state at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, DataError, suggest
from specforge_lite.core.files import read_json
from specforge_lite.core.log import info

Settings = dict[str, dict[str, Any]]  # section -> leaf -> value
SCHEDULES = {"WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "WarmupLR": "constant"}

# DeepSpeed key -> (section, leaf) for those that carry over as they are.
PLAIN_KEYS: dict[str, tuple[str, str]] = {
    "train_micro_batch_size_per_gpu": ("training", "batch_size"),
    "gradient_accumulation_steps": ("training", "accumulation_steps"),
    "gradient_clipping": ("optimizer", "max_grad_norm"),
    "optimizer.params.lr": ("optimizer", "learning_rate"),
    "optimizer.params.eps": ("optimizer", "adam_eps"),
    "optimizer.params.weight_decay": ("optimizer", "weight_decay"),
    "scheduler.params.warmup_num_steps": ("optimizer", "warmup_steps"),
    "scheduler.params.total_num_steps": ("optimizer", "schedule_steps"),
    "fp16.loss_scale": ("optimizer", "loss_scale"),
    "fp16.initial_scale_power": ("optimizer", "initial_scale_power"),
    "fp16.loss_scale_window": ("optimizer", "loss_scale_window"),
    "fp16.hysteresis": ("optimizer", "loss_scale_hysteresis"),
    "fp16.min_loss_scale": ("optimizer", "min_loss_scale"),
    "scheduler.params.warmup_max_lr": ("optimizer", "learning_rate"),  # after optimizer.params.lr, as in DeepSpeed
}
BETAS = "optimizer.params.betas"
# DeepSpeed key -> (section, leaf, its values and what they become, what is said of others). None: our default.
OFFLOAD = ("distributed", "cpu_offload", {"cpu": True, "none": None}, "expected cpu or none, found {value!r}")
STAGES = {0: "ddp", 1: "fsdp2", 2: "fsdp2", 3: "fsdp2"}
CHOICES: dict[str, tuple[str, str, dict[Any, Any], str]] = {
    "optimizer.type": ("", "", {"Adam": None, "AdamW": None}, "'{value}': the draft is trained with AdamW{hint}"),
    "scheduler.type": ("optimizer", "lr_schedule", SCHEDULES, "unknown scheduler '{value}'{hint}"),
    "zero_optimization.stage": ("distributed", "sharding", STAGES, "expected a ZeRO stage 0..3, found {value!r}"),
    "zero_optimization.offload_optimizer.device": OFFLOAD,
    "zero_optimization.offload_param.device": OFFLOAD,
    "fp16.enabled": ("training", "precision", {True: "fp16", False: None}, "expected true or false, found {value!r}"),
    "bf16.enabled": ("training", "precision", {True: "bf16", False: None}, "expected true or false, found {value!r}"),
}


def read_deepspeed_config(path: Path) -> tuple[Settings, list[str]]:
    """(settings, keys without effect) of a DeepSpeed config file. Raises ConfigError with file and key."""
    try:
        return translate(read_json(path), str(path))
    except DataError as error:
        raise ConfigError(f"deepspeed_config {error}") from None


def translate(values: dict[str, Any], source: str = "deepspeed_config") -> tuple[Settings, list[str]]:
    """The same for a parsed config. Keys whose value is "auto" are left to our defaults, and named."""
    leaves = _flatten(values)
    settings: Settings = {}
    used = {key for key, value in leaves.items() if value != "auto" and key in (*PLAIN_KEYS, *CHOICES, BETAS)}
    if leaves.get("fp16.enabled") is not True:  # "auto" is decided by flags of a trainer that is not ours
        used -= {key for key in PLAIN_KEYS if key.startswith("fp16.")}
    found = [(*place, leaves[key]) for key, place in PLAIN_KEYS.items() if key in used]
    for key, (section, leaf, choices, mistake) in CHOICES.items():
        if key not in used:
            continue
        value = leaves[key]
        if not isinstance(value, (str, int)) or value not in choices:
            hint = suggest(str(value), map(str, choices))
            raise ConfigError(f"{source}: {key}: {mistake.format(value=value, hint=hint)}")
        if choices[value] is not None:
            found.append((section, leaf, choices[value]))
    if BETAS in used:
        try:
            beta1, beta2 = leaves[BETAS]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{source}: {BETAS}: {error}") from None
        found += [("optimizer", "adam_beta1", beta1), ("optimizer", "adam_beta2", beta2)]
    for section, leaf, value in found:
        settings.setdefault(section, {})[leaf] = value
    if settings.get("distributed", {}).get("sharding") == "ddp":
        settings["distributed"].pop("cpu_offload", None)
    return settings, sorted(leaves.keys() - used - _switched_off(leaves))


def with_eagle_files(given: dict[str, Any], deepspeed: Any, draft_model_config: Any) -> dict[str, Any]:
    """`given` sections with what the two files of an EAGLE run say where nothing is given; None for no such file."""
    if deepspeed is not None:
        settings, unused = read_deepspeed_config(Path(deepspeed))
        if unused:
            info(f"{deepspeed}: no effect here: {', '.join(unused)}")
        given = merge_deepspeed(given, settings)
    steps = eagle_length(draft_model_config)
    return given if steps is None else merge_deepspeed(given, {"training": {"ttt_length": steps}})


def merge_deepspeed(given: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """`given` sections with what is not given taken from `settings`; a given ratio replaces a number of steps."""
    merged = dict(given)
    for section, leaves in settings.items():
        own = dict(given.get(section) or {})
        drop = {"warmup_steps"} if own.get("warmup_ratio") is not None else set()
        merged[section] = {**{k: v for k, v in leaves.items() if k not in drop}, **own}
    return merged


def eagle_length(draft_model_config: Any) -> int | None:
    """`length` of an EAGLE head's config.json, the steps it is unrolled for; None without one or without the file."""
    try:
        length = read_json(Path(draft_model_config)).get("length")
    except (TypeError, DataError):  # reported later, where the draft's shape is read
        return None
    return length if isinstance(length, int) else None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists are values."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _switched_off(leaves: dict[str, Any]) -> set[str]:
    """Keys of a section that says `enabled: false`: nobody expects an effect of them."""
    off = tuple(key.removesuffix("enabled") for key, value in leaves.items() if key.endswith(".enabled") and not value)
    return {key for key in leaves if off and key.startswith(off)}
