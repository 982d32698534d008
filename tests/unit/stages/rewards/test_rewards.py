"""The weighted sum of the parts, and who computes what."""

import contextlib
import logging
from types import SimpleNamespace

import pytest

from megatron_brain.config.run import RunConfig
from megatron_brain.errors import AgreedError
from megatron_brain.stages.brain.placement import Part
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.rewards import rewards as module
from megatron_brain.stages.rewards.rewards import Rewards, reward_metric_names
from megatron_brain.stages.rewards.scale import Scale

TOKENS = {"a": 1, "bb": 2, "ccc": 3, "dddd": 4}


def rollouts():
    """Two prompts, with responses of 1 and 3, and of 2 and 4 letters."""
    return [
        Rollout(
            id=f"d.jsonl:{index}",
            index=index,
            prompt_tokens=(9, index),
            prompt=f"prompt {index}",
            record={"id": f"d.jsonl:{index}", "answer": "bb"},
            responses=[Response(tokens=(TOKENS[text],), text=text) for text in texts],
        )
        for index, texts in enumerate((("a", "ccc"), ("bb", "dddd")))
    ]


def steps_of(some):
    return [[[Part(rollout, (0, 1))]] for rollout in some]


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Scores `rollouts()` on one rank. Model NAME gives the number of a response's token times the factor NAME."""
    (tmp_path / "rule.py").write_text(
        "calls = []\n"
        "def right(p, y, r):\n    calls.append(len(y))\n"
        "    return [float(text == record['answer']) for text, record in zip(y, r)]\n"
        "def seen(p, y, r):\n    assert p[0] == 'prompt 0' and r[0] == {'id': 'd.jsonl:0', 'answer': 'bb'}\n"
        "    return [len(text) for text in y]\n"
        "def fails(p, y, r):\n    return [1 / (text != 'bb') for text in y]\n"
    )

    def score_responses(run, steps, chunks, *, head):
        assert head == "reward"
        for step in steps:
            for [part] in step:
                for response in part.rollout.responses:
                    yield response, float(chunks) * response.tokens[0]

    def frozen_model(run, name, directory, **settings):
        assert name == "reward" and settings == {"head": "reward", "offload": False}
        return SimpleNamespace(path=directory, loaded=lambda: contextlib.nullcontext(directory))

    monkeypatch.setattr(module, "score_responses", score_responses)
    monkeypatch.setattr(module, "FrozenModel", frozen_model)
    alone = SimpleNamespace(
        leads_replica=True,
        dp_rank=0,
        gather_over_world=lambda item: [item],
        gather_over_data_parallel=lambda item: [item],
    )

    def run(some=None, scale=None, parallel=alone, **settings):
        config = RunConfig(stage="brain")
        for name, value in settings.items():
            setattr(config.scoring, name, value.replace("RULE", f"{tmp_path}/rule.py"))
        made = Rewards(SimpleNamespace(config=config, parallel=parallel, tokenizer=None))
        some = rollouts() if some is None else some
        made.score(steps_of(some), Scale() if scale is None else scale)
        values = [[response.reward for response in rollout.responses] for rollout in some]
        return SimpleNamespace(values=values, rollouts=some, rewards=made, config=config)

    return run


def test_a_single_model_is_taken_as_it_is(score):
    assert score(reward_load="0.1").values == [[0.1 * 1, 0.1 * 3], [0.1 * 2, 0.1 * 4]]


def test_functions_get_texts_and_records_and_parts_are_summed_with_their_weights(score):
    done = score(reward_load="0.5", reward_function="RULE:right,RULE:seen", reward_weights="2,10,-1")
    assert done.values == [[1 + 0 - 1, 3 + 0 - 3], [2 + 10 - 2, 4 + 0 - 4]]
    assert done.rollouts[1].responses[0].reward_parts == {"0.5": 1.0, "right": 1.0, "seen": 2.0}


def test_several_models_are_standardised_and_averaged_whatever_their_units(score):
    # Tokens 1, 3, 2, 4: mean 2.5, within prompts squares of 1 four times over 2 degrees of freedom.
    standard = [[(token - 2.5) / 2**0.5 for token in group] for group in ((1, 3), (2, 4))]
    for models in ("1,7", "0.001,1000"):
        done = score(reward_load=models)
        assert done.values == [pytest.approx(group, rel=1e-12) for group in standard]
    weighted = score(reward_load="1,7", reward_function="RULE:right", reward_weights="1,-3,5")
    expected = [[-1 * value for value in group] for group in standard]
    expected[1][0] += 5
    assert weighted.values == [pytest.approx(group, rel=1e-12) for group in expected]
    assert weighted.rollouts[0].responses[1].reward_parts == {"1": 3.0, "7": 21.0, "right": 0.0}


