"""Opens what writes the checkpoints of a run."""

import logging
from pathlib import Path

from megatron_brain.checkpointing import CheckpointSaver, check_best, has_checkpoint, read_info
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.training.run import Run

log = logging.getLogger(__name__)


def goes_on_in_place(run: Run) -> bool:
    """Whether the run resumes from a checkpoint of its own --save."""
    save, start = run.config.checkpoint.save, run.start_from
    return run.resuming and save is not None and start.path.parent.resolve() == Path(save).resolve()


def open_saver(run: Run, started_from: str | None) -> CheckpointSaver | None:
    """The saver of a run; None if --save is not set.

    Args:
        started_from: folder of the checkpoint that the run, or the one that it resumes, started from.
    """
    save = run.config.checkpoint.save
    if save is None:
        return None
    if run.config.checkpoint.keep_best is not None:
        check_best(save)
    if started_from is not None:
        # The prior of the run may be this checkpoint.
        run.in_use.add(Path(started_from))
    if has_checkpoint(save) and not goes_on_in_place(run):
        log.warning(
            "%s holds checkpoints up to iteration %d that this run does not go on from: its own will be the latest "
            "there, and the ones of an --auto-resume; give another --save to keep the runs apart",
            save,
            read_info(save).iteration,
        )
    return CheckpointSaver(
        save,
        run.config,
        run.parallel,
        run.tokenizer,
        head=spec_of(run.config).head,
        generation_config=run.resolved.start.generation_config,
        protected=run.in_use,
    )
