"""The parts of the reward: their order, names and weights, and what is wrong with settings that name them."""

import pytest

from megatron_brain.config.loader import load_config
from megatron_brain.config.rewards import describe, reward_parts
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.errors import ConfigError

BRAIN = ["--train-data", "t", "--load", "c", "--finetune"]


def parts(models=None, functions=None, urls=None, weights=None):
    return [(part.name, part.kind, part.weight) for part in reward_parts(models, functions, urls, weights)]


def test_parts_are_in_the_order_of_their_weights_models_then_functions_then_servers():
    assert parts("a/rm", "f.py:right", "http://host:80/x", "1,-0.5,2e1") == [
        ("rm", "model", 1.0),
        ("right", "function", -0.5),
        ("host", "url", 20.0),
    ]
    assert parts("a/rm, b/other") == [("rm", "model", 1.0), ("other", "model", 1.0)]


def test_names_are_those_of_folder_function_and_host_and_no_two_are_equal():
    named = parts("a/rm,b/rm/,c/rm", "f.py:rm,g.py:rm_2", "http://rm:1,http://rm:2")
    assert [name for name, *_ in named] == ["rm", "rm_2", "rm_3", "rm_4", "rm_2_2", "rm_5", "rm_6"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a,,b",), "reward_load=a,,b: there is nothing between two commas"),
        (("a,a",), "reward_load=a,a: a is named twice; name it once, and give it a larger weight"),
        ((None, "f.py"), "reward_function=f.py: give path/to/file.py:function"),
        ((None, None, "host:80"), "reward_url=host:80: is no address; write http://host:port/path"),
        (("a", "f.py:g", None, "1"), r"reward_weights=1: 1 weights for 2 parts; .*\(a, f.py:g\)"),
        (("a", None, None, "x"), "reward_weights=x: give numbers with commas between them"),
        (("a", None, None, "nan"), "each weight must be finite and not 0"),
        (("a", None, None, "0"), "each weight must be finite and not 0"),
    ],
)
def test_what_is_wrong_is_named_with_the_cure(given, message):
    with pytest.raises(ConfigError, match=message):
        parts(*given)


def test_the_sum_is_told_in_words():
    def told(*given):
        return describe(reward_parts(*given))

    assert told("a", None, None, None) == "a"
    assert told("a,b", "f.py:g", None, "1,2,0.5") == "mean of standardised (a, 2 x b) + 0.5 x g"


def test_each_of_the_three_is_a_reward_and_one_is_needed():
    for flags in (["--reward-load", "r"], ["--reward-function", "f.py:g"], ["--reward-url", "http://h"]):
        load_config("brain", [*BRAIN, *flags])
    with pytest.raises(ConfigError, match="no reward: the brain stage needs --reward-load, --reward-function or --re"):
        load_config("brain", BRAIN)
    with pytest.raises(ConfigError, match="pairs need no reward; drop --reward-function f.py:g"):
        pairs = ["--responses", "given", "--alpha", "hard", "--no-refresh-proposal"]
        load_config("brain", [*BRAIN, *pairs, "--reward-function", "f.py:g"])
    with pytest.raises(ConfigError, match="reward_weights=2: there is no reward to weigh"):
        load_config("brain", [*BRAIN, "--reward-weights", "2"])


def test_a_time_limit_is_shorter_than_that_of_the_processes_that_wait():
    late = [*BRAIN, "--reward-function", "f.py:g", "--reward-timeout", "600"]
    with pytest.raises(ConfigError, match=r"reward_timeout=600 seconds.*--distributed-timeout-minutes to 11 or more"):
        load_config("brain", late)
    load_config("brain", [*late, "--distributed-timeout-minutes", "11"])


def test_planner_and_dry_run_know_each_model_and_each_function():
    config = load_config(
        "brain", [*BRAIN, "--reward-load", "a/x,b/y", "--reward-function", "f.py:g", "--offload-reward"]
    )
    work = spec_of(config).work(config)
    assert [(m.name, m.flag, m.load, m.offloaded) for m in work.scoring] == [
        ("prior", "--prior-load", None, False),
        ("reward x", "--reward-load", "a/x", True),
        ("reward y", "--reward-load", "b/y", True),
    ]
    assert work.user_code == (("--reward-function", "f.py:g"),)
    config = load_config("brain", [*BRAIN, "--reward-load", "a/x"])
    assert [m.name for m in spec_of(config).work(config).scoring] == ["prior", "reward"]
