"""One set of weights in several precisions: scores, samples and gradients of each."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.stage_spec import Head
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.generation.sampler import Sampler
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.models.provider import Chunk
from megatron_brain.startup.disk import find_frozen
from megatron_brain.training.run import Run
from megatron_brain.training.validation import score_groups


def _fp8(fp8_format: str, *, ends: bool) -> Fp8Config:
    return Fp8Config(fp8_format=fp8_format, fp8_emulate=True, first_last_layers_bf16=ends)


PRECISIONS: dict[str, tuple[bool, Fp8Config]] = {
    "fp32": (False, Fp8Config()),
    "bf16": (True, Fp8Config()),
    "hybrid": (True, _fp8("hybrid", ends=False)),
    "hybrid_ends_bf16": (True, _fp8("hybrid", ends=True)),
    "e4m3": (True, _fp8("e4m3", ends=False)),
    "e4m3_ends_bf16": (True, _fp8("e4m3", ends=True)),
}
"""For each precision whether --bf16 is on, and the FP8 settings."""

SCORED = ("fp32", "bf16", "hybrid", "hybrid_ends_bf16")
"""The precisions of scores; e4m3 is left out, because its forward pass is that of hybrid."""

NO_TOKEN = -1
"""An EOS that is never drawn, so that responses have the greatest length."""


def run_in(run: Run, precision: str) -> Run:
    """The run in another precision."""
    bf16, fp8 = PRECISIONS[precision]
    model = dataclasses.replace(run.config.model, bf16=bf16)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model, fp8=fp8))


class Model:
    """The model of --NAME-load in one precision, its weights rounded to bfloat16. Other weights can replace them.

    Raises:
        ConfigError: there is none, or it holds another kind of model.
    """

    def __init__(self, run: Run, precision: str, name: str, directory: Path, head: Head) -> None:
        self._run = run_in(run, precision)
        self._head = head
        found = find_frozen(self._run.config, f"--{name}-load", str(directory), head, self._run.parallel.world_size)
        (self.chunk,) = self._run.load_frozen(found)
        self.take(self.weights())

    def weights(self) -> list[Tensor]:
        """Copies of the weights in bfloat16, so that every precision starts from the same numbers."""
        return [parameter.detach().bfloat16().clone() for parameter in self.chunk.parameters()]

    @torch.no_grad()
    def take(self, weights: Sequence[Tensor]) -> None:
        """Replace the weights by these."""
        for parameter, weight in zip(self.chunk.parameters(), weights, strict=True):
            parameter.copy_(weight)

    def scores(self, groups: Sequence[Group]) -> Tensor:
        """Sequence log-probabilities or rewards `[groups, n]` float32; each group is computed alone."""
        micro_batches = [[group] for group in groups]
        scored = score_groups([self.chunk], micro_batches, self._run.parallel, head=self._head, shared_prefix=True)
        return torch.stack([values for (values,) in scored])

    def gradient(self, groups: Sequence[Group], slopes: Tensor) -> list[Tensor]:
        """Gradient of `sum slopes * log-probabilities` (both `[groups, n]`) for all weights, summed in float32."""
        self.chunk.train().requires_grad_(True)
        totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.chunk.parameters()]
        for group, each in zip(groups, slopes, strict=True):
            batch = pack_groups([group], shared_prefix=True).to(self._run.parallel.device)
            (each.to(batch.tokens.device) * batch.sum_per_response(self.chunk(batch))).sum().backward()
            for total, parameter in zip(totals, self.chunk.parameters(), strict=True):
                total += parameter.grad
                parameter.grad = None
        self.chunk.eval().requires_grad_(False)
        return totals


def draw(run: Run, chunk: Chunk, prompts: Sequence[tuple[int, ...]]) -> list[Group]:
    """Groups of n responses of --max-new-tokens tokens each."""
    sampler = Sampler([chunk], run.parallel, run.config.sampling, eos_id=NO_TOKEN)
    count = run.config.sampling.samples_per_prompt
    samples = sampler.generate(prompts, seeds=sample_seeds(run.config.training.seed, range(len(prompts)), count))
    return [
        Group(prompt=prompt, responses=tuple(sample.tokens for sample in drawn))
        for prompt, drawn in zip(prompts, samples, strict=True)
    ]


def beginnings(groups: Sequence[Group], length: int) -> list[Group]:
    """The groups with only the first tokens of each response."""
    return [
        dataclasses.replace(group, responses=tuple(response[:length] for response in group.responses))
        for group in groups
    ]
