"""The hf engine split over torchrun ranks: equal to one rank, whatever the others ask for and whenever they stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import random, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.types import TokenizedSample

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
rank, target = dist.get_rank(), sys.argv[1]

def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 4000, (5 + 37 * seed % 60,), generator=generator)
    return TokenizedSample(f"s{seed}", ids, torch.ones_like(ids, dtype=torch.bool))

split = HfEngine(target, dtype="float32", tp=2, wait_minutes=2)
assert dist.group.WORLD.size() == dist.get_world_size()
weight = split.decoder.layers[0].self_attn.q_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0], "the target is not split"
whole = HfEngine(target, dtype="float32")
num_calls = (7, 3, 0, 4)[rank]  # unequal: the others go on
failed = []

def work():
    try:
        rng = random.Random(rank)
        for call in range(num_calls):
            time.sleep(0.05 * rng.random())
            samples = [sample(1000 * rank + 10 * call + i) for i in range(1 + (call + rank) % 3)]
            for mine, states, expected in zip(samples, split.capture(samples), whole.capture(samples), strict=True):
                assert states.sample_id == mine.sample_id
                assert torch.equal(states.input_ids_L, mine.input_ids_L)
                torch.testing.assert_close(states.aux_LAH, expected.aux_LAH, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(states.last_LH, expected.last_LH, rtol=1e-4, atol=1e-4)
        if rank == 0:
            try:
                split.capture([TokenizedSample("long", torch.ones(2000, dtype=torch.int64), torch.ones(2000).bool())])
            except CaptureError as error:
                assert "sample long has 2000 tokens" in str(error)
            else:
                raise AssertionError("a sample that is too long was taken")
    except BaseException as error:
        failed.append(error)

thread = threading.Thread(target=work)
thread.start()
for step in range(30):  # the training thread's own collectives, meanwhile
    number = torch.tensor([step + rank])
    dist.all_reduce(number)
    assert int(number) == dist.get_world_size() * step + sum(range(dist.get_world_size()))
    time.sleep(0.01)
thread.join()
if failed:
    raise failed[0]
split.close()
split.close()
try:
    split.capture([sample(1)])
except EngineError:
    print(f"rank {rank}: {num_calls} calls equal")
dist.destroy_process_group()
"""


def test_two_groups_of_two_ranks_equal_one_rank(tmp_path: Path, tiny_target: Path) -> None:
    num_ranks = 4
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(script), str(tiny_target)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, num_calls in zip(range(num_ranks), (7, 3, 0, 4)):
        assert f"rank {rank}: {num_calls} calls equal" in done.stdout


def test_without_torchrun_it_is_a_clear_line(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tp_size 2: .* there is 1; start it with torchrun --nproc_per_node 2"):
        HfEngine(str(tiny_target), tp=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="there are 3; start it with"):
        HfEngine(str(tiny_target), tp=2)
    assert HfEngine(str(tiny_target), tp=1).device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
