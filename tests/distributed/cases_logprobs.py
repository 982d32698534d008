"""Log-probabilities over a split vocabulary equal those of one dense softmax in float64, at every layout."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed.world import Context, Layout, at
from megatron_brain.models import logprobs

POSITIONS, WIDTH, ROWS, TEMPERATURE = 11, 6, 40, 0.7
# No padding; some on the last rank; half of the rows, so all of the last rank if there are two; almost all rows.
VOCAB_SIZES = [40, 33, 20, 3]
# A chunk is one logit; less than a row; two or more rows of a rank, not only of real ids; or everything.
CHUNK_SIZES = [1, 13, 2 * ROWS + 1, 2**20]


@dataclass
class Problem:
    """Equal on all ranks: hidden `[N, h]`, weight `[V, h]`, targets `[N]`, the incoming gradient `[N]`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    slopes: Tensor
    vocab_size: int

    @classmethod
    def draw(cls, vocab_size: int) -> "Problem":
        generator = torch.Generator().manual_seed(vocab_size)
        hidden, weight, slopes = (
            torch.randn(shape, generator=generator) for shape in [(POSITIONS, WIDTH), (ROWS, WIDTH), (POSITIONS,)]
        )
        targets = torch.randint(vocab_size, (POSITIONS,), generator=generator)
        likeliest = (hidden @ weight[:vocab_size].t()).argmax(1)
        targets[::2] = likeliest[::2]
        targets[-2:] = torch.tensor([0, vocab_size - 1])
        return cls(2 * hidden, weight, targets, slopes, vocab_size)

    def dense(self) -> dict[str, Tensor]:
        """The result of one process from whole logits in float64."""
        hidden, weight = (tensor.double().requires_grad_() for tensor in (self.hidden, self.weight))
        logits = hidden @ weight[: self.vocab_size].t() / TEMPERATURE
        values = torch.log_softmax(logits, 1).gather(1, self.targets[:, None])[:, 0]
        values.backward(self.slopes.double())
        return {
            "logprobs": values.detach(),
            "entropy": torch.distributions.Categorical(logits=logits.detach()).entropy(),
            "is_top1": logits.argmax(1) == self.targets,
            "grad_hidden": hidden.grad,
            "grad_weight": weight.grad,
        }

    def split(self, group: dist.ProcessGroup, *, chunk_size: int, known: bool, loss_scale: float = 1.0):
        """The result of all ranks: gradients of hidden are summed, gradients of the weight are of a rank's own rows."""
        rows = slice(group.rank() * ROWS // group.size(), (group.rank() + 1) * ROWS // group.size())
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight[rows].clone().requires_grad_()
        scores = logprobs.vocab_parallel_token_scores(
            hidden, weight, self.targets, group=group, vocab_size=self.vocab_size, temperature=TEMPERATURE,
            chunk_size=chunk_size, known_gradient=self.slopes if known else None,
        )  # fmt: skip
        scores.logprobs.backward(loss_scale * self.slopes)
        dist.all_reduce(hidden.grad, group=group)
        gradients = {"grad_hidden": hidden.grad / loss_scale, "grad_weight": weight.grad / loss_scale}
        return scores._asdict() | gradients, rows


def tensor_parallel_group(layout: Layout) -> dist.ProcessGroup:
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.runtime import parallel as runtime

    config = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_virtual_stage,
    )
    return runtime.start(config, seed=1, num_layers=4).groups.tp


def expect_dense(layout: Layout, **options) -> None:
    group = tensor_parallel_group(layout)
    for vocab_size in VOCAB_SIZES:
        problem = Problem.draw(vocab_size)
        expected = problem.dense()
        for chunk_size in CHUNK_SIZES:
            actual, rows = problem.split(group, chunk_size=chunk_size, **options)
            for name, value in actual.items():
                wanted = expected[name][rows] if name == "grad_weight" else expected[name]
                where = f"{name}, {vocab_size} of {ROWS} ids, {chunk_size=}"
                torch.testing.assert_close(
                    value.detach().to(wanted.dtype),
                    wanted,
                    rtol=1e-5,
                    atol=2e-5,
                    msg=lambda text, w=where: f"{w}: {text}",
                )
            assert not actual["grad_weight"][max(0, vocab_size - rows.start) :].any(), "padding has a gradient"


@at(lambda layout: layout.pp == layout.dp == 1)
def case_recomputed(layout: Layout, context: Context) -> None:
    expect_dense(layout, known=False)


@at(lambda layout: layout.pp == layout.dp == 1)
def case_known_gradient(layout: Layout, context: Context) -> None:
    expect_dense(layout, known=True, loss_scale=1024.0)


@at(lambda layout: layout.pp == layout.dp == 1)
def case_broken_promise_on_every_rank(layout: Layout, context: Context) -> None:
    group, problem = tensor_parallel_group(layout), Problem.draw(VOCAB_SIZES[1])
    weight = problem.weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    values = logprobs.vocab_parallel_logprobs(
        problem.hidden, weight, problem.targets, group=group, vocab_size=problem.vocab_size,
        known_gradient=problem.slopes,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no multiple of known_gradient"):
        values.backward(problem.slopes.flip(0))


@at(lambda layout: layout.pp == layout.dp == 1)
def case_no_positions(layout: Layout, context: Context) -> None:
    group, problem = tensor_parallel_group(layout), Problem.draw(VOCAB_SIZES[1])
    weight = problem.weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    for known in (None, problem.slopes[:0]):
        weight.grad = None
        values = logprobs.vocab_parallel_logprobs(
            problem.hidden[:0], weight, problem.targets[:0], group=group, vocab_size=problem.vocab_size,
            known_gradient=known,
        )  # fmt: skip
        values.sum().backward()
        assert values.shape == (0,) and not weight.grad.any()


@at(lambda layout: layout.pp == layout.dp == 1)
def case_as_many_reductions_however_small_the_blocks(layout: Layout, context: Context) -> None:
    group, problem = tensor_parallel_group(layout), Problem.draw(VOCAB_SIZES[1])
    weight = problem.weight.chunk(group.size())[group.rank()]
    for compute, count in ((logprobs.vocab_parallel_logprobs, 2), (logprobs.vocab_parallel_token_scores, 3)):
        with mock.patch.object(logprobs.dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            compute(problem.hidden, weight, problem.targets, group=group, vocab_size=problem.vocab_size, chunk_size=1)
        assert all_reduce.call_count == (count if group.size() > 1 else 0)


@at(lambda layout: layout.pp == layout.dp == 1)
def case_entropy_moves_no_bit_of_the_log_probabilities(layout: Layout, context: Context) -> None:
    group, problem = tensor_parallel_group(layout), Problem.draw(VOCAB_SIZES[0])
    hidden = problem.hidden.repeat(50, 1) + torch.linspace(0, 1, 50 * POSITIONS)[:, None]  # Many different sums.
    arguments = hidden, problem.weight.chunk(group.size())[group.rank()], problem.targets.repeat(50)
    for chunk_size in CHUNK_SIZES[1:]:
        options = {"group": group, "vocab_size": problem.vocab_size, "chunk_size": chunk_size}
        scores = logprobs.vocab_parallel_token_scores(*arguments, **options)
        assert torch.equal(scores.logprobs, logprobs.vocab_parallel_logprobs(*arguments, **options)), chunk_size
