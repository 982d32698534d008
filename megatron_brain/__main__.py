"""`python -m megatron_brain STAGE --config FILE [--flag value ...]`, alone or under torchrun."""

import contextlib
import sys
from collections.abc import Sequence

from megatron_brain import files
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of, stages
from megatron_brain.errors import AgreedError, OwnError, UserError
from megatron_brain.runtime import launch, quiet, signals

_USER_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Run a stage. Returns the exit status, which is 2 for a mistake of the user. One message reports the mistake."""
    if not argv or argv[0] not in stages():
        print(_usage(argv), file=sys.stdout if argv and argv[0] in ("-h", "--help") else sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else _USER_ERROR
    stage, flags = argv[0], argv[1:]
    try:
        # The configuration is read before torch is imported, so that --help and its mistakes answer at once.
        from megatron_brain.config.loader import load_config

        config = load_config(stage, flags)
        quiet.set_up_console()
        if not config.training.dry_run:
            launch.read_launch()
        from megatron_brain.runtime import transformer_engine

        # A broken Transformer Engine would break megatron-core, which the lines below import.
        transformer_engine.problem()
        with files.explained():
            (_dry_run if config.training.dry_run else _run_stage)(config)
    except UserError as error:
        _report(error)
        return _USER_ERROR
    return 0


def _run_stage(config: RunConfig) -> None:
    from megatron_brain.runtime import lost_peer, parallel
    from megatron_brain.training.start import open_run
    from megatron_brain.training.trainer import train

    with lost_peer.explained(config.parallel.distributed_timeout_minutes):
        run, stage = open_run(config), spec_of(config).load()
        # Only connected ranks can agree to stop. Before they are connected, a signal ends the process at once.
        with signals.noted() if spec_of(config).trains else contextlib.nullcontext():
            if spec_of(config).trains:
                train(run, stage)
            else:
                stage(run)
            parallel.stop()


def _dry_run(config: RunConfig) -> None:
    from megatron_brain.dry_run import inspect as dry_run
    from megatron_brain.dry_run import report as dry_run_report

    report = dry_run_report.render(dry_run.inspect(config))
    if launch.is_reporting_rank():
        print(report)


def _usage(argv: Sequence[str]) -> str:
    wrong = [f"error: unknown stage {argv[0]!r}", ""] if argv and not argv[0].startswith("-") else []
    known = [f"  {name:10}{spec.help}" for name, spec in stages().items()]
    return "\n".join(
        [
            *wrong,
            "usage: python -m megatron_brain STAGE --config FILE [--flag value ...]",
            "",
            *known,
            "",
            "STAGE --help lists the flags of a stage.",
        ]
    )


def _report(error: UserError) -> None:
    """Report an error once if all ranks find the same one. When ranks do different things, each reports its own."""
    torch = sys.modules.get("torch")
    if launch.is_reporting_rank() or isinstance(error, OwnError):
        print(f"error: {error}", file=sys.stderr)
    elif torch is not None and torch.distributed.is_initialized() and not isinstance(error, AgreedError):
        print(f"rank {launch.read_launch().rank}: error: {error}", file=sys.stderr)


def entry() -> int:
    """The console script `megatron-brain`."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
