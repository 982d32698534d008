"""Runs one micro-batch alone, and keeps it in a file so that anyone can run it again.

A reproduction file is JSON. It holds token ids and the numbers that the loss needs. It holds no text and no weights,
and loading it executes nothing.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_brain.data.groups import Group, KnownLoss, PackedBatch, pack_groups, packed_length
from megatron_brain.errors import ConfigError, UserError
from megatron_brain.files import write_whole
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.parameter_names import global_parameters
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.metrics import json_number
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward_backward


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """The result of one micro-batch that runs alone: its mean loss, known on all pipeline stages of the replica, and
    this rank's parameters whose gradient is not finite, in the order of the model."""

    loss: float
    nonfinite_parameters: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and not self.nonfinite_parameters


def run_alone(
    wrapped: Sequence[DistributedDataParallel],
    batch: PackedBatch,
    loss_function: Callable[[torch.Tensor, PackedBatch], LossOutput],
    parallel: Parallel,
) -> MicroBatchResult:
    """Forward and backward pass of one micro-batch, without a reduction over replicas. All ranks of a replica call it.

    The weights do not change; the gradients are zero afterwards. With --fp8-recipe delayed, the scales are those after
    the step; the maxima of this pass are reduced and not kept.
    """
    # The interleaved schedule needs a multiple of the pipeline-parallel size.
    copies = parallel.pp_size if len(wrapped) > 1 else 1
    for chunk in wrapped:
        chunk.train()
    zero_gradients(wrapped)
    with _without_reductions(wrapped), fp8_state.preserved(wrapped):
        reports = forward_backward(wrapped, [batch] * copies, loss_function, parallel)
    value = torch.zeros(1, dtype=torch.float64, device=parallel.device)
    if reports:
        value += reports[0].loss_sum.detach() / max(reports[0].count, 1)
    loss = parallel.broadcast_from_last_pipeline_stage(value).item()
    parameters = global_parameters([chunk.module for chunk in wrapped])
    nonfinite = tuple(name for name, p in parameters if p.requires_grad and not torch.isfinite(p.main_grad).all())
    zero_gradients(wrapped)
    return MicroBatchResult(loss=loss, nonfinite_parameters=nonfinite)


def zero_gradients(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Set the gradient buffers to zero and drop the gradients that the parameters hold."""
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.grad = None


@contextlib.contextmanager
def _without_reductions(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside the context gradients stay on this rank: neither reduced over replicas nor divided by the global count."""
    config = wrapped[0].config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func")
    kept = {name: getattr(config, name) for name in names}
    with contextlib.ExitStack() as stack:
        for name, value in kept.items():
            stack.callback(setattr, config, name, value)
            setattr(config, name, None)
        for chunk in wrapped:
            stack.enter_context(chunk.no_sync())
        yield


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A micro-batch whose loss or gradient is not finite, as one rank saw it.

    `micro_batch` counts the micro-batches of the replica's step from 0; `other_micro_batches` failed in the same step.
    `loss` is the mean of the micro-batch, `grad_norm` the norm of the step. `known_gradient` `[N]` and `known_loss`
    belong to the packed batch.
    """

    iteration: int
    stage: str
    seed: int
    layout: dict[str, int]
    rank: int
    pipeline_rank: int
    tensor_rank: int
    data_rank: int
    micro_batch: int
    other_micro_batches: tuple[int, ...]
    loss: float
    grad_norm: float
    nonfinite_parameters: tuple[str, ...]
    shared_prefix: bool
    length: int
    temperature: float
    known_gradient: tuple[float, ...] | None
    known_loss: KnownLoss | None
    groups: tuple[Group, ...]

    def batch(self, *, multiple_of: int = 1) -> PackedBatch:
        """The packed micro-batch, ready to run. Its length is rounded up (to the tensor-parallel size)."""
        needed = packed_length(self.groups, shared_prefix=self.shared_prefix)
        length = -(-max(self.length, needed) // multiple_of) * multiple_of
        known = None if self.known_gradient is None else torch.tensor(self.known_gradient, dtype=torch.float32)
        return dataclasses.replace(
            pack_groups(self.groups, shared_prefix=self.shared_prefix, length=length),
            temperature=self.temperature,
            known_gradient=known,
            known_loss=self.known_loss,
        )


def write_reproduction(path: Path, found: Reproduction) -> None:
    """Write the file. It appears whole or not at all."""
    write_whole(path, json.dumps(_plain(dataclasses.asdict(found)), allow_nan=False) + "\n")


def read_reproduction(path: str | Path) -> Reproduction:
    """Read a file that `write_reproduction` has written.

    Raises:
        ConfigError: the file is not a reproduction file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _no_reproduction(path, error) from error
    try:
        known, known_loss = values["known_gradient"], values.get("known_loss")
        return Reproduction(
            **values
            | {
                "loss": _number(values["loss"]),
                "grad_norm": _number(values["grad_norm"]),
                "other_micro_batches": tuple(values["other_micro_batches"]),
                "nonfinite_parameters": tuple(values["nonfinite_parameters"]),
                "known_gradient": None if known is None else tuple(map(_number, known)),
                "known_loss": None if known_loss is None else _known_loss(known_loss),
                "groups": tuple(_group(group) for group in values["groups"]),
            }
        )
    except (KeyError, TypeError, UserError) as error:
        raise _no_reproduction(path, error) from error


def _no_reproduction(path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: not a reproduction file of megatron_brain ({error})")


def _number(value: object) -> float:
    """A number of the file. The file holds numbers that are not finite as texts."""
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _group(values: dict) -> Group:
    masks = values["loss_masks"]
    return Group(
        prompt=tuple(values["prompt"]),
        responses=tuple(map(tuple, values["responses"])),
        loss_masks=None if masks is None else tuple(map(tuple, masks)),
        values={name: tuple(map(_number, numbers)) for name, numbers in values["values"].items()},
        record_id=values["record_id"],
    )


def _known_loss(values: dict) -> KnownLoss:
    sums, maxima = ({name: _number(value) for name, value in values[key].items()} for key in ("mean_sums", "maxima"))
    return KnownLoss(
        loss_sum=_number(values["loss_sum"]), count=int(_number(values["count"])), mean_sums=sums, maxima=maxima
    )


def _plain(value: object) -> object:
    """The value, with a text in place of every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return json_number(value) if isinstance(value, float) else value
