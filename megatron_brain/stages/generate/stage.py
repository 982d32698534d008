"""Draws responses for a file of prompts. The output has one JSON line per prompt."""

import json
import logging
from pathlib import Path

from megatron_brain.checkpointing import load_weights
from megatron_brain.files import write_whole
from megatron_brain.stages.answers import gather_rows, my_share, read_prompts, sample_answers
from megatron_brain.stages.engine import open_engine
from megatron_brain.training.banner import show_banner
from megatron_brain.training.run import Run

log = logging.getLogger(__name__)


def main(run: Run) -> None:
    """Draw the responses and write them."""
    prompts = read_prompts(run)
    chunks = run.build_model("policy")
    if run.start_from is not None:
        load_weights(run.start_from, chunks, head="policy", verify=run.config.checkpoint.verify)
    show_banner(run, [("responses", f"{run.config.sampling.samples_per_prompt} of each prompt")])
    mine = my_share(prompts, run.parallel)
    engine = open_engine(run, prompts)
    engine.take_weights(chunks, str(run.config.checkpoint.load or run.config.model.hf_model))
    samples = sample_answers(run, engine, prompts, mine, run.config.sampling)
    rows = [
        (
            i,
            {
                "id": prompts[i].record_id,
                "prompt": prompts[i].text,
                "reference": prompts[i].reference,
                "responses": [run.tokenizer.decode_response(sample.tokens) for sample in drawn],
                "finished": [sample.finished for sample in drawn],
                "logprobs": [sample.logprob for sample in drawn],
            },
        )
        for i, drawn in zip(mine, samples, strict=True)
    ]
    everything = gather_rows(rows, run.parallel)
    if run.parallel.is_writer:
        output = Path(run.config.generate.output)
        write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in everything))
        log.info("wrote %d prompts with %d responses each to %s", len(everything), len(samples[0]), output)
