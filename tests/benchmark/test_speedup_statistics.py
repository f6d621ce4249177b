"""Every figure of the speed-up benchmark from numbers typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_lite.benchmark.configs import BASELINE, BenchConfig, Speculation, plan, spread
from specforge_lite.benchmark.rows import ResultFile, RowKey, SpeedupRow, fingerprint, make_row, read_rows
from specforge_lite.benchmark.statistics import (
    Agreement,
    Counters,
    Measurement,
    Record,
    acceptance_length,
    agreement,
    bootstrap_ratio,
    quantile,
    share_per_position,
)
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.report import speedup


def record(
    prompt: int,
    tokens: int,
    passes: int | None,
    accepted_at: tuple[int, ...] = (),
    first: float = 0.1,
    seconds: float = 1.1,
    category: str = "all",
    turn: int = 0,
    start_token: int = 0,
) -> Record:
    ids = tuple(range(start_token, start_token + tokens))
    asked = {"prompt": prompt, "turn": turn, "category": category, "num_prompt_tokens": 5}
    return Record(ids, passes, accepted_at, first, seconds, **asked)


# 11 tokens in 4 passes (3, 2 and 1 passes accepted one, two, three drafted tokens: 1 + 4 + 6 = 11),
# 6 tokens in 4 passes (1 pass accepted one: 1 + 4 + 1 = 6).
DRAFTED = [
    record(0, 11, 4, (3, 2, 1), first=0.2, seconds=1.2, category="math"),
    record(1, 6, 4, (1,), first=0.4, seconds=2.4, category="code"),
]
PLAIN = [
    record(0, 11, None, first=0.2, seconds=2.2, category="math"),
    record(1, 6, None, first=0.4, seconds=2.9, category="code"),
]
CONFIG = BenchConfig(2, Speculation(3, 1, 4))
KEY, BASE_KEY = RowKey("x", 2, CONFIG), RowKey("x", 2, BenchConfig(2, BASELINE))


def rows_of(drafted: Measurement):
    base = make_row(BASE_KEY, Measurement(PLAIN, 3.4, Counters(), 0), {})
    return base, make_row(KEY, drafted, {}, (base, PLAIN))


def test_a_row_by_hand() -> None:
    base, row = rows_of(Measurement(DRAFTED, 1.7, Counters(draft_share=0.25), 0))
    assert row.acc_length == 17 / 8
    assert row.throughput == pytest.approx(17 / 1.7)
    assert base.throughput == pytest.approx(17 / 3.4)
    assert row.speedup == pytest.approx(2.0)
    assert row.verification_passes == 8
    assert row.acceptance_per_position == [4 / 8, 2 / 8, 1 / 8]
    # Seconds per token after the first: 1.0 / 10 and 2.0 / 5.
    assert row.latency_per_token_ms == pytest.approx(1000 * (0.1 + 0.4) / 2)
    assert row.latency_per_token_p95_ms == pytest.approx(1000 * (0.1 + 0.95 * 0.3))
    assert row.time_to_first_token_ms == pytest.approx(300)
    assert row.time_to_first_token_p95_ms == pytest.approx(1000 * (0.2 + 0.95 * 0.2))
    assert row.seconds_per_pass == pytest.approx((1.0 + 2.0) / 8)
    assert base.seconds_per_pass == pytest.approx((2.0 + 2.5) / 15)
    assert row.draft_share == 0.25
    assert row.identical_share == 1.0
    assert (base.speedup, base.acc_length, base.verification_passes) == (1.0, 1.0, None)
    assert row.per_category["math"] == {
        "acc_length": 11 / 4, "acc_length_interval": None,
        "completion_tokens": 11, "num_requests": 1, "latency_per_token_ms": pytest.approx(100),
    }  # fmt: skip
    assert row.per_category["code"]["acc_length"] == 6 / 4
    assert (row.completion_tokens, row.num_requests, row.num_prompts, row.batch_size) == (17, 2, 2, 2)


def test_an_engine_s_own_count_wins_over_requests_that_do_not_add_up() -> None:
    """vLLM may join two steps in one chunk: 8 passes counted over requests, 9 by the server."""
    counters = Counters(9, (5, 2, 1))
    _, row = rows_of(Measurement(DRAFTED, 1.7, counters, 0))
    assert row.acc_length == 17 / 9
    assert row.acceptance_per_position == [5 / 9, 2 / 9, 1 / 9]
    assert row.acc_length_interval is None
    assert row.per_category["math"]["acc_length"] is None
    _, agreeing = rows_of(Measurement(DRAFTED, 1.7, Counters(8, (4, 2, 1)), 0))
    assert agreeing.acceptance_per_position == [4 / 8, 2 / 8, 1 / 8]
    assert agreeing.per_category["math"]["acc_length"] == 11 / 4


def test_categories_have_intervals_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Two prompts of one category: 11 tokens in 4 passes, and 6 in 4: resampling them gives from 6/4 to 11/4."""
    records = [*DRAFTED, replace(DRAFTED[1], prompt=2, category="math")]
    row = make_row(KEY, Measurement(records, 1.7, Counters(), 0), {})
    math = row.per_category["math"]
    assert math["acc_length"] == 17 / 8
    assert math["acc_length_interval"] == (6 / 4, 11 / 4)
    assert row.per_category["code"]["acc_length_interval"] is None  # one prompt
    speedup.print_speedup([row.to_dict()])
    table = capsys.readouterr().out.split("per category")[1]
    assert "2.12 [1.50, 2.75]" in table
    assert "code" in table


