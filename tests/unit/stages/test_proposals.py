"""Where the responses of a round come from."""

import json
from types import SimpleNamespace

import pytest
from helpers.assets import write_assets

from megatron_brain.config.run import RunConfig
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.errors import AgreedError
from megatron_brain.stages.brain.placement import Placement
from megatron_brain.stages.brain.proposals import GivenPairs, RolloutFiles, read_round
from megatron_brain.training.run import Run

ALONE = SimpleNamespace(gather_over_world=lambda item: [item])


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("assets")
    write_assets(directory)
    return directory


def given_pairs(assets, *, replicas=1):
    """The pairs as each replica takes them."""
    config = RunConfig(stage="brain")
    config.data.train_data, config.data.seq_length = str(assets / "pairs.jsonl"), 128
    config.brain.responses = "given"
    config.brain.prompts_per_round, config.training.global_batch_size = 16, 8
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(assets / "tokenizer"))
    run = Run(resolved=None, config=config, parallel=ALONE, tokenizer=tokenizer)
    layouts = [SimpleNamespace(dp_rank=rank, dp_size=replicas, tp_size=1, pp_size=1) for rank in range(replicas)]
    return [GivenPairs(run, Placement(config.training, layout, interleaved=False)) for layout in layouts]


def test_given_pairs_are_two_samples_of_the_prior_the_chosen_one_better(assets):
    [pairs] = given_pairs(assets)
    assert pairs.from_prior and pairs.temperature == 1.0
    records = [json.loads(line) for line in (assets / "pairs.jsonl").read_text().splitlines()]
    by_prompt = {record["prompt"]: record for record in records}
    rollouts = pairs.rollouts(None, 0)
    assert [rollout.index for rollout in rollouts] == list(range(16))
    for rollout in rollouts:
        chosen, rejected = rollout.responses
        assert (chosen.reward, rejected.reward) == (1.0, 0.0)
        assert chosen.finished and rejected.finished
        assert by_prompt[rollout.prompt]["chosen"] == chosen.text.removesuffix("</s>")
        assert by_prompt[rollout.prompt]["rejected"] == rejected.text.removesuffix("</s>")
        assert rollout.values("log_proposal") == (None, None), "scored later, as the prior's"


def test_rounds_go_through_all_pairs_in_shuffled_epochs_dealt_to_the_replicas(assets):
    [pairs] = given_pairs(assets)
    assert pairs.num_prompts == 40 and pairs.rounds(1.0) == 3 and pairs.rounds(2.0) == 5
    ids = [rollout.id for number in range(5) for rollout in pairs.rollouts(None, number)]
    assert len(set(ids[:40])) == 40 and sorted(ids[40:]) == sorted(ids[:40])
    halves = given_pairs(assets, replicas=2)
    together = sorted((r for half in halves for r in half.rollouts(None, 1)), key=lambda r: r.index)
    assert together == pairs.rollouts(None, 1)


def test_rollout_files_are_read_in_turn_and_a_token_of_another_vocabulary_is_named(tmp_path):
    for name, token in (("a", 1), ("b", 2)):
        response = {"tokens": [token], "log_proposal": -1.0}
        record = {"id": f"{name}:1", "index": 0, "prompt_tokens": [3], "responses": [response] * 2}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    config = RunConfig(stage="brain")
    config.brain.rollout_data = str(tmp_path / "*.jsonl")
    config.model.vocab_size, config.training.global_batch_size = 10, 1
    config.scoring.prior_load = config.scoring.reward_load = "elsewhere"
    layout = SimpleNamespace(dp_rank=0, dp_size=1, tp_size=1, pp_size=1)
    run = SimpleNamespace(config=config, parallel=ALONE)
    files = RolloutFiles(run, Placement(config.training, layout, interleaved=False))
    assert files.rounds(3.0) == 2
    assert [files.rollouts(None, number)[0].id for number in range(3)] == ["a:1", "b:1", "a:1"]
    config.model.vocab_size = 2
    with pytest.raises(AgreedError, match="b:1: token id 2 is outside 0..1|token id 3 is outside"):
        files.rollouts(None, 1)
    config.model.vocab_size, config.training.global_batch_size = 10, 2
    with pytest.raises(AgreedError, match="holds 1 groups, not a multiple of global_batch_size=2"):
        files.rollouts(None, 0)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"tokens": [9], "log_proposal": -1.0}, "b.jsonl, b:1: token id 9 is outside 0..3"),
        ({"tokens": [1]}, "b.jsonl:1: a response has neither log_proposal nor sampler_logprob"),
        ({"tokens": [1], "log_proposal": -1.0}, "b.jsonl, b:1: a response has no reward: give --reward-load"),
    ],
)
def test_what_is_wrong_with_the_last_file_stops_a_run_before_its_first_round(last, message, tmp_path):
    good = {"tokens": [1], "log_proposal": -1.0, "reward": 0.5, "log_prior": -1.0}
    for name, response in (("a", good), ("b", last)):
        record = {"id": f"{name}:1", "index": 0, "prompt_tokens": [3], "responses": [response] * 2}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    config = RunConfig(stage="brain")
    config.brain.rollout_data = str(tmp_path / "*.jsonl")
    config.model.vocab_size, config.training.global_batch_size = 4, 1
    layout = SimpleNamespace(dp_rank=0, dp_size=1, tp_size=1, pp_size=1)
    with pytest.raises(AgreedError, match=message):
        RolloutFiles(
            SimpleNamespace(config=config, parallel=ALONE), Placement(config.training, layout, interleaved=False)
        )


@pytest.mark.parametrize(
    ("objective", "responses", "message"),
    [
        ("dpo", [{"tokens": [1]}] * 4, None),
        ("dpo", [{"tokens": [1]}] * 3, r"a.jsonl, a:1: 3 responses; --objective dpo takes multiples of 2"),
        ("rloo", [{"tokens": [1], "log_proposal": -1.0}] * 3, None),
        ("rloo", [{"tokens": [1]}] * 3, r"a.jsonl:1: a response has neither log_proposal nor sampler_logprob"),
    ],
)
def test_files_hold_what_the_objective_needs(objective, responses, message, tmp_path):
    scored = [{"reward": 0.5, "log_prior": -1.0, **response} for response in responses]
    record = {"id": "a:1", "index": 0, "prompt_tokens": [3], "responses": scored}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    config = RunConfig(stage="brain")
    config.brain.objective, config.model.vocab_size, config.training.global_batch_size = objective, 10, 1
    if message is None:
        assert len(read_round(config, str(tmp_path / "a.jsonl"))) == 1
        return
    with pytest.raises(ValueError, match=message):
        read_round(config, str(tmp_path / "a.jsonl"))
