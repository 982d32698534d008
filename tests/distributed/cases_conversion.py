"""Hugging Face weights reach every layout as they reach one process."""

import torch

from distributed.world import Context, Layout, at


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
    """Weights from the directory equal, bit for bit, those of a checkpoint that one process made from it.

    megatron-core's description of the weights cuts the checkpoint. It does not use the conversion's table and slices.
    """
    from helpers.hf_models import write_hf_model

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
        write_hf_model(directory, "llama", head, **changes)
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
