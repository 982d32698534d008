"""The gradient study on a tiny model: gradients and sketches, and the whole of it."""

import csv
import json

import gradient_study
import pytest
import torch
from helpers.assets import SIZES, write_assets
from mechanism.pools import Samples, gram_matrix, last_parameters
from mechanism.sketch import DIMENSIONS, Sketch

from megatron_brain.checkpointing import CheckpointSaver, TrainingState
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.stages.brain.rollouts import Response, Rollout


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def a_model(single):
    # Weights so large that few tokens are likely, for their gradients to have something in common.
    model = resolve(ModelConfig(**SIZES, init_method_std=0.5), None, "the test")
    (chunk,) = build_model(model, ParallelConfig(), single, head="policy", seed=1)
    return model, chunk.eval().requires_grad_(False)


def checkpoint(folder, assets, single, *, moved=0.0):
    """A policy; of those that have moved, the last layer has other weights."""
    model, chunk = a_model(single)
    generator = torch.Generator().manual_seed(0)
    for parameter in last_parameters(chunk, 1):
        parameter += moved * torch.randn(parameter.shape, generator=generator)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(assets / "tokenizer"))
    config = RunConfig(stage="sft", model=model)
    CheckpointSaver(folder, config, single, tokenizer, head="policy").save(1, [chunk], TrainingState())
    return folder


class OneProcess:
    """The part of a run that gradients need."""

    def __init__(self, parallel):
        self.parallel = parallel


RESPONSES = ((4, 5), (6, 7, 8), (9,), (10, 11, 12, 13), (5, 4))
PLACES = torch.tensor([0, 1, 2, 1, 3, 4, 0])


@pytest.mark.parametrize("layers", [1, 4])
def test_inner_products_are_those_of_each_response_alone(single, layers):
    _, chunk = a_model(single)
    rollout = Rollout(id="a", index=0, prompt_tokens=(1, 2, 3), responses=[Response(tokens=each) for each in RESPONSES])
    parameters = last_parameters(chunk, layers)
    found = gram_matrix(
        OneProcess(single), chunk, parameters, Samples(rollout=rollout, places=PLACES), Sketch(parameters, seed=0)
    )
    gradients = []
    for tokens in RESPONSES:
        batch = pack_groups([Group(prompt=(1, 2, 3), responses=(tokens,))], shared_prefix=False)
        log_policy = chunk(batch).sum()
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(log_policy, parameters)]))
    exact = torch.stack(gradients).double()[PLACES]
    assert sum(parameter.numel() for parameter in parameters) == exact.size(1)
    lengths = exact.norm(dim=1)
    error = (found - exact @ exact.t()) / (lengths[:, None] * lengths)
    # Five standard errors, which the few parameters of the tiny model stay far below.
    assert error.abs().max() < 5 * (2 / DIMENSIONS) ** 0.5


def test_the_error_of_a_sketch_is_that_of_its_dimensions():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5000, generator=generator)
    parts = [(each[:1234].view(2, 617), each[1234:]) for each in (one, other)]
    sketches = [Sketch(parts[0], seed=seed, dimensions=127) for seed in range(300)]
    squares = torch.tensor([sketch(parts[0]).square().sum() for sketch in sketches]) / one.square().sum()
    products = torch.tensor([(sketch(parts[0]) * sketch(parts[1])).sum() for sketch in sketches])
    assert squares.mean() == pytest.approx(1.0, abs=0.03)
    assert squares.std() == pytest.approx((2 / 127) ** 0.5, rel=0.2)
    assert products.mean() == pytest.approx((one @ other).item(), abs=4 * products.std().item() / 300**0.5)


def test_a_gradient_in_one_column_has_no_larger_error():
    one = torch.zeros(4096, 64)
    one[:, 7] = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    squares = torch.tensor([Sketch([one], seed=seed, dimensions=509)([one]).square().sum() for seed in range(100)])
    assert (squares / one.square().sum()).std() == pytest.approx((2 / 509) ** 0.5, rel=0.3)


def test_more_layers_than_the_model_has_are_refused(single):
    with pytest.raises(ConfigError, match="the model has 4"):
        last_parameters(a_model(single)[1], 5)


def flags(folder, **changed):
    given = {
        **{"proposal": folder / "proposal", "policies": f"{folder / 'proposal'},{folder / 'moved'}"},
        **{"prompts": folder / "prompts.jsonl", "reward-function": f"{folder / 'rule.py'}:rule"},
        **{"reward-temperature": 0.5, "max-new-tokens": 2, "max-prompt-length": 60, "max-prompts": 4, "samples": 96},
        **{"sizes": "2,8", "layers": 2, "threads": 1, "output": folder / "study.json"},
    }
    return [f"--{name}={value}" for name, value in {**given, **changed}.items()]


@pytest.fixture
def models(single, threads, tmp_path):
    """A folder with data, a proposal, a policy that has moved, and a rule for rewards."""
    write_assets(tmp_path)
    checkpoint(tmp_path / "proposal", tmp_path, single)
    checkpoint(tmp_path / "moved", tmp_path, single, moved=0.05)
    (tmp_path / "rule.py").write_text(
        "def rule(prompts, responses, records):\n    return [float(each[:1].isalpha()) for each in responses]\n"
    )
    return tmp_path


def test_the_whole_study_of_a_tiny_model(models):
    pytest.importorskip("matplotlib")
    assert gradient_study.main(flags(models, csv=models / "study.csv", figure=models / "study.svg")) == 0
    report = json.loads((models / "study.json").read_text())
    proposal, moved = report["policies"]
    assert proposal["drift"] == {
        "kl_from_proposal": 0.0,
        "kl_to_proposal": pytest.approx(0.0, abs=1e-12),
        "max_ratio": 1.0,
        "ess_beta": pytest.approx(1.0),
    }
    assert moved["drift"]["max_ratio"] > 1.1 and moved["drift"]["ess_beta"] < 0.99
    figures = {
        policy["policy"]: {(row["baseline"], row["n"]): row for row in policy["figures"]}
        for policy in report["policies"]
    }
    at_start, later = (figures[policy["policy"]] for policy in (proposal, moved))
    for n in (2, 8):
        for name in ("bias", "variance", "cosine"):
            values = [at_start[baseline, n][name]["value"] for baseline in ("self-normalized", "unnormalized")]
            assert values[0] == pytest.approx(values[1], abs=1e-9)
        assert later["self-normalized", n]["variance"] != later["unnormalized", n]["variance"]
        assert at_start["self-normalized", n]["variance"]["value"] < at_start["none", n]["variance"]["value"]
    assert at_start["none", 8]["variance"]["value"] < at_start["none", 2]["variance"]["value"]
    rows = list(csv.DictReader((models / "study.csv").open()))
    assert len(rows) == 2 * 3 * 2
    assert float(rows[0]["variance"]) == proposal["figures"][0]["variance"]["value"]
    assert "<svg" in (models / "study.svg").read_text()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": "2,32"}, "at least 128"),
        ({"sizes": "1,2"}, "at least two responses"),
        ({"sizes": "two"}, "numbers with commas"),
        ({"reward-temperature": 0}, "greater than 0"),
        ({"layers": 0}, "--layers 0"),
    ],
)
def test_impossible_settings_are_named(changed, said, tmp_path, capsys):
    assert gradient_study.main(flags(tmp_path, **changed)) == 2
    assert said in capsys.readouterr().err


def test_a_missing_policy_is_named_before_anything_is_drawn(models, capsys):
    assert gradient_study.main(flags(models, policies=f"{models / 'proposal'},{models / 'nowhere'}")) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and "drawn" not in said
