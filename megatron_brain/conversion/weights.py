"""Weights between model chunks and a Hugging Face directory."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_brain.config.errors import ConfigError
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import Family, Weight
from megatron_brain.conversion.llama import LLAMA
from megatron_brain.conversion.pieces import Piece, pieces
from megatron_brain.conversion.registry import HFModel, read_hf_model
from megatron_brain.conversion.safetensors_files import SafetensorsReader, SafetensorsWriter
from megatron_brain.data.tokenizer import HuggingFaceTokenizer, Tokenizer, check_fits
from megatron_brain.models.provider import Chunk, Head
from megatron_brain.runtime.parallel import Parallel

log = logging.getLogger(__name__)


@torch.no_grad()
def load_hf_weights(directory: str | Path, chunks: Sequence[Chunk], model: ModelConfig, head: Head) -> None:
    """Fill this rank's chunks, of any layout, from a Hugging Face directory; one whole tensor is in memory at a time.

    Vocabulary padding becomes zeros. A reward model may start from a language model: its head stays as it was.

    Args:
        directory: holds config.json and safetensors.
        chunks: what `build_model` made of `model` and `head`.

    Raises:
        ConfigError: a policy is asked from a classifier; tensors are missing, of other shapes, or not known.
    """
    source = read_hf_model(directory)
    if head == "policy" and source.head == "reward":
        raise ConfigError(
            f"{directory} is a reward model ({source.family.reward_class}) and has no output layer; a policy is needed "
            f"here: give a {source.family.policy_class}"
        )
    table = {weight.name: weight for weight in source.family.weights(model, source.head)}
    with SafetensorsReader(source.directory) as files:
        _check_tensors(files, source, model)
        key, whole = None, None
        for piece in (piece for chunk in chunks for piece in pieces(chunk)):
            if piece.name == source.family.reward_head.name and source.head == "policy":
                log.info("%s is a language model: the reward head starts from its random weights", directory)
                continue
            if key != (piece.name, piece.layer):
                key, whole = (piece.name, piece.layer), _read(files, table[piece.name], piece.layer, model)
            _fill(piece, whole)


def export_hf(
    directory: str | Path,
    chunks: Sequence[Chunk],
    model: ModelConfig,
    head: Head,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    parallel: Parallel,
) -> None:
    """Write a Hugging Face directory that transformers loads: weights, configuration, tokenizer.

    config.json is written last: without it nothing takes the directory for a model. The padding token is never the
    end of text, so a reward model (`*ForSequenceClassification`, one label), which transformers reads at the last
    token of a row that is not padding, is read at the end of text of a right-padded row.

    Args:
        directory: must be empty or not exist.
        chunks: of one process; another layout's checkpoint is loaded into one process first.
        dtype: of the written weights.

    Raises:
        ConfigError: the directory is not empty, the model is split over processes, or transformers cannot express it.
        ValueError: the tokenizer does not fit the model.
    """
    if parallel.tp_size * parallel.pp_size > 1:
        raise ConfigError("export runs as one process: start it without torchrun, a checkpoint loads at any layout")
    check_fits(tokenizer, model.vocab_size)
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: give another directory, or remove it")
    config = _config_json(LLAMA, model, head, tokenizer, dtype)
    target.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(target)
    for name, tensor in hf_tensors(chunks[0], model, head, LLAMA):
        writer.add(name, tensor.to(device="cpu", dtype=dtype))
    writer.close()
    _write_tokenizer(target, tokenizer, head)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if head == "policy":
        _write_json(target / "generation_config.json", ids)
    _write_json(target / "config.json", config)


def hf_tensors(chunk: Chunk, model: ModelConfig, head: Head, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything the Hugging Face model has, from a chunk that holds the whole model."""
    held: dict[tuple[str, int | None], list[Piece]] = {}
    for piece in pieces(chunk):
        held.setdefault((piece.name, piece.layer), []).append(piece)
    for weight in family.weights(model, head):
        for layer in weight.layers(model):
            whole = _assemble(held[weight.name, layer])
            if weight.sources[0].shape[0] == "vocab":
                whole = whole[: model.vocab_size]
            for source, tensor in zip(weight.sources, weight.fusion.split(whole, model), strict=True):
                yield source.in_layer(layer), tensor


