"""Agreement of the language model with other scores, by hand."""

import numpy
import pytest

from megatron_brain.stages.intervals import bootstrap_statistic
from megatron_brain.stages.judging.summary import summarize_verdicts


def row(winner, policy, baseline):
    verdicts = {"policy": ["A", "B"], "baseline": ["B", "A"], "tie": ["tie", "tie"], None: [None, "A"]}[winner]
    pair = {"winner": winner, "verdicts": verdicts}
    return {"llm/policy_vs_baseline": pair, "reward/policy": policy, "reward/baseline": baseline}


def test_agreement_and_kappa_by_hand_over_prompts_that_both_decide():
    rows = [
        *[row("policy", 2.0, 1.0)] * 4,
        *[row("policy", 0.0, 1.0)] * 1,
        *[row("baseline", 2.0, 1.0)] * 2,
        *[row("baseline", 0.0, 1.0)] * 3,
        row("tie", 2.0, 1.0),  # The language model does not decide it.
        row(None, 2.0, 1.0),  # One of its verdicts was unparsable.
        row("policy", 1.0, 1.0),  # The reward does not decide it.
    ]
    found = summarize_verdicts(rows, bootstrap_samples=200, seed=0)
    agreement, kappa = (found[f"llm/{name}/reward/policy_vs_baseline"] for name in ("agreement", "kappa"))
    by_chance = 0.5 * 0.6 + 0.5 * 0.4
    assert agreement.value == 0.7
    assert kappa.value == pytest.approx((0.7 - by_chance) / (1 - by_chance))
    assert agreement.low < 0.7 < agreement.high and kappa.low < kappa.value < kappa.high
    assert found["win_rate/llm/policy_vs_baseline"].value == (6 + 0.5) / 12
    assert found["llm/ties/policy_vs_baseline"].value == pytest.approx(1 / 12)
    assert found["llm/unparsable/policy_vs_baseline"].value == pytest.approx(1 / 26)
    assert "llm/agreement/judge/policy_vs_baseline" not in found


def test_kappa_is_left_out_where_chance_alone_agrees():
    found = summarize_verdicts([row("policy", 2.0, 1.0)] * 3, bootstrap_samples=20, seed=0)
    assert found["llm/agreement/reward/policy_vs_baseline"].value == 1.0
    assert "llm/kappa/reward/policy_vs_baseline" not in found


def test_rows_that_were_not_compared_give_nothing():
    assert summarize_verdicts([{"reward/policy": 1.0}], bootstrap_samples=20, seed=0) == {}


def test_a_statistic_has_the_interval_of_its_resamplings():
    values = numpy.random.default_rng(1).normal(size=400)
    mean = bootstrap_statistic([values], lambda columns: columns[0].mean(axis=-1), samples=2000, seed=0)
    assert mean.value == pytest.approx(values.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
