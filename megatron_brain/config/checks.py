"""Checks that need several sections, or the number of processes. They need neither torch nor a process group.

`require` runs when a configuration is loaded. `validate_layout` runs as soon as the model's sizes are known (they may
be in --hf-model or in a checkpoint) and before `init_process_group`, so that an impossible layout fails early.
"""

from megatron_brain.config.fp8_checks import require_fp8, validate_fp8_sizes
from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.errors import ConfigError

_EXPLICIT_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def require(config: RunConfig) -> None:
    """Check that all settings that the stage needs are there, and that settings of different sections agree.

    Raises:
        ConfigError: naming the missing flag or the settings that do not fit together.
    """
    spec_of(config).require(config)
    if spec_of(config).trains:
        _check_training(config)
    work = spec_of(config).work(config)
    if work.draws or work.answers_held_out:
        _check_response_length(config)
    _check_reward_timeout(config)
    require_fp8(config)


def validate_layout(config: RunConfig, world_size: int, model: ResolvedModel) -> None:
    """Check that the model and the batches can be laid out over `world_size` processes.

    Args:
        config: the run; its parallel, training, data and brain sections are read.
        world_size: number of processes.
        model: its sizes, resolved from --hf-model, checkpoint or flags.

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
    if spec_of(config).trains:
        _check_recomputed_chunks(config, model)
        _check_batches(config, world_size)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel size: world / (tensor x pipeline)."""
    return world_size // _model_parallel_size(config)


def require_set(config: RunConfig, *names: str) -> None:
    """Raise ConfigError where a `section.field` is not set."""
    for name in names:
        section, key = name.split(".")
        if getattr(config.section(section), key) is None:
            raise ConfigError(f"{key} is not set: the {config.stage} stage needs --{key.replace('_', '-')}")


def require_reward(config: RunConfig, *others: str) -> None:
    """Raise ConfigError where nothing gives responses a reward; `others` are flags that would do, too."""
    if not config.scoring.rewards:
        flags = [*("--reward-load", "--reward-function", "--reward-url"), *others]
        raise ConfigError(f"no reward: the {config.stage} stage needs {', '.join(flags[:-1])} or {flags[-1]}")


def require_data_and_start(config: RunConfig) -> None:
    """Raise ConfigError where --train-data, a model or a tokenizer is missing."""
    require_set(config, "data.train_data")
    require_start(config)


def require_start(config: RunConfig) -> None:
    """Raise ConfigError where no setting gives weights or sizes, or none gives a tokenizer."""
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


def _check_training(config: RunConfig) -> None:
    """Check the settings of the training loop, which are in different sections."""
    if config.training.eval_interval is not None and config.data.valid_data is None:
        raise ConfigError(f"eval_interval={config.training.eval_interval} needs --valid-data to validate on")
    if config.checkpoint.keep_best is not None and config.data.valid_data is None:
        raise ConfigError(f"keep_best={config.checkpoint.keep_best} needs --valid-data to validate on")
    warmup, total = config.optimizer.lr_warmup_iters, config.training.train_iters
    if total is not None and warmup >= total:
        raise ConfigError(f"lr_warmup_iters={warmup} must be less than train_iters={total}")
    if config.parallel.sequence_parallel and config.data.seq_length % config.parallel.tensor_model_parallel_size:
        size = config.parallel.tensor_model_parallel_size
        raise ConfigError(
            f"seq_length={config.data.seq_length} is not a multiple of tensor_model_parallel_size={size}, over which "
            f"sequence_parallel splits it: use {nearest_multiples(config.data.seq_length, size)}"
        )


def _check_reward_timeout(config: RunConfig) -> None:
    """Check that processes which wait for a function or a server do so for longer than it may take."""
    limit = 60 * config.parallel.distributed_timeout_minutes
    if config.scoring.reads_records and config.scoring.reward_timeout >= limit:
        raise ConfigError(
            f"reward_timeout={config.scoring.reward_timeout:g} seconds: the other processes wait for the rewards in a "
            f"collective, which fails after distributed_timeout_minutes={limit // 60}; lower it, or raise "
            f"--distributed-timeout-minutes to {int(config.scoring.reward_timeout // 60) + 1} or more"
        )


def _check_response_length(config: RunConfig) -> None:
    """Check that a prompt and its sampled response fit into --seq-length."""
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


def _check_tensor_parallel(config: RunConfig, world_size: int, model: ResolvedModel) -> None:
    """Check that query heads split evenly, and that key/value heads do or are shared by equally many ranks."""
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


def _check_pipeline_parallel(config: RunConfig, world_size: int, model: ResolvedModel) -> None:
    """Check that pipeline stages have equally many layers, and chunks of the interleaved schedule too."""
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
    each = layers // size
    works = [value for value in _divisors(each) if value < each]
    if chunk not in works:
        cure = f"use {_one_of(works)}" if works else "leave it unset"
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={chunk} does not cut the {each} layers of a pipeline stage "
            f"(num_layers={layers} / pipeline_model_parallel_size={size}) into two or more equal chunks: {cure}"
        )


def _check_recomputed_chunks(config: RunConfig, model: ResolvedModel) -> None:
    """Check that --recompute-num-layers divides a chunk: megatron-core recomputes so many layers at a time."""
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
    """Check that the number of processes is a multiple of the processes of a replica."""
    replica = _model_parallel_size(config)
    if world_size % replica:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor_model_parallel_size="
            f"{config.parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{config.parallel.pipeline_model_parallel_size} = {replica}: "
            f"start {nearest_multiples(world_size, replica)} processes"
        )


def _check_batches(config: RunConfig, world_size: int) -> None:
    """Check that all replicas get equally many micro-batches, and the interleaved schedule the number that it needs."""
    replicas = data_parallel_size(config, world_size)
    if config.training.max_tokens_per_micro_batch is not None:
        return
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    unit = micro * replicas
    if batch % unit:
        raise ConfigError(
            f"global_batch_size={batch} is not a multiple of micro_batch_size={micro} x "
            f"data-parallel size {replicas} = {unit}: use {nearest_multiples(batch, unit)}"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_layers_per_virtual_pipeline_stage and (batch // unit) % stages:
        raise ConfigError(
            f"global_batch_size={batch} gives {batch // unit} micro-batches; the interleaved schedule "
            f"(num_layers_per_virtual_pipeline_stage) needs a multiple of pipeline_model_parallel_size={stages}: "
            f"use a global_batch_size of {nearest_multiples(batch, unit * stages)}"
        )


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` just below and above `number`, in words."""
    below = number // unit * unit
    return _one_of([value for value in (below, below + unit) if value])


def _one_of(values: list[int]) -> str:
    """The values in words: `1`, `1 or 3`, `1, 3 or 9`."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last
