"""Checkpoints through megatron-core's dist_checkpointing: saved at one layout, loaded at any.

<save>/latest_checkpointed_iteration.txt     written last, by rename
<save>/iter_0000100/                         tensors, sharded; common.pt, metadata.json of megatron-core
<save>/iter_0000100/megatron_brain.json      iteration, head, architecture, position in the data
<save>/iter_0000100/config.yaml              the run's resolved configuration
<save>/iter_0000100/tokenizer/               the tokenizer
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_brain.config.errors import ConfigError
from megatron_brain.config.loader import save_config
from megatron_brain.config.run import RunConfig
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.files import write_whole
from megatron_brain.models.architecture import architecture
from megatron_brain.models.provider import Chunk, Head
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.runtime.random_state import random_state, set_random_state

log = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
INFO = "megatron_brain.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself, readable without a process group."""

    path: Path
    iteration: int
    stage: str
    head: Head
    architecture: dict
    tokenizer_type: str
    stage_state: dict
    has_optimizer: bool
    bf16: bool
    layout: dict[str, int]
    """Sizes of the pipeline, tensor and data parallelism it was saved at; it loads at any."""

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a folder holds a complete checkpoint."""
    return (Path(directory) / LATEST).is_file()


def read_info(directory: str | Path) -> CheckpointInfo:
    """Find the latest complete checkpoint in `directory`, or the one it is when it is an iter_ folder itself.

    Raises:
        ValueError: the folder does not exist, holds no checkpoint, or not one of ours.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ConfigError(f"checkpoint folder {root.resolve()} does not exist")
    path = root
    if not (root / INFO).is_file():
        if not has_checkpoint(root):
            raise ConfigError(
                f"{root.resolve()} holds no checkpoint: it has no {LATEST}; was --save of the earlier run another?"
            )
        text = (root / LATEST).read_text().strip()
        if not text.isdigit():
            raise ConfigError(f"{root / LATEST} says {text!r}, which is not an iteration number")
        path = iteration_dir(root, int(text))
    if not (path / INFO).is_file():
        raise ConfigError(f"{path} has no {INFO}: it was not written by megatron_brain, or its save was cut off")
    values = json.loads((path / INFO).read_text())
    known = {field.name for field in dataclasses.fields(CheckpointInfo)} - {"path"}
    if values.keys() != known:
        differing = ", ".join(sorted(values.keys() ^ known))
        raise ConfigError(f"{path / INFO} was written by another version of megatron_brain: it differs in {differing}")
    return CheckpointInfo(path=path, **values)


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Folder of one iteration's checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def save_checkpoint(
    root: str | Path,
    iteration: int,
    *,
    chunks: Sequence[Chunk],
    head: Head,
    config: RunConfig,
    tokenizer: Tokenizer,
    parallel: Parallel,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    stage_state: dict | None = None,
) -> Path:
    """Write `iter_<iteration>` and then move latest_checkpointed_iteration.txt to it. All ranks call it.

    Args:
        config: configuration with the model's sizes resolved.
        stage_state: JSON-able state of the stage: position in the data, round.
    """
    path = iteration_dir(root, iteration)
    if parallel.is_writer:
        if path.exists():
            log.warning("%s exists from an earlier run and is replaced", path)
            latest = Path(root) / LATEST
            if latest.is_file() and latest.read_text().strip() == str(iteration):
                latest.unlink()
            shutil.rmtree(path)
        path.mkdir(parents=True)
    parallel.barrier()
    state = _sharded_state(chunks, parallel, optimizer, scheduler)
    dist_checkpointing.save(state, str(path))
    if parallel.is_writer:
        tokenizer.save(path / "tokenizer")
        save_config(config, path / "config.yaml")
        info = {
            "iteration": iteration,
            "stage": config.stage,
            "head": head,
            "architecture": architecture(config.model),
            "tokenizer_type": config.tokenizer.tokenizer_type,
            "stage_state": stage_state or {},
            "has_optimizer": optimizer is not None,
            "bf16": config.model.bf16,
            "layout": _layout(parallel),
        }
        (path / INFO).write_text(json.dumps(info, indent=2))
        write_whole(Path(root) / LATEST, str(iteration))
    parallel.barrier()
    return path


def load_weights(info: CheckpointInfo, chunks: Sequence[Chunk], *, head: Head) -> None:
    """Load a checkpoint's weights into `chunks` of any layout; a reward model may start from a policy's trunk.

    Raises:
        ValueError: a policy is asked from a reward checkpoint, whose output layer is gone.
    """
    if head == "policy" and info.head == "reward":
        raise ConfigError(f"{info.path} is a reward model; a policy is needed here: give the SFT or BRAIn checkpoint")
    state = _model_state(chunks)
    if head == "reward" and info.head == "policy":
        for chunk_state in state.values():
            chunk_state.pop("reward_head.weight", None)
    _load_into(chunks, _load(state, info.path))


def load_training_state(
    info: CheckpointInfo,
    chunks: Sequence[Chunk],
    *,
    parallel: Parallel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Load weights, optimizer, schedule and random states, to go on as if never stopped.

    Raises:
        ValueError: the checkpoint was saved without its optimizer, or in another precision.
    """
    if not info.has_optimizer:
        raise ConfigError(f"{info.path} was saved with --no-save-optim: add --finetune to start from its weights")
    bf16 = chunks[0].config.bf16
    if info.bf16 != bf16:
        raise ConfigError(
            f"{info.path} was trained with bf16={info.bf16}, this run has bf16={bf16}: resume in the same precision, "
            "or add --finetune to start from its weights"
        )
    state = _sharded_state(chunks, parallel, optimizer, scheduler, loading=True)
    same_layout = info.layout == _layout(parallel)
    if not same_layout:
        log.warning("saved at layout %s: random states, which only dropout uses, start from the seed", info.layout)
        del state["random_state"]
    loaded = _load(state, info.path)
    _load_into(chunks, loaded)
    # The saved state brings the earlier run's settings along; a resumed run follows its own flags.
    own = [{name: v for name, v in group.items() if name not in ("params", "step")} for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        set_random_state(loaded["random_state"])


def _sharded_state(
    chunks: Sequence[Chunk],
    parallel: Parallel,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    loading: bool = False,
) -> dict:
    state: dict = _model_state(chunks)
    if optimizer is not None and scheduler is not None:
        merged = {f"{key}.{name}": value for key, part in state.items() for name, value in part.items()}
        state["optimizer"] = optimizer.sharded_state_dict(
            merged if len(chunks) > 1 else state["model0"], is_loading=loading
        )
        state["scheduler"] = scheduler.state_dict()
        ranks = (parallel.pp_rank, parallel.tp_rank, parallel.dp_rank)
        state["random_state"] = ShardedObject("random_state", random_state(), tuple(_layout(parallel).values()), ranks)
    return state


def _layout(parallel: Parallel) -> dict[str, int]:
    return {"pipeline": parallel.pp_size, "tensor": parallel.tp_size, "data": parallel.dp_size}


def _model_state(chunks: Sequence[Chunk]) -> dict:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def _load(state: dict, path: Path) -> dict:
    return dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)


def _load_into(chunks: Sequence[Chunk], loaded: dict) -> None:
    for i, chunk in enumerate(chunks):
        # Not strict: a reward model that starts from a policy keeps its own new head. What else is missing has been
        # refused by dist_checkpointing.
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)
