"""`--dry-run`: what a start finds out and checks before it makes a process group, on a machine that may lack it.

It goes through the functions of a real start, so it refuses what that refuses, in the same words. Weights, tokenizer
and data that are not on this machine are left out and named; those that are here are read. No device is looked at.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from megatron_brain.checkpointing import CheckpointInfo, has_checkpoint
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import STAGE_SECTIONS, RunConfig
from megatron_brain.config.run_length import check_warmup, iterations, rounds, steps_per_round
from megatron_brain.data.corpus import num_tokens, read_corpus
from megatron_brain.data.packing import pack_by_length
from megatron_brain.data.prepared.info import prepared_prefix
from megatron_brain.data.records import PreferenceReader, PromptReader, RecordReader, SFTReader
from megatron_brain.data.sources import load_records, source_files
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import REQUIRED_SIZES
from megatron_brain.models.provider import Head
from megatron_brain.runtime.launch import pretended_world_size
from megatron_brain.stages.brain.proposals import read_round
from megatron_brain.stages.brain.rollouts import rollout_files
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.reward import RewardStage
from megatron_brain.stages.sft import SFTStage
from megatron_brain.training.frozen import read_frozen_info
from megatron_brain.training.run import (
    find_start,
    fix_template_date,
    open_tokenizer,
    resolve_frozen,
    resolve_model,
)
from megatron_brain.training.trainer import metrics_on_console

_TRAINED = {"sft": SFTStage, "reward": RewardStage, "brain": BrainStage}


@dataclass(kw_only=True)
class Findings:
    """What is known of a run that was not started."""

    config: RunConfig
    """With the model's sizes resolved."""
    world_size: int
    start_from: CheckpointInfo | None = None
    resuming: bool = False
    tokenizer: Tokenizer | None = None
    frozen: dict[str, ModelConfig] = field(default_factory=dict)
    """Sizes of the scoring models that are here, by the name in --NAME-load."""
    num_samples: int | None = None
    """Training samples (sft, reward), prompts or pairs (brain), prompts (generate, evaluate); None: not known."""
    num_rounds: int | None = None
    """Rounds of brain; None: not known."""
    steps_per_round: int | None = None
    """Optimizer steps of a round of brain; None: not known."""
    train_iters: int | None = None
    """Optimizer steps of the run; None: not known."""
    checked: list[str] = field(default_factory=list)
    """What was looked at, in words."""
    absent: list[str] = field(default_factory=list)
    """What was not looked at, in words."""

    def is_here(self, flag: str, place: str, what: str) -> bool:
        """Whether a path exists on this machine; one that does not is noted with what it would have told."""
        here = Path(place).exists()
        if not here:
            self.absent.append(f"{flag} {place}: {what}")
        return here


def inspect(config: RunConfig) -> Findings:
    """Find out what there is to know of a run of WORLD_SIZE processes.

    Raises:
        ValueError: whatever a start would refuse before it makes a process group, or data that cannot be read.
    """
    found = Findings(config=config, world_size=pretended_world_size())
    if config.stage in _TRAINED:
        metrics_on_console(config, _TRAINED[config.stage])
    _resolve_model(found)
    _open_tokenizer(found)
    _check_frozen(found)
    _read_data(found)
    if "optimizer" in STAGE_SECTIONS[config.stage]:
        _find_length(found)
    found.absent.append("the GPUs: whether Transformer Engine, FP8 and NCCL work there")
    return found


def _resolve_model(found: Findings) -> None:
    """Sizes from the checkpoint or Hugging Face folder that is here, else from the configuration alone."""
    config, checkpoint, model = found.config, found.config.checkpoint, found.config.model
    resumes = checkpoint.auto_resume and has_checkpoint(checkpoint.save)
    what = "weights, their sizes and tokenizer"
    if resumes or checkpoint.load is None or found.is_here("--load", checkpoint.load, what):
        found.start_from, found.resuming = find_start(config)
    if checkpoint.auto_resume and not resumes:
        found.is_here("--save", checkpoint.save, "whether there is a checkpoint to go on from")
    if found.start_from is None and model.hf_model and not found.is_here("--hf-model", model.hf_model, what):
        config = dataclasses.replace(config, model=dataclasses.replace(model, hf_model=None))
    _require_sizes(found, config)
    config, _ = resolve_model(config, found.start_from, found.world_size)
    found.config = dataclasses.replace(config, model=dataclasses.replace(config.model, hf_model=model.hf_model))
    if found.start_from is not None:
        how = "to be resumed" if found.resuming else "weights to start from"
        found.checked.append(f"{found.start_from.path}: {how}; the sizes are its own, the weights were not read")
    elif config.model.hf_model is not None:
        found.checked.append(
            f"--hf-model {config.model.hf_model}: config.json; the sizes are its own, the weights were not read"
        )
    else:
        found.checked.append("the sizes are those of the configuration")
    found.checked.append(f"layout and batches divide over {found.world_size} processes")


def _require_sizes(found: Findings, config: RunConfig) -> None:
    """Where the weights are elsewhere, the configuration says what they would."""
    missing = [name for name in REQUIRED_SIZES if getattr(config.model, name) is None]
    if found.start_from is None and config.model.hf_model is None and missing and found.absent:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        place = found.absent[0].partition(": ")[0]
        raise ConfigError(
            f"{place} is not on this machine and the model's sizes are not in the configuration: add {flags} (a start "
            "compares them with the weights), or make the dry run where the weights are"
        )


