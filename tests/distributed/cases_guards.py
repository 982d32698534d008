"""A number that is not finite on one rank stops the update on all. Weights that differ between ranks are found."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed.runs import flags_of, open_trainer, random_start, step
from distributed.world import Context, Layout, at

# TP4 is the slowest layout over gloo, and splits nothing that TP2 and eight ranks do not split.
not_tp4 = at(lambda layout: layout.tp < 4)
_SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@not_tp4
def case_a_step_with_nan_on_one_rank_is_skipped_by_all(layout: Layout, context: Context) -> None:
    """NaN is in the loss, or in one weight's gradient with a finite loss. The run continues as if without the step."""
    weights, expected = _one_skipped_by_hand(layout, context)
    single = context.reference("guards_skipped", expected)
    assert expected == pytest.approx(single, rel=1e-5)
    for inject, extra in ((_nan_loss, []), (_nan_gradient, _SHARDED)):
        folder = context.shared / f"guards_{context.world_size}_{layout.name}_{inject.__name__}"
        trainer = _trainer(layout, context, "--on-nan", "skip", "--tensorboard-dir", str(folder), *extra)
        step(trainer)
        before = _weights(trainer), _moments(trainer)
        with inject(trainer) as (micro_batch, record, rank):
            metrics = step(trainer)
        _assert_equal(_weights(trainer), before[0])
        _assert_equal(_moments(trainer), before[1])
        assert trainer.iteration == 2 and metrics["skipped_steps"] == 1
        assert all(not p.main_grad.any() for chunk in trainer.gathered_chunks() for p in chunk.parameters())
        _assert_culprit(trainer, folder / "nonfinite", micro_batch, record, rank)
        following = _numbers(step(trainer))
        if extra:
            assert following == pytest.approx(expected, rel=1e-5)
        else:
            assert following == expected, "what follows is not what follows a step that was left out"
            _assert_equal(_weights(trainer), weights)


@not_tp4
def case_a_flipped_bit_names_the_weight_and_the_rank(layout: Layout, context: Context) -> None:
    trainer = _trainer(layout, context, "--check-replicas-interval", "2")
    step(trainer)
    step(trainer)
    last = dist.get_world_size() - 1
    name, parameter = _held_twice(trainer)
    if trainer.parallel.rank == last and parameter is not None:
        parameter.data.view(torch.int32).view(-1)[0] ^= 1
    if context.world_size == 1:
        return
    from megatron_brain.training.replicas import check_replicas

    text = "nothing"
    try:
        check_replicas(trainer.gathered_chunks(), trainer.parallel)
    except RuntimeError as error:
        text = str(error)
    told = trainer.parallel.gather_over_world((text, name))
    assert len({text for text, _ in told}) == 1, "ranks tell different stories"
    assert f"{told[last][1]} over" in told[0][0]
    assert f"(global ranks {last} against" in told[0][0] or f"against {last})" in told[0][0]


def _trainer(layout: Layout, context: Context, *extra: str):
    flags = [*random_start(context), "--seq-length", "32", "--train-iters", "6", "--lr-warmup-iters", "2", *extra]
    return open_trainer("sft", flags_of("sft", layout, context, *flags))


def _numbers(metrics: dict[str, float]) -> list[float]:
    return [metrics[name] for name in ("loss", "grad_norm", "lr")]


def _one_skipped_by_hand(layout: Layout, context: Context) -> tuple[list[torch.Tensor], list[float]]:
    """Weights and numbers after three steps. The second step changed only the position in the data."""
    trainer = _trainer(layout, context)
    step(trainer)
    trainer.iteration += 1
    trainer.scheduler.step(increment=1)
    numbers = _numbers(step(trainer))
    return _weights(trainer), numbers


def _weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in trainer.gathered_chunks() for p in chunk.parameters()]


def _moments(trainer) -> list[torch.Tensor]:
    """The tensors of the optimizer: moments and step counts."""
    states = (state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values())
    return [value.clone() for state in states for value in state.values() if torch.is_tensor(value)]


