"""Models that only score or propose: the prior, the reward model, a baseline."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_brain.checkpointing import CheckpointInfo, read_info
from megatron_brain.errors import ConfigError
from megatron_brain.models.offload import HostWeights
from megatron_brain.models.provider import Chunk, Head
from megatron_brain.training.run import Run


def read_frozen_info(name: str, directory: str, head: Head) -> CheckpointInfo:
    """What the checkpoint of --NAME-load says of itself.

    Raises:
        ConfigError: there is none, or it holds another kind of model.
    """
    info = read_info(directory)
    if info.head != head:
        raise ConfigError(f"--{name}-load: {info.path} holds a {info.head} model, a {head} model is needed here")
    return info


class FrozenModel:
    """A checkpoint on the run's layout, loaded when first used.

    Which checkpoint it is, is settled at once: a folder that --save shares will hold newer ones by then.

    Args:
        run: the run.
        name: "prior" or "reward", of the flag --NAME-load that cures a missing checkpoint.
        directory: checkpoint folder, or None where it may turn out not to be needed.
        head: kind of model.
        offload: keep the weights in host memory between uses.

    Raises:
        ConfigError: the checkpoint holds another kind of model.
    """

    def __init__(self, run: Run, name: str, directory: str | None, *, head: Head, offload: bool = False) -> None:
        self._run, self._name, self._head, self._offload = run, name, head, offload
        self.path: str | None = None
        self._chunks: list[Chunk] | None = None
        self._weights: HostWeights | None = None
        self.point_to(directory)

    def point_to(self, directory: str | None) -> None:
        """Take another checkpoint, before the first use."""
        assert self._chunks is None, "the model is loaded already"
        if directory is not None:
            info = read_frozen_info(self._name, directory, self._head)
            directory = str(info.path.resolve())
            self._run.in_use.add(info.path.resolve())
        self.path = directory

    @contextmanager
    def loaded(self) -> Iterator[list[Chunk]]:
        """The model's chunks in evaluation mode, usable inside of the context.

        Raises:
            ConfigError: there is no checkpoint.
        """
        if self._chunks is None:
            if self.path is None:
                raise ConfigError(f"the {self._name} model is needed: give --{self._name}-load")
            self._chunks = self._run.load_frozen(self.path, self._head)
            if self._offload:
                self._weights = HostWeights(self._chunks)
        if self._weights is None:
            yield self._chunks
            return
        with self._weights.on_device():
            yield self._chunks
