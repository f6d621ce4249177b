"""An EAGLE user's ds_config.json: what each key becomes, what has no effect, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_lite.checkpoints.compat.deepspeed import translate
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import parse_config
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.settings import TrainConfig

EAGLE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.95], "weight_decay": 0.01}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 12000, "total_num_steps": 800000},
    },
    "zero_optimization": {
        "stage": 2, "allgather_partitions": True, "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.7,
    "steps_per_print": 2000,
    "train_micro_batch_size_per_gpu": 2,
    "wall_clock_breakdown": False,
    "flops_profiler": {"enabled": False, "profile_step": 1},
}  # fmt: skip


def test_every_key_that_means_something() -> None:
    settings, unused = translate(EAGLE)
    assert settings == {
        "training": {"batch_size": 2, "accumulation_steps": 4, "precision": "bf16"},
        "optimizer": {
            "max_grad_norm": 0.7, "learning_rate": 3e-5, "weight_decay": 0.01, "warmup_steps": 12000,
            "schedule_steps": 800000, "adam_beta1": 0.9, "adam_beta2": 0.95, "lr_schedule": "linear",
        },
        "distributed": {"sharding": "fsdp2", "cpu_offload": True},
    }  # fmt: skip
    assert unused == [
        "fp16.enabled", "fp16.loss_scale", "fp16.loss_scale_window", "scheduler.params.warmup_min_lr",
        "steps_per_print", "wall_clock_breakdown", "zero_optimization.allgather_partitions",
        "zero_optimization.offload_optimizer.pin_memory", "zero_optimization.overlap_comm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, {"distributed": {"sharding": "ddp"}}),
        ({"zero_optimization": {"stage": 3}}, {"distributed": {"sharding": "fsdp2"}}),
        ({"scheduler": {"type": "WarmupLR"}}, {"optimizer": {"lr_schedule": "constant"}}),
        ({"optimizer": {"params": {"lr": "auto"}}, "bf16": {"enabled": False}}, {}),
    ],
)
def test_other_forms(values: dict, settings: dict) -> None:
    assert translate(values)[0] == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"type": "Lion"}}, r"ds\.json: optimizer\.type: 'Lion': the draft is trained with AdamW"),
        ({"scheduler": {"type": "WarmupDecay"}}, r"unknown scheduler 'WarmupDecay'; did you mean 'WarmupDecayLR'"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage: expected a ZeRO stage 0\.\.3, found 4"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, r"optimizer\.params\.betas: not enough values"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(values, "ds.json")


def parse(kind: type, tmp_path: Path, *words: str):
    (tmp_path / "ds.json").write_text(json.dumps(EAGLE))
    (tmp_path / "train.jsonl").touch()
    return parse_config(
        kind,
        ["--basepath", "m", "--savedir", "o", "--trainpath", str(tmp_path / "train.jsonl"),
         "--deepspeed_config", str(tmp_path / "ds.json"), *words],
    )  # fmt: skip


def test_flags_win_and_what_has_no_effect_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = parse(TrainConfig, tmp_path, "--learning-rate", "1e-4", "--warmup-ratio", "0.1", "--batch-size", "8")
    assert (config.optimizer.learning_rate, config.training.batch_size) == (1e-4, 8)
    assert (config.optimizer.warmup_ratio, config.optimizer.warmup_steps) == (0.1, None)
    assert (config.training.accumulation_steps, config.distributed.sharding) == (4, "fsdp2")
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect here" in line]
    assert len(lines) == 1
    assert "fp16.loss_scale, " in lines[0]


def test_eagle1_clips_as_the_file_says(tmp_path: Path) -> None:
    config = parse(Eagle1Config, tmp_path)
    assert (config.optimizer.max_grad_norm, config.optimizer.max_grad_value) == (0.7, 0.0)
    assert config.optimizer.warmup_steps == 12000


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed_config .*absent\.json: No such file"):
        parse(TrainConfig, tmp_path, "--deepspeed-config", str(tmp_path / "absent.json"))


def test_length_in_an_eagle_heads_config_is_the_number_of_steps(tmp_path: Path) -> None:
    head = tmp_path / "config.json"
    head.write_text(json.dumps({"length": 5, "draft_vocab_size": 32000}))
    words = ["--draft-model-config", str(head)]
    assert parse(TrainConfig, tmp_path, *words).training.ttt_length == 5
    assert parse(TrainConfig, tmp_path, *words, "--ttt-length", "3").training.ttt_length == 3
    assert parse(Eagle1Config, tmp_path, *words).training.ttt_length == 1
