"""Scored samples of the prior for held-out prompts, by which every policy's distance to the posterior is measured."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_brain.config.run import RunConfig
from megatron_brain.data.records import Prompt
from megatron_brain.errors import ConfigError, RecordError
from megatron_brain.files import write_whole
from megatron_brain.generation.engine import THE_PRIOR, Engine
from megatron_brain.generation.seeds import posterior_seeds
from megatron_brain.models.provider import Chunk
from megatron_brain.planning.summary import Row
from megatron_brain.stages.answers import my_share
from megatron_brain.stages.brain.placement import Placement, Step
from megatron_brain.stages.brain.rollouts import Response, Rollout, read_rollouts, write_rollouts
from megatron_brain.stages.brain.scoring import score_responses
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all, require_same_rollouts

log = logging.getLogger(__name__)

_DESCRIBED = {"prior", "reward", "max_new_tokens", "precision", "places", "reward_scale"}
"""What the description beside a file of samples says."""


class PriorSamples:
    """--posterior-samples N samples of the prior for each of the first --posterior-prompts prompts, with log p and
    reward.

    They are drawn at temperature 1 without truncation. Seed, place of the prompt and number of the sample decide each.
    So they are the same at every layout, except for rounding, and no other sample of a run has their draws. Equal
    samples to a prompt are one object, which is scored once. All ranks call all methods.

    Args:
        run: the run.
        prompts: all held-out prompts.
        engine: what draws the samples. It gets the weights of the prior.
        prior: the prior p.
        rewards: the parts of the reward, at least one.
        scale: zero and unit of several reward models: measured on the samples, if nothing else was scored before.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[Prompt],
        engine: Engine,
        prior: FrozenModel,
        rewards: Rewards,
        scale: Scale,
    ) -> None:
        self._run, self._engine, self._prior, self._rewards, self._scale = run, engine, prior, rewards, scale
        settings = run.config.posterior
        self._count, self._prompts = settings.posterior_samples, prompts[: settings.posterior_prompts]
        self._mine = my_share(self._prompts, run.parallel)
        self._placement = Placement.of(run.config, run.parallel)
        self._path = None if settings.posterior_data is None else Path(settings.posterior_data)
        self._rollouts: list[Rollout] | None = None
        self._is_read: bool | None = None
        """Whether the samples are those of --posterior-data; None until `open` has looked."""

    def open(self) -> None:
        """Read --posterior-data if it exists. A run that resumes first knows its prior and the scale of its rewards
        when it has read its checkpoint, and calls it then. A later call does nothing.

        Raises:
            AgreedError: on all ranks: the file has other prompts, or was made with another prior, reward, scale of the
                rewards or precision.
        """
        if self._is_read is not None:
            return
        # One rank looks: on the others the file may appear while they look.
        self._is_read = self._run.parallel.gather_over_world(self._path is not None and self._path.exists())[0]
        if self._is_read:
            self._rollouts = self._read()

    def rows(self) -> list[Row]:
        """Where the samples come from, as rows of the banner."""
        samples = f"{self._count} samples of the prior for each of {len(self._prompts):,} prompts"
        return [("posterior", f"{samples}, read from {self._path}" if self._is_read else samples)]

    def rollouts(self) -> list[Rollout]:
        """This replica's prompts with their samples; `index` is the place of the prompt. The first call draws and
        scores them, unless they were read, and writes --posterior-data.

        A function or a server gets about as many samples in one call as responses of a round, for which its time limit
        is meant. The scale of several reward models is measured on all samples together.

        Raises:
            AgreedError: as `open`.
            Interrupted: on all ranks: the process was asked to stop while the engine drew.
            AgreedError: on all ranks: a part of the reward failed, or a number is not finite.
        """
        self.open()
        if self._rollouts is None:
            start = time.perf_counter()
            rollouts = self._drawn()
            steps = self.steps(rollouts)
            for response, value in self.scored(steps):
                response.log_prior = value
            self._rewards.score(steps, self._scale, in_one_call=_responses_of_a_round(self._run))
            read_on_all(lambda: _require_finite(rollouts), self._run.parallel)
            self._write(rollouts)
            self._rollouts = rollouts
            log.info("%s, drawn and scored in %.0f s", self.rows()[0][1], time.perf_counter() - start)
        return self._rollouts

    def steps(self, rollouts: Sequence[Rollout]) -> list[Step]:
        """For each rollout the micro-batches of its distinct responses. As many are computed together as a micro-batch
        of training has, or as fit --max-tokens-per-micro-batch: more might not fit the memory.

        Raises:
            AgreedError: on all ranks: a prompt and a response do not fit it.
        """
        distinct = [
            dataclasses.replace(rollout, responses=list({each.tokens: each for each in rollout.responses}.values()))
            for rollout in rollouts
        ]
        config = self._run.config
        at_once = config.training.micro_batch_size * config.sampling.samples_per_prompt
        return read_on_all(
            lambda: [self._placement.alone(rollout, at_once=at_once) for rollout in distinct], self._run.parallel
        )

    def scored(self, steps: Sequence[Step], policy: Sequence[Chunk] | None = None) -> list[tuple[Response, float]]:
        """Every response in `steps` with its log-probability in nats under a policy; None: under the prior."""
        if policy is not None:
            return list(score_responses(self._run, steps, policy, head="policy"))
        with self._prior.loaded() as chunks:
            return list(score_responses(self._run, steps, chunks, head="policy"))

    def _drawn(self) -> list[Rollout]:
        """This replica's prompts with their samples, without numbers."""
        config = self._run.config
        sampling = dataclasses.replace(config.sampling, temperature=1.0, top_p=1.0, top_k=0)
        prompts, decode = [self._prompts[i] for i in self._mine], self._run.tokenizer.decode_response
        seeds = posterior_seeds(config.training.seed, self._mine, self._count)
        rollouts = [
            Rollout(id=prompt.record_id, index=i, prompt_tokens=prompt.tokens, prompt=prompt.text, record=prompt.record)
            for i, prompt in zip(self._mine, prompts, strict=True)
        ]
        known: list[dict[tuple[int, ...], Response]] = [{} for _ in rollouts]
        with self._prior.loaded() as chunks:
            if not (self._engine.keeps_weights and self._engine.holds == THE_PRIOR):
                self._engine.take_weights(chunks, THE_PRIOR)
            # A batch of the sampler has all responses to a prompt that it is asked for at one time.
            for start in range(0, self._count, sampling.sampling_batch_size):
                some = [of_prompt[start : start + sampling.sampling_batch_size] for of_prompt in seeds]
                drawn = self._engine.sample([prompt.tokens for prompt in prompts], seeds=some, sampling=sampling)
                for rollout, responses, samples in zip(rollouts, known, drawn, strict=True):
                    for each in samples:
                        if each.tokens not in responses:
                            text = decode(each.tokens)
                            responses[each.tokens] = Response(tokens=each.tokens, text=text, finished=each.finished)
                        rollout.responses.append(responses[each.tokens])
        return rollouts

    def _made_with(self) -> dict[str, Any]:
        """All that decides the samples' distribution and their numbers, besides the prompts."""
        return {
            "prior": self._prior.fingerprint(),
            "reward": self._rewards.fingerprints(),
            "max_new_tokens": self._run.config.sampling.max_new_tokens,
            "precision": _precision(self._run.config),
        }

    def _places(self) -> dict[str, str]:
        """Where prior and reward are, for people: equal ones may be elsewhere."""
        return {"prior": str(self._prior.path), "reward": ", ".join(place for _, place in self._rewards.rows())}

    def _write(self, rollouts: Sequence[Rollout]) -> None:
        if self._path is None:
            return
        everyone = self._run.parallel.gather_over_data_parallel(list(rollouts))
        ordered = sorted((r for replica in everyone for r in replica), key=lambda rollout: rollout.index)
        path = self._path

        def write() -> None:
            description = {**self._made_with(), "places": self._places(), "reward_scale": self._scale.state_dict()}
            # In this order: without its samples the description is written again.
            write_whole(_description(path), json.dumps(description, indent=1))
            write_rollouts(path, ordered)

        read_on_all(lambda: write() if self._run.parallel.is_writer else None, self._run.parallel)

    def _read(self) -> list[Rollout]:
        path, parallel = self._path, self._run.parallel
        assert path is not None
        made_with = read_on_all(lambda: _read_description(path), parallel)
        found = read_on_all(lambda: self._checked(path, made_with), parallel)
        require_same_rollouts(found, str(path), parallel)
        self._scale.load_state_dict(made_with["reward_scale"])
        return [found[i] for i in self._mine]

    def _checked(self, path: Path, made_with: Mapping[str, Any]) -> list[Rollout]:
        """The rollouts of all prompts, if the file has them and was made with what the run has."""
        places, places_then = self._places(), made_with["places"]
        changed = [
            f"{name} is {places.get(name, '')} {value}, and was {places_then.get(name, '')} {made_with[name]}"
            for name, value in self._made_with().items()
            if made_with[name] != value
        ]
        if changed:
            raise ConfigError(
                f"posterior_data={path} was made in another way: {'; '.join(changed)}. Give the name of a new file, or "
                "the settings of this one"
            )
        scale = self._scale.state_dict()
        if scale and scale != made_with["reward_scale"]:
            raise ConfigError(
                f"posterior_data={path}: its rewards have the zero and unit {made_with['reward_scale']} of each reward "
                f"model, and the held-out answers that the run goes on with have {scale}: give the name of a new file"
            )
        rollouts = read_rollouts(str(path), needs_log_proposal=False)
        if len(rollouts) < len(self._prompts):
            raise ConfigError(
                f"posterior_data={path} has samples for {len(rollouts)} prompts, the run measures on "
                f"{len(self._prompts)}: give the name of a new file, or --posterior-prompts {len(rollouts)}"
            )
        return [
            self._of_prompt(rollout, place, f"posterior_data={path}, {rollout.id}")
            for place, rollout in enumerate(rollouts[: len(self._prompts)])
        ]

    def _of_prompt(self, rollout: Rollout, place: int, where: str) -> Rollout:
        """A rollout of the file with the first N samples, if it is one of the prompt at this place."""
        prompt = self._prompts[place]
        if rollout.prompt_tokens != prompt.tokens or (prompt.record and rollout.record != prompt.record):
            raise ConfigError(
                f"{where}: prompt {place + 1} of the run is another one, {prompt.record_id}: give the name of "
                "a new file, or the prompts, tokenizer and lengths that this one was made with"
            )
        if len(rollout.responses) < self._count:
            raise ConfigError(
                f"{where}: it has {len(rollout.responses)} samples of a prompt: give the name of a new file, or "
                f"--posterior-samples {len(rollout.responses)}"
            )
        samples = rollout.responses[: self._count]
        if any(response.log_prior is None or response.reward is None for response in samples):
            raise ConfigError(f"{where}: a response has no log_prior or no reward: give the name of a new file")
        by_tokens = {response.tokens: response for response in samples}
        equal_ones = [by_tokens[response.tokens] for response in samples]
        return dataclasses.replace(rollout, index=place, responses=equal_ones)


