"""Three ways to draw responses from the same Hugging Face directory: this package, transformers, and vLLM."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.real_work import Work
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import ConfigError
from megatron_brain.generation.native import NativeEngine
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.stages.answers import read_prompts
from megatron_brain.training.start import open_run

Prompts = Sequence[Sequence[int]]
Responses = list[list[list[int]]]
"""Token ids of the responses to each prompt, EOS included where the model gave it."""

_WORKER = Path(__file__).parent / "vllm_worker.py"
_SECONDS_TO_END = 30


class Sampler(Protocol):
    """Draws responses. Each call draws anew."""

    def sample(self, prompts: Prompts, *, samples: int, max_new_tokens: int, temperature: float) -> Responses:
        """Draw `samples` responses to each prompt; the whole distribution is drawn from. Temperature 0 is greedy."""


class OurSampler:
    """The native engine. It reads prompts from a file, as the generate stage does."""

    def __init__(self, work: Work, prompts: Sequence[str], *, longest: int, max_new_tokens: int, at_once: int) -> None:
        settings = {
            "hf_model": str(work.model),
            "bf16": work.dtype == torch.bfloat16,
            "prompts": work.write("prompts.jsonl", [{"prompt": prompt} for prompt in prompts]),
            "output": str(work.folder / "answers.jsonl"),
            "seq_length": longest,
            "max_new_tokens": max_new_tokens,
            "seed": work.seed,
            "progress": False,
        }
        run = open_run(config_from_dict("generate", settings, "the benchmark"))
        self.prompts = [prompt.tokens for prompt in read_prompts(run)]
        self.eos_id = run.tokenizer.eos_id
        self._engine = NativeEngine(run.parallel, eos_id=self.eos_id)
        self._engine.take_weights(run.build_model("policy"), "the model")
        self._at_once, self._seed = at_once, work.seed

    def sample(self, prompts: Prompts, *, samples: int, max_new_tokens: int, temperature: float) -> Responses:
        """Draw responses, `at_once` at one time."""
        self._seed += 1
        drawn = self._engine.sample(
            [tuple(prompt) for prompt in prompts],
            seeds=sample_seeds(self._seed, range(len(prompts)), samples),
            sampling=SamplingConfig(
                samples_per_prompt=samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                sampling_batch_size=self._at_once,
            ),
        )
        return [[list(completion.tokens) for completion in of_prompt] for of_prompt in drawn]


class HFSampler:
    """transformers' `generate` on one batch padded on the left."""

    def __init__(self, work: Work, *, eos_id: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.dtype).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._eos_id = eos_id

    @torch.no_grad()
    def sample(self, prompts: Prompts, *, samples: int, max_new_tokens: int, temperature: float) -> Responses:
        """Draw responses, all at one time."""
        rows = [torch.tensor(prompt) for prompt in prompts]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self._eos_id, padding_side="left")
        masks = [torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts]
        mask = pad_sequence(masks, batch_first=True, padding_side="left")
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config = GenerationConfig(
            **drawn,
            max_new_tokens=max_new_tokens,
            num_return_sequences=samples,
            eos_token_id=self._eos_id,
            pad_token_id=self._eos_id,
        )
        device = self.model.device
        made = self.model.generate(tokens.to(device), attention_mask=mask.to(device), generation_config=config)
        ended = [self._until_end(row) for row in made[:, tokens.size(1) :].tolist()]
        return [ended[first : first + samples] for first in range(0, len(ended), samples)]

    def _until_end(self, row: list[int]) -> list[int]:
        return row[: row.index(self._eos_id) + 1] if self._eos_id in row else row

    @torch.no_grad()
    def surprises(self, prompts: Prompts, responses: Responses, temperature: float) -> list[float]:
        """-log of the probability of every response at a temperature, in nats."""
        found = []
        for prompt, of_prompt in zip(prompts, responses, strict=True):
            rows = [torch.tensor([*prompt, *response]) for response in of_prompt]
            # What is behind a row's end does not change what is before it.
            tokens = pad_sequence(rows, batch_first=True).to(self.model.device)
            longest = tokens.size(1) - len(prompt)
            logits = self.model(tokens, logits_to_keep=longest + 1).logits[:, :-1].float() / temperature
            by_token = logits.log_softmax(-1).gather(-1, tokens[:, len(prompt) :, None]).squeeze(-1)
            found += [-row[: len(response)].sum().item() for row, response in zip(by_token, of_prompt, strict=True)]
        return found


class VllmSampler:
    """vLLM in a process of its own, under the Python of its environment. Leaving the context ends it.

    Raises:
        ConfigError: the process ended before it was ready, or in the middle of a question.
    """

    def __init__(self, work: Work, python: Path, *, longest: int, threads: int) -> None:
        self._python = python
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        environment = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": str(threads),
        }
        # The paths of our packages would hide those of its environment.
        environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")
        dtype = str(work.dtype).removeprefix("torch.")
        self._process = subprocess.Popen(
            [python, _WORKER, work.model, dtype, str(longest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.engine = self._answer()["engine"]

    def __enter__(self) -> "VllmSampler":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def sample(self, prompts: Prompts, *, samples: int, max_new_tokens: int, temperature: float) -> Responses:
        """Draw responses; the engine decides how many at one time."""
        asked = {
            "prompts": [list(prompt) for prompt in prompts],
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()["tokens"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise ConfigError(f"--vllm-python {self._python}: vLLM ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)
