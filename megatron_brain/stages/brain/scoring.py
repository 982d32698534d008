"""The numbers of responses that a model computes."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_brain.config.stage_spec import Head
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.placement import Step
from megatron_brain.stages.brain.rollouts import Response
from megatron_brain.training.run import Run
from megatron_brain.training.validation import outputs_of_groups, score_groups


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


def score_tokens(
    run: Run, steps: Sequence[Step], chunks: Sequence[Chunk], *, temperature: float
) -> Iterator[tuple[Response, float, Tensor]]:
    """Every response in `steps` with its log-probability under a policy, and that of each of its tokens `[tokens]`.

    Arguments are those of `score_responses`, which gives the same sums. All ranks of a layout iterate to the end
    together.
    """
    for step in steps:
        outputs = outputs_of_groups(
            chunks,
            [[part.group() for part in micro_batch] for micro_batch in step],
            run.parallel,
            shared_prefix=run.config.training.shared_prefix,
            window=len(step),
            temperature=temperature,
        )
        for micro_batch, (batch, output) in zip(step, outputs, strict=True):
            responses = [part.rollout.responses[place] for part in micro_batch for place in part.responses]
            sums = batch.sum_per_response(output).tolist()
            yield from zip(responses, sums, batch.split_per_response(output), strict=True)
