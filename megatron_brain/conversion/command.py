"""What the two conversion tools share: flags, the order of steps, messages and the exit status."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_brain.config.model import ResolvedModel
from megatron_brain.conversion.compare import TOLERANCE, Comparison, count_parts
from megatron_brain.conversion.errors import ConversionError, MismatchError
from megatron_brain.conversion.output_folder import verified_folder
from megatron_brain.conversion.workers import Workers
from megatron_brain.errors import ConfigError, OwnError, UserError
from megatron_brain.files import folder_problem
from megatron_brain.flag_types import not_negative
from megatron_brain.runtime import parallel
from megatron_brain.runtime.launch import is_reporting_rank


class Conversion(Protocol):
    """A conversion that has been checked and can be done: `ToCheckpoint` or `ToHF`."""

    model: ResolvedModel
    nbytes: int

    def write(self, folder: Path, workers: Workers, advance: Callable[[int], None]) -> None: ...

    def compare(self, folder: Path, parallel: parallel.Parallel, advance: Callable[[], None]) -> Comparison: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both tools have."""
    parser.add_argument(
        "--tolerance",
        type=not_negative,
        default=TOLERANCE,
        help="largest difference allowed, relative to the largest logit or reward, or to 1 where that is smaller "
        f"[{TOLERANCE:.0e}]",
    )
    parser.add_argument("--no-compare", action="store_true", help="do not compare with transformers")


def run(args: argparse.Namespace, source: Path, prepare: Callable[[], Conversion]) -> int:
    """Convert, compare and publish. All processes call it.

    Args:
        args: `save` and the flags of `add_arguments`.
        source: the folder that is converted.
        prepare: checks the source and returns its conversion, or raises an error if it cannot be converted.

    Returns:
        The exit status: 1 if the two models differ or a process failed, 2 if the request was wrong.
    """
    prints = is_reporting_rank()
    try:
        said = _convert(args, source, Workers(), prepare)
    except MismatchError as error:
        status, said = 1, f"error: {args.save}.unverified: {error}"
    except ConversionError as error:
        status, said = 1, f"error: {error}"
    except UserError as error:
        status, said, prints = 2, f"error: {error}", prints or isinstance(error, OwnError)
    else:
        status = 0
    if prints:
        print(said, file=sys.stderr if status else sys.stdout, flush=True)
    return status


def _convert(args: argparse.Namespace, source: Path, workers: Workers, prepare: Callable[[], Conversion]) -> str | None:
    """Returns the closing message on the first process, and None on the others."""
    workers.all(lambda: _require_place(args.save))
    conversion = workers.all(prepare)
    with _progress(workers) as progress, verified_folder(args.save, workers, source=source) as folder:
        started = time.monotonic()
        share = conversion.nbytes / workers.parallel.world_size
        with _bar(progress, "writing", share) as advance:
            conversion.write(folder, workers, advance)
        seconds = time.monotonic() - started

        def compare() -> str:
            if args.no_compare:
                return "not compared with transformers (--no-compare)"
            with _bar(progress, "comparing", count_parts(conversion.model)) as advance:
                comparison = conversion.compare(folder, workers.parallel, lambda: advance(1))
            comparison.require(args.tolerance)
            return f"{comparison}, tolerance {args.tolerance:.0e}, {time.monotonic() - started - seconds:.1f} s"

        def finish() -> str:
            gigabytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
            return f"{args.save}: {gigabytes:.2f} GB in {seconds:.2f} s ({gigabytes / seconds:.2f} GB/s); {compare()}"

        # The first process compares alone. It also renames the folder when all processes have left the block.
        return workers.first(finish)


def _require_place(save: Path) -> None:
    if (problem := folder_problem("--save", str(save))) is not None:
        raise ConfigError(problem)


@contextmanager
def _progress(workers: Workers) -> Iterator[Progress]:
    """Progress bars, on the terminal of the first process only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (workers.is_first and console.is_terminal)) as progress:
        yield progress


@contextmanager
def _bar(progress: Progress, what: str, total: float) -> Iterator[Callable[[float], None]]:
    task = progress.add_task(what, total=total)
    yield lambda amount: progress.advance(task, amount)
    progress.update(task, completed=total)
