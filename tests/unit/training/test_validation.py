"""Log-probabilities of whole sequences, token by token."""

import pytest
import torch
from unit.models.test_gpt import build

from megatron_brain.data.groups import Segment
from megatron_brain.models.attention import PackedLayout
from megatron_brain.training.validation import token_logprobs


@torch.no_grad()
def test_every_token_after_the_first_gets_the_log_probability_of_the_softmax_of_its_logits(single):
    model = build(single, "policy")
    sequences = [(5, 3, 9, 1), (7, 2)]
    found = token_logprobs([model], sequences, single)
    for sequence, values in zip(sequences, found, strict=True):
        layout = PackedLayout(segments=(Segment(0, len(sequence)),))
        hidden = model.trunk(torch.tensor([sequence]), torch.arange(len(sequence))[None], layout)
        logits = (hidden[:, 0] @ model.output_weight.t())[:, : model.true_vocab_size]
        expected = logits.log_softmax(-1)[range(len(sequence) - 1), sequence[1:]]
        assert values == pytest.approx(expected.tolist(), abs=1e-5)
