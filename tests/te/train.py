"""Trains with the `transformer_engine` layers on a CPU: `train.py FOLDER CASES`, alone or under torchrun.

CASES is JSON, the options of `Training` by name. In FOLDER/<name>, `local` holds a checkpoint written with the local
layers. This script writes `te`, with checkpoints after two and three steps, and `from_local`, with a checkpoint of the
model loaded from `local` and one after another step. In each, `outputs.json` has the outputs of the model of iteration
2 for a batch.

Under torchrun the layers are split over all processes, with sequence parallelism.
"""

import json
import os
import sys
from pathlib import Path

import fake_te

# This comes before megatron-core looks for Transformer Engine.
fake_te.import_without_extension()

# ruff: noqa: E402
from helpers.tiny_training import BATCHES, Training

from megatron_brain.checkpointing import read_info
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models import provider
from megatron_brain.models.te_attention import TransformerEngineAttention
from megatron_brain.runtime import parallel


def save(training: Training, folder: Path) -> None:
    """Write the checkpoint of iteration 2 and the model's outputs."""
    training.save(folder, 2)
    outputs = training.chunks[0](BATCHES[0]).tolist()
    if training.parallel.is_writer:
        (folder / "outputs.json").write_text(json.dumps(outputs))


def train(case: Path, **options: object) -> None:
    """Do what the module's docstring says, for one case."""
    straight = Training(**options)
    assert isinstance(straight.chunks[0].decoder.layers[0].self_attention.core_attention, TransformerEngineAttention)
    for _ in range(2):
        straight.step()
    save(straight, case / "te")
    resumed = Training(seed=99, **options)
    resumed.resume(read_info(case / "local" / "iter_0000002"))
    save(resumed, case / "from_local")
    for training, name in ((straight, "te"), (resumed, "from_local")):
        training.step()
        training.save(case / name, 3)


def main(folder: Path, cases: dict[str, dict]) -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=size > 1)
    world = parallel.start(layout, seed=1)
    fake_te.claim_cuda()
    # The function refuses Transformer Engine on the CPU.
    provider.choose_transformer_impl = lambda requested, device: (requested, "asked for")
    for name, options in cases.items():
        train(folder / name, parallel=world, layout=layout, transformer_impl="transformer_engine", **options)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
