"""Everything a stage needs around it, opened in the order that lets mistakes stop a run before it starts."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_brain.checkpointing import CheckpointInfo, has_checkpoint, load_weights, read_info, require_files
from megatron_brain.checkpointing.locate_tokenizer import locate_tokenizer
from megatron_brain.config.checks import validate_layout
from megatron_brain.config.loader import config_to_yaml, save_config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import STAGE_SECTIONS, RunConfig
from megatron_brain.config.template_date import now, parse_date
from megatron_brain.conversion import load_hf_weights, read_hf_architecture
from megatron_brain.conversion.generation_config import read_generation_config
from megatron_brain.data.corpus import Corpus, read_corpus
from megatron_brain.data.records import Item, RecordReader
from megatron_brain.data.sources import source_files
from megatron_brain.data.tokenizer import Tokenizer, build_tokenizer, check_fits
from megatron_brain.errors import AgreedError, ConfigError
from megatron_brain.files import file_problem, folder_problem
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve
from megatron_brain.models.fp8.state import without_history
from megatron_brain.models.fp8.weights import written
from megatron_brain.models.provider import Chunk, Head, build_model, choose_layers
from megatron_brain.runtime import parallel as runtime
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.metrics import MetricsLogger
from megatron_brain.training.same_data import read_on_all, require_same_data

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """An opened run.

    `config` has the model's sizes resolved. `start_from` is the checkpoint its weights come from, if any;
    `resuming` says that optimizer and position come from it too.
    """

    config: RunConfig
    parallel: Parallel
    tokenizer: Tokenizer
    start_from: CheckpointInfo | None
    resuming: bool
    in_use: set[Path] = field(default_factory=set)
    """Checkpoints that this run, or one that resumes it, may read again."""
    generation_config: dict = field(default_factory=dict)
    """generation_config.json of the Hugging Face model that the weights come from, for the checkpoints."""
    corpora: dict[str, Corpus] = field(default_factory=dict)
    """What `read_data` has read, by the name of the flag."""

    def read_data(
        self, flag: str, source: str, reader: RecordReader[Item], *, split: str | None = None, limit: int | None = None
    ) -> Sequence[Item]:
        """The items of a source, which are the same on all ranks. All ranks call it.

        Args:
            flag: by which the source was given, such as "train_data".
            source, reader, split, limit: as `read_corpus` takes them.

        Raises:
            AgreedError: on all ranks: a bad record, prepared data that does not fit the run, or other records than
                those of rank 0.
        """
        corpus = read_on_all(lambda: read_corpus(source, reader, split=split, limit=limit), self.parallel)
        require_same_data(corpus, reader, f"--{flag.replace('_', '-')} {source}", self.parallel)
        self.corpora[flag] = corpus
        return corpus.items

    def build_model(self, head: Head) -> list[Chunk]:
        """Model chunks with the weights of --hf-model, or random ones; a checkpoint is loaded over them."""
        model = self.config.model
        complete = self.start_from is not None and self.start_from.head == head
        seed = None if complete else self.config.training.seed
        trains = "optimizer" in STAGE_SECTIONS[self.config.stage]
        fp8 = self.config.fp8 if trains else without_history(self.config.fp8)
        chunks = build_model(model, self.config.parallel, self.parallel, head=head, seed=seed, fp8=fp8)
        if self.start_from is None and model.hf_model is not None:
            with written(chunks):
                load_hf_weights(model.hf_model, chunks, model, head)
        elif self.start_from is None:
            log.warning("no --load and no --hf-model: training starts from random weights")
        return chunks

    def load_frozen(self, directory: str, head: Head) -> list[Chunk]:
        """A model that only scores, on the run's layout, in evaluation mode.

        Raises:
            ValueError: the model's vocabulary is another one, or the layout does not fit it.
        """
        info = read_info(directory)
        if self.config.checkpoint.verify:
            require_files(info)
        model = resolve_frozen(self.config, info, self.parallel.world_size)
        # Modules draw initial values that nobody uses: what a run draws must not depend on when a scorer is loaded.
        fp8 = without_history(self.config.fp8)
        with torch.random.fork_rng(devices=[]):
            chunks = build_model(model, self.config.parallel, self.parallel, head=head, seed=None, fp8=fp8)
        load_weights(info, chunks, head=head, verify=self.config.checkpoint.verify)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return chunks

    def open_logger(self, total_steps: int, shown: Sequence[str]) -> MetricsLogger:
        """The run's metrics logger, in --tensorboard-dir or else --save, where the resolved configuration goes too."""
        directory = self.config.logging.tensorboard_dir or self.config.checkpoint.save
        logger = MetricsLogger(
            directory,
            total_steps=total_steps,
            shown=shown,
            is_writer=self.parallel.is_writer,
            progress=self.config.logging.progress,
            log_interval=self.config.logging.log_interval,
            resume_step=self.start_from.iteration if self.resuming else None,
        )
        logger.log_config(config_to_yaml(self.config))
        if directory is not None and self.parallel.is_writer:
            save_config(self.config, Path(directory) / "config.yaml")
        return logger


