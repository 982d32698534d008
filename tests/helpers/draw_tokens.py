"""Draws responses as the generate stage does and writes their token ids: a JSON list that has, for each prompt, a list
of pairs of tokens and log-probability.

    torchrun --nproc-per-node 3 tests/helpers/draw_tokens.py --load DIR --prompts FILE --output FILE ...
"""

import json
import sys
from pathlib import Path

from megatron_brain.checkpointing import load_weights
from megatron_brain.config.loader import load_config
from megatron_brain.stages.answers import gather_rows, my_share, read_prompts, sample_answers
from megatron_brain.stages.engine import open_engine
from megatron_brain.training.start import open_run


def main(arguments: list[str]) -> None:
    run = open_run(load_config("generate", arguments))
    prompts, chunks = read_prompts(run), run.build_model("policy")
    load_weights(run.start_from, chunks, head="policy")
    engine = open_engine(run, prompts)
    engine.take_weights(chunks, "the checkpoint")
    mine = my_share(prompts, run.parallel)
    drawn = sample_answers(run, engine, prompts, mine, run.config.sampling)
    rows = [(i, {"samples": [(s.tokens, s.logprob) for s in samples]}) for i, samples in zip(mine, drawn, strict=True)]
    everything = [row["samples"] for row in gather_rows(rows, run.parallel)]
    if run.parallel.is_writer:
        Path(run.config.generate.output).write_text(json.dumps(everything), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
