"""Distance to the posterior with real models whose responses have one token: every number is known by enumeration."""

import json
import math
import shutil
import statistics

import pytest
import torch
from helpers.assets import SIZES, size_flags, write_assets

from megatron_brain.checkpointing import load_weights, read_info
from megatron_brain.config.loader import load_config
from megatron_brain.data.groups import Group
from megatron_brain.errors import AgreedError
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.evaluate.stage import main as evaluate
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer
from megatron_brain.training.validation import score_groups
from megatron_brain.user_functions import ScoringFunction

PROMPTS, TAU, VOCABULARY = 4, 0.5, SIZES["vocab_size"]
RULES = '''
CALLS = []

def rule(prompts, responses, records):
    """Of the text's last letter; the empty text gets 0."""
    CALLS.extend(zip(prompts, responses))
    return [(ord(text[-1]) % 7) / 3 if text else 0.0 for text in responses]

def other(prompts, responses, records):
    return [0.5 for text in responses]
'''
COMMON = [
    *("--seq-length", "64", "--max-new-tokens", "1", "--no-progress"),
    *("--sampling-batch-size", "512", "--reward-temperature", str(TAU)),
]


@pytest.fixture(scope="module")
def folder(single, tmp_path_factory):
    """A prior, a policy that fine-tuning has moved from it, and rewards."""
    folder = tmp_path_factory.mktemp("posterior")
    write_assets(folder)
    (folder / "rules.py").write_text(RULES)
    flags = ["--train-data", str(folder / "sft.jsonl"), "--seq-length", "64", "--no-progress", "--train-iters", "3"]
    flags += ["--lr-decay-style", "constant", "--lr", "1e-2", "--global-batch-size", "4"]
    start = ["--tokenizer-model", str(folder / "tokenizer"), *size_flags(num_layers=1)]
    run = open_run(load_config("sft", [*flags, *start, "--save", str(folder / "prior")]))
    Trainer(run, SFTStage(run)).train()
    moved = ["--load", str(folder / "prior"), "--finetune", "--save", str(folder / "policy")]
    run = open_run(load_config("sft", [*flags, *moved]))
    Trainer(run, SFTStage(run)).train()
    return folder


def report(folder, output, *extra, policy="policy", rule="rule"):
    flags = ["--load", str(folder / policy), "--prior-load", str(folder / "prior"), "--output", str(output)]
    flags += ["--prompts", str(folder / "sft.jsonl"), "--max-prompts", str(PROMPTS)]
    flags += ["--reward-function", f"{folder / 'rules.py'}:{rule}", *COMMON, *extra]
    run = open_run(load_config("evaluate", flags))
    evaluate(run)
    return json.loads(output.read_text()), run


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "report.json"
    data = ["--posterior-data", str(folder / "prior_samples.jsonl")]
    return report(folder, output, "--posterior-samples", "512", *data)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollouts(folder):
    return read(folder / "prior_samples.jsonl")


def log_probabilities(folder, run, checkpoint, prompts):
    """log-probability of every response to each prompt, `[prompts, vocabulary]`."""
    chunks = run.build_model("policy")
    load_weights(read_info(str(folder / checkpoint)), chunks, head="policy", verify=False)
    everything = tuple((token,) for token in range(VOCABULARY))
    groups = [[Group(prompt=tuple(prompt), responses=everything, record_id="all")] for prompt in prompts]
    found = score_groups(chunks, groups, run.parallel, head="policy", shared_prefix=True)
    return torch.stack([group.double() for [group] in found])


def rewards_of_all(run):
    texts = [run.tokenizer.decode_response((token,)) for token in range(VOCABULARY)]
    scope = {}
    exec(RULES, scope)
    return torch.tensor(scope["rule"]([""] * VOCABULARY, texts, [{}] * VOCABULARY), dtype=torch.float64)