def open_run(config: RunConfig) -> Run:
    """Resolve the model, check the layout, then start processes.

    Raises:
        ValueError: anything the user asked for that cannot be; nothing has been started by then.
    """
    world_size = runtime.launched_world_size()
    start_from, resuming = find_start(config)
    config, generation_config = resolve_model(config, start_from, world_size)
    tokenizer, config = open_tokenizer(config, start_from)
    impl, reason = choose_layers(config.model, config.parallel, config.fp8, runtime.launched_device())
    parallel = runtime.start(config.parallel, seed=config.training.seed, num_layers=config.model.num_layers)
    _check_same_layers(parallel, impl, reason)
    _check_same_start(parallel, start_from, resuming=resuming)
    _check_places(config, parallel)
    config = fix_template_date(config, tokenizer, start_from, parallel)
    return Run(
        config=config,
        parallel=parallel,
        tokenizer=tokenizer,
        start_from=start_from,
        resuming=resuming,
        generation_config=generation_config,
    )


def _check_places(config: RunConfig, parallel: Parallel) -> None:
    """What the run is going to write can be written, by every rank: it would be a pity to find out at the end."""
    folders = {"--tensorboard-dir": config.logging.tensorboard_dir, "--save": config.checkpoint.save}
    folders["--rollout-dir"] = config.brain.rollout_dir
    trains = "optimizer" in STAGE_SECTIONS[config.stage]
    problems = [folder_problem(flag, place) for flag, place in folders.items() if place is not None and trains]
    if config.generate.output is not None:
        problems += [file_problem("--output", config.generate.output), _lost_prompts(config)]
    mine = next(filter(None, problems), None)
    found = {problem: rank for rank, problem in reversed([*enumerate(parallel.gather_over_world(mine))]) if problem}
    if found:
        raise AgreedError("; ".join(f"{problem} (rank {rank})" if rank else problem for problem, rank in found.items()))


def _lost_prompts(config: RunConfig) -> str | None:
    """What is wrong where --output would replace the file that --prompts are read from."""
    output, prompts = config.generate.output, config.generate.prompts
    if Path(output).resolve() in [path.resolve() for path in source_files(prompts)]:
        return f"--output {output}: would replace the prompts of --prompts {prompts}; give another file"
    return None


def fix_template_date(
    config: RunConfig, tokenizer: Tokenizer, start_from: CheckpointInfo | None, parallel: Parallel | None = None
) -> RunConfig:
    """The run with one date for chat templates that write it, on all ranks and for all its days; and say which.

    Args:
        parallel: rank 0's clock counts where neither --template-date nor the checkpoint says it; None: this one's.

    Raises:
        AgreedError: the templates of some ranks write a date and those of others do not.
    """
    asked = config.tokenizer.template_date
    date = asked or (start_from.template_date if start_from is not None else "") or now()
    if parallel is not None:
        told = parallel.gather_over_world((tokenizer.uses_clock, date))
        date = told[0][1]
        if len({uses_clock for uses_clock, _ in told}) > 1:
            other = next(rank for rank, (uses_clock, _) in enumerate(told) if uses_clock != told[0][0])
            raise AgreedError(
                f"rank 0 and rank {other} have other chat templates, of which one writes the date: put one copy of the "
                "tokenizer where all nodes see it"
            )
    if not tokenizer.uses_clock:
        if asked is not None:
            log.warning("template_date=%s has no effect: the chat template writes no date", asked)
        return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, template_date=None))
    tokenizer.template_time = parse_date(date)
    log.info(
        "the chat template writes the date: it is %s for the whole run and its checkpoints (--template-date)", date
    )
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, template_date=date))


