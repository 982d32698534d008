"""Checkpoints hold the same at every layout. Runs resume at any layout, and at the same one bit for bit."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.cases_brain import brain_flags
from distributed.runs import flags_of, open_trainer, random_start, step
from distributed.world import Context, Layout, at

STEPS = 3
MORE = 2
_KINDS = ([], ["--use-distributed-optimizer"])
_ROUND = ["--refresh-interval", "2"]
_EXACT = ("tp2_sp", "pp2_interleaved", "dp2", "pp2_dp2", "tp2_pp2_dp2")


def case_any_layout_reads_what_any_wrote(layout: Layout, context: Context) -> None:
    """Contents equal those of one process. Each layout also resumes from what the layout before it wrote, with the
    other kind of optimizer."""
    for kind in _KINDS:
        _pass_on("sft", layout, context, *random_start(context), *kind)


@at(lambda layout: layout.tp == 1 or layout.size == 8)
def case_a_round_goes_on_at_another_layout(layout: Layout, context: Context) -> None:
    """The run is saved in the middle of a round. The checkpoint holds the rollouts."""
    _pass_on("brain", layout, context, *brain_flags(context), *_ROUND)


def case_what_is_loaded_is_saved_again_bit_for_bit(layout: Layout, context: Context) -> None:
    """One model is in bf16 with float32 weights and an untied output layer, one has a reward head. Nothing is computed,
    so nothing may be rounded. Each layout loads what the layout before it wrote; the kind of optimizer alternates."""
    bf16 = ["--bf16", "--untie-embeddings-and-output-weights", "--micro-batch-size", "1"]
    for stage, extra in (("sft", bf16), ("reward", ["--micro-batch-size", "1"])):
        flags = [*random_start(context), "--train-iters", "9", *extra]
        folder = context.shared / f"{stage}_relay"
        if context.world_size == 1:
            trainer = open_trainer(stage, flags_of(stage, layout, context, *flags, "--save", str(folder / "0")))
            step(trainer), step(trainer)
            trainer.save()
        number = max(int(path.name) for path in folder.iterdir())
        torch.distributed.barrier()
        flags += [
            *_KINDS[(number + 1) % 2],
            "--load",
            str(folder / f"{number}"),
            "--save",
            str(folder / f"{number + 1}"),
        ]
        open_trainer(stage, flags_of(stage, layout, context, *flags)).save()
        _expect_same_contents(folder / f"{number + 1}", folder / "0", bits=True)


@at(lambda layout: layout.name == "dp2")
def case_a_rank_that_cannot_write_fails_the_save_on_all(layout: Layout, context: Context) -> None:
    """This holds for saves in the foreground and in the background. Earlier checkpoints stay."""
    from megatron_brain.checkpointing import CheckpointError, read_info

    last = context.world_size - 1
    for extra in ([], ["--async-save"]):
        path = context.shared / f"refused_{context.world_size}{''.join(extra)}"
        flags = [*random_start(context), "--train-iters", "9", "--save", str(path), *extra]
        trainer = open_trainer("sft", flags_of("sft", layout, context, *flags))
        step(trainer)
        trainer.save()
        trainer.finish_saving()
        step(trainer)
        error = None
        with _no_file_grows() if trainer.parallel.rank == last else nullcontext():
            try:
                trainer.save()
                trainer.finish_saving()
            except CheckpointError as refused:
                error = str(refused)
        assert error and f"iteration 2 could not be saved to {path}: rank {last}: " in error, error
        assert read_info(path).iteration == 1
        torch.distributed.barrier()
        step(trainer)
        trainer.save()
        trainer.finish_saving()
        assert read_info(path).iteration == 3


@at(lambda layout: layout.name == "dp2")
def case_ranks_that_find_different_checkpoints_say_so(layout: Layout, context: Context) -> None:
    """Another job may be saving, or storage may differ between nodes. One rank may find no checkpoint at all."""
    from megatron_brain.checkpointing import CheckpointError, load_weights, read_info
    from megatron_brain.errors import AgreedError

    path = context.shared / f"different_{context.world_size}"
    flags = [*random_start(context), "--train-iters", "9"]
    trainer = open_trainer("sft", flags_of("sft", layout, context, *flags, "--save", str(path)))
    for _ in range(2):
        step(trainer)
        trainer.save()
    if context.world_size == 1:
        return
    mine = path / f"iter_000000{1 + trainer.parallel.rank}"
    with pytest.raises(AgreedError, match="rank 0: iter_0000001; rank 1: iter_0000002"):
        open_trainer("sft", flags_of("sft", layout, context, *flags, "--load", str(mine)))
    with pytest.raises(CheckpointError, match="different checkpoints in .*: iter_0000001, iter_0000002"):
        load_weights(read_info(mine), trainer.gathered_chunks(), head="policy")
    if trainer.parallel.rank == 1:
        (path / "iter_0000002" / "tensors.json").unlink()
    torch.distributed.barrier()
    with pytest.raises(AgreedError, match="has no tensors.json"):
        load_weights(read_info(path), trainer.gathered_chunks(), head="policy")


@at(lambda layout: layout.name in ("tp2", "tp4"))
def case_boxes_that_several_ranks_have_are_written_once_and_evenly(layout: Layout, context: Context) -> None:
    """Ranks hold rows of a matrix, and all hold six vectors. All ranks name a rank whose file is another."""
    from megatron_brain.checkpointing.boxes import Box
    from megatron_brain.checkpointing.storage import read_boxes, read_tensors, write_boxes
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.errors import AgreedError
    from megatron_brain.runtime.parallel import start

    place = start(ParallelConfig(tensor_model_parallel_size=layout.tp), seed=1)
    rank, size, folder = place.rank, place.world_size, context.shared / f"shared_{context.world_size}"
    if rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    rows = torch.arange(size * 1000.0).view(size, 1000)
    vectors = {f"vector_{i}": torch.arange(10_000.0) + i for i in range(6)}
    boxes = [Box(key=key, shape=(10_000,), offset=(0,), data=data) for key, data in vectors.items()]
    mine = Box(key="rows", shape=rows.shape, offset=(rank, 0), data=rows[rank : rank + 1].clone())
    write_boxes([mine, *boxes], folder, place.host_group())
    files = sorted(folder.glob("*.safetensors"))
    stored = [name.split("@")[0] for file in files for name in load_file(file)]
    assert sorted(stored) == sorted([*vectors, *["rows"] * size])
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == size and max(sizes) - min(sizes) < 42_000, sizes
    tensors = read_tensors(folder)
    assert torch.equal(tensors["rows"], rows) and all(torch.equal(tensors[key], vectors[key]) for key in vectors)
    torch.distributed.barrier()
    if rank == 0:
        files[-1].write_bytes(b"?" * sizes[-1])
    torch.distributed.barrier()
    by = rf".*\(found by rank {size - 1}\)" if size > 1 else ""
    with pytest.raises(AgreedError, match=f"{files[-1].name} is damaged{by}"):
        read_boxes([mine], folder)


@contextmanager
def _no_file_grows() -> Iterator[None]:
    """Inside the context the operating system refuses this process's writes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@at(lambda layout: layout.name in _EXACT)
