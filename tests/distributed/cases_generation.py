"""Responses equal those of one process, token by token, at every layout. So does every choice from the same logits."""

import math

import pytest
import torch
from helpers.assets import SIZES

from distributed.world import Context, Layout, at

# Prompts have different lengths, an odd number of tokens in all, and fill more than one batch.
PROMPTS = [(5, 17, 99), (250, 3, 3, 8, 41, 77, 12), (9,), (5, 17, 99, 4), (301, 300)]
EOS = 217
SEED = 21
"""Any would do: rounding moves probabilities by 3e-7, which changes one of a million draws."""


def generate(layout: Layout, **sampling: object) -> list[list[list[object]]]:
    """Tokens, log-probability and whether it ended in EOS, per prompt and sample. 3 samples of a tiny random model."""
    from megatron_brain.config.model import ModelConfig
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.config.stages import SamplingConfig
    from megatron_brain.generation.sampler import Sampler
    from megatron_brain.generation.seeds import sample_seeds
    from megatron_brain.models.architecture import resolve
    from megatron_brain.models.provider import build_model
    from megatron_brain.runtime import parallel as runtime

    # The weights are so large that the likeliest tokens are far apart and rounding does not swap them.
    sizes = ModelConfig(**SIZES, init_method_std=0.3, untie_embeddings_and_output_weights=True)
    model = resolve(sizes, None, "the test")
    config = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_virtual_stage,
    )
    parallel = runtime.start(config, seed=1, num_layers=model.num_layers)
    chunks = build_model(model, config, parallel, head="policy", seed=3)
    settings = SamplingConfig(**{"max_new_tokens": 20, "sampling_batch_size": 9} | sampling)
    results = Sampler(chunks, parallel, settings, eos_id=EOS).generate(
        PROMPTS, seeds=sample_seeds(SEED, [11, 12, 13, 14, 15], 3)
    )
    assert any(s.finished for samples in results for s in samples), "no response ends: choose another EOS"
    return [[[list(s.tokens), s.logprob, s.finished] for s in samples] for samples in results]


def expect_equal(actual: list, expected: list) -> None:
    for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        for (tokens, logprob, finished), (their_tokens, their_logprob, their_finished) in zip(
            mine, theirs, strict=True
        ):
            assert (tokens, finished) == (their_tokens, their_finished), f"prompt {index}"
            assert logprob == pytest.approx(their_logprob, abs=1e-4), f"prompt {index}"


@at(lambda layout: layout.dp == 1)
def case_greedy(layout: Layout, context: Context) -> None:
    actual = generate(layout, temperature=0.0)
    expect_equal(actual, context.reference("generation_greedy", actual))


@at(lambda layout: layout.dp == 1)
def case_sampled(layout: Layout, context: Context) -> None:
    actual = generate(layout, temperature=0.8)
    expect_equal(actual, context.reference("generation_sampled", actual))


@at(lambda layout: layout.dp == 1)
def case_sampled_top_k_top_p(layout: Layout, context: Context) -> None:
    actual = generate(layout, temperature=1.2, top_k=40, top_p=0.9)
    expect_equal(actual, context.reference("generation_filtered", actual))


def choices() -> dict[str, torch.Tensor]:
    """Logits `[B, V]` float32 of 240 ids, which 2 and 4 ranks cannot share in whole blocks, and of 1024, which they
    can: peaked ones, flat ones, ties, ids that do not exist, and rows that are not finite."""
    generator = torch.Generator().manual_seed(31)
    made = {}
    for vocabulary in (240, 1024):
        logits = torch.randn(24, vocabulary, generator=generator) * 3
        logits[8:12] *= 1e-3
        logits[12:16] = logits[12:16].round()
        logits[12:14, [5, vocabulary // 2, vocabulary - 50]] = 20.0
        logits[:, vocabulary - 40 :] = -torch.inf
        logits[20, vocabulary - 60], logits[21, 3], logits[22] = math.nan, math.inf, -torch.inf
        made[str(vocabulary)] = logits
    # So flat that the nucleus is not among the first candidates.
    made["flat"] = torch.randn(4, 4096, generator=generator) * 1e-3
    return made


@at(lambda layout: layout.tp > 1 and layout.pp == layout.dp == 1 and not layout.sp)
def case_choice_of_a_split_vocabulary(layout: Layout, context: Context) -> None:
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.generation.choose import choose_tokens
    from megatron_brain.runtime import parallel as runtime

    group = runtime.start(ParallelConfig(tensor_model_parallel_size=layout.tp), seed=1).groups.tp
    found = {}
    for name, logits in choices().items():
        for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 9, 1.0), (1.3, 700, 0.9), (1.0, 0, 0.95)):
            tokens, logprobs = choose_tokens(
                logits.chunk(layout.tp, dim=1)[group.rank()].clone(),
                torch.arange(len(logits)),
                2,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                group=group,
            )
            assert all(tokens[20:23] == -1), name
            logprobs = logprobs.masked_fill(tokens < 0, 0.0)
            found[f"{name} {temperature} {top_k} {top_p}"] = [tokens.tolist(), logprobs.tolist()]
    assert found == context.reference("choices", found)
