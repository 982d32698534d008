"""Models that only score or propose: the prior, the reward model, a baseline."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_brain.checkpointing import index_checksum
from megatron_brain.config.stage_spec import Head
from megatron_brain.errors import ConfigError
from megatron_brain.models.offload import HostWeights
from megatron_brain.models.provider import Chunk
from megatron_brain.startup.disk import FrozenCheckpoint, find_frozen
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all


class FrozenModel:
    """A checkpoint on the run's layout, loaded when first used.

    The checkpoint is chosen at once: if --save writes to the same folder, newer ones will appear there later.

    Args:
        run: the run.
        name: "prior" or "reward". Where the checkpoint is missing, the error asks for --NAME-load.
        directory: checkpoint folder; None if the model is perhaps never needed.
        head: the kind of head that the model has.
        offload: whether the weights stay in host memory between uses.

    Raises:
        AgreedError: on all ranks: there is no such checkpoint, it holds another kind of model, or does not fit the run.
    """

    def __init__(self, run: Run, name: str, directory: str | None, *, head: Head, offload: bool = False) -> None:
        self._run, self._name, self._head, self._offload = run, name, head, offload
        self._found: FrozenCheckpoint | None = None
        self._fingerprint: str | None = None
        self._chunks: list[Chunk] | None = None
        self._weights: HostWeights | None = None
        self.point_to(directory)

    @property
    def path(self) -> str | None:
        """The checkpoint's folder."""
        return None if self._found is None else str(self._found.info.path.resolve())

    def fingerprint(self) -> str:
        """A checksum that tells the checkpoint's weights apart from others, wherever they are
        (`checkpointing.index_checksum`). It is read once.

        Raises:
            ConfigError: there is no checkpoint.
            DamagedError: its list of tensors is damaged.
        """
        if self._fingerprint is None:
            self._fingerprint = index_checksum(self._require_found().info.path)
        return self._fingerprint

    def point_to(self, directory: str | None) -> None:
        """Use another checkpoint. The model must not have been used yet."""
        assert self._chunks is None, "the model is loaded already"
        self._found, self._fingerprint = None if directory is None else self._find(directory), None
        if self._found is not None:
            self._run.in_use.add(self._found.info.path.resolve())

    def _find(self, directory: str) -> FrozenCheckpoint:
        run = self._run
        return read_on_all(
            lambda: find_frozen(run.config, f"--{self._name}-load", directory, self._head, run.parallel.world_size),
            run.parallel,
        )

    def _require_found(self) -> FrozenCheckpoint:
        if self._found is None:
            raise ConfigError(f"the {self._name} model is needed: give --{self._name}-load")
        return self._found

    @contextmanager
    def loaded(self) -> Iterator[list[Chunk]]:
        """The model's chunks in evaluation mode. They are usable inside the context only.

        Raises:
            ConfigError: there is no checkpoint.
        """
        if self._chunks is None:
            self._chunks = self._run.load_frozen(self._require_found())
            if self._offload:
                self._weights = HostWeights(self._chunks)
        if self._weights is None:
            yield self._chunks
            return
        with self._weights.on_device():
            yield self._chunks
