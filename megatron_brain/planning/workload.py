"""What a run computes (`Workload`) and how it is laid out over GPUs (`Layout`): the inputs of every estimate."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.checks import data_parallel_size
from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Head, StageSpec, spec_of, stage_spec

Precision = Literal["fp32", "bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How model and batch are split over ranks, and what a forward pass keeps."""

    tensor: int = 1
    """Tensor-parallel size."""

    pipeline: int = 1
    """Pipeline stages."""

    virtual_pipeline: int = 1
    """Chunks of a pipeline stage; 1: not interleaved."""

    data: int = 1
    """Data-parallel replicas."""

    context: int = 1
    """Context-parallel size. Our runs do not have it; only published results are computed with it."""

    sequence_parallel: bool = False
    """Whether norms and the residual stream are split along the sequence over the tensor-parallel ranks."""

    micro_batch_size: int = 1
    """Samples of one forward-backward pass: packed sequences (sft), pairs (reward), groups (brain)."""

    num_micro_batches: int = 1
    """Micro-batches of one replica in one optimizer step."""

    max_tokens_per_micro_batch: int | None = None
    """Token budget of a micro-batch; None: `micro_batch_size` decides."""

    packed_multiple: int = 1
    """Micro-batches are padded to a multiple of this many tokens, besides the tensor-parallel size."""

    recompute: Recompute = "none"
    """What the backward pass computes again: nothing, the core attention, or whole layers."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """How `full` chooses layers, see --recompute-method."""

    recompute_num_layers: int = 1
    """Layers that are recomputed together (uniform), or recomputed layers of a model chunk (block)."""

    distributed_optimizer: bool = False
    """Whether optimizer state is split over replicas."""

    overlap_grad_reduce: bool = False
    """Whether gradients are reduced during the backward pass."""

    overlap_param_gather: bool = False
    """Whether updated weights are gathered during the forward pass."""

    gradient_accumulation_fusion: bool = False
    """Whether the matrix product that makes a weight gradient also adds it to the float32 buffer."""

    overlap_tensor_comm: bool = False
    """Whether tensor-parallel communication is overlapped with matrix products (Megatron-LM's --tp-comm-overlap). Our
    runs do not have it; only published results are computed with it."""

    sharded_weights: bool = False
    """Fully sharded data parallelism. Our runs do not have it; only published results are computed with it."""

    account_for_ends: bool = False
    """Whether embedding and output layer count as one layer each when layers are split over pipeline stages. Only
    published results have it (--account-for-{embedding,loss}-in-pipeline-split of Megatron-LM)."""

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def sequence_shards(self) -> int:
        """Number of ranks over which the residual stream of a micro-batch is split."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


@dataclass(frozen=True, kw_only=True)
class SegmentLength:
    """`length` tokens that attend causally to themselves, and to the `prefix` tokens of another segment."""

    length: int
    prefix: int = 0


@dataclass(frozen=True, kw_only=True)
class ScoringWork:
    """A model that scores but does not train, on the policy's layout."""

    name: str
    """`prior`, `reward`, `baseline` or `proposal`."""

    model: ResolvedModel
    head: Head
    offloaded: bool = False
    """Whether its weights are in host memory while it does not score."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one stage computes with one model. All prompts have one length in the estimate, and all responses."""

    stage: str
    """Name of a registered stage."""

    model: ResolvedModel
    """The model that trains (or that generates), its sizes resolved."""

    prompt_length: int
    """Tokens of a prompt; 0 in sft where every token of a record is predicted."""

    response_length: int
    """Tokens of a response, EOS included."""

    samples_per_prompt: int = 1
    """Responses of a group: 1 in sft, 2 in reward, n in brain and generate."""

    seq_length: int | None = None
    """Length that records are packed into (sft with packing); None: a sample is one group."""

    global_batch_size: int = 1
    """Samples of one optimizer step over all replicas."""

    shared_prefix: bool = True
    """Whether a prompt is computed once for all its responses."""

    precision: Precision = "bf16"
    """Precision of the linear maps of the layers; with `fp8` everything else is `bf16`."""

    fp8_param_gather: bool = False
    """Whether weights of linear maps are kept and gathered in FP8 alone."""

    bf16_layers: tuple[int, int] = (0, 0)
    """Numbers of layers at the start and at the end that are not in FP8."""

    two_pass: bool = False
    """brain: whether a separate forward pass gives beta, so that gradients are known beforehand."""

    prompts_per_round: int = 1
    """brain: prompts sampled and scored before the policy trains on them."""

    steps_per_round: int = 1
    """brain: optimizer steps between refreshes of the proposal."""

    samples_responses: bool = True
    """brain: whether responses are drawn, not given or read from files."""

    drawn_by_servers: bool = False
    """Whether vLLM servers on other GPUs draw the responses, not the GPUs of the run."""

    rounds_ahead: int = 0
    """brain: rounds that the servers draw while the policy trains on the one before."""

    candidates_per_prompt: int | None = None
    """brain: responses drawn for a prompt, where the policy trains on some of them only; None: on all."""

    answers_held_out: bool = False
    """brain: whether validations draw one answer at a time to each held-out prompt."""

    sampling_batch_size: int = 64
    """Responses decoded at one time on one replica."""

    frozen_models: tuple[ScoringWork, ...] = ()
    """Prior, reward model, baseline, and with rounds ahead the policy that drew the round (`proposal`)."""

    @property
    def spec(self) -> StageSpec:
        """The stage's descriptor."""
        return stage_spec(self.stage)

    @property
    def generates(self) -> bool:
        """Whether the stage draws responses."""
        return "sampling" in self.spec.sections and self.samples_responses

    @property
    def draws_on_its_gpus(self) -> bool:
        """Whether the GPUs of the run draw the responses."""
        return self.generates and not self.drawn_by_servers

    @property
    def drawn_per_prompt(self) -> int:
        """Responses drawn for a prompt."""
        return self.candidates_per_prompt or self.samples_per_prompt

    @property
    def head(self) -> Head:
        """Head of the model that trains, or that generates."""
        return self.spec.head

    @property
    def known_gradient(self) -> bool:
        """Whether log-probabilities are computed with a gradient known beforehand: three products instead of four."""
        return self.spec.linear_loss or self.two_pass

    @property
    def records_per_sample(self) -> int:
        """Groups in a sample: more than one where records are packed."""
        if self.seq_length is None:
            return 1
        return max(1, self.seq_length // (self.prompt_length + self.response_length))

    @functools.cached_property
    def segments(self) -> tuple[SegmentLength, ...]:
        """Segments of one sample, without padding."""
        prompt, response, n = self.prompt_length, self.response_length, self.samples_per_prompt
        if n > 1 and self.shared_prefix:
            group = (SegmentLength(length=prompt), *[SegmentLength(length=response, prefix=prompt)] * n)
        else:
            group = (SegmentLength(length=prompt + response),) * n
        return group * self.records_per_sample

    @functools.cached_property
    def sample_tokens(self) -> int:
        """Tokens that are computed for one sample, padding to `seq_length` included."""
        if self.seq_length is not None:
            return self.seq_length
        return sum(segment.length for segment in self.segments)

    @property
    def sample_targets(self) -> int:
        """Positions of one sample whose next token's log-probability is computed: the response tokens."""
        return self.records_per_sample * self.samples_per_prompt * self.response_length

    @property
    def responses(self) -> int:
        """Responses of one sample."""
        return self.records_per_sample * self.samples_per_prompt

    @property
    def step_tokens(self) -> int:
        """Tokens of the global batch for the throughput: each prompt counts once in any case; no padding."""
        group = self.prompt_length + self.samples_per_prompt * self.response_length
        return self.global_batch_size * self.records_per_sample * group

    def micro_batch_tokens(self, layout: Layout) -> int:
        """Tokens of one micro-batch, padding included."""
        tokens = self.sample_tokens * layout.micro_batch_size
        if layout.max_tokens_per_micro_batch is not None:
            tokens = min(tokens, layout.max_tokens_per_micro_batch)
        unit = math.lcm(layout.tensor, layout.packed_multiple)
        return -(-tokens // unit) * unit


def from_run_config(
    config: RunConfig, world_size: int, scoring: Mapping[str, ResolvedModel] | None = None
) -> tuple[Workload, Layout]:
    """What a run computes, and its layout, from its configuration. Unknown lengths are the longest possible.

    Args:
        config: with the model's sizes resolved, checked by `validate_layout`.
        world_size: number of processes.
        scoring: sizes of scoring models by name; the others are taken to have the policy's sizes.
    """
    assert isinstance(config.model, ResolvedModel)
    prompt, response = _lengths(config)
    model, fp8 = config.model, config.fp8
    work = spec_of(config).work(config)
    by_servers = work.draws and config.engine.engine == "vllm"
    workload = Workload(
        stage=config.stage,
        model=model,
        prompt_length=prompt,
        response_length=response,
        samples_per_prompt=work.responses_per_prompt,
        seq_length=config.data.seq_length if work.packed else None,
        global_batch_size=config.training.global_batch_size,
        shared_prefix=config.training.shared_prefix,
        precision="fp8" if fp8.fp8_format else "bf16" if model.bf16 else "fp32",
        fp8_param_gather=fp8.fp8_param_gather,
        bf16_layers=fp8.layers_in_bf16,
        two_pass=config.brain.two_pass,
        prompts_per_round=config.brain.prompts_per_round,
        steps_per_round=spec_of(config).length(config, None).steps_per_round or 1,
        samples_responses=work.draws,
        drawn_by_servers=by_servers,
        rounds_ahead=config.brain.rounds_ahead,
        candidates_per_prompt=work.candidates_per_prompt,
        answers_held_out=work.answers_held_out,
        sampling_batch_size=config.sampling.sampling_batch_size,
        frozen_models=tuple(
            ScoringWork(name=m.name, model=(scoring or {}).get(m.name, model), head=m.head, offloaded=m.offloaded)
            for m in work.scoring
        )
        + _copy_that_drew(config, model),
    )
    return workload, _layout(config, workload, world_size)


def _copy_that_drew(config: RunConfig, model: ResolvedModel) -> tuple[ScoringWork, ...]:
    """With rounds ahead, a copy in host memory of the policy that drew a round, which comes to the GPU for log q'."""
    if not config.brain.rounds_ahead:
        return ()
    return (ScoringWork(name="proposal", model=model, head="policy", offloaded=True),)


def _lengths(config: RunConfig) -> tuple[int, int]:
    """Longest prompt and response that the settings allow together."""
    total, prompt, response = config.data.seq_length, config.data.max_prompt_length, config.data.max_response_length
    if spec_of(config).work(config).draws:
        response = config.sampling.max_new_tokens
    if response is None:
        response = total - (prompt or 0)
    return total - response if prompt is None else min(prompt, total - response), response


def _layout(config: RunConfig, workload: Workload, world_size: int) -> Layout:
    parallel, training, optimizer, model = config.parallel, config.training, config.optimizer, workload.model
    data = data_parallel_size(config, world_size)
    chunk, pipeline = parallel.num_layers_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    layout = Layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=pipeline,
        virtual_pipeline=1 if chunk is None else model.num_layers // pipeline // chunk,
        data=data,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=training.micro_batch_size,
        num_micro_batches=max(1, training.global_batch_size // (training.micro_batch_size * data)),
        packed_multiple=config.fp8.packed_multiple(parallel),
        recompute=model.recompute_granularity or "none",
        recompute_method=model.recompute_method or "uniform",
        recompute_num_layers=model.recompute_num_layers or 1,
        distributed_optimizer=optimizer.use_distributed_optimizer,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
    )
    budget = training.max_tokens_per_micro_batch
    if budget is None:
        return layout
    # A micro-batch has as many groups as the budget holds; a larger group takes several micro-batches.
    mine = training.global_batch_size / data
    unit = pipeline if layout.virtual_pipeline > 1 else 1
    per_batch = max(1, budget // workload.sample_tokens)
    cuts = max(1, -(-workload.sample_tokens // budget))
    count = -int(-mine * cuts // per_batch)
    return dataclasses.replace(
        layout,
        micro_batch_size=per_batch,
        num_micro_batches=-(-count // unit) * unit,
        max_tokens_per_micro_batch=budget,
    )
