"""Missing settings and impossible layouts are errors that say what would work."""

import pytest

from megatron_brain.config.checks import data_parallel_size, validate_layout
from megatron_brain.config.loader import config_from_dict, load_config
from megatron_brain.config.model import ModelConfig
from megatron_brain.errors import ConfigError

SMOLLM = ModelConfig(num_layers=30, hidden_size=576, num_attention_heads=9, num_query_groups=3)
LLAMA = ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8)
MULTI_HEAD = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=8)

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"
MBS, GBS = "micro_batch_size", "global_batch_size"

SAMPLED_BRAIN = "--train-data t --load c --finetune --reward-load r"


@pytest.mark.parametrize(
    ("model", "world", "settings"),
    [
        (SMOLLM, 1, {}),
        (SMOLLM, 2, {PP: 2}),
        (SMOLLM, 2, {GBS: 8}),
        (SMOLLM, 6, {TP: 3, PP: 2}),
        (SMOLLM, 9, {TP: 9}),
        (SMOLLM, 10, {PP: 5, MBS: 2}),
        (LLAMA, 32, {TP: 32, "sequence_parallel": True}),
        (LLAMA, 16, {TP: 4, PP: 4, VPP: 2}),
        (MULTI_HEAD, 8, {TP: 8}),
        (MULTI_HEAD, 4, {PP: 2, VPP: 2, MBS: 2}),
    ],
)
def test_possible_layouts_pass(model, world, settings):
    config = config_from_dict("sft", settings)
    validate_layout(config, world, model)
    assert data_parallel_size(config, world) * settings.get(TP, 1) * settings.get(PP, 1) == world


@pytest.mark.parametrize(
    ("model", "world", "settings", "parts"),
    [
        (SMOLLM, 2, {TP: 2}, [f"{TP}=2", "num_attention_heads=9", "use 1"]),
        (SMOLLM, 18, {TP: 2}, ["use 1, 3 or 9"]),
        (
            ModelConfig(num_layers=2, hidden_size=96, num_attention_heads=12, num_query_groups=6),
            4,
            {TP: 4},
            [f"{TP}=4", "num_query_groups=6", "use 1, 2 or 3"],
        ),
        (SMOLLM, 4, {PP: 4}, [f"{PP}=4", "num_layers=30", "use 1, 2 or 3"]),
        (SMOLLM, 12, {TP: 3, PP: 4}, ["num_layers=30", "use 1, 2 or 3"]),
        (SMOLLM, 3, {PP: 2}, ["world size 3", f"{PP}=2 = 2", "start 2 or 4 processes"]),
        (SMOLLM, 2, {TP: 3}, ["world size 2", f"{TP}=3", "start 3 processes"]),
        (SMOLLM, 4, {MBS: 2, GBS: 10}, [f"{GBS}=10", f"{MBS}=2", "data-parallel size 4 = 8", "use 8 or 16"]),
        (SMOLLM, 4, {GBS: 2}, [f"{GBS}=2", "use 4"]),
        (MULTI_HEAD, 2, {PP: 2, VPP: 3}, [f"{VPP}=3", "num_layers=8", "4 layers", "use 1 or 2"]),
        (MULTI_HEAD, 2, {PP: 2, VPP: 4}, ["two or more equal chunks", "use 1 or 2"]),
        (MULTI_HEAD, 8, {PP: 8, VPP: 1}, ["leave it unset"]),
        (MULTI_HEAD, 2, {PP: 2, VPP: 2, GBS: 9}, [f"{GBS}=9 gives 9 micro-batches", f"{PP}=2", "8 or 10"]),
    ],
)
def test_impossible_layouts_name_key_value_and_what_works(model, world, settings, parts):
    with pytest.raises(ConfigError) as caught:
        validate_layout(config_from_dict("sft", settings), world, model)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("size", range(1, 13))
def test_every_suggested_tensor_parallel_size_passes_and_no_other(size):
    model = ModelConfig(num_layers=2, hidden_size=96, num_attention_heads=12, num_query_groups=6)
    config = config_from_dict("generate", {TP: size})
    if size in (1, 2, 3, 6, 12):
        validate_layout(config, size, model)
    else:
        with pytest.raises(ConfigError, match="1, 2, 3, 6 or 12" if size == 12 else "use 1"):
            validate_layout(config, size, model)


