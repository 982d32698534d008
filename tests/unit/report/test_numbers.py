"""The numbers of tables: by hand, from hand-made runs."""

import csv
import io
import json

import numpy
import pytest
from helpers.run_folders import rows_of, write_run

pytest.importorskip("scipy")

from reports.crossed import crossed_interval
from reports.findings import find, find_baseline
from reports.runs import read_settings
from reports.tables import differences_csv, markdown, seeds_csv, settings_csv, shown_tables

from megatron_brain.errors import ConfigError

WIN = "win_rate/reward/policy_vs_baseline"


def findings(work, baseline=None):
    settings, _ = read_settings([work])
    return find(settings, find_baseline(settings, baseline))


def lines_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def numbers(found, key):
    return {(each.one, each.other): each for each in found.differences if each.quantity.key == key}


def test_means_and_win_rates_by_hand(tmp_path):
    # The SFT model's rewards are 0, so the wins are 1 1 0 1/2 and 1 0 0 0.
    write_run(tmp_path, seed=0, rows=rows_of([1.0, 2.0, -1.0, 0.0]))
    write_run(tmp_path, seed=1, rows=rows_of([3.0, -2.0, -1.0, -4.0]))
    found = findings(tmp_path)
    estimate = found.estimates["label of one", WIN]
    assert estimate.value == (2.5 + 1) / 8
    expected = crossed_interval(numpy.array([[1, 1, 0, 0.5], [1, 0, 0, 0]]), bounds=(0, 1))
    assert estimate == expected
    assert found.estimates["label of one", "reward/policy"].value == -0.25
    assert found.estimates["label of one", "kl_to_prior"].value == 0.5
    # Against the human, whose reward is 1: 1/2 1 0 0 and 1 0 0 0.
    assert found.estimates["label of one", "win_rate/reward/policy_vs_reference"].value == 2.5 / 8
    assert found.estimates["label of one", "win_rate/judge/policy_vs_baseline"].value == 0.5
    (line,) = lines_of(settings_csv(found))
    assert (line["seeds"], line["prompts"], float(line[WIN])) == ("2", "4", 0.4375)
    assert float(line[f"{WIN} low"]) == expected.low
    assert [float(each[WIN]) for each in lines_of(seeds_csv(found))] == [0.625, 0.25]


def test_equal_texts_tie_as_in_evaluate(tmp_path):
    rows = [row | {"baseline": row["policy"]} for row in rows_of([1.0, 2.0, 3.0, 4.0])]
    write_run(tmp_path, rows=rows)
    assert findings(tmp_path).estimates["label of one", WIN].value == 0.5


def test_rows_that_contradict_the_means_of_evaluate_are_refused(tmp_path):
    path = write_run(tmp_path) / "evaluation.json"
    told = json.loads(path.read_text())
    told["metrics"]["reward/policy"]["value"] += 0.1
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"evaluation.json: its rows have the mean 0.5 of reward/policy"):
        findings(tmp_path)


def test_differences_are_taken_prompt_by_prompt_and_seed_by_seed(tmp_path):
    generator = numpy.random.default_rng(0)
    # Prompts and seeds differ much, the settings by 0.5 with a little noise: only a paired difference sees it.
    level = generator.normal(0, 5, size=(3, 1)) + generator.normal(0, 5, size=(1, 4))
    one, other = level + 0.5, level + generator.normal(0, 0.01, size=(3, 4))
    for seed in range(3):
        write_run(tmp_path, "one", seed, rows=rows_of(list(one[seed])))
        write_run(tmp_path, "other", seed, rows=rows_of(list(other[seed])))
    found = numbers(findings(tmp_path), "reward/policy")["label of one", "label of other"]
    assert found.estimate == crossed_interval(one - other)
    assert 0.4 < found.estimate.low < 0.5 < found.estimate.high < 0.6
    assert found.words == "the interval excludes 0: larger for label of one than for label of other"


