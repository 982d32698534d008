"""Draws responses with vLLM, offline. It runs under the Python of vLLM's environment and imports none of our code.

    python vllm_worker.py MODEL_DIR DTYPE LONGEST

DTYPE is that of the model, LONGEST the most tokens of a prompt and its response. It answers every line of standard
input with a line on standard output, both JSON, and ends with standard input. First it writes {"engine": str}, as soon
as it is ready. Question: {"prompts": [[int]], "samples": int, "max_new_tokens": int, "temperature": float}. Answer:
{"tokens": [[[int]]]}, the responses to each prompt, with EOS where the model gave it.
"""

import json
import os
import sys

# Nothing but answers may get into the pipe, so whatever else is printed goes to standard error.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from vllm import LLM, SamplingParams, __version__  # noqa: E402  It must find the pipe closed to prints.


def main(model: str, dtype: str, longest: int) -> None:
    engine = LLM(model=model, dtype=dtype, max_model_len=longest, disable_log_stats=True, max_num_seqs=256)
    _say({"engine": f"vLLM {__version__}"})
    for line in sys.stdin:
        asked = json.loads(line)
        # The next round has other weights, for which no prompt is cached.
        assert engine.reset_prefix_cache(), "the prefix cache was not reset"
        # There is no seed for each request: vLLM would draw from a generator for each row, which takes longer.
        sampling = SamplingParams(
            n=asked["samples"],
            temperature=asked["temperature"],
            max_tokens=asked["max_new_tokens"],
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        _say({"tokens": [[list(sample.token_ids) for sample in row.outputs] for row in outputs]})


def _say(answer: dict) -> None:
    print(json.dumps(answer), file=_answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
