"""The configurations of the experiments: what they expand to, and what a mistake in one is told."""

import itertools
import json
import shutil

import pytest
import yaml
from helpers.experiments import FOLDER, importable

EXPERIMENTS = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.name != "common.yaml")


@pytest.fixture(scope="module")
def modules():
    with importable() as found:
        yield found


@pytest.fixture
def work(tmp_path):
    """A WORK in which everything is tuned."""
    names = [setting["name"] for setting in yaml.safe_load((FOLDER / "tuning.yaml").read_text())["settings"]]
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({name: {"flags": {"lr": 4.5e-5}} for name in names}))
    return tmp_path


def plan_of(modules, name, work, **options):
    return modules.plan.make_plan(FOLDER / f"{name}.yaml", work, **options)


def stages_of(plan):
    """Stage and arguments of each command that runs megatron_brain."""
    for step in plan.steps.values():
        words = list(step.command)
        if "megatron_brain" in words:
            place = words.index("megatron_brain")
            yield step.name, words[place + 1], words[place + 2 :]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_of_every_experiment_has_settings_that_its_stage_takes(modules, work, name, monkeypatch):
    from megatron_brain.config.loader import load_config

    monkeypatch.chdir(FOLDER.parents[2])
    for _, stage, arguments in stages_of(plan_of(modules, name, work)):
        load_config(stage, arguments)


def test_runs_of_a_seed_share_stages_and_steps_come_after_what_they_need(modules, work):
    plan = plan_of(modules, "baseline", work)
    assert len(plan.runs) == 27
    assert [name for name in plan.steps if name.endswith("/reward")] == [f"shared/seed{s}/reward" for s in (1, 2, 3)]
    assert sum(name.startswith("shared/") for name in plan.steps) == 8 + 3 * 3
    seen = set()
    for name, step in plan.steps.items():
        assert set(step.needs) <= seen
        seen.add(name)


def test_all_experiments_of_full_size_share_the_same_steps_in_one_work(modules, work):
    known = {}
    for name in set(EXPERIMENTS) - {"reduced", "smoke"}:
        for step in plan_of(modules, name, work).steps.values():
            assert known.setdefault(step.name, step) == step


def test_the_seed_of_a_run_moves_reward_model_training_and_evaluation(modules, work):
    plan = plan_of(modules, "baseline", work, only=["none-k8"], seeds=[7])
    seeds = {name: words[words.index("--seed") + 1] for name, _, words in stages_of(plan) if "--seed" in words}
    assert set(seeds.values()) == {"7"}
    assert {name.rsplit("/", 1)[1] for name in seeds} == {"reward", "prior_test", "prior_valid", "brain", "evaluate"}
    brain = plan.steps["baseline/none-k8/seed7/brain"].command
    assert brain[brain.index("--reward-load") + 1] == str(work / "shared/seed7/reward")


def test_all_settings_of_the_baselines_differ_in_baseline_and_rounds_alone(modules, work):
    plan = plan_of(modules, "baseline", work, seeds=[1])
    flags = [flags_of(words) for name, stage, words in stages_of(plan) if stage == "brain"]
    varied = {name for name in flags[0] if len({one[name] for one in flags}) > 1}
    assert varied == {"--baseline", "--refresh-interval", "--prompts-per-round", "--save"}
    # Every round is used up by its K steps, so all runs see as many prompts.
    assert all(
        int(one["--prompts-per-round"]) == int(one["--refresh-interval"]) * int(one["--global-batch-size"])
        for one in flags
    )


def test_equal_tokens_are_nearly_as_many_tokens_a_step_as_one_prompt_more_or_less_allows(modules, work):
    plan = plan_of(modules, "samples", work, seeds=[1])
    flags = {name.split("/")[1]: flags_of(words) for name, stage, words in stages_of(plan) if stage == "brain"}
    tokens = {name: 68 + 2 * 13 * int(f["--samples-per-prompt"]) for name, f in flags.items()}
    expected = tokens["self-normalized-k8"] * 4
    for name in ("n2-equal-tokens", "n32-equal-tokens"):
        batch = int(flags[name]["--global-batch-size"])
        assert all(abs(batch * tokens[name] - expected) < abs((batch + n) * tokens[name] - expected) for n in (-1, 1))
    assert {flags[name]["--global-batch-size"] for name in ("n2", "n4", "n16", "n32")} == {"4"}


