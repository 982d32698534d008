"""Zero and unit of reward models whose rewards are averaged: rewards of different models have no common scale."""

import math
from collections.abc import Mapping, Sequence


class Scale:
    """Means and deviations of reward models by name, measured once and then kept.

    They are measured on the first responses that a run scores: those of all prompts and all replicas. So the reward
    stays one function of prompt and response for the whole run, and the posterior does not move. The unit is the
    deviation between responses to the *same* prompt, so a constant that a model adds for a prompt changes nothing that
    an objective sees. Exactly rounded sums make the numbers independent of the layout.
    """

    def __init__(self) -> None:
        self._measured: dict[str, tuple[float, float]] = {}

    def lacks(self, name: str) -> bool:
        """Whether the model has not been measured, or only on responses that it could not tell apart."""
        return name not in self._measured

    def measure(self, name: str, rewards: Sequence[Sequence[float]]) -> None:
        """Take the mean over all responses, and the deviation within prompts (n - 1 degrees of freedom for each).

        Nothing is taken where all responses to the same prompt have equal rewards.

        Args:
            rewards: for each prompt the rewards of its responses. If no prompt has two responses, the deviation is that
                of all responses.
        """
        everything = [reward for of_prompt in rewards for reward in of_prompt]
        groups = rewards if any(len(of_prompt) > 1 for of_prompt in rewards) else [everything]
        freedom = sum(len(group) - 1 for group in groups if group)
        if freedom < 1:
            return
        squares = ((reward - mean) ** 2 for group in groups if group for mean in [_mean(group)] for reward in group)
        deviation = math.sqrt(math.fsum(squares) / freedom)
        if deviation > 0:
            self._measured[name] = (_mean(everything), deviation)

    def standardised(self, name: str, reward: float) -> float:
        """The reward in deviations from the mean; 0 where the model could not tell responses apart so far."""
        if self.lacks(name):
            return 0.0
        mean, deviation = self._measured[name]
        return (reward - mean) / deviation

    def state_dict(self) -> dict[str, list[float]]:
        """Mean and deviation by name, as JSON-able values."""
        return {name: list(measured) for name, measured in self._measured.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue with what `state_dict` returned."""
        self._measured = {name: (mean, deviation) for name, (mean, deviation) in state.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