def test_words_say_where_no_difference_is_shown_and_which_is_smaller(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "a", seed, rows=rows_of([1.0, 1.0, 2.0 + seed, 1.0]))
        write_run(tmp_path, "b", seed, rows=rows_of([2.0, 0.0, 2.0, 3.0 - seed]))
        write_run(tmp_path, "c", seed, rows=rows_of([9.0, 9.0, 10.0 + seed, 9.0]))
    found = numbers(findings(tmp_path), "reward/policy")
    assert found["label of a", "label of b"].words == "no difference shown: the interval contains 0"
    assert found["label of a", "label of c"].words.endswith("larger for label of c than for label of a")
    assert len(found) == 3
    against_b = numbers(findings(tmp_path, baseline="b"), "reward/policy")
    assert set(against_b) == {("label of a", "label of b"), ("label of c", "label of b")}


def test_settings_with_other_seeds_are_compared_by_the_common_ones_and_that_is_said(tmp_path):
    for setting, seeds in (("one", (0, 1, 2)), ("two", (1, 2, 3)), ("three", (9,))):
        for seed in seeds:
            write_run(tmp_path, setting, seed, rows=rows_of([seed + 1.0, 2.0, 0.0, 1.0]))
    found = findings(tmp_path)
    pairs = numbers(found, "reward/policy")
    assert {pair: each.seeds for pair, each in pairs.items()} == {("label of one", "label of two"): (1, 2)}
    assert "label of one has the seeds 0, 1, 2, label of two 1, 2, 3: they are compared by 1, 2" in found.notes
    assert "label of one has the seeds 0, 1, 2, label of three 9: they are not compared" in found.notes
    assert any(note.startswith("label of three has one seed") for note in found.notes)


def test_one_seed_says_so_in_words(tmp_path):
    write_run(tmp_path, "one", rows=rows_of([5.0, 5.1, 5.2, 5.0]))
    write_run(tmp_path, "two", rows=rows_of([1.0, 1.2, 1.1, 1.0]))
    (found,) = numbers(findings(tmp_path), "reward/policy").values()
    assert found.words.endswith("; one seed, so it may not hold for another")


def test_a_quantity_that_one_seed_lacks_has_no_number_and_is_named(tmp_path):
    write_run(tmp_path, seed=0)
    rows = rows_of([1.0, 2.0, 3.0, 4.0])
    for row in rows:
        del row["judge/policy"]
    write_run(tmp_path, seed=1, rows=rows)
    found = findings(tmp_path)
    assert ("label of one", "judge/policy") not in found.estimates
    assert any(note.startswith("no setting has these") and "judge/policy" in note for note in found.notes)


def posterior_columns(plain, prior, posterior):
    return {"reward__plain": plain, "posterior__prior_reward": prior, "posterior__reward": posterior}


def test_the_share_of_the_gain_is_a_ratio_of_means(tmp_path):
    columns = posterior_columns([1.0, 1.2, 1.1, 0.9], [0.5, 0.6, 0.4, 0.5], [2.0, 2.1, 1.9, 2.0])
    write_run(tmp_path, rows=rows_of([1.0, 2.0, 3.0, 4.0], **columns))
    estimate = findings(tmp_path).estimates["label of one", "posterior/reward_gain_reached"]
    assert estimate.value == pytest.approx((1.05 - 0.5) / (2.0 - 0.5))
    assert estimate.low < estimate.value < estimate.high


def test_numbers_of_the_first_prompts_alone_are_averaged_over_these(tmp_path):
    rows = rows_of([1.0, 2.0, 3.0, 4.0], **posterior_columns([1.0, 1.2, 9, 9], [0.5, 0.6, 0, 0], [2.0, 2.1, 0, 0]))
    for row in rows[2:]:
        del row["posterior/reward"], row["posterior/prior_reward"]
    write_run(tmp_path, rows=rows)
    found = findings(tmp_path)
    assert found.estimates["label of one", "posterior/reward"].value == pytest.approx(2.05)
    share = found.estimates["label of one", "posterior/reward_gain_reached"].value
    assert share == pytest.approx((1.1 - 0.55) / (2.05 - 0.55))