def test_the_numbers_are_near_the_exact_ones_of_all_responses_there_are(folder, measured):
    found, run = measured
    prompts = [rollout["prompt_tokens"] for rollout in rollouts(folder)]
    log_p, log_q = (log_probabilities(folder, run, name, prompts) for name in ("prior", "policy"))
    rewards = rewards_of_all(run)
    assert log_p.exp().sum(1) == pytest.approx(1, abs=1e-4)
    posterior = (log_p + rewards / TAU).softmax(1)

    def divergence(one, log_other):
        return (one * (one.log() - log_other)).sum(1).mean().item()

    exact = {
        "posterior/kl_to_policy": divergence(posterior, log_q),
        "posterior/kl_alpha_beta": divergence(posterior, log_q),
        "posterior/kl_to_prior": divergence(posterior, log_p),
        "posterior/reward": (posterior @ rewards).mean().item(),
        "posterior/prior_reward": (log_p.exp() @ rewards).mean().item(),
    }
    assert exact["posterior/kl_to_policy"] > 0.5 and exact["posterior/kl_to_prior"] > 0.1, "there is something to find"
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    # 4 x 512 samples: deviations of a few hundredths.
    assert {name: value[name] for name in exact} == pytest.approx(exact, abs=0.12)
    shares = log_p.exp() * (rewards / TAU).exp() ** 2
    ess = 512 * ((log_p.exp() * (rewards / TAU).exp()).sum(1) ** 2 / shares.sum(1)).mean().item()
    assert value["posterior/ess_alpha"] == pytest.approx(ess, rel=0.1)


def test_the_numbers_follow_from_the_file_of_samples_by_plain_arithmetic(folder, measured):
    found, run = measured
    samples = rollouts(folder)
    log_q = log_probabilities(folder, run, "policy", [rollout["prompt_tokens"] for rollout in samples])
    for row, rollout, of_prompt in zip(found["rows"], samples, log_q, strict=True):
        responses = rollout["responses"]
        q = [of_prompt[response["tokens"][0]].item() for response in responses]
        p, r = ([response[name] for response in responses] for name in ("log_prior", "reward"))
        weights = [math.exp(reward / TAU) for reward in r]
        alpha = [weight / sum(weights) for weight in weights]
        ratios = [math.exp(one - other) for one, other in zip(q, p, strict=True)]
        beta = [ratio / sum(ratios) for ratio in ratios]
        log_z = math.log(statistics.fmean(weights))
        to_policy = sum(a * (x / TAU + b - c) for a, x, b, c in zip(alpha, r, p, q, strict=True)) - log_z
        expected = {
            "kl_alpha_beta": sum(a * math.log(a / b) for a, b in zip(alpha, beta, strict=True)),
            "kl_to_policy": to_policy,
            "reward": sum(a * x for a, x in zip(alpha, r, strict=True)),
            "prior_reward": statistics.fmean(r),
            "kl_to_prior": sum(a * x / TAU for a, x in zip(alpha, r, strict=True)) - log_z,
            "ess_alpha": 1 / sum(a**2 for a in alpha),
            "ess_beta": 1 / sum(b**2 for b in beta),
            "kl_from_policy": row["kl_to_prior"] - row["reward/plain"] / TAU + log_z,
        }
        shown = {name: value for name, value in row.items() if name.startswith("posterior/")}
        assert shown == pytest.approx({f"posterior/{name}": value for name, value in expected.items()}, abs=1e-4)


def test_the_report_has_the_policys_plain_sample_and_how_much_of_the_gain_it_reached(measured):
    found, _ = measured
    rows, metrics = found["rows"], found["metrics"]
    assert all(row["length/plain"] == 1 and "plain" in row for row in rows)

    def mean(name):
        return statistics.fmean(row[name] for row in rows)

    prior = mean("posterior/prior_reward")
    reached = (mean("reward/plain") - prior) / (mean("posterior/reward") - prior)
    gain = metrics["posterior/reward_gain_reached"]
    assert gain["value"] == pytest.approx(reached) and gain["low"] < reached < gain["high"]


def test_the_distance_of_the_prior_is_the_posteriors_kl_to_it(folder, tmp_path):
    found, _ = report(folder, tmp_path / "o.json", "--posterior-samples", "8", policy="prior")
    for row in found["rows"]:
        assert row["posterior/kl_to_policy"] == row["posterior/kl_to_prior"] > 0
        assert row["posterior/kl_alpha_beta"] == pytest.approx(row["posterior/kl_to_prior"])
        assert row["posterior/ess_beta"] == pytest.approx(8)