def _assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def _target(trainer) -> tuple[int, str]:
    """The last micro-batch of the last replica in the next step, and its last record. Equal on all ranks."""
    mine = trainer.stage.micro_batches(trainer)
    return trainer.parallel.gather_over_data_parallel((len(mine) - 1, mine[-1][-1].record_id))[-1]


def _holds(batch, record: str) -> bool:
    return any(group.record_id == record for group in batch.groups)


@contextmanager
def _nan_loss(trainer):
    """Put NaN into the loss of one micro-batch, on one tensor-parallel rank only. Every gradient stays finite."""
    micro_batch, record = _target(trainer)
    stage, parallel, plain = trainer.stage, trainer.parallel, trainer.stage.loss

    def loss(output, batch):
        result = plain(output, batch)
        if _holds(batch, record) and parallel.tp_rank == parallel.tp_size - 1:
            result.loss_sum.add_(math.nan)
        return result

    stage.loss = loss
    yield micro_batch, record, None
    del stage.loss


class _NanWeightGradient(torch.autograd.Function):
    """The identity. Its backward pass gives one weight a NaN and everything else the right gradient."""

    @staticmethod
    def forward(ctx, output, weight):
        ctx.save_for_backward(weight)
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full_like(ctx.saved_tensors[0], math.nan)


@contextmanager
def _nan_gradient(trainer):
    """Put NaN into the gradient of one norm on the world's last rank. Nothing else changes before the reduction."""
    micro_batch, record = _target(trainer)
    last = trainer.parallel.world_size - 1
    norm, here = trainer.gathered_chunks()[-1].decoder.layers[-1].input_layernorm, [False]

    def look(module, args):
        here[0] = _holds(args[0], record)

    def poison(module, args, output):
        return _NanWeightGradient.apply(output, module.weight) if here[0] else output

    handles = []
    if trainer.parallel.rank == last:
        handles = [trainer.gathered_chunks()[-1].register_forward_pre_hook(look), norm.register_forward_hook(poison)]
    yield micro_batch, record, last
    for handle in handles:
        handle.remove()


def _assert_culprit(trainer, folder: Path, micro_batch: int, record: str, rank: int | None) -> None:
    """The files and the history name the micro-batch, the record, and only the rank at fault if there is one."""
    dist.barrier()
    found = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    parallel = trainer.parallel
    assert all(f["iteration"] == 2 and f["micro_batch"] == micro_batch for f in found)
    assert all(f["other_micro_batches"] == [] for f in found)
    assert all(f["data_rank"] == parallel.dp_size - 1 for f in found)
    assert all(f["groups"][-1]["record_id"] == record for f in found)
    (history,) = trainer.guard.state_dict()["skipped_in_a_row"]
    assert f"micro-batch {micro_batch}: " in history and record in history
    assert len(set(parallel.gather_over_world(history))) == 1, "ranks tell different stories"
    if rank is None:
        assert len(found) == parallel.pp_size and all(f["tensor_rank"] == parallel.tp_size - 1 for f in found)
        assert all(f["loss"] == "NaN" and f["nonfinite_parameters"] == [] for f in found)
        return
    assert [f["rank"] for f in found] == [rank]
    assert found[0]["nonfinite_parameters"] == ["decoder.layers.3.input_layernorm.weight"]
    assert isinstance(found[0]["loss"], float)


def _held_twice(trainer) -> tuple[str, torch.nn.Parameter | None]:
    """A weight that another rank holds too: with replicas any weight, else a norm, else the tied embedding."""
    from megatron_brain.models.parameter_names import global_parameters

    parameters, parallel = dict(global_parameters(trainer.gathered_chunks())), trainer.parallel
    if parallel.dp_size > 1 or parallel.tp_size > 1:
        return next((name, p) for name, p in parameters.items() if name.endswith("layernorm.weight"))
    if parallel.is_last_pipeline_stage:
        return "embedding.word_embeddings.weight", parameters.get("output_layer.weight")
    return "", None
