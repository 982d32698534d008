"""The engine that is part of the run: our own sampler, on the devices and in the layout of the model that trains."""

from collections.abc import Sequence

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import Prompt
from megatron_brain.generation.sampler import Sampler
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.runtime.parallel import Parallel


class NativeEngine:
    """Draws from the very weights that it is given: they are not copied, and must not change between two `sample`s.

    Args:
        parallel: the layout of the weights.
        eos_id: token that ends a response.
    """

    keeps_weights = False

    def __init__(self, parallel: Parallel, *, eos_id: int) -> None:
        self._parallel, self._eos_id = parallel, eos_id
        self._chunks: Sequence[PolicyModel] = ()
        self.holds: str | None = None

    def take_weights(self, chunks: Sequence[PolicyModel], label: str) -> None:
        """Draw from this policy from now on."""
        self._chunks, self.holds = chunks, label

    def sample(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Draw responses, as `Engine.sample` says."""
        if not prompts:
            return []
        return Sampler(self._chunks, self._parallel, sampling, eos_id=self._eos_id).generate(prompts, seeds=seeds)
