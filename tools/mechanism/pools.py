"""Pools of samples: drawn from the proposal, scored by all models, with a sketch of every sample's gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechanism.sketch import Sketch
from megatron_brain.data.groups import pack_groups
from megatron_brain.data.records import Prompt
from megatron_brain.errors import ConfigError
from megatron_brain.generation.batch import Completion
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.placement import Part
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.brain.scoring import score_responses
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.run import Run

_SCORED_TOGETHER = 32
_DIFFERENTIATED_TOGETHER = 4
"""Responses of one packed sequence. More would share the prompt's forward pass better, but every response's backward
pass goes over the whole sequence."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N samples of one prompt. Equal responses are computed once."""

    rollout: Rollout
    """The distinct responses."""
    places: Tensor
    """Place `[N]` of each sample's response among them."""

    def of_all(self, values: Sequence[float]) -> Tensor:
        """Numbers `[N]` float64 of the samples, from those of the distinct responses."""
        return torch.tensor(values, dtype=torch.float64)[self.places]

    def parts(self, size: int) -> list[Part]:
        """The distinct responses, `size` at a time."""
        count = len(self.rollout.responses)
        return [
            Part(self.rollout, tuple(range(start, min(start + size, count))), is_whole=count <= size)
            for start in range(0, count, size)
        ]


def samples_of(run: Run, index: int, prompt: Prompt, drawn: Sequence[Completion]) -> Samples:
    """The samples of the prompt at place `index`."""
    distinct = {tokens: place for place, tokens in enumerate(dict.fromkeys(sample.tokens for sample in drawn))}
    rollout = Rollout(
        id=prompt.record_id,
        index=index,
        prompt_tokens=prompt.tokens,
        prompt=prompt.text,
        record=prompt.record,
        responses=[Response(tokens=tokens, text=run.tokenizer.decode_response(tokens)) for tokens in distinct],
    )
    return Samples(rollout=rollout, places=torch.tensor([distinct[sample.tokens] for sample in drawn]))


def log_probabilities(run: Run, chunk: Chunk, samples: Samples) -> Tensor:
    """log-probabilities `[N]` float64 of the samples under a policy."""
    steps = [[[part]] for part in samples.parts(_SCORED_TOGETHER)]
    return samples.of_all([value for _, value in score_responses(run, steps, [chunk], head="policy")])


def score_rewards(rewards: Rewards, pools: Sequence[Samples]) -> list[Tensor]:
    """Rewards `[N]` float64 of every pool."""
    rewards.score([[[part]] for samples in pools for part in samples.parts(_SCORED_TOGETHER)], Scale())
    return [samples.of_all([response.reward for response in samples.rollout.responses]) for samples in pools]


def last_parameters(chunk: Chunk, layers: int) -> list[Tensor]:
    """The parameters of the last `layers` layers and of the norm behind them.

    Raises:
        ConfigError: the model has fewer layers.
    """
    found = list(chunk.decoder.layers)
    if layers > len(found):
        raise ConfigError(f"--layers {layers}: the model has {len(found)}")
    return [parameter for part in (*found[-layers:], chunk.decoder.final_layernorm) for parameter in part.parameters()]


def gram_matrix(run: Run, chunk: Chunk, parameters: Sequence[Tensor], samples: Samples, sketch: Sketch) -> Tensor:
    """Inner products `[N, N]` float64 of the samples' gradients `d log q(y_i|x) / d parameters`, by their sketches.

    A packed sequence holds a few responses. Its graph is kept for as many backward passes.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    sketches = []
    for part in samples.parts(_DIFFERENTIATED_TOGETHER):
        batch = pack_groups([part.group()], shared_prefix=True).to(run.parallel.device)
        log_policy = batch.sum_per_response(chunk(batch))
        for place, value in enumerate(log_policy):
            keep = place + 1 < len(log_policy)
            sketches.append(sketch(torch.autograd.grad(value, parameters, retain_graph=keep)))
    distinct = torch.stack(sketches).double()
    return (distinct @ distinct.t())[samples.places][:, samples.places]
