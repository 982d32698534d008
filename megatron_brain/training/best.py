"""Which checkpoint of a run is the best so far, by one metric of its validations."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from megatron_brain.errors import AgreedError, did_you_mean

log = logging.getLogger(__name__)

Direction = Literal["highest", "lowest"]
"""Whether the highest or the lowest value of a metric is the best."""

_PREFIX = "validation/"


class BestCheckpoint:
    """The best value of a metric so far, and the iteration that had it.

    The validation before the first step does not count: no checkpoint has these weights.

    Args:
        asked: the value of --keep-best: the name of a metric of validations, with or without `validation/`.
        known: the metrics that can be asked for, with the direction that is better.

    Raises:
        AgreedError: there is no such metric.
    """

    def __init__(self, asked: str, known: Mapping[str, Direction]) -> None:
        self.metric = asked.strip().removeprefix(_PREFIX)
        if self.metric not in known:
            ways = ", ".join(f"{name} ({direction})" for name, direction in known.items())
            raise AgreedError(
                f"keep_best={asked!r}: validations of this run have no metric {self.metric!r} of which the highest or "
                f"the lowest value is the best, only {ways}{did_you_mean(self.metric, known)}"
            )
        self._direction = known[self.metric]
        self._value: float | None = None
        self.iteration: int | None = None
        """The iteration that had the best value, if its checkpoint is in the run's --save."""

    def see(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a validation. A value that is not a number is never the best."""
        value = metrics[_PREFIX + self.metric]
        if iteration == 0 or math.isnan(value) or not self._is_better(value):
            return
        log.info("%s%s %.6g is the best so far: iteration %d is kept", _PREFIX, self.metric, value, iteration)
        self._value, self.iteration = value, iteration

    def _is_better(self, value: float) -> bool:
        if self._value is None:
            return True
        return value > self._value if self._direction == "highest" else value < self._value

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        return {"metric": self.metric, "value": self._value, "iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any] | None, *, same_folder: bool) -> None:
        """Go on comparing with the best of an earlier run. With another metric, or without a state, begin anew.

        Args:
            state: what `state_dict` returned; None: the earlier run looked for no best checkpoint.
            same_folder: whether its checkpoints are in the run's --save.
        """
        if state is None or state["metric"] != self.metric:
            log.info("the earlier run did not look for the best %s%s: this one begins to", _PREFIX, self.metric)
            return
        self._value, self.iteration = state["value"], state["iteration"] if same_folder else None
