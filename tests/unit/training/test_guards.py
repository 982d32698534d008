"""Steps with numbers that are not finite or stand out: what is applied, skipped, told, kept and replayed."""

import contextlib
import json
import logging
import math

import pytest
import torch
from helpers.assets import size_flags, write_assets

from megatron_brain.config.guards import GuardConfig
from megatron_brain.config.loader import load_config
from megatron_brain.data.groups import Group, KnownLoss, pack_groups
from megatron_brain.errors import ConfigError
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training import guards
from megatron_brain.training import trainer as trainer_module
from megatron_brain.training.replicas import bit_sum, check_replicas
from megatron_brain.training.reproduction import Reproduction, read_reproduction, run_alone, write_reproduction
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer

FOUND = Reproduction(
    iteration=12,
    stage="brain",
    seed=1,
    layout={"pipeline": 1, "tensor": 2, "data": 2},
    rank=3,
    pipeline_rank=0,
    tensor_rank=1,
    data_rank=1,
    micro_batch=2,
    other_micro_batches=(3,),
    loss=math.nan,
    grad_norm=math.inf,
    nonfinite_parameters=("decoder.final_layernorm.weight",),
    shared_prefix=True,
    length=12,
    temperature=0.7,
    known_gradient=(0.1, -0.25, math.nan, 0.0, 1e-30),
    known_loss=KnownLoss(loss_sum=math.nan, count=1, mean_sums={"ess_alpha": 1.5}, maxima={"max_ratio": math.inf}),
    groups=(
        Group(
            prompt=(1, 2),
            responses=((3, 4, 5), (6, 7)),
            loss_masks=((True, False, True), (True, True)),
            values={"log_alpha": (-math.inf, 0.1), "finished": (1.0, 0.0)},
            record_id="prompts.jsonl:7",
        ),
    ),
)


@pytest.fixture(scope="module")
def make(single, tmp_path_factory):
    """Makes a trainer of a tiny policy on two micro-batches a step."""
    assets = tmp_path_factory.mktemp("assets")
    write_assets(assets)

    def make(*extra):
        flags = [
            *("--train-data", str(assets / "sft.jsonl"), "--seq-length", "32", "--train-iters", "50", "--no-progress"),
            *("--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-2", "--lr-warmup-iters", "20"),
            *("--tokenizer-model", str(assets / "tokenizer"), *size_flags(num_layers=1), *extra),
        ]
        run = open_run(load_config("sft", flags))
        return Trainer(run, SFTStage(run))

    return make


def step(trainer):
    return trainer.step(trainer.stage.micro_batches(trainer))


def scale_losses(trainer, factors):
    """Multiply the loss of the next steps' micro-batches, one factor a step."""
    plain, stage = type(trainer.stage).loss, trainer.stage
    iteration = trainer.iteration

    def loss(output, batch):
        result = plain(stage, output, batch)
        place = trainer.iteration - iteration
        if place < len(factors):
            object.__setattr__(result, "loss_sum", result.loss_sum * factors[place])
        return result

    stage.loss = loss


def state(trainer):
    moments = [v for s in trainer.optimizer.chained_optimizers[0].optimizer.state.values() for v in s.values()]
    return [t.detach().clone() for t in (*trainer.gathered_chunks()[0].parameters(), *moments) if torch.is_tensor(t)]


def gradients_are_zero(trainer):
    return all(p.grad is None and not p.main_grad.any() for p in trainer.gathered_chunks()[0].parameters())


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def poison_one_record(trainer):
    """Make the embedding of a token NaN that only one micro-batch has; its number and the record with the token."""
    micro_batches = trainer.stage.micro_batches(trainer)
    tokens = [{t for group in groups for t in (*group.prompt, *group.responses[0][:-1])} for groups in micro_batches]
    token = min(tokens[1] - tokens[0])
    trainer.gathered_chunks()[0].embedding.word_embeddings.weight.data[token] = math.nan
    record = next(g.record_id for g in micro_batches[1] if token in (*g.prompt, *g.responses[0][:-1]))
    return 1, record


@pytest.mark.parametrize("extra", [[], ["--bf16"]])
def test_a_skipped_step_moves_the_position_and_nothing_else(make, extra, monkeypatch):
    trainer = make("--on-nan", "skip", *extra)
    step(trainer)
    before = state(trainer)
    scale_losses(trainer, [math.nan])
    with monkeypatch.context() as patch:
        patch.setattr(trainer.stage, "before_update", lambda *_: pytest.fail("before_update of a step not applied"))
        metrics = step(trainer)
    assert same(state(trainer), before)
    assert gradients_are_zero(trainer)
    assert math.isnan(metrics["loss"]) and metrics["skipped_steps"] == 1 and trainer.iteration == 2
    assert metrics["lr"] == pytest.approx(1e-2 * 1 / 20)
    after = step(trainer)
    assert after["lr"] == pytest.approx(1e-2 * 2 / 20) and after["skipped_steps"] == 1
    assert not same(state(trainer), before)


