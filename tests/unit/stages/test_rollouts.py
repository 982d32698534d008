"""Rollout files: what is written is read back, and what cannot be trained on is refused with its place."""

import json

import pytest

from megatron_brain.data.groups import pack_groups
from megatron_brain.errors import ConfigError
from megatron_brain.stages.brain import rollouts as rollouts_module
from megatron_brain.stages.brain.rollouts import (
    Response,
    Rollout,
    read_rollouts,
    rollout_files,
    rollout_from_dict,
    write_rollouts,
)


def response(*tokens, **known):
    return Response(tokens=tokens, log_proposal=-1.5, **known)


def rollout(index=0, **known):
    return Rollout(
        id=f"prompts.jsonl:{index}",
        index=index,
        prompt_tokens=(1, 2),
        prompt="größe 大",
        responses=[response(3, 4, text="a\nb", reward=1.0, **known), response(5, finished=False, reward=-2.0, **known)],
    )


def record(**changes):
    responses = [{"tokens": [3, 4], "log_proposal": -1.0}, {"tokens": [5], "log_proposal": -2.0}]
    return {"id": "x", "index": 0, "prompt_tokens": [1, 2], "responses": responses} | changes


def test_a_round_is_read_back_as_it_was_written_in_the_order_of_its_indices(tmp_path):
    path = tmp_path / "new" / "round_0000.jsonl"
    fixed = {"alpha": 0.25}
    everything = [rollout(2, log_prior=-0.1, fixed=fixed, sampler_logprob=-1.25), rollout(0), rollout(1)]
    write_rollouts(path, everything)
    assert read_rollouts(str(path)) == [everything[1], everything[2], everything[0]]


def test_a_checkpoint_carries_rollouts_through_json():
    assert rollout_from_dict(json.loads(json.dumps(rollout().as_dict())), "ckpt") == rollout()


def test_a_checkpoint_keeps_the_log_probabilities_of_tokens_until_the_trainer_has_compared_them():
    drawn = rollout(sampler_logprob=-1.5)
    for each in drawn.responses:
        each.sampler_token_logprobs = (-1.5 / len(each.tokens),) * len(each.tokens)
    read = rollout_from_dict(json.loads(json.dumps(drawn.as_dict())), "ckpt")
    assert read == drawn
    first = read.responses[0]
    first.compare_tokens((-0.75, -1.25))
    assert (first.largest_token_difference, first.sampler_token_logprobs) == (0.5, None)
    written = read.as_dict()["responses"]
    assert "sampler_token_logprobs" not in written[0] and "largest_token_difference" not in written[0]
    assert written[1]["sampler_token_logprobs"] == (-1.5,)


@pytest.mark.parametrize("told", [[-1.0], [-1.0, None], "ab", [-1.0, float("nan")]])
def test_log_probabilities_that_are_not_those_of_the_tokens_are_refused(told):
    responses = [{"tokens": [3, 4], "log_proposal": -1.0, "sampler_token_logprobs": told}] * 2
    with pytest.raises(ConfigError, match="f:1: sampler_token_logprobs is .*a finite number for each of the 2 tokens"):
        rollout_from_dict(record(responses=responses), "f:1")


def test_a_minimal_record_of_another_engine_is_enough():
    read = rollout_from_dict(record(), "f:1")
    assert read.responses[1] == Response(tokens=(5,), log_proposal=-2.0)
    assert read.group().responses == ((3, 4), (5,))


def test_the_samplers_own_log_probability_stands_in_for_the_proposals():
    responses = [{"tokens": [3], "sampler_logprob": -1.0}, {"tokens": [4], "sampler_logprob": -2, "log_proposal": -3.0}]
    assert rollout_from_dict(record(responses=responses), "f:1").values("log_proposal") == (-1.0, -3.0)


@pytest.mark.parametrize("name", ["alpha", "preference", "advantage"])
def test_what_an_objective_has_fixed_stands_beside_the_other_numbers(name):
    written = rollout(fixed={name: 0.5}).as_dict()
    assert [response[name] for response in written["responses"]] == [0.5, 0.5] and "fixed" not in str(written)
    read = rollout_from_dict(json.loads(json.dumps(written)), "f:1")
    assert read == rollout(fixed={name: 0.5}) and read.group().values[name] == (0.5, 0.5)
    with pytest.raises(ValueError, match=f"f:1: .*'{name}' must be of type float, not 'much'"):
        rollout_from_dict(record(responses=[{"tokens": [3], "log_proposal": -1.0, name: "much"}] * 2), "f:1")


def test_a_weight_below_0_is_refused():
    with pytest.raises(ConfigError, match=r"f:1: alpha is -0\.5; a weight is at least 0"):
        rollout_from_dict(record(responses=[{"tokens": [3], "log_proposal": -1.0, "alpha": -0.5}] * 2), "f:1")


