"""Held-out prompts: the numbers by hand, the prior's answers of before, and what an evaluation must leave alone."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from distributed.cases_brain import write_drifted_rollouts
from helpers.assets import size_flags, write_assets
from helpers.copying_engine import CopyingEngine

from megatron_brain.config.loader import load_config
from megatron_brain.config.run import RunConfig
from megatron_brain.data.records import Prompt
from megatron_brain.errors import AgreedError
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.seeds import held_out_seeds, posterior_seeds, sample_seed
from megatron_brain.objectives.posterior import DISTANCES
from megatron_brain.stages import comparison
from megatron_brain.stages.brain import rollouts
from megatron_brain.stages.brain.held_out import HeldOut, held_out_metrics, summarize
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer, metric_names

# Of the first prompt the texts tie, of the second only the greedy ones, of the third none.
ROWS = [
    {"sampled": "a", "prior_sampled": "a", "greedy": "b", "prior_greedy": "b", "reference": "b"},
    {"sampled": "a", "prior_sampled": "c", "greedy": "d", "prior_greedy": "d", "reference": "e"},
    {"sampled": "x", "prior_sampled": "y", "greedy": "z", "prior_greedy": "w", "reference": "v"},
]
REWARDS = {
    "sampled": (1.0, 2.0, 3.0),
    "prior_sampled": (1.0 - 1e-7, 1.0, 4.0),
    "greedy": (0.0, 1.0, 2.0),
    "prior_greedy": (0.5, 1.0 + 1e-7, 2.0),
    "reference": (9.0, 0.0, 9.0),
}


def rows(*kinds):
    found = [{"kl_to_prior": kl, **row} for kl, row in zip((0.5, -0.25, 2.0), ROWS, strict=True)]
    for place, row in enumerate(found):
        row |= {"length/sampled": 2 + place, "length/greedy": 5, "unfinished/sampled": float(place == 0)}
        row |= {"unfinished/greedy": 0.0}
        row |= {f"{kind}/{name}": values[place] for kind in kinds for name, values in REWARDS.items()}
    return found


def test_means_and_win_rates_by_hand_and_equal_texts_tie_whatever_their_rewards():
    found = summarize(rows("reward"), ["reward"])
    assert found == pytest.approx(
        {
            "kl_to_prior": 0.75,
            "response_length": 3.0,
            "unfinished_fraction": 1 / 3,
            "reward_mean": 2.0,
            "prior_reward_mean": 2.0,
            "win_rate_reward": (0.5 + 1 + 0) / 3,
            "greedy_response_length": 5.0,
            "greedy_unfinished_fraction": 0.0,
            "greedy_reward_mean": 1.0,
            "greedy_prior_reward_mean": 3.5 / 3,
            "greedy_win_rate_reward": (0.5 + 0.5 + 0.5) / 3,
        }
    )


def test_a_judge_compares_with_the_references_too():
    found = summarize(rows("judge"), ["judge"])
    assert found["win_rate_judge_reference"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["greedy_win_rate_judge_reference"] == pytest.approx((0.5 + 1 + 0) / 3), "equal texts tie"
    assert found["reference_judge_mean"] == pytest.approx(6.0)


def test_parts_of_the_reward_have_means_of_their_own():
    made = rows("reward")
    for place, row in enumerate(made):
        row |= {f"reward/rule/{way}": float(place) for way in ("sampled", "greedy")}
    found = summarize(made, ["reward"], ["rule"])
    assert found["reward/rule"] == found["greedy_reward/rule"] == 1.0


@pytest.mark.parametrize(
    ("scoring", "kinds"),
    [
        ({}, []),
        ({"reward_load": "r"}, ["reward"]),
        ({"judge": "j.py:f"}, ["judge"]),
        ({"reward_load": "r", "judge": "j.py:f"}, ["reward", "judge"]),
    ],
)
def test_the_names_that_the_console_knows_are_those_that_an_evaluation_gives(scoring, kinds):
    config = RunConfig(stage="brain")
    assert held_out_metrics(config) == {}
    config.data.valid_data = "v"
    for name, value in scoring.items():
        setattr(config.scoring, name, value)
    made = rows(*kinds)
    if "reward" in kinds:
        config.posterior.posterior_samples = 8
        made[0] |= {f"posterior/{name}": 0.25 for name in DISTANCES}
        assert summarize(made, kinds)["posterior_kl_to_policy"] == 0.25, "the other prompts have no samples"
        assert held_out_metrics(config)["posterior_kl_to_policy"] == "lowest"
    given = {*summarize(made, kinds), "seconds"}
    assert set(held_out_metrics(config)) == given and given <= set(metric_names(config, BrainStage))
    shown = [name for name in BrainStage.shown_metrics if name in given]
    assert "kl_to_prior" in shown and len(shown) <= 5, "the line of a validation is short"


def test_the_kl_is_the_mean_of_the_log_ratio_of_samples_by_hand(monkeypatch):
    prompts = [Prompt(tokens=(1, 2), text="", reference=None, record_id=name) for name in "ab"]
    samples = [
        Completion(tokens=tokens, token_logprobs=(0.0,) * len(tokens), finished=True) for tokens in ((3, 4), (5,))
    ]
    scores = {"policy": (-1.0, -2.0), "prior": (-3.5, -1.5)}

    def score(chunks, groups, parallel, *, head, shared_prefix):
        assert [group.responses for [group] in groups] == [((3, 4),), ((5,),)] and head == "policy"
        return [[torch.tensor([value])] for value in scores[chunks]]

    class Prior:
        def loaded(self):
            import contextlib

            return contextlib.nullcontext("prior")

    monkeypatch.setattr(comparison, "score_groups", score)
    run = SimpleNamespace(parallel=None)
    assert comparison.log_ratios(run, "policy", Prior(), prompts, samples) == [2.5, -0.5]


def test_no_held_out_answer_has_the_seed_of_a_response_that_trains():
    places = range(300)
    held_out = {seed for [seed] in held_out_seeds(7, places)}
    held_out |= {seed for of_prompt in posterior_seeds(7, places, 8) for seed in of_prompt}
    assert len(held_out) == 300 * 9
    assert not held_out & {sample_seed(7, key, sample) for key in places for sample in (-1, *range(8))}


FLAGS = [
    *("--seq-length", "64", "--global-batch-size", "4", "--lr", "3e-2", "--no-progress", "--train-iters", "4"),
    *("--samples-per-prompt", "2", "--max-new-tokens", "4", "--prompts-per-round", "8", "--lr-decay-style", "constant"),
]


@pytest.fixture(scope="module")
def folder(single, tmp_path_factory):
    """A prior and a judge."""
    folder = tmp_path_factory.mktemp("held_out")
    write_assets(folder)
    data = ["--train-data", str(folder / "sft.jsonl"), "--tokenizer-model", str(folder / "tokenizer")]
    run = open_run(load_config("sft", [*FLAGS[:9], *data, *size_flags(num_layers=1), "--save", str(folder / "prior")]))
    Trainer(run, SFTStage(run)).save()
    judge = "def score(prompts, responses, references):\n    return [len(text) for text in responses]\n"
    (folder / "judge.py").write_text(judge + "def fail(*columns):\n    raise ValueError('no judge today')\n")
    write_drifted_rollouts(folder / "rollouts.jsonl", groups=8)
    return folder


def held_out(folder, *extra):
    return ["--valid-data", str(folder / "sft.jsonl"), "--max-valid-records", "6", "--eval-interval", "2", *extra]


def make(folder, *extra, sampled=True):
    start = ["--load", str(folder / "prior"), "--finetune"] if "--load" not in extra else []
    judged = ["--reward-function", f"{folder / 'judge.py'}:score"] if sampled else []
    data = ["--train-data", str(folder / "prompts.jsonl")] if sampled else []
    run = open_run(load_config("brain", [*FLAGS, *start, *data, *judged, *extra]))
    return Trainer(run, BrainStage(run))


def numbers(save):
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_evaluations_change_nothing_of_the_training(folder, tmp_path):
    for name, extra in (("without", []), ("with", held_out(folder, "--judge", f"{folder / 'judge.py'}:score"))):
        make(folder, *extra, "--save", str(tmp_path / name)).train()
    without, with_them = numbers(tmp_path / "without"), numbers(tmp_path / "with")
    plain = [{k: v for k, v in line.items() if not k.startswith("validation/")} for line in with_them]
    assert without == [line for line in plain if len(line) > 1]
    assert [line["iteration"] for line in with_them if "validation/kl_to_prior" in line] == [0, 2, 4]
    start = with_them[0]
    assert (start["validation/kl_to_prior"], start["validation/win_rate_reward"]) == (0.0, 0.5), "it is the prior"
    assert with_them[-1]["validation/kl_to_prior"] != 0.0


def test_evaluations_wait_for_the_round_that_is_drawn_ahead(folder, tmp_path, monkeypatch):
    """Whoever is faster: the engine draws before it gets the weights of the evaluation, and from those of its round."""
    engines = ["--engine", "vllm", "--engine-url", "http://nowhere:1", "--engine-sync-dir", "unused"]
    ahead = [*engines, "--rounds-ahead", "1", "--refresh-interval", "2"]
    found = []
    for lazy in (False, True):
        monkeypatch.setattr(
            "megatron_brain.stages.brain.rounds.open_engine",
            lambda run, *prompts, lazy=lazy: CopyingEngine(run, lazy=lazy),
        )
        for extra in ([], held_out(folder, "--eval-interval", "1", "--posterior-samples", "4")):
            save = tmp_path / f"{lazy}_{len(extra)}"
            make(folder, *ahead, *extra, "--save", str(save)).train()
            plain = [{k: v for k, v in line.items() if not k.startswith("validation/")} for line in numbers(save)]
            found.append([line for line in plain if len(line) > 1])
    assert len(found[0]) == 4 and all(each == found[0] for each in found)


def test_a_resumed_run_goes_on_with_the_priors_answers_and_gives_the_same_numbers(folder, tmp_path):
    extra = held_out(folder, "--save-interval", "1", "--judge", f"{folder / 'judge.py'}:score")
    make(folder, *extra, "--save", str(tmp_path / "whole")).train()
    start = ["--load", str(tmp_path / "whole" / "iter_0000003"), "--prior-load", str(folder / "prior")]
    resumed = make(folder, *extra, *start, "--save", str(tmp_path / "resumed"))
    resumed.stage._held_out._answer_by_prior = None  # It is not called: the answers were kept.
    resumed.train()
    assert numbers(tmp_path / "resumed")[-1] == numbers(tmp_path / "whole")[-1]


def test_answers_of_the_prior_that_were_made_in_another_way_are_made_anew(folder, tmp_path, caplog):
    make(folder, *held_out(folder), "--save", str(tmp_path / "run"), "--train-iters", "2").train()
    start = ["--load", str(tmp_path / "run"), "--prior-load", str(folder / "prior"), "--max-valid-records", "5"]
    with caplog.at_level(logging.WARNING):
        resumed = make(folder, *held_out(folder), *start, "--temperature", "0.5")
    assert "made with another valid_data, temperature" in caplog.text
    resumed.train()
    assert len(resumed.stage._held_out._by_prior) == 5


def test_a_run_stops_beyond_the_kl_and_a_resumed_one_goes_on_only_with_a_larger_limit(folder, tmp_path, caplog):
    extra = held_out(folder, "--save", str(tmp_path / "run"))
    with caplog.at_level(logging.WARNING):
        assert "validation/kl_to_prior" in make(folder, *extra, "--stop-at-kl", "0.001").train()
    assert "ending at iteration 2 of 4: the KL to the prior on the held-out prompts is" in caplog.text
    again = make(folder, *extra, "--stop-at-kl", "0.001", "--auto-resume")
    again.train()
    assert again.iteration == 2, "nothing has changed"
    further = make(folder, *extra, "--stop-at-kl", "1000", "--auto-resume")
    further.train()
    assert further.iteration == 4


@pytest.mark.parametrize("source", ["given", "rollouts"])
def test_runs_that_draw_nothing_answer_held_out_prompts_too(folder, tmp_path, source):
    given = ["--train-data", str(folder / "pairs.jsonl"), "--responses", "given", "--alpha", "hard"]
    flags = {
        "given": [*given, "--no-refresh-proposal"],
        "rollouts": ["--rollout-data", str(folder / "rollouts.jsonl")],
    }[source]
    metrics = make(folder, *flags, *held_out(folder), "--save", str(tmp_path / "run"), sampled=False).train()
    assert metrics["validation/kl_to_prior"] != 0.0 and metrics["validation/response_length"] <= 4
    assert not [name for name in metrics if "win_rate" in name], "there is nothing to compare by"


@pytest.mark.parametrize("unknown", [None, "sampler_logprob"], ids=["as documented", "of given pairs"])
def test_rollouts_of_the_documented_form_train(folder, tmp_path, unknown):
    text = rollouts.__doc__
    text = text[text.index("{") : text.index("`record` stands")].replace('"tokens": [...]', '"tokens": [5, 6]')
    record = json.loads(text.replace("[...]", "[3, 4]").replace(", ...]", "]"))
    [response] = record["responses"]
    record["responses"] = [{k: v for k, v in response.items() if k != unknown}] * 2
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({**record, "index": i}) + "\n" for i in range(4)))
    flags = ["--rollout-data", str(tmp_path / "r.jsonl"), "--train-iters", "1", "--save", str(tmp_path / "run")]
    make(folder, *flags, sampled=False).train()
    compared = {name: value for name, value in numbers(tmp_path / "run")[0].items() if "sampler" in name}
    assert compared == ({} if unknown else {"sampler_logprob_difference": 0.0})


def test_a_prior_that_was_replaced_in_place_answers_anew(folder, tmp_path, caplog):
    """An equal one at another place does not."""
    make(folder, *held_out(folder), "--save", str(tmp_path / "run"), "--train-iters", "2").train()
    shutil.copytree(folder / "prior", tmp_path / "prior")
    start = ["--load", str(tmp_path / "run"), "--prior-load", str(tmp_path / "prior")]
    with caplog.at_level(logging.WARNING):
        make(folder, *held_out(folder), *start)
    assert "answers the held-out prompts anew" not in caplog.text
    [place] = (tmp_path / "prior").glob("iter_*")
    [other] = (tmp_path / "run").glob("iter_*2")
    for file in [*place.glob("*.safetensors"), place / "tensors.json"]:
        file.unlink()
    for file in [*other.glob("*.safetensors"), other / "tensors.json"]:
        shutil.copy(file, place / file.name)
    with caplog.at_level(logging.WARNING):
        make(folder, *held_out(folder), *start)
    assert "made with another prior." in caplog.text


def test_texts_show_the_priors_answer_and_the_current_ones(folder):
    trainer = make(folder, *held_out(folder))
    shown = {}
    trainer.logger.log_text = lambda step, tag, text: shown.setdefault(step, {}).update({tag: text})
    trainer.train()
    assert sorted(step for step, texts in shown.items() if "held_out/0" in texts) == [0, 2, 4]
    texts = shown[4]
    assert [f"held_out/{place}" in texts for place in range(4)] == [True, True, True, False]
    lines = texts["held_out/0"].splitlines()
    assert [line.partition(":")[0].split(", reward")[0] for line in lines if line.startswith("* ")] == [
        "* prior, greedy",
        "* greedy",
        "* prior, sampled",
        "* sampled",
    ]
    prior = [[line for line in shown[step]["held_out/0"].splitlines() if "* prior" in line] for step in (0, 4)]
    assert prior[0] == prior[1]


def test_a_judge_that_fails_stops_all_ranks_with_its_traceback(folder):
    trainer = make(folder, *held_out(folder, "--judge", f"{folder / 'judge.py'}:fail"))
    with pytest.raises(AgreedError, match=r"judge.py:fail raised ValueError on the record(.|\n)*no judge today"):
        trainer.train()


def test_a_number_that_is_none_stops_the_run(folder, monkeypatch):
    trainer = make(folder, *held_out(folder))
    monkeypatch.setattr("megatron_brain.stages.brain.held_out.log_ratios", lambda *args: [float("nan")] * len(args[3]))
    with pytest.raises(FloatingPointError, match="kl_to_prior of .*sft.jsonl:1 is nan"):
        trainer.train()


def test_equal_settings_draw_once(folder):
    """At temperature 1 without truncation the samples serve for the KL too."""
    calls = []

    class Engine:
        keeps_weights = False

        def take_weights(self, chunks, label):
            calls.append(label)

        def sample(self, prompts, *, seeds, sampling):
            calls.append(sampling.temperature)
            return [[Completion(tokens=(5,), token_logprobs=(0.0,), finished=False)] for _ in prompts]

    for temperature, expected in ((1.0, [1.0, 0.0]), (0.5, [0.5, 0.0, 1.0])):
        trainer = make(folder, *held_out(folder, "--temperature", str(temperature)))
        made: HeldOut = trainer.stage._held_out
        made._engine = Engine()
        calls.clear()
        made.evaluate(trainer)
        assert calls == ["the prior", temperature, 0.0, "iteration 0", *expected]
