"""Training commands of the documents that people follow, spelled as they are there; only paths are replaced, and the
embedded engine is asked for (`--target-backend hf`), so that no server is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_lite.serving.process import free_port
from tests.script_runner import ROOT, run_in_process
from tests.training_runs import run_ranks, run_script

HF = ["--target-backend", "hf", "--target-dtype", "float32"]
EAGLE_NAMES = {"train/acc_0", "train/ploss_0", "train/epochacc_0", "test/epochacc_0", "train/lr", "epoch"}
DS_CONFIG = {
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "weight_decay": 0.0, "betas": [0.9, 0.95]}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 5e-5, "warmup_num_steps": 12000, "total_num_steps": 800000},
    },
    "zero_optimization": {
        "stage": 2, "allgather_partitions": True, "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "steps_per_print": 2000,
    "train_micro_batch_size_per_gpu": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chat.jsonl, fim.jsonl, ds_config.json and a draft's config.json for the shipped target."""
    root = tmp_path_factory.mktemp("compat")
    chats = [
        {
            "id": str(i),
            "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "one two three"}],
        }
        for i in range(4)
    ]
    holes = [{"prefix": "def f(x):\n    ", "middle": "return x + 1", "suffix": f"\n# {i}\n"} for i in range(4)]
    for name, rows in (("chat", chats), ("fim", holes)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    return root


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def specforge_command(target: Path, files: Path, output_dir: Path) -> list[str]:
    """SpecForge's Llama-3 page, examples/run_llama3_eagle3_sgl_online.sh."""
    return [
        "--target-model-path", str(target), "--model-path", str(target),
        "--draft-model-config", str(ROOT / "configs" / "tiny-target-eagle3.json"),
        "--train-data-path", str(files / "chat.jsonl"), "--eval-data-path", str(files / "chat.jsonl"),
        "--tp-size", "4", "--output-dir", str(output_dir), "--num-epochs", "2", "--batch-size", "1",
        "--learning-rate", "5e-5", "--draft-attention-backend", "flex_attention", "--max-length", "64",
        "--chat-template", "chatml", "--cache-dir", str(files / "cache"), "--mem-frac=0.4", "--total-steps=800000",
        "--dist-timeout=10", "--wandb-project", "llama3-8b-eagle3", "--wandb-name", "sgl-online",
        "--report-to", "wandb",
    ]  # fmt: skip


def test_specforge_sgl_online(tmp_path: Path, tiny_target: Path, files: Path) -> None:
    """In torchrun's environment; both model flags, TP 4, flex_attention, a schedule of 800,000 steps; wandb offline."""
    words = [*specforge_command(tiny_target, files, tmp_path / "run"), *HF, "--metric-names", "eagle"]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = run_script(
        "scripts/train_eagle3_sgl_online.py", [*words, "--log-interval", "1"], tmp_path, **torchrun,
        MASTER_PORT=str(free_port()), WANDB_MODE="offline", WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "--draft-attention-backend flex_attention: has no backward pass on a CPU; training with sdpa",
        "--tp-size 4: the hf engine splits a target over torchrun ranks, here 1",
        "--total-steps 800000 shapes the learning rate; the run ends after 8 steps (--num-epochs 2)",
        f"saved {tmp_path / 'run' / 'step_8'}",
    ):
        assert line in done.stdout
    assert re.search(r"epoch 1 ended at step 4: acc 0\.\d+ .*\| loss \d+\.\d+ ", done.stdout)
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run") if "learning_rate" in row]
    assert rates == pytest.approx([5e-5 * (step + 1) / 12_000 for step in range(8)])  # 1.5% of 800,000 warm up
    metrics = json.loads((tmp_path / "run" / "step_8" / "metrics.json").read_text())
    assert metrics["step"] == 8
    assert metrics.keys() >= {"loss", "accuracies", "epoch_accuracies", "eval/accuracy"}
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["command"][0] == "train_eagle3_sgl_online.py"
    assert wandb_names(tmp_path / "run") == EAGLE_NAMES


def wandb_names(run: Path) -> set[str]:
    """Those of EAGLE's metric names that stand in the offline run which `wandb sync` would take."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    return {name for name in EAGLE_NAMES if name.encode() in content}


def train_eagle3_words(target: Path, files: Path, output_dir: Path) -> list[str]:
    """MiniCPM4's TrainEAGLE3: `deepspeed main.py --deepspeed_config ds_config.json ...`."""
    return [
        "--basepath", str(target), "--trainpath", str(files / "fim.jsonl"), "--testpath", str(files / "fim.jsonl"),
        "--savedir", str(output_dir), "--data-format", "fim", "--deepspeed_config", str(files / "ds_config.json"),
        "--cache_dir", str(files / "cache"), "--max_length", "64", *HF, "--max-num-steps", "2",
    ]  # fmt: skip


def test_train_eagle3_with_python(
    tmp_path: Path, tiny_target: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_eagle3_words(tiny_target, files, tmp_path / "run")
    assert run_in_process("train_eagle3_online", [*words, "--local_rank", "-1"]) == 0
    output = capsys.readouterr().out
    assert "--cpu-offload: there is no GPU here" in output
    config = json.loads((tmp_path / "run" / "step_2" / "config.json").read_text())
    assert config["optimizer"]["schedule_steps"] == 800_000
    assert config["optimizer"]["warmup_steps"] == 12_000
    assert config["training"]["precision"] == "bf16"
    assert config["distributed"]["sharding"] == "fsdp2"


def deepspeed_rank(words: list[str]) -> None:
    """What DeepSpeed's launcher gives a process: its environment, and --local_rank at the end."""
    os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}
    sys.exit(run_in_process("train_eagle3_online", [*words, f"--local_rank={os.environ['LOCAL_RANK']}"]))


def test_train_eagle3_under_deepspeeds_launcher(tmp_path: Path, tiny_target: Path, files: Path) -> None:
    words = train_eagle3_words(tiny_target, files, tmp_path / "run")
    assert run_ranks(2, deepspeed_rank, (words,), tmp_path / "log") == [0, 0], (
        tmp_path / "log" / "rank_0.log"
    ).read_text()
    assert json.loads((tmp_path / "run" / "step_2" / "state.json").read_text())["world_size"] == 2


def write_eagle_samples(directory: Path, count: int, hidden: int) -> None:
    """As EAGLE's ge_data scripts write them."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        length = 12 + number % 5
        sample = {
            "input_ids": torch.randint(10, 4000, (length,), generator=generator),
            "hidden_state": torch.randn(length, hidden, generator=generator),
            "loss_mask": (torch.arange(length) > 4).long(),
        }
        torch.save(sample, directory / f"data_{number}.{'ckpt' if number % 2 else 'pt'}")


def test_eagle1_main(tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`accelerate launch -m eagle.train.main --tmpdir ... --cpdir ... --configpath ...`."""
    hidden = json.loads((tiny_target / "config.json").read_text())["hidden_size"]
    write_eagle_samples(tmp_path / "data" / "0", 40, hidden)
    words = [
        "--basepath", str(tiny_target), "--tmpdir", str(tmp_path / "data"), "--cpdir", str(tmp_path / "run"),
        "--lr", "3e-5", "--p_w", "0.1", "--v_w", "1.0", "--std", "0.2", "--b1", "0.9", "--b2", "0.95",
        "--num_warmup_steps", "2000", "--grad_clip", "0.5", "--save_freq", "1", "--num_workers", "2",
        "--gradient-accumulation-steps", "1", "--num-epochs", "2", "--cache-dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    assert run_in_process("train_eagle1", words) == 0
    assert (tmp_path / "run" / "step_20").is_dir()  # 38 of 40 samples, EAGLE's batches of 4, two epochs
    assert (tmp_path / "run" / "step_10").is_dir()
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/loss" in row] == [10, 20]
    assert run_in_process("train_eagle1", [*words, "--bs", "8", "--num-epochs", "3"]) == 0
    assert (tmp_path / "run" / "step_25").is_dir()  # the third epoch in batches of 8
    (tmp_path / "data" / "0" / "data_3.ckpt").write_bytes(b"not a tensor")
    from specforge_lite.core.errors import DataError

    with pytest.raises(DataError, match=r"data_3.ckpt: no sample of EAGLE's ge_data"):
        run_in_process("train_eagle1", words)


def test_a_wrong_command_under_torchrun_ends_with_the_useful_line(tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    words = ["--target-model-path", "M", "--lr", "fast", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*torchrun, str(ROOT / "scripts" / "train_eagle3_online.py"), *words],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stderr.rstrip().splitlines()
    start = lines.index("error: 2 mistakes:")
    assert lines[start + 1 :] == [
        "  --lr: Input should be a valid number, unable to parse string as a number (found 'fast')",
        "  train_data_path: required (flag --train-data-path), unless --offline-dir or --follow is given",
    ]
    assert done.stderr.count("unable to parse string") == 1