def test_samples_of_a_file_are_not_drawn_again_and_give_the_same_numbers(folder, measured, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the samples are there")

    monkeypatch.setattr("megatron_brain.stages.prior_samples.PriorSamples._drawn", refuse)
    data = ["--posterior-data", str(folder / "prior_samples.jsonl")]
    again, _ = report(folder, tmp_path / "o.json", "--posterior-samples", "512", *data)
    assert again == measured[0]
    greedy, _ = report(folder, tmp_path / "o.json", "--posterior-samples", "512", "--temperature", "0", *data)
    for row, at_temperature_one in zip(greedy["rows"], again["rows"], strict=True):
        of_posterior = [name for name in row if "posterior" in name]
        assert all(row[name] == at_temperature_one[name] for name in (*of_posterior, "plain", "reward/plain"))
    assert [row["policy"] for row in greedy["rows"]] != [row["plain"] for row in greedy["rows"]]
    fewer, _ = report(folder, tmp_path / "o.json", "--posterior-samples", "8", "--posterior-prompts", "2", *data)
    monkeypatch.undo()
    drawn, _ = report(folder, tmp_path / "o.json", "--posterior-samples", "8", "--posterior-prompts", "2")
    values = [{name: metric["value"] for name, metric in each["metrics"].items()} for each in (fewer, drawn)]
    assert values[0] == pytest.approx(values[1], abs=1e-4), "a smaller run draws the first samples of the first prompts"
    assert ["posterior/reward" in row for row in drawn["rows"]] == [True, True, False, False]
    some = drawn["rows"][:2]
    value = drawn["metrics"]["posterior/kl_to_policy"]["value"]
    assert value == pytest.approx(statistics.fmean(row["posterior/kl_to_policy"] for row in some))


def test_what_else_the_report_says_is_what_it_says_without_samples(folder, measured, tmp_path):
    flags = ["--reward-temperature", "1"]
    plain, _ = report(folder, tmp_path / "o.json", *flags)
    for name, metric in plain["metrics"].items():
        assert measured[0]["metrics"][name] == metric
    assert not [name for name in plain["metrics"] if "posterior" in name or "plain" in name]


def test_equal_samples_are_scored_once_in_calls_of_a_rounds_size(folder, tmp_path):
    seen = []
    original = ScoringFunction.__call__

    def noted(self, prompts, responses, *columns):
        seen.append(list(zip(prompts, responses, strict=True)))
        return original(self, prompts, responses, *columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoringFunction, "__call__", noted)
        data = ["--posterior-data", str(tmp_path / "p.jsonl")]
        report(folder, tmp_path / "o.json", "--posterior-samples", "512", "--samples-per-prompt", "2", *data)
    lines = read(tmp_path / "p.jsonl")
    distinct = {(line["id"], response["tokens"][0]) for line in lines for response in line["responses"]}
    # A round of 64 prompts has 128 responses: a call with its time limit gets no more. The last call is for answers.
    *of_samples, _ = seen
    assert max(map(len, of_samples)) == 128 and len(of_samples) == math.ceil(len(distinct) / 128) > 1
    assert sum(map(len, of_samples)) == len(distinct) < PROMPTS * 512 == sum(len(line["responses"]) for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prior-load", "POLICY"], r"made in another way: prior is \S+/policy/iter_\S+ \w+, and was \S+/prior/iter"),
        (["--reward-function", "OTHER"], r"reward is \S+:other \['1 x function other .*, and was \S+:rule"),
        (["--reward-weights", "2"], r"reward is .*'2 x function.* and was .*'1 x function"),
        (["--bf16"], r"precision is  ?bf16, and was  ?float32"),
        (["--max-new-tokens", "2"], r"max_new_tokens is  ?2, and was  ?1"),
        (["--posterior-samples", "513"], r"it has 512 samples of a prompt: .* --posterior-samples 512"),
        (["--max-prompts", "5"], r"has samples for 4 prompts, the run measures on 5: .* --posterior-prompts 4"),
        (["--prompts", "SHUFFLED"], r"prompt 1 of the run is another one, .*shuffled.jsonl:1"),
    ],
)
def test_samples_that_were_made_in_another_way_are_refused_with_the_difference(folder, measured, change, message):
    lines = (folder / "sft.jsonl").read_text().splitlines(keepends=True)
    (folder / "shuffled.jsonl").write_text("".join(reversed(lines)))
    places = {
        "POLICY": folder / "policy",
        "OTHER": f"{folder / 'rules.py'}:other",
        "SHUFFLED": folder / "shuffled.jsonl",
    }
    data = ["--posterior-samples", "512", "--posterior-data", str(folder / "prior_samples.jsonl")]
    with pytest.raises(AgreedError, match=message):
        report(folder, folder / "refused.json", *data, *(str(places.get(each, each)) for each in change))


