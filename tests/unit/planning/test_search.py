"""The planner refuses what a run refuses, in the same words, and orders what is left."""

import dataclasses

import pytest

from megatron_brain.config.checks import require, validate_layout
from megatron_brain.config.loader import config_from_dict, load_config
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.planning.machine import GIB, MACHINES
from megatron_brain.planning.memory import estimate_memory
from megatron_brain.planning.presets import preset
from megatron_brain.planning.question import Question
from megatron_brain.planning.report import as_json, flags
from megatron_brain.planning.rounds import step_time
from megatron_brain.planning.search import search
from megatron_brain.planning.servers import drawing_seconds
from megatron_brain.planning.workload import from_run_config

NO_BRAIN = {"samples_per_prompt": 8}
"""What a question of another stage leaves at its default."""
LENGTHS = {"prompt_length": 128, "response_length": 128}
FILES = ["--train-data", "d", "--load", "p", "--finetune", "--reward-load", "r"]


def question(**changes):
    sizes = {"stage": "brain", "model": preset("llama3.2-1b"), "machine": MACHINES["h100"], "gpus": 12}
    return Question(**sizes | {"global_batch_size": 24, "samples_per_prompt": 4} | LENGTHS | changes)


@pytest.fixture(scope="module")
def answer():
    return search(question())


def as_run(asked, settings):
    """The configuration of a run with these flags, its sizes resolved."""
    config = load_config(asked.stage, [*flags(settings), *FILES])
    return dataclasses.replace(config, model=resolve(config.model, architecture(asked.model), "the test"))


def test_every_reason_is_what_a_run_says(answer):
    _, rejections = answer
    compared = 0
    for rejection in rejections:
        if rejection.kind.startswith(("memory on", "tensor_model_parallel_size=N crosses nodes")):
            continue
        with pytest.raises(ConfigError) as error:
            validate_layout(as_run(question(), rejection.settings), 12, question().model)
        assert str(error.value) == rejection.reason
        compared += 1
    assert compared > 20
    assert len({rejection.kind for rejection in rejections}) >= 4


def test_flags_of_every_plan_start_a_run_with_that_layout(answer):
    plans, _ = answer
    assert len(plans) > 20
    for plan in plans:
        config = as_run(question(), plan.settings)
        validate_layout(config, 12, config.model)
        workload, layout = from_run_config(config, 12)
        assert layout == plan.layout
        assert workload.sampling_batch_size == plan.workload.sampling_batch_size
        assert (workload.sample_tokens, workload.sample_targets) == (128 + 4 * 128, 4 * 128)


def test_estimates_are_those_of_memory_and_time_and_fit(answer):
    plans, _ = answer
    for plan in plans[::5]:
        assert plan.memory == estimate_memory(plan.workload, plan.layout)
        assert plan.memory.total <= MACHINES["h100"].memory_bytes - 6 * GIB
        assert plan.time == step_time(plan.workload, plan.layout, MACHINES["h100"])
        assert plan.tokens_per_second == pytest.approx(24 * 640 / plan.time.total / 12)


def test_the_fastest_is_first(answer):
    speeds = [plan.tokens_per_second for plan in answer[0]]
    assert speeds == sorted(speeds, reverse=True)


def test_tensor_parallelism_stays_inside_of_a_node():
    node_of_four = dataclasses.replace(MACHINES["h100"], gpus_per_node=4)
    plans, rejections = search(question(machine=node_of_four, gpus=16, global_batch_size=16))
    assert max(plan.layout.tensor for plan in plans) == 4
    assert any("crosses nodes of 4 GPUs" in rejection.reason for rejection in rejections)


def test_tensor_parallelism_does_not_straddle_nodes():
    smollm = {"model": preset("smollm2-135m"), "global_batch_size": 24}
    assert 3 in {plan.layout.tensor for plan in search(question(gpus=6, **smollm))[0]}
    assert {plan.layout.tensor for plan in search(question(gpus=24, **smollm))[0]} == {1}


