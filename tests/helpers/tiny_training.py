"""Trains a tiny model without a stage or data."""

import torch

from helpers.assets import SIZES
from megatron_brain.checkpointing import CheckpointSaver, TrainingState, load_training_state
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.training.optimizer import build_optimizer, wrap_for_training
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward_backward

BATCHES = [pack_groups([Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))], shared_prefix=True)]


class FakeTokenizer:
    def save(self, directory):
        directory.mkdir()
        (directory / "tokenizer.txt").write_text("a tokenizer")


class Training:
    """A tiny model with its optimizer and schedule."""

    def __init__(
        self,
        parallel,
        *,
        seed=1,
        head="policy",
        bf16=False,
        lr=1e-2,
        adam_eps=1e-8,
        layout=None,
        distributed_optimizer=False,
        fp8=None,
        batches=BATCHES,
        **sizes,
    ):
        model = resolve(ModelConfig(bf16=bf16, **SIZES | {"num_layers": 2} | sizes), None, "the test")
        self.config = RunConfig(stage="sft", model=model, parallel=layout or ParallelConfig())
        self.config.fp8 = fp8 or Fp8Config()
        self.config.optimizer.lr = lr
        self.config.optimizer.adam_eps = adam_eps
        self.config.optimizer.use_distributed_optimizer = distributed_optimizer
        self.parallel, self.head, self.batches = parallel, head, batches
        self.chunks = build_model(model, self.config.parallel, parallel, head=head, seed=seed, fp8=self.config.fp8)
        self.wrapped = wrap_for_training(self.chunks, self.config, parallel)
        self.optimizer, self.scheduler = build_optimizer(self.wrapped, self.config, 10)

    def step(self):
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = forward_backward(
            self.wrapped, self.batches, lambda o, b: LossOutput(loss_sum=-o.sum(), count=5), self.parallel
        )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return sum(output.loss_sum.item() for output in outputs)

    def saver(self, root, **options):
        return CheckpointSaver(root, self.config, self.parallel, FakeTokenizer(), head=self.head, **options)

    def state(self, **state):
        return TrainingState(optimizer=self.optimizer, scheduler=self.scheduler, **state)

    def save(self, root, iteration, *, with_optimizer=True, **state):
        state = self.state(**state) if with_optimizer else TrainingState(**state)
        self.saver(root).save(iteration, self.chunks, state)
        return root / f"iter_{iteration:07d}"

    def resume(self, info, **options):
        load_training_state(
            info,
            self.chunks,
            parallel=self.parallel,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            **options,
        )

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.chunks[0].named_parameters()}


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
