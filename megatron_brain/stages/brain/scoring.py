"""The numbers of responses that a model computes."""

from collections.abc import Iterator, Sequence

from megatron_brain.config.stage_spec import Head
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.placement import Step
from megatron_brain.stages.brain.rollouts import Response
from megatron_brain.training.run import Run
from megatron_brain.training.validation import score_groups


def score_responses(
    run: Run, steps: Sequence[Step], chunks: Sequence[Chunk], *, head: Head, temperature: float = 1.0
) -> Iterator[tuple[Response, float]]:
    """Every response in `steps` with its log-probability in nats (policy) or its reward (reward model).

    All ranks of a layout iterate to the end together.

    Args:
        run: the run.
        steps: micro-batches that are computed together, on this replica.
        chunks: the model.
        head: its kind.
        temperature: divides the logits behind the log-probabilities.
    """
    for step in steps:
        # Micro-batches are packed and padded as the training step does it: then both run the same products.
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
                responses = (part.rollout.responses[place] for place in part.responses)
                yield from zip(responses, values.tolist(), strict=True)
