"""Memory of the busiest rank by part, estimated from sizes alone: what our code and megatron-core allocate.

A step is a sequence of phases that do not coexist: sampling, scoring, forward and backward pass, update. Weights,
gradient buffers and optimizer state exist in all of them. The estimate counts tensors only, not the CUDA context,
communication buffers of NCCL, or fragmentation. docs/planner.md says how it was measured, and what was not measured.
"""

import dataclasses
import functools
from dataclasses import dataclass, fields

from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.stage_spec import Head
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.planning.activations import (
    FLOAT32,
    HeadMemory,
    Shapes,
    TransformerImpl,
    embedding_backward,
    head_memory,
    layer_backward,
    layer_forward,
    layer_kept,
    norm_keeps_input,
    scoring_workspace,
)
from megatron_brain.planning.schedule import pipeline_steps
from megatron_brain.planning.sizes import (
    embedding_parameters,
    linear_layers,
    linear_weights,
    output_parameters,
    pipeline_stage_layers,
    pipeline_stage_parameters,
)
from megatron_brain.planning.workload import Layout, ScoringWork, Workload


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the peak of one phase, by part."""

    phase: str
    """`training`, `update`, `sampling`, `validation` or `scoring`."""
    pipeline_stage: int
    """The pipeline stage of the rank."""
    weights: int = 0
    """Weights of the model that trains (or generates), FP8 copies included."""
    gradients: int = 0
    """The float32 buffers of the gradients."""
    optimizer: int = 0
    """Both moments and, where weights are not float32, their float32 copies."""
    frozen_models: int = 0
    """Weights of prior and reward model that are on the device in this phase."""
    activations: int = 0
    """What is kept for backward passes, and what the pass under way holds for a moment."""
    logprob_workspace: int = 0
    """Logits, and the gradients that are computed together with log-probabilities."""
    kv_cache: int = 0
    """Keys and values of sampled responses."""
    temporaries: int = 0
    """What an update holds for a moment."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)

    def as_dict(self) -> dict[str, int | str]:
        """Parts, total, phase and pipeline stage, for JSON."""
        parts = {part: getattr(self, part) for part in PARTS}
        return {"phase": self.phase, "pipeline_stage": self.pipeline_stage, **parts, "total": self.total}


PARTS = tuple(field.name for field in fields(Memory) if field.name not in ("phase", "pipeline_stage"))
"""Names of the parts, in the order that tables show."""


def estimate_memory(workload: Workload, layout: Layout, *, impl: TransformerImpl = "transformer_engine") -> Memory:
    """Memory of the rank and phase that need most.

    Args:
        impl: implementation of the layers: `local`, as measured on CPUs, or `transformer_engine` on a GPU, which was
            derived from its code and has not been measured.
    """
    phases = (
        m
        for pipeline_stage in range(layout.pipeline)
        for m in pipeline_stage_memory(workload, layout, pipeline_stage, impl=impl)
    )
    return max(phases, key=lambda memory: memory.total)


def pipeline_stage_memory(
    workload: Workload, layout: Layout, pipeline_stage: int, *, impl: TransformerImpl = "transformer_engine"
) -> list[Memory]:
    """Memory of the ranks of one pipeline stage, phase by phase."""
    ours = layout.context == 1 and not layout.sharded_weights and not layout.account_for_ends
    assert ours, f"memory of layouts that our runs cannot have is not known: {layout}"
    return _PipelineStage(workload, layout, pipeline_stage, impl).phases()


