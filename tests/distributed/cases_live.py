"""The policy that a run trains, written by all ranks together, is what the converter writes from its checkpoint."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.hf_models import HF_MODELS, write_hf_model
from safetensors.torch import load_file

from distributed.runs import flags_of, open_trainer, random_start, step
from distributed.world import Context, Layout, at

_TOOLS = Path(__file__).parents[2] / "tools"
_MODELS = {
    **{name: {"name": name, "tie_word_embeddings": True} for name in HF_MODELS},
    "untied": {"name": "llama", "tie_word_embeddings": False},
    "bf16": {"name": "qwen2", "tie_word_embeddings": True},
}
_LARGE = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 64,
}


@at(lambda layout: layout.name not in ("pp4", "dp4", "tp2_sp_pp2"))
def case_weights_of_every_family(layout: Layout, context: Context) -> None:
    for name, options in _MODELS.items():
        original, expected = context.shared / f"live_{name}", context.shared / f"live_{name}_expected"
        if context.world_size == 1:
            write_hf_model(original, **options)
            convert_there_and_back(original, expected, context, bf16=name == "bf16")
        chunks, place, model = build_from(original, layout, bf16=name == "bf16")
        expect_equal(write(chunks, place, model, context, f"live_{name}_{layout.name}"), expected)


@at(lambda layout: layout.dp == 2)
def case_weights_after_an_update_in_shards(layout: Layout, context: Context) -> None:
    """The distributed optimizer leaves the new weights in shards, in bfloat16 beside its own in float32."""
    folder = context.shared / f"live_trained_{layout.name}"
    trainer = open_trainer(
        "sft",
        [
            *flags_of("sft", layout, context, "--train-iters", "1", "--save", str(folder)),
            *(*random_start(context), "--bf16", "--lr", "0.1", "--lr-decay-style", "constant"),
            *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ],
    )
    before = [p.detach().clone() for chunk in trainer.gathered_chunks() for p in chunk.parameters()]
    step(trainer)
    run = trainer.run
    found = write(trainer.gathered_chunks(), run.parallel, run.config.model, context, f"{folder.name}_live")
    after = [p.detach() for chunk in trainer.gathered_chunks() for p in chunk.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    trainer.save()
    export(folder, folder / "expected")
    expect_equal(found, folder / "expected")


@at(lambda layout: layout.name in ("tp2", "dp2", "tp2_pp2"))
def case_all_ranks_raise_what_one_cannot_write(layout: Layout, context: Context) -> None:
    """The disk is full for the file of the last rank, then for the index. The ranks are in step afterwards."""
    from megatron_brain.errors import AgreedError

    original = context.shared / "live_full"
    if context.world_size == 1:
        write_hf_model(original, "llama")
    chunks, place, model = build_from(original, layout)
    last = place.world_size - 1
    file = f"model-{last + 1:05d}-of-{place.world_size:05d}.safetensors"
    others = "" if last == 0 else rf" \(rank {last} alone\)"
    for name, said in (
        (file, f"{file}: No space left.*folder{others}$"),
        ("model.safetensors.index.json", "No space"),
    ):
        full = f"live_full_{layout.name}_{name}"
        if place.is_writer:
            (context.shared / full).mkdir()
            (context.shared / full / name).symlink_to("/dev/full")
        dist.barrier()
        with pytest.raises(AgreedError, match=said) as raised:
            write(chunks, place, model, context, full)
        assert len(set(place.gather_over_world(str(raised.value)))) == 1
        assert not (context.shared / full / "config.json").exists()
    write(chunks, place, model, context, f"live_full_{layout.name}_again")


@at(lambda layout: layout.name in ("tp2", "pp2_interleaved", "tp4"))
def case_memory(layout: Layout, context: Context) -> None:
    """Besides its weights a rank holds at most a layer. A matrix of the vocabulary is larger than that here."""
    from megatron_brain.config.model import ModelConfig
    from megatron_brain.models.architecture import resolve

    sys.path.append(str(_TOOLS))
    try:
        from benchmarks import allocations
    finally:
        sys.path.remove(str(_TOOLS))
    model = resolve(ModelConfig(**_LARGE, untie_embeddings_and_output_weights=True), None, "the test")
    chunks, place = build(model, layout)
    with allocations.recorded() as found:
        write(chunks, place, model, context, f"live_memory_{layout.name}")
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    layer = 4 * (3 * hidden * hidden + 3 * hidden * ffn)
    assert layer < 4 * model.vocab_size * hidden
    assert found.peak <= layer + 2**16, f"{found.peak / layer:.2f} layers"


def build_from(directory: Path, layout: Layout, *, bf16: bool = False) -> tuple:
    """Chunks with the weights of a Hugging Face directory, with their layout and sizes."""
    from megatron_brain.config.model import ModelConfig
    from megatron_brain.conversion import load_hf_weights, read_hf_architecture
    from megatron_brain.models.architecture import resolve

    model = resolve(ModelConfig(bf16=bf16), read_hf_architecture(directory), str(directory))
    chunks, place = build(model, layout)
    load_hf_weights(directory, chunks, model, "policy")
    return chunks, place, model


def build(model, layout: Layout) -> tuple:
    """Chunks with random weights, and their layout."""
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.models.provider import build_model
    from megatron_brain.runtime import parallel

    config = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_virtual_stage,
        sequence_parallel=layout.sp,
    )
    place = parallel.start(config, seed=1, num_layers=model.num_layers)
    return build_model(model, config, place, head="policy", seed=1), place


def write(chunks: Sequence, place, model, context: Context, name: str) -> Path:
    """Write chunks into a folder that all ranks share; returns it."""
    from megatron_brain.conversion.live import write_live
    from megatron_brain.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", context.assets / "tokenizer")
    folder = context.shared / name
    if place.is_writer:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    write_live(chunks, place, model, folder, tokenizer=tokenizer)
    return folder


def convert_there_and_back(original: Path, out: Path, context: Context, *, bf16: bool) -> None:
    """Convert a directory to a checkpoint, and that to an untied directory."""
    from megatron_brain.config.data import TokenizerConfig
    from megatron_brain.conversion.output_folder import verified_folder
    from megatron_brain.conversion.to_checkpoint import ToCheckpoint
    from megatron_brain.conversion.workers import Workers

    workers, checkpoint = Workers(), out.with_name(f"{out.name}_checkpoint")
    tokenizer = TokenizerConfig(tokenizer_model=str(context.assets / "tokenizer"))
    with verified_folder(checkpoint, workers) as folder:
        ToCheckpoint(original, bf16=bf16, tokenizer=tokenizer).write(folder, workers, lambda _: None)
    export(checkpoint, out)


def export(checkpoint: Path, out: Path) -> None:
    """Convert a checkpoint to an untied directory."""
    from megatron_brain.conversion.output_folder import verified_folder
    from megatron_brain.conversion.to_hf import ToHF
    from megatron_brain.conversion.workers import Workers

    workers = Workers()
    conversion = partial(ToHF, checkpoint, dtype=None, max_shard_size="1GB", hf_model_type=None, untie=True)
    with verified_folder(out, workers) as folder:
        workers.all(conversion).write(folder, workers, lambda _: None)


def expect_equal(found: Path, expected: Path) -> None:
    """The same tensors, bit for bit, with an output layer, and the same config.json. The index says where each is.

    All ranks raise what rank 0 finds, so that none goes on alone.
    """
    told = [difference(found, expected) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    assert told[0] is None, f"{found}: {told[0]}"


def difference(found: Path, expected: Path) -> str | None:
    """What a folder has otherwise than another one, in words."""
    [theirs] = map(load_file, expected.glob("*.safetensors"))
    index = json.loads((found / "model.safetensors.index.json").read_text())
    ours = {}
    for path in found.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.keys() != {key for key, file in index["weight_map"].items() if file == path.name}:
            return f"the index says otherwise of {path.name}"
        ours |= tensors
    if ours.keys() != theirs.keys():
        return f"tensors that one alone has: {ours.keys() ^ theirs.keys()}"
    wrong = [key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])]
    if wrong or index["metadata"]["total_size"] != sum(tensor.nbytes for tensor in ours.values()):
        return f"other values in {wrong}, or another size"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (found, expected)]
    same = configs[0] == configs[1] and configs[0]["tie_word_embeddings"] is False
    return None if same else f"config.json: {configs}"