def test_an_edited_reward_function_is_another_reward(folder, tmp_path):
    for name in ("sft.jsonl", "rules.py"):
        (tmp_path / name).write_text((folder / name).read_text())
    data = ["--posterior-samples", "8", "--posterior-data", str(tmp_path / "p.jsonl")]
    function = ["--reward-function", f"{tmp_path / 'rules.py'}:rule"]
    report(folder, tmp_path / "o.json", *data, *function)
    (tmp_path / "rules.py").write_text(RULES.replace("% 7", "% 5"))
    with pytest.raises(AgreedError, match="reward is"):
        report(folder, tmp_path / "o.json", *data, *function)
    (tmp_path / "p.jsonl.json").unlink()
    with pytest.raises(AgreedError, match=r"p.jsonl.json does not say what it was made with .*No such file"):
        report(folder, tmp_path / "o.json", *data, *function)


def test_several_reward_models_are_one_reward_for_all_policies_that_a_file_measures(folder, tmp_path):
    models = []
    for seed in ("1", "2"):
        models.append(str(tmp_path / f"reward_{seed}"))
        flags = ["--train-data", str(folder / "pairs.jsonl"), "--load", str(folder / "prior"), "--finetune"]
        flags += ["--seq-length", "64", "--no-progress", "--train-iters", "1", "--seed", seed, "--save", models[-1]]
        run = open_run(load_config("reward", flags))
        Trainer(run, RewardStage(run)).save()
    data = ["--posterior-samples", "8", "--posterior-data", str(tmp_path / "p.jsonl"), "--reward-function", "null"]
    rewards = ["--reward-load", ",".join(models)]
    first, _ = report(folder, tmp_path / "o.json", *data, *rewards)
    other, _ = report(folder, tmp_path / "o.json", *data, *rewards, policy="prior")
    for name in ("reward/baseline", "posterior/prior_reward", "posterior/reward"):
        assert [row[name] for row in first["rows"]] == pytest.approx([row[name] for row in other["rows"]], abs=1e-5)
    every = [response["reward"] for line in read(tmp_path / "p.jsonl") for response in line["responses"]]
    assert abs(statistics.fmean(every)) < 0.5, "standardised"
    (folder / "shuffled.jsonl").write_text("".join(reversed((folder / "sft.jsonl").read_text().splitlines(True))))
    with pytest.raises(AgreedError, match="prompt 1 of the run is another one"):
        report(folder, tmp_path / "o.json", *data, *rewards, "--prompts", str(folder / "shuffled.jsonl"))


@pytest.fixture
def brain(folder):
    """Makes a run of brain with held-out prompts."""

    def make(*extra):
        flags = ["--global-batch-size", "4", "--lr", "3e-2", "--train-iters", "4", "--samples-per-prompt", "2"]
        flags += ["--prompts-per-round", "8", "--lr-decay-style", "constant", "--eval-interval", "2", *COMMON]
        flags += ["--train-data", str(folder / "prompts.jsonl"), "--valid-data", str(folder / "sft.jsonl")]
        flags += ["--max-valid-records", str(PROMPTS), "--reward-function", f"{folder / 'rules.py'}:rule"]
        start = [] if "--load" in extra else ["--load", str(folder / "prior"), "--finetune"]
        run = open_run(load_config("brain", [*flags, *start, *extra]))
        return Trainer(run, BrainStage(run))

    return make


