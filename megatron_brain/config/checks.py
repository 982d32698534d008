"""Checks that need more than one section, or the size of the world. Pure: no torch, no process group.

`require` runs when a configuration is loaded. `validate_layout` runs as soon as the model's sizes are known (they may
be in --hf-model or in a checkpoint) and before `init_process_group`, so that an impossible layout costs no start-up.
"""

from megatron_brain.config.fp8_checks import require_fp8, validate_fp8_sizes
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.objective_checks import require_objective, require_rejection_sampling
from megatron_brain.config.run import STAGE_SECTIONS, RunConfig
from megatron_brain.errors import ConfigError

_EXPLICIT_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def require(config: RunConfig) -> None:
    """Check that everything the stage cannot do without is there, and that settings of different sections agree.

    Raises:
        ConfigError: naming the missing flag or the settings that do not fit together.
    """
    _REQUIREMENTS[config.stage](config)
    if "optimizer" in STAGE_SECTIONS[config.stage]:
        _check_training(config)
    if config.stage in ("brain", "generate", "evaluate"):
        _check_response_length(config)
    require_fp8(config)


def validate_layout(config: RunConfig, world_size: int, model: ModelConfig) -> None:
    """Check that the model and the batches can be laid out over `world_size` processes.

    Args:
        config: the run; its parallel, training, data and brain sections are read.
        world_size: number of processes.
        model: sizes as resolved from --hf-model, checkpoint or flags; `num_query_groups` None means one per head.

    Raises:
        ConfigError: naming key, value and the values that would work.
    """
    _check_tensor_parallel(config, world_size, model)
    _check_pipeline_parallel(config, world_size, model)
    _check_world_size(config, world_size)
    validate_fp8_sizes(config, model)
    if model.max_position_embeddings is not None and config.data.seq_length > model.longest_sequence[0]:
        limit, setting = model.longest_sequence
        raise ConfigError(
            f"seq_length={config.data.seq_length} exceeds the model's {setting}: use --seq-length {limit} or less"
        )
    if "optimizer" in STAGE_SECTIONS[config.stage]:
        _check_recomputed_chunks(config, model)
        _check_batches(config, world_size)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes left for data parallelism: world / (tensor x pipeline)."""
    return world_size // _model_parallel_size(config)


def _require_all(config: RunConfig, *names: str) -> None:
    """Each `section.field` is set."""
    for name in names:
        section, key = name.split(".")
        if getattr(getattr(config, section), key) is None:
            raise ConfigError(f"{key} is not set: the {config.stage} stage needs --{key.replace('_', '-')}")


def _require_start(config: RunConfig) -> None:
    """Weights, or at least sizes, come from somewhere; and so does the tokenizer."""
    if config.checkpoint.load or config.model.hf_model:
        return
    missing = [key for key in _EXPLICIT_SIZES if getattr(config.model, key) is None]
    if missing:
        flags = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise ConfigError(
            f"no model: the {config.stage} stage needs --load (a checkpoint), --hf-model (a Hugging Face directory) or "
            f"the sizes of a randomly initialised model, of which these are missing: {flags}"
        )
    if config.tokenizer.tokenizer_model is None:
        raise ConfigError("tokenizer_model is not set: without --load or --hf-model, give --tokenizer-model")


def _require_sft_or_reward(config: RunConfig) -> None:
    _require_all(config, "data.train_data")
    _require_start(config)


def _require_brain(config: RunConfig) -> None:
    _require_all(config, "checkpoint.load")
    for name in ("hidden_dropout", "attention_dropout"):
        if getattr(config.model, name):
            raise ConfigError(
                f"{name}={getattr(config.model, name)}: dropout makes another policy of every pass, so that its ratio "
                "to the proposal means nothing; leave it at 0"
            )
    require_objective(config)
    if config.brain.rollout_data:
        _require_rollout_data(config)
        return
    if config.data.train_data is None:
        raise ConfigError(
            "train_data is not set: the brain stage needs --train-data (prompts to sample) or --rollout-data"
        )
    if config.scoring.prior_load is None and not config.checkpoint.finetune:
        raise ConfigError(
            "prior_load is not set: give --prior-load, or --finetune if --load is the prior the run starts from"
        )
    (_require_given_pairs if config.brain.responses == "given" else _require_samples)(config)
    if config.brain.responses == "rso":
        require_rejection_sampling(config)
    prompts, batch = config.brain.prompts_per_round, config.training.global_batch_size
    if prompts % batch:
        raise ConfigError(
            f"prompts_per_round={prompts} is not a multiple of global_batch_size={batch} (groups a step): "
            f"use {_nearest_multiples(prompts, batch)}"
        )


def _require_rollout_data(config: RunConfig) -> None:
    """Rollouts bring prompts and responses."""
    if config.data.train_data:
        raise ConfigError("train_data and rollout_data are both set: rollouts hold their own prompts; give one")
    if config.brain.responses == "given":
        raise ConfigError("responses=given takes pairs from --train-data, and rollout_data is set: give one of them")
    if config.brain.responses == "rso":
        raise ConfigError("responses=rso draws responses to --train-data, and rollout_data is set: give one of them")


def _require_samples(config: RunConfig) -> None:
    _require_all(config, "scoring.reward_load")
    samples = config.sampling.samples_per_prompt
    if samples < 2:
        raise ConfigError(f"samples_per_prompt={samples}: the loss of a group of one is always 0; use 2 or more")
    if config.sampling.temperature == 0:
        raise ConfigError("temperature=0.0: greedy samples of a prompt are all the same; use a temperature above 0")


def _require_given_pairs(config: RunConfig) -> None:
    """Pairs stand for two samples of the prior of which only the better one is known."""
    if config.brain.objective == "brain" and config.brain.alpha != "hard":
        raise ConfigError("responses=given: pairs say which response is better, not by how much; add --alpha hard")
    if config.brain.refresh_proposal:
        raise ConfigError("responses=given: the pairs are no samples of the policy; add --no-refresh-proposal")
    if config.scoring.reward_load is not None:
        raise ConfigError("responses=given: pairs need no reward model; drop --reward-load")


def _require_generate(config: RunConfig) -> None:
    if not (config.checkpoint.load or config.model.hf_model):
        raise ConfigError("load is not set: the generate stage needs --load (a checkpoint) or --hf-model")
    _require_all(config, "generate.prompts", "generate.output")


def _require_evaluate(config: RunConfig) -> None:
    _require_all(config, "checkpoint.load", "generate.prompts", "generate.output", "scoring.prior_load")
    if config.scoring.reward_load is None and config.evaluate.judge is None:
        raise ConfigError("reward_load and judge are not set: the evaluate stage needs --reward-load, --judge or both")


_REQUIREMENTS = {
    "sft": _require_sft_or_reward,
    "reward": _require_sft_or_reward,
    "brain": _require_brain,
    "generate": _require_generate,
    "evaluate": _require_evaluate,
}


def _check_training(config: RunConfig) -> None:
    """Settings of the loop that live in different sections."""
    if config.training.eval_interval is not None and config.data.valid_data is None:
        raise ConfigError(f"eval_interval={config.training.eval_interval} needs --valid-data to validate on")
    warmup, total = config.optimizer.lr_warmup_iters, config.training.train_iters
    if total is not None and warmup >= total:
        raise ConfigError(f"lr_warmup_iters={warmup} must be less than train_iters={total}")
    if config.parallel.sequence_parallel and config.data.seq_length % config.parallel.tensor_model_parallel_size:
        size = config.parallel.tensor_model_parallel_size
        raise ConfigError(
            f"seq_length={config.data.seq_length} is not a multiple of tensor_model_parallel_size={size}, over which "
            f"sequence_parallel splits it: use {_nearest_multiples(config.data.seq_length, size)}"
        )


def _check_response_length(config: RunConfig) -> None:
    """A prompt and its sampled response fit into --seq-length."""
    if config.brain.rollout_data is not None or (config.stage == "brain" and config.brain.responses == "given"):
        return
    new, total = config.sampling.max_new_tokens, config.data.seq_length
    prompt = config.data.max_prompt_length
    if prompt is None and new >= total:
        raise ConfigError(f"max_new_tokens={new} leaves no room for a prompt inside seq_length={total}")
    if prompt is not None and prompt + new > total:
        raise ConfigError(
            f"max_prompt_length={prompt} + max_new_tokens={new} exceed seq_length={total}: "
            f"raise --seq-length to {prompt + new} or lower one of them"
        )


def _model_parallel_size(config: RunConfig) -> int:
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def _check_tensor_parallel(config: RunConfig, world_size: int, model: ModelConfig) -> None:
    """Query heads split evenly; key/value heads split evenly or are each shared by equally many processes."""
    size, heads = config.parallel.tensor_model_parallel_size, model.num_attention_heads
    assert heads is not None and model.num_layers is not None, "validate_layout needs the resolved sizes of the model"
    groups = model.num_query_groups or heads

    def fits(candidate: int) -> bool:
        return heads % candidate == 0 and (groups % candidate == 0 or candidate % groups == 0)

    if fits(size):
        if model.ffn_hidden_size is not None and model.ffn_hidden_size % size:
            raise ConfigError(
                f"tensor_model_parallel_size={size} does not divide ffn_hidden_size={model.ffn_hidden_size}"
            )
        return
    works = _one_of([value for value in range(1, min(heads, world_size) + 1) if fits(value)])
    if heads % size:
        raise ConfigError(
            f"tensor_model_parallel_size={size} does not divide num_attention_heads={heads} "
            f"(num_query_groups={groups}): use {works}"
        )
    raise ConfigError(
        f"tensor_model_parallel_size={size} is neither a divisor nor a multiple of num_query_groups={groups}: "
        f"use {works}"
    )


def _check_pipeline_parallel(config: RunConfig, world_size: int, model: ModelConfig) -> None:
    """Stages, and chunks of the interleaved schedule, have equally many layers."""
    layers, size = model.num_layers, config.parallel.pipeline_model_parallel_size
    if layers % size:
        limit = max(world_size // config.parallel.tensor_model_parallel_size, 1)
        works = [value for value in _divisors(layers) if value <= limit]
        raise ConfigError(
            f"pipeline_model_parallel_size={size} does not divide num_layers={layers}: use {_one_of(works)}"
        )
    chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return
    stage = layers // size
    works = [value for value in _divisors(stage) if value < stage]
    if chunk not in works:
        cure = f"use {_one_of(works)}" if works else "leave it unset"
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={chunk} does not cut the {stage} layers of a pipeline stage "
            f"(num_layers={layers} / pipeline_model_parallel_size={size}) into two or more equal chunks: {cure}"
        )


def _check_recomputed_chunks(config: RunConfig, model: ModelConfig) -> None:
    """megatron-core goes through the layers of a model chunk in steps of --recompute-num-layers."""
    step = model.recompute_num_layers
    if step is None or model.recompute_method == "block":
        return
    here = config.parallel.num_layers_per_virtual_pipeline_stage
    here = here or model.num_layers // config.parallel.pipeline_model_parallel_size
    if here % step:
        raise ConfigError(
            f"recompute_num_layers={step} does not divide the {here} layers that a process computes at one time: use "
            f"{_one_of(_divisors(here))}"
        )


def _check_world_size(config: RunConfig, world_size: int) -> None:
    """The world is a whole number of model replicas."""
    replica = _model_parallel_size(config)
    if world_size % replica:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor_model_parallel_size="
            f"{config.parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{config.parallel.pipeline_model_parallel_size} = {replica}: "
            f"start {_nearest_multiples(world_size, replica)} processes"
        )


def _check_batches(config: RunConfig, world_size: int) -> None:
    """Every replica gets the same number of micro-batches, and the interleaved schedule as many as it needs."""
    replicas = data_parallel_size(config, world_size)
    if config.training.max_tokens_per_micro_batch is not None:
        return
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    unit = micro * replicas
    if batch % unit:
        raise ConfigError(
            f"global_batch_size={batch} is not a multiple of micro_batch_size={micro} x "
            f"data-parallel size {replicas} = {unit}: use {_nearest_multiples(batch, unit)}"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_layers_per_virtual_pipeline_stage and (batch // unit) % stages:
        raise ConfigError(
            f"global_batch_size={batch} gives {batch // unit} micro-batches; the interleaved schedule "
            f"(num_layers_per_virtual_pipeline_stage) needs a multiple of pipeline_model_parallel_size={stages}: "
            f"use a global_batch_size of {_nearest_multiples(batch, unit * stages)}"
        )


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `number`, in words."""
    below = number // unit * unit
    return _one_of([value for value in (below, below + unit) if value])


def _one_of(values: list[int]) -> str:
    """`1`, `1 or 3`, `1, 3 or 9`."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last
