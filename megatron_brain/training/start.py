"""Starts the processes of a resolved run, and checks that all ranks have resolved the same."""

import dataclasses
import logging
from pathlib import Path

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Output, spec_of
from megatron_brain.config.template_date import now, parse_date
from megatron_brain.data.sources import source_files
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import AgreedError
from megatron_brain.files import file_problem, folder_problem
from megatron_brain.runtime import parallel as runtime
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.startup.disk import Start
from megatron_brain.startup.resolved import ResolvedRun, resolve_run
from megatron_brain.training.run import Run

log = logging.getLogger(__name__)


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
    folders = {"--engine-sync-dir": config.engine.engine_sync_dir}
    if spec_of(config).trains:
        folders |= {"--tensorboard-dir": config.logging.tensorboard_dir, "--save": config.checkpoint.save}
    problems = [folder_problem(*item) for item in folders.items() if item[1] is not None]
    for output in spec_of(config).outputs(config):
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
    for source in spec_of(config).sources(config):
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
