"""An opened run: everything that a stage needs from outside."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_brain.checkpointing import CheckpointInfo, load_weights, require_files
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.loader import config_to_yaml, save_config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Head, Output, RecordSource
from megatron_brain.config.template_date import now, parse_date
from megatron_brain.conversion import load_hf_weights
from megatron_brain.data.corpus import Corpus, read_corpus
from megatron_brain.data.sources import source_files
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import AgreedError
from megatron_brain.files import file_problem, folder_problem
from megatron_brain.models.fp8.state import without_history
from megatron_brain.models.fp8.weights import written
from megatron_brain.models.provider import Chunk, build_model
from megatron_brain.runtime import parallel as runtime
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.startup.disk import FrozenCheckpoint, Start
from megatron_brain.startup.resolved import ResolvedRun, resolve_run
from megatron_brain.training.metrics import MetricsLogger
from megatron_brain.training.same_data import read_on_all, require_same_data

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """An opened run: the resolved settings and checkpoints, and the connected processes."""

    resolved: ResolvedRun
    config: RunConfig
    """The resolved settings, with the date for chat templates that all ranks agreed on."""
    parallel: Parallel
    tokenizer: Tokenizer
    in_use: set[Path] = field(default_factory=set)
    """Checkpoints that this run, or a run that resumes it, may read again."""
    corpora: dict[str, Corpus] = field(default_factory=dict)
    """What `read` has read so far, by the name of the setting."""

    @property
    def start_from(self) -> CheckpointInfo | None:
        """The checkpoint that the weights come from, or None."""
        return self.resolved.start.checkpoint

    @property
    def resuming(self) -> bool:
        """Whether the optimizer's state and the position in the data also come from the checkpoint."""
        return self.resolved.start.resuming

    def read(self, source: RecordSource) -> Sequence[Any]:
        """The items of a source, the same on all ranks; none if the source is not set. All ranks must call it.

        Raises:
            AgreedError: on all ranks: a record is bad, prepared data do not fit the run, or a rank has read other
                records than rank 0.
        """
        place = source.place(self.config)
        if place is None:
            return []
        split, limit = source.chosen(self.config)
        reader = self.config.spec.reader(self.config, self.tokenizer)
        corpus = read_on_all(lambda: read_corpus(place, reader, split=split, limit=limit), self.parallel)
        require_same_data(corpus, reader, f"{source.flag} {place}", self.parallel)
        self.corpora[source.name] = corpus
        return corpus.items

    def build_model(self, head: Head) -> list[Chunk]:
        """Model chunks with the weights of --hf-model, or random weights. A checkpoint replaces them later."""
        model, start = self.config.model, self.resolved.start
        complete = start.checkpoint is not None and start.checkpoint.head == head
        fp8 = self.config.fp8 if self.config.spec.trains else without_history(self.config.fp8)
        seed = None if complete else self.config.training.seed
        chunks = self._build(model, head, seed=seed, fp8=fp8)
        if start.hf_model is not None:
            with written(chunks):
                load_hf_weights(start.hf_model, chunks, model, head)
        elif start.checkpoint is None:
            log.warning("no --load and no --hf-model: training starts from random weights")
        return chunks

    def load_frozen(self, found: FrozenCheckpoint) -> list[Chunk]:
        """A frozen model on the run's layout, in evaluation mode."""
        if self.config.checkpoint.verify:
            require_files(found.info)
        head = found.info.head
        # Modules draw initial values that nobody uses. When a model is loaded must not change what the run draws.
        with torch.random.fork_rng(devices=[]):
            chunks = self._build(found.model, head, seed=None, fp8=without_history(self.config.fp8))
        load_weights(found.info, chunks, head=head, verify=self.config.checkpoint.verify)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return chunks

    def _build(self, model: ModelConfig, head: Head, *, seed: int | None, fp8: Fp8Config) -> list[Chunk]:
        layers = self.resolved.layers
        return build_model(model, self.config.parallel, self.parallel, head=head, seed=seed, fp8=fp8, layers=layers)

    def open_logger(self, total_steps: int, shown: Sequence[str]) -> MetricsLogger:
        """The metrics logger, in --tensorboard-dir or else --save. The resolved configuration is written there too."""
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
    """Resolve a run, then connect its processes.

    Raises:
        ConfigError: something that the user asked for is impossible. No process has been connected by then.
    """
    return connect(resolve_run(config, runtime.launched_world_size(), device=runtime.launched_device))


