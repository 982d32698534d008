"""The metrics of a run. TensorBoard events and metrics.jsonl hold all of them; the console shows a few.

Metric names are flat; a slash marks a group of metrics: `loss`, `grad_norm`, `lr`, `validation/loss`. Each line of
metrics.jsonl is one iteration. Several calls of `log` for one iteration are merged into its line.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_brain.training.progress import LiveDisplay, PlainDisplay, TimeLeft

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLogger:
    """Writes the metrics of a run on one rank. On the other ranks (`is_writer=False`) every method does nothing.

    Args:
        directory: folder of metrics.jsonl and the event file. It is made if it is missing; None writes no file.
        total_steps: last iteration of the run, from which progress and the time left are computed.
        shown: names of the metrics that the console shows, in this order.
        is_writer: True on the one rank that writes.
        progress: show a live progress line if the console is a terminal. Otherwise plain lines are printed.
        log_interval: iterations between plain lines. Files get every iteration.
        resume_step: iteration that the run continues from. Later iterations in the files are dropped, because they run
            again. None: a new run; a metrics.jsonl that exists already is kept as metrics.N.jsonl.
        console: where progress is shown. The default is standard output.
    """

    def __init__(
        self,
        directory: str | None,
        *,
        total_steps: int,
        shown: Sequence[str],
        is_writer: bool,
        progress: bool,
        log_interval: int,
        resume_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._is_writer = is_writer
        self._lines: _JsonLines | None = None
        self._events: SummaryWriter | None = None
        self._display: LiveDisplay | PlainDisplay | None = None
        if not is_writer:
            return
        self._first_step = resume_step or 0
        if directory is not None:
            self._lines = _JsonLines(Path(directory) / "metrics.jsonl", resume_step)
            self._events = _open_events(directory, purge_step=0 if resume_step is None else resume_step + 1)
        console = console or Console()
        time_left = TimeLeft(self._first_step, total_steps)
        if progress and console.is_terminal:
            self._display = LiveDisplay(console, time_left, shown)
        else:
            self._display = PlainDisplay(console, time_left, shown, log_interval)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an iteration.

        Args:
            step: iteration, not smaller than the last one logged.
            metrics: numbers (or zero-dimensional tensors) by flat name, none of which is `iteration`.
        """
        if not self._is_writer:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        assert "iteration" not in numbers, "a metric cannot be called 'iteration': metrics.jsonl has the step there"
        if self._lines is not None:
            self._lines.write(step, numbers)
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        self._display.show(step, numbers)

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Record a text, such as sampled responses, for TensorBoard's text tab, which renders Markdown."""
        if self._events is not None:
            self._events.add_text(tag, text, step)

    def log_config(self, text: str) -> None:
        """Record the text of the resolved configuration. TensorBoard shows it unchanged."""
        self.log_text(self._first_step if self._is_writer else 0, "config", f"```yaml\n{text}\n```")

    def close(self) -> None:
        """Flush the files and end the progress line. Closing twice is harmless."""
        if self._display is not None:
            self._display.close()
        if self._lines is not None:
            self._lines.close()
            self._events.close()


class _JsonLines:
    """metrics.jsonl: one JSON object per iteration, in order. No iteration appears twice."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, float] = {}
        self._last_offset = 0
        if path.exists() and resume_step is None:
            path.rename(_free_name(path))
        elif path.exists():
            self._keep_until(path, resume_step)
        self._file = open(path, "ab")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a line, or merge the numbers into the last line if that is of the same iteration."""
        last_step = self._last.get("iteration")
        assert last_step is None or step >= last_step, f"iteration {step} is logged after iteration {last_step}"
        if step == last_step:
            self._file.truncate(self._last_offset)
        else:
            self._last = {"iteration": step}
            self._last_offset = self._file.seek(0, 2)
        self._last |= {name: json_number(value) for name, value in numbers.items()}
        self._file.write((json.dumps(self._last, allow_nan=False) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _keep_until(self, path: Path, step: int) -> None:
        """Cut the file behind the last line whose iteration is at most `step`. A line torn by a crash is cut too."""
        with open(path, "r+b") as file:
            kept = 0
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or record["iteration"] > step:
                    break
                self._last, self._last_offset = record, kept
                kept += len(line)
            file.truncate(kept)


def _open_events(directory: str, purge_step: int) -> "SummaryWriter":
    """TensorBoard's writer. From `purge_step` on, TensorBoard hides what earlier event files of the folder hold."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(directory, purge_step=purge_step)


def _free_name(path: Path) -> Path:
    """The first name of metrics.1.jsonl, metrics.2.jsonl, ... that no file has."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free


def json_number(value: float) -> float | str:
    """The number for JSON, which has no NaN and infinity: they become texts (`NaN`, `-Infinity`) that float() reads."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
