"""The pipeline schedule of one process against plain autograd."""

import dataclasses

import pytest
import torch
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.training.optimizer import wrap_for_training
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward, forward_backward, pack_micro_batches
from megatron_brain.training.validation import mean_loss, score_groups

MICRO_BATCHES = [
    [Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))],
    [Group(prompt=(9,), responses=((10, 11, 12, 13),)), Group(prompt=(14, 15), responses=((16,), (17, 18)))],
    [Group(prompt=(3, 2, 1), responses=((1,),))],
]


def build(parallel, head="policy", **changes):
    model = resolve(ModelConfig(init_method_std=0.2, **SIZES | changes), None, "the test")
    return build_model(model, ParallelConfig(), parallel, head=head, seed=1)


def squared_loss(output, batch):
    """A loss whose gradient depends on the output, counted in tokens."""
    return LossOutput(loss_sum=(output**2).sum(), count=output.numel())


def plain_gradients(model, batches):
    model.zero_grad()
    reports = [squared_loss(model(batch), batch) for batch in batches]
    (sum(r.loss_sum for r in reports) / sum(r.count for r in reports)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_micro_batches_are_padded_to_the_tensor_parallel_size_and_in_a_pipeline_to_the_longest(single):
    alone = pack_micro_batches(MICRO_BATCHES, dataclasses.replace(single, tp_size=4), shared_prefix=True)
    assert [batch.tokens.shape for batch in alone] == [(1, 8), (1, 12), (1, 4)]
    piped = pack_micro_batches(MICRO_BATCHES, dataclasses.replace(single, tp_size=4, pp_size=2), shared_prefix=True)
    assert [batch.tokens.shape for batch in piped] == [(1, 12)] * 3
    assert pack_micro_batches([], single, shared_prefix=True) == []
    in_fp8 = pack_micro_batches(
        MICRO_BATCHES, dataclasses.replace(single, tp_size=3), shared_prefix=True, multiple_of=16
    )
    assert [batch.tokens.shape for batch in in_fp8] == [(1, 48)] * 3


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_gradient_is_that_of_the_mean_over_the_global_batch(single, head):
    chunks = build(single, head)
    batches = pack_micro_batches(MICRO_BATCHES, single, shared_prefix=True)
    expected = plain_gradients(chunks[0], batches)
    chunks[0].zero_grad()
    wrapped = wrap_for_training(chunks, RunConfig(stage="sft"), single)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    reports = forward_backward(wrapped, batches, squared_loss, single)
    for name, parameter in chunks[0].named_parameters():
        difference = (parameter.main_grad - expected[name]).norm()
        assert difference <= 1e-5 * expected[name].norm(), name
    assert [report.count for report in reports] == [
        batch.targets.numel() if head == "policy" else batch.num_responses for batch in batches
    ]


def test_forward_only_reports_the_same_losses_and_leaves_no_gradient(single):
    chunks = build(single)
    batches = pack_micro_batches(MICRO_BATCHES, single, shared_prefix=True)
    reports = forward_backward(chunks, batches, squared_loss, single, forward_only=True)
    expected = [squared_loss(chunks[0](batch), batch) for batch in batches]
    assert [r.loss_sum.item() for r in reports] == pytest.approx([e.loss_sum.item() for e in expected])
    assert all(parameter.grad is None for parameter in chunks[0].parameters())


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_forward_returns_the_models_outputs_without_a_graph(single, head):
    chunks = build(single, head)
    batches = pack_micro_batches(MICRO_BATCHES, single, shared_prefix=True)
    outputs = forward(chunks, batches, single)
    for output, batch in zip(outputs, batches, strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, chunks[0](batch).detach())
    assert forward(chunks, [], single) == []


@pytest.mark.parametrize("dropout", ["hidden_dropout", "attention_dropout"])
def test_scoring_is_without_dropout_and_gives_the_mode_back(single, dropout):
    [model] = build(single, **{dropout: 0.5})
    batches = pack_micro_batches(MICRO_BATCHES, single, shared_prefix=True)
    first, second = (torch.cat(forward([model], batches, single)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(torch.cat([model(batch) for batch in batches]), first)
    assert model.training
    model.eval()
    forward([model], batches, single)
    assert not model.training


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_groups_are_scored_per_response_in_their_order(single, head, shared_prefix):
    chunks = build(single, head)
    # More micro-batches than are padded to one length.
    micro_batches = [MICRO_BATCHES[i % 3] for i in range(40)]
    scored = score_groups(chunks, micro_batches, single, head=head, shared_prefix=shared_prefix)
    assert [[len(values) for values in batch] for batch in scored[:3]] == [[2], [1, 2], [1]]
    for groups, values in zip(micro_batches, scored, strict=True):
        for group, actual in zip(groups, values, strict=True):
            alone = pack_groups([group], shared_prefix=False)
            output = chunks[0](alone).detach()
            expected = output if head == "reward" else alone.sum_per_response(output)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_validation_loss_is_the_mean_over_all_samples_however_they_are_batched(single):
    chunks = build(single)
    samples = [*MICRO_BATCHES] * 7
    reports = [squared_loss(chunks[0](b), b) for b in pack_micro_batches(samples, single, shared_prefix=True)]
    expected = (sum(r.loss_sum for r in reports) / sum(r.count for r in reports)).item()
    for micro_batch_size in (1, 4, 100):
        metrics = mean_loss(
            chunks, samples, squared_loss, single, micro_batch_size=micro_batch_size, shared_prefix=True
        )
        assert metrics == {"loss": pytest.approx(expected, rel=1e-5)}
    assert chunks[0].training


def test_validation_is_without_dropout_and_gives_the_mode_back(single):
    chunks = build(single, hidden_dropout=0.5)
    options = {"micro_batch_size": 2, "shared_prefix": True}
    first, second = (mean_loss(chunks, MICRO_BATCHES, squared_loss, single, **options) for _ in range(2))
    assert first == second
    assert chunks[0].training
