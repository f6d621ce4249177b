"""The planner: its formulas on numbers typed by hand, recovery of known truths, and its choice against measurements."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from specforge_lite.benchmark.configs import BASELINE, Speculation
from specforge_lite.benchmark.planner import (
    AcceptanceModel,
    CostModel,
    correction,
    fit_acceptance,
    fit_cost,
    fit_nonnegative,
    make_plan,
    rank_chances,
    tree_gain,
)
from specforge_lite.benchmark.rows import ResultFile, SpeedupRow
from specforge_lite.core.errors import DataError
from tests.training_runs import run_script

CHAIN2, CHAIN5 = Speculation(2, 1, 3), Speculation(5, 1, 6)


def row(
    speculation: Speculation,
    shares: list[float],
    seconds_per_pass: float,
    batch_size: int = 1,
    passes: int = 1000,
    draft_share: float | None = None,
    first: float = 0.0,
    benchmark: str = "x",
    speedup: float | None = None,
    kind: str | None = None,
) -> SpeedupRow:
    tokens = 101 * 10 if speculation.is_baseline else round(passes * (1 + sum(shares)))
    return SpeedupRow(
        benchmark=benchmark,
        batch_size=batch_size,
        steps=speculation.steps,
        topk=speculation.topk,
        num_draft_tokens=speculation.num_draft_tokens,
        acc_length=1 + sum(shares),
        throughput=100.0,
        completion_tokens=tokens,
        duration=1.0,
        num_prompts=10,
        num_requests=10,
        verification_passes=None if speculation.is_baseline else passes,
        acceptance_per_position=shares,
        seconds_per_pass=seconds_per_pass,
        mean_first_token_seconds=first,
        draft_share=draft_share,
        speedup=speedup,
        draft_kind=kind,
    )


# ----------------------------------------------------------------------------------------------------------- acceptance


def test_chain_by_hand() -> None:
    """1 + 0.6 + 0.6 * 0.5 + 0.6 * 0.5 * 0.4."""
    model = AcceptanceModel((0.6, 0.5, 0.4))
    assert model.tokens_per_pass(Speculation(3, 1, 4)) == pytest.approx(2.02)
    assert model.tokens_per_pass(Speculation(1, 1, 2)) == pytest.approx(1.6)
    assert model.tokens_per_pass(BASELINE) == 1.0
    with pytest.raises(DataError, match="no tree was measured"):
        model.tokens_per_pass(Speculation(2, 2, 4))


def test_rank_chances_by_hand() -> None:
    """0.5; then half of the missed 0.5; then 0.5 * 2^-0.75 of the missed 0.25."""
    assert rank_chances(0.5, 0.5, 3) == pytest.approx([0.5, 0.25, 0.25 * 0.5 * 2**-0.75])
    assert rank_chances(0.7, 0.0, 3) == [0.7, 0.0, 0.0]
    assert sum(rank_chances(0.3, 0.95, 50)) <= 1


def test_tree_by_hand() -> None:
    """a = 0.5, s = 0.5, top 2: children 0.5, 0.25; theirs 0.25, 0.125 and 0.125, 0.0625."""
    conditional = (0.5, 0.5)
    assert tree_gain(conditional, 0.5, Speculation(1, 2, 3)) == pytest.approx(0.75)
    assert tree_gain(conditional, 0.5, Speculation(2, 2, 3)) == pytest.approx(0.75)
    assert tree_gain(conditional, 0.5, Speculation(2, 2, 4)) == pytest.approx(1.0)
    assert tree_gain(conditional, 0.5, Speculation(2, 2, 7)) == pytest.approx(0.75 + 0.5625)
    chain = AcceptanceModel((0.6, 0.5, 0.4), 0.5)
    assert tree_gain(chain.conditional, 0.0, Speculation(3, 4, 4)) == pytest.approx(
        chain.tokens_per_pass(Speculation(3, 1, 4)) - 1
    )


def test_only_the_best_nodes_of_a_level_are_expanded() -> None:
    """Top 2, a = 0.5, s = 0.8, so choices 0.5 and 0.4."""
    three_levels = tree_gain((0.5, 0.5, 0.5), 0.8, Speculation(3, 2, 11))
    # Level 1: .5 .4; level 2 from both: .25 .2 .2 .16; level 3 from the best two (.25 and .2): .125 .1 .1 .08.
    assert three_levels == pytest.approx(0.9 + 0.81 + 0.405)


def test_chains_are_pooled_by_their_passes() -> None:
    """1,000 passes with 600, 300 accepted; 3,000 passes with 1,500, 900, 450: 2100/4000, 1200/2100, 450/900."""
    rows = [row(CHAIN2, [0.6, 0.3], 1), row(Speculation(3, 1, 4), [0.5, 0.3, 0.15], 1, passes=3000)]
    model = fit_acceptance(rows)
    assert model.conditional == pytest.approx((2100 / 4000, 1200 / 2100, 450 / 900))
    assert model.catch_share is None


def test_the_share_caught_by_other_choices_is_recovered() -> None:
    chain = [0.6, 0.36, 0.216, 0.1296, 0.07776]
    tree = Speculation(5, 4, 24)
    gain = tree_gain((0.6,) * 5, 0.4, tree)
    rows = [row(CHAIN5, chain, 1), row(tree, [gain, 0, 0, 0, 0], 1)]
    assert fit_acceptance(rows).catch_share == pytest.approx(0.4, abs=0.006)


def test_trees_deeper_than_the_chains_repeat_the_last_chance() -> None:
    rows = [row(CHAIN2, [0.6, 0.3], 1), row(Speculation(4, 2, 8), [0.8, 0.5, 0.3, 0.2], 1)]
    assert fit_acceptance(rows).conditional == pytest.approx((0.6, 0.5, 0.5, 0.5))


# ----------------------------------------------------------------------------------------------------------------- cost


def cost_rows(batch_size: int, split: bool) -> list[SpeedupRow]:
    """verify = 4 ms + 0.1 ms per further token + 0.5 ms for a tree; draft = 0.3 ms per step + 0.02 per extra branch."""
    rows = [row(BASELINE, [], 0.0038, batch_size, first=0.02)]
    for spec in (Speculation(1, 1, 2), CHAIN5, Speculation(3, 4, 12), Speculation(5, 2, 14), Speculation(6, 8, 40)):
        verify = 0.004 + 0.0001 * (spec.num_draft_tokens - 1) + 0.0005 * (spec.topk > 1)
        draft = 0.0003 * spec.steps + 0.00002 * spec.steps * (spec.topk - 1)
        share = draft / (verify + draft) if split else None
        rows.append(row(spec, [0.5] * spec.steps, verify + draft, batch_size, draft_share=share, first=0.025))
    return rows


def test_split_costs_are_recovered() -> None:
    cost = fit_cost(cost_rows(4, split=True), 4)
    assert cost.verify == pytest.approx((0.004, 0.0001, 0.0005))
    assert cost.draft == pytest.approx((0.0003, 0.00002))
    assert cost.seconds_per_pass(Speculation(4, 2, 9)) == pytest.approx(0.0053 + 0.0012 + 0.00008)
    assert cost.seconds_per_pass(BASELINE) == 0.0038
    assert (cost.first_token_seconds, cost.first_token_seconds_without) == pytest.approx((0.025, 0.02))
    assert cost.tokens_after_first == pytest.approx(100)


def test_joint_costs_predict_what_lies_between() -> None:
    """Servers tell no split: the run without a draft is a point of the same fit, 4 ms here. (Chains alone cannot tell
    draft from verification; three trees can.)"""
    rows = [replace(r, seconds_per_pass=0.004) if not r.steps else r for r in cost_rows(1, split=False)]
    cost = fit_cost(rows, 1)
    assert cost.seconds_per_pass(Speculation(3, 1, 4)) == pytest.approx(0.0043 + 0.0009, rel=1e-6)
    assert cost.seconds_per_pass(Speculation(4, 2, 9)) == pytest.approx(0.0053 + 0.00128, rel=1e-6)


def test_nonnegative_fit() -> None:
    """y = 2 + 3 x exactly; with a falling y the slope is held at zero; one point takes the first term."""
    terms = [np.array([1.0, x]) for x in (0.0, 1.0, 2.0)]
    assert fit_nonnegative(terms, [2, 5, 8]) == pytest.approx([2, 3])
    falling = fit_nonnegative(terms, [3, 2, 1.5])
    assert falling[1] == 0
    assert 1.5 < falling[0] < 3
    assert fit_nonnegative([np.array([1.0, 1.0])], [7.0]) == pytest.approx([7, 0])


def test_speedup_by_hand() -> None:
    """100 tokens after the first. Without: 0.1 + 100 * 0.01 = 1.1 s. With, 2 tokens per pass of 12 ms (verify 10 + 1,
    draft 1): 0.2 + 50 * 0.012 = 0.8 s."""
    cost = CostModel(1, (0.01, 0.001, 0.0), (0.001, 0.0), 0.01, 0.2, 0.1, 100.0)
    assert cost.seconds_per_pass(Speculation(1, 1, 2)) == pytest.approx(0.012)
    assert cost.speedup(Speculation(1, 1, 2), 2.0) == pytest.approx(1.1 / 0.8)
    assert cost.speedup(BASELINE, 1.0) == 1.0


# ----------------------------------------------------------------------------------------------------------------- plan


def test_the_longest_chain_wins_where_drafting_is_free_and_the_shortest_where_it_is_not() -> None:
    shares = [0.6, 0.36, 0.216, 0.1296, 0.07776]

    def best(draft_seconds: float) -> Speculation:
        rows = [row(BASELINE, [], 0.01)]
        for spec in (Speculation(1, 1, 2), CHAIN5):
            draft = draft_seconds * spec.steps
            seconds = 0.01 + draft
            rows.append(row(spec, shares[: spec.steps], seconds, draft_share=draft / seconds))
        return make_plan(rows).best(1).speculation

    assert best(0.0) == CHAIN5
    assert best(0.0025) == CHAIN2  # 1.6/12.5, 1.96/15, 2.176/17.5, 2.3056/20, 2.38/22.5 tokens per ms
    assert best(0.007) == BASELINE  # 1.6/17 is less than 1/10


def test_a_tree_of_60_nodes_does_not_pay_where_a_pass_costs_what_its_rows_cost() -> None:
    """A CPU: a pass over n rows takes 1 + 0.2 (n - 1) units and a draft step 0.1. The same tree pays where 60 rows cost
    hardly more than one."""
    tree, chain1, chain3 = Speculation(7, 10, 60), Speculation(1, 1, 2), Speculation(3, 1, 4)
    chances = [0.7, 0.5, 0.35]

    def rows(per_row: float) -> list[SpeedupRow]:
        return [
            row(BASELINE, [], 1.0),
            row(chain1, chances[:1], 1 + per_row + 0.1),
            row(chain3, chances, 1 + 3 * per_row + 0.3),
            row(tree, [0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2], 1 + 59 * per_row + 0.7),
        ]

    cpu = make_plan(rows(0.2), [chain1, chain3, tree])
    assert cpu.best(1).speculation.is_chain
    # 1 + 59 x 0.2 + 0.7 = 13.5 passes for 1 + 3.8 = 4.8 tokens
    (predicted,) = [p for p in cpu.predictions[1] if p.speculation == tree]
    assert predicted.speedup == pytest.approx(4.8 / 13.5, rel=0.02)
    verdict = cpu.verdict_on_trees(1) or ""
    assert verdict.startswith("trees do not pay: 7,10,60 yields")
    assert "a pass over 60 rows (drafting included) costs 13.5 passes without a draft: speed-up 0.36" in verdict
    gpu = make_plan(rows(0.002), [chain1, chain3, tree])
    assert gpu.best(1).speculation == tree
    assert gpu.verdict_on_trees(1) is None


def test_every_batch_size_gets_its_own_answer() -> None:
    """At batch 8 verification is no longer free: each further token costs half a pass."""
    shares = [0.6, 0.36, 0.216, 0.1296, 0.07776]
    rows = []
    for size, per_token in ((1, 0.0), (8, 0.005)):
        rows.append(row(BASELINE, [], 0.01, size))
        for spec in (Speculation(1, 1, 2), CHAIN5):
            rows.append(row(spec, shares[: spec.steps], 0.01 + per_token * spec.steps, size))
    plan = make_plan(rows)
    assert plan.best(1).speculation == CHAIN5
    assert plan.best(8).speculation == Speculation(1, 1, 2)  # 1.6/15 against 1.96/20 tokens per ms
    assert all(p.speculation.topk <= 1 for found in plan.predictions.values() for p in found)


def test_measured_values_stand_beside_the_predicted() -> None:
    rows = [row(BASELINE, [], 0.01, speedup=1.0), row(CHAIN2, [0.6, 0.36], 0.012, speedup=1.5)]
    rows.append(row(CHAIN2, [0.6, 0.36], 0.012, speedup=1.7, benchmark="y"))
    found = {p.speculation: p for p in make_plan(rows).predictions[1]}
    assert found[CHAIN2].measured_speedup == pytest.approx(1.6)
    assert found[Speculation(1, 1, 2)].measured_speedup is None


def test_a_measured_configuration_gets_its_measured_rate() -> None:
    """Costs bent so that no line fits (10, 11, 16 ms); acceptance 0.5 throughout."""
    specs = [Speculation(1, 1, 2), CHAIN2, CHAIN5]
    shares = [0.5, 0.25, 0.125, 0.0625, 0.03125]
    rows = [row(BASELINE, [], 0.010)]
    rows += [row(s, shares[: s.steps], t) for s, t in zip(specs, (0.010, 0.011, 0.016))]
    found = {p.speculation: p for p in make_plan(rows).predictions[1]}
    for speculation, seconds in zip(specs, (0.010, 0.011, 0.016)):
        tau = 1 + sum(shares[: speculation.steps])
        assert found[speculation].speedup == pytest.approx(tau / (seconds / 0.010), rel=1e-6)


def test_correction_by_hand() -> None:
    """Two measured chains ran 10% faster and 20% slower than predicted; the one asked for is as far from both."""
    acceptance, cost = AcceptanceModel((1.0,) * 4), CostModel(1, (1.0, 0.0, 0.0), (0.0, 0.0), 1.0, 0, 0, 1)
    rows = [row(Speculation(2, 1, 3), [1.0] * 2, 1 / 1.1), row(Speculation(2, 4, 12), [1.0] * 2, 1 / 0.8)]
    acceptance = replace(acceptance, conditional=(1.0, 1.0), catch_share=0.0)
    between = Speculation(2, 2, 6)  # log 2 + log 2 from either
    assert correction(between, acceptance, cost, rows) == pytest.approx((1.1 * 0.8) ** 0.5)
    assert correction(Speculation(2, 1, 3), acceptance, cost, rows) == pytest.approx(1.1)
    near, far = math.log(2), 3 * math.log(2)  # to 2,2,3 and from it to 2,4,12
    expected = (math.log(1.1) / near**2 + math.log(0.8) / far**2) / (1 / near**2 + 1 / far**2)
    assert correction(Speculation(2, 2, 3), acceptance, cost, rows) == pytest.approx(math.exp(expected))
    assert correction(BASELINE, acceptance, cost, rows) == 1.0


def test_candidates_stay_inside_what_was_measured() -> None:
    plan = make_plan(cost_rows(1, split=True))
    specs = [p.speculation for p in plan.predictions[1]]
    assert len(specs) == len(set(specs))
    assert max(s.steps for s in specs) == 6
    assert max(s.topk for s in specs) == 8
    assert max(s.num_draft_tokens for s in specs) == 40
    for spec in specs:
        spec.check()


def test_a_block_costs_one_pass_and_is_served_whole() -> None:
    """20 ms without a draft; a pass over 8 rows 26 ms, 4 of them drafting: those are 4 for any chain."""
    chain7 = Speculation(7, 1, 8)
    shares = [0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    without = row(BASELINE, [], 0.020, kind="dspark")
    one = row(chain7, shares, 0.026, draft_share=4 / 26, kind="dspark")
    plan = make_plan([without, one])
    assert [p.speculation for p in plan.predictions[1]] == [chain7, BASELINE]
    assert plan.best(1).tokens_per_pass == pytest.approx(3.9)
    assert plan.best(1).seconds_per_pass == pytest.approx(0.026)
    assert plan.costs[1].draft == pytest.approx((0.004, 0.0))
    two = row(Speculation(3, 1, 4), shares[:3], 0.024, draft_share=4 / 24, kind="dspark")
    cost = fit_cost([without, one, two], 1)
    assert cost.draft == pytest.approx((0.004, 0.0))  # EAGLE's would be 1.6 ms a step
    assert cost.seconds_per_pass(Speculation(5, 1, 6)) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(BASELINE, [], 0.01)], r"no row of a chain \(TOPK 1\)"),
        ([row(BASELINE, [], 0.01), row(Speculation(2, 2, 4), [0.6, 0.2], 0.01)], r"no row of a chain \(TOPK 1\)"),
        ([row(CHAIN2, [0.6, 0.36], 0.012)], "batch size 1: no timed row without a draft"),
    ],
)
def test_rows_that_do_not_suffice(rows: list[SpeedupRow], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_plan(rows)


def test_the_script_recommends_flags(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "r.jsonl", {})
    for item in cost_rows(4, split=True):
        results.add(item, [])
    words = ["--results", str(results.path)]
    script = partial(run_script, "scripts/plan_speculation.py", directory=tmp_path)
    done = script([*words, "--output", str(tmp_path / "plan.json"), "--candidates", "1,1,2", "5,1,6"])
    assert done.returncode == 0, done.stderr
    assert "--speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6" in done.stdout
    assert '"num_speculative_tokens": 5' in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [p["speculation"]["steps"] for p in plan["predictions"]["4"]] == [5, 1, 0]
    assert "warning" not in done.stderr
    lone = ResultFile(tmp_path / "lone.jsonl", {})
    for item in cost_rows(4, split=True)[:2]:
        lone.add(item, [])
    warned = script(["--results", str(lone.path)])
    assert warned.returncode == 0
    assert "batch size 4: one configuration with a draft was measured; costs need at least two" in warned.stderr
    wrong = script([*words, "--candidates", "3,1"])
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: candidates: '3,1': expected STEPS,TOPK,VERIFY")
