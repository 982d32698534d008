"""Show how the rounds of a brain run with an engine beside it overlap: what trainer and engine did, and who waited.

    python tools/plot_rounds.py RUN/metrics.jsonl [--plot FIGURE.svg]

Prints one JSON object: `waiting_fraction`, the share of time in which training stood still for responses, and the
seconds of each round. Round 0 is left out of the share: its responses cannot be drawn ahead. The figure needs
matplotlib.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.errors import ConfigError

PARTS = ("waiting", "weight_sync", "scoring", "training")
"""What the trainer does in a round, in this order."""


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Print the share of waiting, and draw the figure. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a brain run with --engine vllm")
    parser.add_argument("--plot", type=Path, help="write the figure here")
    args = parser.parse_args(argv)
    rounds = read_rounds(args.metrics)
    later = rounds[1:]
    waiting = sum(each["waiting"] for each in later) / sum(each[part] for each in later for part in PARTS)
    print(json.dumps({"waiting_fraction": waiting, "rounds": rounds}, indent=2))
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")
        plot(rounds, args.plot)
    return 0


def read_rounds(path: Path) -> list[dict[str, float]]:
    """Seconds of each of PARTS in every round, and `drawing`: those that the engine took for the round's responses."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the metrics.jsonl of a run: {error}") from error
    rounds: list[dict[str, float]] = []
    for line in lines:
        if "round" in line:
            if "seconds_waiting_for_samples" not in line:
                raise ConfigError(f"{path}: its responses were not drawn by an engine beside it (--engine vllm)")
            rounds.append(
                {
                    "waiting": line["seconds_waiting_for_samples"],
                    "weight_sync": line["seconds_weight_sync"],
                    "scoring": line["seconds_scoring"],
                    "training": 0.0,
                    "drawing": line["seconds_sampling"],
                }
            )
        if rounds and "seconds_per_step" in line:
            rounds[-1]["training"] += line["seconds_per_step"]
    if len(rounds) < 2:
        raise ConfigError(f"{path}: has {len(rounds)} rounds of brain; at least 2 are needed")
    return rounds


def plot(rounds: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the time line of trainer and engine, which begins round r + 1 when it has got the weights of round r."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.4), layout="constrained")
    colours = dict(zip(PARTS, ("tab:red", "tab:purple", "tab:orange", "tab:blue"), strict=True))
    now = 0.0
    for number, each in enumerate(rounds):
        for part in PARTS:
            axes.barh("trainer", each[part], left=now, color=colours[part], label=part if number == 0 else None)
            now += each[part]
            if part == "weight_sync" and number + 1 < len(rounds):
                drawing = rounds[number + 1]["drawing"]
                axes.barh("engine", drawing, left=now, color="tab:green", label="drawing" if number == 0 else None)
                axes.text(now + drawing / 2, "engine", f"round {number + 1}", ha="center", va="center", fontsize=8)
    axes.barh("engine", rounds[0]["drawing"], left=0.0, color="tab:green")
    axes.text(rounds[0]["drawing"] / 2, "engine", "round 0", ha="center", va="center", fontsize=8)
    axes.set_xlabel("seconds")
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
