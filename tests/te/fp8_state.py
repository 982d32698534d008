"""Tests what FP8 remembers: `fp8_state.py FOLDER`, alone or under torchrun. Every function `case_*` is a case.

It writes to FOLDER `failures_<rank>.json`, with the traceback of every case that failed. Run it first as one process
alone, then under torchrun with the same FOLDER: the second run reads what the first has saved. Under torchrun the
layers are split over all processes, with sequence parallelism.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import fake_fp8
import fake_te

fake_fp8.install()
# This comes before megatron-core looks for Transformer Engine.
fake_te.import_without_extension()

# ruff: noqa: E402
import torch
from distributed.runs import open_trainer
from helpers.assets import size_flags, write_assets
from helpers.tiny_training import Training, equal_weights
from megatron.core.distributed import param_and_grad_buffer
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from megatron_brain.checkpointing import load_weights, read_info
from megatron_brain.checkpointing.storage import read_tensors
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.data.groups import Group
from megatron_brain.generation.sampler import Sampler
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.models import provider
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.fp8 import weights as fp8_weights
from megatron_brain.models.offload import HostWeights
from megatron_brain.runtime import parallel
from megatron_brain.training import run as opening
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward, forward_backward, pack_micro_batches
from megatron_brain.training.trainer import Trainer

SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LAYOUT = ParallelConfig(tensor_model_parallel_size=SIZE, sequence_parallel=SIZE > 1)
REFERENCE = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
"""Transformer Engine's reference of the recipe `tensorwise`."""
MICRO_BATCHES = [
    [Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))],
    [Group(prompt=(9, 2), responses=((4, 61, 5), (6,))), Group(prompt=(11,), responses=((300, 301),))],
    [Group(prompt=(1, 2, 40), responses=((41, 5), (61, 7, 8)))],
]


def training(recipe: str = "tensorwise", *, param_gather: bool = False, **options: object) -> Training:
    """A tiny model in bf16 and FP8, on the micro-batches above. Scales of models made earlier no longer move."""
    # Transformer Engine moves the scales of all models at once, but in a run only one model keeps scales.
    FP8GlobalStateManager.reset()
    factory = REFERENCE if recipe == "custom" else None
    fp8 = Fp8Config(
        fp8_format="hybrid", fp8_recipe=recipe, fp8_quantizer_factory=factory, fp8_param_gather=param_gather
    )
    batches = pack_micro_batches(MICRO_BATCHES, WORLD, shared_prefix=True, multiple_of=fp8.packed_multiple(LAYOUT))
    options = {"fp8": fp8, "transformer_impl": "transformer_engine"} | options
    made = Training(WORLD, bf16=True, layout=LAYOUT, batches=batches, **options)
    fp8_state.scale_weights(made.chunks, WORLD.groups.tp)
    return made


def outputs(model: Training) -> list[torch.Tensor]:
    return forward(model.chunks, model.batches, WORLD)


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def copied_scales(model: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in fp8_state.scales(model.chunks).items()}


def samples(model: Training) -> list:
    settings = SamplingConfig(max_new_tokens=6, temperature=1.0, samples_per_prompt=3)
    prompts = [(1, 2, 3), (4, 5, 6, 7, 8)]
    return Sampler(model.chunks, WORLD, settings, eos_id=0).generate(prompts, seeds=sample_seeds(5, [0, 1], 3))


@contextlib.contextmanager
def warnings_noted() -> Iterator[list[str]]:
    noted, handler = [], logging.Handler()
    handler.emit = lambda record: noted.append(record.getMessage())
    log = logging.getLogger("megatron_brain.checkpointing.load")
    log.addHandler(handler)
    yield noted
    log.removeHandler(handler)


def case_samples_after_an_update_are_those_of_the_new_weights(folder: Path) -> None:
    for recipe in ("tensorwise", "delayed"):
        model, plain = training(recipe), training(fp8=None, seed=99)
        outputs(model)  # This makes the FP8 copies of the weights.
        model.step()
        path = model.save(folder / f"sampled_{recipe}", 1)
        load_weights(read_info(path), plain.chunks, head="policy")
        assert samples(model) == samples(plain)


def case_a_pass_without_a_schedule_sees_new_weights_once_it_is_told_of_them(folder: Path) -> None:
    model = training()
    model.step()
    with torch.no_grad():
        old = model.chunks[0].eval()(model.batches[0])
        fp8_state.weights_changed(model.chunks)
        new = model.chunks[0](model.batches[0])
    assert torch.equal(new, outputs(model)[0])
    assert not torch.equal(new, old), "the copies in FP8 that the step has left are those of new weights"


