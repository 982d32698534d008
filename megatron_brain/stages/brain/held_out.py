"""Answers held-out prompts while the policy trains, and compares them with the prior's answers."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import xxhash

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import VALID_DATA
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.records import Prompt
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import THE_PRIOR, Engine
from megatron_brain.generation.seeds import held_out_seeds
from megatron_brain.models.provider import Chunk
from megatron_brain.objectives.posterior import DISTANCES
from megatron_brain.stages.answers import gather_rows, my_share
from megatron_brain.stages.comparison import (
    add_judge_scores,
    add_rewards,
    describe,
    log_ratios,
    open_judge,
    require_finite,
    wins_over,
)
from megatron_brain.stages.posterior import add_distances
from megatron_brain.stages.prior_samples import PriorSamples
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.best import Direction
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all
from megatron_brain.training.trainer import Trainer

log = logging.getLogger(__name__)

_TEXTS_SHOWN = 3
_WAYS = {"sampled": "", "greedy": "greedy_"}
"""How prompts are answered, with the beginnings of the names of the metrics."""
_DIVERGENCES = ("kl_alpha_beta", "kl_to_policy")
"""The distances to the posterior that the policy has. The others are the posterior's own, or say how sure they are."""


def held_out_metrics(config: RunConfig) -> dict[str, Direction | None]:
    """The metrics of validations, and whether the highest or the lowest value is the best; None: neither."""
    if config.data.valid_data is None:
        return {}
    kinds = [name for name, is_given in _kinds(config).items() if is_given]
    found: dict[str, Direction | None] = {"kl_to_prior": "lowest", "seconds": None}
    for way in _WAYS.values():
        found |= {f"{way}response_length": None, f"{way}unfinished_fraction": "lowest"}
        for kind in kinds:
            found |= {f"{way}{kind}_mean": "highest", f"{way}prior_{kind}_mean": None}
            found[f"{way}win_rate_{kind}"] = "highest"
        found |= {f"{way}reward/{name}": direction for name, direction in _parts(config).items()}
    if config.posterior.posterior_samples:
        found |= {f"posterior_{name}": "lowest" if name in _DIVERGENCES else None for name in DISTANCES}
    if "judge" in kinds:
        found |= {f"{way}win_rate_judge_reference": "highest" for way in _WAYS.values()}
        found["reference_judge_mean"] = None
    return found


def _kinds(config: RunConfig) -> dict[str, bool]:
    """The kinds of scores that answers may have, and whether they have them."""
    return {"reward": bool(config.scoring.rewards), "judge": config.scoring.judge is not None}


def _parts(config: RunConfig) -> dict[str, Direction]:
    """The names of the parts of the reward, where it has several, and whether it is large where they are."""
    parts = config.scoring.rewards
    return {part.name: "highest" if part.weight > 0 else "lowest" for part in parts} if len(parts) > 1 else {}