def _open_tokenizer(found: Findings) -> None:
    place = found.config.tokenizer.tokenizer_model
    if place is not None:
        if not found.is_here("--tokenizer-model", place, "whether the vocabulary holds its ids"):
            return
    elif _weights_are_elsewhere(found):
        return
    found.tokenizer, config = open_tokenizer(found.config, found.start_from)
    found.config = fix_template_date(config, found.tokenizer, found.start_from)
    found.checked.append(
        f"tokenizer: its {found.tokenizer.vocab_size} ids fit the vocabulary of {found.config.model.vocab_size}"
    )


def _weights_are_elsewhere(found: Findings) -> bool:
    """Whether a start would take weights, and the tokenizer that comes with them, from what is not here."""
    asked = found.config.checkpoint.load or found.config.model.hf_model
    return found.start_from is None and asked is not None and not Path(asked).exists()


def _check_frozen(found: Findings) -> None:
    """Prior, reward model and baseline that are here: their kind, vocabulary and layout."""
    sections, scoring = STAGE_SECTIONS[found.config.stage], found.config.scoring
    asked: list[tuple[str, str | None, Head]] = []
    if "scoring" in sections:
        asked += [("prior", scoring.prior_load, "policy"), ("reward", scoring.reward_load, "reward")]
    if "evaluate" in sections:
        asked.append(("baseline", found.config.evaluate.baseline_load, "policy"))
    for name, directory, head in asked:
        if directory is None or not found.is_here(
            f"--{name}-load", directory, "weights; the estimate takes the policy's sizes"
        ):
            continue
        info = read_frozen_info(name, directory, head)
        found.frozen[name] = resolve_frozen(found.config, info, found.world_size)
        found.checked.append(f"{info.path}: a {head} model for this layout and vocabulary; the weights were not read")
    judge = found.config.evaluate.judge if "evaluate" in sections else None
    if judge is not None:
        found.is_here("--judge", judge.rpartition(":")[0], "the code of the judge")


def _read_data(found: Findings) -> None:
    """Read all records that are here, as the stage would."""
    config, data = found.config, found.config.data
    if config.stage == "brain" and config.brain.rollout_data is not None:
        _read_rollouts(found, config.brain.rollout_data)
        return
    if config.stage in ("generate", "evaluate"):
        limit = config.generate.max_prompts
        found.num_samples = _read(found, "--prompts", config.generate.prompts, data.valid_split, limit)
        return
    found.num_samples = _read(found, "--train-data", data.train_data, data.train_split, data.max_train_records)
    if data.valid_data is not None and config.stage in ("sft", "reward"):
        _read(found, "--valid-data", data.valid_data, data.valid_split, data.max_valid_records, packs=False)


def _read(found: Findings, flag: str, source: str, split: str, limit: int | None, *, packs: bool = True) -> int | None:
    """Samples that a stage makes of a source; None where that cannot be known here."""
    config, prefix = found.config, prepared_prefix(source)
    if prefix is None and not source_files(source):
        found.absent.append(f"{flag} {source}: records and how many there are")
        return None
    if found.tokenizer is None:
        if prefix is None:
            load_records(source, split, limit=1)
        found.absent.append(f"{flag} {source}: more than its first record, which needs the tokenizer")
        return None
    corpus = read_corpus(source, _reader(config, found.tokenizer), split=split, limit=limit)
    items = corpus.items
    found.checked.append(f"{flag} {corpus.summary}")
    if config.stage == "sft" and config.sft.packing and packs:
        return len(pack_by_length(num_tokens(items), config.data.seq_length, seed=config.training.seed))
    return len(items)


def _reader(config: RunConfig, tokenizer: Tokenizer) -> RecordReader:
    """What the stage makes of a record."""
    if config.stage == "sft":
        return SFTReader(tokenizer, config.data, multi_turn_loss=config.sft.multi_turn_loss)
    if config.stage == "reward" or (config.stage == "brain" and config.brain.responses == "given"):
        return PreferenceReader(tokenizer, config.data)
    return PromptReader(tokenizer, config.data, room=config.sampling.max_new_tokens)


def _read_rollouts(found: Findings, pattern: str) -> None:
    if not source_files(pattern):
        found.absent.append(f"--rollout-data {pattern}: rollouts, and how many rounds they are")
        return
    files = rollout_files(pattern)
    groups = [len(read_round(found.config, file)) for file in files]
    found.num_rounds, found.steps_per_round = len(files), steps_per_round(found.config, groups[0])
    found.checked.append(f"--rollout-data {pattern}: {len(files)} rounds, {sum(groups)} groups in all")


def _find_length(found: Findings) -> None:
    """Steps and rounds, as far as the records are known; as the stages reckon them."""
    config, training, samples = found.config, found.config.training, found.num_samples
    if config.stage != "brain":
        if samples is not None or training.train_iters is not None:
            found.train_iters = iterations(training, samples or 0)
    else:
        if config.brain.rollout_data is None:
            groups = config.brain.prompts_per_round
            found.steps_per_round = steps_per_round(config, groups)
            if samples is not None:
                found.num_rounds = rounds(training.train_epochs or 1.0, samples, groups)
        if training.train_iters is not None:
            found.train_iters = training.train_iters
        elif found.num_rounds is not None:
            found.train_iters = found.num_rounds * found.steps_per_round
    if found.train_iters is not None:
        check_warmup(config, found.train_iters)