def case_a_model_in_host_memory_leaves_nothing_on_the_device_and_scores_the_same_afterwards(folder: Path) -> None:
    model = training()
    for chunk in model.chunks:
        chunk.eval().requires_grad_(False)
    expected = outputs(model)
    layers = [layer for layer in model.chunks[0].modules() if hasattr(layer, "_fp8_workspaces")]
    assert any(layer._fp8_workspaces for layer in layers)
    weights = HostWeights(model.chunks)
    assert not any(layer._fp8_workspaces for layer in layers)
    with weights.on_device():
        assert not differ(outputs(model), expected)


def case_what_scores_is_what_trains_in_every_micro_batch_of_a_step(folder: Path) -> None:
    for recipe in ("tensorwise", "delayed", "custom"):
        model = training(recipe)
        for _ in range(3):
            scored, seen = list(reversed(forward(model.chunks, list(reversed(model.batches)), WORLD))), []

            def loss(output: torch.Tensor, batch: object, seen: list = seen) -> LossOutput:
                seen.append(output.detach().clone())
                return LossOutput(loss_sum=-output.sum(), count=output.numel())

            for chunk in model.wrapped:
                chunk.train()
                chunk.zero_grad_buffer()
            model.optimizer.zero_grad()
            forward_backward(model.wrapped, model.batches, loss, WORLD)
            assert not differ(seen, scored), recipe
            model.optimizer.step()


def case_scales_move_once_a_step_and_in_no_other_pass(folder: Path) -> None:
    model = training("delayed")
    model.step()
    before = copied_scales(model)
    outputs(model)
    samples(model)
    assert equal_weights(copied_scales(model), before)
    model.step()
    after = copied_scales(model)
    for name, history in after.items():
        if name.endswith("amax_history"):
            assert torch.equal(history[:-1][1:], before[name][1:][1:]), name
            assert not history[0].any(), name
    assert not equal_weights(after, before)


def case_first_scales_are_those_of_the_weights(folder: Path) -> None:
    model, plain = training("delayed"), training(fp8=None)
    whole = read_tensors(model.save(folder / f"first_{SIZE}", 0), "decoder.layers.")
    scales = fp8_state.scales(model.chunks)
    for name, weight in whole.items():
        if weight.dim() == 2:
            expected = torch.tensor([1.0, 448.0 / weight.float().abs().max(), 1.0])
            torch.testing.assert_close(scales[name.replace(".weight", ".forward.scale")], expected)

    def error() -> float:
        return sum((a - b).square().sum() for a, b in zip(outputs(model), outputs(plain), strict=True)).item()

    fine = error()
    for name, scale in scales.items():
        if name.endswith("scale"):
            scale.fill_(1.0)
    assert fine < error()


def case_a_resumed_run_goes_on_bit_for_bit(folder: Path) -> None:
    for name, options in RESUMED.items():
        model = training(**options)
        model.step()
        model.step()
        path = model.save(folder / f"resumed_{name}_{SIZE}", 2)
        model.step()
        straight = copied_scales(model), outputs(model), in_full(model)
        model = training(seed=99, **options)
        with warnings_noted() as noted:
            model.resume(read_info(path))
        assert noted == []
        model.step()
        assert equal_weights(copied_scales(model), straight[0]), name
        assert not differ(outputs(model), straight[1]), name
        assert equal_weights(in_full(model), straight[2]), name


RESUMED = {
    "delayed": {"recipe": "delayed"},
    "delayed_distributed": {"recipe": "delayed", "distributed_optimizer": True},
    "param_gather": {"param_gather": True, "distributed_optimizer": True},
}


def in_full(model: Training) -> dict[str, torch.Tensor]:
    return {name: fp8_weights.in_full(weight) for name, weight in model.weights().items()}


def case_scales_are_those_of_any_layout(folder: Path) -> None:
    path = folder / "resumed_delayed_1" / "iter_0000002"
    model = training("delayed", seed=99)
    model.resume(read_info(path))
    stored = {name.removeprefix("fp8."): tensor for name, tensor in read_tensors(path, "fp8.").items()}
    assert stored and equal_weights(copied_scales(model), stored)
    load_weights(read_info(path), (started := training("delayed", seed=99)).chunks, head="policy")
    assert equal_weights(copied_scales(started), stored)


def case_other_precisions_take_the_weights_and_say_what_they_leave(folder: Path) -> None:
    path = folder / "resumed_delayed_1" / "iter_0000002"
    for options in ({"recipe": "tensorwise"}, {"fp8": None}, {"fp8": None, "transformer_impl": "local"}):
        with warnings_noted() as noted:
            training(seed=99, **options).resume(read_info(path))
        assert any("was trained with FP8 (hybrid, delayed), this run goes on with" in text for text in noted), noted
    model = training("tensorwise")
    path = model.save(folder / f"tensorwise_{SIZE}", 1)
    assert read_tensors(path, "fp8.") == {}
    other = training("delayed", seed=99)
    with warnings_noted() as noted:
        other.resume(read_info(path))
    assert any("has no FP8 scales" in text for text in noted), noted
    assert equal_weights(copied_scales(other), copied_scales(training("delayed")))


