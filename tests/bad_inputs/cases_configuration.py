"""Flags and YAML files that are wrong, contradict each other or leave something out."""

from __future__ import annotations

from bad_inputs.case import BadInput, Maker, brain, evaluate, generate


def _sft(*flags: str) -> Maker:
    return lambda site: site.assets.sft_on(str(site.assets.records("sft")), *flags)


def _yaml(content: str | bytes) -> Maker:
    def make(site):
        return site.assets.sft("--config", site.write("run.yaml", content))

    return make


def _plan(*flags: str) -> Maker:
    return lambda site: site.assets.plan(*flags)


def _export(*flags: str) -> Maker:
    return lambda site: site.assets.export(site.assets.policy, *flags)


CASES = [
    # The command line.
    BadInput(
        "an unknown flag, as a process",
        _sft("--micro-batch-sise", "2"),
        r"micro_batch_sise='2' \(command line\)",
        r"did you mean 'micro_batch_size'",
        as_process=True,
    ),
    BadInput(
        "a flag of another stage",
        _sft("--reward-temperature", "2"),
        r"reward_temperature='2' \(command line\): the sft stage does not read it",
        r"it belongs to brain",
    ),
    BadInput("an abbreviated flag", _sft("--micro", "2"), r"micro='2' \(command line\): unknown key", r"--help"),
    BadInput("a flag without its value", _sft("--lr"), r"argument --lr", r"expected one argument"),
    BadInput("a value without a flag", _sft("data.jsonl"), r"'data.jsonl' does not follow a flag", r"--flag value"),
    BadInput("a text for a number", _sft("--micro-batch-size", "two"), r"micro_batch_size='two'", r"an integer"),
    BadInput("a number that is none", _sft("--lr", "nan"), r"lr='nan' \(command line\)", r"expected a number"),
    BadInput("a value behind a switch", _sft("--bf16", "true"), r"'true' after --bf16", r"--bf16 or --no-bf16"),
    BadInput("a value at a switch", _sft("--no-bf16=true"), r"--no-bf16=true", r"--bf16 or --no-bf16 without a value"),
    BadInput("an unknown choice", _sft("--overlong", "cut"), r"overlong='cut'", r"one of error, drop, truncate"),
    BadInput("an empty path", _sft("--save", ""), r"save='' \(command line\)", r"non-empty text"),
    BadInput("a seed below 0", _sft("--seed", "-5"), r"seed=-5", r"at least 0 and less than 2\*\*32"),
    BadInput("an epsilon below 0", _sft("--adam-eps", "-1"), r"adam_eps=-1.0", r"must be positive"),
    BadInput("a rate below 0", _sft("--lr", "-1"), r"lr=-1.0.*command line", r"must be positive"),
    BadInput("a deviation below 0", _sft("--init-method-std", "-1"), r"init_method_std=-1.0", r"must not be negative"),
    BadInput(
        "a metric of another stage",
        _sft("--log-metrics", "loss,kl_to_prior"),
        r"log_metrics='loss,kl_to_prior': this stage has no metric 'kl_to_prior'",
        r"only loss, grad_norm, .*'all' shows all",
    ),
    BadInput("two configurations", _sft("--config", "a", "--config", "b"), r"2 times \(a, b\)", r"give one file"),
    BadInput(
        "no configuration where one is named",
        _sft("--config", "absent.yaml"),
        r"--config absent.yaml: No such file",
        r"looked for /.*absent.yaml",
    ),
    # YAML.
    BadInput("an empty YAML file", _yaml(""), r"run.yaml: .*found none", r"`key: value`"),
    BadInput("YAML that is a list", _yaml("- lr\n- 2\n"), r"run.yaml", r"lines of `key: value`"),
    BadInput(
        "a key twice", _yaml("lr: 1e-5\nlr: 1e-4\n"), r"lr \(run.yaml line 2\)", r"already set in run.yaml line 1"
    ),
    BadInput("a section as a key", _yaml("data:\n  seq_length: 4\n"), r"data=.*run.yaml line 1", r"at the top level"),
    BadInput("a list as a value", _yaml("lr: [1, 2]\n"), r"lr \(run.yaml line 1\).*a list", r"expected a number"),
    BadInput("yes for true", _yaml("bf16: yes\n"), r"bf16='yes' \(run.yaml line 1\)", r"true or false"),
    BadInput("a file of another stage", _yaml("stage: reward\n"), r"stage='reward' \(run.yaml", r"run that stage"),
    BadInput("a character that no name holds", _yaml('save: "a\\0b"\n'), r"save='a\\x00b' \(run.yaml", r"text"),
    BadInput(
        "YAML that is not UTF-8", _yaml("save: caf\xe9\n".encode("latin1")), r"run.yaml: not UTF-8", r"write .* UTF-8"
    ),
    BadInput(
        "a quote that is not closed",
        _yaml("lr: 'abc\n"),
        r"run.yaml: not valid YAML(.|\n)*line 1, column 5",
        r"lines of `key: value`",
        has_several_lines=True,
    ),
    BadInput(
        "YAML nested without end",
        _yaml("lr: " + "[" * 5000 + "]" * 5000),
        r"run.yaml: not valid YAML",
        r"lines of `key: value`",
        has_several_lines=True,
    ),
    # Settings that a stage needs, and settings that contradict each other.
    BadInput(
        "no data", lambda site: site.assets.sft("--hf-model", str(site.assets.hf)), r"train_data", r"--train-data"
    ),
    BadInput(
        "no model",
        lambda site: site.assets.sft("--train-data", str(site.assets.records("sft"))),
        r"no model: the sft stage",
        r"--load .* --hf-model .* --num-layers",
    ),
    BadInput("warm-up without end", _sft("--lr-warmup-iters", "5"), r"lr_warmup_iters=5", r"less than train_iters=2"),
    BadInput(
        "sequences the model does not take",
        _sft("--seq-length", "128"),
        r"seq_length=128 exceeds .*max_position_embeddings=64",
        r"--seq-length 64 or less",
    ),
    BadInput("another size", _sft("--hidden-size", "32"), r"hidden_size=32 was asked for", r"drop the flag"),
    BadInput(
        "heads that cannot be split",
        _sft("--tensor-model-parallel-size", "3"),
        r"tensor_model_parallel_size=3 does not divide num_attention_heads=4",
        r"use 1",
    ),
    BadInput(
        "fewer processes than the layout needs",
        _sft("--tensor-model-parallel-size", "2"),
        r"world size 1 is not a multiple of tensor_model_parallel_size=2",
        r"start 2 processes",
    ),
    BadInput(
        "chunks that do not divide the layers",
        _sft("--recompute-granularity", "full", "--recompute-num-layers", "5"),
        r"recompute_num_layers=5 does not divide the 2 layers",
        r"use 1 or 2",
    ),
    BadInput(
        "a group that no micro-batch can hold",
        _sft("--max-tokens-per-micro-batch", "8", "--save", "saved"),
        r"sft.jsonl:\d+\).* 29 tokens, more than --max-tokens-per-micro-batch 8",
        r"raise it to 29 or more",
        leaves=["saved*"],
    ),
    BadInput("one sample", brain("--samples-per-prompt", "1"), r"samples_per_prompt=1", r"use 2 or more"),
    BadInput("greedy samples", brain("--temperature", "0"), r"temperature=0.0", r"above 0"),
    BadInput("half a step", brain("--prompts-per-round", "5"), r"prompts_per_round=5", r"use 4 or 6"),
    BadInput("no room", generate("--max-new-tokens", "64"), r"max_new_tokens=64 leaves no room", r"seq_length=64"),
    BadInput("no prompt", generate("--max-prompts", "0"), r"max_prompts=0", r"at least 1"),
    BadInput("no resampling", evaluate("--bootstrap-samples", "0"), r"bootstrap_samples=0", r"at least 1"),
    BadInput(
        "no judgement", lambda site: site.assets.evaluate(), r"no reward", r"--reward-url, --judge or --judge-url"
    ),
    # Tools.
    BadInput("no GPU", _plan("--gpus", "0"), r"--gpus: 0", r"at least 1", has_several_lines=True),
    BadInput("memory without end", _plan("--reserved-memory", "inf"), r"--reserved-memory: inf", r"finite number"),
    BadInput("an unknown model", _plan("--model", "llama9"), r"model 'llama9'", r"there are llama3-8b"),
    BadInput("a unit that is none", _export("--max-shard-size", "5XB"), r"--max-shard-size 5XB", r"TB, GB, MB, KB"),
    BadInput("a tolerance that is none", _export("--tolerance", "nan"), r"--tolerance: nan", r"finite number"),
    BadInput("an unknown type", _export("--dtype", "int8"), r"--dtype: invalid choice: 'int8'", r"'float32'"),
]
