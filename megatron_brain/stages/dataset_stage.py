"""The common part of stages that train on a fixed set of samples."""

from collections.abc import Mapping, Sequence

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.data.order import SampleOrder, replica_share
from megatron_brain.errors import AgreedError
from megatron_brain.planning.summary import Row
from megatron_brain.training.best import Direction
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import as_state, require_same_as_before
from megatron_brain.training.schedule import plan_step
from megatron_brain.training.trainer import Trainer
from megatron_brain.training.validation import mean_loss


class DatasetStage:
    """A stage over a list of samples, each a few groups. It trains on shuffled epochs and validates on a fixed list.

    Every replica holds all samples. Seed and iteration decide which ones a step takes.
    """

    mean_metrics: tuple[str, ...] = ()
    max_metrics: tuple[str, ...] = ()
    occasional_metrics: tuple[str, ...] = ()
    """Names of the means that only the validation reports, from the head's scores of each token."""
    directions: Mapping[str, Direction] = {"loss": "lowest"}
    """The metrics of validations by which one checkpoint is better than another."""
    shown_metrics: tuple[str, ...] = ("loss", "tokens_per_second")

    @classmethod
    def metric_names(cls, config: RunConfig) -> tuple[str, ...]:
        """Names of the metrics that the stage logs."""
        return (*cls.mean_metrics, *cls.max_metrics, *cls.occasional_metrics)

    @classmethod
    def best_metrics(cls, config: RunConfig) -> Mapping[str, Direction]:
        """The metrics of validations by which one checkpoint is better than another."""
        return cls.directions

    def __init__(
        self,
        run: Run,
        train: Sequence[Sequence[Group]],
        valid: Sequence[Sequence[Group]],
        *,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        settings = run.config.training
        self.shared_prefix = settings.shared_prefix
        self._train, self._valid = train, valid
        self._order = SampleOrder(len(train), seed=settings.seed)
        self.train_iters = spec_of(run.config).length(run.config, len(train)).train_iters
        self._fixed = {**fixed_settings(run.config), "num_samples": len(train), **(fixed or {})}
        self._config, self._corpora = run.config, run.corpora

    def summary(self) -> list[Row]:
        """A row with steps and epochs."""
        epochs = self.train_iters * self._config.training.global_batch_size / len(self._train)
        unit = spec_of(self._config).work(self._config).unit
        return [("steps", f"{self.train_iters:,}: {epochs:.3g} epochs of {len(self._train):,} {unit}")]

    def micro_batches(self, trainer: Trainer) -> list[list[Group]]:
        """This replica's micro-batches of the next step."""
        settings, parallel = trainer.config.training, trainer.parallel
        step = self._order.step(trainer.iteration, settings.global_batch_size)
        if settings.max_tokens_per_micro_batch is not None:
            return self._planned([group for index in step for group in self._train[index]], trainer)
        shares = replica_share(
            step, micro_batch_size=settings.micro_batch_size, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size
        )
        return [[group for index in share for group in self._train[index]] for share in shares]

    def _planned(self, groups: Sequence[Group], trainer: Trainer) -> list[list[Group]]:
        """This replica's groups of a step in micro-batches that fit the token budget. No group is cut."""
        plan = plan_step(
            groups,
            trainer.config.training,
            trainer.parallel,
            interleaved=trainer.config.parallel.num_layers_per_virtual_pipeline_stage is not None,
            round_to=trainer.config.fp8.packed_multiple(trainer.config.parallel),
            step=trainer.iteration,
            splittable=False,
        )
        return [[groups[piece.group] for piece in micro_batch] for micro_batch in plan]

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """The batches as they are: the loss needs nothing before the first backward pass."""
        return batches

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """Loss and metrics on the validation samples."""
        if not self._valid:
            return {}
        return mean_loss(
            trainer.gathered_chunks(),
            self._valid,
            self.loss,
            trainer.parallel,
            micro_batch_size=trainer.config.training.micro_batch_size,
            shared_prefix=self.shared_prefix,
            mean_names=(*self.mean_metrics, *self.occasional_metrics),
            max_names=self.max_metrics,
            token_scores=bool(self.occasional_metrics),
        )

    def end_reason(self) -> None:
        """No validation ends the run."""
        return None

    def before_update(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Nothing to check."""

    def after_step(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Nothing to add."""
        return {}

    def state_dict(self) -> dict:
        """What must not change over a resume. The position in the data follows from the iteration."""
        return {**self._fixed, "data": as_state(self._corpora)}

    def records(self, trainer: Trainer) -> list[dict]:
        """No records."""
        return []

    def load_state_dict(self, state: dict, records: Sequence[dict]) -> None:
        """Refuse to continue with other data, because their order would be another."""
        check_unchanged(self._fixed, state)
        require_same_as_before(self._corpora, state.get("data"))


def fixed_settings(config: RunConfig) -> dict:
    """Settings that a resumed run must keep, because its position in the data follows from them."""
    return {"seed": config.training.seed, "global_batch_size": config.training.global_batch_size}


def check_unchanged(now: dict, earlier: dict) -> None:
    """Compare what must not change over a resume, as far as the checkpoint has it.

    Raises:
        AgreedError: it names what changed, with both values.
    """
    changed = [
        f"{name} was {earlier[name]}, is now {value}"
        for name, value in now.items()
        if name in earlier and earlier[name] != value
    ]
    if changed:
        raise AgreedError(
            f"the run cannot be resumed: {'; '.join(changed)}. Resume with the same data and settings, or start anew "
            "from the weights with --finetune"
        )
