"""Draws responses from a policy at any tensor- and pipeline-parallel layout."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.groups import Segment
from megatron_brain.errors import ConfigError
from megatron_brain.generation.batch import Batch, Completion
from megatron_brain.generation.cache import DecodeLayout, KeyValueCache, PrefillLayout
from megatron_brain.generation.choose import choose_tokens
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.pipeline import trunk_forward
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.models.logprobs import local_logits
from megatron_brain.runtime.parallel import Parallel


class Sampler:
    """Samples responses to prompts. Each data-parallel replica samples its own.

    All ranks of a replica call `generate` with the same arguments and get the same samples. A sample's draws depend
    only on its seed. So (except for rounding) neither the layout nor the other prompts of the batch change it. A model
    that trains in FP8 samples in bf16: docs/fp8.md says why.

    Args:
        chunks: this rank's policy, as `build_model` returns it (not wrapped for data parallelism).
        sampling: how to draw, how long responses may be, and how many are drawn at one time.
        eos_id: token that ends a response.
        progress: called after every step with the samples done and the tokens drawn since `generate` began.
    """

    def __init__(
        self,
        chunks: Sequence[PolicyModel],
        parallel: Parallel,
        sampling: SamplingConfig,
        *,
        eos_id: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.parallel = parallel
        self.sampling = sampling
        self.eos_id = eos_id
        self.progress = progress
        self._done = self._tokens = 0

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        """Draw responses.

        Whole prompts are batched up to `sampling_batch_size` responses; a batch holds at least one prompt.

        Args:
            prompts: token ids of each prompt, at least one.
            seeds: for each prompt the seeds of its responses (`seeds.sample_seed`), of all prompts equally many.

        Returns:
            one response for each seed of each prompt, in their order.

        Raises:
            ConfigError: a prompt leaves no room for `max_new_tokens`.
        """
        self._check(prompts, seeds)
        samples_per_prompt = len(seeds[0])
        self._done = self._tokens = 0
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        at_once = max(1, self.sampling.sampling_batch_size // samples_per_prompt)
        results: list[list[Completion]] = [[] for _ in prompts]
        with _evaluating(self.chunks), fp8_state.switched_off(self.chunks):
            for start in range(0, len(order), at_once):
                batch = order[start : start + at_once]
                samples = self._generate_batch([prompts[i] for i in batch], [seeds[i] for i in batch])
                for place, index in enumerate(batch):
                    results[index] = samples[place * samples_per_prompt : (place + 1) * samples_per_prompt]
        return results

    def _check(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> None:
        assert len(seeds) == len(prompts), f"{len(prompts)} prompts need the seeds of as many, not of {len(seeds)}"
        assert len({len(of_prompt) for of_prompt in seeds}) == 1, "all prompts need equally many seeds"
        (limit, setting), new = self.chunks[0].longest_sequence, self.sampling.max_new_tokens
        for index, prompt in enumerate(prompts):
            assert prompt, f"prompt {index} has no tokens"
            if len(prompt) + new > limit:
                raise ConfigError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={new} that is more than {setting}: "
                    f"shorten the prompt to {max(0, limit - new)} tokens or lower --max-new-tokens"
                )

    def _generate_batch(self, prompts: list[Prompt], seeds: list[Sequence[int]]) -> list[Completion]:
        """Samples `[P * n]` of one batch, prompt-major."""
        longest, samples_per_prompt = self.sampling.max_new_tokens, len(seeds[0])
        device = self.parallel.device
        batch = Batch(len(prompts), samples_per_prompt, longest, device)
        seed_of = torch.tensor([seed for of_prompt in seeds for seed in of_prompt], device=device)
        cache = KeyValueCache(
            [len(prompt) for prompt in prompts],
            samples=samples_per_prompt,
            capacity=longest - 1,  # The last token is never fed back.
            device=device,
        )
        hidden = self._prefill(prompts, cache)
        for step in range(longest):
            tokens, logprobs = self._choose(hidden, seed_of[batch.ids.flatten()], step)
            before = sum(batch.live_counts)
            batch.record(step, tokens, logprobs, self.eos_id)
            going_on = sum(batch.live_counts) if step + 1 < longest else 0
            self._report(samples=before - going_on, tokens=before)
            if not going_on:
                break
            hidden = self._decode(batch.compact(tokens, cache), cache)
        self.parallel.broadcast_from_last_pipeline_stage(batch.logprobs)
        return batch.samples(self.eos_id)

    def _report(self, *, samples: int, tokens: int) -> None:
        self._done += samples
        self._tokens += tokens
        if self.progress is not None:
            self.progress(self._done, self._tokens)

    def _prefill(self, prompts: list[Prompt], cache: KeyValueCache) -> Tensor | None:
        """Run the prompts. Returns the hidden states `[P * n, h]` that predict the rows' first tokens."""
        flat = [token for prompt in prompts for token in prompt]
        ends = numpy.cumsum([len(prompt) for prompt in prompts]).tolist()
        segments = [Segment(end - len(prompt), len(prompt)) for end, prompt in zip(ends, prompts, strict=True)]
        positions = [place for prompt in prompts for place in range(len(prompt))]
        tokens, position_ids = (self._padded(torch.tensor(values)) for values in (flat, positions))
        if tokens.size(1) > len(flat):
            segments.append(Segment(len(flat), tokens.size(1) - len(flat)))
        layout = PrefillLayout(segments=tuple(segments), cache=cache)
        hidden = trunk_forward(self.chunks, self.parallel, tokens, position_ids, layout)
        if hidden is None:
            return None
        last = torch.tensor(ends, device=tokens.device) - 1
        return self.chunks[-1].select(hidden, last.repeat_interleave(cache.samples))

    def _decode(self, tokens: Tensor, cache: KeyValueCache) -> Tensor | None:
        """Feed every row's token `[P * n]`. Returns the hidden states `[P * n, h]` that predict the next."""
        layout = DecodeLayout(cache=cache)
        hidden = trunk_forward(
            self.chunks, self.parallel, self._padded(tokens), self._padded(cache.next_positions()), layout
        )
        cache.advance()
        if hidden is None:
            return None
        return self.chunks[-1].select(hidden, torch.arange(tokens.numel(), device=tokens.device))

    def _padded(self, values: Tensor) -> Tensor:
        """Values `[T]` as `[1, T']`, zeros added until sequence parallelism can split them."""
        multiple = self.parallel.tp_size if self.chunks[0].config.sequence_parallel else 1
        values = values.to(self.parallel.device)
        return torch.nn.functional.pad(values, (0, -values.numel() % multiple))[None]

    def _choose(self, hidden: Tensor | None, seeds: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Token and (on the last pipeline stage) log-probability of every row, from hidden states and seeds `[P * n]`.

        Tensor-parallel ranks get the same.
        """
        tokens, logprobs = torch.empty_like(seeds), torch.zeros_like(seeds, dtype=torch.float64)
        if hidden is not None:
            chunk, tp = self.chunks[-1], self.parallel.groups.tp
            weight = chunk.output_weight
            logits = local_logits(hidden, weight, first_id=tp.rank() * weight.size(0), vocab_size=chunk.true_vocab_size)
            tokens, logprobs = choose_tokens(
                logits,
                seeds,
                step,
                temperature=self.sampling.temperature,
                top_k=self.sampling.top_k,
                top_p=self.sampling.top_p,
                group=tp,
            )
        return self.parallel.broadcast_from_last_pipeline_stage(tokens), logprobs


@contextlib.contextmanager
def _evaluating(chunks: Sequence[PolicyModel]) -> Iterator[None]:
    """Put the chunks into eval mode inside of the context, and each back into its own mode afterwards."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, modes, strict=True):
            chunk.train(training)