def test_sampled_outputs_are_not_compared() -> None:
    warm = replace(KEY, config=replace(CONFIG, temperature=0.5))
    base = make_row(warm.baseline, Measurement(PLAIN, 3.4, Counters(), 0), {})
    row = make_row(warm, Measurement(DRAFTED, 1.7, Counters(), 0), {}, (base, PLAIN))
    assert row.identical_share is None
    assert "not compared" in exactness([base, row], "bfloat16")
    assert row.speedup == pytest.approx(2.0)


def test_small_statistics() -> None:
    assert acceptance_length(DRAFTED) == 17 / 8
    assert acceptance_length(PLAIN) is None
    assert share_per_position([(3, 2, 1), (1,)], 8) == [0.5, 0.25, 0.125]
    assert share_per_position([], 0) == []
    assert quantile([4.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 1.0], 0.95) == pytest.approx(3.85)
    assert quantile([], 0.5) is None
    assert record(0, 1, 0).latency_per_token is None
    joined = replace(record(0, 11, 5), num_first_tokens=6)  # six tokens in the first chunk, five in the second after
    assert joined.latency_per_token == pytest.approx(1.0 / 5)
    assert replace(joined, num_first_tokens=11).latency_per_token is None


def test_cost_of_a_pass_is_not_fooled_by_tokens_that_came_together() -> None:
    """As DRAFTED, but the client slept through half of one answer and all of another: 5 tokens after 6 took 0.5 s, so
    all 10 after the first would have taken 1.0 s; the one that came at once tells nothing, its passes cost as much."""
    slept = [
        replace(DRAFTED[0], num_first_tokens=6, first_token_seconds=0.7),
        DRAFTED[1],
        record(2, 9, 2, (2, 2, 2), first=1.0, seconds=1.0),
    ]
    slept[2] = replace(slept[2], num_first_tokens=9)
    row = make_row(KEY, Measurement(slept, 1.7, Counters(), 0), {})
    assert row.seconds_per_pass == pytest.approx((1.0 + 2.0) / 15 * 23 / 10)
    assert row.latency_per_token_ms == pytest.approx(1000 * (0.1 + 0.4) / 2)