def test_batches_are_not_checked_for_stages_that_do_not_train():
    validate_layout(config_from_dict("generate", {GBS: 8}), 3, SMOLLM)


def test_sequence_parallel_needs_tensor_parallel_and_a_length_it_divides():
    with pytest.raises(ConfigError, match="sequence_parallel=true needs tensor_model_parallel_size > 1"):
        config_from_dict("sft", {"sequence_parallel": True})
    with pytest.raises(ConfigError, match="seq_length=100 .* use 99 or 102"):
        layout = "--sequence-parallel --tensor-model-parallel-size 3 --seq-length 100"
        load_config("sft", f"--train-data t --load c {layout}".split())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_attention_heads": 9, "num_query_groups": 2}, "9 is not a multiple of num_query_groups=2"),
        ({"hidden_size": 100, "num_attention_heads": 9}, "hidden_size=100"),
        ({"rotary_percent": 1.5}, r"rotary_percent=1.5: .* lies in \(0, 1\]"),
        ({"rotary_percent": 0.0}, "rotary_percent=0.0: must be positive"),
        ({"rotary_percent": 0.75, "kv_channels": 12}, "rotary_percent=0.75 of kv_channels=12 are 9 channels"),
        ({"kv_channels": 5}, "are 5 channels: they are rotated in pairs"),
        ({"rotary_percent": 0.5, "position_embedding_type": "learned_absolute"}, "needs position_embedding_type=rope"),
        ({"rope_scaling_factor": 8.0, "position_embedding_type": "learned_absolute"}, "rope_scaling_factor=8.0 needs"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor=0.5: .* 1 or more"),
        ({"rope_low_freq_factor": 4.0}, "rope_low_freq_factor=4.0 must be less than rope_high_freq_factor=4.0"),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, "qk_layernorm .* needs normalization=RMSNorm"),
        ({"window_size": 0}, "window_size=0: must be positive"),
        ({"recompute_num_layers": 1}, "needs recompute_granularity=full"),
        ({"recompute_method": "block"}, "needs recompute_granularity=full"),
        ({"save_interval": 5}, "needs --save"),
        ({"finetune": True}, "needs --load"),
        ({"micro_batch_size": 2, "max_tokens_per_micro_batch": 64}, "micro_batch_size=2"),
        ({"train_iters": 5, "train_epochs": 1.0}, "give one of them"),
        ({"max_prompt_length": 1024}, "seq_length=1024"),
        ({VPP: 2}, PP),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, "needs use_distributed_optimizer"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": True}, "needs overlap_grad_reduce"),
        ({"ddp_bucket_size": 1000}, "ddp_bucket_size=1000 needs overlap_grad_reduce"),
        ({"ddp_bucket_size": 0, "overlap_grad_reduce": True}, "must be at least 1"),
    ],
)
def test_contradictions_within_a_section_are_errors(settings, part):
    with pytest.raises(ConfigError, match=part):
        config_from_dict("sft", settings)


SIZES = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --vocab-size 100"


