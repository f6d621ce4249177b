"""`--follow`: rows of traffic that come while the run goes on, each trained once, oldest first, whatever is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.core.sections import DataSection
from specforge_lite.data import follow
from specforge_lite.data.follow import TrafficReader
from specforge_lite.data.sampler import BatchPlan
from specforge_lite.data.tokenize import row_tokenizer
from specforge_lite.serving.process import free_port
from specforge_lite.serving.record import RecordingProxy
from specforge_lite.training import follow as training_follow
from specforge_lite.training import reporting
from specforge_lite.training.loop import run_training
from specforge_lite.training.settings import TrainConfig
from tests.serving.test_record import Upstream, stream_of, streamed
from tests.serving.test_record import run as record
from tests.training_runs import run_ranks, start_ranks

Row = dict[str, Any]


def row_of(number: int, **more: Any) -> Row:
    turns = [
        {"role": "user", "content": f"What is {number} plus {number}?"},
        {"role": "assistant", "content": f"{number} plus {number} is {2 * number}." + " That is so." * (number % 5)},
    ]
    return {"id": f"chat-{number}", "conversations": turns, "model": "tiny_target", **more}


def write(directory: Path, number: int, rows: list[Row], rest: str = "") -> None:
    """Append rows to a recorder's file, and what a crash left of another one."""
    directory.mkdir(exist_ok=True)
    with open(directory / f"traffic_{number:06d}.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + rest)


def config_of(target: Path, root: Path, name: str, **settings: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "target": {"target_model_path": str(target), "target_backend": "hf", "target_dtype": "float32"},
        "data": {"cache_dir": str(root / "cache"), "max_length": 64},
        "training": {"follow": str(root / "traffic"), "total_steps": 6, "ttt_length": 2, "batch_size": 2},
        "optimizer": {"learning_rate": 3e-3},
        "checkpoint": {"output_dir": str(root / name), "save_interval": 2},
        "logging": {"log_interval": 1},
        "distributed": {"dist_timeout": 1.0},
    }
    for section, leaves in settings.items():
        values[section] = values.get(section, {}) | leaves
    return TrainConfig.model_validate(values)


def reader_of(target: Path, directory: Path, models: tuple[str, ...] = ()) -> TrafficReader:
    rows = row_tokenizer(load_tokenizer(str(target)), DataSection(max_length=64), "chat")
    return TrafficReader(directory, rows, str(target), models)


def names(reader: TrafficReader, count: int = 1000) -> list[str]:
    return [row.tokens.sample_id for row in reader.read(count)]


def same_weights(left: Path, right: Path) -> bool:
    files = ("draft.safetensors", "optimizer.safetensors", "rng.safetensors")
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in files)


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# ------------------------------------------------------------------------------------------------------------- reading


def test_rows_come_once_in_order_over_files_that_grow(tmp_path: Path, tiny_target: Path) -> None:
    out = tmp_path / "traffic"
    out.mkdir()
    reader = reader_of(tiny_target, out)
    assert names(reader) == []
    write(out, 2, [row_of(1), row_of(2)], rest=json.dumps(row_of(3))[:30])
    assert names(reader) == ["chat-1", "chat-2"]
    assert names(reader) == []
    write(out, 2, [], rest=json.dumps(row_of(3))[30:] + "\n")  # the recorder was in the middle of a row
    write(out, 2, [row_of(1, id="again")])
    assert names(reader) == ["chat-3"]
    write(out, 2, [], rest='{"cut off by a crash')
    assert names(reader) == []
    write(out, 10, [row_of(4)])
    write(out, 1_000_000, [row_of(5)])  # not the third by its name
    assert names(reader) == ["chat-4", "chat-5"]
    assert reader.counts == {"duplicate": 1, "not-json": 1}
    assert reader.bytes_behind() == 0
    write(out, 1_000_000, [row_of(6)])
    assert reader.bytes_behind() == len(json.dumps(row_of(6))) + 1


def test_a_file_that_ends_while_it_is_read_loses_no_row(tmp_path: Path, tiny_target: Path) -> None:
    """The recorder writes a last row and begins a file between our read and our look at the directory."""
    out = tmp_path / "traffic"
    write(out, 1, [row_of(1)])
    reader = reader_of(tiny_target, out)
    assert names(reader) == ["chat-1"]
    look = reader._files

    def late() -> dict[int, Path]:
        if not (out / "traffic_000002.jsonl").exists():
            write(out, 1, [row_of(2)])
            write(out, 2, [row_of(3)])
        return look()

    reader._files = late  # type: ignore[method-assign]
    assert names(reader) == ["chat-2", "chat-3"]


