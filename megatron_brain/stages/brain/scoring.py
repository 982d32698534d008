"""Fills in the numbers of responses that a model computes."""

from collections.abc import Sequence

from megatron_brain.models.provider import Chunk, Head
from megatron_brain.stages.brain.placement import Step
from megatron_brain.training.run import Run
from megatron_brain.training.validation import score_groups


def fill_in(
    run: Run,
    name: str,
    steps: Sequence[Step],
    chunks: Sequence[Chunk],
    *,
    head: Head,
    temperature: float = 1.0,
) -> None:
    """Set one number of every response in `steps`: its log-probability (policy) or its reward (reward model).

    Args:
        run: the run.
        name: name of the attribute of `Response`.
        steps: the micro-batches of this replica, for each step.
        chunks: the model's chunks.
        head: the model's head.
        temperature: the logits are divided by it before the log-probabilities are computed.
    """
    for step in steps:
        # Packing and padding are those of the training step, so that both compute the same matrix products.
        scored = score_groups(
            chunks,
            [[part.group() for part in micro_batch] for micro_batch in step],
            run.parallel,
            head=head,
            shared_prefix=run.config.training.shared_prefix,
            window=len(step),
            temperature=temperature,
        )
        for micro_batch, scores in zip(step, scored, strict=True):
            for part, values in zip(micro_batch, scores, strict=True):
                for response, value in zip(part.responses, values.tolist(), strict=True):
                    setattr(part.rollout.responses[response], name, value)