def _responses_of_a_round(run: Run) -> int:
    """Responses of a replica; a stage without rounds has the default number of prompts."""
    config = run.config
    return -(-config.brain.prompts_per_round // run.parallel.dp_size) * config.sampling.samples_per_prompt


def _precision(config: RunConfig) -> str:
    """The number format that models compute in. With FP8, all its settings that are not the default ones."""
    if config.fp8.fp8_format is None:
        return "bf16" if config.model.bf16 else "float32"
    settings = dataclasses.asdict(config.fp8).items()
    return ", ".join(f"{name}={value}" for name, value in settings if value not in (None, False))


def _description(path: Path) -> Path:
    """The file beside the samples that says what they were made with."""
    return path.with_name(path.name + ".json")


def _read_description(path: Path) -> dict[str, Any]:
    place = _description(path)
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.keys() >= _DESCRIBED:
            return found
        problem = "it is no description of samples"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise ConfigError(
        f"posterior_data={path}: {place} does not say what it was made with ({problem}): give the name of a new file"
    )


def _require_finite(rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        for response in rollout.responses:
            for name, value in (("log p", response.log_prior), ("reward", response.reward)):
                if not math.isfinite(value):
                    raise RecordError(rollout.id, f"no {name}", f"a sample of the prior gets {value}")
