"""How long training waits for a save, in the background and in the foreground.

    python tools/benchmark.py checkpoint --megabytes 500

Trains a model whose checkpoint has the size asked for (float32 weights and two moments of Adam, 12 bytes a parameter)
and saves it in turns: a synchronous save, and one in the background with training steps until it is done, pair after
pair in alternating order. Files are synced to the disk either way. It gives two figures:

- blocked: seconds that the saver's calls take from the loop, for a save in the background / for a synchronous save;
- lost: the same, plus the time by which steps beside the save are slower than steps without one.

Every save is read back and compared with the weights and moments at the moment of the call.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_brain.checkpointing import CheckpointSaver, TrainingState, read_info
from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.index import DATA_FILES
from megatron_brain.checkpointing.state import model_boxes, optimizer_boxes
from megatron_brain.checkpointing.storage import read_tensors
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import Group, PackedBatch, pack_groups
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.runtime import parallel
from megatron_brain.training.optimizer import build_optimizer, wrap_for_training
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward_backward

_BYTES_PER_PARAMETER = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=500, help="size of the checkpoint")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training step")
    parser.add_argument("--directory", type=Path, help="folder to write in [a temporary one]")
    parser.add_argument("--threads", type=int, default=2)


def run(args: argparse.Namespace) -> dict:
    """Measure.

    Returns:
        blocked_ratio, lost_ratio: medians of the pairs' ratios. sync_seconds, blocked_seconds, lost_seconds,
        background_seconds, step_seconds: medians. failures: saves that do not hold what they should.
    """
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        training = _Training(args.megabytes * 10**6 // _BYTES_PER_PARAMETER, args.tokens)
        savers = {kind: training.saver(Path(folder) / kind, in_background=kind == "background") for kind in _KINDS}
        for kind in _KINDS:  # this allocates copies and fills caches
            _measure(training, savers[kind], kind, 0, [])
        failures: list[str] = []
        pairs = []
        for number in range(1, args.pairs + 1):
            order = _KINDS if number % 2 else tuple(reversed(_KINDS))
            pair = {kind: _measure(training, savers[kind], kind, number, failures) for kind in order}
            pairs.append(pair)
            print(f"checkpoint {number}/{args.pairs}: {pair}", file=sys.stderr, flush=True)
        megabytes = sum(f.stat().st_size for f in read_info(Path(folder) / "sync").path.glob(DATA_FILES)) / 1e6
    sync = [pair["sync"].blocked for pair in pairs]
    background = [pair["background"] for pair in pairs]
    return {
        "megabytes": round(megabytes, 1),
        "blocked_ratio": statistics.median(b.blocked / s for b, s in zip(background, sync, strict=True)),
        "lost_ratio": statistics.median(b.lost / s for b, s in zip(background, sync, strict=True)),
        "sync_seconds": statistics.median(sync),
        "blocked_seconds": statistics.median(b.blocked for b in background),
        "lost_seconds": statistics.median(b.lost for b in background),
        "background_seconds": statistics.median(b.duration for b in background),
        "step_seconds": statistics.median(b.step for b in background),
        "failures": failures,
    }


_KINDS = ("sync", "background")


@dataclasses.dataclass(frozen=True)
class _Save:
    """Seconds of the saver's calls; of these plus the slower steps; until the save was complete; of a step alone."""

    blocked: float
    lost: float
    duration: float
    step: float


class _Training:
    """A model that trains on random tokens."""

    def __init__(self, parameters: int, tokens: int) -> None:
        self.config = RunConfig(stage="sft", model=_model(parameters))
        self.parallel = parallel.start(self.config.parallel, seed=1)
        self.chunks = build_model(self.config.model, self.config.parallel, self.parallel, head="policy", seed=1)
        self.wrapped = wrap_for_training(self.chunks, self.config, self.parallel)
        self.optimizer, self.scheduler = build_optimizer(self.wrapped, self.config, 1000)
        ids = torch.randint(0, self.config.model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
        half = tokens // 2
        group = Group(prompt=tuple(ids[:half].tolist()), responses=(tuple(ids[half:].tolist()),))
        self._batch = pack_groups([group], shared_prefix=True)
        self.step()

    def step(self) -> float:
        """Make a step and return its seconds."""
        start = time.perf_counter()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_backward(self.wrapped, [self._batch], _loss, self.parallel)
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return time.perf_counter() - start

    def saver(self, root: Path, *, in_background: bool) -> CheckpointSaver:
        settings = dataclasses.replace(
            self.config.checkpoint, save=str(root), async_save=in_background, save_interval=1, keep_latest=1
        )
        config = dataclasses.replace(self.config, checkpoint=settings)
        return CheckpointSaver(root, config, self.parallel, _NoTokenizer(), head="policy")

    def boxes(self) -> list[Box]:
        return model_boxes(self.chunks) + optimizer_boxes(self.optimizer, self.chunks)


class _NoTokenizer:
    def save(self, directory: Path) -> None:
        """There is none."""


def _loss(output: torch.Tensor, batch: PackedBatch) -> LossOutput:
    return LossOutput(loss_sum=-output.sum(), count=len(output))


def _model(parameters: int) -> ModelConfig:
    """A Llama of 8 layers whose width gives about so many parameters."""
    width = 64
    while _count(width) < parameters:
        width += 64
    sizes = {"num_layers": 8, "hidden_size": width, "ffn_hidden_size": 4 * width, "num_attention_heads": width // 64}
    return resolve(ModelConfig(vocab_size=8192, **sizes), None, "the benchmark")


def _count(width: int) -> int:
    return 8192 * width + 8 * (4 + 3 * 4) * width**2


def _measure(training: _Training, saver: CheckpointSaver, kind: str, iteration: int, failures: list[str]) -> _Save:
    alone = statistics.median(training.step() for _ in range(3))
    state = TrainingState(optimizer=training.optimizer, scheduler=training.scheduler)
    asked = [dataclasses.replace(box, data=box.data.clone()) for box in training.boxes()]
    start = time.perf_counter()
    saver.save(iteration, training.chunks, state)
    blocked = time.perf_counter() - start
    slower = 0.0
    while saver.in_progress:
        slower += training.step() - alone
    duration = time.perf_counter() - start
    waiting = time.perf_counter()
    saver.wait()
    blocked += time.perf_counter() - waiting
    stored = read_tensors(read_info(saver.root).path)
    wrong = [box.key for box in asked if not torch.equal(_part(stored[box.key], box), box.data)]
    if wrong:
        failures.append(f"{kind} save {iteration} does not hold {', '.join(wrong[:3])} as it was")
    return _Save(round(blocked, 3), round(blocked + slower, 3), round(duration, 3), round(alone, 3))


def _part(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.data.shape, strict=True))]