def test_the_scale_of_the_first_round_stays(score):
    scale = Scale()
    score(reward_load="1,7", scale=scale)
    later = rollouts()[:1]
    assert score(reward_load="1,7", scale=scale, some=later).values == [
        pytest.approx([(1 - 2.5) / 2**0.5, (3 - 2.5) / 2**0.5])
    ]


def test_a_model_that_cannot_tell_responses_apart_counts_0_and_is_told(score, caplog):
    with caplog.at_level(logging.WARNING):
        done = score(reward_load="0,4")
    assert "--reward-load 0 gives all responses to a prompt the same reward; it counts 0" in caplog.text
    assert done.values[0] == pytest.approx([(1 - 2.5) / 2**0.5 / 2, (3 - 2.5) / 2**0.5 / 2])


def test_a_model_that_gives_no_number_beside_other_parts_is_named_with_the_record(score):
    with pytest.raises(AgreedError, match="d.jsonl:0: --reward-load nan gives nan for a response"):
        score(reward_load="nan,4")


def test_a_function_that_fails_stops_all_ranks_with_the_record(score):
    with pytest.raises(AgreedError, match=r"rule.py:fails raised ZeroDivisionError on the record d.jsonl:1"):
        score(reward_function="RULE:fails")


def test_only_the_leading_rank_of_a_replica_calls_and_the_others_take_its_numbers(score):
    def gather(item):
        # Rank 1 of replica 3 is this one; replica 0 comes first, then the leading rank of replica 3.
        is_numbers = isinstance(item, tuple)
        return [(0, [9.0]), (3, [1.0, 2.0, 3.0, 4.0]), item] if is_numbers else [item]

    follower = SimpleNamespace(leads_replica=False, dp_rank=3, gather_over_world=gather)
    done = score(reward_function="RULE:fails", parallel=follower)
    assert done.values == [[1.0, 2.0], [3.0, 4.0]]


def test_a_replica_without_responses_asks_nobody(score):
    assert score(reward_function="RULE:fails", some=[]).values == []


def test_a_function_gets_no_more_in_one_call_than_asked_and_replicas_wait_for_the_calls_of_others(score):
    waits = []

    def gather(item):
        if isinstance(item, tuple):
            waits.append(item[1])
        return [3, item] if isinstance(item, int) else [item]

    parallel = SimpleNamespace(
        leads_replica=True, dp_rank=0, gather_over_world=gather, gather_over_data_parallel=lambda item: [item]
    )
    settings = {"reward_load": "1,7", "reward_function": "RULE:right", "parallel": parallel}
    whole, waits[:] = score(**settings), []
    some, scale = rollouts(), Scale()
    whole.rewards.score(steps_of(some), scale, in_one_call=3)
    assert [[response.reward for response in rollout.responses] for rollout in some] == whole.values
    # Four responses in calls of three; another replica has three calls.
    assert waits == [[0.0, 0.0, 1.0], [0.0], []]


def test_each_part_has_its_mean_and_deviation_in_the_log(score):
    done = score(reward_load="1", reward_function="RULE:right")
    metrics = done.rewards.metrics(done.rollouts)
    assert metrics == {
        "reward/1": 2.5,
        "reward_std/1": pytest.approx(2**0.5),
        "reward/right": 0.25,
        "reward_std/right": pytest.approx(0.5**0.5 / 2),
    }
    assert set(metrics) == set(reward_metric_names(done.config))
    del done.rollouts[0].responses[0].reward_parts["right"]
    assert set(done.rewards.metrics(done.rollouts)) == {"reward/1", "reward_std/1"}


def test_the_banner_names_each_part_and_their_sum(score):
    assert score(reward_load="0.5").rewards.rows() == [("reward model", "0.5")]
    rows = score(reward_load="1,7", reward_function="RULE:right").rewards.rows()
    assert [name for name, _ in rows] == ["reward 1", "reward 7", "reward right", "reward"]
    assert rows[-1][1] == "mean of standardised (1, 7) + right"