def case_weights_in_fp8_alone_train_and_are_stored_as_those_beside_a_copy(folder: Path) -> None:
    stored, results = [], []
    for name, options in {"beside": {}, "alone": {"param_gather": True}}.items():
        model = training(distributed_optimizer=True, **options)
        for part in (model.optimizer, *model.optimizer.chained_optimizers):
            # Clipping is off, because the two add up the gradient norm in different orders.
            part.config.clip_grad = 0.0
        results.append([outputs(model), model.step(), outputs(model), model.step(), outputs(model)])
        stored.append(read_tensors(model.save(folder / f"{name}_{SIZE}", 2)))
    (first, loss, second, other_loss, third), alone = results
    assert not differ(first + second + third, alone[0] + alone[2] + alone[4])
    assert (loss, other_loss) == (alone[1], alone[3])
    assert equal_weights(*stored)
    started = training(seed=99, distributed_optimizer=True, param_gather=True)
    load_weights(read_info(folder / f"beside_{SIZE}"), started.chunks, head="policy")
    assert not differ(outputs(started), third)


def case_beta_is_1_over_n_at_every_refresh(folder: Path) -> None:
    assets = folder / f"assets_{SIZE}"
    if WORLD.is_writer:
        write_assets(assets)
    torch.distributed.barrier()
    common = [
        *("--seq-length", "64", "--global-batch-size", "4", "--micro-batch-size", "1", "--lr", "1e-3", "--bf16"),
        *("--no-progress", "--transformer-impl", "transformer_engine", "--train-iters", "4"),
    ]
    if SIZE > 1:
        common += ["--tensor-model-parallel-size", str(SIZE), "--sequence-parallel"]
    new = [*size_flags(), "--tokenizer-model", str(assets / "tokenizer")]
    data = {stage: ["--train-data", str(assets / f"{name}.jsonl")] for stage, name in DATA.items()}
    for stage in ("sft", "reward"):
        open_trainer(stage, [*common, *new, *data[stage], "--save", str(folder / f"{stage}_{SIZE}")]).save()
    brain = [
        *("--load", str(folder / f"sft_{SIZE}"), "--finetune", "--reward-load", str(folder / f"reward_{SIZE}")),
        *("--samples-per-prompt", "4", "--max-new-tokens", "8", "--prompts-per-round", "8", "--offload-reward"),
    ]
    for extra in (
        ["--fp8-recipe", "tensorwise"],
        ["--fp8-recipe", "delayed"],
        ["--fp8-recipe", "delayed", "--two-pass", "--no-refresh-proposal"],
        ["--fp8-recipe", "custom", "--fp8-quantizer-factory", REFERENCE],
        ["--fp8-param-gather", "--use-distributed-optimizer"],
    ):
        trainer = open_trainer("brain", [*common, *data["brain"], *brain, "--fp8-format", "hybrid", *extra])
        errors = [beta_error(trainer) for _ in range(4)][::2]
        assert errors[0] == 0.0, (extra, errors)
        # The error would also be 0 if the policy never moved. Against a proposal that stays, it is not 0.
        assert (errors[1] == 0.0) != ("--no-refresh-proposal" in extra), (extra, errors)


def beta_error(trainer: Trainer) -> float | None:
    """Run a step of the loop. It returns the error of beta if the step is the first of its round, else None."""
    metrics = trainer.step(trainer.stage.micro_batches(trainer))
    return trainer.stage.after_step(trainer, metrics).get("beta_error_at_refresh")


DATA = {"sft": "sft", "reward": "pairs", "brain": "prompts"}


def main(folder: Path) -> None:
    failures = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case(folder)
            except Exception:
                failures[name] = traceback.format_exc()
    (folder / f"failures_{WORLD.rank}.json").write_text(json.dumps(failures))


@contextlib.contextmanager
def one_by_one(*args: object, **options: object) -> Iterator[types.SimpleNamespace]:
    """Run each collective when it is called. Gloo would join buffers of FP8 and of bf16 as if they had one type."""
    yield types.SimpleNamespace(wait=lambda: None)


if __name__ == "__main__":
    WORLD = parallel.start(LAYOUT, seed=1)
    fake_te.claim_cuda()
    # The function refuses Transformer Engine on the CPU.
    provider.choose_transformer_impl = lambda asked, device: (asked, "asked for")
    opening.runtime.start = lambda *args, **options: WORLD
    param_and_grad_buffer._coalescing_manager = one_by_one
    main(Path(sys.argv[1]))
    parallel.stop()