def numbers(save):
    lines = read(save / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_validations_measure_the_distance_and_change_nothing_else(brain, tmp_path):
    brain("--save", str(tmp_path / "without")).train()
    brain("--posterior-samples", "64", "--posterior-prompts", "3", "--save", str(tmp_path / "with")).train()
    found = numbers(tmp_path / "with")
    assert numbers(tmp_path / "without") == [
        {name: value for name, value in line.items() if "posterior" not in name} for line in found
    ]
    validations = [line for line in found if "validation/posterior_reward" in line]
    assert [line["iteration"] for line in validations] == [0, 2, 4]
    first, *_, last = validations
    assert first["validation/posterior_kl_to_policy"] == first["validation/posterior_kl_to_prior"], "it is the prior"
    assert last["validation/posterior_kl_to_policy"] != first["validation/posterior_kl_to_policy"]
    for name in ("reward", "prior_reward", "kl_to_prior", "ess_alpha"):
        assert first[f"validation/posterior_{name}"] == last[f"validation/posterior_{name}"], (
            "it is the posterior's own"
        )


def test_a_resumed_run_gives_the_same_distances_with_and_without_a_file(brain, folder, tmp_path):
    data = ["--posterior-samples", "64", "--save-interval", "2", "--keep-best", "posterior_kl_to_policy"]
    brain(*data, "--save", str(tmp_path / "whole")).train()
    start = ["--load", str(tmp_path / "whole" / "iter_0000002"), "--prior-load", str(folder / "prior")]
    for name, file in (("again", []), ("file", ["--posterior-data", str(tmp_path / "p.jsonl")])):
        brain(*data, *start, *file, "--save", str(tmp_path / name)).train()
        assert numbers(tmp_path / name)[-1] == numbers(tmp_path / "whole")[-1]
    assert (tmp_path / "whole" / "best").exists()
    # The file serves evaluate, too: same prompts, prior and reward.
    shared = ["--posterior-data", str(tmp_path / "p.jsonl"), "--posterior-samples", "64"]
    found, _ = report(folder, tmp_path / "o.json", *shared, policy="prior")
    own = numbers(tmp_path / "whole")[0]
    assert found["metrics"]["posterior/reward"]["value"] == pytest.approx(own["validation/posterior_reward"])


def test_samples_are_scored_in_micro_batches_of_trainings_size(brain):
    trainer = brain("--posterior-samples", "64", "--posterior-prompts", "1", "--micro-batch-size", "2")
    samples = trainer.stage._held_out._samples
    steps = samples.steps(samples.rollouts())
    sizes = [len(part.responses) for step in steps for micro_batch in step for part in micro_batch]
    assert len(sizes) > 1 and set(sizes[:-1]) == {2 * 2} and sizes[-1] <= 4


def test_a_resumed_run_compares_the_prior_of_its_checkpoint_with_the_file(brain, folder, tmp_path):
    """The folder that the run began from holds newer weights by then."""
    sft = shutil.copytree(folder / "prior", tmp_path / "sft")
    data = ["--posterior-samples", "8", "--posterior-data", str(tmp_path / "p.jsonl")]
    flags = [
        *data,
        "--save-interval",
        "2",
        "--load",
        str(sft),
        "--finetune",
        "--save",
        str(tmp_path / "run"),
        "--auto-resume",
    ]
    brain(*flags, "--train-iters", "2").train()
    [newer] = (folder / "policy").glob("iter_*")
    shutil.copytree(newer, sft / "iter_0000099")
    (sft / "latest_checkpointed_iteration.txt").write_text("99")
    resumed = brain(*flags)
    assert resumed.run.resuming and resumed.stage._maker.prior.path.endswith("iter_0000003")
    resumed.train()
    # A run that starts from the newer weights has another prior.
    with pytest.raises(AgreedError, match="made in another way: prior is"):
        brain(*data, "--load", str(sft), "--finetune")


def test_the_place_in_the_file_says_which_prompt_samples_belong_to(folder, measured, tmp_path):
    name = "prior_samples.jsonl"
    shutil.copy(folder / f"{name}.json", tmp_path / f"{name}.json")
    lines = [{**line, "index": 10 + line["index"]} for line in rollouts(folder)]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, _ = report(
        folder, tmp_path / "o.json", "--posterior-samples", "512", "--posterior-data", str(tmp_path / name)
    )
    assert again == measured[0]


def test_a_file_with_rewards_of_another_scale_than_the_held_out_answers_is_refused(brain, tmp_path):
    data = ["--posterior-samples", "8", "--posterior-data", str(tmp_path / "p.jsonl")]
    first = brain(*data).stage._held_out._samples
    first._scale.load_state_dict({"one": [0.0, 2.0]})
    first.rollouts()
    other = brain("--posterior-samples", "8").stage._held_out._samples
    other._path, other._is_read = first._path, None
    other._scale.load_state_dict({"one": [0.0, 3.0]})
    with pytest.raises(
        AgreedError, match=r"p.jsonl: its rewards have the zero and unit .*2.0.* goes on with have .*3.0"
    ):
        other.open()
    other._scale.load_state_dict({"one": [0.0, 2.0]})
    other.open()
