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
    entropy: bool = False,
) -> float | None:
    """Set a number of every response in `steps`: its log-probability (policy) or reward (reward model).

    Args:
        run: the run.
        name: of the attribute of `Response`.
        steps: micro-batches that are computed together, on this replica.
        chunks: the model.
        head: its kind.
        temperature: divides the logits behind the log-probabilities.
        entropy: whether to compute the entropies of a policy too.

    Returns:
        the entropies of all response tokens summed, in nats, where they were asked for.
    """
    summed = 0.0
    for step in steps:
        # Packed and padded as the training step is: then both run the same products.
        scored = score_groups(
            chunks,
            [[part.group() for part in micro_batch] for micro_batch in step],
            run.parallel,
            head=head,
            shared_prefix=run.config.training.shared_prefix,
            window=len(step),
            temperature=temperature,
            entropy=entropy,
        )
        for micro_batch, scores in zip(step, scored, strict=True):
            for part, values in zip(micro_batch, scores, strict=True):
                if entropy:
                    values, entropies = values
                    summed += entropies.sum().item()
                for response, value in zip(part.responses, values.tolist(), strict=True):
                    setattr(part.rollout.responses[response], name, value)
    return summed if entropy else None
