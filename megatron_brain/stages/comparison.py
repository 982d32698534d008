"""Compares answers of policies to the same prompts, for the stages evaluate and brain.

A row is what is known of one prompt: texts of the answers by their names (`policy`), and numbers of them as
`kind/answer` (`reward/policy`).
"""

import math
from collections.abc import Mapping, Sequence

from megatron_brain.data.groups import Group
from megatron_brain.data.last_turn import encode_answer
from megatron_brain.data.records import Prompt
from megatron_brain.data.tokenizer.base import Before
from megatron_brain.errors import ConfigError
from megatron_brain.generation.batch import Completion
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.placement import Part
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.intervals import wins
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.validation import score_groups
from megatron_brain.user_functions import ScoringFunction

Tokens = tuple[int, ...]

_WINDOW = 16
"""Prompts whose answers a reward model scores in sequences of one padded length."""


def open_judge(name: str | None, prompts: Sequence[Prompt]) -> ScoringFunction | None:
    """The judge of --judge, if one is given.

    Raises:
        ConfigError: it cannot be loaded, or a prompt has no reference, with which it compares.
    """
    if name is None:
        return None
    judge = ScoringFunction(name, "judge")
    missing = next((prompt.record_id for prompt in prompts if prompt.reference is None), None)
    if missing is not None:
        raise ConfigError(
            f"judge={name}: it compares with references, and {missing} has none; give the record a completion, or "
            "leave --judge out"
        )
    return judge


def describe(run: Run, prompt: Prompt, answers: Mapping[str, Completion]) -> dict:
    """A row with the texts of the answers, their lengths in tokens, and whether they are unfinished."""
    row = {"id": prompt.record_id, "prompt": prompt.text, "reference": prompt.reference}
    for name, sample in answers.items():
        row[name] = run.tokenizer.decode_response(sample.tokens)
        row[f"length/{name}"] = len(sample.tokens)
        row[f"unfinished/{name}"] = float(not sample.finished)
    return row


def reference_tokens(run: Run, prompt: Prompt) -> Tokens:
    """The ids of a prompt's reference, which it must have."""
    assert prompt.reference is not None
    before = Before(prompt.text, prompt.tokens[-1])
    return tuple(
        encode_answer(run.tokenizer, prompt.reference, chat=prompt.chat, before=before, where=prompt.record_id)
    )


def log_ratios(
    run: Run, policy: Sequence[Chunk], prior: FrozenModel, prompts: Sequence[Prompt], samples: Sequence[Completion]
) -> list[float]:
    """log q(y|x) - log p(y|x) of one sample y ~ q per prompt, whose mean estimates KL(policy || prior) in nats."""
    groups = [
        [Group(prompt=prompt.tokens, responses=(sample.tokens,), record_id=prompt.record_id)]
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    under_policy = score_groups(policy, groups, run.parallel, head="policy", shared_prefix=True)
    with prior.loaded() as chunks:
        under_prior = score_groups(chunks, groups, run.parallel, head="policy", shared_prefix=True)
    return [(q[0] - p[0]).item() for q, p in zip(under_policy, under_prior, strict=True)]


def add_rewards(
    rewards: Rewards,
    scale: Scale,
    rows: Sequence[dict],
    prompts: Mapping[int, Prompt],
    answers: Sequence[Mapping[str, Tokens]],
) -> None:
    """Add the reward of each of a prompt's answers to the prompt's row, as `reward/answer`; of a reward with several
    parts also what each part says, as `reward/part/answer`. All ranks call it.

    Args:
        rewards: the parts of the reward, at least one.
        scale: zero and unit of several reward models.
        rows: one for each prompt of this replica, with the texts of the answers.
        prompts: these prompts by their places among those of all replicas.
        answers: the ids of the answers to each of them, by name.
    """
    rollouts, places = [], []
    for row, (place, prompt), named in zip(rows, prompts.items(), answers, strict=True):
        # Equal responses are scored once: at another place of a packed sequence their reward would differ by rounding.
        responses = {tokens: Response(tokens=tokens, text=row[name]) for name, tokens in named.items()}
        places.append({name: responses[tokens] for name, tokens in named.items()})
        rollouts.append(
            Rollout(
                id=prompt.record_id,
                index=place,
                prompt_tokens=prompt.tokens,
                prompt=prompt.text,
                record=prompt.record,
                responses=list(responses.values()),
            )
        )
    micro_batches = [[Part(rollout, tuple(range(len(rollout.responses))))] for rollout in rollouts]
    rewards.score([micro_batches[start : start + _WINDOW] for start in range(0, len(micro_batches), _WINDOW)], scale)
    for row, of_answer in zip(rows, places, strict=True):
        for name, response in of_answer.items():
            row[f"reward/{name}"] = response.reward
            if len(rewards.parts) > 1:
                row |= {f"reward/{part.name}/{name}": response.reward_parts[part.name] for part in rewards.parts}


def add_judge_scores(judge: ScoringFunction, rows: Sequence[dict], answers: Sequence[str]) -> None:
    """Add the judge's scores of some answers to the rows."""
    columns = {name: [row[name] for row in rows] for name in ("prompt", "reference", "id")}
    for name in answers:
        scores = judge(columns["prompt"], [row[name] for row in rows], columns["reference"], columns["id"])
        for row, score in zip(rows, scores, strict=True):
            row[f"judge/{name}"] = score


def require_finite(rows: Sequence[dict]) -> None:
    """Raise FloatingPointError if a model has computed NaN or infinity. A mean with it would mean nothing."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} of {row['id']} is {value}: the model gives no number for it. Are its weights finite "
                    "(python tools/inspect_checkpoint.py CHECKPOINT --finite)?"
                )


def column(rows: Sequence[dict], name: str) -> list[float] | None:
    """A number of every row; None if some row lacks it."""
    return [row[name] for row in rows] if all(name in row for row in rows) else None


def wins_over(rows: Sequence[dict], kind: str, one: str, other: str) -> list[float] | None:
    """For every row 1 where the number `kind` of answer `one` is larger than that of `other`, 0 where it is smaller,
    one half for a tie; None if some row lacks one. Equal texts tie, whatever their numbers."""
    scores, other_scores = column(rows, f"{kind}/{one}"), column(rows, f"{kind}/{other}")
    if scores is None or other_scores is None:
        return None
    same = [row.get(one) is not None and row.get(one) == row.get(other) for row in rows]
    return wins(scores, other_scores, ties=same)