@pytest.mark.parametrize(
    ("stage", "arguments", "part"),
    [
        ("sft", "", "train_data is not set: the sft stage needs --train-data"),
        ("reward", "--load c", "the reward stage needs --train-data"),
        ("sft", "--train-data t", "--load (a checkpoint), --hf-model"),
        ("sft", "--train-data t --num-layers 2", "--hidden-size, --ffn-hidden-size"),
        ("sft", f"--train-data t {SIZES}", "--tokenizer-model"),
        ("brain", "--train-data t --reward-load r --prior-load p", "the brain stage needs --load"),
        ("brain", "--load c --reward-load r", "--train-data (prompts to sample) or --rollout-data"),
        ("brain", "--train-data t --load c --prior-load p", "--reward-load"),
        ("brain", "--train-data t --load c --reward-load r", "--prior-load, or --finetune"),
        ("brain", "--train-data t --load c --rollout-data r", "give one"),
        ("brain", f"{SAMPLED_BRAIN} --samples-per-prompt 1", "use 2 or more"),
        ("brain", f"{SAMPLED_BRAIN} --hidden-dropout 0.1", "leave it at 0"),
        ("brain", f"{SAMPLED_BRAIN} --responses given", "add --alpha hard"),
        ("brain", f"{SAMPLED_BRAIN} --responses given --alpha hard", "add --no-refresh-proposal"),
        ("brain", f"{SAMPLED_BRAIN} --responses given --alpha hard --no-refresh-proposal", "drop --reward-load"),
        ("brain", "--load c --rollout-data r --responses given", "give one of them"),
        ("brain", "--train-data t --load c --reward-load r --finetune --temperature 0", "temperature=0.0"),
        ("brain", "--train-data t --load c --reward-load r --finetune --prompts-per-round 20", "use 16 or 24"),
        ("brain", f"{SAMPLED_BRAIN} --max-new-tokens 1024", "max_new_tokens=1024"),
        ("brain", f"{SAMPLED_BRAIN} --max-prompt-length 1000", "raise --seq-length to 1064"),
        ("generate", "--prompts p --output o", "--load (a checkpoint) or --hf-model"),
        ("generate", "--load c --output o", "--prompts"),
        ("generate", "--load c --prompts p", "--output"),
        ("evaluate", "--load c --prompts p --output o --judge j", "--prior-load"),
        (
            "evaluate",
            "--load c --prompts p --output o --prior-load s",
            "needs --reward-load, --reward-function, --reward-url, --judge or --judge-url",
        ),
        ("sft", "--train-data t --load c --eval-interval 5", "--valid-data"),
        ("sft", "--train-data t --load c --train-iters 10 --lr-warmup-iters 10", "lr_warmup_iters=10"),
    ],
)
def test_what_a_stage_cannot_do_without_is_named(stage, arguments, part):
    with pytest.raises(ConfigError) as caught:
        load_config(stage, arguments.split())
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("sft", f"--train-data t {SIZES} --tokenizer-model tok"),
        ("reward", "--train-data t --hf-model hf"),
        ("brain", "--train-data t --load sft --finetune --reward-load r"),
        ("brain", "--rollout-data rounds --load sft --finetune"),
        ("generate", "--hf-model hf --prompts p --output o --temperature 0 --samples-per-prompt 1"),
        ("evaluate", "--load c --prior-load s --reward-load r --prompts p --output o"),
    ],
)
def test_the_least_a_stage_needs_is_enough(stage, arguments):
    assert load_config(stage, arguments.split()).stage == stage


def test_rollouts_need_no_room_for_sampling():
    flags = ["--rollout-data", "r", "--load", "c", "--finetune", "--seq-length", "64"]
    assert load_config("brain", flags).brain.rollout_data == "r"


def test_a_feed_forward_width_that_tensor_parallelism_does_not_divide_is_named():
    config = load_config("sft", ["--train-data", "t", "--load", "c", "--tensor-model-parallel-size", "2"])
    model = ModelConfig(num_layers=2, num_attention_heads=4, ffn_hidden_size=63)
    with pytest.raises(ConfigError, match="does not divide ffn_hidden_size=63"):
        validate_layout(config, 2, model)


@pytest.mark.parametrize(
    ("limits", "part"),
    [
        ({"max_position_embeddings": 512}, "max_position_embeddings=512: use --seq-length 512 or less"),
        ({"max_position_embeddings": 4096, "window_size": 256}, r"window_size=256 \(.*: use --seq-length 256 or less"),
    ],
)
def test_sequences_longer_than_the_models_positions_or_window_are_refused(limits, part):
    def model(sizes):
        return ModelConfig(num_layers=2, num_attention_heads=4, **sizes)

    config = config_from_dict("sft", {"seq_length": 1024})
    validate_layout(config, 1, model({name: 1024 for name in limits}))
    with pytest.raises(ConfigError, match=f"seq_length=1024 exceeds the model's {part}"):
        validate_layout(config, 1, model(limits))
