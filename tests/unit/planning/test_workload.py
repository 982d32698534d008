"""A workload is what a run's batches are."""

import dataclasses
import subprocess
import sys

import pytest

from megatron_brain.config.loader import config_from_dict
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.planning.presets import preset
from megatron_brain.planning.workload import from_run_config
from megatron_brain.training.schedule import pack_micro_batches

MODEL = preset("llama3-8b")


def of_run(stage, world_size=8, **settings):
    config = config_from_dict(stage, settings)
    return from_run_config(dataclasses.replace(config, model=dataclasses.replace(MODEL, bf16=True)), world_size)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("stage", "responses"), [("brain", 3), ("reward", 2)])
def test_a_sample_has_the_tokens_targets_and_segments_of_a_packed_group(stage, responses, shared):
    lengths = {"brain": {"max_new_tokens": 4, "samples_per_prompt": 3}, "reward": {"max_response_length": 4}}[stage]
    workload, _ = of_run(stage, seq_length=9, max_prompt_length=5, shared_prefix=shared, **lengths)
    batch = pack_groups([Group(prompt=(1,) * 5, responses=((2,) * 4,) * responses)], shared_prefix=shared)
    assert workload.sample_tokens == batch.tokens.numel()
    assert workload.sample_targets == batch.targets.numel()
    assert [(s.length, s.prefix) for s in workload.segments] == [(s.length, s.prefix_length) for s in batch.segments]
    assert workload.step_tokens == 8 * (5 + responses * 4)


def test_packed_sft_fills_sequences_with_whole_records():
    workload, _ = of_run("sft", seq_length=100, max_prompt_length=20, max_response_length=10)
    assert workload.records_per_sample == 3
    assert (workload.sample_tokens, workload.sample_targets) == (100, 30)
    assert workload.step_tokens == 8 * 3 * 30, "padding is no throughput"
    single, _ = of_run("sft", seq_length=100, max_prompt_length=20, max_response_length=10, packing=False)
    assert (single.sample_tokens, single.sample_targets) == (30, 10)


def test_lengths_that_are_not_set_are_the_longest_allowed():
    workload, _ = of_run("brain", seq_length=100, max_new_tokens=30)
    assert (workload.prompt_length, workload.response_length) == (70, 30)
    workload, _ = of_run("sft", seq_length=100)
    assert (workload.prompt_length, workload.response_length, workload.sample_targets) == (0, 100, 100)


def test_lengths_are_never_longer_together_than_a_sequence():
    workload, _ = of_run("reward", seq_length=100, max_prompt_length=80, max_response_length=60)
    assert (workload.prompt_length, workload.response_length) == (40, 60)


def test_responses_that_are_read_from_files_are_not_limited_by_what_would_be_drawn():
    workload, _ = of_run("brain", seq_length=100, max_prompt_length=40, max_new_tokens=10, rollout_data="r")
    assert (workload.prompt_length, workload.response_length) == (40, 60)


def test_of_rejection_sampling_more_responses_are_drawn_than_trained_on():
    flags = {"objective": "dpo", "samples_per_prompt": 4, "reward_load": "r", "refresh_proposal": False}
    workload, _ = of_run("brain", seq_length=100, max_new_tokens=30, **flags, responses="rso", rso_candidates=16)
    assert workload.generates and (workload.samples_per_prompt, workload.drawn_per_prompt) == (4, 16)
    assert workload.response_length == 30
    plain, _ = of_run("brain", seq_length=100, max_new_tokens=30, **flags)
    assert plain.generates and plain.drawn_per_prompt == 4


def test_layout_of_a_run():
    workload, layout = of_run(
        "brain",
        world_size=64,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=2,
        sequence_parallel=True,
        micro_batch_size=2,
        global_batch_size=64,
        prompts_per_round=128,
        use_distributed_optimizer=True,
        reward_load="reward",
        offload_prior=True,
        seq_length=640,
        max_new_tokens=128,
    )
    assert (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.data) == (4, 4, 4, 4)
    assert layout.world_size == 64
    assert (layout.micro_batch_size, layout.num_micro_batches) == (2, 8)
    assert layout.distributed_optimizer and not layout.overlap_grad_reduce
    assert workload.steps_per_round == 2
    assert [(m.name, m.head, m.offloaded) for m in workload.frozen_models] == [
        ("prior", "policy", True),
        ("reward", "reward", False),
    ]


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "fp8"), [(1, False, False), (3, False, False), (2, True, True)]
)
def test_micro_batches_are_padded_as_a_run_pads_them(tensor, sequence_parallel, fp8):
    settings = {"tensor_model_parallel_size": tensor, "sequence_parallel": sequence_parallel}
    if fp8:
        settings |= {"fp8_format": "hybrid", "transformer_impl": "transformer_engine"}
    workload, layout = of_run("brain", 6, seq_length=9, max_prompt_length=5, max_new_tokens=4, **settings)

    class Parallel:
        tp_size, pp_size = tensor, 1

    group = Group(prompt=(1,) * 5, responses=((2,) * 4,) * 8)
    [batch] = pack_micro_batches([[group]], Parallel, shared_prefix=True, multiple_of=32 if fp8 else 1)
    assert workload.micro_batch_tokens(layout) == batch.tokens.numel()


def test_a_token_budget_packs_groups_or_cuts_them():
    """A group has 5 + 8 x 4 = 37 tokens; a replica gets 4."""
    lengths = {"seq_length": 9, "max_prompt_length": 5, "max_new_tokens": 4, "global_batch_size": 32}
    workload, layout = of_run("brain", max_tokens_per_micro_batch=80, **lengths)
    assert (layout.micro_batch_size, layout.num_micro_batches) == (2, 2)
    workload, layout = of_run("brain", max_tokens_per_micro_batch=20, **lengths)
    assert layout.num_micro_batches == 8
    assert workload.micro_batch_tokens(layout) == 20


def test_planning_needs_no_torch():
    code = "import sys, megatron_brain.planning.search; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
