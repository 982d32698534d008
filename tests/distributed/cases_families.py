"""A model of each family, at every kind of layout, is converted, compared, trained, exported and converted again."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.hf_models import HF_MODELS, write_hf_model

from distributed.runs import flags_of, open_trainer, step
from distributed.world import Context, Layout, at

STEPS = 2
SEQUENCES = 3
LENGTH = 24
TOLERANCE = 1e-5


def expect_same_as_transformers(name: str, layout: Layout, context: Context) -> None:
    """Logits equal those of transformers before and after training, from the export of the checkpoint and from what the
    ranks write without one. The export is read back bit for bit."""
    original = context.shared / f"family_{name}"
    if context.world_size == 1:
        write_hf_model(original, name)
    folder = context.shared / f"family_{name}_{layout.name}"
    trainer = open_trainer(
        "sft",
        [
            *flags_of("sft", layout, context, "--hf-model", str(original), "--save", str(folder / "trained")),
            *("--tokenizer-model", str(context.assets / "tokenizer"), "--seq-length", "32", "--overlong", "truncate"),
            *("--train-iters", str(STEPS), "--lr-decay-style", "constant"),
        ],
    )
    sequences = _random_sequences(trainer.run.config.model.vocab_size)
    expect_close(_our_logits(trainer, sequences), _hf_logits(original, sequences))
    for _ in range(STEPS):
        step(trainer)
    trainer.save()
    ours = _our_logits(trainer, sequences)
    expect_close(ours, _hf_logits(_write_live(trainer, folder / "live"), sequences))
    _export(folder / "trained", folder / "exported")
    expect_close(ours, _hf_logits(folder / "exported", sequences))
    assert (ours - _hf_logits(original, sequences)).abs().max() > 100 * TOLERANCE, "training changed nothing"
    _import(folder / "exported", folder / "again")
    if dist.get_rank() == 0:
        _expect_equal_weights(folder / "trained", folder / "again")


def expect_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE, f"logits differ by {difference:.1e}, the largest is {theirs.abs().max():.1f}"


def _random_sequences(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def _our_logits(trainer, sequences: torch.Tensor) -> torch.Tensor:
    """Logits `[SEQUENCES, LENGTH, V]` of the model at its training layout, on all ranks."""
    from megatron_brain.data.groups import Group
    from megatron_brain.training.schedule import forward, pack_micro_batches

    chunks, parallel = trainer.gathered_chunks(), trainer.run.parallel
    groups = [[Group(prompt=(ids[0],), responses=(tuple(ids[1:]),))] for ids in sequences.tolist()]
    batches = pack_micro_batches(groups, parallel, shared_prefix=False)
    last = chunks[-1]
    if last.post_process:
        last.head = partial(_whole_logits, last, parallel)
    outputs = forward(chunks, batches, parallel)
    if last.post_process:
        del last.head
    return torch.stack([output.view(LENGTH, -1) for output in outputs])


def _whole_logits(chunk, parallel, hidden: torch.Tensor, batch) -> torch.Tensor:
    """Stands in for log-probabilities: flat logits of all token ids, from the weights of all tensor-parallel ranks."""
    selected = chunk.select(hidden, torch.arange(LENGTH))
    parts = [torch.empty(LENGTH, chunk.output_weight.size(0)) for _ in range(parallel.tp_size)]
    dist.all_gather(parts, selected @ chunk.output_weight.T, group=parallel.groups.tp)
    return torch.cat(parts, dim=1)[:, : chunk.true_vocab_size].flatten()


@torch.no_grad()
def _hf_logits(directory: Path, sequences: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(sequences).logits


def _export(checkpoint: Path, directory: Path) -> None:
    from megatron_brain.conversion.output_folder import verified_folder
    from megatron_brain.conversion.to_hf import ToHF
    from megatron_brain.conversion.workers import Workers

    workers = Workers()
    conversion = workers.all(lambda: ToHF(checkpoint, dtype=None, max_shard_size="20KB", hf_model_type=None))
    with verified_folder(directory, workers) as folder:
        conversion.write(folder, workers, lambda _: None)


def _write_live(trainer, folder: Path) -> Path:
    from megatron_brain.conversion.live import write_live

    run = trainer.run
    folder.mkdir(exist_ok=True)  # Each rank sees it once it has tried to make it.
    write_live(trainer.gathered_chunks(), run.parallel, run.config.model, folder, tokenizer=run.tokenizer)
    return folder


def _import(directory: Path, checkpoint: Path) -> None:
    from megatron_brain.config.data import TokenizerConfig
    from megatron_brain.conversion.output_folder import verified_folder
    from megatron_brain.conversion.to_checkpoint import ToCheckpoint
    from megatron_brain.conversion.workers import Workers

    workers = Workers()
    tokenizer = TokenizerConfig(tokenizer_model=str(directory))
    conversion = workers.all(lambda: ToCheckpoint(directory, bf16=False, tokenizer=tokenizer))
    with verified_folder(checkpoint, workers) as folder:
        conversion.write(folder, workers, lambda _: None)


def _expect_equal_weights(trained: Path, again: Path) -> None:
    from megatron_brain.checkpointing import read_info
    from megatron_brain.checkpointing.storage import read_tensors

    before, after = (read_tensors(read_info(folder).path) for folder in (trained, again))
    # A trained checkpoint holds its optimizer's state too.
    weights = {key: value for key, value in before.items() if not key.startswith(("optimizer.", "random."))}
    assert weights.keys() == after.keys()
    different = [key for key, value in weights.items() if not torch.equal(value, after[key])]
    assert not different, different


def _kinds(layout: Layout) -> bool:
    return layout.name in ("tp2", "tp2_sp", "pp2")


CASES = {name: at(_kinds)(partial(expect_same_as_transformers, name)) for name in HF_MODELS}