def test_recomputation_and_fewer_samples_at_once_are_taken_only_where_memory_asks_for_them():
    one = {"gpus": 1, "global_batch_size": 64, "prompt_length": 4096, "response_length": 2048, "samples_per_prompt": 2}
    roomy, _ = search(question(**one, machine=dataclasses.replace(MACHINES["h100"], memory_bytes=2**50)))
    assert {plan.layout.recompute for plan in roomy} == {"none"}
    assert {plan.workload.sampling_batch_size for plan in roomy} == {128}
    tight, _ = search(question(**one, machine=dataclasses.replace(MACHINES["h100"], memory_bytes=40 * GIB)))
    [smallest] = [plan for plan in tight if plan.layout.micro_batch_size == 1]
    assert smallest.layout.recompute == "full"
    assert smallest.workload.sampling_batch_size < 128
    assert smallest.settings["recompute_granularity"] == "full"


def test_a_choice_that_is_made_is_kept():
    plans, _ = search(question(recompute="full", sampling_batch_size=8, distributed_optimizer=False))
    assert {plan.layout.recompute for plan in plans} == {"full"}
    assert {plan.workload.sampling_batch_size for plan in plans} == {8}
    assert not any(plan.layout.distributed_optimizer for plan in plans)


def test_what_does_not_fit_says_how_much_it_needs():
    plans, rejections = search(question(gpus=1, model=preset("llama3-8b")))
    assert not plans
    assert {rejection.kind for rejection in rejections} == {"memory on the busiest GPU exceeds what there is"}
    assert "73.0 GiB are there" in rejections[0].reason


@pytest.mark.parametrize("stage", ["sft", "reward", "brain"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_stage_and_precision_has_plans_that_a_run_accepts(stage, precision):
    asked = question(stage=stage, precision=precision, gpus=8, prompt_length=129, **NO_BRAIN)
    plans, _ = search(asked)
    assert plans
    best = plans[0].settings
    config = config_from_dict(stage, best | {"train_data": "d", "load": "p", "finetune": True})
    if stage == "brain":
        config.scoring.reward_load = "r"
    require(config)
    assert (config.fp8.fp8_format is not None) == (precision == "fp8")


def test_a_smaller_reward_model_costs_less():
    half = dataclasses.replace(question().model, num_layers=8)
    small, same = (search(question(reward_model=model))[0][0] for model in (half, None))
    assert small.layout == same.layout
    assert small.time.scoring < same.time.scoring
    assert max(m.frozen_models for m in small.phases) < max(m.frozen_models for m in same.phases)


def test_a_reward_model_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=49152, the policy has 128256"):
        question(reward_model=preset("smollm2-135m"))


def test_a_reward_model_that_a_layout_cannot_hold_is_refused():
    plans, rejections = search(question(gpus=8, reward_model=preset("llama3.2-3b")))
    assert {plan.layout.pipeline for plan in plans} == {1, 2, 4}, "28 layers"
    assert any(r.reason.startswith("reward model, pipeline_model_parallel_size=8 ") for r in rejections)


def test_padding_is_no_throughput():
    """130 tokens take 144 on one GPU of FP8 and 256 on eight: in both as much is learned."""
    plans, _ = search(question(stage="sft", gpus=8, precision="fp8", prompt_length=100, response_length=30, **NO_BRAIN))
    assert {plan.workload.seq_length for plan in plans} >= {144, 256}
    assert {round(plan.tokens_per_second * plan.time.total * 8 / 24) for plan in plans} == {130}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "reward", "seq_length": 512}, "packs records of --stage sft, not reward"),
        ({"stage": "brain", "seq_length": 512}, "packs records of --stage sft, not brain"),
        ({"stage": "sft", "seq_length": 255}, "holds no record .*: use 256 or more"),
    ],
)
def test_a_length_that_records_are_not_packed_into_is_refused(changes, said):
    of_brain = {} if changes["stage"] == "brain" else {"samples_per_prompt": 8}
    with pytest.raises(ConfigError, match=said):
        question(**changes, **of_brain)


@pytest.mark.parametrize(
    "wrong", [{"two_pass": True}, {"samples_per_prompt": 4}, {"reward_model": preset("llama3-8b")}]
)
def test_settings_of_brain_are_refused_by_other_stages(wrong):
    with pytest.raises(ConfigError, match="is for --stage brain, not sft"):
        question(**{"stage": "sft", **NO_BRAIN, **wrong})


