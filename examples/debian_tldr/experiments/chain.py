"""The commands of the example's chain as steps: shared stages, those of a seed, and those of a run.

WORK/shared/            data, parts of it, base model, judge, SFT model, samples and preference pairs
WORK/shared/seed<S>/    reward model, scored samples of the prior, evaluation of the SFT model
WORK/EXPERIMENT/SETTING/seed<S>/   a run
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import ROOT, Flags, Setting, Sizes, grid_name
from steps import ENVIRONMENT, Step, flag_words, sources_of

EXAMPLE = "examples/debian_tldr"
JUDGE = f"{EXAMPLE}/judge.py"
SPLITS = ("train.jsonl", "valid.jsonl", "test.jsonl")
RESPONSES_OF_A_PAIR = 2


class Chain:
    """Makes the steps of one WORK at given sizes.

    Args:
        work: the folder of results.
        sizes: how large the stages are.
    """

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self._work, self._sizes = work, sizes
        self._shared, self._data = work / "shared", work / "shared" / "data"
        self._smoke = sizes.model == "smoke"
        self._judge = "score_rouge" if self._smoke else "score"

    def shared_steps(self) -> list[Step]:
        """The stages that all runs share, in their order."""
        shared, sizes = self._shared, self._sizes
        parts = ["sft", "pair_prompts", "pair_records", "brain_prompts"]
        counts = [sizes.sft_records, sizes.pair_prompts, sizes.pair_packages, sizes.brain_prompts]
        base = ["--smoke", "--tokenizer-data", str(self._data / "train.jsonl")] if self._smoke else []
        steps = [
            self._script(
                "data",
                ["fetch_data.py", "--out", str(self._data), "--max-prompt-words", "60"],
                outputs=(self._data / "manifest.json", *(self._data / name for name in SPLITS)),
                digests=tuple(self._data / name for name in SPLITS),
            ),
            self._script(
                "parts",
                [
                    *("split_data.py", "--data", str(self._data / "train.jsonl"), "--out", str(shared / "parts")),
                    *(f"{name}={count}" for name, count in zip(parts, counts, strict=True)),
                ],
                needs=["shared/data"],
                outputs=tuple(shared / "parts" / f"{name}.jsonl" for name in parts),
            ),
            self._script(
                "base_hf",
                ["fetch_model.py", "--out", str(shared / "base_hf"), *base],
                needs=["shared/data"] if self._smoke else [],
                outputs=(shared / "base_hf" / "config.json",),
            ),
            self._step(
                "shared/base",
                ["python", "tools/convert_hf_to_megatron.py", "--hf-model", str(shared / "base_hf")]
                + ["--save", str(shared / "base")],
                needs=["shared/base_hf"],
                reads=(ROOT / "tools" / "convert_hf_to_megatron.py",),
                outputs=(latest(shared / "base"),),
                fresh=(shared / "base",),
            ),
            self._sft(),
            self._samples(),
            self._script(
                "pairs",
                [
                    *("make_preferences.py", "--sft", str(shared / "parts" / "pair_records.jsonl")),
                    *("--samples", str(shared / "samples.jsonl"), "--judge", self._judge),
                    *("--valid-share", "0.2", "--out", str(shared / "pairs")),
                ],
                needs=["shared/parts", "shared/samples", *self._judge_needs()],
                outputs=(shared / "pairs" / "train.jsonl", shared / "pairs" / "valid.jsonl"),
                fresh=(shared / "pairs",),
            ),
        ]
        if not self._smoke:
            place = shared / "judge"
            outputs = (place / "model.safetensors",)
            steps.insert(2, self._script("judge", ["fetch_judge.py", "--out", str(place)], outputs=outputs))
        return steps

    def _sft(self) -> Step:
        """SFT as the quickstart does it: on two pipeline stages, with all cores."""
        words = ["--load", str(self._shared / "base"), "--finetune", "--save", str(self._shared / "sft")]
        words += ["--train-data", str(self._shared / "parts" / "sft.jsonl")]
        words += ["--valid-data", str(self._data / "valid.jsonl"), "--max-valid-records", str(self._sizes.sft_valid)]
        words += ["--train-epochs", "null", "--train-iters", str(self._sizes.sft_iters)]
        words += ["--pipeline-model-parallel-size", "2", "--no-save-optim"]
        return self._stage(
            "shared/sft",
            "sft",
            words,
            flags=self._sizes.sft,
            needs=["shared/base", "shared/parts"],
            outputs=(latest(self._shared / "sft"),),
            fresh=(self._shared / "sft",),
            iterations=self._sizes.sft_iters,
            checkpoint=self._shared / "sft",
            resumes=False,
            slots=2,
        )

    def _samples(self) -> Step:
        """Samples of the SFT model, of which the judge makes preference pairs."""
        output = self._shared / "samples.jsonl"
        words = ["--load", str(self._shared / "sft"), "--temperature", "1.0", "--samples-per-prompt", "4"]
        words += ["--prompts", str(self._shared / "parts" / "pair_prompts.jsonl"), "--output", str(output)]
        return self._stage(
            "shared/samples",
            "generate",
            words,
            config="evaluate",
            flags={},
            needs=["shared/sft", "shared/parts"],
            outputs=(output,),
            fresh=(output,),
            slots=2,
        )

    def seed_steps(self, seed: int) -> list[Step]:
        """The stages that all runs of a seed share: the reward model, and what it says of the SFT model's answers."""
        folder, sizes = self._shared / f"seed{seed}", self._sizes
        words = ["--load", str(self._shared / "sft"), "--finetune", "--save", str(folder / "reward")]
        words += ["--train-data", str(self._shared / "pairs" / "train.jsonl"), "--max-train-records", str(sizes.pairs)]
        words += ["--valid-data", str(self._shared / "pairs" / "valid.jsonl")]
        words += ["--train-epochs", "null", "--train-iters", str(sizes.reward_iters), "--no-save-optim"]
        reward = self._stage(
            f"shared/seed{seed}/reward",
            "reward",
            [*words, "--seed", str(seed)],
            flags=sizes.reward,
            needs=["shared/sft", "shared/pairs"],
            outputs=(latest(folder / "reward"),),
            fresh=(folder / "reward",),
            iterations=sizes.reward_iters,
            checkpoint=folder / "reward",
        )
        return [reward, self._prior(seed, "test"), self._prior(seed, "valid")]

    def _prior(self, seed: int, split: str) -> Step:
        """The evaluation of the SFT model, which draws and scores the samples of the prior that all policies meet."""
        place = self._of_seed(seed)
        data = self._posterior_data(seed, split)
        # Brain drops overlong records of --valid-data, and the samples must be those of the prompts that it has.
        overlong = {"overlong": "drop"} if split == "valid" else {}
        return self._evaluate(
            f"shared/seed{seed}/prior_{split}",
            seed,
            split,
            policy=self._shared / "sft",
            prompts=self._sizes.test_prompts if split == "test" else self._sizes.valid_prompts,
            output=place / f"prior_{split}.json",
            needs=["shared/sft", f"shared/seed{seed}/reward"],
            flags=overlong,
            writes=(data, data.with_name(f"{data.name}.json")),
            kind=f"prior_{split}",
        )

    def brain(self, name: str, seed: int, flags: Flags, data: str, *, may_diverge: bool) -> Step:
        """The training of a run.

        Args:
            flags: all settings of the brain stage that differ from its YAML file.
            data: `prompts`, or `pairs`.
            may_diverge: whether a training whose numbers are not finite any more is a result.
        """
        folder, seeds, shared = self._work / name / "brain", self._of_seed(seed), f"shared/seed{seed}"
        train = self._shared / ("pairs/train.jsonl" if data == "pairs" else "parts/brain_prompts.jsonl")
        words = ["--load", str(self._shared / "sft"), "--finetune", "--reward-load", str(seeds / "reward")]
        words += ["--save", str(folder), "--auto-resume", "--seed", str(seed), "--train-data", str(train)]
        needs = ["shared/sft", f"{shared}/reward", "shared/pairs" if data == "pairs" else "shared/parts"]
        if self._sizes.valid_prompts:
            words += ["--valid-data", str(self._data / "valid.jsonl")]
            words += ["--max-valid-records", str(self._sizes.valid_prompts), *self._judge_words()]
            words += self._posterior_words(seed, "valid")
            needs += self._judge_needs()
            if self._sizes.valid_posterior_samples:
                needs.append(f"{shared}/prior_valid")
        return self._stage(
            f"{name}/brain",
            "brain",
            words,
            flags=flags,
            needs=needs,
            outputs=(latest(folder), folder / "metrics.jsonl"),
            fresh=(folder,),
            iterations=flags["train_iters"],
            checkpoint=folder,
            resumes=True,
            may_diverge=may_diverge,
            minutes=self._brain_minutes(flags, data),
        )

    def evaluate(self, name: str, seed: int) -> Step:
        """The evaluation of a run's policy on held-out prompts."""
        shared = f"shared/seed{seed}"
        return self._evaluate(
            f"{name}/evaluate",
            seed,
            "test",
            policy=self._work / name / "brain",
            prompts=self._sizes.test_prompts,
            output=self._work / name / "evaluation.json",
            needs=[f"{name}/brain", "shared/sft", f"{shared}/reward"]
            + ([f"{shared}/prior_test"] if self._sizes.test_posterior_samples else []),
            loads=(f"{name}/brain",),
        )

    def best_of(self, name: str, seed: int, count: int) -> Step:
        """Best of n of the SFT model, from the scored samples of the prior."""
        place, output = self._of_seed(seed), self._work / name / "evaluation.json"
        words = ["best_of_n.py", "--posterior-data", str(self._posterior_data(seed, "test")), "--n", str(count)]
        words += ["--evaluation", str(place / "prior_test.json"), "--judge", self._judge]
        words += ["--seed", str(seed), "--output", str(output)]
        needs = [f"shared/seed{seed}/prior_test", *self._judge_needs()]
        return self._script("best_of", words, name=f"{name}/best_of", needs=needs, outputs=(output,), fresh=(output,))

    def choice(self, experiment: str, runs: Sequence[tuple[Setting, str, int]]) -> Step:
        """The choice of the best value of every grid.

        Args:
            runs: setting, name and last iteration of each run.
        """
        words = [f"{EXAMPLE}/experiments/choose.py", "--out", str(self._work / "tuned.yaml")]
        words += ["--temperature", str(self._sizes.brain["reward_temperature"])]
        for setting, name, iterations in runs:
            ((flag, (value,)),) = setting.grid.items()
            metrics = self._work / name / "brain" / "metrics.jsonl"
            words.append(f"{grid_name(setting)}:{setting.choose_by}:{flag}:{value:g}:{iterations}:{metrics}")
        return self._step(
            f"{experiment}/choose",
            ["python", *words],
            needs=[f"{name}/brain" for _, name, _ in runs],
            takes_diverged=True,
            reads=(ROOT / EXAMPLE / "experiments" / "choose.py",),
            outputs=(self._work / "tuned.yaml",),
        )

    def _evaluate(
        self,
        name: str,
        seed: int,
        split: str,
        *,
        policy: Path,
        prompts: int,
        output: Path,
        needs: list[str],
        loads: tuple[str, ...] = (),
        flags: Flags | None = None,
        writes: tuple[Path, ...] = (),
        kind: str = "evaluate",
    ) -> Step:
        words = ["--load", str(policy), "--prior-load", str(self._shared / "sft")]
        words += ["--reward-load", str(self._of_seed(seed) / "reward"), *self._judge_words(), "--seed", str(seed)]
        words += ["--prompts", str(self._data / f"{split}.jsonl"), "--max-prompts", str(prompts)]
        posterior = self._posterior_words(seed, split)
        if posterior:
            posterior += flag_words({"reward_temperature": self._sizes.brain["reward_temperature"]})
        return self._stage(
            name,
            "evaluate",
            [*words, *posterior, "--output", str(output)],
            kind=kind,
            flags={**self._sizes.evaluate, **(flags or {})},
            needs=[*needs, "shared/data", *self._judge_needs()],
            loads=loads,
            outputs=(output, *writes),
            fresh=(output, *writes),
        )

    def _posterior_words(self, seed: int, split: str) -> list[str]:
        """Flags of the distance to the posterior. All runs of a seed measure it with the same samples of the prior."""
        sizes = self._sizes
        samples = sizes.test_posterior_samples if split == "test" else sizes.valid_posterior_samples
        if not samples:
            return []
        prompts = sizes.test_posterior_prompts if split == "test" else sizes.valid_prompts
        return [
            *("--posterior-samples", str(samples), "--posterior-prompts", str(prompts)),
            *("--posterior-data", str(self._posterior_data(seed, split))),
        ]

    def _posterior_data(self, seed: int, split: str) -> Path:
        return self._of_seed(seed) / f"posterior_{split}.jsonl"

    def _of_seed(self, seed: int) -> Path:
        return self._shared / f"seed{seed}"

    def _judge_words(self) -> list[str]:
        return ["--judge", f"{JUDGE}:{self._judge}"]

    def _judge_needs(self) -> list[str]:
        return [] if self._smoke else ["shared/judge"]

    def _brain_minutes(self, flags: Flags, data: str) -> float:
        """Minutes of a run: its start, its validations, and each response that is drawn, scored and trained on."""
        samples = RESPONSES_OF_A_PAIR if data == "pairs" else flags["samples_per_prompt"]
        groups, minutes = flags["train_iters"] * flags["global_batch_size"], self._sizes.minutes
        work = groups * samples * minutes["brain_per_1000"] / 1000
        if flags.get("responses") == "rso":
            work += groups * flags["rso_candidates"] * minutes["candidates_per_1000"] / 1000
        validations = 0
        if self._sizes.valid_prompts:
            # Before the first step, after every interval, and after the last step.
            validations = 1 + math.ceil(flags["train_iters"] / (flags.get("eval_interval") or flags["train_iters"]))
        return minutes["brain"] + validations * minutes["validation"] + work

    def _stage(
        self,
        name: str,
        stage: str,
        words: list[str],
        *,
        flags: Flags,
        config: str | None = None,
        resumes: bool = False,
        slots: int = 1,
        **more: Any,
    ) -> Step:
        """A stage of megatron_brain, with a YAML file of the example."""
        file = f"{EXAMPLE}/{config or stage}.yaml"
        start = ["torchrun", "--standalone", "--nproc-per-node", str(slots)] if slots > 1 else ["python"]
        command = [*start, "-m", "megatron_brain", stage, "--config", file, *words, "--no-progress", *flag_words(flags)]
        reads = (ROOT / file, *(sources_of(ROOT / JUDGE) if "--judge" in words else ()))
        return self._step(name, command, reads=reads, resumes=resumes, slots=slots, **more)

    def _script(self, what: str, words: list[str], *, name: str | None = None, **more: Any) -> Step:
        """A script of the example."""
        command = ["python", f"{EXAMPLE}/{words[0]}", *words[1:]]
        # make_preferences.py takes the judge by its name.
        scripts = [words[0]] + (["judge.py"] if "--judge" in words else [])
        reads = dict.fromkeys(path for script in scripts for path in sources_of(ROOT / EXAMPLE / script))
        return self._step(name or f"shared/{what}", command, kind=what, reads=tuple(reads), **more)

    def _step(
        self, name: str, command: list[str], *, kind: str | None = None, minutes: float | None = None, **more: Any
    ) -> Step:
        kind = kind or name.rsplit("/", 1)[-1]
        environment = {**ENVIRONMENT, "TLDR_JUDGE_DIR": str(self._shared / "judge")}
        return Step(
            name=name,
            kind=kind,
            command=tuple(command),
            minutes=self._sizes.minutes.get(kind, 0.5) if minutes is None else minutes,
            environment=environment,
            **{key: tuple(value) if isinstance(value, list) else value for key, value in more.items()},
        )


def latest(checkpoint: Path) -> Path:
    """The file that a checkpoint folder has once a checkpoint in it is whole. It holds the iteration."""
    return checkpoint / "latest_checkpointed_iteration.txt"