def test_runs_with_a_number_for_different_prompts_are_refused(tmp_path):
    for seed, without in ((0, 3), (1, 2)):
        rows = rows_of([1.0, 2.0, 3.0, 4.0], posterior__kl_to_policy=[1.0, 1.0, 1.0, 1.0])
        del rows[without]["posterior/kl_to_policy"]
        write_run(tmp_path, seed=seed, rows=rows)
    with pytest.raises(ConfigError, match="posterior/kl_to_policy for different prompts"):
        findings(tmp_path)


def test_a_setting_with_some_of_the_prompts_is_compared_by_these_alone(tmp_path):
    write_run(tmp_path, "whole", rows=rows_of([1.0, 2.0, 3.0, 9.0]))
    write_run(tmp_path, "part", rows=rows_of([5.0, 6.0, 8.0, 0.0])[:3])
    found = findings(tmp_path)
    assert found.estimates["label of part", "reward/policy"].value == pytest.approx(19 / 3)
    assert found.estimates["label of part", WIN].value == 1.0
    (pair,) = numbers(found, "reward/policy").values()
    assert (pair.one, pair.estimate) == ("label of part", crossed_interval(numpy.array([[4.0, 4.0, 5.0]])))


def test_replies_without_a_verdict_leave_their_prompts_out_and_that_is_said(tmp_path):
    for seed, winners in ((0, ["policy", "tie", "baseline", None]), (1, ["policy", "policy", "policy", "tie"])):
        rows = rows_of([1.0, 2.0, 3.0, 4.0])
        for row, winner in zip(rows, winners, strict=True):
            row["llm/policy_vs_baseline"] = {"winner": winner, "verdicts": []}
        write_run(tmp_path, seed=seed, rows=rows)
    found = findings(tmp_path)
    assert found.estimates["label of one", "win_rate/llm/policy_vs_baseline"].value == 4.5 / 6
    assert "label of one: 3 of 4 prompts have win-rate: language model, vs SFT" in found.notes


def test_unknown_numbers_of_the_posterior_are_shown_by_their_keys(tmp_path):
    write_run(tmp_path, rows=rows_of([1.0, 2.0, 3.0, 4.0], posterior__new=[1.0, 2.0, 3.0, 6.0]))
    table = next(each for each in shown_tables(findings(tmp_path)) if each.title == "The posterior")
    assert table.columns[-1] == "new" and table.rows[0][-1].startswith("3.000 [")


def test_a_baseline_setting_that_is_not_one_setting_is_named(tmp_path):
    write_run(tmp_path, experiment="baseline")
    write_run(tmp_path, experiment="methods")
    assert findings(tmp_path, baseline="methods/one").differences[0].other == "label of one (methods/one)"
    with pytest.raises(ConfigError, match="--baseline-setting one: several settings .*baseline/one, methods/one"):
        findings(tmp_path, baseline="one")
    with pytest.raises(ConfigError, match="--baseline-setting none: no setting"):
        findings(tmp_path, baseline="none")


def test_markdown_has_a_row_for_each_setting_and_keeps_its_columns(tmp_path):
    write_run(tmp_path, label="a | b\nc")
    tables = {table.title: markdown(table).splitlines() for table in shown_tables(findings(tmp_path))}
    row = tables["Answers"][4]
    assert row.startswith("| a \\| b c | 1 | 4 | 0.625 [")
    assert row.replace("\\|", "").count("|") == tables["Answers"][2].count("|")
    assert "600" in tables["Runs"][4] and "abababababab" in tables["Runs"][4]


def test_differences_as_csv(tmp_path):
    write_run(tmp_path, "one", rows=rows_of([5.0, 5.1, 5.2, 5.0]))
    write_run(tmp_path, "two", rows=rows_of([1.0, 1.2, 1.1, 1.0]))
    line = next(each for each in lines_of(differences_csv(findings(tmp_path))) if each["quantity"] == "reward/policy")
    assert (line["A"], line["B"], line["seeds"]) == ("label of one", "label of two", "1")
    assert float(line["A minus B"]) == pytest.approx(4.0)
    assert float(line["low"]) < 4 < float(line["high"])
