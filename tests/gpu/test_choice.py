"""CUDA draws what the CPU draws. Not run on a GPU yet."""

import pytest
import torch

from megatron_brain.generation.choose import choose_tokens
from megatron_brain.generation.noise import exponentials, random_words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_cuda_gives_the_random_words_of_the_cpu():
    seeds = torch.arange(1000) * 2**53
    assert torch.equal(random_words(seeds.cuda(), 7, 900).cpu(), random_words(seeds, 7, 900))
    torch.testing.assert_close(
        exponentials(seeds.cuda(), 7, 900).cpu(), exponentials(seeds, 7, 900), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("options", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 50, 1.0), (1.0, 0, 0.9)])
def test_cuda_chooses_the_tokens_of_the_cpu_from_the_same_logits(options):
    logits = torch.randn(2000, 49152, generator=torch.Generator().manual_seed(1)) * 3
    named = dict(zip(("temperature", "top_k", "top_p"), options, strict=True))
    expected, logprobs = choose_tokens(logits.clone(), torch.arange(2000), 5, **named)
    tokens, found = choose_tokens(logits.cuda(), torch.arange(2000).cuda(), 5, **named)
    assert torch.equal(tokens.cpu(), expected)
    torch.testing.assert_close(found.cpu(), logprobs, atol=1e-5, rtol=0)
