"""One record has the same ids in every stage, and in what transformers reads after export."""

import types

import pytest
from helpers.tiny_tokenizers import train_sentencepiece, write_hf_tokenizer
from transformers import AutoTokenizer

from megatron_brain.config.data import DataConfig
from megatron_brain.data.records import PreferenceReader, PromptReader, SFTReader, read_records
from megatron_brain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_brain.generation import native
from megatron_brain.generation.batch import Completion
from megatron_brain.stages import answers, comparison

PROMPT, ANSWER, WORSE = " hello \u6f22 world\nTL;DR:", " a short </s> summary\u2603 ", "no"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def make(kind, folder):
    if kind.startswith("hf"):
        return HuggingFaceTokenizer(write_hf_tokenizer(folder, add_bos=kind != "hf", chat_template=TEMPLATE, **NAMES))
    return SentencePieceTokenizer(train_sentencepiece(folder, model_type=kind, required_chars="<>/s", **LOSSLESS))


def walk(tokenizer, folder, monkeypatch, *, sft, pair):
    """Prompt and response ids by the name of the place that has them."""
    limits = DataConfig(seq_length=200)
    [group], _ = read_records(SFTReader(tokenizer, limits), [("x:1", sft)])
    [preference], _ = read_records(PreferenceReader(tokenizer, limits), [("x:1", pair)])
    prompts, _ = read_records(PromptReader(tokenizer, limits), [("x:1", sft)])
    seen = {
        "sft": (group.prompt, group.responses[0]),
        "reward": (preference.group.prompt, preference.group.responses[0]),
    }

    class Sampler:
        def __init__(self, *args, eos_id):
            self.eos_id = eos_id

        def generate(self, prompts, **_):
            seen["sampling"] = (prompts[0], (*group.responses[0][:-1], self.eos_id))
            return [
                [Completion(tokens=group.responses[0], token_logprobs=(0.0,) * len(group.responses[0]), finished=True)]
            ]

    monkeypatch.setattr(native, "Sampler", Sampler)
    settings = types.SimpleNamespace(samples_per_prompt=1, seed=1, shared_prefix=True)
    config = types.SimpleNamespace(training=settings)
    run = types.SimpleNamespace(tokenizer=tokenizer, parallel=None, config=config)
    answers.sample_answers(run, native.NativeEngine(None, eos_id=tokenizer.eos_id), prompts, [0], settings)
    seen["evaluate"] = (prompts[0].tokens, comparison.reference_tokens(run, prompts[0]))
    tokenizer.export(folder / "exported", "policy")
    return seen, AutoTokenizer.from_pretrained(folder / "exported"), prompts[0]


@pytest.mark.parametrize("kind", ["hf", "hf_bos", "bpe", "unigram"])
def test_a_plain_record_has_one_encoding_everywhere(kind, tmp_path, monkeypatch):
    tokenizer = make(kind, tmp_path)
    sft, pair = (
        {"prompt": PROMPT, "completion": ANSWER},
        {"prompt": PROMPT, "chosen": ANSWER, "rejected": WORSE},
    )
    seen, hf, prompt = walk(tokenizer, tmp_path, monkeypatch, sft=sft, pair=pair)
    # By hand, of nothing but the exported tokenizer: BOS + text, what the joined text has behind it + EOS.
    literal = {"add_special_tokens": False, "split_special_tokens": True}
    bos = [] if kind == "hf" else [hf.bos_token_id]
    prompt_ids = (*bos, *hf(PROMPT, **literal)["input_ids"])
    joined = (*bos, *hf(PROMPT + ANSWER, **literal)["input_ids"])
    assert joined[: len(prompt_ids)] == prompt_ids
    expected = (prompt_ids, (*joined[len(prompt_ids) :], hf.eos_token_id))
    assert seen == dict.fromkeys(("sft", "reward", "sampling", "evaluate"), expected)
    assert tuple(hf(PROMPT)["input_ids"]) == prompt_ids
    assert expected[1].count(hf.eos_token_id) == 1
    assert (prompt.text, prompt.reference) == (PROMPT, ANSWER)
    assert tokenizer.decode_response(expected[1]) == ANSWER
    assert hf.decode([*prompt_ids, *expected[1]], skip_special_tokens=True) == PROMPT + ANSWER


@pytest.mark.parametrize("kind", ["hf", "hf_bos"])
def test_a_chat_has_one_encoding_everywhere(kind, tmp_path, monkeypatch):
    tokenizer = make(kind, tmp_path)
    question, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "a short summary "}
    sft, pair = (
        {"messages": [question, answer]},
        {"prompt": [question], "chosen": [answer], "rejected": [{"role": "assistant", "content": WORSE}]},
    )
    seen, hf, prompt = walk(tokenizer, tmp_path, monkeypatch, sft=sft, pair=pair)
    assert len(set(seen.values())) == 1
    together = [i for ids in seen["sft"] for i in ids]
    assert together == hf.apply_chat_template([question, answer], tokenize=True)["input_ids"]
    assert list(seen["sft"][0]) == hf.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
    assert together.count(hf.bos_token_id) == together.count(hf.eos_token_id) == 1
    assert prompt.reference == answer["content"]
