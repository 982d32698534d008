"""Scores responses with all parts of the reward, on all ranks together."""

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from megatron_brain.config.rewards import RewardPart, describe
from megatron_brain.config.run import RunConfig
from megatron_brain.errors import RecordError
from megatron_brain.planning.summary import Row
from megatron_brain.stages.brain.placement import Step, rollouts_in
from megatron_brain.stages.brain.rollouts import Rollout
from megatron_brain.stages.brain.scoring import score_responses
from megatron_brain.stages.rewards.answers import Answer, answers_of
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.stages.rewards.server import RewardServer
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all
from megatron_brain.user_functions import ScoringFunction

log = logging.getLogger(__name__)

Scorer = Callable[[Sequence[Answer]], list[float]]


def reward_metric_names(config: RunConfig) -> tuple[str, ...]:
    """Names of the metrics of the parts."""
    return tuple(f"{metric}/{part.name}" for part in config.scoring.rewards for metric in ("reward", "reward_std"))


class Rewards:
    """The parts of the reward of --reward-load, --reward-function and --reward-url, and their weighted sum.

    Reward models score on all ranks. A function or a server scores every response once, on the rank that leads the
    replica of the response. All ranks call all methods, and if one rank fails, all raise the same error.

    Args:
        run: the run. A checkpoint is chosen at once and loaded when it is first needed. Functions are imported at once.

    Raises:
        AgreedError: on all ranks: there is no such checkpoint, file or function.
    """

    def __init__(self, run: Run) -> None:
        self._run, self.parts = run, run.config.scoring.rewards
        self._models = {
            part.name: FrozenModel(run, "reward", part.source, head="reward", offload=run.config.scoring.offload_reward)
            for part in self.parts
            if part.kind == "model"
        }
        self._scorers = {part.name: self._open(part) for part in self.parts if part.kind != "model"}

    def rows(self) -> list[Row]:
        """The parts as rows of the banner, and their sum where there are several."""
        if not self.parts:
            return []
        rows = []
        for part in self.parts:
            path = self._models[part.name].path if part.kind == "model" else part.source
            name = "reward model" if part.kind == "model" and len(self._models) == 1 else f"reward {part.name}"
            rows.append((name, str(path)))
        is_plain = len(self.parts) == 1 and self.parts[0].weight == 1
        return rows if is_plain else [*rows, ("reward", describe(self.parts))]

    def fingerprints(self) -> list[str]:
        """What tells the reward apart from others: kind, weight and contents of each part. A server's contents are not
        known, so that its address stands for them. With several parts, their names too.

        Raises:
            OSError: a file cannot be read.
        """
        found = []
        for part in self.parts:
            if part.kind == "model":
                contents = self._models[part.name].fingerprint()
            elif part.kind == "function":
                file, _, function = part.source.rpartition(":")
                contents = f"{function} {xxhash.xxh3_64_hexdigest(Path(file).read_bytes())}"
            else:
                contents = part.source
            name = f"{part.name}: " if len(self.parts) > 1 else ""
            found.append(f"{name}{part.weight:g} x {part.kind} {contents}")
        return found

    def score(self, steps: Sequence[Step], scale: Scale, *, in_one_call: int | None = None) -> None:
        """Fill in `reward_parts` and `reward` of all responses in `steps`.

        `reward_parts` holds what each part says. `reward` is the sum over functions and servers of weight times part,
        plus the mean over reward models of weight times standardised part. A single reward model is not standardised.

        Args:
            steps: this replica's micro-batches that are computed together. Their rollouts are whole, and `index` is
                unique among the rollouts of all replicas.
            scale: zero and unit of several reward models. What it lacks is measured on all these responses.
            in_one_call: the most responses that a function or a server scores in one call, which --reward-timeout
                limits; None: all.

        Raises:
            AgreedError: on all ranks: a part failed, was too slow, or gave something else than one finite number for
                each response. It names the part and the record.
        """
        rollouts = rollouts_in(steps)
        for part in self.parts:
            if part.kind == "model":
                self._score_with_model(part, steps, rollouts, scale)
            else:
                self._score_elsewhere(part, rollouts, in_one_call)
        for response in (response for rollout in rollouts for response in rollout.responses):
            first, *others = (self._term(part, response.reward_parts[part.name], scale) for part in self.parts)
            response.reward = sum(others, first)

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """For each part the mean over all replicas' groups of a group's mean reward, and of its deviation. They are the
        same on all ranks. A part that some response has no number of, as in a file of rollouts, is left out."""
        mine = []
        for rollout in rollouts:
            columns = {
                part.name: [response.reward_parts.get(part.name) for response in rollout.responses]
                for part in self.parts
            }
            mine.append({name: _mean_and_deviation(values) for name, values in columns.items() if None not in values})
        everyone = [group for replica in self._run.parallel.gather_over_data_parallel(mine) for group in replica]
        metrics = {}
        for name in (part.name for part in self.parts if all(part.name in group for group in everyone)):
            for place, metric in enumerate(("reward", "reward_std")):
                metrics[f"{metric}/{name}"] = math.fsum(group[name][place] for group in everyone) / len(everyone)
        return metrics

    def _open(self, part: RewardPart) -> Scorer | None:
        """The function or the server; None on the ranks that do not use it."""
        return read_on_all(
            lambda: _scorer(part, self._run) if self._run.parallel.leads_replica else None, self._run.parallel
        )

    def _score_with_model(
        self, part: RewardPart, steps: Sequence[Step], rollouts: Sequence[Rollout], scale: Scale
    ) -> None:
        with self._models[part.name].loaded() as chunks:
            for response, value in score_responses(self._run, steps, chunks, head="reward"):
                response.reward_parts[part.name] = value
        if len(self.parts) == 1:
            return
        read_on_all(lambda: _require_finite(part, rollouts), self._run.parallel)
        if len(self._models) > 1 and scale.lacks(part.name):
            rewards = {r.index: [response.reward_parts[part.name] for response in r.responses] for r in rollouts}
            everyone = self._run.parallel.gather_over_data_parallel(rewards)
            scale.measure(part.name, [values for replica in everyone for values in replica.values()])
            if scale.lacks(part.name):
                log.warning(
                    "%s %s gives all responses to a prompt the same reward; it counts 0 until it tells some apart",
                    part.flag,
                    part.source,
                )

    def _score_elsewhere(self, part: RewardPart, rollouts: Sequence[Rollout], in_one_call: int | None) -> None:
        """Score on the leading rank of the replica, and take its numbers on the others."""
        answers = answers_of(rollouts)
        size, calls = in_one_call or len(answers), 1
        if in_one_call is not None:
            calls = max(self._run.parallel.gather_over_world(math.ceil(len(answers) / in_one_call)))
        # All ranks wait together for each call: a replica may need fewer of them than others.
        slices = [answers[number * size : (number + 1) * size] for number in range(calls)]
        values = [value for some in slices for value in self._scored_elsewhere(part, some)]
        responses = (response for rollout in rollouts for response in rollout.responses)
        for response, value in zip(responses, values, strict=True):
            response.reward_parts[part.name] = value

    def _scored_elsewhere(self, part: RewardPart, answers: Sequence[Answer]) -> list[float]:
        parallel, scorer = self._run.parallel, self._scorers[part.name]
        mine = read_on_all(lambda: None if scorer is None else scorer(answers) if answers else [], parallel)
        everyone = parallel.gather_over_world((parallel.dp_rank, mine))
        return next(rewards for rank, rewards in everyone if rank == parallel.dp_rank and rewards is not None)

    def _term(self, part: RewardPart, value: float, scale: Scale) -> float:
        if part.kind != "model" or len(self._models) == 1:
            return part.weight * value
        return part.weight * scale.standardised(part.name, value) / len(self._models)


def _scorer(part: RewardPart, run: Run) -> Scorer:
    settings = run.config.scoring
    if part.kind == "url":
        return RewardServer(part, settings, run.tokenizer)
    function = ScoringFunction(part.source, "reward_function", timeout=(settings.reward_timeout, "--reward-timeout"))

    def score(answers: Sequence[Answer]) -> list[float]:
        return function(
            [answer.prompt for answer in answers],
            [answer.response for answer in answers],
            [answer.record for answer in answers],
            [answer.record_id for answer in answers],
        )

    return score


def _require_finite(part: RewardPart, rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        for response in rollout.responses:
            if not math.isfinite(value := response.reward_parts[part.name]):
                raise RecordError(rollout.id, "no reward", f"{part.flag} {part.source} gives {value} for a response")


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
