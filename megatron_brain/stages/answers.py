"""Draws responses of a checkpoint to a list of prompts, for the stages generate and evaluate."""

from collections.abc import Sequence

from megatron_brain.config.stage_spec import PROMPTS
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.records import Prompt
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import Engine
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.run import Run


def read_prompts(run: Run) -> Sequence[Prompt]:
    """The prompts of --prompts."""
    return run.read(PROMPTS)


def my_share(prompts: Sequence[Prompt], parallel: Parallel) -> list[int]:
    """Indices of the prompts that this replica answers."""
    return list(range(parallel.dp_rank, len(prompts), parallel.dp_size))


def sample_answers(
    run: Run, engine: Engine, prompts: Sequence[Prompt], mine: Sequence[int], sampling: SamplingConfig
) -> list[list[Completion]]:
    """Samples for this replica's prompts. They depend on the seed and the prompt's index, not on the layout."""
    seeds = sample_seeds(run.config.training.seed, mine, sampling.samples_per_prompt)
    return engine.sample([prompts[i].tokens for i in mine], seeds=seeds, sampling=sampling)


def gather_rows(rows: Sequence[tuple[int, dict]], parallel: Parallel) -> list[dict]:
    """The rows of all replicas, in the order of their prompts."""
    everyone = parallel.gather_over_data_parallel(list(rows))
    return [row for _, row in sorted((item for replica in everyone for item in replica), key=lambda item: item[0])]