def test_a_response_that_was_not_drawn_with_a_known_probability_is_read_where_nothing_needs_it():
    responses = [{"tokens": [3]}, {"tokens": [4]}]
    read = rollout_from_dict(record(responses=responses), "f:1", needs_log_proposal=False)
    assert read.values("log_proposal") == (None, None) and "log_proposal" not in read.group().values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": [{"tokens": [3], "log_proposal": -1.0}, {"tokens": [4]}]}, "neither log_proposal nor sampler"),
        ({"responses": [{"tokens": [3], "log_proposal": -1.0}]}, r"1 response\(s\), a group needs at least 2"),
        ({"responses": []}, r"0 response\(s\)"),
        ({"responses": [{"text": "hello", "log_proposal": -1.0}] * 2}, "'tokens'"),
        ({"responses": [{"tokens": [], "log_proposal": -1.0}] * 2}, "at least one id"),
        ({"responses": [{"tokens": "hello", "log_proposal": -1.0}] * 2}, "at least one id, not 'hello'"),
        ({"responses": [{"tokens": [3], "logproposal": -1.0}] * 2}, "logproposal"),
        ({"responses": [{"tokens": [3], "log_proposal": float("-inf")}] * 2}, "log_proposal is -inf"),
        ({"responses": [{"tokens": [3], "log_proposal": -1.0, "reward": float("nan")}] * 2}, "reward is nan"),
        ({"responses": [{"tokens": [3], "log_proposal": "-1.0"}] * 2}, "log_proposal is '-1.0'"),
        ({"responses": None}, "not a rollout record"),
        ({"prompt_tokens": "text"}, "at least one id"),
        ({"rewards": [1, 2]}, "rewards"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused_with_its_place(changes, message):
    with pytest.raises(ConfigError, match=f"file.jsonl:7: .*{message}"):
        rollout_from_dict(record(**changes), "file.jsonl:7")


@pytest.mark.parametrize("name", ["id", "index", "prompt_tokens", "responses"])
def test_a_missing_field_is_named(name):
    incomplete = {key: value for key, value in record().items() if key != name}
    with pytest.raises(ConfigError, match=f"file.jsonl:7: not a rollout record, .*{name}"):
        rollout_from_dict(incomplete, "file.jsonl:7")


def test_the_line_of_a_bad_record_in_a_file_is_named(tmp_path):
    path = tmp_path / "round_0000.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record(responses=[])) + "\n")
    with pytest.raises(ConfigError, match=r"round_0000\.jsonl:2: 0 response"):
        read_rollouts(str(path))


def test_whole_numbers_of_another_engine_become_floats():
    responses = [{"tokens": [3], "log_proposal": -1, "reward": 1}, {"tokens": [4], "log_proposal": -2, "reward": 0}]
    rewards = rollout_from_dict(record(responses=responses), "f:1").values("reward")
    assert rewards == (1.0, 0.0) and all(isinstance(reward, float) for reward in rewards)


def test_a_group_carries_the_numbers_all_responses_have():
    scored = rollout()
    assert scored.group().values == {"log_proposal": (-1.5, -1.5), "reward": (1.0, -2.0), "finished": (1.0, 0.0)}
    assert scored.group().record_id == "prompts.jsonl:0"
    scored.responses[0].log_prior = -1.0
    assert "log_prior" not in scored.group().values
    scored.responses[1].log_prior = -2.0
    batch = pack_groups([scored.group()], shared_prefix=True)
    assert batch.values("log_prior").tolist() == [-1.0, -2.0]


class _InterruptedError(Exception):
    pass


def test_a_file_that_was_not_written_to_its_end_is_never_seen(tmp_path, monkeypatch):
    path = tmp_path / "round_0000.jsonl"
    write_rollouts(path, [rollout(0)])
    before = path.read_text()
    calls = iter([None, _InterruptedError()])

    def fails_at_the_second(value, **options):
        if error := next(calls):
            raise error
        assert rollout_files(str(tmp_path / "round_*.jsonl")) == [str(path)]
        return "{}"

    monkeypatch.setattr(rollouts_module.json, "dumps", fails_at_the_second)
    with pytest.raises(_InterruptedError):
        write_rollouts(path, [rollout(1), rollout(2)])
    assert path.read_text() == before
    assert rollout_files(str(tmp_path / "round_*.jsonl")) == [str(path)]


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for number in (10, 2, 0):
        write_rollouts(tmp_path / f"round_{number:04d}.jsonl", [rollout()])
    names = [file[-9:] for file in rollout_files(str(tmp_path / "*.jsonl"))]
    assert names == ["000.jsonl", "002.jsonl", "010.jsonl"]


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout_data=.*none.*matches no file"):
        rollout_files(str(tmp_path / "none*.jsonl"))


def test_parts_of_the_reward_and_the_record_are_written_and_read_back_and_left_out_where_there_are_none(tmp_path):
    plain, scored = rollout(0), rollout(1, reward_parts={"rule": 1.0, "rm": -0.25})
    scored.record = {"id": "prompts.jsonl:1", "answer": {"n": [1, "ü"]}}
    path = tmp_path / "round_0000.jsonl"
    write_rollouts(path, [plain, scored])
    assert read_rollouts(str(path)) == [plain, scored]
    first, second = map(json.loads, path.read_text().splitlines())
    assert "record" not in first and "reward_parts" not in first["responses"][0]
    assert second["record"] == scored.record and second["responses"][1]["reward_parts"] == {"rule": 1.0, "rm": -0.25}


def test_a_part_of_the_reward_that_is_no_number_is_refused():
    for value, shown in (("1", "'1'"), (float("nan"), "nan"), (True, "True")):
        responses = [{"tokens": [3], "log_proposal": -1.0, "reward_parts": {"rule": value}}] * 2
        with pytest.raises(ConfigError, match=f"r.jsonl:1: reward_parts has {shown} for rule"):
            rollout_from_dict(record(responses=responses), "r.jsonl:1")
