"""Good checkpoints of the wrong kind, and runs that are resumed with something changed."""

from __future__ import annotations

import json

from bad_inputs.case import UNFINISHED_RUN, BadInput, Maker, Site


def _changed(*flags: str) -> Maker:
    """Resumes the sft run with other flags."""

    def make(site):
        argv = ["--train-data", str(site.assets.records("sft")), "--load", str(site.assets.policy), "--save", "saved"]
        return site.assets.sft(*argv, "--train-iters", "3", *flags)

    return make


def _changed_brain(*flags: str) -> Maker:
    return lambda site: site.assets.brain_again(str(site.assets.brain), *flags)


def _edited(kind: str, word: str, other: str, command: Maker) -> Maker:
    """Resumes with a file in which one record is another one of the same length."""

    def make(site):
        content = site.assets.records(kind).read_text()
        assert content.count(word) == 1
        return [*command(site), "--train-data", site.write(f"{kind}.jsonl", content.replace(word, other))]

    return make


def _fewer_records(site: Site) -> list[str]:
    lines = site.assets.records("sft").read_text().splitlines(keepends=True)
    return [*_changed()(site), "--train-data", site.write("sft.jsonl", "".join(lines[:6]))]


def _another_order(site: Site) -> list[str]:
    lines = site.assets.records("sft").read_text().splitlines(keepends=True)
    return [*_changed()(site), "--train-data", site.write("sft.jsonl", "".join(reversed(lines)))]


def _another_tokenizer(site: Site) -> list[str]:
    folder = site.copy(site.assets.tokenizer, "tok")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))
    return _changed("--tokenizer-model", "tok")(site)


def _another_stage(site: Site) -> list[str]:
    argv = site.assets.reward_on(str(site.assets.records("pairs")), "--load", str(site.assets.policy))
    return [argument for argument in argv if argument != "--finetune"]


def _without_prior(site: Site) -> list[str]:
    argv = site.assets.brain_again(str(site.assets.brain))
    place = argv.index("--prior-load")
    return argv[:place] + argv[place + 2 :]


def _brain(flag: str, kind: str) -> Maker:
    def make(site):
        return site.assets.brain_on(str(site.assets.records("prompts")), flag, str(getattr(site.assets, kind)))

    return make


def _evaluate(flag: str, kind: str) -> Maker:
    def make(site):
        models = ["--reward-load", str(site.assets.reward), flag, str(getattr(site.assets, kind))]
        return site.assets.evaluate(*models)

    return make


_UNCHANGED = r"Resume with the same data"
_ANEW = r"or start anew from the weights with --finetune"

CASES = [
    # The wrong kind of checkpoint.
    BadInput(
        "no optimizer",
        lambda site: _changed("--load", str(site.assets.base))(site),
        r"base/iter_0000000 holds no optimizer state",
        r"add --finetune",
        leaves=UNFINISHED_RUN,
    ),
    BadInput("another stage's", _another_stage, r"policy/iter_0000002 is of the sft stage", r"add --finetune"),
    BadInput(
        "a reward model to sample from",
        lambda site: site.assets.generate_from(site.assets.reward),
        r"reward/iter_0000001 is a reward model",
        r"give the SFT or BRAIn checkpoint",
    ),
    BadInput(
        "a policy that scores", _brain("--reward-load", "policy"), r"--reward-load: .*a policy", r"a reward model is"
    ),
    BadInput(
        "a prior that scores", _brain("--prior-load", "reward"), r"--prior-load: .*a reward model", r"a policy model is"
    ),
    BadInput(
        "no folder that scores", _brain("--reward-load", "hf"), r"/hf holds no checkpoint", r"given as --hf-model"
    ),
    BadInput(
        "a baseline that scores", _evaluate("--baseline-load", "reward"), r"a reward model", r"a policy model is needed"
    ),
    BadInput(
        "a policy that judges", _evaluate("--reward-load", "base"), r"--reward-load: .*a policy", r"a reward model is"
    ),
    # Resumed with something changed.
    BadInput(
        "an edited record",
        _edited("sft", "package 3: a small", "package 3: a large", _changed()),
        r"--train-data is not what it was trained on so far: .*sft.jsonl:4",
        _UNCHANGED,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "an edited prompt",
        _edited("prompts", "package 3: a small", "package 3: a large", _changed_brain()),
        r"--train-data is not what it was trained on so far: .*prompts.jsonl:4",
        _UNCHANGED,
        leaves=UNFINISHED_RUN,
    ),
    BadInput("another order", _another_order, r"--train-data is not what", _UNCHANGED, leaves=UNFINISHED_RUN),
    BadInput("fewer records", _fewer_records, r"num_samples was 4, is now 3", _UNCHANGED, leaves=UNFINISHED_RUN),
    BadInput("another end of text", _another_tokenizer, r"--train-data is not what", _UNCHANGED, leaves=UNFINISHED_RUN),
    BadInput("another seed", _changed("--seed", "7"), r"seed was 1234, is now 7", _ANEW, leaves=UNFINISHED_RUN),
    BadInput(
        "another batch",
        _changed("--global-batch-size", "4"),
        r"batch_size was 2, is now 4",
        _ANEW,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "another length",
        _changed("--seq-length", "60"),
        r"packed_length was 64, is now 60",
        _ANEW,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "another precision",
        _changed("--bf16"),
        r"policy/iter_0000002 was trained with bf16=False",
        r"resume in the same precision",
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "another seed of samples",
        _changed_brain("--seed", "7"),
        r"seed was 1234, is now 7",
        _ANEW,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "another round",
        _changed_brain("--prompts-per-round", "8"),
        r"cannot be resumed: steps_per_round was 2, is now 4",
        _ANEW,
        leaves=UNFINISHED_RUN,
    ),
    BadInput("no prior", _without_prior, r"prior_load is not set", r"give --prior-load, or --finetune"),
]
