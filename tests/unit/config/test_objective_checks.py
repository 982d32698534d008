"""Objective, responses and their settings fit together, and none is given that nothing reads."""

import pytest

from megatron_brain.config.loader import load_config
from megatron_brain.errors import ConfigError

SAMPLED = "--train-data t --load c --finetune --reward-load r"
RSO = f"{SAMPLED} --responses rso --no-refresh-proposal"
FILES = "--load c --finetune --rollout-data r"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{SAMPLED} --objective dpo --samples-per-prompt 7", "--objective dpo takes multiples of 2 responses; use 8"),
        (f"{SAMPLED} --objective dpo --alpha hard", "alpha=hard is not read by --objective dpo: leave it out, or use"),
        (f"{SAMPLED} --objective rloo --policy-strength 0.1", "use --objective brain, dpo, ipo, rso-hinge or rso-sigm"),
        (f"{SAMPLED} --objective ipo --reward-temperature 2", "or use --objective brain$"),
        (f"{SAMPLED} --objective ipo --max-refresh-error 2", "not read by --objective ipo: leave it out$"),
        (f"{SAMPLED} --objective ipo --max-sampler-difference 2", "not read by --objective ipo: leave it out$"),
        (f"{SAMPLED} --clip-ratio 0.1", "not read by --objective brain: leave it out, or use --objective rloo or grpo"),
        (f"{SAMPLED} --clip-ratio 0 --objective rloo", "clip_ratio=0.0: must be positive"),
        (f"{SAMPLED} --kl-coefficient -1 --objective rloo", "kl_coefficient=-1.0: must not be negative"),
        (f"{SAMPLED} --objective dpo --rso-candidates 32", "rso_candidates=32 is read with --responses rso alone"),
        (f"{SAMPLED} --objective dpo --responses rso", "samples of the prior in all rounds; add --no-refresh-prop"),
        (f"{RSO} --objective rso-hinge --rso-candidates 6", "use --rso-candidates 8 or more"),
        (f"{RSO} --objective rso-hinge --rso-candidates 1", "rso_candidates=1: must be at least 2"),
        (f"{RSO} --objective rso-hinge --samples-per-prompt 7", "takes multiples of 2 responses; use 8"),
        (f"{RSO} --objective rso-hinge --temperature 0", "temperature=0.0"),
        (RSO, "nobody knows the probability of an accepted response, which --objective brain needs; use --responses"),
        (f"{RSO} --objective grpo", "which --objective grpo needs; .*--objective dpo, ipo, rso-hinge or rso-sigmoid"),
        (f"{SAMPLED} --objective rloo --responses given", "pairs have no rewards, which --objective rloo needs"),
        (f"{SAMPLED} --objective rloo --temperature 0.7", "temperature=0.7: .* far from 1 .* use --temperature 1, or"),
        (f"{SAMPLED} --objective grpo --top-k 40", "top_k=40: --objective grpo clips ratios .* use --top-k 0, or"),
        (f"{SAMPLED} --objective dpo --responses given", "add --no-refresh-proposal"),
        (f"{FILES} --objective dpo --responses rso", "responses=rso draws responses to --train-data, and rollout_data"),
        (f"{SAMPLED} --objective dop", "did you mean 'dpo'"),
    ],
)
def test_what_does_not_fit_is_named_with_its_cure(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config("brain", arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        f"{FILES} --objective dpo --samples-per-prompt 7",
        "--train-data t --load c --finetune --responses given --objective ipo --no-refresh-proposal",
        f"{RSO} --objective rso-hinge --reward-temperature 0.5 --policy-strength 0.05 --temperature 0.7 --top-k 40",
        f"{SAMPLED} --objective grpo --kl-coefficient 0 --clip-ratio 0.3 --max-refresh-error 1e-3",
        f"{SAMPLED} --objective dpo --no-refresh-proposal --baseline self-normalized",
        f"{SAMPLED} --objective dpo --no-refresh-proposal --max-sampler-difference 1e-3",
    ],
)
def test_what_fits_is_taken(arguments):
    assert load_config("brain", arguments.split()).brain.objective in arguments
