"""Hand-made folders of an experiment's runs."""

import json

from megatron_brain.stages.evaluate.stage import summarize

TEXTS = ("first prompt", "second <b>prompt</b>", "third & last", "fourth")


def rows_of(reward, *, baseline=0.0, prompts=TEXTS, **columns):
    """Rows of evaluate: `reward` has the policy's reward of each prompt, `columns` further numbers with __ for /."""
    rows = []
    for place, prompt in enumerate(prompts):
        row = {
            "id": f"record-{place}",
            "prompt": prompt,
            "reference": f"human {place}",
            "policy": f"answer {place} <script>alert(1)</script>",
            "baseline": f"plain {place}",
            "length/policy": 5,
            "kl_to_prior": 0.5,
            "reward/policy": reward[place],
            "reward/baseline": baseline,
            "reward/reference": 1.0,
            "judge/policy": 0.25,
            "judge/baseline": 0.25,
        }
        rows.append(row | {name.replace("__", "/"): values[place] for name, values in columns.items()})
    return rows


def write_run(work, setting="one", seed=0, *, experiment="baseline", rows=None, lines=None, evaluation=True, **told):
    """A run folder below `work`; `told` replaces values of run.json. Returns the folder."""
    folder = work / experiment / setting / f"seed{seed}"
    folder.mkdir(parents=True)
    run = {
        "experiment": experiment,
        "setting": setting,
        "label": f"label of {setting}",
        "method": "brain",
        "seed": seed,
        "data_hash": "ab" * 32,
        "commands": [["python", "-m", "megatron_brain", "brain", "--save", "a folder"]],
        "started": "2026-01-01T00:00:00",
        "ended": "2026-01-01T00:10:00",
        "seconds": 600.0,
        "versions": {"torch": "2.13.0"},
        "settings": {},
    }
    (folder / "run.json").write_text(json.dumps(run | told))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation:
        rows = rows_of([1.0, 2.0, -1.0, 0.0]) if rows is None else rows
        estimates = summarize(rows, bootstrap_samples=2, seed=0)
        metrics = {name: {"value": each.value, "low": each.low, "high": each.high} for name, each in estimates.items()}
        report = {"num_prompts": len(rows), "metrics": metrics, "examples": [], "rows": rows}
        (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


def training_lines(shift=0.0):
    """metrics.jsonl with validations at iterations 0, 4 and 8."""
    lines = []
    for iteration in range(9):
        line = {"iteration": iteration, "loss": 1.0}
        if iteration % 4 == 0:
            line |= {
                "validation/reward_mean": 0.1 * iteration + shift,
                "validation/judge_mean": 0.3 + 0.01 * iteration,
                "validation/kl_to_prior": 0.05 * iteration,
                "validation/posterior_kl_to_policy": 1.0 - 0.1 * iteration + shift,
                "validation/posterior_kl_alpha_beta": 0.5 - 0.05 * iteration + shift,
                "validation/posterior_kl_to_prior": 0.7,
                "validation/posterior_reward": 1.5 + shift,
                "validation/posterior_prior_reward": 0.2 + shift,
                "validation/prior_reward_mean": 0.1 + shift,
                "validation/prior_judge_mean": 0.3,
            }
        lines.append(line)
    return lines
