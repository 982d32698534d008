"""DPO and its relatives as TRL computes them, against the objectives on pairs and BRAIn on groups of two."""

import math
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from helpers.tiny_tokenizers import write_hf_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from megatron_brain.objectives.brain import brain_loss, posterior_log_weights
from megatron_brain.objectives.registry import make_objective

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning:transformers")

# Few tokens: TRL sums log-probabilities in float32, whose steps are 2e-6 at 30 nats.
PAIRS = [
    {"prompt": "the package index:", "chosen": " strings", "rejected": " fox"},
    {"prompt": "TL;DR: fast", "chosen": " again", "rejected": " and again"},
    {"prompt": "hello", "chosen": " the", "rejected": " fine!"},
]


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """No network, and the generators and accelerate's process-wide state as they were."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_hf_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token="</s>", pad_token="<pad>")
    return AutoTokenizer.from_pretrained(path)


def tiny_llama(vocab_size, seed):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def of_trl(policy, prior, tokenizer, beta, output_dir, *, loss_type="sigmoid", records=PAIRS):
    """Loss and parameter gradients of DPOTrainer on all pairs at once."""
    config = DPOConfig(
        output_dir=str(output_dir),
        beta=beta,
        loss_type=loss_type,
        per_device_train_batch_size=len(records),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    pairs = Dataset.from_list(records)
    trainer = DPOTrainer(policy, prior, config, train_dataset=pairs, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    return loss_and_gradients(loss, trainer.model)


def of_brain(policy, prior, tokenizer, strength):
    losses = []
    for pair in PAIRS:
        log_policy = response_log_probs(policy, tokenizer, pair)
        with torch.no_grad():
            log_prior = response_log_probs(prior, tokenizer, pair)
        rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
        log_alpha = posterior_log_weights(log_prior, rewards, log_prior, reward_temperature=1.0, kind="hard")
        losses.append(brain_loss(log_policy, log_prior, log_alpha, strength=strength))
    return loss_and_gradients(torch.stack(losses).mean(), policy)


def of_objective(objective, policy, prior, tokenizer, records=PAIRS, *, rejected_first=()):
    """Mean loss over the pairs, each a group, and its parameter gradients.

    Args:
        rejected_first: places of the pairs whose rejected response comes first in the group.
    """
    losses = []
    for place, pair in enumerate(records):
        swap = [1, 0] if place in rejected_first else [0, 1]
        with torch.no_grad():
            known = {
                "log_prior": response_log_probs(prior, tokenizer, pair)[swap],
                "reward": torch.tensor([2.5, -1.0], dtype=torch.float64)[swap],
            }
        known[objective.fixes] = objective.fix(known)
        losses.append(objective.loss(response_log_probs(policy, tokenizer, pair)[swap], known))
    return loss_and_gradients(torch.stack(losses).mean(), policy)


def response_log_probs(model, tokenizer, pair):
    """Log-probabilities of the chosen and the rejected response, EOS included, each scored alone: `[2]` float64."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    sums = []
    for name in ("chosen", "rejected"):
        tokens = tokenizer(pair["prompt"] + pair[name])["input_ids"] + [tokenizer.eos_token_id]
        assert tokens[: len(prompt)] == prompt
        tokens = torch.tensor([tokens])
        log_probs = model(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
        per_token = log_probs.gather(-1, tokens[:, 1:, None])[0, :, 0]
        sums.append(per_token[len(prompt) - 1 :].sum())
    return torch.stack(sums)


def loss_and_gradients(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return SimpleNamespace(loss=loss.item(), gradients=[gradient.double() for gradient in gradients])


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_hard_alpha_on_given_pairs_is_the_dpo_loss_of_trl_and_its_gradients(tokenizer, beta, tmp_path):
    policy, prior = (tiny_llama(len(tokenizer), seed) for seed in (0, 1))
    ours = of_brain(policy, prior, tokenizer, strength=beta)
    theirs = of_trl(policy, prior, tokenizer, beta, tmp_path)
    assert abs(ours.loss - math.log(2)) > 0.01, "policy and prior are too alike for a test"
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-5)


def assert_equal(ours, theirs, scale=1.0):
    assert ours.loss / scale == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(our_gradient / scale, their_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "loss_type"), [("dpo", "sigmoid"), ("rso-sigmoid", "sigmoid"), ("rso-hinge", "hinge")]
)
def test_objectives_on_pairs_are_the_losses_of_trl(name, loss_type, strength, tokenizer, tmp_path):
    policy, prior = (tiny_llama(len(tokenizer), seed) for seed in (0, 1))
    objective = make_objective(name, {"policy_strength": strength})
    ours = of_objective(objective, policy, prior, tokenizer, rejected_first=(1,))
    theirs = of_trl(policy, prior, tokenizer, strength, tmp_path, loss_type=loss_type)
    assert max(gradient.abs().max() for gradient in ours.gradients) > 1e-3
    assert_equal(ours, theirs)


# Both responses of all pairs have as many tokens, EOS included.
EQUALLY_LONG = [
    {"prompt": "the package index:", "chosen": " strings", "rejected": " package"},
    {"prompt": "hello", "chosen": " quick", "rejected": " brown"},
]


def test_ipo_is_that_of_trl_where_responses_are_equally_long_and_dividing_by_it_scales(tokenizer, tmp_path):
    texts = [pair[name] for pair in EQUALLY_LONG for name in ("chosen", "rejected")]
    [length] = {len(tokenizer(text)["input_ids"]) + 1 for text in texts}
    policy, prior = (tiny_llama(len(tokenizer), seed) for seed in (0, 1))
    objective = make_objective("ipo", {"policy_strength": 0.2 / length})
    ours = of_objective(objective, policy, prior, tokenizer, EQUALLY_LONG)
    theirs = of_trl(policy, prior, tokenizer, 0.2, tmp_path, loss_type="ipo", records=EQUALLY_LONG)
    # (delta / L - 1 / (2 beta))^2 = (delta - 1 / (2 beta / L))^2 / L^2
    assert_equal(ours, theirs, scale=length**2)
