"""A trainer of ours and one of transformers or TRL, both a step at a time, so that their steps can be timed."""

import argparse
import concurrent.futures
import queue
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl
from transformers import Trainer as HFTrainer

from benchmarks.real_work import Work
from benchmarks.timing import compare
from megatron_brain.config.loader import config_from_dict
from megatron_brain.data.groups import Group
from megatron_brain.errors import ConfigError
from megatron_brain.training.run import Run
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Stage, Trainer

_MANY_STEPS = 1_000_000
"""More steps than are ever taken."""

LR = 5e-5
"""Learning rate of both sides. It is so large that a few steps change the loss visibly, which is compared."""

_ADAM = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95}

_LOSS_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Largest difference of losses that rounding explains, relative to the larger of the loss and 1."""


def open_stage_run(work: Work, stage: str, **settings: object) -> Run:
    """A run of one of our stages with the optimizer that both sides have. It saves nothing."""
    common = {
        "bf16": work.dtype == torch.bfloat16,
        "train_iters": _MANY_STEPS,
        "lr": LR,
        "lr_decay_style": "constant",
        **_ADAM,
        "adam_eps": 1e-8,
        "clip_grad": 1.0,
        "seed": work.seed,
        "progress": False,
    }
    return open_run(config_from_dict(stage, common | settings, "the benchmark"))


class OurTrainer:
    """Our trainer and stage. `losses` are those before each step, `metrics` those of the last one."""

    def __init__(self, run: Run, make_stage: Callable[[Run], Stage]) -> None:
        self.run = run
        self.stage = make_stage(run)
        self.trainer = Trainer(run, self.stage)
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}

    def groups(self) -> list[Group]:
        """The groups of the next step."""
        return [group for micro_batch in self.stage.micro_batches(self.trainer) for group in micro_batch]

    def records(self) -> list[dict]:
        """What the stage would save of its round."""
        return list(self.stage.records(self.trainer))

    def step(self) -> None:
        """Take one optimizer step, its batch included."""
        self.metrics = self.trainer.step(self.stage.micro_batches(self.trainer))
        self.losses.append(self.metrics["loss"])


def add_peer_arguments(
    parser: argparse.ArgumentParser, *, micro_batch: int, of: str, peer_micro_batch: int, of_peer: str | None = None
) -> None:
    """Add flags of the two sides' batches, and of TRL's weights. The defaults are the fastest of those tried.

    Args:
        parser: where to add them.
        micro_batch, peer_micro_batch: default sizes.
        of, of_peer: what is counted; TRL may count something else.
    """
    group = parser.add_argument_group("sides")
    group.add_argument("--micro-batch-size", type=int, default=micro_batch, help=f"{of} of a pass, ours [%(default)s]")
    group.add_argument(
        "--peer-micro-batch-size", type=int, default=peer_micro_batch, help=f"{of_peer or of}, TRL [%(default)s]"
    )
    group.add_argument(
        "--peer-weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of TRL's weights and moments; float32 computes in --dtype by autocast [%(default)s]",
    )


def peer_dtype(args: argparse.Namespace) -> torch.dtype:
    """Dtype of the weights of TRL's trainer."""
    return getattr(torch, args.peer_weights)


def peer_settings(work: Work, args: argparse.Namespace, *, batch: int, lr: float = LR) -> dict:
    """Arguments of a trainer of transformers or TRL: our optimizer, and neither files nor trackers.

    Activations are kept: TRL's default computes them a second time, which saves memory and would only slow it down.

    Args:
        work: what is trained.
        args: the flags of `add_peer_arguments`.
        batch: samples of an optimizer step.
        lr: the learning rate.

    Raises:
        ConfigError: micro-batches do not fill the batch.
    """
    size = args.peer_micro_batch_size
    if size < 1 or batch % size:
        raise ConfigError(f"--peer-micro-batch-size {size} does not divide the {batch} samples of a step")
    return {
        "optim": "adamw_torch_fused",
        **_ADAM,
        "adam_epsilon": 1e-8,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_steps": _MANY_STEPS,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": batch // size,
        "bf16": work.dtype == torch.bfloat16 and args.peer_weights == "float32",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "output_dir": str(work.folder / "peer"),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": work.seed,
    }


class PeerTrainer:
    """A trainer of transformers or TRL whose steps can be timed one by one, in turns with ours.

    The trainer's own loop runs and waits between two steps, so a timed step is everything that the loop does: it takes
    and collates the batch, computes, updates the weights and logs. Our steps run in the same thread meanwhile. In
    another thread they would have threads of OpenMP of their own, and as soon as there are more of these than cores,
    they all sleep where they would otherwise wait actively, which slows many short parallel sections down.
    """

    def __init__(self, trainer: HFTrainer) -> None:
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Pause(self))
        self.logs: list[dict[str, float]] = []
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    @property
    def losses(self) -> list[float]:
        """The losses before each step."""
        return [log["loss"] for log in self.logs]

    def compare(self, ours: Callable[[], object], **settings: Any) -> dict:
        """`timing.compare` of our steps and the trainer's, with its settings.

        Raises:
            whatever one of the two raised.
        """
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
            timed = pool.submit(self._time, ours, settings)
            try:
                self.trainer.train()
            except BaseException as error:
                self._answers.put(error)
                raise
            return timed.result()

    def _time(self, ours: Callable[[], object], settings: dict) -> dict:
        try:
            return compare(lambda: self._ask(ours), lambda: self._ask(_next_step), **settings)
        finally:
            self._asked.put(_stop)

    def _ask(self, call: Callable[[], object]) -> None:
        self._asked.put(call)
        error = self._answers.get()
        if error is not None:
            raise error

    def serve(self, control: TrainerControl) -> None:
        """Make the calls that are asked for, until the next step or the end is."""
        while (call := self._asked.get()) not in (_next_step, _stop):
            try:
                call()
            except BaseException as error:
                self._answers.put(error)
            else:
                self._answers.put(None)
        control.should_training_stop = call is _stop

    def step_is_over(self, logs: dict[str, float]) -> None:
        """Keep the logs of a step and say that it is over."""
        self.logs.append(logs)
        self._answers.put(None)


def _next_step() -> None:
    """Asks for the trainer's next step."""


def _stop() -> None:
    """Asks for the end of training."""


class _Pause(TrainerCallback):
    """Waits before the first step, and after each step's log, the last thing that a step does."""

    def __init__(self, peer: PeerTrainer) -> None:
        self._peer = peer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._peer.serve(control)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:  # The summary at the end has none.
            self._peer.step_is_over(dict(logs))
            self._peer.serve(control)


def compare_losses(ours: Sequence[float], theirs: Sequence[float], work: Work, failures: list[str]) -> dict:
    """Losses before the first and the last update. The second tells whether updates were the same too.

    A difference that rounding does not explain is added to `failures`.
    """
    report = {}
    limit = _LOSS_LIMITS[work.dtype]
    for when, place in (("first", 0), ("last", -1)):
        mine, peers = ours[place], theirs[place]
        report[when] = {"ours": mine, "baseline": peers}
        if not abs(mine - peers) <= limit * max(abs(peers), 1.0):
            failures.append(f"the {when} losses are {mine:.4f} and {peers:.4f}: they may differ by {limit:g} of them")
    return report


def required(least: float, ratio: float) -> dict:
    """The ratio that is required of the default sizes and a model of 135M parameters, and whether it is reached."""
    return {"required_ratio": least, "reached": ratio >= least}