class HeldOut:
    """The held-out prompts with the prior's answers to them.

    The policy and the prior answer with the same random draws, which depend on the seed and the prompt's place alone.
    So two equal models give equal answers, and no validation changes what the run trains on. All ranks call all methods
    that say so; numbers and texts are the same on all ranks and, except for rounding, at every layout.

    Args:
        run: the run.
        prompts: those of its --valid-data.
        engine: what draws the answers. It gets the weights of policy and prior.
        prior: the prior p.
        rewards: the parts of the reward; without any, answers get no rewards.

    Raises:
        AgreedError: on all ranks: the judge or --posterior-data cannot be used.
    """

    def __init__(
        self, run: Run, prompts: Sequence[Prompt], engine: Engine, prior: FrozenModel, rewards: Rewards
    ) -> None:
        self._run, self._engine, self._prior, self._rewards = run, engine, prior, rewards
        self._prompts, self._mine = prompts, my_share(prompts, run.parallel)
        # It is measured on the prior's answers: that of the run is measured on what the run trains on.
        self._scale = Scale()
        judge = run.config.scoring.judge
        self._judge = read_on_all(lambda: open_judge(judge, prompts), run.parallel)
        sampling = dataclasses.replace(run.config.sampling, samples_per_prompt=1)
        self._ways = {"sampled": sampling, "greedy": dataclasses.replace(sampling, temperature=0.0)}
        self._samples: PriorSamples | None = None
        if run.config.posterior.posterior_samples:
            self._samples = PriorSamples(run, prompts, engine, prior, rewards, self._scale)
            if not run.resuming:
                self._samples.open()
        self._by_prior: list[dict] | None = None
        """The rows of all prompts with the prior's answers."""
        self._kl: float | None = None

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Answer the prompts with the policy as it is, and with the prior if that has not been done. All ranks call it.

        Returns:
            the metrics that `held_out_metrics` names.

        Raises:
            Interrupted: on all ranks, if the process was asked to stop while the engine drew.
            FloatingPointError: on all ranks, if a model gives a number that is not finite.
            AgreedError: on all ranks, if the judge or the reward fails.
        """
        start = time.perf_counter()
        if self._samples is not None:
            self._samples.rollouts()  # Several reward models are standardised by them.
        if self._by_prior is None:
            self._by_prior = self._answer_by_prior()
        rows = self._answer(trainer.gathered_chunks(), f"iteration {trainer.iteration}")
        rows = [of_prior | row for of_prior, row in zip(self._by_prior, rows, strict=True)]
        require_finite(rows)
        for tag, text in self._texts(rows):
            trainer.logger.log_text(trainer.iteration, tag, text)
        kinds = [name for name, is_given in _kinds(self._run.config).items() if is_given]
        metrics = summarize(rows, kinds, [*_parts(self._run.config)])
        self._kl = metrics["kl_to_prior"]
        return {**metrics, "seconds": time.perf_counter() - start}

    def end_reason(self) -> str | None:
        """Why the run ends, if the last validation was beyond --stop-at-kl."""
        limit = self._run.config.brain.stop_at_kl
        if limit is None or self._kl is None or self._kl <= limit:
            return None
        return (
            f"the KL to the prior on the held-out prompts is {self._kl:.4g} nats, more than --stop-at-kl {limit:g}; "
            "to go on, raise it or leave it out"
        )

    def _answer_by_prior(self) -> list[dict]:
        with self._prior.loaded() as chunks:
            drawn = self._draw(chunks, THE_PRIOR, self._ways)
        named = {f"prior_{way}": samples for way, samples in drawn.items()}
        rows = self._scored_rows(named)
        return self._judged(self._gather(rows), [*named, "reference"])

    def _answer(self, policy: Sequence[Chunk], label: str) -> list[dict]:
        plain = dataclasses.replace(self._ways["sampled"], temperature=1.0, top_p=1.0, top_k=0)
        drawn = self._draw(policy, label, {**self._ways, "plain": plain})
        of_policy = drawn.pop("plain")
        rows = self._scored_rows(drawn)
        answered = [self._prompts[i] for i in self._mine]
        for row, difference in zip(rows, log_ratios(self._run, policy, self._prior, answered, of_policy), strict=True):
            row["kl_to_prior"] = difference
        if self._samples is not None:
            add_distances(self._run, self._samples, policy, dict(zip(self._mine, rows, strict=True)))
        return self._judged(self._gather(rows), [*drawn])

    def _draw(
        self, chunks: Sequence[Chunk], label: str, ways: Mapping[str, SamplingConfig]
    ) -> dict[str, list[Completion]]:
        """One answer to each of this replica's prompts for each way. Equal ways give the same answers."""
        if not (self._engine.keeps_weights and self._engine.holds == label):
            self._engine.take_weights(chunks, label)
        prompts = [self._prompts[i].tokens for i in self._mine]
        seeds = held_out_seeds(self._run.config.training.seed, self._mine)
        drawn: dict[str, list[Completion]] = {}
        for name, sampling in ways.items():
            twin = next((other for other in drawn if ways[other] == sampling), None)
            drawn[name] = (
                [sample for [sample] in self._engine.sample(prompts, seeds=seeds, sampling=sampling)]
                if twin is None
                else drawn[twin]
            )
        return drawn

    def _scored_rows(self, drawn: Mapping[str, Sequence[Completion]]) -> list[dict]:
        """This replica's rows of the answers, with their rewards."""
        prompts = {i: self._prompts[i] for i in self._mine}
        answers = [{name: samples[k] for name, samples in drawn.items()} for k in range(len(prompts))]
        rows = [describe(self._run, prompt, named) for prompt, named in zip(prompts.values(), answers, strict=True)]
        if self._rewards.parts:
            tokens = [{name: sample.tokens for name, sample in named.items()} for named in answers]
            add_rewards(self._rewards, self._scale, rows, prompts, tokens)
        return rows

    def _gather(self, rows: Sequence[dict]) -> list[dict]:
        """The rows of all replicas, in the order of the prompts."""
        return gather_rows(list(zip(self._mine, rows, strict=True)), self._run.parallel)

    def _judged(self, rows: list[dict], answers: Sequence[str]) -> list[dict]:
        """The rows of all replicas with the judge's scores. Only the writing rank asks the judge."""
        judge, parallel = self._judge, self._run.parallel
        if judge is None:
            return rows
        read_on_all(lambda: add_judge_scores(judge, rows, answers) if parallel.is_writer else None, parallel)
        names = [f"judge/{name}" for name in answers]
        scores = parallel.gather_over_world(
            [{name: row[name] for name in names} for row in rows] if parallel.is_writer else None
        )[0]
        return [row | judged for row, judged in zip(rows, scores, strict=True)]

    def _texts(self, rows: Sequence[dict]) -> Iterator[tuple[str, str]]:
        """The first few prompts with their answers, as (tag, Markdown)."""
        for place, row in enumerate(rows[:_TEXTS_SHOWN]):
            lines = [f"    {row['prompt']}", ""]
            for name in ("prior_greedy", "greedy", "prior_sampled", "sampled"):
                scores = [
                    f"{kind} {row[f'{kind}/{name}']:.3f}" for kind in ("reward", "judge") if f"{kind}/{name}" in row
                ]
                lines.append(f"* {', '.join([name.replace('_', ', '), *scores])}: `{row[name]}`")
            yield f"held_out/{place}", "\n".join(lines)

    def state_dict(self) -> dict:
        """JSON-able state, the same on all ranks, which all call it. The samples of the prior are not in it, which
        would be megabytes in every checkpoint: they are in --posterior-data, or drawn again with the same draws."""
        made_with = read_on_all(self._made_with, self._run.parallel)
        return {"made_with": made_with, "kl_to_prior": self._kl, "reward_scale": self._scale.state_dict()}

    def records(self) -> list[dict]:
        """This replica's share of the prior's answers."""
        return [] if self._by_prior is None else [{"held_out": i, "row": self._by_prior[i]} for i in self._mine]

    def load_state_dict(self, state: Mapping | None, records: Sequence[Mapping]) -> None:
        """Go on with the prior's answers of an earlier run, if they were made in the same way. All ranks call it.

        Args:
            state: what `state_dict` returned; None: the run had no held-out prompts.
            records: what `records` returned, of all replicas.

        Raises:
            AgreedError: on all ranks: --posterior-data cannot be used, as in `PriorSamples.open`.
        """
        if state is not None:
            self._take_up(state, records)
        if self._samples is not None:
            self._samples.open()

    def _take_up(self, state: Mapping, records: Sequence[Mapping]) -> None:
        self._kl = state["kl_to_prior"]
        before, now = state["made_with"], read_on_all(self._made_with, self._run.parallel)
        mine = [name for name, value in now.items() if before.get(name) != value]
        # Rank 0 decides: checkpoints without checksums may look different to other nodes.
        changed = self._run.parallel.gather_over_world(mine)[0]
        if changed:
            log.warning(
                "the prior answers the held-out prompts anew: its answers were made with another %s. Win-rates are not "
                "those of before",
                ", ".join(changed),
            )
        elif records:
            self._scale.load_state_dict(state["reward_scale"])
            self._by_prior = [record["row"] for record in sorted(records, key=lambda record: record["held_out"])]

    def _made_with(self) -> dict:
        """All that the prior's answers and their scores depend on."""
        config = self._run.config
        sampling = config.sampling
        contents = self._run.corpora[VALID_DATA.name].contents
        return {
            "valid_data": xxhash.xxh3_64_hexdigest(repr(contents).encode()),
            "prior": self._prior.fingerprint(),
            "seed": config.training.seed,
            **{name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
            "reward": dict(self._rewards.rows()),
            "judge": config.scoring.judge,
        }


def summarize(rows: Sequence[dict], kinds: Sequence[str], parts: Sequence[str] = ()) -> dict[str, float]:
    """Means over prompts.

    Args:
        rows: one for each prompt, with the answers `sampled` and `greedy` and those of the prior.
        kinds: the kinds of scores that all answers have: `reward`, `judge`.
        parts: names of the parts of the reward, where it has several.

    Distances to the posterior are averaged over the rows that have them, the first ones or all.

    Returns:
        the metrics that `held_out_metrics` names, without `seconds`.
    """

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    def win_rate(kind: str, one: str, other: str) -> float:
        won = wins_over(rows, kind, one, other)
        assert won is not None, f"a row has no {kind} of {one} or {other}"
        return statistics.fmean(won)

    metrics = {"kl_to_prior": mean("kl_to_prior")}
    for way, beginning in _WAYS.items():
        metrics[f"{beginning}response_length"] = mean(f"length/{way}")
        metrics[f"{beginning}unfinished_fraction"] = mean(f"unfinished/{way}")
        for kind in kinds:
            metrics[f"{beginning}{kind}_mean"] = mean(f"{kind}/{way}")
            metrics[f"{beginning}prior_{kind}_mean"] = mean(f"{kind}/prior_{way}")
            metrics[f"{beginning}win_rate_{kind}"] = win_rate(kind, way, f"prior_{way}")
        metrics |= {f"{beginning}reward/{part}": mean(f"reward/{part}/{way}") for part in parts}
        if "judge" in kinds:
            metrics[f"{beginning}win_rate_judge_reference"] = win_rate("judge", way, "reference")
    measured = [row for row in rows if "posterior/reward" in row]
    if measured:
        means = {name: statistics.fmean(row[f"posterior/{name}"] for row in measured) for name in DISTANCES}
        metrics |= {f"posterior_{name}": value for name, value in means.items()}
    if "judge" in kinds:
        metrics["reference_judge_mean"] = mean("judge/reference")
    return metrics
