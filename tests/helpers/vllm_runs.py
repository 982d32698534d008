"""What a run gives the vLLM engine, made small: a model on one process, its export, its log-probabilities of probes."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.assets import SIZES
from helpers.stub_models import NumberModel
from megatron_brain.config.engine import EngineConfig
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.conversion.registry import family_for_export
from megatron_brain.conversion.weights import hf_tensors
from megatron_brain.data.groups import Segment
from megatron_brain.generation.vllm import VllmEngine
from megatron_brain.models.architecture import resolve
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.provider import build_model

PROBES = [(5, 17, 99, 3, 8, 250, 41, 77, 12, 200), (9, 8, 7, 6, 5, 4, 3, 2)]
EOS = 7
TINY = SIZES | {"num_layers": 2, "init_method_std": 0.2, "untie_embeddings_and_output_weights": True}


def tiny_policy(parallel, *, seed=1, **changes):
    """A policy whose draws differ from those of another seed."""
    config = resolve(ModelConfig(**TINY | changes), None, "the test")
    with torch.random.fork_rng(devices=[]):
        return build_model(config, ParallelConfig(), parallel, head="policy", seed=seed)[0].eval()


def export(chunk, folder: Path, **changes) -> Path:
    """Write a tiny policy, which one process holds, as a Hugging Face directory."""
    config = resolve(ModelConfig(**TINY | changes), None, "the test")
    family = family_for_export(config)
    folder.mkdir(exist_ok=True, parents=True)
    tensors = {name: value.detach().contiguous() for name, value in hf_tensors(chunk, config, "policy", family)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = {"architectures": [family.policy_class], **family.hf_config(config), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@torch.no_grad()
def score(chunks, probes):
    """Log-probabilities of the probes' tokens from the second on."""
    found = []
    for probe in probes:
        layout = PackedLayout(segments=(Segment(0, len(probe)),))
        hidden = chunks[0].trunk(torch.tensor([probe]), torch.arange(len(probe))[None], layout)[:-1, 0]
        found.append(chunks[0].token_logprobs(hidden, torch.tensor(probe[1:])).tolist())
    return found


def settings(urls, root, **changes) -> EngineConfig:
    """Settings with short time limits."""
    base = EngineConfig(
        engine="vllm",
        engine_url=",".join(urls),
        engine_sync_dir=str(root),
        engine_concurrency=8,
        engine_request_timeout=2.0,
        engine_timeout=6.0,
        max_engine_difference=0.01,
    )
    return dataclasses.replace(base, **changes)


def open_engine(urls, root, parallel, *, write=None, longest=64, **changes) -> VllmEngine:
    return VllmEngine(
        settings(urls, root, **changes),
        parallel,
        eos_id=EOS,
        vocab_size=TINY["vocab_size"],
        longest_sequence=longest,
        write=write or (lambda chunks, folder: export(chunks[0], folder)),
        probes=PROBES,
        score=score,
    )


def score_number(chunks, probes):
    """The same for the model that is a number, which stands in the place of the chunks."""
    model = NumberModel()
    model.value = chunks[0]
    return [model.prompt_logprobs(probe) for probe in probes]


def open_number_engine(urls, root, parallel, *, write=None, longest=64, **changes) -> VllmEngine:
    """An engine whose policy is a number, for servers with a `NumberModel`."""
    return VllmEngine(
        settings(urls, root, **changes),
        parallel,
        eos_id=EOS,
        vocab_size=NumberModel.vocab_size,
        longest_sequence=longest,
        write=write or (lambda chunks, folder: NumberModel.write(chunks[0], folder)),
        probes=PROBES,
        score=score_number,
    )


def numbers_responses(value, prompts, seeds, sampling) -> list[list[tuple[int, ...]]]:
    """The tokens that a `NumberModel` draws."""
    model = NumberModel()
    model.value = value
    asked = {"max_tokens": sampling.max_new_tokens, "stop_token_ids": [EOS]}
    return [
        [tuple(model.draw_one(asked | {"prompt": list(prompt), "seed": seed})[0]) for seed in of_prompt]
        for prompt, of_prompt in zip(prompts, seeds, strict=True)
    ]
