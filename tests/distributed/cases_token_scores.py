"""Entropy and top-1 agreement of a validation equal those from the logits of transformers."""

import pytest
import torch
from helpers.hf_models import write_hf_model
from transformers import AutoModelForCausalLM

from distributed.runs import flags_of, open_trainer
from distributed.world import Context, Layout, at
from megatron_brain.data.groups import Group

GROUPS, PROMPT, RESPONSE = 5, 4, 9


class Reference:
    """A model of transformers, and groups of one response. Every second token of a response is the likeliest."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        length = PROMPT + RESPONSE
        self.ids = torch.randint(320, (GROUPS, length), generator=torch.Generator().manual_seed(3))
        for place in range(PROMPT, length, 2):
            self.ids[:, place] = self._logits()[:, place - 1].argmax(1)
        self.mask = torch.rand(GROUPS, RESPONSE, generator=torch.Generator().manual_seed(4)) < 0.8
        self.groups = [
            Group(prompt=tuple(row[:PROMPT]), responses=(tuple(row[PROMPT:]),), loss_masks=(tuple(mask),))
            for row, mask in zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        ]

    @torch.no_grad()
    def _logits(self) -> torch.Tensor:
        return self.model(self.ids).logits.double()[:, :, :330]

    def scores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability, entropy and top-1 agreement of each response token, each `[GROUPS, RESPONSE]`."""
        logits, targets = self._logits()[:, PROMPT - 1 : -1], self.ids[:, PROMPT:]
        logprobs = logits.log_softmax(2).gather(2, targets[:, :, None])[:, :, 0]
        return logprobs, torch.distributions.Categorical(logits=logits).entropy(), logits.argmax(2) == targets


def start(layout: Layout, context: Context):
    """A trainer on a model of transformers, and that model."""
    folder = context.shared / "token_scores"
    if context.world_size == 1:
        write_hf_model(folder, "llama")
    extra = [
        "--tokenizer-model",
        str(context.assets / "tokenizer"),
        "--train-iters",
        "1",
        "--logprob-chunk-size",
        "400",
    ]
    trainer = open_trainer("sft", flags_of("sft", layout, context, "--hf-model", str(folder), *extra))
    return trainer, Reference(str(folder))


@at(lambda layout: layout.size == 2)
def case_validation_of_sft(layout: Layout, context: Context) -> None:
    trainer, reference = start(layout, context)
    trainer.stage._valid = [[group] for group in reference.groups]
    found = trainer.stage.validate(trainer)
    logprobs, entropy, is_top1 = (rows[reference.mask] for rows in reference.scores())
    assert 0.4 < is_top1.double().mean() < 0.7
    assert found["top1_accuracy"] == pytest.approx(is_top1.double().mean().item(), abs=1e-12)
    assert found["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