def exactness(rows: Sequence[SpeedupRow], dtype: str) -> str:
    return speedup.exactness([row.to_dict() for row in rows], dtype)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpy_s(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_answers_agree_where_every_turn_does() -> None:
    base = [record(0, 3, 1), record(0, 4, 1, turn=1), record(1, 3, 1)]
    same_first_turn_only = [record(0, 3, 1), record(0, 4, 1, turn=1, start_token=9)]
    assert agreement([*same_first_turn_only, record(1, 3, 1)], base) == Agreement(2, 1, 3.0)
    longer = [record(0, 3, 1), record(0, 6, 1, turn=1), record(1, 3, 1)]
    assert agreement(longer, base) == Agreement(2, 1, 7.0)
    assert agreement(base, base) == Agreement(2, 2, None)
    assert agreement([record(5, 3, 1)], base) is None


def test_the_footer_says_when_output_is_identical_and_counts() -> None:
    base, row = rows_of(Measurement(DRAFTED, 1.7, Counters(), 0))
    assert (row.num_differing, row.tokens_before_difference) == (0, None)
    assert "in float32 that is all of them: so it is here" in exactness([base, row], "float32")
    other = [replace(DRAFTED[0], token_ids=(0, 1, 2, 77)), DRAFTED[1]]
    differing = make_row(KEY, Measurement(other, 1.7, Counters(), 0), {}, (base, PLAIN))
    assert (differing.identical_share, differing.num_differing, differing.tokens_before_difference) == (0.5, 1, 3.0)
    assert "yet 1 of 2 differ here, a fault to report" in exactness([base, differing], "float32")
    wide = replace(BASE_KEY, config=BenchConfig(4, BASELINE))
    batched = make_row(wide, Measurement(other, 3, Counters(), 0), {}, (base, PLAIN))
    text = exactness([base, batched, row, differing], "bfloat16")
    assert "in bfloat16 up to near ties" in text
    assert "1 of 4 differ here, the first difference after 3 to 3 tokens" in text
    assert "without a draft, 1 of 2 differ by batch size alone" in text


# ------------------------------------------------------------------------------------------------------------ intervals


def test_interval_of_equal_prompts_is_a_point() -> None:
    tokens, passes = np.full(10, 20.0), np.full(10, 8.0)
    assert bootstrap_ratio([tokens], [passes]) == (2.5, 2.5)
    assert bootstrap_ratio([tokens[:1]], [passes[:1]]) is None


def test_interval_of_two_prompts_by_enumeration() -> None:
    """Two prompts, 4/2 and 10/2: resamples are 2 (1/4), 3.5 (1/2) and 5 (1/4), so the 95% interval is 2..5."""
    assert bootstrap_ratio([np.array([4.0, 10.0])], [np.array([2.0, 2.0])]) == (2.0, 5.0)


def test_interval_covers_as_often_as_it_says() -> None:
    """200 samples of 40 prompts with a known ratio of means: about 95% of the intervals hold it."""
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        passes = rng.integers(5, 30, 40).astype(float)
        tokens = passes * rng.uniform(1.5, 3.5, 40)  # ratio of expectations 2.5
        low, high = bootstrap_ratio([tokens], [passes], seed) or (0, 0)
        hits += low <= 2.5 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_paired_interval_ignores_what_both_sides_share() -> None:
    """Prompts differ in length tenfold, the gain of each is exactly 2: the speed-up's interval is a point."""
    tokens = np.array([10.0, 100.0, 30.0, 70.0])
    fast, slow = tokens * 0.01, tokens * 0.02
    low, high = bootstrap_ratio([tokens, slow], [fast, tokens]) or (0, 0)
    assert (low, high) == (pytest.approx(2.0), pytest.approx(2.0))
    lone = bootstrap_ratio([tokens], [np.ones(4)]) or (0, 0)
    assert lone[1] / lone[0] > 1.5


def test_throughput_interval_is_around_the_measured_value() -> None:
    _, row = rows_of(Measurement(DRAFTED, 1.7, Counters(), 0))
    # In flight: 11 tokens in 1.2 s and 6 in 2.4 s; both scaled by measured 10 over pooled 17 / 3.6.
    factor = 10 / (17 / 3.6)
    assert row.throughput_interval == pytest.approx((6 / 2.4 * factor, 11 / 1.2 * factor))
    assert row.acc_length_interval == (1.5, 2.75)


# -------------------------------------------------------------------------------------------------------------- configs


def test_configs_are_parsed() -> None:
    assert BenchConfig.parse("4,7,10,60") == BenchConfig(4, Speculation(7, 10, 60))
    assert BenchConfig.parse("4,0,0,0") == BenchConfig(4, BASELINE) == BenchConfig.parse("4,0,1,9")
    assert str(BenchConfig.parse("4,3,1,4")) == "4,3,1,4"
    assert BenchConfig.parse("1,1,3,4").speculation.num_draft_tokens == 4  # 1 + 3 nodes
    assert BenchConfig.parse("1,2,3,13").speculation.num_draft_tokens == 13  # 1 + 3 + 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,3,1", "expected B,STEPS,TOPK,VERIFY, four numbers"),
        ("4,a,1,4", "expected B,STEPS,TOPK,VERIFY, four numbers"),
        ("0,3,1,4", "expected B at least 1"),
        ("4,-1,1,4", "STEPS at least 0"),
        ("4,3,0,4", "must be positive"),
        ("4,3,1,5", r"a chain \(TOPK 1\) verifies STEPS \+ 1 = 4 tokens, VERIFY is 5"),
        ("4,2,3,14", r"1 \+ 3 \+ 1 x 3\^2 = 13 tokens, expected 2..13"),
    ],
)
def test_impossible_configs_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchConfig.parse(text)