def connect(resolved: ResolvedRun) -> Run:
    """Connect the processes of a resolved run, and check that all have resolved the same.

    Raises:
        AgreedError: on all ranks: ranks have different layers, start from different checkpoints, write different dates,
            or cannot write to a place of the run.
    """
    config, layers, tokenizer = resolved.config, resolved.layers, resolved.tokenizer
    parallel = runtime.start(config.parallel, seed=config.training.seed, num_layers=config.model.num_layers)
    _check_same_layers(parallel, layers.impl, layers.reason)
    _check_same_start(parallel, resolved.start)
    _check_places(config, parallel)
    config = fix_template_date(config, tokenizer, resolved.start, parallel)
    return Run(resolved=resolved, config=config, parallel=parallel, tokenizer=tokenizer)


def _check_places(config: RunConfig, parallel: Parallel) -> None:
    """Raise AgreedError if a rank cannot write to a place of the run. Otherwise this would show only at the end."""
    folders = {"--tensorboard-dir": config.logging.tensorboard_dir, "--save": config.checkpoint.save}
    problems = [folder_problem(*item) for item in folders.items() if item[1] is not None and config.spec.trains]
    for output in config.spec.outputs(config):
        if output.place is not None:
            problem = folder_problem if output.is_folder else file_problem
            problems += [problem(output.flag, output.place), _lost_records(config, output)]
    mine = next(filter(None, problems), None)
    found = {problem: rank for rank, problem in reversed([*enumerate(parallel.gather_over_world(mine))]) if problem}
    if found:
        raise AgreedError("; ".join(f"{problem} (rank {rank})" if rank else problem for problem, rank in found.items()))


def _lost_records(config: RunConfig, output: Output) -> str | None:
    """What is wrong, if the run would overwrite a file that it reads records from."""
    written = Path(output.place).resolve()
    for source in config.spec.sources(config):
        place = source.place(config)
        if place is not None and written in [path.resolve() for path in source_files(place)]:
            return (
                f"{output.flag} {output.place}: would replace the {source.name} of {source.flag} {place}; give another "
                "file"
            )
    return None


def fix_template_date(
    config: RunConfig, tokenizer: Tokenizer, start: Start, parallel: Parallel | None = None
) -> RunConfig:
    """The configuration with one date for chat templates, on all ranks and for the whole run. Logs the date.

    Args:
        parallel: without a date of --template-date or the checkpoint, rank 0's clock decides; None: this process's.

    Raises:
        AgreedError: some ranks have a template that writes a date, and some have not.
    """
    asked = config.tokenizer.template_date
    date = asked or (start.checkpoint.template_date if start.checkpoint is not None else "") or now()
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
    """Raise if ranks have chosen different layers, for example because other packages are installed on a node."""
    found = parallel.gather_over_world((impl, reason))
    if len({chosen for chosen, _ in found}) > 1:
        told = "; ".join(f"rank {rank}: {chosen} ({why})" for rank, (chosen, why) in enumerate(found))
        raise AgreedError(f"ranks would have different layers: {told}. Mend that, or use --transformer-impl local")


def _check_same_start(parallel: Parallel, start: Start) -> None:
    """Raise if ranks have found different checkpoints: another job may write there, or a node may see old contents."""
    mine = None if start.checkpoint is None else (start.checkpoint.path.name, start.resuming)
    found = parallel.gather_over_world(mine)
    if len(set(found)) > 1:
        told = "; ".join(f"rank {rank}: {name[0] if name else 'none'}" for rank, name in enumerate(found))
        raise AgreedError(f"ranks found different checkpoints to start from: {told}. Name one iter_ folder with --load")
