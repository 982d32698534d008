"""Responses equal those of one process, token by token, at every layout."""

import pytest
from helpers.assets import SIZES

from distributed.world import Context, Layout, at

# Prompts have different lengths, an odd number of tokens in all, and fill more than one batch.
PROMPTS = [(5, 17, 99), (250, 3, 3, 8, 41, 77, 12), (9,), (5, 17, 99, 4), (301, 300)]
EOS = 217
SEED = 21
"""With this seed every draw is at least 5e-5 away from the border between two tokens' shares; rounding moves shares by
3e-7. With another seed a draw may be at a border, where processors choose different tokens."""


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
