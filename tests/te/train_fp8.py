"""Trains with Transformer Engine's layers in FP8 on a CPU: `train_fp8.py FILE CASES`, alone or under torchrun.

CASES is JSON, the options of `Training` by name, with the options of FP8 as "fp8". Rank 0 writes JSON to FILE: for each
case the losses of its steps, the products that the last step computed in FP8 with their formats, the linear maps that
were in FP8 and those that were not, and the calls of attention; and the recipes that megatron-core makes of our
settings.

Under torchrun the layers are split over all processes, with sequence parallelism.
"""

import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_fp8
import fake_te

fake_fp8.install()
# This comes before megatron-core looks for Transformer Engine.
fake_te.import_without_extension()

# ruff: noqa: E402
from helpers.tiny_training import Training
from megatron.core.fp8_utils import get_fp8_recipe
from transformer_engine.pytorch import DotProductAttention
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models import provider
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.runtime import parallel

STEPS = 8
RECIPES = {
    "delayed": {"fp8_margin": 2, "fp8_amax_history_len": 32, "fp8_amax_compute_algo": "most_recent"},
    "delayed_e4m3": {"fp8_recipe": "delayed", "fp8_format": "e4m3"},
    "tensorwise": {},
    "blockwise": {"fp8_format": "e4m3"},
    "mxfp8": {},
}


@contextmanager
def products_counted() -> Iterator[Counter]:
    """Count the products of the reference quantizer by kind and by the formats of the operands."""
    counts, multiply = Counter(), CurrentScalingQuantizerRef.qgemm

    def counting(self, x, w, *arguments, gemm_type, **options):
        formats = (str(operand.dtype).removeprefix("torch.float8_") for operand in (x, w))
        counts[" ".join((gemm_type.value, *formats))] += 1
        return multiply(self, x, w, *arguments, gemm_type=gemm_type, **options)

    CurrentScalingQuantizerRef.qgemm = counting
    yield counts
    CurrentScalingQuantizerRef.qgemm = multiply


def record_attention(model: PolicyModel) -> list[dict]:
    """A list that future calls of attention are added to: their arguments by Transformer Engine's names."""
    calls, signature = [], inspect.signature(DotProductAttention.forward)

    def record(module, arguments, options):
        bound = signature.bind(module, *arguments, **options).arguments
        lengths = {name: bound[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_kv")}
        calls.append({"attn_mask_type": bound["attn_mask_type"], "qkv_format": bound["qkv_format"], **lengths})

    attention = model.decoder.layers[0].self_attention.core_attention
    for module in (attention.to_self, attention.after_prefix):
        module.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def train(fp8: dict | None, **options: object) -> dict:
    """Do what the module's docstring says, for one case. With `fp8` None it trains without FP8."""
    length = 16 * options["parallel"].tp_size
    group = Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))
    batches = [pack_groups([group], shared_prefix=True, length=length)]
    settings = None if fp8 is None else Fp8Config(fp8_format="hybrid", **fp8)
    training = Training(bf16=True, lr=3e-3, fp8=settings, batches=batches, **options)
    losses = [training.step() for _ in range(STEPS - 1)]
    calls = record_attention(training.chunks[0])
    with products_counted() as products:
        losses.append(training.step())
    linear = {
        name: module.fp8 for name, module in training.chunks[0].named_modules() if hasattr(module, "weight_names")
    }
    return {
        "losses": losses,
        "products": products,
        "fp8": sorted(name for name, on in linear.items() if on),
        "plain": sorted(name for name, on in linear.items() if not on),
        "attention": calls,
    }


def recipe(name: str, **settings: object) -> dict:
    """Fields of the recipe that megatron-core makes of our settings."""
    fp8 = Fp8Config(**{"fp8_format": "hybrid", "fp8_recipe": name} | settings)
    training = Training(_world, bf16=True, transformer_impl="transformer_engine", layout=_layout, fp8=fp8)
    made = get_fp8_recipe(training.chunks[0].config)
    names = ("margin", "amax_history_len", "amax_compute_algo")
    found = {field: getattr(made, field) for field in names if name.startswith("delayed")}
    return {"class": type(made).__mro__[-3].__name__, "format": made.fp8_format.name, **found}


if __name__ == "__main__":
    size = int(os.environ.get("WORLD_SIZE", "1"))
    _layout = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=size > 1)
    _world = parallel.start(_layout, seed=1)
    fake_te.claim_cuda()
    # The function refuses Transformer Engine on the CPU.
    provider.choose_transformer_impl = lambda requested, device: (requested, "asked for")
    common = {"parallel": _world, "layout": _layout, "transformer_impl": "transformer_engine"}
    found = {
        "cases": {name: train(**options, **common) for name, options in json.loads(sys.argv[2]).items()},
        "recipes": {name: recipe(name, **settings) for name, settings in RECIPES.items()},
    }
    if _world.is_writer:
        Path(sys.argv[1]).write_text(json.dumps(found))
    parallel.stop()
