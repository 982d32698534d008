"""DPO as TRL computes it, against the BRAIn objective on groups of two."""

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


def of_trl(policy, prior, tokenizer, beta, output_dir):
    """Loss and parameter gradients of DPOTrainer on all pairs at once."""
    config = DPOConfig(
        output_dir=str(output_dir),
        beta=beta,
        per_device_train_batch_size=len(PAIRS),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    pairs = Dataset.from_list(PAIRS)
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
