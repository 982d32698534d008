"""Checkpoints. They are complete or absent, load at any layout, and loading executes nothing that they contain.

<save>/latest_checkpointed_iteration.txt     written last, by rename
<save>/best                                  link to the best checkpoint, of a run with --keep-best
<save>/iter_0000100/                         appears by rename, when every rank's files are complete and synced
    weights_00000.safetensors                the boxes of tensors that a rank wrote
    tensors.json                             the list of tensors: the file and the checksum of each of their boxes
    megatron_brain.json                      iteration, head, architecture, position in the data, optimizer steps,
                                             checksums of the other small files
    records/replica_00000.jsonl              a replica's records of the stage (brain: the round's rollouts)
    config.yaml                              the run's resolved configuration
    tokenizer/                               the tokenizer
"""

from megatron_brain.checkpointing.errors import CheckpointError
from megatron_brain.checkpointing.folders import (
    CheckpointInfo,
    check_best,
    has_checkpoint,
    read_info,
    read_records,
    require_files,
)
from megatron_brain.checkpointing.index import index_checksum
from megatron_brain.checkpointing.load import load_training_state, load_weights
from megatron_brain.checkpointing.save import (
    CheckpointSaver,
    TrainingState,
    publish_checkpoint,
    tokenizer_files,
)

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointSaver",
    "TrainingState",
    "check_best",
    "has_checkpoint",
    "index_checksum",
    "load_training_state",
    "load_weights",
    "publish_checkpoint",
    "read_info",
    "read_records",
    "require_files",
    "tokenizer_files",
]
