"""A real language model behind a real vLLM server judges a real evaluation. It runs as test_vllm.py does:

    REAL_HF_MODEL=work/base REAL_PROMPTS=work/data/test.jsonl VLLM_PYTHON=work/vllm/bin/python \
        python -m pytest -s tests/end_to_end/test_llm_judge.py
"""

import json
import os
import urllib.request
from pathlib import Path

from helpers.elsewhere import needs, stage, tool
from helpers.vllm_servers import served

from megatron_brain.stages.evaluate.stage import main

PROMPTS = 8


@needs("VLLM_PYTHON", "REAL_HF_MODEL", "REAL_PROMPTS")
def test_every_verdict_of_a_small_model_is_read_or_counted_as_unparsable(tmp_path):
    output = tmp_path / "report.json"
    tool(
        "convert_hf_to_megatron",
        "--hf-model",
        os.environ["REAL_HF_MODEL"],
        "--save",
        tmp_path / "model",
        "--no-compare",
        "--bf16",
    )
    # serve.sh takes no tied embeddings, because a trainer could not replace them.
    tool("convert_megatron_to_hf", "--load", tmp_path / "model", "--save", tmp_path / "hf", "--untie", "--no-compare")
    with served(tmp_path / "hf", tmp_path, tokenizer=tmp_path / "hf", dtype="bfloat16", longest=1024) as url:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
            name = json.load(response)["data"][0]["id"]
        run = stage(
            *("evaluate", "--load", tmp_path / "model", "--prior-load", tmp_path / "model", "--bf16"),
            *("--prompts", os.environ["REAL_PROMPTS"], "--max-prompts", PROMPTS, "--max-new-tokens", 16),
            *("--judge-url", f"{url}/v1", "--judge-model", name, "--output", output, "--no-progress"),
        )
        main(run)
    report = json.loads(output.read_text())
    counts = report["llm_judge"]["comparisons"]
    verdicts = [json.loads(line) for line in Path(f"{output}.verdicts.jsonl").read_text().splitlines()]
    assert counts["policy_vs_baseline"]["equal_texts"] == PROMPTS, "the policy is the baseline"
    assert counts["policy_vs_reference"]["compared"] == PROMPTS
    assert verdicts[0]["id"] == "a sample" and len(verdicts) == 1 + 2 * PROMPTS
    verdicts = verdicts[1:]
    unparsable = [kept["reply"] for kept in verdicts if kept["verdict"] is None]
    assert counts["policy_vs_reference"]["unparsable_verdicts"] == len(unparsable)
    told = {name: metric for name, metric in report["metrics"].items() if "llm" in name and "reference" in name}
    assert told["llm/unparsable/policy_vs_reference"]["value"] == len(unparsable) / len(verdicts)
    print(json.dumps({"counts": counts, "metrics": told, "replies": sorted({kept["reply"] for kept in verdicts})}))
