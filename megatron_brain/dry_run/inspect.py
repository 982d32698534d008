"""What a start finds out and checks before it makes a process group, on a machine that may lack weights and data.

A dry run resolves the run as a start does, so it refuses the same things in the same words. It reads weights, tokenizer
and data that are on this machine, and names those that are not. It looks at no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_brain.config.rewards import describe
from megatron_brain.config.run import RunConfig
from megatron_brain.config.run_length import RunLength, check_warmup, length_of_rounds
from megatron_brain.config.stage_spec import VALID_DATA, RecordSource, spec_of
from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared.info import prepared_prefix
from megatron_brain.data.sources import load_records, source_files
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.runtime.launch import pretended_world_size
from megatron_brain.stages.brain.proposals import groups_per_round, read_round
from megatron_brain.stages.brain.rollouts import rollout_files
from megatron_brain.startup.disk import FrozenCheckpoint, Search, find_scoring_models
from megatron_brain.startup.resolved import ResolvedRun, resolve_run
from megatron_brain.training.start import fix_template_date
from megatron_brain.training.trainer import check_metrics


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a run that was not started."""

    resolved: ResolvedRun
    config: RunConfig
    """The resolved settings, with the date for chat templates."""
    scoring: Mapping[str, FrozenCheckpoint]
    """The scoring models that are on this machine, by `ScoringModel.name`."""
    search: Search
    """What was looked at, and what is not on this machine."""
    num_samples: int | None
    """Number of samples that the run trains on, or of prompts that it answers; None: not known."""
    num_valid: int | None
    """Number of records of --valid-data; None: there are none, or it is not known."""
    length: RunLength
    """Steps and rounds of a stage that trains, as far as they are known."""


def inspect(config: RunConfig) -> Findings:
    """Find out what can be known of a run of WORLD_SIZE processes.

    Raises:
        UserError: whatever a start would refuse before it makes a process group, or data that cannot be read.
    """
    if spec_of(config).trains:
        check_metrics(config, spec_of(config).load())
    search = Search(may_be_elsewhere=True)
    resolved = resolve_run(config, pretended_world_size(), device=None, search=search)
    config = resolved.config
    search.checked += [_weights(resolved), f"layout and batches divide over {resolved.world_size} processes"]
    tokenizer = resolved.tokenizer
    if tokenizer is not None:
        config = fix_template_date(config, tokenizer, resolved.start)
        search.checked.append(
            f"tokenizer: its {tokenizer.vocab_size} ids fit the vocabulary of {config.model.vocab_size}"
        )
    scoring = find_scoring_models(config, resolved.world_size, search)
    for found in scoring.values():
        what = f"a {found.info.head} model for this layout and vocabulary; the weights were not read"
        search.checked.append(f"{found.info.path}: {what}")
    _look_at_rewards(config, search)
    num_samples, num_valid, length = _read_sources(config, tokenizer, search)
    if spec_of(config).trains and length.train_iters is not None:
        check_warmup(config, length.train_iters)
    search.absent.append("the GPUs: whether Transformer Engine, FP8 and NCCL work there")
    return Findings(
        resolved=resolved,
        config=config,
        search=search,
        scoring=scoring,
        num_samples=num_samples,
        num_valid=num_valid,
        length=length,
    )


def _look_at_rewards(config: RunConfig, search: Search) -> None:
    """Note what the reward is the sum of. Functions are not called, and servers are not asked."""
    rewards = config.scoring.rewards
    if rewards:
        search.checked.append(f"reward: {describe(rewards)}")
    for flag, code in spec_of(config).work(config).user_code:
        search.finds(flag, code.rpartition(":")[0], "the code that it names")
    for part in rewards:
        if part.kind == "url":
            search.absent.append(f"{part.flag} {part.source}: whether it answers; a dry run asks no server")


def _weights(resolved: ResolvedRun) -> str:
    """Where the weights come from, in words."""
    start = resolved.start
    if start.checkpoint is not None:
        how = "to be resumed" if start.resuming else "weights to start from"
        return f"{start.checkpoint.path}: {how}; the sizes are its own, the weights were not read"
    if start.hf_model is not None:
        return f"--hf-model {start.hf_model}: config.json; the sizes are its own, the weights were not read"
    return "the sizes are those of the configuration"


def _read_sources(
    config: RunConfig, tokenizer: Tokenizer | None, search: Search
) -> tuple[int | None, int | None, RunLength]:
    """Numbers of samples of the first source and of validation records, and the length of a run over the first."""
    first, *others = spec_of(config).sources(config)
    rollouts = _read_rollouts(config, first, search) if first.holds == "rollouts" else None
    items = _read(config, first, tokenizer, search) if rollouts is None else None
    read = {source.name: _read(config, source, tokenizer, search) for source in others}
    valid = read.get(VALID_DATA.name)
    num_samples = None if items is None else spec_of(config).num_samples(config, items)
    length = spec_of(config).length(config, num_samples) if rollouts is None else rollouts
    return num_samples, None if valid is None else len(valid), length


def _read(config: RunConfig, source: RecordSource, tokenizer: Tokenizer | None, search: Search) -> Sequence | None:
    """The items that the stage makes from a source; None where they cannot be known on this machine."""
    place = source.place(config)
    if place is None:
        return None
    (split, limit), prefix, name = source.chosen(config), prepared_prefix(place), f"{source.flag} {place}"
    if prefix is None and not source_files(place):
        search.absent.append(f"{name}: records and how many there are")
        return None
    if tokenizer is None:
        if prefix is None:
            load_records(place, split, limit=1)
        search.absent.append(f"{name}: more than its first record, which needs the tokenizer")
        return None
    corpus = read_corpus(place, spec_of(config).reader_of(source, config, tokenizer), split=split, limit=limit)
    search.checked.append(f"{source.flag} {corpus.summary}")
    return corpus.items


def _read_rollouts(config: RunConfig, source: RecordSource, search: Search) -> RunLength:
    """The length of a run over the rollouts of a source, with one file for each round."""
    pattern = source.place(config)
    if not source_files(pattern):
        search.absent.append(f"{source.flag} {pattern}: rollouts, and how many rounds they are")
        return RunLength(train_iters=config.training.train_iters)
    groups = {file: len(read_round(config, file)) for file in rollout_files(pattern)}
    search.checked.append(f"{source.flag} {pattern}: {len(groups)} rounds, {sum(groups.values())} groups in all")
    return length_of_rounds(config, len(groups), groups_per_round(config, groups))
