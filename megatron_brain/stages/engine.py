"""Opens the engine that a run draws its responses with."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from megatron_brain.conversion.live import untied, write_live
from megatron_brain.data.records import Prompt
from megatron_brain.errors import ConfigError
from megatron_brain.generation.engine import BackgroundEngine, Engine
from megatron_brain.generation.native import NativeEngine
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all
from megatron_brain.training.validation import token_logprobs

_PROBES, _LONGEST_PROBE = 8, 128
"""How many prompts prove which weights a server has, and how many tokens of each: about 1,000 log-probabilities tell
apart weights that differ by less than the rounding of one."""


def open_engine(run: Run, *prompts: Sequence[Prompt]) -> Engine:
    """The engine of --engine. All ranks call it.

    Args:
        run: the run.
        prompts: those that it will be asked, in one or several lists.

    Raises:
        AgreedError: on all ranks: the servers do not answer or are not what the run needs.
    """
    if run.config.engine.engine == "native":
        return NativeEngine(run.parallel, eos_id=run.tokenizer.eos_id)
    return open_servers(run, *prompts)


def open_servers(run: Run, *prompts: Sequence[Prompt]) -> BackgroundEngine:
    """The vLLM servers of --engine-url, as `open_engine` opens them."""
    from megatron_brain.generation.vllm import VllmEngine

    model = run.config.model
    probes = read_on_all(lambda: _probes(run, chain(*prompts)), run.parallel)

    def write(chunks: Sequence[PolicyModel], folder: Path) -> None:
        write_live(chunks, run.parallel, model, folder, tokenizer=run.tokenizer)

    engine = VllmEngine(
        run.config.engine,
        run.parallel,
        eos_id=run.tokenizer.eos_id,
        vocab_size=model.vocab_size,
        longest_sequence=max(len(prompt.tokens) for prompt in chain(*prompts)) + run.config.sampling.max_new_tokens,
        write=write,
        probes=probes,
        score=partial(_score, run),
    )
    sampling = run.config.sampling
    says_log_q = run.config.brain.proposal_logprobs == "engine" or sampling.top_p != 1.0 or sampling.top_k != 0
    if says_log_q or sampling.temperature not in (0.0, 1.0):
        engine.require_processed_logprobs()
    return engine


def _probes(run: Run, prompts: Iterable[Prompt]) -> list[tuple[int, ...]]:
    untied(run.config.model)  # Reports a model that no server can be given.
    found = list(islice((prompt.tokens[:_LONGEST_PROBE] for prompt in prompts if len(prompt.tokens) > 1), _PROBES))
    if not found:
        raise ConfigError("engine=vllm: no prompt has two tokens, so nothing could prove which weights a server has")
    return found


def _score(run: Run, chunks: Sequence[PolicyModel], probes: Sequence[Sequence[int]]) -> list[list[float]]:
    return token_logprobs(chunks, probes, run.parallel)