@dataclass(frozen=True)
class _PipelineStage:
    workload: Workload
    layout: Layout
    pipeline_stage: int
    impl: TransformerImpl

    @property
    def model(self) -> ResolvedModel:
        return self.workload.model

    @property
    def is_first(self) -> bool:
        return self.pipeline_stage == 0

    @property
    def is_last(self) -> bool:
        return self.pipeline_stage == self.layout.pipeline - 1

    @property
    def tied(self) -> bool:
        """Whether embedding and output layer are one weight on this rank."""
        return self.workload.head == "policy" and self.layout.pipeline == 1 and self._ties_weights

    @property
    def _ties_weights(self) -> bool:
        return not self.model.untie_embeddings_and_output_weights

    @functools.cached_property
    def parameters(self) -> int:
        """Number of parameters on this rank."""
        return pipeline_stage_parameters(self.model, self.layout, self.pipeline_stage, self.workload.head)

    @functools.cached_property
    def shapes(self) -> Shapes:
        return Shapes.of(self.workload, self.layout, self.model, self.impl)

    def phases(self) -> list[Memory]:
        """Memory in all phases of a step."""
        found = []
        if self.workload.spec.trains:
            found += [self._training(), self._update()]
        if self.workload.draws_on_its_gpus:
            found.append(self._sampling())
        if self.workload.answers_held_out:
            found.append(self._validation())
        return found + [self._scoring(model) for model in self.workload.frozen_models]

    # Weights and what belongs to them

    def _memory(self, phase: str, using: ScoringWork | None = None, **parts: int) -> Memory:
        """Memory of one phase: what exists in all phases, and `parts`."""
        frozen = (m for m in self.workload.frozen_models if m is using or not m.offloaded)
        trains = self.workload.spec.trains
        return Memory(
            phase=phase,
            pipeline_stage=self.pipeline_stage,
            weights=self._weights(self.model, self.workload.head, trained=True),
            gradients=self.parameters * FLOAT32 if trains else 0,
            optimizer=self._optimizer() if trains else 0,
            frozen_models=sum(self._weights(m.model, m.head, trained=False) for m in frozen),
            **parts,
        )

    def _weights(self, model: ResolvedModel, head: Head, *, trained: bool) -> int:
        """Weights in the dtype of the activations. In FP8 each linear map also has a copy, and a transposed one where
        there are gradients to compute; with --fp8-param-gather only these exist."""
        element = self.shapes.element
        weights = pipeline_stage_parameters(model, self.layout, self.pipeline_stage, head) * element
        if self.workload.precision != "fp8" or self.impl != "transformer_engine":
            return weights
        maps = linear_weights(model) // self.layout.tensor
        in_fp8 = maps * self._fp8_layers(range(pipeline_stage_layers(model, self.layout, self.pipeline_stage)))
        copies = in_fp8 * (2 if trained else 1)
        return weights + copies - (in_fp8 * element if trained and self.workload.fp8_param_gather else 0)

    def _optimizer(self) -> int:
        """Two moments, and a float32 copy of the weights unless they are float32 themselves."""
        copies = 0 if self.workload.precision == "fp32" else FLOAT32
        shards = self.layout.data if self.layout.distributed_optimizer else 1
        return -(-self.parameters // shards) * (2 * FLOAT32 + copies)

    def _update(self) -> Memory:
        """Memory of the update. Without Transformer Engine or Apex, clipping makes scaled copies, one at a time."""
        largest = max(
            [linear.weights // self.layout.tensor for linear in linear_layers(self.model)]
            + [embedding_parameters(self.model, self.layout.tensor)] * self.is_first
            + [output_parameters(self.model, self.workload.head, self.layout.tensor, self.layout.pipeline)]
            * self.is_last
        )
        if self.layout.distributed_optimizer:
            largest = min(largest, -(-self.parameters // self.layout.data))
        return self._memory("update", temporaries=largest * FLOAT32 if self.impl == "local" else 0)

    # Forward and backward pass

    def _training(self) -> Memory:
        """The most over the schedule: what waits for its backward pass, and what the pass under way holds."""
        layout, chunks = self.layout, self.layout.virtual_pipeline
        passes = [self._pass(chunk) for chunk in range(chunks)]
        waiting, peak = 0, (0, 0)
        # Four times as many micro-batches as pipeline stages reach the peak; later ones only repeat it.
        micro_batches = min(layout.num_micro_batches, 4 * layout.pipeline)
        steps = pipeline_steps(self.pipeline_stage, layout.pipeline, chunks, micro_batches)
        for direction, chunk in steps:
            kept, highest, workspace = passes[chunk]
            if direction == "backward":
                waiting -= kept
                peak = max(peak, (waiting + highest, workspace))
            else:
                waiting += kept
        inputs = self.shapes.batch * layout.num_micro_batches
        gathered = self.shapes.gathered  # megatron-core's buffer for gathered inputs, made once
        # Interleaved chunks communicate meanwhile: the next input and gradient arrive, the last gradient leaves.
        under_way = 3 * self.shapes.hidden if chunks > 1 else 0
        total, workspace = peak
        return self._memory(
            "training", activations=total - workspace + inputs + gathered + under_way, logprob_workspace=workspace
        )

    def _pass(self, chunk: int) -> tuple[int, int, int]:
        """For one micro-batch in a chunk: what is kept, the most it holds, and the log-probabilities' share of that."""
        shapes, layout = self.shapes, self.layout
        layers, whole = self._layers_kept(chunk)
        outer = shapes.rotation
        has_head = self.is_last and chunk == layout.virtual_pipeline - 1
        has_embedding = self.is_first and chunk == 0
        if not has_embedding and not norm_keeps_input(shapes) and layout.recompute != "full":
            outer += shapes.hidden  # only the schedule holds the input
        if not has_head:
            outer += shapes.hidden  # the output, which the schedule holds until its gradient comes
        head = HeadMemory(kept=0, forward=0, backward=0, tied_gradient=0, workspace=0)
        if has_head:
            head = head_memory(shapes, self.workload.head, known_gradient=self.workload.known_gradient, tied=self.tied)
        points = [
            (outer + layers + max(head.forward, head.backward), head.workspace),
            (
                outer + whole + head.tied_gradient + layer_backward(shapes, fp8=self._fp8_layers([-1]) > 0),
                head.tied_gradient,
            ),
        ]
        if has_embedding:
            points.append((outer + embedding_backward(shapes, tied=self.tied), head.tied_gradient))
        return outer + layers + head.kept, *max(points)

    def _layers_kept(self, chunk: int) -> tuple[int, int]:
        """What the layers of a chunk keep after a forward pass, and at the peak of their backward pass."""
        shapes, layout = self.shapes, self.layout
        places = self._places(chunk)
        count, first = len(places), places.start
        if layout.recompute != "full":
            kept = sum(self._layer(first + i) for i in range(count))
            return kept, kept
        again = min(layout.recompute_num_layers, count)
        if layout.recompute_method == "uniform":
            inputs = -(-count // again) * shapes.hidden
            # The last layers are computed again, and their output exists too.
            layers = [self._layer(first + i, with_input=i > 0) for i in range(again)]
            return inputs, inputs + sum(layers) + shapes.hidden
        kept = again * shapes.hidden + sum(self._layer(first + i) for i in range(again, count))
        return kept, max(kept, again * shapes.hidden + self._layer(first, with_input=False) + shapes.hidden)

    def _places(self, chunk: int) -> range:
        """Places of a chunk's layers among those of this pipeline stage."""
        each = pipeline_stage_layers(self.model, self.layout, self.pipeline_stage) // self.layout.virtual_pipeline
        return range(chunk * each, (chunk + 1) * each)

    def _layer(self, place: int, *, with_input: bool = True) -> int:
        """What the layer at a place of this pipeline stage keeps."""
        selective = self.layout.recompute == "selective"
        fp8 = self._fp8_layers([place]) > 0
        return layer_kept(self.shapes, selective=selective, fp8=fp8, with_input=with_input)

    def _fp8_layers(self, places: range | list[int]) -> int:
        """How many of the layers at these places of this pipeline stage compute in FP8."""
        if self.workload.precision != "fp8" or self.impl != "transformer_engine":
            return 0
        count = pipeline_stage_layers(self.model, self.layout, self.pipeline_stage)
        start, end = self.workload.bf16_layers
        start = start if self.is_first else 0
        end = end if self.is_last else 0
        return sum(start <= place % count < count - end for place in places)

    # Sampling and scoring

    def _scoring(self, frozen: ScoringWork) -> Memory:
        """Memory while a frozen model scores micro-batches of training and keeps nothing."""
        shapes = Shapes.of(self.workload, self.layout, frozen.model, self.impl)
        norm_and_head = 2 * shapes.hidden + shapes.gathered
        workspace = scoring_workspace(shapes) if self.is_last and frozen.head == "policy" else 0
        layers = shapes.rotation + layer_forward(shapes)
        inputs = shapes.batch * self.layout.num_micro_batches + shapes.gathered
        if layers >= norm_and_head + workspace:
            return self._memory("scoring", frozen, activations=layers + inputs)
        return self._memory("scoring", frozen, activations=norm_and_head + inputs, logprob_workspace=workspace)

    def _sampling(self) -> Memory:
        """Memory of a batch of prompts and their responses when the last token is drawn and the cache is full."""
        workload, model, layout = self.workload, self.model, self.layout
        prompts = max(1, workload.sampling_batch_size // workload.drawn_per_prompt)
        prompts = min(prompts, -(-workload.prompts_per_round // layout.data)) if workload.spec.rounds else prompts
        rows = prompts * workload.drawn_per_prompt
        heads = max(1, model.num_query_groups // layout.tensor)
        entry = FLOAT32 if self.impl == "local" else self.shapes.element
        # The last token of a response is never fed back.
        places = prompts * workload.prompt_length + rows * (workload.response_length - 1)
        layer_cache = 2 * places * heads * model.kv_channels * entry
        cache = layer_cache * pipeline_stage_layers(model, layout, self.pipeline_stage)
        prefill = self._prefill(prompts)
        scores = rows * (model.num_attention_heads // layout.tensor) * FLOAT32
        scores *= workload.prompt_length + workload.response_length
        copied = 0 if entry == FLOAT32 else layer_cache * FLOAT32 // entry
        decode = 3 * scores + copied
        logits = self._sampling_logits(rows) if self.is_last else 0
        if logits > max(prefill, decode):
            return self._memory("sampling", kv_cache=cache, logprob_workspace=logits)
        return self._memory("sampling", kv_cache=cache, activations=max(prefill, decode))

    def _validation(self) -> Memory:
        """Memory while full batches of held-out prompts are answered once each. Their caches share no prompt."""
        single = dataclasses.replace(
            self.workload,
            samples_per_prompt=1,
            candidates_per_prompt=None,
            prompts_per_round=self.workload.sampling_batch_size * self.layout.data,
        )
        return dataclasses.replace(dataclasses.replace(self, workload=single)._sampling(), phase="validation")

    def _prefill(self, prompts: int) -> int:
        """What the pass over the prompts of a batch holds."""
        tokens = prompts * self.workload.prompt_length
        shard = -(-tokens // self.layout.sequence_shards)
        shapes = Shapes(
            model=self.model,
            element=self.shapes.element,
            impl=self.impl,
            tokens=tokens,
            shard=shard,
            targets=0,
            key_tokens=tokens,
            tensor=self.layout.tensor,
        )
        return shapes.rotation + layer_forward(shapes) + shapes.gathered

    def _sampling_logits(self, rows: int) -> int:
        """This rank's float32 logits of every row, beside the product of lower precision that they are copied from."""
        product = self.shapes.element if self.shapes.element < FLOAT32 else 0
        return rows * padded_vocab_size(self.model, self.layout.tensor) // self.layout.tensor * (FLOAT32 + product)