def flags_of(words):
    """Values of a command's flags by their names; the last one of a flag counts, as for the stage."""
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def test_an_edit_of_the_judge_between_seeds_is_refused_by_each_step_that_asks_it(modules, work, tmp_path, monkeypatch):
    example = tmp_path / "examples" / "debian_tldr"
    shutil.copytree(FOLDER.parent, example)
    (tmp_path / "tools").mkdir()
    shutil.copy(FOLDER.parents[2] / "tools" / "convert_hf_to_megatron.py", tmp_path / "tools")
    for module in (modules.chain, modules.steps):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    asking = {"prior_valid", "brain", "evaluate", "best_of", "pairs"}
    for name in ("baseline", "methods"):
        steps = plan_of(modules, name, work, seeds=[1]).steps
        identities = {each: modules.steps.own_identity(step, work) for each, step in steps.items()}
        original = (example / "judge.py").read_text()
        (example / "judge.py").write_text(original + "# edited\n")
        changed = {each for each, step in steps.items() if modules.steps.own_identity(step, work) != identities[each]}
        (example / "judge.py").write_text(original)
        # fetch_judge.py imports a name of it.
        expected = {each for each in steps if each.rsplit("/", 1)[1] in {*asking, "prior_test", "judge"}}
        assert changed == expected and {each.rsplit("/", 1)[1] for each in changed} >= asking - {"best_of"}


def test_every_script_of_a_plan_is_read_with_the_modules_that_it_imports(modules, work):
    steps = plan_of(modules, "methods", work, seeds=[1]).steps
    root = FOLDER.parents[2]
    for step in steps.values():
        if step.command[1].endswith(".py"):
            assert root / step.command[1] in step.reads
    names = {path.name for path in steps["methods/best-of-8/seed1/best_of"].reads}
    assert names == {"best_of_n.py", "judge.py", "user_errors.py"}
    assert "descriptions.py" in {path.name for path in steps["shared/data"].reads}


def test_a_setting_that_is_the_same_as_another_has_its_steps_and_its_own_folder(modules, work):
    plan = plan_of(modules, "ladder", work, only=["brain"], seeds=[2])
    (run,) = plan.runs
    other = "baseline/self-normalized-k8/seed2"
    assert run.steps == (f"{other}/brain", f"{other}/evaluate")
    assert (run.folder, run.source) == (work / "ladder/brain/seed2", work / other)
    assert (run.setting.label, run.name) == ("BRAIn", "ladder/brain/seed2")
    own = plan_of(modules, "baseline", work, seeds=[2]).steps
    assert all(plan.steps[name] == own[name] for name in plan.steps)


def test_tuned_values_are_read_and_their_absence_is_told_with_the_cure(modules, work, tmp_path):
    command = plan_of(modules, "ladder", work, seeds=[1]).steps["ladder/soft/seed1/brain"].command
    assert command[command.index("--lr") + 1] == "4.5e-05"
    (work / "tuned.yaml").unlink()
    with pytest.raises(modules.user_errors.UserError, match=r"tuned.yaml has no values for .*; run run.py tuning.yaml"):
        plan_of(modules, "ladder", work)
    command = plan_of(modules, "ladder", work, draft=True).steps["ladder/soft/seed1/brain"].command
    assert command[command.index("--lr") + 1] == "TUNED"


def test_every_tuned_name_of_the_experiments_is_tuned_with_the_flags_that_it_has_there(modules):
    read = modules.settings.read_experiment
    tuned = {}
    for setting in read(FOLDER / "tuning.yaml").settings:
        flags = {name: value for name, value in setting.flags.items() if name not in ("lr", "train_iters")}
        tuned[modules.settings.grid_name(setting)] = (setting.data, flags)
    # samples.yaml says of these that they use the rate of other settings.
    other = ("n4", "n16", "n2-equal-tokens", "n32-equal-tokens")
    for name in ("baseline", "samples", "ladder", "methods", "drift"):
        for setting in read(FOLDER / f"{name}.yaml").settings:
            if setting.tuned is not None:
                assert setting.tuned in tuned
                if setting.name not in other:
                    assert tuned[setting.tuned] == (setting.data, setting.flags), setting.name