def case_a_resumed_run_is_bit_for_bit_one_that_never_stopped(layout: Layout, context: Context) -> None:
    """The run has dropout and saves in the background. One process is stopped after every step."""
    stops = range(1, STEPS + MORE) if context.world_size == 1 else [STEPS]
    distributed = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    extra = [*random_start(context), "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    _stop_and_go_on("sft", stops, layout, context, *extra, *(distributed if layout.pp == 1 else []))
    _stop_and_go_on("brain", stops, layout, context, *brain_flags(context), *_ROUND)


def _pass_on(stage: str, layout: Layout, context: Context, *flags: str) -> None:
    """Train and save, compare what was saved, then resume from the checkpoint that was saved before this one."""
    places = context.shared / f"{stage}_checkpoints.jsonl"
    before = json.loads(places.read_text().splitlines()[-1]) if places.exists() else None
    name = f"{context.world_size}_{layout.name}{'_distributed' if '--use-distributed-optimizer' in flags else ''}"
    path = context.shared / f"{stage}_checkpoints" / name
    trainer = _open(stage, layout, context, *flags, "--save", str(path))
    made = _steps(trainer, STEPS)
    trainer.save()
    first = before["first"] if before else str(path)
    if torch.distributed.get_rank() == 0:
        with places.open("a") as file:
            file.write(json.dumps({"path": str(path), "first": first}) + "\n")
    _expect_same_contents(path, Path(first))
    made += _steps(trainer, MORE)
    uninterrupted = context.reference(f"{stage}_uninterrupted", made)
    assert _flat(made) == pytest.approx(_flat(uninterrupted), rel=1e-5)
    if before is None:
        return
    prior = ["--prior-load", str(context.shared / "prior")] if stage == "brain" else []
    kept = [flag for flag in flags if flag != "--finetune"]
    resumed = _steps(_open(stage, layout, context, *kept, "--load", before["path"], *prior), MORE)
    assert _flat(resumed) == pytest.approx(_flat(uninterrupted[STEPS:]), rel=1e-5), f"from {before['path']}"


def _stop_and_go_on(stage: str, stops, layout: Layout, context: Context, *flags: str) -> None:
    root = context.shared / f"{stage}_exact_{context.world_size}_{layout.name}"
    whole = _open(stage, layout, context, *flags, "--async-save", "--save", str(root / "whole"))
    expected = []
    for _ in range(STEPS + MORE):
        expected += _steps(whole, 1)
        if whole.iteration in (*stops, STEPS + MORE):
            whole.save()
    whole.finish_saving()
    prior = ["--prior-load", str(context.shared / "prior")] if stage == "brain" else []
    kept = [flag for flag in flags if flag != "--finetune"]
    for stop in stops:
        start, end = root / "whole" / f"iter_{stop:07d}", root / f"from_{stop}"
        resumed = _open(stage, layout, context, *kept, "--load", str(start), *prior, "--save", str(end))
        assert _steps(resumed, STEPS + MORE - stop) == expected[stop:], f"stopped after step {stop}"
        resumed.save()
        _expect_same_contents(end, root / "whole", exactly=True)


def _open(stage: str, layout: Layout, context: Context, *extra: str):
    flags = ["--micro-batch-size", "1", "--train-iters", str(STEPS + MORE), "--lr-warmup-iters", "1", *extra]
    return open_trainer(stage, flags_of(stage, layout, context, *flags))


def _steps(trainer, count: int) -> list[list[float]]:
    """Loss, gradient norm and learning rate of each step."""
    made = [step(trainer) for _ in range(count)]
    return [[metrics[name] for name in ("loss", "grad_norm", "lr")] for metrics in made]


def _flat(steps: list[list[float]]) -> list[float]:
    return [number for step in steps for number in step]


def _expect_same_contents(actual: Path, expected: Path, *, exactly: bool = False, bits: bool = False) -> None:
    """Two checkpoints have the same tensors and the same JSON. `exactly`: all bits are equal; `bits`: all but those of
    random states, which differ between layouts; else: up to rounding."""
    from megatron_brain.checkpointing import read_info, read_records
    from megatron_brain.checkpointing.storage import read_tensors

    infos = [read_info(path) for path in (actual, expected)]
    mine, theirs = (
        {name: tensor for name, tensor in read_tensors(info.path).items() if exactly or not name.startswith("random.")}
        for info in infos
    )
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in mine)
    for name, tensor in mine.items():
        assert tensor.shape == theirs[name].shape, name
        if exactly or bits:
            assert torch.equal(tensor, theirs[name]), name
        else:
            error = (tensor.double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-30)
            assert error < 1e-5, f"{name}: relative difference {error:.1e}"
    for name in ("optimizer_steps", "scheduler", *(["guard"] if exactly else [])):
        assert infos[0].trainer_state[name] == infos[1].trainer_state[name]
    assert infos[0].stage_state == infos[1].stage_state
    rounds = [sorted(read_records(info), key=lambda record: record["index"]) for info in infos]
    tokens = [[[r["tokens"] for r in record["responses"]] for record in records] for records in rounds]
    assert tokens[0] == tokens[1]
    if exactly:
        assert rounds[0] == rounds[1]
