"""Length of the run, batch sizes, checkpoints and logging."""

from dataclasses import dataclass

from megatron_brain.errors import ConfigError

_POSITIVE = ("micro_batch_size", "max_tokens_per_micro_batch", "global_batch_size", "train_iters", "eval_interval")


@dataclass(kw_only=True)
class TrainingConfig:
    """Batch sizes, length of the run and validation."""

    micro_batch_size: int = 1
    """Samples of one forward-backward pass. A sample is a packed sequence (sft), a pair (reward) or a group (brain)."""

    max_tokens_per_micro_batch: int | None = None
    """Pack groups into micro-batches of at most this many tokens instead of --micro-batch-size samples; a brain group
    that is larger is cut into parts and takes two passes."""

    global_batch_size: int = 8
    """Samples of one optimizer step over all data-parallel processes."""

    train_iters: int | None = None
    """Optimizer steps to take; unset: --train-epochs decides."""

    train_epochs: float | None = None
    """Passes over the training records where --train-iters is unset; default: 1."""

    exit_duration_in_mins: float | None = None
    """Save and stop, with exit status 0, after the first step that ends later than this many minutes after the start of
    the process. Leave time for a step and a save before the job's limit. Unset: no limit."""

    eval_interval: int | None = None
    """Steps between validations; unset: only before the first and after the last step."""

    shared_prefix: bool = True
    """Compute a prompt once for all its responses (reward pairs, brain groups, scoring)."""

    seed: int = 1234
    """Seed of initial weights, data order, dropout and sampling."""

    dry_run: bool = False
    """Resolve and check everything for WORLD_SIZE processes, print a report and stop. It needs no GPU, no process group
    and no weights, and names what is not on this machine."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.train_epochs is not None and self.train_epochs <= 0:
            raise ConfigError(f"train_epochs={self.train_epochs}: must be positive")
        if self.train_iters is not None and self.train_epochs is not None:
            raise ConfigError("train_iters and train_epochs are both set: give one of them")
        if self.exit_duration_in_mins is not None and self.exit_duration_in_mins <= 0:
            raise ConfigError(f"exit_duration_in_mins={self.exit_duration_in_mins}: must be positive")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be at least 0 and less than 2**32, as numpy takes it")
        if self.max_tokens_per_micro_batch is not None and self.micro_batch_size != 1:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} and "
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} both size micro-batches: give one"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where weights are loaded from and saved to."""

    load: str | None = None
    """Checkpoint folder to resume from; with --finetune, only its weights are taken."""

    finetune: bool = False
    """Take only the weights of --load and start at step 0 with a fresh optimizer and data order."""

    auto_resume: bool = False
    """Resume from --save where it already holds a checkpoint (for requeued jobs), otherwise use --load."""

    save: str | None = None
    """Folder to write iter_NNNNNNN checkpoints into."""

    save_interval: int | None = None
    """Steps between checkpoints; unset: only the last step is saved."""

    async_save: bool = False
    """Write checkpoints during training, from a copy in host memory."""

    keep_latest: int | None = None
    """Number of checkpoints to keep in --save, the latest ones; unset: all."""

    keep_best: str | None = None
    """Save at validations that improve this metric, such as validation/loss, and keep the best of these checkpoints."""

    save_optim: bool = True
    """Save optimizer state, which resuming needs; it is more than half of a checkpoint."""

    verify: bool = True
    """Compare what is loaded from a checkpoint with its checksums."""

    def __post_init__(self) -> None:
        if self.save_interval is not None and self.save_interval < 1:
            raise ConfigError(f"save_interval={self.save_interval}: must be at least 1")
        if self.save_interval is not None and self.save is None:
            raise ConfigError(f"save_interval={self.save_interval} needs --save")
        if self.keep_latest is not None and self.keep_latest < 1:
            raise ConfigError(f"keep_latest={self.keep_latest}: must be at least 1")
        for name in ("async_save", "keep_latest", "keep_best"):
            if getattr(self, name) and self.save is None:
                raise ConfigError(f"{name}={getattr(self, name)} needs --save")
        if self.finetune and self.load is None:
            raise ConfigError("finetune=true needs --load, the checkpoint whose weights to take")
        if self.auto_resume and self.save is None:
            raise ConfigError("auto_resume=true needs --save, the folder to resume from")
        if self.auto_resume and not self.save_optim:
            raise ConfigError(
                "auto_resume=true needs save_optim: a checkpoint without optimizer state cannot be resumed"
            )


@dataclass(kw_only=True)
class LoggingConfig:
    """What a run shows and writes about itself."""

    log_interval: int = 1
    """Steps between lines on the console; the files get every step."""

    log_metrics: str | None = None
    """Metrics on the console: their names in metrics.jsonl with commas between them, or `all`; unset: the few that the
    stage chooses. The files get all."""

    tensorboard_dir: str | None = None
    """Folder of the TensorBoard event file and metrics.jsonl; default: --save."""

    progress: bool = True
    """Show a live progress line on rank 0 when the output is a terminal."""

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ConfigError(f"log_interval={self.log_interval}: must be at least 1")
