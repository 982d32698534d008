"""Makes the rollouts of a BRAIn round: sample from the proposal, score with proposal, prior and reward model."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_brain.config.errors import ConfigError
from megatron_brain.data.groups import Group
from megatron_brain.data.order import SampleOrder, replica_share
from megatron_brain.data.records import Prompt
from megatron_brain.generation.sampler import Sampler
from megatron_brain.models.provider import Chunk, Head
from megatron_brain.objectives.brain import posterior_log_weights
from megatron_brain.stages.rollouts import Response, Rollout, read_rollouts, write_rollouts
from megatron_brain.training.checkpointing import read_info
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer
from megatron_brain.training.validation import score_groups

log = logging.getLogger(__name__)

_TEXTS_SHOWN = 3


class RoundMaker:
    """Rollouts of one round after another, each replica making and keeping its own.

    Args:
        run: the run.
        prompts: prompts to sample, none where rollouts are read.
        files: rollout files to read, one a round.
    """

    def __init__(self, run: Run, prompts: Sequence[Prompt], files: Sequence[str]) -> None:
        self._run, self._prompts, self._files = run, prompts, files
        self._order = SampleOrder(len(prompts), seed=run.config.training.seed) if prompts else None
        sampling = run.config.sampling
        self._samples_plainly = sampling.temperature == 1.0 and sampling.top_p == 1.0 and sampling.top_k == 0
        # Loaded when a round first needs them; rollouts read from files may bring all numbers along. Which ones is
        # settled now: a folder that --save shares will hold newer checkpoints by then.
        self._models: dict[str, list[Chunk]] = {}
        self._checkpoints = {
            "prior": _checked(self._prior_folder(), "policy"),
            "reward": _checked(run.config.scoring.reward_load, "reward"),
        }
        self.proposal_is_policy = False

    def make(self, trainer: Trainer, number: int) -> tuple[list[Rollout], dict[str, float]]:
        """This replica's scored rollouts of a round, and metrics of making them (the same on all ranks)."""
        start = time.perf_counter()
        rollouts = self._read(number) if self._files else self._sample(trainer, number)
        self.proposal_is_policy = not self._files and self._samples_plainly and self._run.config.brain.refresh_proposal
        sampled = time.perf_counter()
        differences = self._score(trainer, rollouts, number)
        scored = time.perf_counter()
        self._set_alpha(rollouts)
        self._write(rollouts, number)
        tokens = sum(len(response.tokens) for rollout in rollouts for response in rollout.responses)
        totals = torch.tensor([tokens, *differences], dtype=torch.float64, device=trainer.parallel.device)
        tokens, difference, responses = trainer.parallel.sum_over_data_parallel(totals).tolist()
        metrics = {
            "seconds_sampling": sampled - start,
            "seconds_scoring": scored - sampled,
            "sampled_tokens_per_second": tokens / (sampled - start),
        }
        if responses:
            metrics["sampler_logprob_difference"] = difference / responses
        return rollouts, metrics

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of this replica in one optimizer step."""
        settings = self._run.config.training
        return settings.global_batch_size // (settings.micro_batch_size * self._run.parallel.dp_size)

    def share(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """This replica's part of all rollouts of a round."""
        return [rollout for share in self._deal(sorted(rollouts, key=lambda r: r.index)) for rollout in share]

    def micro_batches(self, rollouts: Sequence[Rollout]) -> list[list[Group]]:
        """This replica's rollouts as micro-batches, in the order of training."""
        size, parallel = self._run.config.training.micro_batch_size, self._run.parallel
        batch = self._run.config.training.global_batch_size
        for rollout in rollouts:
            owner = rollout.index % batch // size % parallel.dp_size
            assert owner == parallel.dp_rank, (
                f"group {rollout.index} of replica {owner} is on replica {parallel.dp_rank}"
            )
        groups = [rollout.group() for rollout in rollouts]
        return [groups[start : start + size] for start in range(0, len(groups), size)]

    def texts(self, rollouts: Sequence[Rollout]) -> list[tuple[str, str]]:
        """A few prompts with their best and worst sample, as (tag, Markdown)."""
        shown = []
        for place, rollout in enumerate(rollouts[:_TEXTS_SHOWN]):
            ranked = sorted(rollout.responses, key=lambda response: response.reward)
            lines = [f"    {rollout.prompt}", ""]
            lines += [f"* reward {r.reward:.3f}, alpha {r.alpha:.3f}: `{r.text}`" for r in (ranked[-1], ranked[0])]
            shown.append((f"samples/{place}", "\n".join(lines)))
        return shown

    def _deal(self, items: Sequence) -> list[list]:
        """Whole batches dealt to replicas exactly as training steps deal them."""
        settings, parallel = self._run.config.training, self._run.parallel
        batch = settings.global_batch_size
        return [
            micro_batch
            for start in range(0, len(items), batch)
            for micro_batch in replica_share(
                items[start : start + batch],
                micro_batch_size=settings.micro_batch_size,
                dp_rank=parallel.dp_rank,
                dp_size=parallel.dp_size,
            )
        ]

    def _read(self, number: int) -> list[Rollout]:
        path = self._files[number % len(self._files)]
        rollouts = read_rollouts(path)
        for rollout in rollouts:
            self._check_tokens(rollout, path)
        if len(rollouts) % self._run.config.training.global_batch_size:
            raise ConfigError(
                f"{path} holds {len(rollouts)} groups, not a multiple of "
                f"global_batch_size={self._run.config.training.global_batch_size}"
            )
        return self.share([dataclasses.replace(rollout, index=i) for i, rollout in enumerate(rollouts)])

    def _check_tokens(self, rollout: Rollout, path: str) -> None:
        """Token ids another engine wrote are the model's, and leave no response over --seq-length."""
        vocab_size, longest = self._run.config.model.vocab_size, self._run.config.data.seq_length
        for response in rollout.responses:
            tokens = (*rollout.prompt_tokens, *response.tokens)
            wrong = [token for token in tokens if not 0 <= token < vocab_size]
            if wrong:
                raise ConfigError(f"{path}, {rollout.id}: token id {wrong[0]} is outside 0..{vocab_size - 1}")
            if len(tokens) > longest:
                raise ConfigError(
                    f"{path}, {rollout.id}: prompt and response have {len(tokens)} tokens, --seq-length is {longest}"
                )

    def _sample(self, trainer: Trainer, number: int) -> list[Rollout]:
        run, count = self._run, self._run.config.brain.prompts_per_round
        # The place in the endless stream of prompts also seeds the samples: a prompt met again gets new ones.
        places = [place for share in self._deal(range(number * count, (number + 1) * count)) for place in share]
        prompts = [self._prompts[self._order[place]] for place in places]
        chunks = trainer.chunks if run.config.brain.refresh_proposal else self._model("prior")
        sampler = Sampler(chunks, run.parallel, run.config.sampling, eos_id=run.tokenizer.eos_id)
        samples = sampler.generate(
            [prompt.tokens for prompt in prompts],
            samples_per_prompt=run.config.sampling.samples_per_prompt,
            keys=places,
            seed=run.config.training.seed,
        )
        return [
            Rollout(
                id=prompt.record_id,
                index=place - number * count,
                prompt_tokens=prompt.tokens,
                prompt=prompt.text,
                responses=[
                    Response(
                        tokens=sample.tokens,
                        text=run.tokenizer.decode(sample.tokens),
                        finished=sample.finished,
                        sampler_logprob=sample.logprob,
                    )
                    for sample in drawn
                ],
            )
            for prompt, place, drawn in zip(prompts, places, samples, strict=True)
        ]

    def _score(self, trainer: Trainer, rollouts: list[Rollout], number: int) -> tuple[float, int]:
        """Fill in log_proposal, log_prior and reward where unknown.

        Returns:
            sum over responses of |trainer's - sampler's| log q', and their number (0 where there is no comparison).
        """
        difference, compared = 0.0, 0
        from_prior = not self._run.config.brain.refresh_proposal
        if not self._files and self._samples_plainly:
            # Rescored by the code that trains, so that beta is exactly 1/n before the first step.
            self._fill("log_proposal", rollouts, self._model("prior") if from_prior else trainer.chunks, "policy")
            pairs = [(r.log_proposal, r.sampler_logprob) for rollout in rollouts for r in rollout.responses]
            difference, compared = sum(abs(a - b) for a, b in pairs), len(pairs)
        elif not self._files:
            # Tempered or truncated: only the sampler knows the distribution it drew from.
            for rollout in rollouts:
                for response in rollout.responses:
                    response.log_proposal = response.sampler_logprob
        fresh = number == 0 and not self._run.resuming and self._run.config.scoring.prior_load is None
        if (from_prior or fresh) and not self._files and self._samples_plainly:
            for rollout in rollouts:
                for response in rollout.responses:
                    response.log_prior = response.log_proposal
        if self._is_missing("log_prior", rollouts):
            self._fill("log_prior", rollouts, self._model("prior"), "policy")
        if self._is_missing("reward", rollouts):
            self._fill("reward", rollouts, self._model("reward"), "reward")
        return difference, compared

    def _is_missing(self, name: str, rollouts: Sequence[Rollout]) -> bool:
        """Whether any replica lacks the number somewhere; all replicas of a layout must then score together."""
        mine = any(value is None for rollout in rollouts for value in rollout.values(name))
        return any(self._run.parallel.gather_over_data_parallel(mine))

    def _fill(self, name: str, rollouts: Sequence[Rollout], chunks: Sequence[Chunk], head: Head) -> None:
        scored = score_groups(
            chunks,
            self.micro_batches(rollouts),
            self._run.parallel,
            head=head,
            shared_prefix=self._run.config.training.shared_prefix,
            window=self.micro_batches_per_step,
        )
        for rollout, values in zip(rollouts, (group for batch in scored for group in batch), strict=True):
            for response, value in zip(rollout.responses, values.tolist(), strict=True):
                setattr(response, name, value)

    def _model(self, which: str) -> list[Chunk]:
        """The prior or the reward model, loaded when first needed."""
        if which not in self._models:
            directory = self._checkpoints[which]
            if directory is None:
                raise ConfigError(f"the rollouts hold no {which} values: give --{which}-load to compute them")
            self._models[which] = self._run.load_frozen(directory, "reward" if which == "reward" else "policy")
        return self._models[which]

    @property
    def prior(self) -> str | None:
        """Checkpoint of the prior, which a resumed run keeps."""
        return self._checkpoints["prior"]

    def keep_prior(self, path: str | None) -> None:
        """Take the prior of the run that is resumed, unless --prior-load names one."""
        if path is not None and self._run.config.scoring.prior_load is None:
            self._checkpoints["prior"] = _checked(path, "policy")

    def _prior_folder(self) -> str | None:
        """--prior-load, or else the checkpoint that a --finetune run starts from; a resumed policy is no prior."""
        checkpoint = self._run.config.checkpoint
        return self._run.config.scoring.prior_load or (checkpoint.load if checkpoint.finetune else None)

    def _set_alpha(self, rollouts: Sequence[Rollout]) -> None:
        settings = self._run.config.brain
        for rollout in rollouts:
            log_alpha = posterior_log_weights(
                *(torch.tensor(rollout.values(name)) for name in ("log_prior", "reward", "log_proposal")),
                reward_temperature=settings.reward_temperature,
                kind=settings.alpha,
            )
            for response, value in zip(rollout.responses, log_alpha.exp().tolist(), strict=True):
                response.alpha = value

    def _write(self, rollouts: Sequence[Rollout], number: int) -> None:
        directory = self._run.config.brain.rollout_dir
        if directory is None:
            return
        everyone = self._run.parallel.gather_over_data_parallel(rollouts)
        if self._run.parallel.is_writer:
            ordered = sorted((r for replica in everyone for r in replica), key=lambda rollout: rollout.index)
            write_rollouts(Path(directory) / f"round_{number:04d}.jsonl", ordered)


def _checked(directory: str | None, head: Head) -> str | None:
    """The checkpoint a folder holds now, refused if its model is of another kind."""
    if directory is None:
        return None
    info = read_info(directory)
    if info.head != head:
        raise ConfigError(f"{info.path} holds a {info.head} model, a {head} model is needed here")
    return str(info.path)
