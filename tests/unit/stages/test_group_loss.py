"""Losses of micro-batches are the objective's, in one pass or two, however groups are cut; any objective will do."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.toy_objective import Toy

from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import pack_groups
from megatron_brain.objectives.registry import OBJECTIVES
from megatron_brain.stages.brain import stage as stage_module
from megatron_brain.stages.brain.group_loss import GroupLoss
from megatron_brain.stages.brain.objectives import objective_of
from megatron_brain.stages.brain.placement import Part
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.training.reproduction import Reproduction, read_reproduction, write_reproduction

SIZES = (4, 2, 6)


def objective(name):
    if name == "toy":
        return Toy()
    config = RunConfig(stage="brain")
    config.brain.objective, config.brain.policy_strength, config.brain.clip_ratio = name, 0.5, 0.3
    return objective_of(config)


def rollouts_of(made):
    """Three scored groups with what the objective fixes, their log-probabilities near those of `outputs`."""
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for index, size in enumerate(SIZES):
        responses = []
        for number in range(size):
            length = 1 + (index + number) % 4
            near = (-2.0 * length + 0.3 * torch.randn(2, generator=generator)).tolist()
            reward = torch.randn(1, generator=generator).item()
            tokens = tuple(range(number + 1, number + 1 + length))
            responses.append(
                Response(tokens=tokens, log_prior=near[0], log_proposal=near[1], reward=reward, finished=number != 1)
            )
        rollout = Rollout(id=f"r{index}", index=index, prompt_tokens=(1, 2), responses=responses)
        for response, value in zip(responses, made.fix(rollout.numbers(made.needs)).tolist(), strict=True):
            response.fixed = {made.fixes: value}
        rollouts.append(rollout)
    return rollouts


def whole(rollout):
    return Part(rollout, tuple(range(len(rollout.responses))))


def pack(parts):
    return pack_groups([part.group() for part in parts], shared_prefix=True)


def outputs(batch):
    """Log-probabilities of the tokens, a function of the response and the token's place in it."""
    values = [
        -2.0 + 0.2 * torch.sin(torch.tensor(float(7 * group.prompt[0] + 3 * sum(tokens) + place)))
        for group in batch.groups
        for tokens in group.responses
        for place in range(len(tokens))
    ]
    return torch.stack(values).requires_grad_()


every_objective = pytest.mark.parametrize("name", [*OBJECTIVES, "toy"])


@every_objective
def test_a_micro_batch_is_the_sum_over_its_groups_and_reports_what_is_declared(name):
    made = objective(name)
    rollouts, losses = rollouts_of(made), GroupLoss(made)
    batch = pack(list(map(whole, rollouts)))
    output = outputs(batch)
    report = losses.of_batch(output, batch)
    log_policy = batch.sum_per_response(output.detach()).split(SIZES)
    numbers = [rollout.numbers(losses.names) for rollout in rollouts]
    expected = sum(made.loss(values, known) for values, known in zip(log_policy, numbers, strict=True))
    assert report.count == 3 and report.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert tuple(report.means) == losses.mean_metrics and tuple(report.maxima) == losses.max_metrics
    rewards = [torch.tensor(rollout.values("reward")) for rollout in rollouts]
    assert report.means["reward_mean"][0].item() == pytest.approx(sum(r.mean().item() for r in rewards), rel=1e-5)
    assert report.means["reward_std"][0].item() == pytest.approx(sum(r.std().item() for r in rewards), rel=1e-5)
    assert report.means["unfinished_fraction"][0].item() == pytest.approx(1 / 4 + 1 / 2 + 1 / 6)
    peaks = [made.measure(values, known) for values, known in zip(log_policy, numbers, strict=True)]
    for metric, value in report.maxima.items():
        assert value.item() == pytest.approx(max(peak[metric].item() for peak in peaks))


