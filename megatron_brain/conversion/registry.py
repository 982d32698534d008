"""Which family a Hugging Face directory belongs to, read from its config.json alone."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_brain.config.errors import ConfigError
from megatron_brain.conversion.family import Family
from megatron_brain.conversion.llama import LLAMA
from megatron_brain.models.provider import Head

FAMILIES: tuple[Family, ...] = (LLAMA,)

_CLASSES: dict[str, tuple[Family, Head]] = {
    **{family.policy_class: (family, "policy") for family in FAMILIES},
    **{family.reward_class: (family, "reward") for family in FAMILIES},
}


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A Hugging Face directory as its config.json describes it. `architecture` has the keys ARCHITECTURE_FIELDS."""

    directory: Path
    family: Family
    head: Head
    architecture: dict
    config: dict


def read_hf_model(directory: str | Path) -> HFModel:
    """Read config.json.

    Raises:
        ConfigError: no directory, no config.json, an architecture of no family, or an option that is not supported.
    """
    path = Path(directory)
    config = _read_config(path)
    named = config.get("architectures") or []
    known = [name for name in named if name in _CLASSES]
    if not known:
        raise ConfigError(
            f"{path / 'config.json'}: architectures={named} is not supported; supported are {', '.join(_CLASSES)}"
        )
    family, head = _CLASSES[known[0]]
    try:
        if head == "reward":
            _check_classifier(config)
        sizes = family.architecture(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return HFModel(directory=path, family=family, head=head, architecture=sizes, config=config)


def read_hf_architecture(directory: str | Path) -> dict:
    """Sizes of the model in a Hugging Face directory, keys of ARCHITECTURE_FIELDS.

    Raises:
        ConfigError: as `read_hf_model`.
    """
    return read_hf_model(directory).architecture


def _read_config(directory: Path) -> dict:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is not a directory: give the local directory of a Hugging Face model "
            "(`hf download NAME --local-dir DIR` fetches one from the hub)"
        )
    if not path.is_file():
        raise ConfigError(f"{directory} has no config.json: it is not the directory of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def _check_classifier(config: dict) -> None:
    """A reward model has one label, and is read at the end-of-text token."""
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise ConfigError(f"the classifier has {labels} labels; a reward model has one (num_labels=1)")
    pad, ends = config.get("pad_token_id"), config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if pad is not None and pad in ends:
        raise ConfigError(
            f"pad_token_id and eos_token_id are both {pad}: transformers then reads the reward at the token before the "
            "end of text, we at the end of text. If the model was trained to be read there, give pad_token_id in "
            "config.json another id"
        )