def test_a_skipped_step_moves_no_scales_of_fp8(make, monkeypatch):
    # Layers that keep scales need kernels. This scale moves where theirs do: after every pass with gradients.
    scale = torch.ones(1)

    @contextlib.contextmanager
    def one_step(chunks):
        yield
        scale.mul_(2)

    monkeypatch.setattr(fp8_state, "scales", lambda chunks: {"decoder.layers.0.mlp.linear_fc1.forward.scale": scale})
    monkeypatch.setattr(fp8_state, "one_step", one_step)
    trainer = make("--on-nan", "skip")
    scale_losses(trainer, [1.0, math.nan, 1.0])
    seen = []
    for _ in range(3):
        step(trainer)
        seen.append(scale.item())
    assert seen == [2.0, 2.0, 4.0]


def test_a_step_that_is_not_finite_stops_the_run_by_default_with_untouched_weights(make):
    trainer = make("--untie-embeddings-and-output-weights")
    step(trainer)
    number, record = poison_one_record(trainer)
    before = [p.detach().nan_to_num().clone() for p in trainer.gathered_chunks()[0].parameters()]
    with pytest.raises(FloatingPointError) as error:
        step(trainer)
    text = str(error.value)
    assert f"step 2: loss nan, gradient norm nan. Global rank 0 (pipeline 0, tensor 0, data 0), micro-batch {number}: "
    assert f"micro-batch {number}: loss nan, gradient not finite in embedding.word_embeddings.weight, " in text
    assert record in text and "neither --save nor --tensorboard-dir is set" in text
    assert same([p.detach().nan_to_num() for p in trainer.gathered_chunks()[0].parameters()], before)


def test_the_reproduction_file_gives_the_loss_that_is_not_finite_again(make, tmp_path):
    trainer = make("--untie-embeddings-and-output-weights", "--tensorboard-dir", str(tmp_path))
    number, record = poison_one_record(trainer)
    with pytest.raises(FloatingPointError, match="iter_0000001_rank_00000.json"):
        step(trainer)
    trainer.logger.close()

    path = tmp_path / "nonfinite" / "iter_0000001_rank_00000.json"
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    found = read_reproduction(path)
    assert (found.iteration, found.micro_batch, found.stage, found.seed) == (1, number, "sft", 1234)
    assert record in [group.record_id for group in found.groups]
    assert math.isnan(found.loss) and math.isnan(found.grad_norm)

    again = make("--untie-embeddings-and-output-weights")
    healthy = run_alone(again.wrapped, found.batch(), again.stage.loss, again.parallel)
    assert healthy.is_finite and healthy.loss > 0 and gradients_are_zero(again)
    poison_one_record(again)
    replayed = run_alone(again.wrapped, found.batch(), again.stage.loss, again.parallel)
    assert math.isnan(replayed.loss) and replayed.nonfinite_parameters == found.nonfinite_parameters


def test_a_reproduction_file_keeps_every_number_and_the_packed_batch(tmp_path):
    write_reproduction(tmp_path / "found.json", FOUND)
    read = read_reproduction(tmp_path / "found.json")
    assert repr(read) == repr(FOUND)
    batch, plain = read.batch(multiple_of=8), pack_groups(FOUND.groups, shared_prefix=True, length=16)
    assert torch.equal(batch.tokens, plain.tokens) and batch.segments == plain.segments
    assert torch.equal(batch.loss_mask, plain.loss_mask) and batch.temperature == 0.7
    assert repr(batch.known_loss) == repr(FOUND.known_loss)
    assert torch.equal(batch.known_gradient.nan_to_num(9.0), torch.tensor([0.1, -0.25, 9.0, 0.0, 1e-30]))


def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "other.json"
    write_reproduction(path, FOUND)
    damaged = path.read_text().replace('"loss_sum": ', '"loss_sum": "much", "was": ')
    for text in ("{}", "[]", "no json", '{"known_gradient": null}', damaged):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"other\.json: not a reproduction file"):
            read_reproduction(path)