def _check_same_layers(parallel: Parallel, impl: str, reason: str) -> None:
    """Each rank has looked for itself, maybe on nodes where other things are installed."""
    found = parallel.gather_over_world((impl, reason))
    if len({chosen for chosen, _ in found}) > 1:
        told = "; ".join(f"rank {rank}: {chosen} ({why})" for rank, (chosen, why) in enumerate(found))
        raise AgreedError(f"ranks would have different layers: {told}. Mend that, or use --transformer-impl local")


def _check_same_start(parallel: Parallel, start_from: CheckpointInfo | None, *, resuming: bool) -> None:
    """Each rank has looked for itself, maybe on storage that another job writes to or that shows nodes old contents."""
    mine = None if start_from is None else (start_from.path.name, resuming)
    found = parallel.gather_over_world(mine)
    if len(set(found)) > 1:
        told = "; ".join(f"rank {rank}: {start[0] if start else 'none'}" for rank, start in enumerate(found))
        raise AgreedError(f"ranks found different checkpoints to start from: {told}. Name one iter_ folder with --load")


def find_start(config: RunConfig) -> tuple[CheckpointInfo | None, bool]:
    """The checkpoint to start from, and whether to resume it rather than take its weights alone.

    Raises:
        ConfigError: --load names no checkpoint of ours, or one to resume that another stage wrote.
    """
    checkpoint = config.checkpoint
    if checkpoint.auto_resume and has_checkpoint(checkpoint.save):
        info, resuming = read_info(checkpoint.save), True
    elif checkpoint.load is None:
        return None, False
    else:
        info = read_info(checkpoint.load)
        resuming = "optimizer" in STAGE_SECTIONS[config.stage] and not checkpoint.finetune
    if checkpoint.verify:
        require_files(info)
    if resuming and info.stage != config.stage:
        raise ConfigError(
            f"{info.path} is of the {info.stage} stage and cannot be resumed by {config.stage}: "
            "add --finetune to start from its weights"
        )
    return info, resuming


def resolve_model(config: RunConfig, start_from: CheckpointInfo | None, world_size: int) -> tuple[RunConfig, dict]:
    """The run with its model's sizes known and its layout checked, and the generation_config.json that comes along.

    Raises:
        ValueError: sizes that are missing or contradict each other, or a layout that does not fit them.
    """
    generation_config = {}
    if start_from is not None:
        found, source = start_from.architecture, str(start_from.path)
        generation_config = start_from.generation_config
    elif config.model.hf_model is not None:
        found, source = read_hf_architecture(config.model.hf_model), config.model.hf_model
        generation_config = read_generation_config(config.model.hf_model)
    else:
        found, source = None, "the flags"
    config = dataclasses.replace(config, model=resolve(config.model, found, source))
    validate_layout(config, world_size, config.model)
    return config, generation_config


def resolve_frozen(config: RunConfig, info: CheckpointInfo, world_size: int) -> ModelConfig:
    """Sizes of a model that only scores in a run whose own sizes are resolved.

    Raises:
        ConfigError: its vocabulary is another one, or the run's layout does not fit it.
    """
    model = resolve(_without_sizes(config.model), info.architecture, str(info.path))
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{info.path} has vocab_size={model.vocab_size}, the policy has {config.model.vocab_size}: "
            "all models of a run share one tokenizer"
        )
    validate_layout(dataclasses.replace(config, model=model), world_size, model)
    return model


def open_tokenizer(config: RunConfig, start_from: CheckpointInfo | None) -> tuple[Tokenizer, RunConfig]:
    """The run's tokenizer, and its kind in the run's settings.

    Raises:
        ValueError: there is none, it cannot be read, or the model has too few rows for it.
    """
    kind, place = locate_tokenizer(config.tokenizer, start_from, config.model.hf_model)
    # A place that was not given is left unsaid in the settings that are written: the checkpoint there may be removed.
    settings = dataclasses.replace(config.tokenizer, tokenizer_type=kind)
    tokenizer = build_tokenizer(kind, place, config.tokenizer.chat_template)
    check_fits(tokenizer, config.model.vocab_size)
    return tokenizer, dataclasses.replace(config, tokenizer=settings)


def _without_sizes(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, **dict.fromkeys(ARCHITECTURE_FIELDS))