@pytest.fixture
def candidate(modules, tmp_path):
    """Makes a run of 8 iterations for `choose`, from the numbers of its validations by iteration."""

    def make(setting, lr, distances, criterion="distance"):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        keys = modules.choose.KEYS[criterion]
        values = {at: value if criterion == "objective" else [value] for at, value in distances.items()}
        lines = [{"iteration": at, **dict(zip(keys, value, strict=True))} for at, value in values.items()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return modules.choose.Candidate(setting, criterion, "lr", lr, 8, path)

    return make


def test_the_choice_is_the_value_with_the_lowest_mean_distance_after_the_last_iteration(modules, candidate):
    runs = [
        candidate("a", 1e-5, {0: 1.0, 4: 0.1, 8: 0.9}),
        candidate("a", 3e-5, {0: 1.0, 8: 0.5}),
        candidate("a", 1e-4, {0: 1.0, 8: 0.7}),
        candidate("b", 1e-5, {0: 1.0, 8: 0.3}),
        candidate("b", 3e-5, {0: 1.0, 8: 0.2}),
        candidate("b", 3e-5, {0: 1.0, 8: 0.6}),
    ]
    choices = modules.choose.choose(runs, 0.2)
    assert {name: choice["flags"] for name, choice in choices.items()} == {"a": {"lr": 3e-5}, "b": {"lr": 1e-5}}
    assert choices["a"]["start"] == 1.0 and choices["a"]["warnings"] == []
    assert choices["b"]["reached"] == {"lr 1e-05": 0.3, "lr 3e-05": 0.4}


def test_a_run_that_ended_before_its_last_iteration_loses_against_every_other_one(modules, candidate):
    diverged, bad = candidate("a", 1e-4, {0: 1.0, 4: 0.1}), candidate("a", 1e-5, {0: 1.0, 8: 5.0})
    choice = modules.choose.choose([diverged, bad, candidate("a", 3e-5, {0: 1.0, 8: 4.0})], 0.2)["a"]
    assert choice["flags"] == {"lr": 3e-5} and choice["reached"]["lr 0.0001"] == "diverged"
    only = modules.choose.choose([diverged], 0.2)["a"]
    assert only["flags"] == {} and "all values of lr diverged" in only["warnings"][0]


def test_the_choice_warns_of_a_value_at_the_edge_of_the_grid_and_of_one_that_is_not_better_than_the_start(
    modules, candidate
):
    runs = [candidate("a", lr, {0: 1.0, 8: at}) for lr, at in ((1e-5, 1.0), (3e-5, 1.2), (1e-4, 1.3))]
    low, start = modules.choose.choose(runs, 0.2)["a"]["warnings"]
    assert "1e-05 is the lowest value of the grid" in low and "no value of lr ends better than the start" in start
    runs = [candidate("a", lr, {0: 1.0, 8: at}) for lr, at in ((1e-5, 1.0), (3e-5, 0.9), (1e-4, 0.8))]
    (high,) = modules.choose.choose(runs, 0.2)["a"]["warnings"]
    assert "0.0001 is the highest value of the grid" in high


def test_a_choice_by_the_objective_takes_the_highest_reward_less_the_weighted_divergence(modules, candidate):
    # 0.5 - 0.2 * 0.5 = 0.4; 0.7 - 0.2 * 2 = 0.3; 0.1
    ends = {1e-6: (0.1, 0.0), 1e-5: (0.5, 0.5), 3e-5: (0.7, 2.0)}
    runs = [candidate("a", lr, {0: (0.0, 0.0), 8: end}, "objective") for lr, end in ends.items()]
    choice = modules.choose.choose(runs, 0.2)["a"]
    assert choice["flags"] == {"lr": 1e-5} and choice["warnings"] == []
    assert choice["reached"] == pytest.approx({"lr 1e-06": 0.1, "lr 1e-05": 0.4, "lr 3e-05": 0.3})


def test_a_planned_choice_is_of_the_last_iteration_and_by_the_criterion_of_each_setting(modules, work):
    plan = plan_of(modules, "tuning", work)
    words = plan.steps["tuning/choose"].command
    runs = [modules.choose.parse_run(word) for word in words if word.endswith("metrics.jsonl")]
    by_setting = {run.setting: run.criterion for run in runs}
    assert (by_setting["self-normalized-k8"], by_setting["rloo"]) == ("distance", "objective")
    for run in runs:
        brain = flags_of(plan.steps[f"tuning/{run.metrics.parts[-4]}/seed1/brain"].command)
        assert int(brain["--train-iters"]) == run.iterations and float(brain["--lr"]) == run.value


def test_a_tuning_run_is_at_least_one_whole_round(modules, work):
    for _, stage, words in stages_of(plan_of(modules, "tuning", work)):
        flags = flags_of(words)
        assert stage != "brain" or int(flags.get("--refresh-interval", 0)) <= int(flags["--train-iters"])


def test_an_experiment_tells_what_speaks_against_its_tuned_values_and_refuses_a_setting_without_one(modules, work):
    tuned = yaml.safe_load((work / "tuned.yaml").read_text())
    tuned["rloo"]["warnings"] = ["lr 3e-05 is the highest value of the grid"]
    (work / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    (told,) = modules.plan.tuning_warnings(plan_of(modules, "methods", work))
    assert "rloo: lr 3e-05 is the highest value of the grid" in told
    assert modules.plan.tuning_warnings(plan_of(modules, "baseline", work)) == []
    tuned["rloo"] = {"flags": {}, "warnings": ["all values of lr diverged"]}
    (work / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    with pytest.raises(modules.user_errors.UserError, match="no values for rloo; all values of lr diverged"):
        plan_of(modules, "methods", work)


def test_the_learning_rate_of_every_run_but_the_quickstart_falls_to_zero(modules, work):
    for name in set(EXPERIMENTS) - {"quickstart_seeds", "smoke"}:
        for _, stage, words in stages_of(plan_of(modules, name, work)):
            flags = flags_of(words)
            assert stage != "brain" or (flags["--lr-decay-style"], float(flags["--min-lr"])) == ("linear", 0.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": [{"name": "a"}]}, r"setting 1: needs label"),
        ({"settings": [{"name": "a", "label": "A", "flag": {}}]}, r"unknown key flag; known are name, label"),
        ({"seeds": 3}, r"seeds=3 must be a list"),
        ({"seeds": [1, 1]}, r"must be different numbers"),
        ({"settings": [{"name": "a", "label": "A"}] * 2}, r"two settings are called a"),
        ({"settings": [{"name": "a", "label": "A", "data": "pears"}]}, r"data='pears' must be prompts or pairs"),
        ({"settings": [{"name": "a", "label": "A", "grid": {"lr": ["1e-5"]}}]}, r"write 1.0e-5"),
        ({"settings": [{"name": "a", "label": "A", "best_of": 4}]}, r"best-of-n and a number `best_of` go together"),
        ({"settings": [{"name": "a", "label": "A", "same_as": "b/c", "flags": {"lr": 1}}]}, r"leave out flags"),
        ({"choose_by": "distance"}, r"compares the values of a grid, and it has none"),
        ({"choose_by": "loss", "grid": {"lr": [1.0]}}, r"choose_by='loss' must be one of distance, objective"),
        ({"sizes": {"prompts": 3}}, r"with sizes of x: unknown key prompts"),
    ],
)
def test_a_mistake_in_an_experiment_is_named(modules, tmp_path, change, told):
    content = {"question": "?", "seeds": [1], "settings": [{"name": "a", "label": "A", "flags": {"lr": 1}}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content | change))
    with pytest.raises(modules.user_errors.UserError, match=told):
        modules.plan.make_plan(tmp_path / "x.yaml", tmp_path)


def test_an_unknown_experiment_or_setting_is_told_with_those_that_exist(modules, work):
    with pytest.raises(modules.user_errors.UserError, match=r"there are baseline.yaml, drift.yaml"):
        plan_of(modules, "nothing", work)
    with pytest.raises(modules.user_errors.UserError, match=r"--only nope: .*it has self-normalized-k8"):
        plan_of(modules, "baseline", work, only=["nope"])


def test_a_key_that_stands_twice_is_an_error(modules, tmp_path):
    (tmp_path / "x.yaml").write_text("question: a\nquestion: b\n")
    with pytest.raises(modules.user_errors.UserError, match=r"x\.yaml, line 1: 'question' stands twice"):
        modules.settings.read_experiment(tmp_path / "x.yaml")