def test_sequences_without_prompts_are_of_sft_alone():
    assert search(question(stage="sft", prompt_length=0, **NO_BRAIN))[0]
    for wrong in ({"stage": "brain"}, {"stage": "sft", "seq_length": 4096}):
        with pytest.raises(ConfigError, match="prompt_length=0"):
            question(prompt_length=0, **NO_BRAIN, **wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds_ahead": 1}, "rounds_ahead=1 is for servers: give engine_gpus"),
        ({"engine_gpus": 4, "engine_tensor_parallel": 3}, "engine_tensor_parallel=3: .* allow 1, 2, 4, 8"),
        ({"engine_gpus": 6, "engine_tensor_parallel": 4}, "engine_gpus=6 is not a multiple"),
        ({"engine_gpus": 4, "sampling_batch_size": 8}, "leave one of them out"),
        ({"engine_gpus": 4, "stage": "sft", **NO_BRAIN}, "engine_gpus=4 is for --stage brain, not sft"),
    ],
)
def test_questions_about_servers_that_have_no_answer_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        question(**wrong)


def test_plans_with_servers_are_runs_that_need_no_memory_to_sample_and_count_all_gpus():
    asked = question(engine_gpus=4, rounds_ahead=1)
    plans, _ = search(asked)
    files = ["--engine-url", "http://a:1", "--engine-sync-dir", "s"]
    best = plans[0]
    config = load_config(asked.stage, [*flags(best.settings), *FILES, *files])
    assert (config.engine.engine, config.brain.rounds_ahead) == ("vllm", 1)
    assert config.engine.engine_concurrency == best.engine.at_one_time
    assert best.engine.servers.gpus == 4
    assert best.tokens_per_second == pytest.approx(best.workload.step_tokens / best.time.total / 16)
    assert all(memory.kv_cache == 0 and memory.phase != "sampling" for plan in plans for memory in plan.phases)
    assert as_json(asked, "m", plans, [])["layouts"][0]["engine"]["servers"] == vars(best.engine.servers)


def test_enough_servers_are_the_fewest_that_keep_up_with_training():
    plans, _ = search(question(engine_gpus="auto", rounds_ahead=1, engine_tensor_parallel=1, prompts_per_round=240))
    for plan in plans:
        engine = plan.engine
        assert engine.servers == engine.enough and engine.drawing <= engine.training
        assert plan.time.sampling == 0
        if engine.servers.count > 1:
            fewer = dataclasses.replace(engine.servers, count=engine.servers.count - 1)
            assert drawing_seconds(plan.workload, fewer, MACHINES["h100"]) > engine.training
    assert any(plan.engine.servers.count > 1 for plan in plans)


def test_json_report_keeps_its_keys(answer):
    """Changing these breaks who reads the report: raise report.FORMAT with them."""
    report = as_json(question(), "llama3.2-1b", *answer)
    assert report["format"] == 2
    assert set(report) == {"format", "question", "machine", "layouts", "rejected"}
    layout = report["layouts"][0]
    assert set(layout) == {
        "layout",
        "micro_batch_tokens",
        "sampling_batch_size",
        "memory",
        "seconds",
        "tokens_per_second_per_gpu",
        "engine",
        "flags",
    }
    assert set(layout["layout"]) == {
        "tensor",
        "pipeline",
        "virtual_pipeline",
        "data",
        "micro_batch_size",
        "num_micro_batches",
        "recompute",
    }
    assert set(layout["seconds"]) == {
        "compute",
        "tensor_communication",
        "pipeline_communication",
        "bubble",
        "data_communication",
        "optimizer",
        "sampling",
        "sync",
        "scoring",
        "total",
    }
    assert {
        "weights",
        "gradients",
        "optimizer",
        "frozen_models",
        "activations",
        "logprob_workspace",
        "kv_cache",
    } <= set(layout["memory"]["largest"])
    assert layout["memory"]["peak"]["total"] == answer[0][0].memory.total
    assert {"phase", "pipeline_stage", "total"} <= set(layout["memory"]["peak"])
    assert set(report["rejected"][0]) == {"kind", "reason", "settings"}
    assert len(report["layouts"]) + len(report["rejected"]) == sum(map(len, answer))
