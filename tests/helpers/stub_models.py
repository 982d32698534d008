"""The models behind the stub of a vLLM server: a real one that draws with our sampler, and one that is a number."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class StubModel(Protocol):
    """What the server needs of a model. One thread at a time calls it."""

    vocab_size: int

    def load(self, folder: Path) -> None:
        """Replace the weights, or raise an error and keep them."""

    def draw(self, requests: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities for requests that differ in prompt and seed alone."""

    def prompt_logprobs(self, sequence: Sequence[int]) -> list[float]:
        """Log-probabilities of the tokens from the second on."""

    def likeliest(self, sequence: Sequence[int], count: int, temperature: float) -> dict[int, float]:
        """The likeliest next tokens and their log-probabilities."""


class NumberModel:
    """A model whose only weight is a number. Its draws and log-probabilities are hashes of it; it needs no torch."""

    vocab_size = 320

    def __init__(self) -> None:
        self.value = -1.0

    @staticmethod
    def write(value: float, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weight.json").write_text(json.dumps({"value": value}))

    def load(self, folder: Path) -> None:
        self.value = json.loads((folder / "weight.json").read_text())["value"]

    def draw(self, requests: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        return [self.draw_one(request) for request in requests]

    def draw_one(self, request: dict[str, Any]) -> tuple[list[int], list[float]]:
        draws = random.Random(f"{self.value} {request['prompt']} {request.get('seed')}")
        [eos] = request["stop_token_ids"]
        tokens: list[int] = []
        while len(tokens) < request["max_tokens"] and eos not in tokens:
            tokens.append(eos if draws.random() < 0.1 else draws.randrange(eos + 1, self.vocab_size))
        return tokens, [-draws.random() for _ in tokens]

    def prompt_logprobs(self, sequence: Sequence[int]) -> list[float]:
        return [-1.0 - random.Random(f"{self.value} {token}").random() for token in sequence[1:]]

    def likeliest(self, sequence: Sequence[int], count: int, temperature: float) -> dict[int, float]:
        logits = [-0.3 * token / temperature for token in range(self.vocab_size)]
        total = math.log(sum(map(math.exp, logits)))
        return {token: logits[token] - total for token in range(count)}


class PolicyOfFolder:
    """The policy of a Hugging Face directory. It draws with the native sampler, so its tokens are those of that engine.

    Args:
        parallel: the layout of this process alone.
    """

    def __init__(self, folder: Path, parallel: Any) -> None:
        import torch

        from megatron_brain.config.model import ModelConfig
        from megatron_brain.config.parallel import ParallelConfig
        from megatron_brain.conversion import read_hf_model
        from megatron_brain.models.architecture import resolve
        from megatron_brain.models.provider import build_model

        source = read_hf_model(folder)
        told = source.config
        bf16 = "bfloat16" in str(told.get("dtype") or told.get("torch_dtype"))
        self._parallel = parallel
        self._config = resolve(ModelConfig(bf16=bf16), source.architecture, str(folder))
        with torch.random.fork_rng(devices=[]):
            self._chunks = build_model(self._config, ParallelConfig(), parallel, head="policy", seed=None)
        self._chunks[0].eval()
        self.vocab_size = self._chunks[0].true_vocab_size

    def load(self, folder: Path) -> None:
        from megatron_brain.conversion import load_hf_weights

        load_hf_weights(folder, self._chunks, self._config, "policy")

    def draw(self, requests: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        from megatron_brain.config.stages import SamplingConfig
        from megatron_brain.generation.sampler import Sampler

        first = requests[0]
        sampling = SamplingConfig(
            temperature=first["temperature"],
            top_p=first.get("top_p", 1.0),
            top_k=first.get("top_k", 0),
            max_new_tokens=first["max_tokens"],
        )
        sampler = Sampler(self._chunks, self._parallel, sampling, eos_id=first["stop_token_ids"][0])
        drawn = sampler.generate(
            [tuple(request["prompt"]) for request in requests],
            seeds=[[request.get("seed", 0)] for request in requests],
        )
        return [(list(sample.tokens), list(sample.token_logprobs)) for [sample] in drawn]

    def prompt_logprobs(self, sequence: Sequence[int]) -> list[float]:
        import torch

        with torch.no_grad():
            targets = torch.tensor(sequence[1:])
            return self._chunks[0].token_logprobs(self._hidden(sequence)[:-1], targets).tolist()

    def likeliest(self, sequence: Sequence[int], count: int, temperature: float) -> dict[int, float]:
        import torch

        with torch.no_grad():
            weight = self._chunks[0].output_weight.float()
            logits = (self._hidden(sequence)[-1].float() @ weight.t())[: self.vocab_size]
            found = torch.log_softmax(logits / temperature, dim=0).topk(count)
        return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def _hidden(self, sequence: Sequence[int]) -> Any:
        """Hidden states `[tokens, h]`."""
        import torch

        from megatron_brain.data.groups import Segment
        from megatron_brain.models.attention import PackedLayout

        tokens, layout = torch.tensor([list(sequence)]), PackedLayout(segments=(Segment(0, len(sequence)),))
        return self._chunks[0].trunk(tokens, torch.arange(len(sequence))[None], layout)[:, 0]
