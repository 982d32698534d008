"""Loads checkpoints into models and optimizers of any layout."""

import logging
from collections.abc import Sequence

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_brain.checkpointing.errors import COPY, DamagedError
from megatron_brain.checkpointing.folders import INFO, CheckpointInfo
from megatron_brain.checkpointing.state import (
    fp8_boxes,
    model_boxes,
    optimizer_boxes,
    random_boxes,
    set_optimizer_steps,
    zero_vocabulary_padding,
)
from megatron_brain.checkpointing.storage import read_boxes
from megatron_brain.config.stage_spec import Head
from megatron_brain.errors import ConfigError
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.fp8.weights import written
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.runtime.random_state import random_state, set_random_state

log = logging.getLogger(__name__)

_REWARD_HEAD = "reward_head.weight"


def load_weights(info: CheckpointInfo, chunks: Sequence[Chunk], *, head: Head, verify: bool = True) -> None:
    """Load a checkpoint's weights into `chunks` of any layout. A reward model may start from a policy's trunk.

    Args:
        verify: compare what is read with its checksums.

    Raises:
        ConfigError: a policy cannot be loaded from a reward model's checkpoint, which has no output layer; or a weight
            is missing or damaged.
    """
    if head == "policy" and info.head == "reward":
        raise ConfigError(f"{info.path} is a reward model; a policy is needed here: give the SFT or BRAIn checkpoint")
    with written(chunks):
        _read_weights(info, chunks, head=head, verify=verify)


def _read_weights(info: CheckpointInfo, chunks: Sequence[Chunk], *, head: Head, verify: bool) -> None:
    boxes = model_boxes(chunks)
    if head == "reward" and info.head == "policy":
        # The reward model keeps its own new head.
        boxes = [box for box in boxes if box.key != _REWARD_HEAD]
    # FP8 scales belong to the weights, so they are loaded with them if the checkpoint has them.
    read_boxes(boxes, info.path, if_alike=[fp8_boxes(chunks)], verify=verify)
    zero_vocabulary_padding(chunks)


def load_training_state(
    info: CheckpointInfo,
    chunks: Sequence[Chunk],
    *,
    parallel: Parallel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    verify: bool = True,
) -> None:
    """Load weights, optimizer, schedule and random states, so that the run goes on as if it had not stopped.

    Distributed and other optimizers load each other's state. The learning rate and its schedule stay those of this
    run; only the position comes from the checkpoint. Another precision of FP8 is allowed, with a warning.

    Raises:
        ConfigError: the checkpoint was saved without its optimizer, or in another precision.
        DamagedError: the checkpoint is damaged.
    """
    if not info.has_optimizer:
        raise ConfigError(
            f"{info.path} holds no optimizer state (it was converted, or saved with --no-save-optim): "
            "add --finetune to start from its weights"
        )
    bf16 = chunks[0].config.bf16
    if info.bf16 != bf16:
        raise ConfigError(
            f"{info.path} was trained with bf16={info.bf16}, this run has bf16={bf16}: resume in the same precision, "
            "or add --finetune to start from its weights"
        )
    boxes, generators, scales = optimizer_boxes(optimizer, chunks), random_state(), fp8_boxes(chunks)
    # At another layout random states have another shape, and another device has other generators.
    if_alike = [random_boxes(generators, parallel), scales]
    with written(chunks):
        same_generators, same_scales = read_boxes(
            model_boxes(chunks) + boxes, info.path, if_alike=if_alike, verify=verify
        )
    if same_generators:
        set_random_state(generators)
    else:
        log.warning(
            "saved at layout %s or on another device: random states, which only dropout uses, are those of a new run",
            info.layout,
        )
    before, now = info.trainer_state.get("fp8", "no FP8"), fp8_state.summary(chunks)
    if before != now:
        log.warning("%s was trained with %s, this run goes on with %s", info.path, before, now)
    if scales and not same_scales:
        log.warning(
            "%s has no FP8 scales for --fp8-recipe delayed with this --fp8-amax-history-len: those of weights come "
            "from the weights, the others begin anew",
            info.path,
        )
        fp8_state.scale_weights(chunks, parallel.groups.tp)
    zero_vocabulary_padding(chunks)
    try:
        set_optimizer_steps(optimizer, info.trainer_state["optimizer_steps"])
        scheduler.load_state_dict(info.trainer_state["scheduler"])
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{info.path / INFO} is damaged: its trainer_state lacks {error}. {COPY}") from error