def test_plan_starts_each_way_once_and_the_baseline_first() -> None:
    configs = [BenchConfig.parse(t) for t in ("4,3,1,4", "1,7,10,60", "1,3,1,4", "4,3,1,4", "2,0,0,0")]
    found = [(way, [config.batch_size for config in same]) for way, same in plan(configs)]
    assert found == [(BASELINE, [1, 2, 4]), (Speculation(3, 1, 4), [1, 4]), (Speculation(7, 10, 60), [1])]


def test_sampled_drafting_is_a_start_of_its_own_and_only_of_chains_above_temperature_0() -> None:
    chain, tree = BenchConfig.parse("4,3,1,4"), BenchConfig.parse("4,7,10,60")
    found = plan(spread([chain, tree], [0.7, 0.0], ("greedy", "sampled")))
    sampled = replace(chain.speculation, draft_sampling="sampled")
    assert [(way, [config.temperature for config in same]) for way, same in found] == [
        (BASELINE, [0.0, 0.7]), (chain.speculation, [0.0, 0.7]), (sampled, [0.7]), (tree.speculation, [0.0, 0.7]),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- files


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    base, row = rows_of(Measurement(DRAFTED, 1.7, Counters(), 0))
    results = ResultFile(path, {})
    results.add(base, PLAIN)
    results.add(row, DRAFTED)
    again = ResultFile(path, {})
    found = again.find(KEY)
    assert found is not None
    assert json.loads(json.dumps(found.to_dict())) == json.loads(json.dumps(row.to_dict()))
    assert again.records(KEY) == DRAFTED
    assert again.find(RowKey("x", 3, CONFIG)) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "r_answers"]
    wanted = {"batch_size", "steps", "topk", "num_draft_tokens", "acc_length", "throughput", "speedup",
              "completion_tokens", "duration", "benchmark"}  # fmt: skip
    assert wanted <= json.loads(path.read_text().splitlines()[1]).keys()


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = make_row(BASE_KEY, Measurement(PLAIN, 3.4, Counters(), 0), {"seed": 0, "dtype": "a"})
    ResultFile(path, {"seed": 0, "dtype": "a"}).add(row, PLAIN)
    with pytest.raises(ConfigError, match=r"made with seed 0, this run has 7; choose another --output"):
        ResultFile(path, {"seed": 7, "dtype": "a"})
    with pytest.raises(ConfigError, match="made with dtype 'a', this run has 'b'"):
        ResultFile(path, {"seed": 0, "dtype": "b"})


def test_foreign_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"benchmark": "x"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:1: not a row of bench_model_speedup\.py"):
        read_rows(path)


def test_missing_answers_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ResultFile(tmp_path / "r.jsonl", {}).records(KEY) is None
    assert "outputs cannot be compared" in capsys.readouterr().err


def test_a_retrained_draft_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (3 << 20))
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * ((3 << 20) - 1) + b"\1")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("org/name") == "org/name"
    assert fingerprint(None) is None
