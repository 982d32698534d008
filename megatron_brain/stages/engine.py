"""Opens the engine that a run draws its responses with."""

from megatron_brain.generation.engine import Engine
from megatron_brain.generation.native import NativeEngine
from megatron_brain.training.run import Run


def open_engine(run: Run) -> Engine:
    """The engine of --engine. All ranks call it."""
    return NativeEngine(run.parallel, eos_id=run.tokenizer.eos_id)
