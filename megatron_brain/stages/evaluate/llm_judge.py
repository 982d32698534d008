"""The language model that judges for the evaluate stage: the writing rank alone asks it."""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_brain.errors import ConfigError
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.stages.evaluate.spec import verdict_file
from megatron_brain.stages.intervals import Estimate
from megatron_brain.stages.judging.comparison import compare_answers
from megatron_brain.stages.judging.judge import LanguageModelJudge
from megatron_brain.stages.judging.summary import count_verdicts, summarize_verdicts
from megatron_brain.stages.judging.verdicts import VerdictFile
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all

T = TypeVar("T")

_SLICE = 20.0
"""Seconds after which waiting ranks hear that the work goes on: a collective fails that is waited for too long."""


def open_llm_judge(run: Run) -> LanguageModelJudge | None:
    """The judge of --judge-url, on the writing rank, after it has answered. All ranks must call it.

    Raises:
        AgreedError: on all ranks: it does not answer, or its template, its key or its file of verdicts cannot be used.
    """
    settings = run.config.judging
    if settings.judge_url is None:
        return None

    def opened() -> LanguageModelJudge:
        judge = LanguageModelJudge(settings, VerdictFile(Path(verdict_file(run.config))), os.environ)
        judge.require_answer()
        return judge

    return while_others_wait(opened if run.parallel.is_writer else None, run.parallel)


def describe_llm_judge(run: Run) -> dict[str, str]:
    """A row of the banner, if there is such a judge."""
    settings = run.config.judging
    return {} if settings.judge_url is None else {"llm judge": f"{settings.judge_model} at {settings.judge_url}"}


def add_verdicts(run: Run, judge: LanguageModelJudge | None, rows: Sequence[dict]) -> None:
    """Add the judge's verdicts to the rows of the writing rank, which has written the report without them. All ranks
    must call it.

    Args:
        judge: None on the other ranks.

    Raises:
        AgreedError: on all ranks: the judge failed.
    """

    def compare() -> None:
        assert judge is not None
        try:
            compare_answers(judge, rows, max_verdicts=run.config.judging.judge_max_verdicts)
        except ConfigError as error:
            raise ConfigError(f"{error}. The report without verdicts is {run.config.generate.output}") from error

    while_others_wait(None if judge is None else compare, run.parallel)


def llm_metrics(run: Run, rows: Sequence[dict]) -> dict[str, Estimate]:
    """The metrics of the verdicts in the rows; none without such a judge."""
    samples, seed = run.config.evaluate.bootstrap_samples, run.config.training.seed
    return summarize_verdicts(rows, bootstrap_samples=samples, seed=seed)


def llm_report(run: Run, rows: Sequence[dict]) -> dict:
    """What the report says of the judge and of the numbers of its verdicts; nothing without such a judge."""
    settings = run.config.judging
    if settings.judge_url is None:
        return {}
    told = {"url": settings.judge_url, "model": settings.judge_model, "verdicts": verdict_file(run.config)}
    return {"llm_judge": {**told, "comparisons": count_verdicts(rows)}}


def while_others_wait(work: Callable[[], T] | None, parallel: Parallel) -> T | None:
    """Do work that may take longer than ranks can wait for a collective, on one rank. All ranks must call it.

    Args:
        work: None on the ranks that wait.

    Returns:
        the result of the work, or None on the ranks that waited.

    Raises:
        AgreedError: on all ranks: the work failed.
    """
    done: concurrent.futures.Future[T | None] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(None if work is None else work())
        except BaseException as error:  # The main thread raises it.
            done.set_exception(error)

    # A daemon thread lets the process end when a signal stops it.
    threading.Thread(target=run, daemon=True).start()
    while not all(parallel.gather_over_world(bool(concurrent.futures.wait([done], timeout=_SLICE).done))):
        pass
    return read_on_all(done.result, parallel)