def test_bad_rows_are_counted_and_the_first_is_named(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "traffic"
    no_answer = {**row_of(9), "conversations": [{"role": "user", "content": "q"}]}
    write(out, 1, [row_of(1)], rest='{"\n[]\nnull\n' + json.dumps({**row_of(2), "conversations": 7}) + "\n")
    write(out, 1, [no_answer, {**row_of(3), "model": "other/model"}, {"prefix": "a", "middle": "b", "suffix": "c"}])
    (out / "traffic_000001.jsonl").open("ab").write(b"\xff\xfe\n")
    write(out, 1, [row_of(4)])
    assert names(reader_of(tiny_target, out)) == ["chat-1", "chat-3", "chat-4"]
    reader = reader_of(tiny_target, out, ("tiny_target",))
    assert names(reader) == ["chat-1", "chat-4"]
    assert reader.counts["not-json"] == 1
    assert reader.counts["not-an-object"] == 2
    assert reader.counts["other-model"] == 1
    assert sum(reader.counts.values()) == 8
    seen = capsys.readouterr().err
    assert "traffic_000001.jsonl:2: left out (not-json)" in seen
    assert "traffic_000001.jsonl:7: recorded from 'other/model', is that the target?" in seen
    assert "left out (other-model): recorded from 'other/model'; --follow-models takes others" in seen


def test_hashes_of_duplicates_are_bounded_and_kept(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "SEEN_ROWS", 10)
    out = tmp_path / "traffic"
    write(out, 1, [row_of(n) for n in range(30)] + [row_of(25, id="late")])
    reader = reader_of(tiny_target, out)
    rows = reader.read(100)
    assert len(rows) == 30
    assert len(reader._seen) == len(reader._order) == 10
    write(out, 1, [row_of(3, id="old"), row_of(29, id="new")])
    again = reader_of(tiny_target, out)  # as a run that was killed when 28 rows were trained
    again.seek(rows[27].after, reader.seen_before(28))
    assert names(again) == ["chat-28", "chat-29", "old"]
    assert again.counts == {"duplicate": 2}


@pytest.mark.parametrize("sizes", [{"batch_size": 3, "accumulation_steps": 2}, {"max_tokens_per_batch": 150}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_depend_on_the_order_of_the_rows_alone(
    tmp_path: Path, tiny_target: Path, sizes: dict[str, int], world_size: int
) -> None:
    """Rows at once, and rows one by one; every row in one step, on one rank."""
    write(tmp_path / "all", 1, [row_of(n) for n in range(60)])
    call: Callable[[Callable[[], Any]], Any] = lambda function: function()  # noqa: E731

    def steps(directory: Path, feed: Callable[[int], None], rank: int) -> list[list[list[str]]]:
        plan = reader_of(tiny_target, directory).plan(rank=rank, world_size=world_size, **sizes)
        stream, found = plan.steps(), []
        for turn in range(70):
            feed(turn)
            plan.refill(call)
            while (step := next(stream)) is not None:
                found.append([[plan[i].sample_id for i in batch] for batch in step.micro_batches])
        assert not plan._samples
        return found

    whole = [steps(tmp_path / "all", lambda turn: None, rank) for rank in range(world_size)]
    for rank in range(world_size):
        slow = tmp_path / f"slow-{rank}"
        slow.mkdir()
        feed = lambda turn, slow=slow: write(slow, 1 + turn // 20, [row_of(turn)] if turn < 60 else [])  # noqa: E731
        assert steps(slow, feed, rank) == whole[rank]
    trained = [[ids(name) for rank in whole for batch in rank[at] for name in batch] for at in range(len(whole[0]))]
    flat = [number for step in trained for number in step]
    assert sorted(flat) == list(range(len(flat)))
    assert len(flat) > 40
    assert all(max(a) < min(b) for a, b in itertools.pairwise(trained))  # oldest first


def ids(name: str) -> int:
    return int(name.removeprefix("chat-"))


def test_memory_is_that_of_a_few_steps(tmp_path: Path, tiny_target: Path) -> None:
    write(tmp_path / "traffic", 1, [row_of(n) for n in range(500)])
    plan = reader_of(tiny_target, tmp_path / "traffic").plan(batch_size=2)
    stream, most = plan.steps(), 0
    for _ in range(200):
        plan.refill(lambda function: function())
        step = next(stream)
        assert step is not None
        most = max(most, len(plan._waiting) + len(plan._samples))
        for batch in step.micro_batches:
            assert [len(plan[i]) > 0 for i in batch] == [True, True]
    assert most <= follow.ROWS_AT_ONCE + 2 * follow.STEPS_AHEAD


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """A root with traffic in two files, and `plain`: a run over the same rows as a file, in that order."""
    root = tmp_path_factory.mktemp("follow")
    rows = [row_of(n) for n in range(12)]
    write(root / "traffic", 1, [*rows[:5], row_of(2, id="double")], rest='{"half')
    write(root / "traffic", 2, [*rows[5:], row_of(11, id="double")])
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tiny_target, root, "plain")
    config = config.with_values(training={"follow": None}, data={"train_data_path": str(root / "rows.jsonl")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchPlan, "shuffle", False)
        patch.setattr(BatchPlan, "order", lambda plan, epoch: np.arange(len(plan.lengths)))
        assert run_training(config) == 0
    return root


def test_it_equals_a_plain_run_over_the_same_rows(undisturbed: Path, tiny_target: Path) -> None:
    assert run_training(config_of(tiny_target, undisturbed, "followed")) == 0
    assert same_weights(undisturbed / "followed" / "step_6", undisturbed / "plain" / "step_6")
    state = json.loads((undisturbed / "followed" / "step_6" / "state.json").read_text())
    assert (state["data"]["file"], state["data"]["rows"]) == (2, 12)
    assert state["data"]["left_out"] == {"duplicate": 1, "not-json": 1}


def test_a_run_that_is_killed_between_rows_goes_on(undisturbed: Path, tmp_path: Path, tiny_target: Path) -> None:
    """SIGKILL after step 3 (checkpoint: 2), while the rest of the rows has not come; then SIGTERM, then the end."""
    lines = {n: (undisturbed / "traffic" / f"traffic_{n:06d}.jsonl").read_text().splitlines(True) for n in (1, 2)}
    root = tmp_path / "root"
    traffic, run = root / "traffic", root / "run"
    traffic.mkdir(parents=True)
    config = config_of(tiny_target, root, "run")

    def until(step: int, number: int) -> None:
        """Start, wait until the step is done and rows are waited for, send the signal."""
        (process,) = start_ranks(1, follow_on_ranks, (config,), root / "log")
        assert process.pid is not None
        wait_for_rows(run, step, process.pid)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)

    (traffic / "traffic_000001.jsonl").write_text("".join(lines[1]))
    (traffic / "traffic_000002.jsonl").write_text("".join(lines[2][:2]))
    until(3, signal.SIGKILL)
    assert sorted(path.name for path in run.glob("step_*")) == ["step_2"]
    (traffic / "traffic_000002.jsonl").open("a").write("".join(lines[2][2:5]))
    until(5, signal.SIGTERM)
    assert (run / "step_5" / "manifest.json").exists()  # complete, one step after the last interval
    (traffic / "traffic_000001.jsonl").unlink()  # what was trained may go
    (traffic / "traffic_000002.jsonl").open("a").write("".join(lines[2][5:]))
    assert run_ranks(1, follow_on_ranks, (config,), root / "log") == [0]
    assert same_weights(run / "step_6", undisturbed / "plain" / "step_6")


def wait_for_rows(run: Path, step: int, pid: int) -> None:
    """Until the run in this process waits for rows after a step, as its heartbeat says."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        beat = json.loads((run / "heartbeat.json").read_text()) if (run / "heartbeat.json").exists() else {}
        if beat.get("pid") == pid and beat["step"] == step and "waiting for rows" in beat["state"]:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come")


def follow_on_ranks(config: TrainConfig) -> None:
    training_follow.POLL_SECONDS = reporting.HEARTBEAT_SECONDS = 0.05
    sys.exit(run_training(config))


def test_two_ranks_agree_while_rows_come(undisturbed: Path, tmp_path: Path, tiny_target: Path) -> None:
    """Rows arrive one by one; two ranks with one row each train as one rank with two."""
    root = tmp_path / "root"
    (root / "traffic").mkdir(parents=True)
    config = config_of(tiny_target, root, "run", training={"batch_size": 1})
    rows = [json.loads(line) for line in (undisturbed / "rows.jsonl").read_text().splitlines()]

    def feed() -> None:
        for at, row in enumerate(rows):
            time.sleep(0.2)
            write(root / "traffic", 1 + at // 4, [row, row])

    thread = threading.Thread(target=feed)
    thread.start()
    codes = run_ranks(2, follow_on_ranks, (config,), root / "log")
    thread.join()
    assert codes == [0, 0], (root / "log" / "rank_0.log").read_text()
    assert losses_of(root / "run") == pytest.approx(losses_of(undisturbed / "plain"), rel=1e-4)
    state = json.loads((root / "run" / "step_6" / "state.json").read_text())
    assert state["data"]["rows"] == 12


@pytest.fixture(scope="module")
def in_pairs(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """A root with 13 rows, any two of which fill one packed row of 72 tokens, and `plain`: two rows a step."""
    root = tmp_path_factory.mktemp("packed")
    write(root / "traffic", 1, [row_of(5 * n) for n in range(2, 15)])
    assert run_training(config_of(tiny_target, root, "plain")) == 0
    return root


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_rows_and_ranks_that_share_them_train_the_same(
    in_pairs: Path, tmp_path: Path, tiny_target: Path, ranks: int
) -> None:
    """`--max-tokens-per-batch`, alone and with `--sp-size 2`: the 13th row says that the pair before it is whole."""
    config = config_of(
        tiny_target, in_pairs, f"packed-{ranks}", training={"batch_size": 1, "max_tokens_per_batch": 72},
        distributed={"sp_size": ranks},
    )  # fmt: skip
    assert run_ranks(ranks, follow_on_ranks, (config,), tmp_path / "log") == [0] * ranks
    assert losses_of(in_pairs / f"packed-{ranks}") == pytest.approx(losses_of(in_pairs / "plain"), rel=1e-5)
    state = json.loads((in_pairs / f"packed-{ranks}" / "step_6" / "state.json").read_text())
    assert state["data"]["rows"] == 12


def test_a_rank_that_asks_for_no_samples_keeps_none(tmp_path: Path, tiny_target: Path) -> None:
    write(tmp_path / "traffic", 1, [row_of(n) for n in range(8)])
    plan = reader_of(tiny_target, tmp_path / "traffic").plan(batch_size=2, captures=False)
    plan.refill(lambda function: function())
    assert plan.num_planned == 4
    assert not plan._samples


def test_a_run_without_an_end_has_a_constant_rate(tmp_path: Path, tiny_target: Path) -> None:
    write(tmp_path / "traffic", 1, [row_of(n) for n in range(4)])
    config = config_of(
        tiny_target,
        tmp_path,
        "run",
        training={"total_steps": None},
        optimizer={"warmup_steps": 1, "learning_rate": 1e-3},
    )

    def stop() -> None:
        wait_for_rows(tmp_path / "run", 2, os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_training(config) == 128 + signal.SIGTERM
    thread.join()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["learning_rate"] for line in lines if "learning_rate" in line} == {1e-3}
    summary = json.loads((tmp_path / "run" / "exit_summary.json").read_text())
    assert (summary["step"], summary["total_steps"]) == (2, None)
    assert "inf" not in (tmp_path / "run" / "metrics.jsonl").read_text().lower()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"follow": "/no/such"}}, "no such directory; start specforge-lite record"),
        ({"training": {"num_epochs": 2}}, "rows that come have no epochs"),
        ({"training": {"total_steps": None}, "optimizer": {"lr_schedule": "cosine"}}, "lr_schedule cosine: needs"),
        ({"training": {"follow": None, "follow_models": ("a",)}}, "follow_models, hand_over_to: only with --follow"),
        ({"training": {"hand_over_to": "127.0.0.1:30000"}}, "expected http://HOST:PORT"),
    ],
)
def test_settings_that_cannot_be_meant(
    tmp_path: Path, tiny_target: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "traffic").mkdir()
    with pytest.raises(ValueError, match=message):
        config_of(tiny_target, tmp_path, "run", **settings)


def test_a_vocabulary_that_cannot_be_counted_is_refused(tmp_path: Path, tiny_target: Path) -> None:
    (tmp_path / "traffic").mkdir()
    with pytest.raises(ConfigError, match=r"with --follow start from a draft that has them \(--init DRAFT\)"):
        run_training(config_of(tiny_target, tmp_path, "run", draft={"draft_vocab_size": 100}))


def test_recorded_chats_become_a_draft(tmp_path: Path, tiny_target: Path) -> None:
    """Record, follow, export."""
    rows = [row_of(n)["conversations"] for n in range(4)]
    answers = iter(stream_of({"content": turns[1]["content"]}, name=f"chat-{n}") for n, turns in enumerate(rows))

    async def client(session: aiohttp.ClientSession, proxy: RecordingProxy, _: Upstream) -> None:
        for turns in rows:
            async with session.post(proxy.url + "/v1/chat/completions", json={"messages": turns[:1]}) as reply:
                await reply.read()

    record(tmp_path / "traffic", client, lambda request: streamed(request, [next(answers)]))
    assert run_training(config_of(tiny_target, tmp_path, "run", training={"total_steps": 2})) == 0
    draft = export_checkpoint(tmp_path / "run", tmp_path / "draft")
    assert json.loads((draft / "config.json").read_text())["specforge_lite"]["step"] == 2
    assert json.loads((tmp_path / "run" / "step_2" / "state.json").read_text())["data"]["left_out"] == {}


def test_a_draft_that_no_server_takes_is_exported_and_the_command_printed(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "traffic", 1, [row_of(n) for n in range(4)])
    url = f"http://127.0.0.1:{free_port()}"
    assert run_training(config_of(tiny_target, tmp_path, "run", training={"total_steps": 2, "hand_over_to": url})) == 0
    seen = "".join(capsys.readouterr())
    assert f"step_2 is not handed over to {url}: " in seen
    assert f"--speculative-draft-model-path {tmp_path / 'run' / 'draft'}" in seen
    assert (tmp_path / "run" / "draft" / "model.safetensors").exists()