def _read(files: SafetensorsReader, weight: Weight, layer: int | None, model: ModelConfig) -> Tensor:
    return weight.fusion.join([files.read(source.in_layer(layer)) for source in weight.sources], model)


def _fill(piece: Piece, whole: Tensor) -> None:
    """Copy a rank's share of a whole tensor; rows past its end are vocabulary padding."""
    part = whole[piece.place]
    piece.data[: part.size(0)].copy_(part)
    piece.data[part.size(0) :].zero_()


def _assemble(held: list[Piece]) -> Tensor:
    if len(held) == 1:
        return held[0].data
    whole = held[0].data.new_empty(held[0].shape)
    for piece in held:
        whole[piece.place] = piece.data
    return whole


def _check_tensors(files: SafetensorsReader, source: HFModel, model: ModelConfig) -> None:
    """The files hold exactly the tensors of the table, in their shapes. Reads headers, and a tied output layer."""
    where, family = source.directory, source.family
    expected = dict(family.tensors(model, source.head))
    missing = [name for name in expected if name not in files.file_of]
    if missing:
        raise ConfigError(f"{where} lacks {len(missing)} of the {len(expected)} tensors of its model: {_some(missing)}")
    unknown = [name for name in files.file_of if name not in expected and not name.endswith(family.ignored)]
    if source.head == "policy" and not model.untie_embeddings_and_output_weights:
        unknown = _without_tied_output(files, family, where, unknown)
    if unknown:
        raise ConfigError(
            f"{where} has {len(unknown)} tensors that a {family.name} model of its config.json does not have: "
            f"{_some(unknown)}"
        )
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise ConfigError(
                f"{where / files.file_of[name]}: {name} has shape {list(files.shape(name))}, "
                f"the sizes in config.json ask for {list(shape)}"
            )


def _without_tied_output(files: SafetensorsReader, family: Family, where: Path, unknown: list[str]) -> list[str]:
    """Some files repeat the embedding as output layer. transformers unties the two if they differ."""
    embedding, output = family.trunk[0].sources[0].name, family.output.sources[0].name
    if output in unknown and not torch.equal(files.read(output), files.read(embedding)):
        raise ConfigError(
            f"{where}: config.json has tie_word_embeddings=true, but {output} differs from {embedding}: "
            "set tie_word_embeddings to false, or remove the tensor"
        )
    return [name for name in unknown if name != output]


def _config_json(family: Family, model: ModelConfig, head: Head, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    dtype_name = str(dtype).removeprefix("torch.")
    reward = {
        "problem_type": "regression",
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }
    return {
        "architectures": [family.policy_class if head == "policy" else family.reward_class],
        **family.hf_config(model),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        # The name of transformers 4, which transformers 5 reads as well.
        "torch_dtype": dtype_name,
        **(reward if head == "reward" else {}),
    }


def _write_tokenizer(target: Path, tokenizer: Tokenizer, head: Head) -> None:
    tokenizer.save(target)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        log.warning(
            "%s: AutoTokenizer may split text otherwise than %s does (leading spaces): give the model token ids, or "
            "encode with the sentencepiece library",
            target,
            tokenizer.tokenizer_type,
        )
    elif head == "reward":
        if tokenizer.hf.pad_token_id != tokenizer.pad_id:
            log.warning(
                "%s: the tokenizer pads with %s, which transformers would read the reward at: pad with id %d",
                target,
                tokenizer.hf.pad_token,
                tokenizer.pad_id,
            )
        # A text cut on the right loses the end that the reward is read at.
        path = target / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        _write_json(path, {**settings, "padding_side": "right", "truncation_side": "left"})


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
