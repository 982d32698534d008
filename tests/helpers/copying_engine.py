"""An engine that keeps a copy of the weights and draws in the background without a server, to test rounds ahead."""

import contextlib

from megatron_brain.generation.native import NativeEngine


class CopyingEngine:
    """Draws with the native sampler from its own copy of the weights.

    Args:
        run: the opened run.
        lazy: whether it draws when the result is asked for, as a slow engine does, or at once.
    """

    keeps_weights = True

    def __init__(self, run, *, lazy=False):
        self._native = NativeEngine(run.parallel, eos_id=run.tokenizer.eos_id)
        self._lazy = lazy
        self._weights = []
        self.holds, self.given = None, []

    def take_weights(self, chunks, label):
        self._native.take_weights(chunks, label)
        self._weights = [(parameter, parameter.data.clone()) for chunk in chunks for parameter in chunk.parameters()]
        self.holds = label
        self.given.append(label)

    def sample(self, prompts, *, seeds, sampling):
        with self._copied():
            return self._native.sample(prompts, seeds=seeds, sampling=sampling)

    def begin(self, prompts, *, seeds, sampling):
        return _Pending(lambda: self.sample(prompts, seeds=seeds, sampling=sampling), lazy=self._lazy)

    @contextlib.contextmanager
    def _copied(self):
        own = [parameter.data for parameter, _ in self._weights]
        for parameter, copy in self._weights:
            parameter.data = copy
        yield
        for (parameter, _), data in zip(self._weights, own, strict=True):
            parameter.data = data


class _Pending:
    seconds = 1.0

    def __init__(self, draw, *, lazy):
        self._draw = draw if lazy else None
        self._drawn = None if lazy else draw()

    def result(self):
        return self._drawn if self._draw is None else self._draw()
