"""The hf engine split over torchrun ranks: equal to one rank, whatever the others ask for and whenever they stop."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from specforge_lite.capture.hf import HfEngine
from specforge_lite.core.errors import CaptureError, ConfigError, EngineError
from specforge_lite.types import TokenizedSample
from tests.training_runs import start_ranks, wait

NUM_CALLS = (7, 3, 0, 4)  # unequal: the others go on


def sample(seed: int) -> TokenizedSample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 4000, (5 + 37 * seed % 60,), generator=generator)
    return TokenizedSample(f"s{seed}", ids, torch.ones_like(ids, dtype=torch.bool))


def compare(target: Path) -> None:
    """Of each rank: its own samples through the split engine and a whole one, beside collectives of the main thread."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    split = HfEngine(str(target), dtype="float32", tp=2, wait_minutes=2)
    assert dist.group.WORLD.size() == dist.get_world_size()
    weight = split.decoder.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0], "the target is not split"
    whole = HfEngine(str(target), dtype="float32")
    num_calls = NUM_CALLS[rank]
    failed: list[BaseException] = []

    def work() -> None:
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
                ids = torch.ones(2000, dtype=torch.int64)
                with pytest.raises(CaptureError, match="sample long has 2000 tokens"):
                    split.capture([TokenizedSample("long", ids, ids.bool())])
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
    with pytest.raises(EngineError):
        split.capture([sample(1)])
    print(f"rank {rank}: {num_calls} calls equal", flush=True)
    dist.destroy_process_group()


def test_two_groups_of_two_ranks_equal_one_rank(tmp_path: Path, tiny_target: Path) -> None:
    codes = wait(start_ranks(len(NUM_CALLS), compare, (tiny_target,), tmp_path), 240)
    logs = [(tmp_path / f"rank_{rank}.log").read_text() for rank in range(len(NUM_CALLS))]
    assert codes == [0, 0, 0, 0], logs
    for rank, num_calls in enumerate(NUM_CALLS):
        assert f"rank {rank}: {num_calls} calls equal" in logs[rank]


def test_without_torchrun_it_is_a_clear_line(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tp_size 2: .* there is 1; start it with torchrun --nproc_per_node 2"):
        HfEngine(str(tiny_target), tp=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="there are 3; start it with"):
        HfEngine(str(tiny_target), tp=2)
    assert HfEngine(str(tiny_target), tp=1).device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
