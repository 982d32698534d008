"""The figure of a gradient study."""

from collections.abc import Iterator, Sequence
from pathlib import Path

_STYLES = {
    "self-normalized": {"color": "0.0", "marker": "o", "linestyle": "-"},
    "unnormalized": {"color": "0.35", "marker": "s", "linestyle": "--"},
    "none": {"color": "0.6", "marker": "^", "linestyle": ":"},
}
_PANELS = {
    "bias": "bias / |gradient|",
    "variance": "variance / |gradient|²",
    "mean_squared_error": "squared error / |gradient|²",
    "cosine": "cosine to the gradient",
}


def draw(report: dict, path: Path) -> None:
    """Draw figures against the group size, a row for each policy, and in a last row against drift at one group size.

    Markers and line styles tell the baselines apart, so the figure is legible in grey. Bars are 95% intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies, sizes = report["policies"], report["settings"]["sizes"]
    n = 8 if 8 in sizes else sizes[len(sizes) // 2]
    # Where there is one policy only, nothing depends on the drift.
    rows = len(policies) + (len(policies) > 1)
    figure, axes = pyplot.subplots(
        rows, len(_PANELS), figsize=(3.2 * len(_PANELS), 2.6 * rows), layout="constrained", squeeze=False
    )
    for row, policy in zip(axes, policies, strict=False):
        title = f"KL(proposal || policy) = {policy['drift']['kl_from_proposal']:.2g} nats"
        of_size = [(each["n"], each) for each in policy["figures"]]
        _draw_row(row, of_size, f"samples n of a group; {title}")
        for panel in row:
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
    if len(policies) > 1:
        of_drift = [
            (policy["drift"]["kl_from_proposal"], each)
            for policy in policies
            for each in policy["figures"]
            if each["n"] == n
        ]
        _draw_row(axes[-1], of_drift, f"KL(proposal || policy) in nats; n = {n}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_row(row: Sequence, points: Sequence[tuple[float, dict]], label: str) -> None:
    for panel, (name, title) in zip(row, _PANELS.items(), strict=True):
        for baseline, style in _STYLES.items():
            known = list(_points(points, baseline, name))
            if not known:
                continue
            places, values, below, above = zip(*known, strict=True)
            panel.errorbar(
                places, values, (below, above), label=baseline, markersize=4, linewidth=1.2, capsize=2, **style
            )
        if name != "cosine":
            # A bias that is lost in its noise is drawn at 0, so the scale is linear near 0.
            panel.set_yscale("symlog" if name == "bias" else "log", **({"linthresh": 0.1} if name == "bias" else {}))
        panel.set_ylabel(title, fontsize=8)
        panel.tick_params(labelsize=8)
    row[len(row) // 2].set_xlabel(label, fontsize=8, loc="left")


def _points(
    points: Sequence[tuple[float, dict]], baseline: str, name: str
) -> Iterator[tuple[float, float, float, float]]:
    """Place, value, and distances to the ends of the interval, of the values that are known. An open end has none."""
    for place, row in points:
        if row["baseline"] == baseline:
            value, low, high = row[name].values()
            if value is None:
                continue
            yield (
                place,
                value,
                0.0 if low is None else max(0.0, value - low),
                0.0 if high is None else max(0.0, high - value),
            )
