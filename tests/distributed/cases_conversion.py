"""Hugging Face weights reach every layout as they reach one process."""

from pathlib import Path

import torch
from helpers.assets import SIZES

from distributed.world import Context, Layout, at

VOCABULARY = SIZES["vocab_size"] + 7
"""Not a multiple of anything: the last rank's embedding ends in padding."""


@at(lambda layout: layout.dp == 1)
def case_language_model(layout: Layout, context: Context) -> None:
    expect_weights_of_one_process(layout, context, "tied", tie_word_embeddings=True)


@at(lambda layout: layout.dp == 1)
def case_untied_language_model(layout: Layout, context: Context) -> None:
    expect_weights_of_one_process(layout, context, "untied", tie_word_embeddings=False)


@at(lambda layout: layout.dp == 1)
def case_classifier(layout: Layout, context: Context) -> None:
    expect_weights_of_one_process(layout, context, "classifier", head="reward")


def expect_weights_of_one_process(
    layout: Layout, context: Context, name: str, head: str = "policy", **changes: object
) -> None:
    """Weights from the directory equal, bit for bit, those of a checkpoint that one process made of it.

    The second is cut by what megatron-core says of its weights; the table and slices of the first have no part in it.
    """
    from megatron_brain.checkpointing import CheckpointSaver, TrainingState, load_weights, read_info
    from megatron_brain.config.model import ModelConfig
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.config.run import RunConfig
    from megatron_brain.conversion import load_hf_weights, read_hf_architecture
    from megatron_brain.data.tokenizer import build_tokenizer
    from megatron_brain.models.architecture import resolve
    from megatron_brain.models.provider import build_model
    from megatron_brain.runtime import parallel

    directory, checkpoint = context.shared / f"hf_{name}", context.shared / f"hf_{name}_checkpoint"
    if context.world_size == 1:
        write_hf(directory, head, changes)
    model = resolve(ModelConfig(), read_hf_architecture(directory), str(directory))
    config = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_virtual_stage,
        sequence_parallel=layout.sp,
    )
    place = parallel.start(config, seed=1, num_layers=model.num_layers)
    chunks = build_model(model, config, place, head=head, seed=1)
    load_hf_weights(directory, chunks, model, head)
    if context.world_size == 1:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", context.assets / "tokenizer")
        run = RunConfig(stage="sft", model=model)
        CheckpointSaver(checkpoint, run, place, tokenizer, head=head).save(0, chunks, TrainingState())
    expected = build_model(model, config, place, head=head, seed=2)
    load_weights(read_info(checkpoint), expected, head=head)
    for ours, theirs in zip(chunks, expected, strict=True):
        wanted = dict(theirs.named_parameters())
        assert [key for key, _ in ours.named_parameters()] == list(wanted)
        for key, weight in ours.named_parameters():
            assert torch.equal(weight, wanted[key]), key


def write_hf(directory: Path, head: str, changes: dict) -> None:
    """Write a tiny random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["ffn_hidden_size"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_key_value_heads=SIZES["num_query_groups"],
        pad_token_id=0,
        eos_token_id=1,
        **({"num_labels": 1} if head == "reward" else {}),
        **changes,
    )
    model = (LlamaForCausalLM if head == "policy" else LlamaForSequenceClassification)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory)
