"""Shows a few metrics and the time left on the console: one line per step, or a live line on a terminal."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_brain.config.fields import did_you_mean
from megatron_brain.errors import AgreedError

_ALL = "all"


def shown_metrics(asked: str | None, usual: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """Names of the metrics that the console shows, in their order.

    Args:
        asked: the value of --log-metrics: names with commas between them, or `all`. None: the usual ones.
        usual: the names that the stage shows by default.
        known: all names that the stage logs. `validation/` is left out.

    Raises:
        AgreedError: a name is not the name of a metric.
    """
    if asked is None:
        return usual
    # metrics.jsonl writes the prefix; the console shows a metric of steps and of validations alike.
    names = [name.strip().removeprefix("validation/") for name in asked.split(",")]
    if names == [_ALL]:
        return known
    for name in names:
        if name not in known:
            raise AgreedError(
                f"log_metrics={asked!r}: this stage has no metric {name!r}, only {', '.join(known)}; {_ALL!r} shows all"
                f"{did_you_mean(name, known)}"
            )
    return names


class TimeLeft:
    """Estimates the time left from the mean time per iteration of this run so far."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.first_step = first_step
        self.total_steps = total_steps
        self._start = time.monotonic()

    def after(self, step: int) -> str:
        """Time until `total_steps`, as hours:minutes:seconds. It is `-:--:--` before the first step is done."""
        done = step - self.first_step
        if done <= 0:
            return "-:--:-- left"
        seconds = round((time.monotonic() - self._start) / done * max(self.total_steps - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class PlainDisplay:
    """Prints every `log_interval`-th iteration, the last one and all validations as lines, for logs and pipes."""

    def __init__(self, console: Console, time_left: TimeLeft, shown: Sequence[str], log_interval: int) -> None:
        self._console, self._time_left = console, time_left
        self._shown, self._log_interval = shown, log_interval

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show some metrics of an iteration."""
        total = self._time_left.total_steps
        if step % self._log_interval == 0 or step == total:
            self._print(step, _in_words(numbers, self._shown), self._time_left.after(step))
        self._print(step, _in_words(numbers, _of_validation(self._shown)))

    def close(self) -> None:
        """Do nothing: there is no line to end."""

    def _print(self, step: int, words: Sequence[str], *others: str) -> None:
        if words:
            total = str(self._time_left.total_steps)
            line = " | ".join([f"iteration {step:>{len(total)}}/{total}", *words, *others])
            print(line, file=self._console.file, flush=True)


class LiveDisplay:
    """Shows a progress bar at the bottom of the terminal. Validation metrics scroll by above it."""

    def __init__(self, console: Console, time_left: TimeLeft, shown: Sequence[str]) -> None:
        self._time_left, self._shown = time_left, shown
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        first = time_left.first_step
        self._task = self._bar.add_task(
            "", total=time_left.total_steps, completed=first, numbers=time_left.after(first)
        )
        self._bar.start()

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show some metrics of an iteration."""
        if words := _in_words(numbers, _of_validation(self._shown)):
            self._bar.console.print(" | ".join([f"iteration {step}", *words]), markup=False, highlight=False)
        if words := _in_words(numbers, self._shown):
            self._bar.update(self._task, completed=step, numbers=" | ".join([*words, self._time_left.after(step)]))
        self._bar.refresh()

    def close(self) -> None:
        """End the progress bar. Its last line stays on the terminal."""
        self._bar.stop()


def _of_validation(names: Sequence[str]) -> list[str]:
    return [f"validation/{name}" for name in names]


def _in_words(numbers: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """The numbers in `names` that exist, as texts of four digits: `loss 1.234`, `round 3`, `12,345 tokens/s`."""
    return [_word(name, numbers[name]) for name in names if name in numbers]


def _word(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value}" if isinstance(value, int) else f"{name} {value:#.4g}"