@pytest.fixture
def first_pass(monkeypatch):
    """What the stage makes of packed micro-batches and of what a forward pass gives for each."""

    def forward(chunks, batches, parallel):
        return [outputs(batch).detach() for batch in batches]

    def first_pass(made, micro_batches):
        stage = BrainStage.__new__(BrainStage)
        stage._config, stage._group_loss, stage._step = RunConfig(stage="brain"), GroupLoss(made), micro_batches
        trainer = SimpleNamespace(gathered_chunks=lambda: None, parallel=None)
        return stage, stage.prepare(trainer, [pack(parts) for parts in micro_batches])

    monkeypatch.setattr(stage_module, "forward", forward)
    return first_pass


@every_objective
def test_two_passes_over_cut_groups_give_loss_gradient_and_metrics_of_one(name, first_pass):
    made = objective(name)
    first, second, third = rollouts_of(made)
    cut = [
        [Part(first, (0, 2), is_whole=False)],
        [Part(first, (1, 3), is_whole=False), whole(second), Part(third, (1,), is_whole=False)],
        [Part(third, (0, 2, 3, 4, 5), is_whole=False)],
    ]
    stage, batches = first_pass(made, cut)
    found = [(output := outputs(batch), stage.loss(output, batch)) for batch in batches]
    assert [report.count for _, report in found] == [1, 1, 1], "each group counts where its first response is"
    for _, report in found:
        report.loss_sum.backward()

    together = pack([whole(rollout) for rollout in (first, second, third)])
    output = outputs(together)
    expected = stage._group_loss.of_batch(output, together)
    expected.loss_sum.backward()
    assert sum(report.loss_sum.item() for _, report in found) == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    for metric, (total, _) in expected.means.items():
        assert sum(report.means[metric][0].item() for _, report in found) == pytest.approx(total.item(), rel=1e-6)
    for metric, value in expected.maxima.items():
        assert max(report.maxima[metric].item() for _, report in found) == value.item()
    assert output.grad.abs().max() > 1e-3
    actual = {}
    for parts, (piece, _) in zip(cut, found, strict=True):
        tokens = iter(piece.grad.tolist())
        for part in parts:
            for number in part.responses:
                length = len(part.rollout.responses[number].tokens)
                actual[part.rollout.index, number] = [next(tokens) for _ in range(length)]
    gradients = [value for key in sorted(actual) for value in actual[key]]
    assert gradients == pytest.approx(output.grad.tolist(), rel=1e-5, abs=1e-7)


def test_a_micro_batch_without_groups_counts_nothing_and_has_a_graph():
    losses = GroupLoss(objective("brain"))
    batch = pack_groups([], shared_prefix=True, length=4)
    output = torch.zeros(0, requires_grad=True)
    report = losses.of_batch(output, batch)
    assert report.count == 0 and report.loss_sum.item() == 0 and report.loss_sum.requires_grad
    assert all(total.item() == 0 for total, _ in report.means.values())
    assert all(value.item() == -torch.inf for value in report.maxima.values())


def test_a_reproduction_file_of_a_second_pass_gives_its_loss_and_gradient_again(tmp_path, first_pass):
    made = objective("brain")
    parts = [Part(rollouts_of(made)[2], (0, 1, 2), is_whole=False)]
    stage, [batch, _] = first_pass(made, [parts, [Part(parts[0].rollout, (3, 4, 5), is_whole=False)]])
    numbers = {field.name: 0 for field in dataclasses.fields(Reproduction)}
    found = Reproduction(
        **numbers
        | {
            "stage": "brain",
            "layout": {},
            "other_micro_batches": (),
            "nonfinite_parameters": (),
            "shared_prefix": True,
            "length": batch.tokens.size(1),
            "temperature": 1.0,
            "known_gradient": tuple(batch.known_gradient.tolist()),
            "known_loss": batch.known_loss,
            "groups": batch.groups,
        }
    )
    write_reproduction(tmp_path / "found.json", found)
    again = read_reproduction(tmp_path / "found.json").batch()
    one, two = outputs(batch), outputs(again)
    reports = [stage.loss(one, batch), stage.loss(two, again)]
    assert reports[0].loss_sum.item() == reports[1].loss_sum.item() > 0
    for report in reports:
        report.loss_sum.backward()
    assert torch.equal(one.grad, two.grad) and one.grad.any()
    assert {k: v.item() for k, (v, _) in reports[0].means.items()} == {
        k: v.item() for k, (v, _) in reports[1].means.items()
    }
