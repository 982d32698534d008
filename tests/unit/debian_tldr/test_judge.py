"""The judge: ROUGE and cosine, by hand."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)


def test_rouge_score_matches_hand_computation(example):
    # "a b c" against "a b d": bigrams ab of {ab, bc}, {ab, bd}; longest common subsequence a b of 3 words.
    (value,) = example.judge.score_rouge(["p"], ["a b c"], [" a b d"])
    assert value == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert example.judge.score_rouge(["p", "p"], ["x y z", ""], ["x y z", "x y z"]) == [1.0, 0.0]


def test_score_is_rouge_and_clipped_cosine_and_zero_for_empty(example, monkeypatch):
    vectors = {"ref words here": (1.0, 0.0), "near": (0.6, 0.8), "opposite": (-1.0, 0.0), "": (1.0, 0.0)}
    monkeypatch.setattr(example.judge, "embed", lambda texts: torch.tensor([vectors[text] for text in texts]))
    responses = [" near", "ref words here", "opposite", "  "]
    values = example.judge.score(["p"] * 4, responses, [" ref words here"] * 4)
    assert values == pytest.approx([0.5 * 0.6, 1.0, 0.0, 0.0])


def test_judge_refuses_lists_of_different_length(example):
    for function in (example.judge.score, example.judge.score_rouge):
        with pytest.raises(ValueError, match="1 prompts, 2 responses and 1 references"):
            function(["p"], ["a", "b"], ["c"])


def test_embeddings_are_token_means_whatever_the_padding(example, monkeypatch, tmp_path):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = BertModel(config).eval()
    encoder.save_pretrained(tmp_path)
    monkeypatch.setenv("TLDR_JUDGE_DIR", str(tmp_path))
    rows = example.judge.embed(["a", "a b c b a"])
    with torch.no_grad():
        for row, ids in zip(rows, ([2], [2, 3, 4, 3, 2]), strict=True):
            mean = encoder(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(row, mean / mean.norm())


def test_judge_without_its_encoder_names_the_cure(example, monkeypatch, tmp_path):
    monkeypatch.setenv("TLDR_JUDGE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fetch_judge\.py --out DIR"):
        example.judge.score(["p"], ["a"], ["b"])