def test_a_full_disk_is_told_and_does_not_hide_what_was_found(make, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(guards, "write_reproduction", full)
    trainer = make("--tensorboard-dir", str(tmp_path))
    scale_losses(trainer, [math.nan])
    with pytest.raises(FloatingPointError, match="micro-batch 0, 1: .*no reproduction file: no space left"):
        step(trainer)


def test_looking_for_the_culprit_leaves_random_generators_alone(make, monkeypatch):
    states = []
    for look in (True, False):
        trainer = make("--on-nan", "skip", "--hidden-dropout", "0.1", "--attention-dropout", "0.1")
        scale_losses(trainer, [math.nan])
        if not look:
            monkeypatch.setattr(trainer.guard, "_find_culprits", lambda *_: "")
        step(trainer)
        states.append(torch.get_rng_state())
        assert step(trainer)["loss"] > 0
    assert torch.equal(*states)


def test_an_overflow_no_micro_batch_has_alone_is_told_as_such(make):
    trainer = make()
    scale_losses(trainer, [1e30])
    with pytest.raises(FloatingPointError, match="loss 5.*e.30, gradient norm inf. No micro-batch run alone"):
        step(trainer)


def test_one_skip_more_than_allowed_in_a_row_stops_with_the_history(make):
    trainer = make("--on-nan", "skip", "--max-consecutive-skips", "2")
    scale_losses(trainer, [math.nan, math.nan, 1.0, math.nan, math.nan, math.nan])
    assert [step(trainer)["skipped_steps"] for _ in range(5)] == [1, 2, 2, 3, 4]
    with pytest.raises(FloatingPointError) as error:
        step(trainer)
    first, *history = str(error.value).splitlines()
    assert first.startswith("3 steps in a row") and "--max-consecutive-skips is 2" in first
    assert [line[:7] for line in history] == ["step 4:", "step 5:", "step 6:"]
    assert all("records" in line for line in history)


def judge(trainer, loss):
    """The guard's verdict on a loss, with the gradients of the trainer's last step."""
    return trainer.guard.inspect(trainer.iteration + 1, loss, [], None, shared_prefix=True).apply


SPIKES = ["--loss-spike-factor", "2", "--loss-spike-window", "3"]


def test_a_loss_spike_is_above_the_factor_times_the_median_of_a_full_window(make):
    trainer = make(*SPIKES, "--on-spike", "skip")
    step(trainer)
    trainer.guard.load_state_dict({"skipped_steps": 0, "skipped_in_a_row": [], "losses": []})
    assert [judge(trainer, loss) for loss in (1.0, 50.0, 2.0)] == [True] * 3, "the window is not full"
    assert judge(trainer, 4.0), "twice the median of 1, 50, 2"
    assert not judge(trainer, 8.1), "more than twice the median of 50, 2, 4"
    assert not judge(trainer, 8.1), "a skipped loss is not in the window"
    assert trainer.guard.skipped_steps == 2
    assert judge(trainer, 8.0)
    assert [judge(trainer, loss) for loss in (-1.0, -1.0, -1.0, 5.0)] == [True] * 4, "no multiple of a median below 0"


def test_a_spike_warns_or_stops_as_told(make, caplog):
    trainer = make(*SPIKES)
    for loss in (1.0, 1.0, 1.0):
        step(trainer)
        trainer.guard._losses[-1] = loss
    with caplog.at_level(logging.WARNING):
        assert judge(trainer, 2.5)
    assert "step 4: loss 2.5" in caplog.text and "--loss-spike-factor 2, median loss 1" in caplog.text
    assert list(trainer.guard._losses) == [1.0, 1.0, 2.5]
    trainer.guard._settings.on_spike = "stop"
    with pytest.raises(FloatingPointError, match="a spike .*The step was not applied"):
        judge(trainer, 2.5)


def test_a_gradient_norm_above_its_limit_is_a_spike(make):
    norm = step(make())["grad_norm"]
    above, below = (make("--on-spike", "skip", "--grad-norm-limit", str(norm * f)) for f in (0.9, 1.1))
    assert step(above)["skipped_steps"] == 1
    assert gradients_are_zero(above)
    assert step(below)["skipped_steps"] == 0


def test_a_guard_goes_on_from_its_saved_state(make):
    trainer = make("--on-nan", "skip", *SPIKES, "--on-spike", "skip", "--max-consecutive-skips", "2")
    scale_losses(trainer, [1.0, 1.0, 1.0, math.nan, 100.0])
    for _ in range(5):
        step(trainer)
    saved = json.loads(json.dumps(trainer.guard.state_dict()))
    resumed = make("--on-nan", "skip", *SPIKES, "--on-spike", "skip", "--max-consecutive-skips", "2")
    step(resumed)
    resumed.guard.load_state_dict(saved)
    assert resumed.guard.state_dict() == trainer.guard.state_dict()
    assert resumed.guard.skipped_steps == 2
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        judge(resumed, 1e6)
    narrow = make("--loss-spike-window", "2").guard
    narrow.load_state_dict(saved)
    assert narrow.state_dict()["losses"] == saved["losses"][-2:]


def test_replicas_are_compared_every_so_many_steps(make, monkeypatch):
    compared = []
    trainer = make("--check-replicas-interval", "2")
    monkeypatch.setattr(trainer_module, "check_replicas", lambda *_: compared.append(trainer.iteration))
    for _ in range(5):
        step(trainer)
    assert compared == [2, 4]
    monkeypatch.undo()
    check_replicas(trainer.gathered_chunks(), trainer.parallel)


@pytest.mark.parametrize(
    ("dtype", "bits", "integer"), [(torch.float32, 32, torch.int32), (torch.bfloat16, 16, torch.int16)]
)
def test_the_checksum_changes_with_any_one_bit(dtype, bits, integer):
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = bit_sum(weight)
    for bit in range(bits):
        flipped = weight.clone()
        flipped.view(integer)[1, 2] ^= torch.tensor(1 << bit).to(integer)
        assert bit_sum(flipped) != plain
    assert bit_sum(weight.clone()) == plain


@pytest.mark.parametrize(
    "values",
    [
        {"max_consecutive_skips": 0},
        {"loss_spike_window": 0},
        {"loss_spike_factor": 1.0},
        {"grad_norm_limit": 0.0},
        {"check_replicas_interval": 0},
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_name(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        GuardConfig(**values)
